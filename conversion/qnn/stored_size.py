"""Bytes of a bundle's weights, and what a budget leaves for the matrices whose bits can be chosen."""

import math
from typing import Any

from conversion.qnn.qdq.block_rounding import LORA_BITS
from conversion.qnn.qdq.language import LanguageSettings
from conversion.qnn.qdq.vision import VISION_BITS
from modeling_genieblue.language_adapter_genieblue import adapter_parameters, find_blocks

POOLING_HEAD = "head."  # of SigLIP, which no graph has


def fixed_bytes(model: Any, embedding_bits: int) -> int:
    """Bytes of embeddings, LoRA, vision tower and projector of a GenieBlue in a bundle."""
    lora = sum(p.numel() for name, _, p in adapter_parameters(model.multimodal_language_model) if ".lora_" in name)
    tower = getattr(model.vision_tower, "vision_model", model.vision_tower)
    vision = [p for name, p in tower.named_parameters() if not name.startswith(POOLING_HEAD)]
    vision += model.multi_modal_projector.parameters()
    bits = (
        model.get_input_embeddings().weight.numel() * embedding_bits
        + lora * LORA_BITS
        + sum(p.numel() * (VISION_BITS if p.ndim > 1 else 16) for p in vision)
    )
    return bits // 8


def matrix_weights(model: Any) -> int:
    """Weights in the matrices of all blocks and the LM head; those of a replicated block count twice."""
    _, blocks = find_blocks(model.language_model)
    copied = [blocks[index] for index in model.config.replicated_layers]
    matrices = (p for block in (*blocks, *copied) for p in block.parameters() if p.ndim == 2)
    return sum(p.numel() for p in matrices) + model.get_output_embeddings().weight.numel()


def matrix_budget(model: Any, settings: LanguageSettings) -> float:
    """Bits that the matrices of the base and their copies may take in `mixed`.

    Raises `ValueError` for a size that is too small even with 4 bits throughout.
    """
    total = matrix_weights(model)
    if settings.max_bytes is None:
        assert settings.bits_per_weight is not None
        return settings.bits_per_weight * total
    others = fixed_bytes(model, settings.embedding_bits)
    least = others + math.ceil(settings.four_bits.bits_per_weight * total / 8)
    if settings.max_bytes < least:
        raise ValueError(
            f"The weights cannot take {settings.max_bytes:,} bytes: the least is {least:,}, with all matrices in "
            f"{settings.four_bits}, and {others:,} for embeddings, LoRA and vision tower. Allow at least that, or "
            "give `embedding_bits` 8 (--embedding-bits 8), or larger groups (--group-size)."
        )
    return 8 * (settings.max_bytes - others)
