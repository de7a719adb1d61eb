"""Norms of a copied block that its linear layers can absorb, so that the block runs with the norms of the base."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from modeling_genieblue.language_adapter_genieblue import ADAPTER

LARGEST_DIFFERENCE = 1e-4  # of two norms that should differ by a factor alone, relative


@dataclass(frozen=True)
class CopiedBlock:
    """A block of the base and its trained copy.

    Attributes:
        linears: names in the block of the linear layers whose change a LoRA can carry.
        readers: by linear layer, the norm whose output it reads as it is, if there is one.
    """

    original: nn.Module
    copy: nn.Module
    linears: list[str]
    readers: dict[str, str]

    @cached_property
    def gains(self) -> dict[str, torch.Tensor]:
        """By norm that linear layers read: its gain in the copy over its gain in the base, float32, (width,).

        A norm is left out if no such factor leads from the base's to the copy's.
        """
        ratios = {name: _gain_ratio(*self._both(name)) for name in sorted(set(self.readers.values()))}
        return {name: ratio for name, ratio in ratios.items() if ratio is not None}

    def weights(self, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The base's weight (out, in) of a linear layer, and the copy's as it must be behind the base's norm; float32.

        With n the normalized input and g, g' the gains: W' (g' n) = (W' diag(g'/g)) (g n).
        """
        original, changed = (module.weight.detach().float() for module in self._both(linear))
        gain = self.gains.get(self.readers.get(linear, ""))
        return original, changed if gain is None else changed * gain

    def left_behind(self) -> dict[str, torch.Tensor]:
        """Parameters of the copy that no LoRA can carry, by name: what the block runs with in their place, float32.

        Biases of linear layers, and norms whose output something else than a linear layer reads. Raises `ValueError`
        for a matrix, without which the copy would be another block.
        """
        carried = {f"{name}.weight" for name in (*self.linears, *self.gains)}
        replaced = {}
        for name, own in self.copy.named_parameters():
            if name in carried:
                continue
            value = self.original.get_parameter(name).detach().float()
            gain = self.gains.get(name.rpartition(".")[0])
            value = value if gain is None else value * gain  # the bias of a norm goes through the same factor
            if torch.equal(own.detach().float(), value):
                continue
            if own.ndim > 1:
                raise ValueError(
                    f"{name} of the copied blocks has shape {list(own.shape)} and is no weight of an `nn.Linear`, so "
                    "no LoRA can carry its change: use the GenieBlue itself, or `genieblue export merged`."
                )
            replaced[name] = value
        return replaced

    def _both(self, name: str) -> tuple[Any, Any]:
        return self.original.get_submodule(name), self.copy.get_submodule(name)


def find_copied_blocks(
    view: nn.Module, path: str, indices: Sequence[int], targets: set[str], request: Mapping[str, Any]
) -> dict[int, CopiedBlock]:
    """The copied blocks of a multimodal view by index; which norms their linear layers read is seen on one request.

    `targets` are the last names of the linear layers that get LoRA.
    """
    blocks: dict[int, CopiedBlock] = {}
    handles = []
    for index in indices:
        wrapper: Any = view.get_submodule(f"{path}.{index}")
        block = CopiedBlock(wrapper.original_module, wrapper.modules_to_save[ADAPTER], [], {})
        blocks[index] = block
        outputs: dict[str, torch.Tensor] = {}
        for name, module in block.copy.named_modules():
            parameters = list(module.parameters(recurse=False))
            if isinstance(module, nn.Linear):
                if name.rpartition(".")[2] in targets:
                    block.linears.append(name)
                    note = _note_reader(name, outputs, block.readers)
                    handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
            elif parameters and all(parameter.ndim == 1 for parameter in parameters):
                handles.append(module.register_forward_hook(_note_output(name, outputs)))
    try:
        with torch.no_grad():
            view(**request, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return blocks


def _note_output(name: str, outputs: dict[str, torch.Tensor]) -> Callable[..., None]:
    def note(_module: nn.Module, _args: tuple, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            outputs[name] = output

    return note


def _note_reader(name: str, outputs: dict[str, torch.Tensor], readers: dict[str, str]) -> Callable[..., None]:
    def note(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        read = args[0] if args else kwargs["input"]
        for norm, output in outputs.items():
            if output is read:
                readers[name] = norm

    return note


@torch.no_grad()
def _gain_ratio(original: nn.Module, changed: nn.Module) -> torch.Tensor | None:
    """By what the outputs of `changed` exceed those of `original`, apart from biases; `None` if by no fixed factor."""
    original, changed = (copy.deepcopy(norm).float().cpu() for norm in (original, changed))
    width = max(parameter.numel() for parameter in original.parameters())
    signs = torch.ones(width)
    signs[1::2] = -1  # is normalized as it is, by every kind of norm
    own, base = _without_bias(changed, signs), _without_bias(original, signs)
    ratio = torch.where(own == base, 1.0, own / base)
    trial = torch.linspace(-2, 3, width).sin()
    own, base = _without_bias(changed, trial), _without_bias(original, trial)
    if not ratio.isfinite().all() or (own - base * ratio).norm() > LARGEST_DIFFERENCE * own.norm():
        return None
    return ratio


def _without_bias(norm: nn.Module, values: torch.Tensor) -> torch.Tensor:
    return (norm(values[None]) - norm(-values[None]))[0] / 2
