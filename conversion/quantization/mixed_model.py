"""Mixed precision of a GenieBlue: its base's blocks and the replicated ones share one budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from conversion.quantization.mixed import Budget, MixedLinear, MixedPrecision, Progress
from conversion.quantization.precision import LayerPlan, QuantizationRecipe
from conversion.quantization.stored_size import adapter_bytes, state_bytes, stored_bytes
from conversion.quantization.views import CalibratedView, own_state
from modeling_genieblue.quantized_parts_genieblue import quantized_adapter_entries


@dataclass(frozen=True)
class Plans:
    """Precision of each layer of vision tower and projector, of LoRA and the replicated blocks, and of the base."""

    own_parts: LayerPlan
    adapter: LayerPlan
    base: LayerPlan


def four_bit_weights(model: Any, plans: Plans, is_base_rounded: bool) -> dict[str, torch.Tensor]:
    """The weights of the blocks that `plans` give 4 bits, by their names in the base and in the adapter's file."""
    entries = quantized_adapter_entries(model.multimodal_language_model)
    weights = {stock: weight for _, stock, weight in entries if plans.adapter.kinds.get(stock) == "qint4"}
    if is_base_rounded:
        return weights
    own = [name for name, kind in plans.base.kinds.items() if kind == "qint4"]
    return {name: model.language_model.get_submodule(name).weight for name in own} | weights


class MixedModel:
    """The linears of `four_bit_weights`, within a budget.

    Args:
        size_of_base: bytes of the weights of a base that is rounded already; none of its linears counts then.

    Raises `ValueError` for a budget that cannot be met, or if there is nothing to choose.
    """

    def __init__(
        self, budget: Budget, model: Any, plans: Plans, recipe: QuantizationRecipe, size_of_base: int | None = None
    ):
        self._plans = plans
        base, view = model.language_model, model.multimodal_language_model
        weights = four_bit_weights(model, plans, is_base_rounded=size_of_base is not None)
        planned = 0
        for name, weight in weights.items():
            plan = plans.base if name in plans.base.kinds else plans.adapter
            planned += stored_bytes(weight.shape, plan.group_size(name, weight, recipe), recipe.dtype)
        if not weights and budget != Budget():
            raise ValueError(
                "No linear of the blocks would have 4 bits, so there is nothing to choose from: quantize `llm` "
                "(--llm) or `replicated_blocks` (--replicated) to w4a16, or leave out the budget."
            )
        self._precision = MixedPrecision(weights, recipe.dtype)
        others = state_bytes(own_state(model), plans.own_parts, recipe)
        others += adapter_bytes(view, plans.adapter, recipe, weights)
        of_base = size_of_base
        if of_base is None:
            of_base = state_bytes(base.state_dict(), plans.base, recipe, weights)
        others += of_base
        self._available = budget.bytes_for(self.linears, planned, others)

    @property
    def linears(self) -> list[MixedLinear]:
        """Each with its damage and format, once they are chosen."""
        return self._precision.linears

    def choose(self, views: Sequence[CalibratedView], inputs: Mapping[int, torch.Tensor], progress: Progress) -> None:
        """Measures damage, as in `MixedPrecision.measure`, and changes the plans."""
        self._precision.measure(views, inputs, progress)
        formats = self._precision.spend(self._available)
        self._plans.base.mix(formats)
        self._plans.adapter.mix(formats)
