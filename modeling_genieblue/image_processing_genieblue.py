"""Image processor: relaxed aspect-ratio matching (BlueLM-V-3B), with a thumbnail and tiles of one size."""

import math
from typing import Any

from .compat_genieblue import require_transformers

require_transformers()

import numpy as np
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from .addresses_genieblue import refuse_address
from .image_reading_genieblue import IMAGE_TYPES, flatten_images, read_image, rgb_pixels


class GenieBlueImagesKwargs(ImagesKwargs, total=False):
    """Settings that a single call (or `from_pretrained`) may override."""

    tile_size: int
    max_tiles: int
    relaxed_alpha: float


class GenieBlueImageProcessor(BaseImageProcessor):
    """
    Cuts every image into a thumbnail and square tiles of `tile_size` pixels.

    The grid of tiles is chosen by relaxed aspect-ratio matching among 1..sqrt(`max_tiles`) columns and rows. The image
    is resized with its ratio kept and centred on the grid's canvas; the padding has the colour `image_mean`, which is
    zero after normalization. An image whose best grid is one tile gets that tile alone, without a thumbnail.
    """

    model_input_names = ["pixel_values", "num_tiles"]
    valid_kwargs = GenieBlueImagesKwargs
    # Makes save_pretrained copy this file beside the settings and name it in their auto_map.
    _auto_class = "AutoImageProcessor"

    def __init__(
        self,
        tile_size: int = 384,
        max_tiles: int = 16,
        relaxed_alpha: float = 0.1,
        resample: int = Image.Resampling.BICUBIC,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | list[float] = 0.5,
        image_std: float | list[float] = 0.5,
        do_convert_rgb: bool = True,
        **kwargs: Any,
    ) -> None:
        """Store the settings; ValueError for a `max_tiles` that is not a square number and other impossible values."""
        super().__init__(**kwargs)
        if not isinstance(tile_size, int) or tile_size < 1:
            raise ValueError(f"tile_size is {tile_size!r}; expected a positive number of pixels, such as 384.")
        if not isinstance(max_tiles, int) or max_tiles < 1 or math.isqrt(max_tiles) ** 2 != max_tiles:
            raise ValueError(
                f"max_tiles is {max_tiles!r}; grids reach sqrt(max_tiles) columns and rows, so expected a square "
                "number: 1, 4, 9, 16, ..."
            )
        if not 0 <= relaxed_alpha < 1:
            raise ValueError(f"relaxed_alpha is {relaxed_alpha!r}; expected a share from 0 to below 1, such as 0.1.")
        self.tile_size = tile_size
        self.max_tiles = max_tiles
        self.relaxed_alpha = relaxed_alpha
        self.resample = int(Image.Resampling(resample))
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = _three_channels(image_mean, "image_mean")
        self.image_std = _three_channels(image_std, "image_std")
        self.do_convert_rgb = do_convert_rgb
        if 0 in self.image_std:
            raise ValueError(f"image_std is {self.image_std}; expected nonzero values, as pixels are divided by it.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load saved settings, from a folder or by the id of a repository."""
        refuse_address(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def select_grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the (columns, rows) of tiles for an image of `width` x `height` pixels (arXiv 2411.10640)."""
        if width < 1 or height < 1:
            raise ValueError(f"An image of {width}x{height} pixels has no grid; expected at least 1x1 pixels.")
        largest = math.isqrt(self.max_tiles)
        best, best_effective, best_wasted = (1, 1), 0, 0
        for columns in range(largest, 0, -1):
            for rows in range(largest, 0, -1):
                canvas_width, canvas_height = columns * self.tile_size, rows * self.tile_size
                resized_width, resized_height = _fit(width, height, canvas_width, canvas_height)
                # Enlarging adds no detail: no more than the image's own pixels count as effective.
                effective = min(resized_width * resized_height, width * height)
                wasted = canvas_width * canvas_height - effective
                gains = effective - best_effective > self.relaxed_alpha * best_effective
                matches = best_effective - effective < self.relaxed_alpha * best_effective
                if gains or (matches and wasted < best_wasted):
                    best, best_effective, best_wasted = (columns, rows), effective, wasted
        return best

    def count_tiles(self, width: int, height: int) -> int:
        """Return how many tiles, thumbnail included, an image of `width` x `height` pixels is cut into."""
        columns, rows = self.select_grid(width, height)
        return 1 if columns * rows == 1 else columns * rows + 1

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Return `count_tiles` of an image, as serving engines ask for it; `images_kwargs` override settings."""
        return self._changed(images_kwargs or {}).count_tiles(width, height)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """
        Return `pixel_values` (total_tiles, 3, tile_size, tile_size) and `num_tiles` (num_images,) of one image or of
        a list of them, nested or not.

        The tiles of an image follow each other: thumbnail first, then row by row. `kwargs` override settings for this
        call (`max_tiles=1` gives one tile per image); `input_data_format` ("channels_first" or "channels_last") says
        how arrays are laid out where their shape leaves it open. ValueError or OSError names the image that is bad.
        """
        input_data_format = kwargs.pop("input_data_format", None)
        if kwargs:
            return self._changed(kwargs).preprocess(images, return_tensors, input_data_format=input_data_format)
        tiles = [
            self._cut(rgb_pixels(image, index, self.do_convert_rgb, input_data_format))
            for index, image in enumerate(flatten_images(images))
        ]
        if not tiles:
            raise ValueError(f"No image was given; expected {IMAGE_TYPES}, or a list of them.")
        data = {
            "pixel_values": np.concatenate(tiles),  # (total_tiles, 3, tile_size, tile_size)
            "num_tiles": np.array([len(image_tiles) for image_tiles in tiles], dtype=np.int64),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Return PIL images for one image or a nested list of them, read as `preprocess` reads them."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        return read_image(image_url_or_urls)

    def _changed(self, settings: dict[str, Any]) -> "GenieBlueImageProcessor":
        """This processor with other settings; None leaves one as it is."""
        if unknown := sorted(settings.keys() - self._settings().keys()):
            raise ValueError(f"Unknown image setting {unknown}; expected one of {sorted(self._settings())}.")
        changed = {name: value for name, value in settings.items() if value is not None}
        return type(self)(**{**self._settings(), **changed}) if changed else self

    def _settings(self) -> dict[str, Any]:
        names = "tile_size max_tiles relaxed_alpha resample do_rescale rescale_factor do_normalize"
        return {name: getattr(self, name) for name in f"{names} image_mean image_std do_convert_rgb".split()}

    def _cut(self, pixels: np.ndarray) -> np.ndarray:
        """Turn (height, width, 3) bytes into (num_tiles, 3, tile_size, tile_size) floats."""
        height, width = pixels.shape[:2]
        size = self.tile_size
        columns, rows = self.select_grid(width, height)
        image = Image.fromarray(pixels)
        thumbnail = self._canvas(image, size, size)[None]  # (1, 3, size, size)
        if columns * rows == 1:
            return thumbnail
        canvas = self._canvas(image, columns * size, rows * size)  # (3, rows * size, columns * size)
        grid = canvas.reshape(3, rows, size, columns, size).transpose(1, 3, 0, 2, 4)
        return np.concatenate([thumbnail, grid.reshape(rows * columns, 3, size, size)])

    def _canvas(self, image: Image.Image, width: int, height: int) -> np.ndarray:
        """Resize `image` into a canvas of `width` x `height` and normalize: (3, height, width) floats."""
        resized_width, resized_height = _fit(image.width, image.height, width, height)
        resized = image.resize((resized_width, resized_height), self.resample)
        pixels = np.asarray(resized).transpose(2, 0, 1).astype(np.float32)
        mean = np.array(self.image_mean, dtype=np.float32)[:, None, None]
        padding = mean
        if self.do_rescale:
            pixels *= np.float32(self.rescale_factor)
        else:
            padding = mean / np.float32(self.rescale_factor)
        if self.do_normalize:
            pixels = (pixels - mean) / np.array(self.image_std, dtype=np.float32)[:, None, None]
            padding = np.float32(0)
        canvas = np.empty((3, height, width), dtype=np.float32)
        canvas[:] = padding
        left, top = (width - resized_width) // 2, (height - resized_height) // 2
        canvas[:, top : top + resized_height, left : left + resized_width] = pixels
        return canvas


def _fit(width: int, height: int, canvas_width: int, canvas_height: int) -> tuple[int, int]:
    """Size of `width` x `height` scaled with its ratio kept to fit a canvas; a side of less than a pixel is one."""
    scale = min(canvas_width / width, canvas_height / height)
    return max(1, int(width * scale)), max(1, int(height * scale))


def _three_channels(value: Any, name: str) -> list[float]:
    channels = [value] * 3 if isinstance(value, (int, float)) else list(value)
    if len(channels) != 3:
        raise ValueError(f"{name} has {len(channels)} values ({value!r}); expected one number or one for each of RGB.")
    return [float(channel) for channel in channels]
