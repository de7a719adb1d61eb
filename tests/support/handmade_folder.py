"""The folder of a saved GenieBlue, written by hand: right in layout, with weights of a few numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

BASE = "maker/base-llm"
REVISION = "0123456789abcdef0123456789abcdef01234567"


def write_handmade_folder(folder: Path, **config_changes: Any) -> Path:
    """Writes a complete folder with 30 + 12 parameters of its own and 8 + 20 in the adapter, all fp32."""
    (folder / "language_adapter").mkdir(parents=True)
    base = config_changes.get("base_model_name_or_path", BASE)
    revision = config_changes.get("base_model_revision", REVISION)
    config = {
        "model_type": "genieblue",
        "auto_map": {
            "AutoConfig": "configuration_genieblue.GenieBlueConfig",
            "AutoModel": "modeling_genieblue.GenieBlueForConditionalGeneration",
        },
        "base_model_name_or_path": base,
        "base_model_revision": revision,
        "base_model_fingerprint": {"model.safetensors": "0" * 64},
        "text_config": {"model_type": "llama", "num_hidden_layers": 8},
        "vision_config": {"model_type": "siglip_vision_model", "_name_or_path": "maker/siglip"},
        "placement": "skip",
        "replicated_layers": [3, 7],
        "lora_rank": 8,
        "lora_alpha": 16,
        "image_seq_length": 196,
    } | config_changes
    write_json(folder / "config.json", config)
    write_json(
        folder / "processor_config.json",
        {
            "auto_map": {"AutoProcessor": "processing_genieblue.GenieBlueProcessor"},
            "image_processor": {
                "auto_map": {"AutoImageProcessor": "image_processing_genieblue.GenieBlueImageProcessor"},
                "tile_size": 384,
                "max_tiles": 16,
            },
        },
    )
    write_json(folder / "base_fingerprint.json", {})
    write_json(folder / "tokenizer_config.json", {})
    write_json(folder / "tokenizer.json", {})
    (folder / "configuration_genieblue.py").write_text("import math\n")
    (folder / "modeling_genieblue.py").write_text(
        "from .configuration_genieblue import A\nfrom .views_genieblue import B\n"
    )
    (folder / "views_genieblue.py").write_text("from .configuration_genieblue import A\n")
    (folder / "processing_genieblue.py").write_text("")
    (folder / "image_processing_genieblue.py").write_text("")
    save_file(
        {
            "vision_tower.embeddings.weight": np.zeros((5, 6), np.float32),
            "multi_modal_projector.norm.weight": np.zeros(12, np.float32),
        },
        folder / "model.safetensors",
    )
    write_json(
        folder / "language_adapter/adapter_config.json", {"base_model_name_or_path": base, "revision": revision}
    )
    save_file(
        {
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((2, 4), np.float32),
            "base_model.model.model.layers.3.mlp.up_proj.weight": np.zeros((4, 5), np.float32),
        },
        folder / "language_adapter/adapter_model.safetensors",
    )
    return folder


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def change_json(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)
