"""Charts: bars, lines and pies, of which values, the largest and the smallest are asked."""

import math

import numpy as np
from PIL import Image, ImageDraw

from genieblue.lab.drawings import ink_and_paper
from genieblue.lab.tasks.drawn import Drawn
from genieblue.lab.tasks.materials import COLOURS, any_font

WIDTH, HEIGHT = 186, 138  # pixels
LEFT, TOP, BOTTOM = 36, 10, 24  # around the plot
SIZES = 13, 16  # of the font
LETTERS = "ABCDEFGHJK"
KINDS = ("bar", "line", "pie")


def draw_chart(rng: np.random.Generator, held_out: bool) -> Drawn:
    """A chart of three to five different values, multiples of 10 up to 100; of a pie they are percentages."""
    kind = KINDS[rng.integers(len(KINDS))]
    count = int(rng.integers(3, 6)) if kind != "pie" else int(rng.integers(3, 5))
    values = _shares(rng, count) if kind == "pie" else (10 * rng.permutation(np.arange(1, 11))[:count]).tolist()
    names = [LETTERS[place] for place in rng.choice(len(LETTERS), count, replace=False)]
    ink, paper = ink_and_paper(rng)
    image = Image.new("RGB", (WIDTH, HEIGHT), paper)
    pen, font = ImageDraw.Draw(image), any_font(rng, held_out, *SIZES)
    colours = [list(COLOURS.values())[place] for place in rng.permutation(len(COLOURS))[:count]]
    if kind == "pie":
        _draw_pie(pen, names, values, colours, ink, font)
    else:
        _draw_axis(pen, ink, font)
        _draw_values(pen, kind, names, values, colours, ink, font)
    largest, smallest = names[int(np.argmax(values))], names[int(np.argmin(values))]
    asked = [("Which is the largest?", largest), ("Which is the smallest?", smallest)]
    asked += [(f"What is the value of {name}?", str(value)) for name, value in zip(names, values, strict=True)]
    # An evaluation asks for a value in half of the charts.
    first = int(rng.integers(2, len(asked))) if rng.random() < 0.5 else int(rng.integers(2))
    return Drawn(image, (asked[first], *asked[:first], *asked[first + 1 :]), metric="relaxed")


def _shares(rng: np.random.Generator, count: int) -> list[int]:
    """Different multiples of 10 that add up to 100."""
    while True:
        cuts = sorted(rng.choice(np.arange(1, 10), count - 1, replace=False).tolist())
        shares = [10 * (end - start) for start, end in zip([0, *cuts], [*cuts, 10], strict=True)]
        if len(set(shares)) == count:
            return shares


def _height(value: float) -> float:
    return HEIGHT - BOTTOM - value / 100 * (HEIGHT - TOP - BOTTOM)


def _draw_axis(pen: ImageDraw.ImageDraw, ink: tuple, font: object) -> None:
    for value in (0, 50, 100):
        pen.line([(LEFT, _height(value)), (WIDTH - 4, _height(value))], ink)
        pen.text((LEFT - 4, _height(value)), str(value), ink, font, anchor="rm")


def _draw_values(
    pen: ImageDraw.ImageDraw, kind: str, names: list, values: list, colours: list, ink: tuple, font: object
) -> None:
    step = (WIDTH - LEFT - 8) / len(names)
    points = [(LEFT + step * (place + 0.5), _height(value)) for place, value in enumerate(values)]
    if kind == "line":
        pen.line(points, colours[0], 3)
    for (x, y), name, colour in zip(points, names, colours, strict=True):
        if kind == "bar":
            pen.rectangle([x - step / 3, y, x + step / 3, _height(0)], colour)
        else:
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], colours[0])
        pen.text((x, HEIGHT - BOTTOM / 2), name, ink, font, anchor="mm")


def _draw_pie(pen: ImageDraw.ImageDraw, names: list, values: list, colours: list, ink: tuple, font: object) -> None:
    centre, radius, start = (WIDTH / 2, HEIGHT / 2), HEIGHT / 2 - 22, -90.0
    box = [centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius]
    for name, value, colour in zip(names, values, colours, strict=True):
        end = start + 3.6 * value
        pen.pieslice(box, start, end, colour, ink)
        angle, distance = math.radians((start + end) / 2), radius + 11
        place = centre[0] + distance * math.cos(angle), centre[1] + distance * math.sin(angle)
        pen.text(place, name, ink, font, anchor="mm")
        start = end
