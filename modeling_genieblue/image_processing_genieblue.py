"""Image processor of GenieBlue: relaxed aspect-ratio matching (BlueLM-V-3B), a thumbnail and tiles of one size."""

import base64
import logging
import math
import os
from collections.abc import Iterator
from io import BytesIO
from typing import Any

from .compat_genieblue import require_transformers

require_transformers()

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

logger = logging.getLogger(__name__)

IMAGE_TYPES = (
    "a PIL image, a NumPy array, a torch tensor, a file path, a file's bytes, an http(s) address or a data:image/... "
    "string"
)
DOWNLOAD_SECONDS = 30
LARGEST_DOWNLOAD = 256 * 2**20  # bytes


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
            raise ValueError(f"image_std is {self.image_std}; pixels are divided by it, so expected no zero.")

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

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """
        Return `pixel_values` (total_tiles, 3, tile_size, tile_size) and `num_tiles` (num_images,) of one image or of
        a list of them, nested or not.

        The tiles of an image follow each other: thumbnail first, then row by row. `kwargs` override settings for this
        call (`max_tiles=1` gives one tile per image); `input_data_format` ("channels_first" or "channels_last") says
        how arrays are laid out where their shape leaves it open. ValueError or OSError names the image that is bad.
        """
        input_data_format = kwargs.pop("input_data_format", None)
        if unknown := sorted(kwargs.keys() - self._settings().keys()):
            raise ValueError(f"Unknown image setting {unknown}; expected one of {sorted(self._settings())}.")
        if kwargs:
            changed = {name: value for name, value in kwargs.items() if value is not None}
            return type(self)(**{**self._settings(), **changed}).preprocess(
                images, return_tensors, input_data_format=input_data_format
            )
        tiles = [
            self._cut(_rgb_pixels(image, index, self.do_convert_rgb, input_data_format))
            for index, image in enumerate(flatten_images(images))
        ]
        if not tiles:
            raise ValueError(f"No image was given; expected {IMAGE_TYPES}, or a list of them.")
        data = {
            "pixel_values": np.concatenate(tiles),  # (total_tiles, 3, tile_size, tile_size)
            "num_tiles": np.array([len(image_tiles) for image_tiles in tiles], dtype=np.int64),
        }
        return BatchFeature(data, tensor_type=return_tensors)

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


def flatten_images(images: Any) -> Iterator[Any]:
    """Yield the single images of an image, a list of any nesting, or a batched (4-dimensional) array."""
    if isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4):
        for image in images:
            yield from flatten_images(image)
    else:
        yield images


def read_image(image: Any, index: int = 0, input_data_format: str | None = None) -> Image.Image:
    """
    Return `image` upright, as an 8-bit RGB PIL image; transparent parts turn white and 16-bit grey is scaled down.

    `index` names an image without a file name in errors. ValueError for an image of a wrong shape, range, type or
    size; OSError for one that cannot be read.
    """
    return Image.fromarray(_rgb_pixels(image, index, True, input_data_format))


def _fit(width: int, height: int, canvas_width: int, canvas_height: int) -> tuple[int, int]:
    """Size of `width` x `height` scaled with its ratio kept to fit a canvas; a side of less than a pixel is one."""
    scale = min(canvas_width / width, canvas_height / height)
    return max(1, int(width * scale)), max(1, int(height * scale))


def _three_channels(value: Any, name: str) -> list[float]:
    channels = [value] * 3 if isinstance(value, (int, float)) else list(value)
    if len(channels) != 3:
        raise ValueError(f"{name} has {len(channels)} values ({value!r}); expected one number or one for each of RGB.")
    return [float(channel) for channel in channels]


