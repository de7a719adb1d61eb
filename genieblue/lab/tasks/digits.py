"""Reading: numbers of one to six real handwritten digits."""

import numpy as np

from genieblue.lab.drawings import draw_numbers
from genieblue.lab.tasks.drawn import Drawn
from genieblue.lab.tasks.materials import scans

LONGEST = 6


def draw_digits(rng: np.random.Generator, held_out: bool) -> Drawn:
    """A handwritten number."""
    drawing = draw_numbers(scans(held_out), (int(rng.integers(1, LONGEST + 1)),), rng, augment=not held_out)
    number = drawing.characters
    asked = ("Which number?", number), ("Which digits?", " ".join(number)), ("How many digits?", str(len(number)))
    return Drawn(drawing.image, asked, marks=drawing.marks)
