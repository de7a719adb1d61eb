"""Quantized weights in optimum-quanto's format: how they are stored, checked and used.

A linear of 8 bits holds int8 codes and one scale per row, symmetric. One of 4 bits holds unsigned codes in groups of
at most 128 along a row, each group with a scale and an integer zero point. Activations stay in 16 bits. Nothing is
compiled on the user's machine, and tensors are read by name, strictly.
"""

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from .quantized_packing_genieblue import pack, packed_for_kernel, unpack
from .quantized_precision_guard_genieblue import PrecisionGuard

try:
    from optimum.quanto import QLinear, qint4, qint8
    from optimum.quanto.library.extensions.cpp import ext as quanto_cpp
    from optimum.quanto.tensor import WeightQBitsTensor, WeightQBytesTensor
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmPackedTensor, TinyGemmWeightQBitsTensor
except ImportError:  # only needed where something is quantized
    QLinear: Any = nn.Linear
    WeightQBytesTensor: Any = torch.Tensor
    quanto_cpp: Any = None


BITS = {"qint4": 4, "qint8": 8}
GROUP_SIZES = (128, 96, 64, 32)  # codes with one scale in a row of 4 bits; 96 is for widths such as 576
# Rows of codes that torch's 4-bit CPU kernel multiplies: others are expanded at each call.
KERNEL_GROUPS = (32, 64, 128, 256)
KERNEL_ALIGNMENT = 32  # bytes, for activations of the 8-bit CPU kernel
CODE_ALIGNMENT = 16  # bytes, for its codes


def check_quanto_installed() -> None:
    """`ModuleNotFoundError` naming the extra, if optimum-quanto is missing."""
    if quanto_cpp is None:
        raise ModuleNotFoundError(
            "This model is quantized, and optimum-quanto is not installed: `pip install 'genieblue[quantization]'` "
            "(or `pip install optimum-quanto`).",
            name="optimum",
        )
    if quanto_cpp._lib is None:  # quanto would compile it in C++ on first use; this is bit-equal and as fast
        quanto_cpp._lib = SimpleNamespace(unpack=unpack)  # pyright: ignore[reportAttributeAccessIssue]


def group_size_of(in_features: int, largest: int = 128) -> int:
    """Codes that share one scale in a 4-bit row of `in_features`, a multiple of 32: at most `largest`."""
    return next(size for size in GROUP_SIZES if size <= largest and in_features % size == 0)


def reason_against(out_features: int, in_features: int, bits: int) -> str | None:
    """Why a linear of this shape cannot be stored in `bits`, or `None` if it can.

    The rules come from torch's CPU kernels: the 8-bit one crashes on other shapes, the 4-bit one refuses them.
    """
    if bits == 8:
        return None if in_features % 16 == 0 else f"in_features {in_features} is no multiple of 16"
    if out_features % 16:
        return f"out_features {out_features} is no multiple of 16"
    return None if in_features % 32 == 0 else f"in_features {in_features} is no multiple of 32"


