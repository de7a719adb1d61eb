"""The demo's contact sheet: scans, their tiles and the model's answers."""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 4
CELL_WIDTH, CELL_HEIGHT = 356, 136
MARGIN, HEADER = 16, 64
ENLARGED = 2  # scans are 32 pixels high
PAPER, INK, FAINT = (250, 250, 248), (32, 36, 44), (140, 146, 156)
RIGHT, WRONG, GRID = (34, 120, 70), (190, 40, 50), (80, 170, 255)


def draw_contact_sheet(
    path: str | Path, folder: str | Path, answers: list[dict[str, str]], image_processor: Any
) -> None:
    """Writes a PNG that shows each scan of `answers` (image, answer, said) with thumbnail, tiles and the answer."""
    rows = -(-len(answers) // COLUMNS)
    size = (COLUMNS * CELL_WIDTH + 2 * MARGIN, HEADER + rows * CELL_HEIGHT + MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    right = sum(line["said"] == line["answer"] for line in answers)
    draw.text((MARGIN, 12), "Held-out scans, as GenieBlue sees and reads them", INK, _font(22))
    note = f"left: thumbnail, right: tiles · {right} of {len(answers)} are correct"
    draw.text((MARGIN, 40), note, FAINT, _font(14))
    for index, line in enumerate(answers):
        corner = (MARGIN + index % COLUMNS * CELL_WIDTH, HEADER + index // COLUMNS * CELL_HEIGHT)
        _draw_cell(sheet, draw, corner, Image.open(Path(folder, line["image"])), line, image_processor)
    sheet.save(path)


def _draw_cell(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], scan: Image.Image, line: dict[str, str],
    image_processor: Any,
) -> None:  # fmt: skip
    left, top = corner
    tile = image_processor.tile_size
    columns, rows = image_processor.select_grid(*scan.size)
    edge = tile * ENLARGED
    if columns * rows > 1:
        thumbnail = _on_canvas(scan, tile, tile).resize((edge, edge), Image.Resampling.NEAREST)
        sheet.paste(thumbnail, (left, top + 10))
        draw.rectangle((left, top + 10, left + edge, top + 10 + edge), outline=FAINT)
    x, y = left + edge + 8, top + 10
    canvas = _on_canvas(scan, columns * tile, rows * tile)
    canvas = canvas.resize((columns * edge, rows * edge), Image.Resampling.NEAREST)
    scale = min(1.0, (CELL_WIDTH - edge - 24) / canvas.width, (CELL_HEIGHT - 54) / canvas.height)
    canvas = canvas.resize((round(canvas.width * scale), round(canvas.height * scale)))
    sheet.paste(canvas, (x, y))
    for column in range(columns + 1):
        at = x + round(column * edge * scale)
        draw.line((at, y, at, y + canvas.height), GRID)
    for row in range(rows + 1):
        at = y + round(row * edge * scale)
        draw.line((x, at, x + canvas.width, at), GRID)
    correct = line["said"] == line["answer"]
    draw.text((x, top + 82), line["said"] or "(nothing)", RIGHT if correct else WRONG, _font(24))
    detail = f"{columns} x {rows} tiles" if correct else f"{columns} x {rows} tiles, expected {line['answer']}"
    draw.text((x + 96, top + 89), detail, FAINT, _font(14))


def _on_canvas(scan: Image.Image, width: int, height: int) -> Image.Image:
    """The scan centred with its aspect ratio kept, as the image processor places it."""
    scale = min(width / scan.width, height / scan.height)
    resized = scan.convert("RGB").resize((max(1, int(scan.width * scale)), max(1, int(scan.height * scale))))
    canvas = Image.new("RGB", (width, height), (127, 127, 127))
    canvas.paste(resized, ((width - resized.width) // 2, (height - resized.height) // 2))
    return canvas


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
