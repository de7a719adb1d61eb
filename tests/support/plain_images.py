"""Images of one colour, files of them, and what an image processor makes of them."""

from pathlib import Path

from PIL import Image

from modeling_genieblue.image_processing_genieblue import GenieBlueImageProcessor

SIZE = 8
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def processor(**settings) -> GenieBlueImageProcessor:
    return GenieBlueImageProcessor(**{"tile_size": SIZE, **settings})


def flat_image(colour=RED, width=SIZE, height=SIZE) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def colours(tiles) -> list[tuple[int, ...]]:
    """The colour in the middle of each tile, in 0..255."""
    middle = tiles[:, :, tiles.shape[2] // 2, tiles.shape[3] // 2]
    return [tuple(round(float(channel) * 127.5 + 127.5) for channel in colour) for colour in middle]


def colour_of(image, **settings) -> tuple[int, ...]:
    return colours(processor(**settings)(image)["pixel_values"])[0]


def png_file(folder: Path, image: Image.Image, name: str = "image.png", **options) -> Path:
    image.save(folder / name, **options)
    return folder / name
