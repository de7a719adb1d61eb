"""A sheet of answers as PNG: each image with its tiles, the question, what was said and what was expected."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from modeling_genieblue.image_reading_genieblue import read_image

COLUMNS = 4
CELL_WIDTH, IMAGE_HEIGHT, GAP = 340, 150, 16
MARGIN, HEADER = 16, 64
LINES = 2  # of a text, which is cut behind them
ANSWER_SIZE, DETAIL_SIZE = 18, 14
TEXT_HEIGHT = LINES * (ANSWER_SIZE + 4) + 2 * LINES * (DETAIL_SIZE + 4) + 8
PAPER, INK, FAINT = (250, 250, 248), (32, 36, 44), (140, 146, 156)
RIGHT, WRONG, GRID = (34, 120, 70), (190, 40, 50), (80, 170, 255)


@dataclass(frozen=True)
class SheetEntry:
    """One cell: the images are whatever the processor accepts; a text-only question has none."""

    images: Sequence[Any]
    question: str
    answer: str
    expected: str
    right: bool


def draw_answer_sheet(
    path: str | Path, title: str, note: str, entries: Sequence[SheetEntry], image_processor: Any
) -> None:
    """Writes a PNG with one cell for each entry, a grid over each image showing its tiles."""
    columns = min(COLUMNS, max(1, len(entries)))
    rows = -(-len(entries) // columns)
    cell_height = TEXT_HEIGHT + GAP + (IMAGE_HEIGHT if any(entry.images for entry in entries) else 0)
    width = max(columns * (CELL_WIDTH + GAP) - GAP, 2 * CELL_WIDTH) + 2 * MARGIN
    sheet = Image.new("RGB", (width, HEADER + rows * cell_height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 12), _lines(draw, title, _font(22), width - 2 * MARGIN)[0], INK, _font(22))
    draw.text((MARGIN, 40), note, FAINT, _font(DETAIL_SIZE))
    for index, entry in enumerate(entries):
        left = MARGIN + index % columns * (CELL_WIDTH + GAP)
        _draw_entry(sheet, draw, (left, HEADER + index // columns * cell_height), entry, image_processor)
    sheet.save(path)


def _draw_entry(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], entry: SheetEntry, image_processor: Any
) -> None:
    left, top = corner
    width = CELL_WIDTH // max(1, len(entry.images))
    for number, image in enumerate(entry.images):
        _draw_image(sheet, draw, (left + number * width, top), width - 4, read_image(image), image_processor)
    y = top + (IMAGE_HEIGHT if entry.images else 0) + 4
    texts = [(entry.question, FAINT, DETAIL_SIZE), (entry.answer or "(nothing)", RIGHT if entry.right else WRONG,
                                                    ANSWER_SIZE)]  # fmt: skip
    if not entry.right:
        texts.append((f"expected {entry.expected}", INK, DETAIL_SIZE))
    for text, colour, size in texts:
        for line in _lines(draw, text, _font(size), CELL_WIDTH):
            draw.text((left, y), line, colour, _font(size))
            y += size + 4


def _draw_image(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], width: int, image: Image.Image,
    image_processor: Any,
) -> None:  # fmt: skip
    """Pastes an image as the processor places it on its canvas of tiles, with their borders.

    Without a processor of ours (a VLM cuts images by its own rules) the image is shown as it is.
    """
    if image_processor is None:
        sheet.paste(ImageOps.contain(image.convert("RGB"), (max(1, width), IMAGE_HEIGHT - 8)), corner)
        return
    tile = image_processor.tile_size
    columns, rows = image_processor.select_grid(*image.size)
    scale = min(width / (columns * tile), (IMAGE_HEIGHT - 8) / (rows * tile))
    canvas = Image.new("RGB", (max(1, round(columns * tile * scale)), max(1, round(rows * tile * scale))), FAINT)
    fit = min(canvas.width / image.width, canvas.height / image.height)
    size = max(1, round(image.width * fit)), max(1, round(image.height * fit))
    canvas.paste(image.convert("RGB").resize(size), ((canvas.width - size[0]) // 2, (canvas.height - size[1]) // 2))
    x, y = corner
    sheet.paste(canvas, corner)
    for column in range(columns + 1):
        at = x + round(column * tile * scale)
        draw.line((at, y, at, y + canvas.height), GRID)
    for row in range(rows + 1):
        at = y + round(row * tile * scale)
        draw.line((x, at, x + canvas.width, at), GRID)


def _lines(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> list[str]:
    """A text broken at spaces into at most `LINES` lines, the last one cut if there is more."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if not lines[-1] or draw.textlength(joined, font) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    cut = [*lines[: LINES - 1], " ".join(lines[LINES - 1 :])] if len(lines) > LINES else lines
    return [_shortened(draw, line, font, width) for line in cut]


def _shortened(draw: ImageDraw.ImageDraw, line: str, font: Any, width: int) -> str:
    if draw.textlength(line, font) <= width:
        return line
    while line and draw.textlength(f"{line}…", font) > width:
        line = line[:-1]
    return f"{line}…"


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
