"""Mixed precision: which linears of the blocks have 8 bits, and in groups of how many the others share a scale."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conversion.quantization.budget import spend
from conversion.quantization.hessians import walk_blocks
from conversion.quantization.precision import FORMATS
from conversion.quantization.rounding import round_weight
from conversion.quantization.sensitivity import REQUESTS, balanced_hessian
from conversion.quantization.stored_size import stored_bytes
from conversion.quantization.views import CalibratedView
from hub_cards.model_folder import FORMAT_TITLES
from modeling_genieblue.language_adapter_genieblue import PEFT_PREFIX
from modeling_genieblue.quantized_linears_genieblue import group_size_of

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
FITTED = 16  # requests that the rounding is fitted to before the formats are chosen, after those in `inputs_by_weight`
ROWS = 128  # of a weight to measure its damage by
DECADES = 4  # of damage that a chart shows
COLOURS = ("tab:gray", "tab:blue", "tab:green", "tab:red")  # of the formats


@dataclass(frozen=True)
class Budget:
    """What the linears that can have 4 bits may take: an average, or what is left of a size of all weights.

    By default as much as in the recipe's groups. Raises `ValueError` if both are given.
    """

    bits_per_weight: float | None = None  # of the base's and the replicated blocks, scales and zero points included
    max_bytes: int | None = None  # of all weights: base, replicated blocks, LoRA, vision tower, projector

    def __post_init__(self) -> None:
        if self.bits_per_weight is not None and self.max_bytes is not None:
            raise ValueError(
                "Give either `bits_per_weight` (--bits-per-weight) or `max_bytes` (--max-bytes), not both."
            )

    def bytes_for(self, linears: Sequence["MixedLinear"], planned: int = 0, others: int = 0) -> float:
        """Bytes that `linears`, which would take `planned`, may take next to `others`; `ValueError` for too few."""
        weights = sum(linear.weights for linear in linears)
        least = sum(linear.sizes[0] for linear in linears)
        if self.max_bytes is not None:
            if self.max_bytes < others + least:
                raise ValueError(
                    f"The weights cannot take {self.max_bytes:,} bytes: the least is {others + least:,}, with all "
                    f"{len(linears)} linears of the blocks at their smallest and {others:,} for what stays as it is, "
                    "such as embeddings. Allow at least that, or choose a lower precision for another part "
                    "(--embeddings and --lm-head w8a16)."
                )
            return self.max_bytes - others
        if self.bits_per_weight is None:
            return planned
        if not 8 * least / weights <= self.bits_per_weight <= 8:
            raise ValueError(
                f"{self.bits_per_weight:g} bits per weight are not possible: expected {_up(8 * least / weights)} (4 "
                "bits in the largest groups, scales and zero points included) to 8."
            )
        return self.bits_per_weight * weights / 8


def _up(bits: float) -> str:
    """Two decimals, never below `bits`."""
    return f"{-(-bits * 100 // 1) / 100:.2f}"


@dataclass
class MixedLinear:
    """A linear that can have 4 bits: the formats that suit it, from the smallest, with size and damage of each."""

    name: str
    weights: int
    formats: list[str]
    sizes: list[int]  # bytes
    damages: list[float]  # nats per token, summed over the views that run it
    chosen: int = 0  # of `formats`

    @property
    def format(self) -> str:
        """The chosen format."""
        return self.formats[self.chosen]

    @property
    def block(self) -> int:
        """The number of its block."""
        return next(int(part) for part in self.name.split(".") if part.isdigit())

    @property
    def kind(self) -> str:
        """Its name in the block, without the module that holds it: `down_proj`."""
        return self.name.rpartition(".")[2]

    @property
    def is_replicated(self) -> bool:
        """Whether it is in a replicated block, and so in the adapter's file."""
        return self.name.startswith(PEFT_PREFIX)

    def as_json(self) -> dict[str, Any]:
        """Its name, format and bytes, and the damage of each format in nats per token."""
        damages = dict(zip(self.formats, self.damages, strict=True))
        return {"name": self.name, "format": self.format, "bytes": self.sizes[self.chosen], "damages": damages}

    @classmethod
    def of_shape(cls, name: str, shape: Sequence[int], dtype: torch.dtype) -> "MixedLinear":
        """With no damage yet."""
        out_features, in_features = shape
        # Several may mean the same for a narrow layer, of which the last keeps the name.
        formats = list({_group(one, in_features): one for one in FORMATS}.values())
        sizes = [stored_bytes(shape, _group(one, in_features), dtype) for one in formats]
        return cls(name, out_features * in_features, formats, sizes, [0.0] * len(formats))

    def measure(self, weight: torch.Tensor, hessian: torch.Tensor, inputs: torch.Tensor, dtype: torch.dtype) -> None:
        """Notes what each format costs, on some rows of the weight, which gptq rounds one by one anyway.

        Rounding is fitted to every other of the `inputs` and measured on the rest: with fewer tokens than inputs, gptq
        leaves next to no error for those that it is fitted to. At 8 bits the nearest codes tell enough, in less time.
        """
        places = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight))).long()
        rows = weight.detach()[places.to(weight.device)].float()
        hessian, measured = balanced_hessian(hessian, inputs[::2]), inputs[1::2].float() * 2**0.5
        for place, one in enumerate(self.formats):
            size = _group(one, rows.shape[1])
            rounded = round_weight(
                rows, 8 if size is None else 4, size or rows.shape[1],
                method="rtn" if size is None else "gptq", dtype=dtype, hessian=hessian,
            )  # fmt: skip
            errors = measured @ (rounded.dequantize() - rows).t()
            self.damages[place] = float(errors.square().sum()) * len(weight) / len(rows)


