"""OCR: a line of text in many fonts, sizes, angles and colours."""

import numpy as np

from genieblue.lab.drawings import draw_word
from genieblue.lab.tasks.drawn import Drawn
from genieblue.lab.tasks.materials import any_font, pick, words

SIZES = 18, 34  # of the font, in pixels
TWO_WORDS = 0.4  # share of lines


def draw_line(rng: np.random.Generator, held_out: bool) -> Drawn:
    """One or two words."""
    shown = pick(rng, words(held_out), 2 if rng.random() < TWO_WORDS else 1)
    line = " ".join(shown)
    drawing = draw_word(line, rng, any_font(rng, held_out, *SIZES))
    asked = [("What does it say?", line), ("What is the first word?", shown[0])]
    asked.append(("How is the first word spelled?", " ".join(shown[0])))
    return Drawn(drawing.image, tuple(asked), metric="anls", marks=drawing.marks)
