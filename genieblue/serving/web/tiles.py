"""What the vision tower sees of an image, as one picture: the thumbnail, and beside it the tiles."""

from typing import Any

import numpy as np
from PIL import Image

from modeling_genieblue.image_processing_genieblue import GenieBlueImageProcessor

SMALLEST = 96  # pixels; smaller tiles are enlarged, each pixel to a square
GAP = 6


def draw_tiles(image: Image.Image, image_processor: GenieBlueImageProcessor) -> tuple[Image.Image, str]:
    """The tiles of an image as the processor cuts them, apart from each other, and what they are in words."""
    columns, rows = image_processor.select_grid(*image.size)
    tiles = _pictures(image_processor(image)["pixel_values"], image_processor)
    cut = f"{image.width}×{image.height} pixels, tiles of {image_processor.tile_size}×{image_processor.tile_size}"
    if columns * rows == 1:
        return tiles[0], f"1 tile without a thumbnail ({cut})"
    size = tiles[0].width
    step = size + GAP
    picture = Image.new("RGBA", (step * (columns + 1) + 2 * GAP, rows * step - GAP))  # transparent between tiles
    picture.paste(tiles[0], (0, 0))
    for number, tile in enumerate(tiles[1:]):
        row, column = divmod(number, columns)
        picture.paste(tile, (step + 3 * GAP + column * step, row * step))
    return picture, f"thumbnail and {columns}×{rows} tiles ({cut})"


def _pictures(pixel_values: Any, image_processor: GenieBlueImageProcessor) -> list[Image.Image]:
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
    scale = -(-SMALLEST // image_processor.tile_size)
    return [Image.fromarray(tile.repeat(scale, axis=0).repeat(scale, axis=1)) for tile in pixels]
