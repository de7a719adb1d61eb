"""Encodings of activations, codes of matrices, and conversion of values to codes. NumPy only."""

from dataclasses import dataclass

import numpy as np

Range = tuple[float, float]  # minimum and maximum of a tensor
LEVELS = 65535  # of an unsigned 16-bit code


@dataclass(frozen=True)
class Encoding:
    """The meaning of a tensor's codes: `value = (code - zero_point) * scale`."""

    scale: float
    zero_point: int
    dtype: str = "uint16"

    @classmethod
    def of(cls, found: Range, dtype: str = "uint16") -> "Encoding":
        """Spreads all codes of `dtype` over a range, widened to include zero, which is represented exactly.

        Exact zeros matter: padding and masked values would otherwise add a small constant to every sum.
        """
        low, high = min(found[0], 0.0), max(found[1], 0.0)
        limits = np.iinfo(dtype)
        if limits.min < 0:  # symmetric
            return cls(float(np.float32(max(-low, high, 1e-8) / limits.max)), 0, dtype)
        scale = np.float32(max(high - low, 1e-8) / limits.max)
        return cls(float(scale), int(np.clip(np.rint(-low / scale), 0, limits.max)), dtype)

    @property
    def zero(self) -> np.generic:
        """The code of zero, in the dtype of the codes."""
        return np.dtype(self.dtype).type(self.zero_point)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Values of any shape → nearest codes of that shape in `dtype`, clipped to its range."""
        codes = np.rint(np.asarray(values, np.float32) / np.float32(self.scale)) + self.zero_point
        limits = np.iinfo(self.dtype)
        return np.clip(codes, limits.min, limits.max).astype(self.dtype)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes of any shape → float32 values of that shape."""
        return (codes.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)


@dataclass(frozen=True)
class WeightFormat:
    """How a matrix is stored: bits, and how many inputs of an output channel share a scale (0: all of them)."""

    bits: int
    group_size: int = 0

    @property
    def largest_code(self) -> int:
        """The codes are -`largest_code` … `largest_code`."""
        return 2 ** (self.bits - 1) - 1

    @property
    def bits_per_weight(self) -> float:
        """Bits with the multiple of each group; the scale of a channel is not counted."""
        return self.bits + (8 / self.group_size if self.group_size else 0)

    def __str__(self) -> str:
        return f"{self.bits} bits" + (f", groups of {self.group_size}" if self.group_size else "")


LARGEST_MULTIPLE = 16  # of a channel's scale, which a group may have: the format of the NPU ("LPBQ")


@dataclass(frozen=True)
class WeightCodes:
    """Symmetric codes of a matrix and their scales: one per channel along `axis`, or one for all (`axis` None).

    With `multiples`, each group of inputs has that multiple of its channel's scale.
    """

    codes: np.ndarray  # int8; 4-bit codes are in -7 … 7
    scales: np.ndarray  # float32, (channels,) or ()
    bits: int
    axis: int | None
    multiples: np.ndarray | None = None  # uint8, (groups, channels), 1 … 16

    @property
    def format(self) -> WeightFormat:
        """The format of these codes."""
        return WeightFormat(self.bits, 0 if self.multiples is None else len(self.codes) // len(self.multiples))

    def steps(self) -> np.ndarray:
        """The value of one code, float32 in a shape that broadcasts to the codes."""
        if self.axis is None:
            return self.scales
        if self.multiples is not None:
            return np.repeat(self.multiples * self.scales, len(self.codes) // len(self.multiples), axis=0)
        return self.scales.reshape([-1 if axis == self.axis else 1 for axis in range(self.codes.ndim)])

    def decode(self) -> np.ndarray:
        """The matrix that the codes represent, float32 in their shape."""
        return self.codes * self.steps()


def round_to_nearest(weight: np.ndarray, bits: int, axis: int | None) -> WeightCodes:
    """Symmetric codes that map the largest magnitude of each channel to the largest code."""
    others = tuple(index for index in range(weight.ndim) if index != axis) if axis is not None else None
    largest = np.abs(weight).max(axis=others)
    return round_with_scales(weight, np.maximum(largest, 1e-8) / (2 ** (bits - 1) - 1), bits, axis)


def round_with_scales(weight: np.ndarray, scales: np.ndarray, bits: int, axis: int | None) -> WeightCodes:
    """Symmetric codes for given scales, (channels,) or (); values out of range are clipped."""
    largest_code = 2 ** (bits - 1) - 1
    scales = np.asarray(scales, np.float32)
    steps = scales if axis is None else scales.reshape([-1 if index == axis else 1 for index in range(weight.ndim)])
    codes = np.clip(np.rint(weight / steps), -largest_code, largest_code).astype(np.int8)
    return WeightCodes(codes, scales, bits, axis)


def constant_encoding(values: np.ndarray) -> Encoding:
    """The 16-bit encoding of a bias, a norm's weight or a single number."""
    return Encoding.of((float(values.min()), float(values.max())))
