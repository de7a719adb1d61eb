"""What images are drawn of: scanned digits, words, fonts, symbols, shapes and colours; some only for held-out images.

Fonts are those of matplotlib, so that all machines of a lab draw the same images.
"""

import re
import string
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import ImageFont

from genieblue.lab.scans import Scans, split_scans
from genieblue.lab.text import read_documents

HELD_OUT_EVERY = 5  # words
LONGEST_WORD = 7  # letters
TRAINED_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-BoldItalic", "STIXGeneral",
    "STIXGeneralBol", "cmr10", "cmtt10",
)  # fmt: skip
HELD_OUT_FONTS = ("DejaVuSansMono-Bold", "DejaVuSerif-Bold", "STIXGeneralItalic", "cmss10")
COLOURS = {
    "red": (205, 35, 35), "green": (30, 140, 50), "blue": (35, 70, 200), "orange": (240, 140, 20),
    "purple": (130, 40, 160), "black": (20, 20, 20),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star")
# Symbols that DejaVu Sans draws, with names that are words.
SYMBOLS = {
    "☀": "sun", "☁": "cloud", "☂": "umbrella", "☃": "snowman", "★": "star", "☎": "telephone", "☕": "coffee",
    "☠": "skull", "☮": "peace", "☯": "yin and yang", "☺": "smile", "☹": "frown", "☾": "moon", "♀": "female",
    "♂": "male", "♔": "king", "♕": "queen", "♖": "castle", "♘": "horse", "♠": "spade", "♣": "club", "♥": "heart",
    "♦": "diamond", "♪": "note", "♻": "recycling", "⚀": "dice", "⚓": "anchor", "⚔": "swords", "⚖": "scales",
    "⚙": "gear", "⚛": "atom", "⚡": "lightning", "✂": "scissors", "✈": "plane", "✉": "letter",
    "✌": "victory", "✍": "writing", "✎": "pencil", "✓": "check mark", "✗": "cross", "❄": "snowflake", "❀": "flower",
    "➔": "arrow", "☢": "radiation", "♿": "wheelchair",
}  # fmt: skip

# All that marks in the images of tasks tell.
LABELS = (*string.ascii_letters, *string.digits, ".", " ", *COLOURS, *SHAPES, *SYMBOLS.values())


@cache
def scans(held_out: bool) -> Scans:
    """Scanned digits."""
    return split_scans()[int(held_out)]


@cache
def words(held_out: bool) -> tuple[str, ...]:
    """Words of the English that ships with Python, in small letters."""
    topics, _ = read_documents()
    text = " ".join(document.body for document in topics)
    found = sorted(set(re.findall(rf"(?<![\w.`*'’-])[a-z]{{3,{LONGEST_WORD}}}(?![\w`*'’-])", text)))
    kept = [word for place, word in enumerate(found) if (place % HELD_OUT_EVERY == 0) == held_out]
    return tuple(kept)


def pick(rng: np.random.Generator, items: tuple[str, ...] | list[str], count: int) -> list[str]:
    """Different ones of some texts."""
    return [items[place] for place in rng.choice(len(items), count, replace=False)]


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of matplotlib's fonts, in pixels."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), size)


def any_font(rng: np.random.Generator, held_out: bool, smallest: int, largest: int) -> ImageFont.FreeTypeFont:
    """A font of a random size; held-out images have fonts of their own."""
    names = HELD_OUT_FONTS if held_out else TRAINED_FONTS
    return font(names[rng.integers(len(names))], int(rng.integers(smallest, largest + 1)))
