"""Places: where a shape is among others."""

import numpy as np

from genieblue.lab.tasks.drawn import Drawn
from genieblue.lab.tasks.shapes import any_shape, draw_shapes, fields, list_shapes, shape_marks

SIDE = 3  # fields of the grid
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


def draw_position(rng: np.random.Generator, held_out: bool) -> Drawn:
    """Two to four shapes, all different, each in one of nine places."""
    shapes = {}
    for field in fields(rng, int(rng.integers(2, 5)), SIDE, SIDE):
        shape = any_shape(rng)
        while shape in shapes.values():
            shape = any_shape(rng)
        shapes[field] = shape
    asked = [
        (f"Where is the {colour} {form}?", f"{ROWS[row]} {COLUMNS[column]}")
        for (column, row), (colour, form) in shapes.items()
    ]
    (column, row), (colour, form) = next(reversed(shapes.items()))
    asked.append((f"What is at the {ROWS[row]} {COLUMNS[column]}?", f"{colour} {form}"))
    asked.append(list_shapes(shapes))
    return Drawn(draw_shapes(shapes, rng, SIDE, SIDE), tuple(asked), marks=shape_marks(shapes))
