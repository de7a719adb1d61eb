"""Keeps the precision of a model with quantized weights from being changed."""

from typing import Any

import torch
from torch import nn

from .quantization_genieblue import is_frozen


class PrecisionGuard:
    """Refuses to change the precision of a model with quantized weights, which quanto would do by half.

    A cast to the precision that it has changes nothing, not even what is in float32 on purpose.
    """

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """`nn.Module.to`; `ValueError` for another dtype."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
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
        if frozen is not None and frozen.weight.dtype != dtype:
            raise ValueError(
                f"The weights are quantized for activations in {frozen.weight.dtype}; they cannot be turned into "
                f"{dtype}. Load the model again with `dtype={dtype}`."
            )
        return frozen is not None


_GUARDED: dict[tuple[type, type], type] = {}


def guard_precision(module: nn.Module, guard: type = PrecisionGuard) -> None:
    """Puts a `PrecisionGuard` over a module of any class, whose name and place stay as they are."""
    key = (guard, type(module))
    if key not in _GUARDED:
        members = {"__module__": type(module).__module__, "__doc__": type(module).__doc__}
        _GUARDED[key] = type(type(module).__name__, (guard, type(module)), members)
    module.__class__ = _GUARDED[key]


__all__ = ["PrecisionGuard", "guard_precision"]
