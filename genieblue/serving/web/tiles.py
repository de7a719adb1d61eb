"""What the vision tower sees of an image, as one picture: the thumbnail, and beside it the tiles."""

from typing import Any

import numpy as np
from PIL import Image

GAP = 4  # pixels between tiles
PAPER = (250, 250, 248)


def draw_tiles(image: Image.Image, image_processor: Any) -> tuple[Image.Image, str]:
    """The tiles of an image as the processor cuts them, apart from each other, and what they are in words."""
    size = image_processor.tile_size
    columns, rows = image_processor.select_grid(*image.size)
    tiles = _pictures(image_processor(image)["pixel_values"], image_processor)
    if columns * rows == 1:
        return tiles[0], "1 tile, no thumbnail"
    step = size + GAP
    picture = Image.new("RGB", (step * (columns + 1) + 2 * GAP, max(rows * step - GAP, size)), PAPER)
    picture.paste(tiles[0], (0, 0))
    for number, tile in enumerate(tiles[1:]):
        row, column = divmod(number, columns)
        picture.paste(tile, (step + 3 * GAP + column * step, row * step))
    return picture, f"thumbnail and {columns}×{rows} tiles"


def _pictures(pixel_values: Any, image_processor: Any) -> list[Image.Image]:
    """(num_tiles, 3, size, size) normalized floats as pictures."""
    pixels = np.asarray(pixel_values, dtype=np.float32)
    if image_processor.do_normalize:
        mean, std = (
            np.array(values, dtype=np.float32)[:, None, None]
            for values in (image_processor.image_mean, image_processor.image_std)
        )
        pixels = pixels * std + mean
    if image_processor.do_rescale:
        pixels = pixels / image_processor.rescale_factor
    pixels = np.rint(pixels.clip(0, 255)).astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(tile) for tile in pixels]
