"""Coloured shapes on a grid, for counting and for places."""

import math

import numpy as np
from PIL import Image, ImageDraw

from genieblue.lab.drawings import Mark
from genieblue.lab.tasks.materials import COLOURS, SHAPES

CELL = 46  # pixels of a field of the grid
SIZES = 13, 20  # of a shape, from its middle
Shape = tuple[str, str]  # colour and form


def draw_shapes(
    shapes: dict[tuple[int, int], Shape], rng: np.random.Generator, columns: int, rows: int
) -> Image.Image:
    """Shapes at fields (column, row) of a grid, on light paper."""
    paper = tuple(rng.integers(215, 256, 3).tolist())
    image = Image.new("RGB", (CELL * columns, CELL * rows), paper)
    pen = ImageDraw.Draw(image)
    for (column, row), (colour, form) in shapes.items():
        size = float(rng.integers(*SIZES))
        room = CELL / 2 - size - 1
        x = CELL * (column + 0.5) + rng.uniform(-room, room)
        y = CELL * (row + 0.5) + rng.uniform(-room, room)
        _draw(pen, form, x, y, size, COLOURS[colour])
    return image


def shape_marks(shapes: dict[tuple[int, int], Shape]) -> tuple[Mark, ...]:
    """The colour and the form of each shape, in the middle of its field."""
    return tuple(
        Mark(label, CELL * (column + 0.5), CELL * (row + 0.5))
        for (column, row), shape in shapes.items()
        for label in shape
    )


def list_shapes(shapes: dict[tuple[int, int], Shape]) -> tuple[str, str]:
    """The question for all shapes, and its answer, row by row."""
    in_order = sorted(shapes, key=lambda field: field[::-1])
    return "Which shapes are there?", ", ".join(" ".join(shapes[field]) for field in in_order)


def any_shape(rng: np.random.Generator) -> Shape:
    """A random shape."""
    return list(COLOURS)[rng.integers(len(COLOURS))], SHAPES[rng.integers(len(SHAPES))]


def fields(rng: np.random.Generator, count: int, columns: int, rows: int) -> list[tuple[int, int]]:
    """Different fields of a grid."""
    chosen = rng.choice(columns * rows, count, replace=False)
    return [(int(field) % columns, int(field) // columns) for field in chosen]


def _draw(pen: ImageDraw.ImageDraw, form: str, x: float, y: float, size: float, colour: tuple) -> None:
    if form == "circle":
        pen.ellipse([x - size, y - size, x + size, y + size], colour)
        return
    corners = {"square": 4, "triangle": 3, "star": 10}[form]
    start = math.pi / 4 if form == "square" else -math.pi / 2
    points = []
    for corner in range(corners):
        radius = size * (0.45 if form == "star" and corner % 2 else 1.0)
        angle = start + 2 * math.pi * corner / corners
        points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
    pen.polygon(points, colour)