def _rgb_pixels(image: Any, index: int, convert: bool, input_data_format: str | None) -> np.ndarray:
    """Return (height, width, 3) bytes of any accepted image."""
    name = f"Image {index}"
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _as_rgb(_image_from_array(image, name, input_data_format), name, convert)
    if isinstance(image, (str, bytes, os.PathLike)):
        image, name = _open(image if isinstance(image, bytes) else os.fspath(image), name)
        with image:  # closes the file, which an animation would keep open
            return _as_rgb(_decode(image, name), name, convert)
    if not isinstance(image, Image.Image):
        raise ValueError(f"{name} is of type {type(image).__name__}; expected {IMAGE_TYPES}.")
    name = f"{name} ({image.filename})" if getattr(image, "filename", "") else name
    return _as_rgb(_decode(image, name), name, convert)


def _open(source: str | bytes, name: str) -> tuple[Image.Image, str]:
    """Open a path, address, data string or a file's bytes without reading pixels, and give it a name for errors."""
    if isinstance(source, bytes):
        source, file = f"{name} ({len(source)} bytes)", BytesIO(source)
    elif source.startswith("data:image/"):
        try:
            content = base64.b64decode("".join(source.partition(",")[2].split()), validate=True)
        except ValueError as error:
            raise ValueError(f"{name} is a data:image string that is not valid base64 ({error}).") from error
        source, file = f"{name} (data:image string)", BytesIO(content)
    elif source.startswith(("http://", "https://")):
        file = BytesIO(_download(source))
    else:
        file = source
    if file is source and os.path.exists(source) and not os.path.isfile(source):  # a pipe would be waited for
        raise OSError(f"'{source[:200]}' cannot be read as an image: it is no regular file; expected an image's path.")
    try:
        return Image.open(file), source
    except Image.DecompressionBombError as error:
        raise _too_large(source, str(error)) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Image file '{source[:200]}' does not exist; expected a path, an http(s) address or a data:image/ string."
        ) from error
    except PermissionError as error:
        raise PermissionError(f"Image file '{source[:200]}' may not be read: change its permissions.") from error
    except Exception as error:  # Pillow's readers raise nearly anything for a damaged file.
        raise _unreadable(source, error) from error


def _download(address: str) -> bytes:
    """Fetch an image's bytes; transformers' own loader would decode it too, past all the checks that files get."""
    try:
        with get_session().stream("GET", address, timeout=DOWNLOAD_SECONDS, follow_redirects=True) as response:
            response.raise_for_status()
            content = bytearray()
            for piece in response.iter_bytes():
                content += piece
                if len(content) > LARGEST_DOWNLOAD:
                    raise ValueError(f"it is larger than {LARGEST_DOWNLOAD // 2**20} MiB")
    except Exception as error:  # of the client's own classes, and those of addresses that are none
        raise OSError(
            f"{address[:200]} could not be fetched ({type(error).__name__}: {error}): check the address and the "
            "network, or give a file."
        ) from error
    return bytes(content)


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Check the size, read the pixels, turn the image upright; the caller's image stays as it is."""
    if image.format == "EPS":  # Pillow would hand the file to Ghostscript, a program, to be run
        raise ValueError(f"{name} is a PostScript file; expected a picture of pixels (convert it to PNG first).")
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{name} is {width}x{height} pixels; expected at least 1x1 pixels.")
    # Pillow only warns between its limit and twice the limit; its reading would cost the memory all the same.
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise _too_large(name, f"{width}x{height} = {width * height} pixels")
    try:
        frames = getattr(image, "n_frames", 1)
        image.load()
    except Image.DecompressionBombError as error:
        raise _too_large(name, str(error)) from error
    except Exception as error:
        raise _unreadable(name, error) from error
    # The further frames of an MPO (a phone's photo) are previews and depth maps, not an animation.
    if frames > 1 and image.format != "MPO":
        logger.warning(
            "%s has %d frames; frame %d is used and the other %d are ignored.",
            name,
            frames,
            image.tell() + 1,
            frames - 1,
        )
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # A damaged EXIF block does not make the pixels unusable.
        logger.warning("%s has unreadable EXIF data (%s); its orientation is not applied.", name, error)
        return image


