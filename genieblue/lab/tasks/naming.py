"""Naming: which of four names a symbol has."""

import numpy as np
from PIL import Image, ImageDraw

from genieblue.lab.drawings import Drawing, Mark, painted
from genieblue.lab.tasks.drawn import Drawn
from genieblue.lab.tasks.materials import SYMBOLS, font, pick

SIZES = 34, 46  # of the font, in pixels
MOST_DEGREES = 12.0


def draw_naming(rng: np.random.Generator, held_out: bool) -> Drawn:
    """A symbol in any size, angle and colour, with four names to choose from."""
    symbol = list(SYMBOLS)[rng.integers(len(SYMBOLS))]
    name = SYMBOLS[symbol]
    others = pick(rng, [each for each in SYMBOLS.values() if each != name], 3)
    choices = [*others, name]
    rng.shuffle(choices)
    question = f"Which is it: {', '.join(choices[:-1])} or {choices[-1]}?"
    image = draw_symbol(symbol, rng)
    asked = (question, name), ("What is it?", name)
    return Drawn(image, asked, choices=tuple(choices), marks=(Mark(name, image.width / 2, image.height / 2),))


def draw_symbol(symbol: str, rng: np.random.Generator) -> Image.Image:
    """A symbol of DejaVu Sans."""
    drawn_in = font("DejaVuSans", int(rng.integers(*SIZES)))
    left, top, right, bottom = map(round, drawn_in.getbbox(symbol))
    ink = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(ink).text((-left, -top), symbol, 255, drawn_in)
    return painted(Drawing(ink, "", np.empty((0, 2))), rng, MOST_DEGREES).image
