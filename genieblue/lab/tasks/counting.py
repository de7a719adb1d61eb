"""Counting: shapes of one colour among others."""

import numpy as np

from genieblue.lab.tasks.drawn import Drawn
from genieblue.lab.tasks.shapes import any_shape, draw_shapes, fields, list_shapes, shape_marks

COLUMNS, ROWS = 4, 3
MOST = 6  # of the shapes that are counted


def draw_counting(rng: np.random.Generator, held_out: bool) -> Drawn:
    """One to six shapes of one kind, and up to three others."""
    colour, form = any_shape(rng)
    count, others = int(rng.integers(1, MOST + 1)), int(rng.integers(4))
    placed = fields(rng, count + others, COLUMNS, ROWS)
    shapes = dict.fromkeys(placed[:count], (colour, form))
    for field in placed[count:]:
        other = any_shape(rng)
        while other[0] == colour or other[1] == form:
            other = any_shape(rng)
        shapes[field] = other
    asked = [(f"How many {colour} {form}s are there?", str(count)), ("How many shapes are there?", str(len(shapes)))]
    asked.append(list_shapes(shapes))
    return Drawn(draw_shapes(shapes, rng, COLUMNS, ROWS), tuple(asked), marks=shape_marks(shapes))
