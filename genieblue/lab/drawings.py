"""Words in Pillow's own font and handwritten numbers, at many sizes, angles and colours."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from genieblue.lab.scans import TILE_SIZE as SCAN_SIZE
from genieblue.lab.scans import Scans, compose, digit_cells

LARGEST = 192, 48  # pixels; larger ones are made smaller
WORD_SIZES = 20, 39  # of the font, in pixels
NUMBER_HEIGHTS = 22, 36
MARGINS = 1, 6
MOST_DEGREES = 10.0
LEAST_CONTRAST = 90  # of the luminances of ink and paper, of 255
LUMINANCE = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Mark:
    """What an image shows at a place, in a letter or words, with its centre in pixels."""

    label: str
    x: float
    y: float


@dataclass(frozen=True)
class Drawing:
    """`characters` in an image, in reading order, and their `centres`, (characters, 2): x and y in pixels."""

    image: Image.Image
    characters: str
    centres: np.ndarray

    @property
    def marks(self) -> tuple[Mark, ...]:
        """The characters with their places."""
        return tuple(Mark(each, *place) for each, place in zip(self.characters, self.centres.tolist(), strict=True))


def draw_word(word: str, rng: np.random.Generator, font: ImageFont.FreeTypeFont | None = None) -> Drawing:
    """A word in one random size, angle and colour, in Pillow's own font unless another one is given."""
    font = font or _font(int(rng.integers(*WORD_SIZES)))
    left, top, right, bottom = map(round, font.getbbox(word))
    ink = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(ink).text((-left, -top), word, 255, font)
    centres = np.array([(mark.x, mark.y) for mark in text_marks(word, font, -left, ink.height / 2)])
    return painted(Drawing(ink, word, centres), rng, MOST_DEGREES)


def draw_numbers(scans: Scans, lengths: tuple[int, ...], rng: np.random.Generator, augment: bool) -> Drawing:
    """Numbers of scanned digits in a row, with gaps of about a digit between them."""
    height = int(rng.integers(*NUMBER_HEIGHTS))
    scale = height / SCAN_SIZE
    inks, characters, centres, x = [], "", [], 0
    for length in lengths:
        picks = rng.integers(0, len(scans), length)
        ink, middles = compose(digit_cells(scans.images[picks], rng, augment), rng, noise=0.0)
        number = Image.fromarray((ink * 255).astype(np.uint8))
        number = number.resize((int(number.width * scale), height), Image.Resampling.BICUBIC)
        inks.append((x, number))
        centres += [(x + middle * scale, height / 2) for middle in middles]
        characters += "".join(map(str, scans.labels[picks]))
        x += number.width + int(height * rng.uniform(0.8, 1.5))
    row = Image.new("L", (inks[-1][0] + inks[-1][1].width, height))
    for x, number in inks:
        row.paste(number, (x, 0))
    return painted(Drawing(row, characters, np.array(centres)), rng, MOST_DEGREES / len(lengths))


def text_marks(text: str, font: ImageFont.FreeTypeFont, left: float, middle: float) -> list[Mark]:
    """The characters of a line of text that begins at `left`, with its middle at a height."""
    ends = [left + font.getlength(text[:length]) for length in range(len(text) + 1)]
    return [Mark(each, (start + end) / 2, middle) for each, start, end in zip(text, ends, ends[1:], strict=False)]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise OSError("Pillow was built without FreeType, so it has no font of any size: install Pillow from PyPI.")
    return font


def painted(drawing: Drawing, rng: np.random.Generator, most_degrees: float) -> Drawing:
    """Turned, with margins, dark ink on light paper, and no larger than `LARGEST`."""
    degrees = float(rng.uniform(-most_degrees, most_degrees))
    ink = drawing.image.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turned = (drawing.centres - np.array(drawing.image.size) / 2) @ np.array([[cos, -sin], [sin, cos]])
    box = ink.getbbox() or (0, 0, *ink.size)
    left, top, right, bottom = map(int, rng.integers(*MARGINS, 4))
    centres = turned + np.array(ink.size) / 2 - np.array(box[:2]) + (left, top)
    ink = ink.crop(box)
    dark, light = ink_and_paper(rng)
    image = Image.new("RGB", (ink.width + left + right, ink.height + top + bottom), light)
    image.paste(Image.new("RGB", ink.size, dark), (left, top), ink)
    scale = min(1.0, *(most / side for most, side in zip(LARGEST, image.size, strict=True)))
    if scale < 1:
        image = image.resize(tuple(int(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    return Drawing(image, drawing.characters, centres * scale)


def ink_and_paper(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A dark and a light colour that are easily told apart."""
    while True:
        dark, light = rng.integers(0, 256, (2, 3))
        if (light - dark) @ LUMINANCE > LEAST_CONTRAST:
            return tuple(dark.tolist()), tuple(light.tolist())
