"""Documents: a receipt of a few lines, each a thing and its price."""

import numpy as np
from PIL import Image, ImageDraw

from genieblue.lab.drawings import ink_and_paper, text_marks
from genieblue.lab.tasks.drawn import Drawn
from genieblue.lab.tasks.materials import any_font, pick, words

WIDTH, LINE, MARGIN = 192, 46, 3  # pixels
SIZES = 20, 24  # of the font
LONGEST_THING = 5  # letters


def draw_receipt(rng: np.random.Generator, held_out: bool) -> Drawn:
    """Two or three things with their prices."""
    count = int(rng.integers(2, 4))
    short = [word for word in words(held_out) if len(word) <= LONGEST_THING]
    things = pick(rng, short, count)
    prices = [f"{rng.integers(1, 100)}.{10 * rng.integers(10):02}" for _ in things]
    ink, paper = ink_and_paper(rng)
    font = any_font(rng, held_out, *SIZES)
    image = Image.new("RGB", (WIDTH, LINE * count + 2 * MARGIN), paper)
    pen = ImageDraw.Draw(image)
    marks = []
    for place, (thing, price) in enumerate(zip(things, prices, strict=True)):
        middle = MARGIN + LINE * (place + 0.5)
        left, right = MARGIN + int(rng.integers(4)), WIDTH - MARGIN - int(rng.integers(4))
        pen.text((left, middle), thing, ink, font, anchor="lm")
        pen.text((right, middle), price, ink, font, anchor="rm")
        marks += text_marks(thing, font, left, middle) + text_marks(price, font, right - font.getlength(price), middle)
    order = rng.permutation(count)
    asked = [(f"How much is {things[place]}?", prices[place]) for place in order]
    first = "What does the first line say?", f"{things[0]} {prices[0]}"
    return Drawn(image, (*asked, ("How many things are there?", str(count)), first), marks=tuple(marks))
