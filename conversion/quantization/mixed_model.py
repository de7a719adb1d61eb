"""Mixed precision of a GenieBlue: its base's blocks and the replicated ones share one budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from conversion.quantization.mixed import Budget, MixedLinear, MixedPrecision, Progress
from conversion.quantization.precision import LayerPlan, QuantizationRecipe
from conversion.quantization.stored_size import adapter_bytes, stored_bytes, tree_bytes
from modeling_genieblue.quantized_parts_genieblue import quantized_adapter_entries


@dataclass(frozen=True)
class Plans:
    """Precision of each layer of vision tower and projector, of LoRA and the replicated blocks, and of the base."""

    own_parts: LayerPlan
    adapter: LayerPlan
    base: LayerPlan


class MixedModel:
    """The linears that `plans` give 4 bits, by their names in the base and in the adapter's file, within `budget`.

    Args:
        size_of_base: bytes of the weights of a base that is rounded already; none of its linears counts then.

    Raises `ValueError` for a budget that cannot be met, or if there is nothing to choose.
    """

    def __init__(
        self, budget: Budget, model: Any, plans: Plans, recipe: QuantizationRecipe, size_of_base: int | None = None
    ):
        self._model, self._plans = model, plans
        base, view = model.language_model, model.multimodal_language_model
        weights = {stock: weight for _, stock, weight in quantized_adapter_entries(view)}
        if size_of_base is None:
            weights = {name: base.get_submodule(name).weight for name in plans.base.kinds} | weights
        planned = {
            name: stored_bytes(weights[name].shape, plan.group_size(name, weights[name], recipe), recipe.dtype)
            for plan in (plans.base, plans.adapter)
            for name, kind in plan.kinds.items()
            if kind == "qint4" and name in weights
        }
        if not planned and budget != Budget():
            raise ValueError(
                "No linear of the blocks would have 4 bits, so there is nothing to choose from: quantize `llm` or "
                "`replicated_blocks` to w4a16, or leave out the budget."
            )
        self._precision = MixedPrecision({name: weights[name] for name in planned}, recipe.dtype)
        own = nn.ModuleDict({"vision_tower": model.vision_tower, "multi_modal_projector": model.multi_modal_projector})
        others = tree_bytes(own, plans.own_parts, recipe) + adapter_bytes(view, plans.adapter, recipe, planned)
        others += tree_bytes(base, plans.base, recipe, planned) if size_of_base is None else size_of_base
        self._available = budget.bytes_for(self.linears, sum(planned.values()), others)

    @property
    def linears(self) -> list[MixedLinear]:
        """Each with its damage and format, once they are chosen."""
        return self._precision.linears

    def choose(self, text: Sequence[dict], with_images: Sequence[dict], progress: Progress) -> None:
        """Measures damage on arguments of the base and of the multimodal view, and changes the plans."""
        views = (self._model.language_model, text), (self._model.multimodal_language_model, with_images)
        self._precision.measure(views, progress)
        formats = self._precision.spend(self._available)
        self._plans.base.mix(formats)
        self._plans.adapter.mix(formats)
