"""The card of a quantized base: what it was made from, at which precision, and how it is loaded."""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hub_cards.model_card import CARD, HUB, base_facts, card_environment
from hub_cards.model_folder import is_hub_id

logger = logging.getLogger(__name__)

PARTS = {"llm": "linears of the blocks", "lm_head": "LM head", "embeddings": "embeddings"}


def write_quantized_base_card(folder: Path, settings: dict[str, Any], repo_name: str | None = None) -> None:
    """Writes `README.md` into the folder of a quantized base, from its `quantization_config`."""
    origin = settings["source"]
    on_hub = is_hub_id(origin["name"], folder) and "/" in origin["name"]
    licence, languages = base_facts(origin["name"], origin["revision"]) if on_hub else (None, [])
    info = {
        "repo_name": repo_name or folder.name,
        "base_link": f"[`{origin['name']}`]({HUB}/{origin['name']})" if on_hub else f"`{origin['name']}`",
        "precisions": {title: settings[part] for part, title in PARTS.items()},
        "rounding": settings["rounding"],
        "activations": settings["activations"],
        "other_precision": settings["other_precision"],
    }
    metadata = ModelCardData(
        base_model=origin["name"] if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        license=licence.id if licence else None,
        license_name=licence.name if licence else None,
        license_link=licence.link if licence else None,
        language=languages or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["genieblue", "quantized", "optimum-quanto", settings["llm"]],
    )
    body = card_environment().get_template("quantized_base_card_template.md").render(info=info)
    (folder / CARD).write_text(f"---\n{metadata.to_yaml()}\n---\n\n{body.strip()}\n", encoding="utf-8")


__all__ = ["write_quantized_base_card"]
