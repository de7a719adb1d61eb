"""Counts the parameters that each structure of the paper trains, on the meta device."""

import copy

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from genieblue.lab.structures import KINDS
from modeling_genieblue import GenieBlueConfig, GenieBlueMultiModalProjector
from modeling_genieblue.configuration_genieblue import PLACEMENTS
from modeling_genieblue.language_adapter_genieblue import make_lora_config

# BlueLM is Llama-style. Its depth, width and vocabulary follow from the paper's counts; the head sizes are typical.
PRESETS: dict[str, PreTrainedConfig] = {
    "bluelm-3b": LlamaConfig(
        vocab_size=100_096, hidden_size=2560, intermediate_size=6912, num_hidden_layers=32, num_attention_heads=20,
        num_key_value_heads=4, head_dim=128, tie_word_embeddings=False,
    ),
    "qwen2.5-3b": Qwen2Config(
        vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
}  # fmt: skip
# SigLIP so400m/14 at 384 px, including the pooling head, as in the paper's counts.
SIGLIP = SiglipVisionConfig(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
    patch_size=14,
)  # fmt: skip


def count_trainable(
    preset: str, structure: str = "genieblue", placement: str = "skip", rank: int = 8
) -> dict[str, int | dict[str, int]]:
    """Trainable parameters of a base with one structure, as `{"trainable_parameters": n, "parts": {name: n}}`.

    Every structure trains the vision tower (SigLIP so400m) and the projector. In the language model, `full` trains
    everything; `lora` trains LoRA on the linear layers of all blocks; `cogvlm` trains copies of the linear layers in a
    quarter of the blocks and LoRA on the others; `genieblue` trains copies of those whole blocks, including norms, and
    LoRA on the others. `placement` (skip, pre, post) chooses the quarter; `full` and `lora` ignore it.

    Raises `ValueError` for an unknown preset, structure or placement, or a rank below 1.
    """
    for what, name, choices in (
        ("preset", preset, PRESETS),
        ("structure", structure, KINDS),
        ("placement", placement, PLACEMENTS),
    ):
        if name not in choices:
            raise ValueError(f"Unknown {what} {name!r}: choose one of {', '.join(choices)}.")
    if rank < 1:
        raise ValueError(f"The LoRA rank is {rank}: expected at least 1.")

    kind = KINDS[structure]
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(PRESETS[preset])
        config = GenieBlueConfig(
            text_config=copy.deepcopy(base.config), vision_config=SIGLIP, placement=placement, lora_rank=rank
        )
        parts = {
            # With the pooling head, as the paper counts, which no image token uses and training leaves alone.
            "vision_tower": _count(SiglipVisionModel(SIGLIP)),
            "multi_modal_projector": _count(GenieBlueMultiModalProjector(config)),
        }
        view = kind.model_class._build_view(base, make_lora_config(base, config))
        for name, parameter in view.named_parameters():  # yields a tied embedding once
            if (group := kind.group_of_language(name)) is not None:
                parts[group] = parts.get(group, 0) + parameter.numel()
    return {"trainable_parameters": sum(parts.values()), "parts": parts}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
