"""The card of a quantized base: its origin, its precision and how to load it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from hub_cards.model_card import (
    HUB,
    License,
    assemble_card,
    base_facts,
    card_environment,
    card_metadata,
    folder_facts,
)
from hub_cards.model_folder import (
    BASE_PARTS,
    PartSize,
    check_is_quantized_base,
    count_formats,
    parameter_sizes,
    precision_tags,
    shown_precisions,
)
from hub_cards.verdicts import measurement_rows, summary
from modeling_genieblue.model_files_genieblue import CARD_NAME, QUANTIZED_WEIGHTS_NAME, is_hub_id, read_json


def write_quantized_base_card(folder: Path, source: Path | None = None) -> None:
    """Writes `README.md` into the folder of a quantized base; see `render_quantized_base_card`."""
    (folder / CARD_NAME).write_text(
        render_quantized_base_card(folder, folder.name, source), encoding="utf-8", newline="\n"
    )


def render_quantized_base_card(
    folder: Path, repo_name: str, source: Path | None = None, settings: dict[str, Any] | None = None
) -> str:
    """The card of the quantized base in `folder`, which must contain `config.json` and the weights.

    Args:
        repo_name: argument of `from_pretrained`.
        source: folder of the unquantized base. Its README gives licence and languages unless that base is on the Hub;
            without `source` they come from the folder's existing card.
        settings: replace those in its `config.json`, if the verdict is published as accepted.
    """
    settings = settings or check_is_quantized_base(folder)
    origin = settings["source"]
    on_hub = is_hub_id(origin["name"], folder) and "/" in origin["name"]
    licence, languages = _facts(folder, origin if on_hub else None, source)
    sizes = parameter_sizes(folder / QUANTIZED_WEIGHTS_NAME).values()
    verdict = settings.get("verdict") or {}
    auto_map = read_json(folder / "config.json").get("auto_map") or {}
    shown = shown_precisions(settings)
    info = {
        "repo_name": repo_name,
        "base_link": f"[`{origin['name']}`]({HUB}/{origin['name']})" if on_hub else f"`{origin['name']}`",
        "precisions": {title: shown[part] for part, title in BASE_PARTS.items()},
        "size": sum(sizes, PartSize()),
        "rounding": settings["rounding"],
        "group_size": settings.get("group_size"),
        "activations": settings["activations"],
        "mixed": count_formats(settings.get("formats")),
        "other_precision": settings["other_precision"],
        "other_rounding": settings.get("other_rounding") or {},
        "tokenizer_needs_code": "AutoTokenizer" in auto_map,
        "licence": licence,
        "verdict": summary(verdict) if verdict else None,
        "measurements": measurement_rows(verdict),
    }
    metadata = card_metadata(
        origin["name"] if on_hub else None,
        "quantized",
        licence,
        languages,
        pipeline_tag="text-generation",
        tags=["genieblue", "quantized", "optimum-quanto", *precision_tags({part: shown[part] for part in BASE_PARTS})],
    )
    body = card_environment().get_template("quantized_base_card_template.md").render(info=info)
    return assemble_card(metadata, body)


def _facts(folder: Path, origin: dict[str, Any] | None, source: Path | None) -> tuple[License | None, list[str]]:
    licence, languages = base_facts(origin["name"], origin["revision"]) if origin is not None else (None, [])
    for other in (source, folder):
        if licence is None and other is not None:
            licence, languages = folder_facts(other)
    if licence is not None and licence.link and "://" not in licence.link and not (folder / licence.link).is_file():
        licence = replace(licence, link=None)
    return licence, languages
