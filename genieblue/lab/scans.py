"""Real handwriting for the demo: numbers composed of scikit-learn's scanned digits."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

from genieblue.lab.readings import Reading

QUESTION = "Which number?"
TILE_SIZE = 32
LONGEST_NUMBER = 4
DIGIT_SIZE = 30  # pixels; about a tile, so a number with n digits gets about n tiles
HELD_OUT_PART = 0.2


@dataclass(frozen=True)
class Scans:
    """Single digits: `images` (n, 8, 8) float32 in 0..1, ink is 1; `labels` (n,) int64; `indices` in the dataset."""

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def split_scans(seed: int = 0) -> tuple[Scans, Scans]:
    """Splits the 1797 scans 80:20 into (train, held-out), before any numbers are composed."""
    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(images))
    cut = round(len(order) * HELD_OUT_PART)
    parts = order[cut:], order[:cut]
    train, held_out = (Scans(images[part], digits.target[part].astype(np.int64), part) for part in parts)
    return train, held_out


def digit_cells(images: np.ndarray, rng: np.random.Generator, augment: bool) -> np.ndarray:
    """Enlarges scans (n, 8, 8) to cells (n, 32, 32); `augment` varies size, slant, rotation, position and ink."""
    # PIL, not torch: a torch operation wakes all threads for one small digit, which costs 20 times the work itself.
    border = 2  # empty pixels around a scan, for interpolation at its edges
    padded = np.pad(images, ((0, 0), (border, border), (border, border)))
    cells = np.empty((len(images), TILE_SIZE, TILE_SIZE), dtype=np.float32)
    for cell, image in zip(cells, padded, strict=True):
        zoom_x = zoom_y = DIGIT_SIZE / images.shape[-1]
        angle = shear = shift_x = shift_y = 0.0
        ink = 1.0
        if augment:
            size = rng.uniform(0.88, 1.06)
            zoom_x, zoom_y = zoom_x * size * rng.uniform(0.92, 1.08), zoom_y * size
            angle, shear = rng.uniform(-0.12, 0.12, 2)
            shift_x, shift_y = rng.uniform(-1.5, 1.5, 2)
            ink = rng.uniform(0.75, 1.0)
        # The map from cell pixels back to scan pixels.
        cos, sin = np.cos(angle), np.sin(angle)
        back = np.array([[cos / zoom_x, (shear * cos - sin) / zoom_x], [sin / zoom_y, (shear * sin + cos) / zoom_y]])
        origin = image.shape[0] / 2 - back @ (TILE_SIZE / 2 + np.array([shift_x, shift_y]))
        coefficients = (*back[0], origin[0], *back[1], origin[1])
        drawn = Image.fromarray((image * 255).round().astype(np.uint8)).transform(
            (TILE_SIZE, TILE_SIZE), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC
        )
        cell[:] = np.asarray(drawn, dtype=np.float32) * (ink / 255)
    return cells


def compose(cells: np.ndarray, rng: np.random.Generator, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Pastes cells (n, 32, 32) side by side; returns ink (32, width) in 0..1 and the centre column of each digit.

    Neither the spacing nor the margin is a multiple of the tile size, so digits straddle tiles.
    """
    count = len(cells)
    steps = rng.integers(24, 29, count)
    steps[0] = rng.integers(0, 4)
    left = np.cumsum(steps)
    canvas = np.zeros((TILE_SIZE, int(left[-1]) + TILE_SIZE + int(rng.integers(0, 4))), dtype=np.float32)
    for start, cell in zip(left, cells, strict=True):
        window = canvas[:, start : start + TILE_SIZE]
        np.maximum(window, cell, out=window)
    if noise > 0:
        canvas += rng.normal(0, rng.uniform(0, noise), canvas.shape)
    return canvas.clip(0, 1), left + TILE_SIZE // 2


def draw_number(scans: Scans, length: int, rng: np.random.Generator, augment: bool) -> tuple[Image.Image, str]:
    """Draws a number of `length` scanned digits, bright ink on black: (greyscale image, digits)."""
    picks = rng.integers(0, len(scans), length)
    cells = digit_cells(scans.images[picks], rng, augment)
    ink, _ = compose(cells, rng, noise=0.06 if augment else 0.0)
    image = Image.fromarray((ink * 255).round().astype(np.uint8))
    return image, "".join(str(label) for label in scans.labels[picks])


class NumberScans(Dataset):
    """Chat samples about augmented numbers, drawn on access; an index gives the same sample in every process.

    In order, they form a curriculum: lengths are uniform in 1..n, and n grows from 1 to `LONGEST_NUMBER` over the
    first `curriculum` of the samples; with 0, all lengths occur from the start.
    """

    def __init__(self, scans: Scans, samples: int, seed: int = 0, curriculum: float = 0.37):
        if samples < 1 or not 0 <= curriculum <= 1:
            raise ValueError(
                f"Got {samples} samples and a curriculum over {curriculum} of them: expected at least one sample "
                "and a fraction between 0 and 1."
            )
        self.scans, self.samples, self.seed, self.curriculum = scans, samples, seed, curriculum

    def __len__(self) -> int:
        return self.samples

    def longest_at(self, index: int) -> int:
        """The longest number that can occur at an index."""
        grown_at = self.curriculum * self.samples
        if index >= grown_at:
            return LONGEST_NUMBER
        return min(LONGEST_NUMBER, 1 + int((LONGEST_NUMBER - 1) * index / grown_at))

    def draw(self, index: int) -> tuple[Image.Image, str]:
        """The image and the answer at an index."""
        if not 0 <= index < self.samples:
            raise IndexError(f"Sample {index} of {self.samples} does not exist.")
        rng = np.random.default_rng([self.seed, index])
        length = int(rng.integers(1, self.longest_at(index) + 1))
        return draw_number(self.scans, length, rng, augment=True)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, answer = self.draw(index)
        return Reading(image, QUESTION, answer, task="number").chat()


def draw_held_out(scans: Scans, per_length: int, seed: int = 1) -> list[Reading]:
    """`per_length` numbers of each length 1..4 from held-out scans, not augmented, in the order 1, 2, 3, 4, 1, …"""
    readings = []
    for index in range(per_length * LONGEST_NUMBER):
        length = 1 + index % LONGEST_NUMBER
        rng = np.random.default_rng([seed, index])
        image, answer = draw_number(scans, length, rng, augment=False)
        readings.append(Reading(image, QUESTION, answer, f"{length} digit{'s' if length > 1 else ''}"))
    return readings