def _as_rgb(image: Image.Image, name: str, convert: bool) -> np.ndarray:
    """Convert an image of any mode to (height, width, 3) bytes."""
    if not convert and image.mode != "RGB":
        raise ValueError(f"{name} has mode {image.mode}; expected RGB, or do_convert_rgb=True to convert it.")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _image_from_deep_grey(np.asarray(image), image.mode, name)
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # which Pillow cannot turn to RGBA at once
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _image_from_deep_grey(values: np.ndarray, mode: str, name: str) -> Image.Image:
    """Scale 16-bit, 32-bit or floating-point grey (height, width) to 8 bits by the range that its values have."""
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinite pixels; expected finite ones.")
    low, high = values.min(), values.max()
    if mode.startswith("I;16"):
        low, high = 0, 65535
    elif low >= 0 and mode == "F" and high <= 1:
        low, high = 0, 1
    elif low >= 0 and high <= 255:
        low, high = 0, 255
    elif low >= 0 and high <= 65535:
        low, high = 0, 65535
    return Image.fromarray(np.rint((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))


def _image_from_array(array: np.ndarray | torch.Tensor, name: str, input_data_format: str | None) -> Image.Image:
    """Build a PIL image of an array or tensor: bytes, 16-bit integers or floats in 0..1; 2, or 3 dimensions."""
    channels_first = isinstance(array, torch.Tensor)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    shape = "x".join(map(str, array.shape))
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim != 3:
        raise ValueError(f"{name} has {array.ndim} dimensions ({shape}); expected 2 (grey) or 3 (with channels).")
    else:
        first, last = array.shape[0] in (1, 3, 4), array.shape[-1] in (1, 3, 4)
        # Where both ends could be the channels, tensors are taken as channels first, arrays as channels last.
        channels_first = channels_first if first and last else first
        if input_data_format is not None:
            channels_first = str(getattr(input_data_format, "value", input_data_format)) == "channels_first"
        array = array.transpose(1, 2, 0) if channels_first else array
        if array.shape[-1] not in (1, 3, 4):
            raise ValueError(f"{name} has shape {shape}; expected 1, 3 or 4 channels as the first or last dimension.")
    if array.size == 0:
        raise ValueError(f"{name} has shape {shape}; expected at least 1x1 pixels.")
    pixels = _bytes_from_values(array, name)
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels)


def _bytes_from_values(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint16:
        return np.rint(values / 257).astype(np.uint8)
    if np.issubdtype(values.dtype, np.integer):
        if values.min() < 0 or values.max() > 255:
            raise ValueError(
                f"{name} holds {values.dtype} values from {values.min()} to {values.max()}; expected 0..255."
            )
        return values.astype(np.uint8)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"{name} has dtype {values.dtype}; expected uint8, uint16 or floats in 0..1.")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinite pixels; expected floats in 0..1.")
    # Interpolated floats overshoot by a rounding error, which is no reason to refuse them.
    if values.min() < -1e-3 or values.max() > 1 + 1e-3:
        raise ValueError(
            f"{name} holds floats from {values.min():.4g} to {values.max():.4g}; expected 0..1. "
            "Divide by 255 or pass uint8; undo a normalization."
        )
    return np.rint(np.clip(values.astype(np.float32), 0, 1) * 255).astype(np.uint8)


def _too_large(name: str, size: str) -> ValueError:
    return ValueError(
        f"{name} is too large ({size}) and may be a decompression bomb; expected at most {Image.MAX_IMAGE_PIXELS} "
        "pixels. Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."
    )


def _unreadable(name: str, error: Exception) -> OSError:
    return OSError(
        f"{name[:200]} cannot be read as an image ({type(error).__name__}: {error}); it is damaged, truncated or not "
        "an image. Replace the file or convert it to PNG or JPEG."
    )
