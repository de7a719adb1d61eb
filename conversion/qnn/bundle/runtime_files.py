"""Files in a bundle besides the binaries: processor, runtime configurations, README."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template

from conversion.qnn.bundle.metadata import README
from conversion.qnn.bundle.verdict_text import describe
from hub_cards.model_card import License, base_facts, card_metadata, folder_facts

BACKEND_FILE = "htp_backend_ext_config.json"
README_TEMPLATE = Path(__file__).with_name("readme_template.md")


def write_runtime_files(folder: Path, metadata: Mapping[str, Any], processor: Any) -> None:
    """Writes processor, configurations and README into the folder of a bundle."""
    processor.save_pretrained(folder / "processor")
    backend, genie = _backend_settings(metadata["soc"]), _genie_settings(metadata)
    for name, value in ((BACKEND_FILE, backend), ("genie_config.json", genie)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (folder / README).write_text(render_readme(metadata, (folder / "qairt").is_dir()), encoding="utf-8")


def render_readme(metadata: Mapping[str, Any], has_float_graphs: bool) -> str:
    """The README of a bundle, with front matter for the Hub."""
    base = metadata["base"]
    licence = base.get("license")  # neither in earlier bundles
    card = card_metadata(
        base["name_or_path"],
        "quantized",
        None if licence is None else License(**licence),
        base.get("languages") or [],
        pipeline_tag="image-text-to-text",
        tags=("genieblue", "qnn", "onnxruntime", "snapdragon", metadata["soc"]["name"], metadata["llm"]),
    )
    card.library_name = "onnx"
    template = Template(
        README_TEMPLATE.read_text(encoding="utf-8"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    lines = describe(metadata["verdict"]) if metadata["verdict"] else ["verdict: not given yet"]
    readme = template.render(metadata, verdict_lines=lines, has_float_graphs=has_float_graphs)
    return f"---\n{card.to_yaml()}\n---\n\n{readme}"


def terms_of_base(config: Any) -> dict[str, Any]:
    """Licence and languages of the base, for the card; unknown if there is no README to be had."""
    name, revision = config.base_model_name_or_path, config.base_model_revision
    licence, languages = None, []
    if name is not None and revision:
        licence, languages = base_facts(name, revision)
    elif name is not None and os.path.isdir(name):
        licence, languages = folder_facts(Path(name))
    return {"license": None if licence is None else asdict(licence), "languages": languages}


def _backend_settings(soc: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of QNN's own runtime for a chip as the metadata describe it."""
    return {
        "devices": [
            {
                "soc_model": soc["model"],
                "dsp_arch": f"v{soc['arch']}",
                "cores": [{"core_id": 0, "perf_profile": "burst", "rpc_control_latency": 100}],
            }
        ],
        "memory": {"mem_type": "shared_buffer"},
        "context": {"weight_sharing_enabled": True},
    }


def _genie_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A dialog of Qualcomm's Genie with the text view of a bundle."""
    decoder, embeddings = metadata["decoder"], metadata["embeddings"]
    begin, ends = metadata["generation"]["bos_token_id"], metadata["generation"]["eos_token_ids"]
    context = {
        "version": 1,
        "size": metadata["context_length"],
        "n-vocab": decoder["vocab_size"],
        # Genie wants one; a base that begins texts with none is never given it, as its tokenizer adds none.
        "bos-token": begin if begin is not None else ends[0] if ends else 0,
        "eos-token": ends[0] if len(ends) == 1 else ends or 0,
    }
    embedding = {
        "version": 1,
        "type": "lut",
        "lut-path": embeddings["file"],
        "size": decoder["hidden_size"],
        "datatype": embeddings["dtype"].replace("uint", "ufixed"),
        "quant-param": {"scale": embeddings["scale"], "offset": embeddings["offset"]},
    }
    htp = {
        "version": 1,
        "use-mmap": True,
        "poll": True,
        "spill-fill-bufsize": 0,
        "mmap-budget": 0,
        "cpu-mask": "0xe0",
        "allow-async-init": False,
        "kv-dim": decoder["head_dim"],
        "pos-id-dim": decoder["head_dim"] // 2,
    }
    binaries = [part["binary"] for part in metadata["parts"]]
    engine = {
        "version": 1,
        "n-threads": 3,
        "backend": {"version": 1, "type": "QnnHtp", "QnnHtp": htp, "extensions": BACKEND_FILE},
        "model": {"version": 1, "type": "binary", "binary": {"version": 1, "ctx-bins": binaries}},
    }
    return {
        "dialog": {
            "version": 1,
            "type": "basic",
            "context": context,
            "sampler": {"version": 1, "greedy": True},
            "tokenizer": {"version": 1, "path": "processor/tokenizer.json"},
            "embedding": embedding,
            "engine": engine,
        }
    }
