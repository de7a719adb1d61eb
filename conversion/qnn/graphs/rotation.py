"""A fixed rotation of the hidden states between blocks, folded into the weights, so that all channels are alike.

Real LLMs carry numbers in a few channels that are thousands of times larger than all others (22,574 in SmolLM2-135M,
for the first token): 16 bits for the whole tensor leave the rest a handful of steps. A rotation spreads them over all
channels, and makes the matrices easier to round as well (Ashkboos et al., "QuaRot", 2024). RMSNorm commutes with it
once the norm's weights are part of the matrices behind it, so the graphs compute the same function with the same
operators; embeddings and image features are stored rotated.
"""

import hashlib
import math

import numpy as np
import torch

SEED = b"genieblue"  # of the signs; another one gives another rotation


class Rotation:
    """An orthogonal map of (…, size): random signs, then a Hadamard transform, and one like it for an odd factor."""

    def __init__(self, size: int):
        bits = np.unpackbits(np.frombuffer(hashlib.shake_256(SEED).digest(size // 8 + 1), np.uint8))[:size]
        self._signs = torch.from_numpy(1.0 - 2.0 * bits).float()
        power = size & -size  # the largest power of 2 that divides it
        halves = 2 ** (power.bit_length() // 2), power // 2 ** (power.bit_length() // 2)
        self._factors = [_hadamard(halves[0]), _hadamard(halves[1]), _hartley(size // power)]

    def states(self, x: torch.Tensor) -> torch.Tensor:
        """Rotates hidden states, or whatever is added to them: the last axis has the channels; float32."""
        x = x.float() * self._signs.to(x.device)
        for factor in self._factors:
            # A product of small orthogonal maps: each mixes one axis and moves it to the front, so the last restores
            # the order. Far cheaper than one large matrix.
            x = (x.unflatten(-1, (-1, len(factor))) @ factor.to(x.device)).transpose(-1, -2).flatten(-2)
        return x

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Undoes `states`."""
        x = x.float()
        for factor in reversed(self._factors):
            x = (x.unflatten(-1, (len(factor), -1)).transpose(-1, -2) @ factor.t().to(x.device)).flatten(-2)
        return x * self._signs.to(x.device)

    def readers(self, weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """A matrix (size, out) behind a norm with weights (size,) → for rotated states behind a norm without any."""
        return self.states((norm[:, None] * weight).t()).t().contiguous()


def _hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def _hartley(size: int) -> torch.Tensor:
    """The discrete Hartley transform: orthogonal for any size, no entry larger than √(2 / size)."""
    places = torch.arange(size, dtype=torch.float64)
    angles = 2 * math.pi * (places[:, None] * places % size) / size
    return ((angles.cos() + angles.sin()) / math.sqrt(size)).float()