def stored_tensors(
    name: str, codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """What quanto's state dict holds for the weight of module `name`.

    Args:
        codes: (out_features, in_features), uint8 of 0 … 15 for 4 bits, int8 for 8 bits.
        scale: (out_features, groups); one group for 8 bits.
        zero_point: uint8 (out_features, groups) for 4 bits, `None` for 8 bits.
    """
    one = torch.ones(())  # quanto keeps scales of activations too, here unused
    tensors = {f"{name}.input_scale": one, f"{name}.output_scale": one.clone()}
    if zero_point is None:
        return {**tensors, f"{name}.weight._data": codes, f"{name}.weight._scale": scale.reshape(-1, 1)}
    grouped = codes.reshape(scale.numel(), -1)
    return {
        **tensors,
        f"{name}.weight._data._data": pack(grouped),
        f"{name}.weight._scale": scale.reshape(-1, 1),
        f"{name}.weight._shift": zero_point.reshape(-1, 1),
    }


class FrozenWeight(torch.Tensor if TYPE_CHECKING else object):
    """What all quantized weights here have in common: they are looked up row by row, and never added to.

    An embedding, whatever module holds it, then expands only the rows that it looks up. PEFT's merging, which quanto
    would let pass without an effect, is refused.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is functional.embedding and isinstance(args[1], WeightQBytesTensor):
            ids: Any = args[0]
            weight: Any = args[1]
            scale = weight._scale[ids, 0].unsqueeze(-1)
            return functional.embedding(ids, weight._data).to(scale.dtype) * scale
        set_data: Any = torch.Tensor.data
        is_set = func == set_data.__set__ and not isinstance(args[1], FrozenWeight)
        if (is_set or getattr(func, "__name__", "") in CHANGING_OPERATIONS) and isinstance(args[0], FrozenWeight):
            raise ValueError(
                "Quantized weights cannot be changed in place, as a merge of LoRA would: merge it in 16 bits, then "
                "quantize."
            )
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: tuple, kwargs: dict | None = None) -> Any:
        # Detached, or on another device.
        return frozen(super().__torch_dispatch__(op, types, args, kwargs))  # pyright: ignore[reportAttributeAccessIssue]

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(_copied(self), requires_grad=False)
        return memo[id(self)]


CHANGING_OPERATIONS = ("__iadd__", "add_", "__isub__", "sub_", "__imul__", "mul_", "copy_")
_FROZEN: dict[type, type] = {}
if quanto_cpp is not None:
    for _kind in (WeightQBytesTensor, WeightQBitsTensor, TinyGemmWeightQBitsTensor):
        _FROZEN[_kind] = type(f"Frozen{_kind.__name__}", (FrozenWeight, _kind), {"__module__": __name__})


def frozen(value: Any) -> Any:
    """quanto's tensor as a `FrozenWeight`; anything else as it is."""
    if type(value) in _FROZEN:
        value.__class__ = _FROZEN[type(value)]
    return value


class FrozenLinear(PrecisionGuard, QLinear):
    """quanto's linear with frozen weights, on a shorter way to the same CPU kernels."""

    is_frozen_linear = True  # a base may come from another copy of this file, run as remote code

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, weights: str):
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias is not None, device="meta", weights=weights)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        one = torch.ones((), dtype=weight.dtype, device=weight.device)
        self.input_scale, self.output_scale = one, one.clone()

    def __deepcopy__(self, memo: dict) -> "FrozenLinear":
        if memo.get(id(self.weight)) is self.weight:
            return self  # a second view over the same weights has the same module
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    # As it is, not in the stored form: 4-bit codes in memory are packed for a kernel, and cannot be unpacked exactly.
    def _save_to_state_dict(self, *args: Any) -> None:
        nn.Module._save_to_state_dict(self, *args)

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input` (..., in_features) → (..., out_features), in the precision of the scales."""
        if torch.compiler.is_compiling():
            return _multiply_outside_of_graphs(self, input)  # pyright: ignore[reportCallIssue]: torch's decorator
        weight: Any = self.weight
        if input.dtype != weight.dtype:  # under autocast
            input = input.to(weight.dtype)
        if input.dtype != torch.bfloat16 or input.device.type != "cpu":
            return functional.linear(input.contiguous(), weight, self.bias)
        # The kernels refuse a strided input, and crash on one that lies at an odd place in memory.
        input = input.contiguous()
        if input.data_ptr() % KERNEL_ALIGNMENT:
            input = input.clone()
        if torch.is_grad_enabled():
            return functional.linear(input, weight, self.bias)
        flat = input.view(-1, self.in_features)
        if isinstance(weight, TinyGemmWeightQBitsTensor):
            result = torch._weight_int4pack_mm_for_cpu(  # pyright: ignore[reportPrivateImportUsage]
                flat, weight._data._data, weight._group_size, weight._scale_shift
            )
        elif isinstance(weight, WeightQBytesTensor):
            codes, scale = weight._data, weight._scale.flatten()
            result = torch._weight_int8pack_mm(flat, codes, scale)  # pyright: ignore[reportPrivateImportUsage]
        else:
            return functional.linear(input, weight, self.bias)
        if self.bias is not None:
            result += self.bias
        return result.view(*input.shape[:-1], self.out_features)


@torch.compiler.disable
def _multiply_outside_of_graphs(linear: FrozenLinear, input: torch.Tensor) -> torch.Tensor:
    return linear(input)


def _copied(weight: Any) -> torch.Tensor:
    """A quantized weight with memory of its own, which quanto's packed tensors cannot make."""
    if isinstance(weight, TinyGemmWeightQBitsTensor):
        codes = TinyGemmPackedTensor(weight._data._data.clone(), weight.size(), weight.stride())
        group = (weight._qtype, weight._axis, weight._group_size)
        shape = (weight.size(), weight.stride())
        return frozen(TinyGemmWeightQBitsTensor(*group, *shape, codes, weight._scale_shift.clone()))
    parts, settings = weight.__tensor_flatten__()
    copies = {name: getattr(weight, name).detach() for name in parts}
    copies = {
        name: part.pack(part.unpack(), part.bits) if hasattr(part, "unpack") else part.clone()
        for name, part in copies.items()
    }
    return frozen(type(weight).__tensor_unflatten__(copies, settings, weight.size(), weight.stride()))


def scales_of(weight: Any) -> torch.Tensor | None:
    """Scales of one of our quantized weights as they are stored, (rows of codes, 1); `None` for any other tensor."""
    if quanto_cpp is None or not isinstance(weight, WeightQBytesTensor | WeightQBitsTensor):
        return None
    if isinstance(weight, TinyGemmWeightQBitsTensor):
        return weight._scale_shift[:, :, 0].t().reshape(-1, 1)
    return weight._scale


@torch.no_grad()
def sampled_codes(weight: Any) -> torch.Tensor:
    """A few codes of one of our quantized weights, whatever form its kernel has it in."""
    rows, columns = weight.shape
    places = torch.linspace(0, rows - 1, min(rows, 8), device=weight.device).long()
    column = columns // 2
    if isinstance(weight, WeightQBytesTensor):
        return weight._data[places, column].float()
    # Packed: a kernel gives the column's values, of which the codes follow.
    one_hot = torch.zeros(1, columns, dtype=weight.dtype, device=weight.device)
    one_hot[0, column] = 1
    values = functional.linear(one_hot, weight)[0, places].float()
    group = column // (weight._group_size or columns)
    if isinstance(weight, TinyGemmWeightQBitsTensor):
        scale, middle = weight._scale_shift[group, places].float().unbind(-1)
        return ((values - middle) / scale).round() + 8
    scale, shift = (part.view(rows, -1)[places, group].float() for part in (weight._scale, weight._shift))
    return ((values + shift) / scale).round()


def quanto_weight(parts: dict[str, torch.Tensor], kind: str, shape: Sequence[int]) -> torch.Tensor:
    """quanto's tensor from its stored parts, 4 bits in the form that the kernel of their device wants."""
    out_features, in_features = shape
    size, stride = torch.Size(shape), (in_features, 1)
    if kind == "qint8":
        codes = parts["_data"]
        if codes.data_ptr() % CODE_ALIGNMENT:  # mapped from a file that was not written with care for it
            codes = codes.clone()
        return WeightQBytesTensor.create(qint8, 0, size, stride, codes, parts["_scale"])
    scale, shift = parts["_scale"], parts["_shift"]
    group_size = parts["_data._data"].shape[1]
    cpu_kernel = scale.device.type == "cpu" and scale.dtype == torch.bfloat16 and group_size in KERNEL_GROUPS
    if not cpu_kernel:
        group = None if group_size == in_features else group_size
        # quanto's GPU kernels take the shift as a number of the weight's dtype.
        codes = unpack(parts["_data._data"])
        return WeightQBitsTensor.create(qint4, 0, group, size, stride, codes, scale, shift * scale)
    # The kernel counts from the middle of the range. Built here, because quanto's own way rounds twice.
    middle = ((8 - shift.float()) * scale.float()).to(scale.dtype)
    scale_shift = torch.cat([scale, middle], 1).view(out_features, -1, 2).transpose(0, 1).contiguous()
    codes = packed_for_kernel(parts["_data._data"], out_features, in_features)
    return TinyGemmWeightQBitsTensor(qint4, 0, group_size, size, stride, codes, scale_shift)
