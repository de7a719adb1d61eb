"""Charts: bars, lines and pies, of which values, the largest and the smallest are asked."""

import math

import numpy as np
from PIL import Image, ImageDraw

from genieblue.lab.drawings import ink_and_paper, text_marks
from genieblue.lab.tasks.drawn import Drawn
from genieblue.lab.tasks.materials import COLOURS, any_font

WIDTH, HEIGHT = 186, 138  # pixels
SIDES, TOP, BOTTOM = 6, 24, 24  # around the plot
SIZES = 17, 19  # of the font
RADIUS = 34  # of a pie
LETTERS = "ABCDEFGHJK"
KINDS = ("bar", "line", "pie")
Place = tuple[float, float]  # in pixels


def draw_chart(rng: np.random.Generator, held_out: bool) -> Drawn:
    """A chart of three or four different values, multiples of 10 up to 90, written beside what shows them."""
    kind = KINDS[rng.integers(len(KINDS))]
    count = int(rng.integers(3, 5))
    values = _shares(rng, count) if kind == "pie" else (10 * rng.permutation(np.arange(1, 10))[:count]).tolist()
    names = [LETTERS[place] for place in rng.choice(len(LETTERS), count, replace=False)]
    ink, paper = ink_and_paper(rng)
    image = Image.new("RGB", (WIDTH, HEIGHT), paper)
    pen, font = ImageDraw.Draw(image), any_font(rng, held_out, *SIZES)
    colours = [list(COLOURS.values())[place] for place in rng.permutation(len(COLOURS))[:count]]
    written = _draw_pie(pen, values, colours, ink) if kind == "pie" else _draw_values(pen, kind, values, colours)
    marks = []
    for name, value, places in zip(names, values, written, strict=True):
        for text, (x, y) in zip((name, str(value)), places, strict=True):
            pen.text((x, y), text, ink, font, anchor="mm")
            marks += text_marks(text, font, x - font.getlength(text) / 2, y)
    largest, smallest = names[int(np.argmax(values))], names[int(np.argmin(values))]
    asked = [("Which is the largest?", largest), ("Which is the smallest?", smallest)]
    asked += [(f"What is the value of {name}?", str(value)) for name, value in zip(names, values, strict=True)]
    # An evaluation asks for a value in half of the charts.
    first = int(rng.integers(2, len(asked))) if rng.random() < 0.5 else int(rng.integers(2))
    return Drawn(image, (asked[first], *asked[:first], *asked[first + 1 :]), metric="relaxed", marks=tuple(marks))


def _shares(rng: np.random.Generator, count: int) -> list[int]:
    """Different multiples of 10 that add up to 100."""
    while True:
        cuts = sorted(rng.choice(np.arange(1, 10), count - 1, replace=False).tolist())
        shares = [10 * (end - start) for start, end in zip([0, *cuts], [*cuts, 10], strict=True)]
        if len(set(shares)) == count:
            return shares


def _height(value: float) -> float:
    return HEIGHT - BOTTOM - value / 100 * (HEIGHT - TOP - BOTTOM)


def _draw_values(pen: ImageDraw.ImageDraw, kind: str, values: list[int], colours: list) -> list[tuple[Place, Place]]:
    """Draws bars or a line, and returns the middles of the texts of each: its name, below, and its value."""
    step = (WIDTH - 2 * SIDES) / len(values)
    points = [(SIDES + step * (place + 0.5), _height(value)) for place, value in enumerate(values)]
    if kind == "line":
        pen.line(points, colours[0], 3)
    for (x, y), colour in zip(points, colours, strict=True):
        if kind == "bar":
            pen.rectangle([x - step / 3, y, x + step / 3, _height(0)], colour)
        else:
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], colours[0])
    return [((x, HEIGHT - BOTTOM / 2), (x, y - 12)) for x, y in points]


def _draw_pie(pen: ImageDraw.ImageDraw, values: list[int], colours: list, ink: tuple) -> list[tuple[Place, Place]]:
    """Draws the pie, and returns the middles of the texts of each slice: its name, and beside it its value."""
    (x, y), start, written = (WIDTH / 2, HEIGHT / 2), -90.0, []
    for value, colour in zip(values, colours, strict=True):
        end = start + 3.6 * value
        pen.pieslice([x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS], start, end, colour, ink)
        angle = math.radians((start + end) / 2)
        middle = x + (RADIUS + 26) * math.cos(angle), y + (RADIUS + 16) * math.sin(angle)
        written.append(((middle[0] - 16, middle[1]), (middle[0] + 10, middle[1])))
        start = end
    return written
