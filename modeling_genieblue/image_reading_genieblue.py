"""Reads images from any common source, checks them and converts them to upright 8-bit RGB pixels."""

import base64
import contextlib
import logging
import os
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import ExifTags, Image, ImageOps

from .addresses_genieblue import redacted, redacted_logs, shown

logger = logging.getLogger(__name__)

IMAGE_TYPES = (
    "a PIL image, a NumPy array, a torch tensor, a file path, a file's bytes, an http(s) address or a data:image/... "
    "string"
)
DOWNLOAD_SECONDS = 30
LARGEST_DOWNLOAD = 256 * 2**20  # bytes


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
    return Image.fromarray(rgb_pixels(image, index, True, input_data_format))


def image_size(image: Any, index: int = 0) -> tuple[int, int]:
    """
    Return the (width, height) that `read_image` gives `image`, without reading the pixels of a file.

    ValueError or OSError as from `read_image`, but for damage that only the pixels show.
    """
    if isinstance(image, (str, bytes, os.PathLike)):
        image, _ = _open(image if isinstance(image, bytes) else os.fspath(image), f"Image {index}")
        with image:
            return _upright_size(image)
    if isinstance(image, Image.Image):
        return _upright_size(image)
    height, width, _ = rgb_pixels(image, index, True, None).shape
    return width, height


def _upright_size(image: Image.Image) -> tuple[int, int]:
    with contextlib.suppress(Exception):  # a damaged EXIF block, which `_decode` does not apply either
        # The method of the base class, for a PNG file's own reads all pixels to look for EXIF behind them.
        turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        if turned and image.format != "TIFF":  # for which Pillow gives the upright size from the start
            return image.height, image.width
    return image.width, image.height


def rgb_pixels(image: Any, index: int, convert: bool, input_data_format: str | None) -> np.ndarray:
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
    file = getattr(image, "filename", "")
    name = f"{name} ({shown(file)})" if file else name
    return _as_rgb(_decode(image, name), name, convert)


def _open(source: str | bytes, name: str) -> tuple[Image.Image, str]:
    """Open a path, address, data string or a file's bytes without reading pixels, and give it a name for errors."""
    if isinstance(source, bytes):
        file, name = BytesIO(source), f"{name} ({len(source)} bytes)"
    elif source[:11].lower() == "data:image/":
        file, name = BytesIO(_decode_base64(source, name)), f"{name} (data:image string)"
    elif source.lower().startswith(("http://", "https://")):
        file, name = BytesIO(_download(source)), shown(source)
    else:
        file, name = source, shown(source)
        if not os.path.exists(source):
            raise FileNotFoundError(
                f"Image file '{name}' does not exist; expected a path, an http(s) address or a data:image/ string."
            )
        if not os.path.isfile(source):  # a pipe would be waited for
            raise OSError(f"'{name}' cannot be read as an image: it is not a regular file; expected an image's path.")
    try:
        return Image.open(file), name
    except Image.DecompressionBombError as error:
        raise _too_large(name, str(error)) from error
    except PermissionError as error:
        raise PermissionError(f"Image file '{name}' may not be read: change its permissions.") from error
    except Exception as error:  # Pillow's readers raise nearly anything for a damaged file.
        raise _unreadable(name, error) from error


def _decode_base64(source: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(source.partition(",")[2].split()), validate=True)
    except ValueError as error:
        raise ValueError(f"{name} is a data:image string that is not valid base64 ({error}).") from error


def _download(address: str) -> bytes:
    """Fetch an image's bytes; transformers' own loader would decode it too, past all the checks that files get."""
    content = bytearray()
    try:
        session = get_session()
        with (
            redacted_logs(),
            session.stream("GET", address, timeout=DOWNLOAD_SECONDS, follow_redirects=True) as response,
        ):
            problem = f"HTTP {response.status_code} {redacted(response.reason_phrase)}" if response.is_error else None
            for piece in response.iter_bytes() if problem is None else ():
                content += piece
                if len(content) > LARGEST_DOWNLOAD:
                    problem = f"it is larger than {LARGEST_DOWNLOAD // 2**20} MiB"
                    break
    except Exception as error:  # of the client's own classes, and those of addresses that are none
        # Their messages repeat the address, or the one that it redirects to, with all that may be secret in it.
        problem = type(error).__name__
    if problem is not None:  # raised here, so that the client's error is not in the traceback
        raise OSError(
            f"{shown(address)} could not be fetched ({problem}): check the address and the network, or give a file."
        )
    return bytes(content)


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Check the size, read the pixels, turn the image upright; the caller's image stays as it is."""
    if image.format == "EPS":  # Pillow would hand the file to Ghostscript, a program, to be run
        raise ValueError(f"{name} is a PostScript file; expected a raster image (convert it to PNG first).")
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
        f"{name} cannot be read as an image ({type(error).__name__}: {error}); it is damaged, truncated or not "
        "an image. Replace the file or convert it to PNG or JPEG."
    )
