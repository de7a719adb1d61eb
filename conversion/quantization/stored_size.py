"""Bytes of the weights of a quantized GenieBlue and its base, as they are planned."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from conversion.quantization.precision import LayerPlan, QuantizationRecipe
from modeling_genieblue.language_adapter_genieblue import adapter_parameters

UNUSED_SCALES = 2 * torch.float32.itemsize  # of activations, in quanto's format


def stored_bytes(shape: Iterable[int], group_size: int | None, dtype: torch.dtype) -> int:
    """Bytes of a weight: codes, scales in `dtype`, and zero points of its groups of 4-bit codes (`None`: 8 bits)."""
    out_features, in_features = shape
    if group_size is None:
        return UNUSED_SCALES + out_features * (in_features + dtype.itemsize)
    groups = in_features // group_size
    return UNUSED_SCALES + out_features * (in_features // 2 + groups * (dtype.itemsize + 1))


def state_bytes(
    state: Mapping[str, torch.Tensor], plan: LayerPlan, recipe: QuantizationRecipe, left_out: Collection[str] = ()
) -> int:
    """Bytes of tensors by name, those shared by several modules once, without the linears in `left_out`."""
    seen: set[int] = set()
    total = 0
    for name, value in state.items():
        module = name.removesuffix(".weight")
        if module in left_out or value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        total += _planned_bytes(module, value, plan, recipe)
    return total


def adapter_bytes(view: Any, plan: LayerPlan, recipe: QuantizationRecipe, left_out: Collection[str] = ()) -> int:
    """Bytes of LoRA and the replicated blocks, without the linears in `left_out`."""
    total = 0
    for _, stock, value in adapter_parameters(view):
        module = stock.removesuffix(".weight")
        if ".lora_" in module and module in plan.kinds:
            total += value.numel() + min(value.shape) * recipe.dtype.itemsize  # a scale for each rank
        elif module not in left_out:
            total += _planned_bytes(module, value, plan, recipe)
    return total


def _planned_bytes(module: str, value: torch.Tensor, plan: LayerPlan, recipe: QuantizationRecipe) -> int:
    if module in plan.kinds:
        return stored_bytes(value.shape, plan.group_size(module, value, recipe), recipe.dtype)
    return value.numel() * (recipe.dtype if value.is_floating_point() else value.dtype).itemsize
