"""Prevents changes to the dtype of a model with quantized weights."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn


def is_frozen(module: nn.Module) -> bool:
    """Whether a module is a `FrozenLinear`, of this package or of another copy of its files."""
    return getattr(module, "is_frozen_linear", False)


class PrecisionGuard(nn.Module if TYPE_CHECKING else object):
    """Refuses to change the precision of a model with quantized weights, which quanto would do only in part.

    A cast to the precision that it has changes nothing, not even what is in float32 on purpose.
    """

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """`nn.Module.to`; `ValueError` for another dtype."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if dtype is None or not self._keeps_precision(dtype):
            return super().to(*args, **kwargs)
        return self if device is None else super().to(device, non_blocking=non_blocking)

    def type(self, dst_type: Any) -> Any:
        """As `to(dst_type)`."""
        return self if self._keeps_precision(dst_type) else super().type(dst_type)

    def half(self, *args: Any) -> Any:
        """As `to(torch.float16)`."""
        return self if self._keeps_precision(torch.float16) else super().half(*args)

    def float(self, *args: Any) -> Any:
        """As `to(torch.float32)`."""
        return self if self._keeps_precision(torch.float32) else super().float(*args)

    def bfloat16(self, *args: Any) -> Any:
        """As `to(torch.bfloat16)`."""
        return self if self._keeps_precision(torch.bfloat16) else super().bfloat16(*args)

    def double(self, *args: Any) -> Any:
        """As `to(torch.float64)`."""
        return self if self._keeps_precision(torch.float64) else super().double(*args)

    def _keeps_precision(self, dtype: Any) -> bool:
        """Whether there are quantized weights here, of this very precision; `ValueError` if of another."""
        frozen = next(filter(is_frozen, self.modules()), None)
        # What holds none itself may be part of a model that does.
        precision: Any = self.__dict__.get("quantized_precision") if frozen is None else frozen.weight.dtype
        if precision is not None and precision != dtype:
            raise ValueError(
                f"The weights are quantized for activations in {precision}; neither they nor what belongs to them "
                f"can be turned into {dtype}. Load the model again with `dtype={dtype}`."
            )
        return precision is not None


_GUARDED: dict[tuple[type, type], type] = {}


def guard_precision(module: nn.Module, guard: type = PrecisionGuard) -> None:
    """Puts a `PrecisionGuard` over a module of any class, whose name and place stay as they are."""
    key = (guard, type(module))
    if key not in _GUARDED:
        members = {"__module__": type(module).__module__, "__doc__": type(module).__doc__}
        _GUARDED[key] = type(type(module).__name__, (guard, type(module)), members)
    module.__class__ = _GUARDED[key]


def guard_tree(tree: nn.Module, precision: torch.dtype, guard: type = PrecisionGuard) -> None:
    """Puts guards over `tree` and all that is in it, so that no part of it is cast on its own.

    Plain linears among other modules keep their class, which LoRA goes by.
    """
    find_head: Any = getattr(tree, "get_output_embeddings", lambda: None)
    head = find_head()
    for module in tree.modules():
        is_plain_linear = type(module) is nn.Linear and module is not head
        if not is_plain_linear and not isinstance(module, PrecisionGuard):
            module.quantized_precision = precision  # pyright: ignore[reportArgumentType]: a mark, no module
            guard_precision(module, guard if module is tree else PrecisionGuard)
