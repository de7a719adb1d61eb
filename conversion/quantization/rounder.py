"""Rounds the linear layers of a model in order, with calibration samples if the method needs them."""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from conversion.quantization.hessians import walk_blocks
from conversion.quantization.mixed import Progress
from conversion.quantization.precision import QuantizationRecipe
from conversion.quantization.rounding import round_weight
from conversion.quantization.sensitivity import balanced_hessian
from conversion.quantization.views import CalibratedView, CalibrationSamples
from modeling_genieblue.quantized_linears_genieblue import stored_tensors

logger = logging.getLogger(__name__)

BLOCK_TITLES = {"vision_tower": "vision tower", "llm": "language model", "replicated_blocks": "replicated blocks"}


class Rounder:
    """Rounds linears one by one, in place, so that later ones are calibrated on the results."""

    def __init__(
        self, recipe: QuantizationRecipe, samples: CalibrationSamples, progress: Progress, of_existing: dict[str, str]
    ):
        self.recipe, self.samples, self.progress = recipe, samples, progress
        self.uses_samples = recipe.rounding == "gptq"
        self.methods: dict[str, Counter[str]] = {}  # by part, the number of layers rounded with each method
        self.of_existing_base = of_existing  # as `other_rounding`
        self.weighted_inputs: dict[int, torch.Tensor] = {}  # as from `inputs_by_weight`

    def other_rounding(self) -> dict[str, str]:
        """Parts with layers that were not rounded with the recipe's method, and how they were."""
        other = dict(self.of_existing_base)
        for part, methods in self.methods.items():
            rest = [f"{method}: {count}" for method, count in methods.items() if method != self.recipe.rounding]
            if rest:
                other[part] = f"{', '.join(rest)} of {methods.total()} layers"
        return other

    def warn_of_missing_samples(self) -> None:
        """Warns of parts that `gptq` should have rounded but no sample reached."""
        # Other parts are never run on samples.
        reached = (*BLOCK_TITLES, "multi_modal_projector")
        other = self.other_rounding()
        lacking = {part: other[part] for part in reached if part in other and part in self.methods}
        if self.uses_samples and lacking:
            logger.warning(
                "No calibration sample reached some layers, which were not rounded by gptq: %s. Samples with images "
                "reach the vision tower and the projector.",
                "; ".join(f"{part} ({how})" for part, how in lacking.items()),
            )

    def note(self, part: str, method: str) -> None:
        """Counts a layer of `part` rounded with `method`."""
        self.methods.setdefault(part, Counter())[method] += 1

    @torch.no_grad()
    def round(
        self, weight: torch.Tensor, group_size: int | None, part: str, hessian: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """`codes`, `scale`, `zero_point` of a weight (out_features, in_features), which gets the rounded values.

        `group_size` is that of 4-bit codes with one scale; `None` means 8 bits.
        """
        bits = 8 if group_size is None else 4
        method = self.recipe.rounding
        if (method == "gptq" and hessian is None) or (method == "mse" and bits == 8):
            method = "rtn" if bits == 8 else "mse"
        self.note(part, method)
        weighted = self.weighted_inputs.pop(id(weight), None)
        if hessian is not None and weighted is not None:
            hessian = balanced_hessian(hessian, weighted)
        rounded = round_weight(
            weight, bits, group_size or weight.shape[1], method=method, dtype=self.recipe.dtype, hessian=hessian
        )
        weight.copy_(rounded.dequantize())
        return {
            "codes": rounded.codes.cpu(),
            "scale": rounded.scale.cpu(),
            "zero_point": None if rounded.zero_point is None else rounded.zero_point.cpu(),
        }

    def round_blocks(
        self, view: CalibratedView, group_sizes: dict[str, int | None], part: str
    ) -> dict[str, torch.Tensor]:
        """quanto's state dict of the linears named by `group_sizes`, all of them in the blocks of `view`."""
        title, path = BLOCK_TITLES[part], view.blocks
        tensors: dict[str, torch.Tensor] = {}
        by_block: dict[int, dict[str, int | None]] = {}
        for name, size in group_sizes.items():
            index, _, inner = name.removeprefix(f"{path}.").partition(".")
            by_block.setdefault(int(index), {})[inner] = size

        def process(index: int, block: nn.Module, hessians: dict[str, torch.Tensor]) -> None:
            for inner, size in by_block.get(index, {}).items():
                weight = block.get_submodule(inner).weight
                rounded = self.round(weight, size, part, hessians.get(inner))
                tensors.update(stored_tensors(f"{path}.{index}.{inner}", **rounded))

        def steps(indices: Iterable[int]) -> Iterable[int]:
            return self.progress(indices, title)

        blocks = view.model.get_submodule(path)
        if self.uses_samples and view.requests and by_block:
            walk_blocks(
                view.model, view.requests, path, process,
                select=lambda index, _: by_block.get(index, ()), progress=steps,
            )  # fmt: skip
        else:
            for index in steps(range(len(blocks))):
                process(index, blocks[index], {})
        return tensors

    def image_batches(self, model: Any) -> list[torch.Tensor]:
        """Tiles (num_tiles, 3, side, side) of each multimodal sample, in the vision tower's dtype."""
        tower = model.vision_tower
        tiles = [sample.get("pixel_values") for sample in self.samples.multimodal]
        return [pixels.to(tower.device, tower.dtype) for pixels in tiles if pixels is not None]
