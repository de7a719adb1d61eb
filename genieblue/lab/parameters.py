"""Counts the parameters that each structure of the paper trains, on the meta device."""

import copy

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from modeling_genieblue.configuration_genieblue import PLACEMENTS, select_replicated_layers

STRUCTURES = ("full", "lora", "cogvlm", "genieblue")
BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PATCHES_PER_IMAGE_TOKEN = 4  # each 2x2 square of patch tokens becomes one image token


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
        ("structure", structure, STRUCTURES),
        ("placement", placement, PLACEMENTS),
    ):
        if name not in choices:
            raise ValueError(f"Unknown {what} {name!r}: choose one of {', '.join(choices)}.")
    if rank < 1:
        raise ValueError(f"The LoRA rank is {rank}: expected at least 1.")

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(PRESETS[preset])
        vision_tower = SiglipVisionModel(SIGLIP)
        projector = _projector(vision_tower.config.hidden_size, base.config.hidden_size)
        parts = {"vision_tower": _count(vision_tower), "multi_modal_projector": _count(projector)}
        parts |= _count_language_parts(base, structure, placement, rank)
    return {"trainable_parameters": sum(parts.values()), "parts": parts}


def _projector(vision_size: int, text_size: int) -> nn.Module:
    merged = PATCHES_PER_IMAGE_TOKEN * vision_size
    return nn.Sequential(
        nn.LayerNorm(merged), nn.Linear(merged, text_size), nn.GELU(), nn.Linear(text_size, text_size)
    )


def _count_language_parts(base: PreTrainedModel, structure: str, placement: str, rank: int) -> dict[str, int]:
    if structure == "full":
        return {"language_model": _count(base)}

    blocks = base.model.layers
    copied = [] if structure == "lora" else select_replicated_layers(len(blocks), placement)
    parts = {}
    if structure == "genieblue":
        parts["replicated_blocks"] = _count(nn.ModuleList(copy.deepcopy(blocks[index]) for index in copied))
    if structure == "cogvlm":
        experts = nn.ModuleList(_linears_of(copy.deepcopy(blocks[index])) for index in copied)
        parts["visual_experts"] = _count(experts)
    return parts | {"lora": _count_lora(base, [i for i in range(len(blocks)) if i not in copied], rank)}


def _linears_of(block: nn.Module) -> nn.ModuleList:
    return nn.ModuleList(module for module in block.modules() if isinstance(module, nn.Linear))


def _count_lora(base: PreTrainedModel, block_indices: list[int], rank: int) -> int:
    config = LoraConfig(
        r=rank,
        target_modules=list(BLOCK_LINEARS),
        layers_to_transform=block_indices,
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    adapted = inject_adapter_in_model(config, base)
    return sum(parameter.numel() for name, parameter in adapted.named_parameters() if ".lora_" in name)


def _count(module: nn.Module) -> int:
    # `parameters()` yields a tied embedding once.
    return sum(parameter.numel() for parameter in module.parameters())