def _group(one: str, in_features: int) -> int | None:
    """Codes of one scale in a row of `in_features`, `None` at 8 bits."""
    largest = FORMATS[one]
    return None if largest is None else group_size_of(in_features, largest)


class MixedPrecision:
    """Linears that can have 4 bits and share a budget; `weights` (out, in) by name."""

    def __init__(self, weights: Mapping[str, torch.Tensor], dtype: torch.dtype):
        self.dtype = dtype
        self.linears = [MixedLinear.of_shape(name, weight.shape, dtype) for name, weight in weights.items()]
        self._by_weight = dict(zip(map(id, weights.values()), self.linears, strict=True))

    def measure(
        self,
        views: Sequence[CalibratedView],
        inputs: Mapping[int, torch.Tensor],
        progress: Progress,
    ) -> None:
        """Notes the damage that each format does to the `inputs` of `inputs_by_weight`.

        The `views` share the weights. The first one that runs a linear is the one to whose inputs its rounding is
        fitted.
        """
        left = {weight: rows for weight, rows in inputs.items() if weight in self._by_weight}
        for view in views:
            if any(id(weight) in left for weight in view.model.parameters()):
                self._fit(view, left, progress)

    def _fit(self, view: CalibratedView, left: dict[int, torch.Tensor], progress: Progress) -> None:
        """Rounds the linears of one view that are `left`, and removes these."""

        def select(_index: int, block: nn.Module) -> list[str]:
            linears = ((name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear))
            return [name for name, module in linears if id(module.weight) in left]

        def process(_index: int, block: nn.Module, hessians: dict[str, torch.Tensor]) -> None:
            for name, hessian in hessians.items():
                weight = block.get_submodule(name).weight
                self._by_weight[id(weight)].measure(weight, hessian, left.pop(id(weight)), self.dtype)

        def steps(indices: Iterable[int]) -> Iterable[int]:
            return progress(indices, "damage of 4 bits")

        requests = view.requests[REQUESTS:][:FITTED] or view.requests
        walk_blocks(view.model, requests, view.blocks, process, select=select, progress=steps)

    def spend(self, available: float) -> dict[str, str]:
        """The format of each linear: most damage saved per byte first, within `available` bytes."""
        ladders = {each.name: list(zip(each.sizes, each.damages, strict=True)) for each in self.linears}
        places = spend(ladders, available)
        for linear in self.linears:
            linear.chosen = places[linear.name]
        return {linear.name: linear.format for linear in self.linears}


def bits_per_weight(linears: Sequence[MixedLinear]) -> float:
    """The average, scales and zero points included."""
    return 8 * sum(each.sizes[each.chosen] for each in linears) / sum(each.weights for each in linears)


def draw(linears: list[MixedLinear], path: Path) -> None:
    """Writes a PNG: the format of each linear by block, and the damage that 4 bits would have done to it."""
    from matplotlib.figure import Figure

    panels = {"base": [each for each in linears if not each.is_replicated]}
    panels["replicated blocks"] = [each for each in linears if each.is_replicated]
    panels = {title: own for title, own in panels.items() if own}
    figure = Figure(figsize=(9, 2.8 * len(panels)), layout="constrained")
    axes: Any = figure.subplots(len(panels), 1, squeeze=False, sharex=True)
    # One linear may have a hundred times the damage of most: the decades below the largest are shown.
    most = max(each.damages[0] for each in linears) or 1.0
    area = {
        each.name: 20 + 120 * max(1 + math.log10(max(each.damages[0] / most, 1e-9)) / DECADES, 0) for each in linears
    }
    for axis, (title, own) in zip(axes[:, 0], panels.items(), strict=True):
        kinds = list(dict.fromkeys(each.kind for each in own))
        for place, (label, colour) in enumerate(zip(FORMATS, COLOURS, strict=True)):
            here = [each for each in own if each.format == label]
            axis.scatter(
                [each.block for each in here],
                [kinds.index(each.kind) for each in here],
                s=[area[each.name] for each in here],
                c=colour, marker="s", label=FORMAT_TITLES[label], zorder=2 + place,
            )  # fmt: skip
        axis.set_yticks(range(len(kinds)), kinds)
        axis.invert_yaxis()
        axis.set_xlabel("block")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(f"{title}: area by the logarithm of the damage of 4 bits", fontsize="medium")
        axis.grid(alpha=0.3)
    for handle in axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1, 1)).legend_handles:
        handle.set_sizes([60])  # not that of the first linear, nor nothing
    figure.savefig(path, dpi=110, format="png")
