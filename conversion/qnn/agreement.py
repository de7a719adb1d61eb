"""Measures how well two sets of numbers agree."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# How closely the emulator must match the quantized graph. The cosine alone is not enough: a constant error, or an
# error in one number, hardly changes it.
SMALLEST_COSINE = 0.9995
LARGEST_ERROR = 0.02


@dataclass(frozen=True)
class Agreement:
    """Cosine of found and expected, and their largest difference relative to the range of the expected."""

    cosine: float
    largest_error: float

    @property
    def is_close(self) -> bool:
        """Whether both limits are met."""
        return self.cosine >= SMALLEST_COSINE and self.largest_error <= LARGEST_ERROR

    def __str__(self) -> str:
        return f"cos {self.cosine:.6f}, max error {self.largest_error:.2%} of range"


def agreement(found: np.ndarray, expected: np.ndarray) -> Agreement:
    """Agreement of two arrays of one shape; NaN and infinity agree with nothing. `ValueError` for empty arrays."""
    if found.size == 0 or expected.size == 0:
        raise ValueError(
            f"Arrays of the shapes {found.shape} and {expected.shape} have no numbers to compare: give some."
        )
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
    """The smallest cosine and the largest error of all."""
    found = list(agreements)
    return Agreement(min(one.cosine for one in found), max(one.largest_error for one in found))
