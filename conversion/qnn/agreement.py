"""Measures how well two sets of numbers agree."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# What the emulator must keep of the quantized graph's own numbers. A cosine alone would not do: an error that is the
# same everywhere, or that sits in one number, hardly moves it.
SMALLEST_COSINE = 0.9995
LARGEST_ERROR = 0.02


@dataclass(frozen=True)
class Agreement:
    """Cosine of the angle between found and expected, and the largest difference as a part of the expected's range."""

    cosine: float
    largest_error: float

    @property
    def is_close(self) -> bool:
        """Whether both gates are passed."""
        return self.cosine >= SMALLEST_COSINE and self.largest_error <= LARGEST_ERROR

    def __str__(self) -> str:
        return f"cos {self.cosine:.6f}, max error {self.largest_error:.2%} of range"


def agreement(found: np.ndarray, expected: np.ndarray) -> Agreement:
    """Agreement of two arrays of one shape; what is not finite agrees with nothing."""
    if found.shape != expected.shape:
        raise ValueError(f"Arrays of shapes {found.shape} and {expected.shape} cannot be compared.")
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Agreement(-1.0, float("inf"))
    if np.array_equal(a, b):
        return Agreement(1.0, 0.0)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    spread = b.max() - b.min()
    largest = np.abs(a - b).max()
    return Agreement(float(a @ b / norms) if norms else 0.0, float(largest / spread) if spread else float("inf"))


def worst(agreements: Iterable[Agreement]) -> Agreement:
    """The smallest cosine and the largest error of all of them."""
    found = list(agreements)
    return Agreement(min(one.cosine for one in found), max(one.largest_error for one in found))
