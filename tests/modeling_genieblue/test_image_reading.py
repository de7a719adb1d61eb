"""Every kind of image that people have, and the images that must be refused."""

import base64
import functools
import importlib
import logging
import os
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin
from plain_images import BLACK, BLUE, GREEN, RED, SIZE, WHITE, colour_of, colours, flat_image, png_file, processor

from modeling_genieblue.image_reading_genieblue import image_size, read_image


def as_chw(array):
    return array.transpose(2, 0, 1)


@pytest.mark.parametrize(
    "convert",
    [
        lambda array: array,
        as_chw,
        lambda array: array.astype(np.float32) / 255,
        lambda array: as_chw(array).astype(np.float64) / 255,
        lambda array: array.astype(np.uint16) * 257,
        lambda array: array.astype(np.int64),
        lambda array: array.astype(bool),
        lambda array: np.asfortranarray(array)[::1],
        lambda array: np.dstack([array, np.full(array.shape[:2], 255, np.uint8)]),
        lambda array: torch.from_numpy(as_chw(array)),
        lambda array: torch.from_numpy(array),
        lambda array: torch.from_numpy(as_chw(array) / 255).to(torch.bfloat16).requires_grad_(),
        lambda array: array[None],
        lambda array: Image.fromarray(array),
    ],
)
def test_arrays_and_tensors_equal_the_same_pil_image(convert):
    image = Image.new("RGB", (2 * SIZE, SIZE), BLUE)
    image.paste(RED, (0, 0, SIZE, SIZE))
    expected = processor()(image)["pixel_values"]
    assert np.array_equal(processor()(convert(np.array(image)))["pixel_values"], expected)


def test_shapes_that_could_be_read_both_ways():
    array = np.zeros((3, 5, 3), dtype=np.uint8)
    array[:, :, 0] = 255
    assert read_image(array).getpixel((0, 0)) == RED and read_image(array).size == (5, 3)
    assert read_image(torch.from_numpy(array)).size == (3, 5)
    assert read_image(torch.from_numpy(array), input_data_format="channels_last").getpixel((0, 0)) == RED
    assert processor()(array, input_data_format="channels_first")["pixel_values"].shape == (1, 3, SIZE, SIZE)


def test_grey_arrays_have_two_dimensions():
    assert colour_of(np.full((SIZE, SIZE), 128, np.uint8)) == (128, 128, 128)
    assert colour_of(np.full((SIZE, SIZE), 0.5)) == (128, 128, 128)
    assert colour_of(np.full((SIZE, SIZE), 32768, np.uint16)) == (128, 128, 128)


@pytest.mark.parametrize("form", [str, Path, lambda path: Image.open(path)])
def test_files_by_path(tmp_path, form):
    assert colour_of(form(png_file(tmp_path, flat_image(GREEN)))) == GREEN


def test_data_strings():
    buffer = BytesIO()
    flat_image(BLUE).save(buffer, "PNG")
    text = base64.encodebytes(buffer.getvalue()).decode()
    assert colour_of(f"data:image/png;base64,{text}") == BLUE


def half_transparent(mode: str, colour) -> Image.Image:
    image = Image.new("RGBA", (2 * SIZE, SIZE), (*colour, 255))
    image.paste((0, 0, 0, 0), (SIZE, 0, 2 * SIZE, SIZE))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa", "PA"])
def test_transparent_parts_turn_white(mode):
    image = half_transparent("LA" if mode == "La" else "RGBA", BLACK).convert(mode)
    assert colours(processor()(image)["pixel_values"])[1:] == [BLACK, WHITE]


def test_half_transparent_colours_are_mixed_with_white():
    assert colour_of(Image.new("RGBA", (SIZE, SIZE), (255, 0, 0, 128))) == (255, 127, 127)


def test_palette_with_transparency_is_composited_on_white(tmp_path):
    image = Image.new("P", (2 * SIZE, SIZE), 0)
    image.putpalette([0, 0, 255, 0, 255, 0])
    image.paste(1, (SIZE, 0, 2 * SIZE, SIZE))
    path = png_file(tmp_path, image, transparency=1)
    assert Image.open(path).mode == "P"
    assert colours(processor()(path)["pixel_values"])[1:] == [BLUE, WHITE]


def test_a_transparent_colour_without_alpha_channel_turns_white(tmp_path):
    path = png_file(tmp_path, flat_image(GREEN), transparency=GREEN)
    assert Image.open(path).mode == "RGB"
    assert colour_of(path) == WHITE


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 128, (128, 128, 128)),
        ("1", 1, WHITE),
        ("CMYK", (0, 255, 255, 0), RED),
        ("YCbCr", (255, 128, 128), WHITE),
        ("LAB", (255, 128, 128), (254, 255, 254)),
        ("HSV", (0, 255, 255), RED),
        ("I;16", 32768, (128, 128, 128)),
        ("I;16", 65535, WHITE),
        ("I;16", 100, BLACK),
        ("I", 32768, (128, 128, 128)),
        ("I", 200, (200, 200, 200)),
        ("F", 0.5, (128, 128, 128)),
        ("F", 100.0, (100, 100, 100)),
    ],
)
def test_modes_become_rgb(mode, colour, expected):
    assert colour_of(Image.new(mode, (SIZE, SIZE), colour)) == expected


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_files_are_scaled_and_not_clipped(tmp_path, suffix):
    values = np.linspace(0, 65535, 256, dtype=np.uint16)[None].repeat(256, axis=0)
    path = png_file(tmp_path, Image.fromarray(values), f"deep.{suffix}")
    scaled = np.array(read_image(path))[0, :, 0]
    assert scaled.tolist() == np.rint(values[0] / 257).tolist()


def test_values_beyond_16_bits_are_scaled_by_their_range():
    image = Image.fromarray(np.array([[-1000, 0, 99000]], dtype=np.int32))
    assert np.array(read_image(image))[0, :, 0].tolist() == [0, 3, 255]


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (2 * SIZE, SIZE), RED)
    image.paste(BLUE, (SIZE, 0, 2 * SIZE, SIZE))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    upright = read_image(png_file(tmp_path, image, exif=exif))
    assert upright.size == (SIZE, 2 * SIZE)
    assert upright.getpixel((0, 0)) == RED and upright.getpixel((0, 2 * SIZE - 1)) == BLUE


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_size_of_a_file_is_that_of_its_upright_image_and_read_without_pixels(
    tmp_path, suffix, orientation, monkeypatch
):
    file = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(file, exif=exif)
    expected = read_image(file).size
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert image_size(file) == image_size(file.read_bytes()) == image_size(Image.open(file)) == expected
    assert expected == ((20, 30) if orientation == 6 else (30, 20))


@pytest.mark.parametrize("image", [np.zeros((20, 30, 3), np.uint8), torch.zeros(3, 20, 30)], ids=["array", "tensor"])
def test_the_size_of_an_array_is_that_of_its_image(image):
    assert image_size(image) == read_image(image).size == (30, 20)


def test_a_damaged_exif_block_does_not_cost_the_image(tmp_path, caplog, monkeypatch):
    def fail(self):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    with caplog.at_level(logging.WARNING):
        assert colour_of(flat_image(GREEN)) == GREEN
    assert "unreadable EXIF" in caplog.text


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_first_frame_of_an_animation_with_a_warning(tmp_path, caplog, suffix):
    frames = [flat_image(WHITE), flat_image(BLACK), flat_image((128, 128, 128))]
    options = {"lossless": True} if suffix == "webp" else {}
    path = png_file(
        tmp_path, frames[0], f"moving.{suffix}", save_all=True, append_images=frames[1:], duration=50, **options
    )
    with caplog.at_level(logging.WARNING):
        assert colour_of(path) == WHITE
    assert f"moving.{suffix} has 3 frames; frame 1 is used and the other 2 are ignored" in caplog.text


def test_an_open_animation_gives_its_current_frame(tmp_path):
    path = png_file(
        tmp_path, flat_image(WHITE), "two.gif", save_all=True, append_images=[flat_image(BLACK)], duration=50
    )
    with Image.open(path) as animation:
        animation.seek(1)
        assert colour_of(animation) == BLACK
        assert animation.tell() == 1


def test_the_callers_image_is_not_changed():
    image = half_transparent("RGBA", GREEN)
    before = (image.mode, image.size, image.tobytes())
    array = np.random.default_rng(0).random((SIZE, SIZE, 3))
    kept = array.copy()
    processor()([image, array])
    assert (image.mode, image.size, image.tobytes()) == before
    assert np.array_equal(array, kept)


# What it must refuse


def refused(image, error=ValueError, **settings) -> str:
    with pytest.raises(error) as caught:
        processor(**settings)([flat_image(RED, 1, 1), image])
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"", "empty.png"), (b"not an image at all", "text.png"), (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "zeros.png")],
)
def test_a_broken_file_is_named(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    message = refused(path, OSError)
    assert str(path) in message and "cannot be read as an image" in message and "Replace the file" in message


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path = png_file(tmp_path, noise, f"cut.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"cut.{suffix} cannot be read as an image" in refused(path, OSError)


def test_a_truncated_open_image_is_named_by_number_and_file(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path = png_file(tmp_path, noise, "cut.png")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"Image 1 ({path}) cannot be read" in refused(Image.open(path), OSError)


def test_a_missing_file_is_named(tmp_path):
    message = refused(tmp_path / "absent.png", FileNotFoundError)
    assert "absent.png' does not exist" in message and "expected a path" in message
    assert "cannot be read" in refused(tmp_path, OSError)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [SIZE * SIZE - 1, SIZE * SIZE // 4])
def test_a_decompression_bomb_is_refused_in_both_ranges_of_pillow(tmp_path, monkeypatch, limit):
    path = png_file(tmp_path, flat_image(RED), "bomb.png")
    lazy = Image.open(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for image in (path, lazy):
        message = refused(image)
        assert "bomb.png" in message and "decompression bomb" in message and f"at most {limit} pixels" in message
        assert "MAX_IMAGE_PIXELS if you trust it" in message


def test_the_limit_is_for_files_not_for_arrays_in_memory(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert colour_of(np.array(flat_image(GREEN))) == GREEN


def test_a_real_bomb_is_refused_without_being_unpacked(tmp_path):
    path = png_file(tmp_path, Image.new("1", (14000, 14000)), "bomb.png")
    assert "too large" in refused(path)


def test_bombs_inside_of_text_chunks_are_refused(tmp_path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("comment", "0" * (2 * PngImagePlugin.MAX_TEXT_CHUNK), zip=True)
    assert "cannot be read" in refused(png_file(tmp_path, flat_image(), pnginfo=chunks), OSError)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((0, 5, 3), np.uint8), "Image 1 has shape 0x5x3; expected at least 1x1"),
        (Image.new("RGB", (0, 3)), "Image 1 is 0x3 pixels; expected at least 1x1"),
        (np.zeros((5, 5, 2), np.uint8), "Image 1 has shape 5x5x2; expected 1, 3 or 4 channels"),
        (torch.zeros(7, 5, 5), "Image 1 has shape 7x5x5; expected 1, 3 or 4 channels"),
        (np.zeros(5), "Image 1 has 1 dimensions (5); expected 2"),
        (np.full((4, 4, 3), np.nan), "Image 1 holds NaN or infinite"),
        (torch.full((3, 4, 4), float("inf")), "Image 1 holds NaN or infinite"),
        (Image.new("F", (4, 4), float("nan")), "Image 1 holds NaN or infinite"),
        (np.full((4, 4, 3), 200.0), "Image 1 holds floats from 200 to 200; expected 0..1"),
        (np.full((4, 4, 3), -0.5), "Divide by 255 or pass uint8"),
        (np.full((4, 4, 3), 300), "Image 1 holds int64 values from 300 to 300; expected 0..255"),
        (np.full((4, 4, 3), 1j), "Image 1 has dtype complex128"),
        (object(), "Image 1 is of type object; expected a PIL image"),
        ({"path": "x.png"}, "Image 1 is of type dict"),
        ("data:image/png;base64,%%%", "Image 1 is a data:image string that is not valid base64"),
    ],
)
def test_other_bad_images_are_named(image, words):
    assert words in refused(image)


def test_base64_of_something_else_is_unreadable():
    assert "Image 1 (data:image string) cannot be read" in refused("data:image/png;base64,aGVsbG8=", OSError)


def test_no_image_and_unknown_settings():
    with pytest.raises(ValueError, match="No image was given"):
        processor()([])
    with pytest.raises(ValueError, match=re.escape("Unknown image setting ['do_pad']")):
        processor()(flat_image(), do_pad=True)
    assert "has mode L; expected RGB" in refused(Image.new("L", (4, 4)), do_convert_rgb=False)
    with pytest.raises(ValueError, match="An image of 0x5 pixels has no grid"):
        processor().select_grid(0, 5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_tiles": 8}, "max_tiles is 8; .* square number"),
        ({"max_tiles": 0}, "max_tiles is 0"),
        ({"tile_size": 0}, "tile_size is 0"),
        ({"relaxed_alpha": 1.5}, "relaxed_alpha is 1.5"),
        ({"image_mean": [0.5, 0.5]}, "image_mean has 2 values"),
        ({"image_std": 0}, "image_std is .* expected nonzero"),
        ({"resample": 17}, "17 is not a valid Resampling"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        processor(**settings)


@pytest.fixture
def served(tmp_path):
    """A folder, and the address under which its files are served."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "CMYK"])
def test_an_address_gives_the_pixels_of_its_file(served, mode):
    folder, address = served
    values = np.random.default_rng(3).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    image = Image.fromarray(values, "RGBA")
    image = Image.fromarray(values[..., 0].astype(np.uint16) * 100) if mode == "I;16" else image.convert(mode)
    name = "a.tif" if mode == "CMYK" else "a.png"
    image.save(folder / name)
    assert np.array_equal(read_image(f"{address}/{name}"), read_image(folder / name))


def test_an_address_that_gives_no_image_is_refused(served, monkeypatch):
    folder, address = served
    flat_image(BLUE).save(folder / "a.eps")
    assert "PostScript" in refused(f"{address}/a.eps", ValueError)
    (folder / "page.html").write_text("<html>")
    assert "page.html" in refused(f"{address}/page.html", OSError)
    assert "could not be fetched" in refused(f"{address}/missing.png", OSError)
    assert "could not be fetched (ConnectError" in refused("http://127.0.0.1:1/a.png", OSError)
    assert "could not be fetched" in refused("http://", OSError)
    flat_image(BLUE).save(folder / "a.png")
    module = importlib.import_module(read_image.__module__)
    monkeypatch.setattr(module, "LARGEST_DOWNLOAD", 16)
    assert "larger than" in refused(f"{address}/a.png", OSError)


def test_the_bytes_of_a_file_are_an_image(tmp_path):
    content = Path(png_file(tmp_path, flat_image(BLUE), "blue.png")).read_bytes()
    assert colour_of(content) == BLUE
    assert "Image 1 (20 bytes)" in refused(content[:20], OSError)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in refused(tmp_path / "pipe.png", OSError)


def test_postscript_is_not_run(tmp_path):
    flat_image(BLUE).save(tmp_path / "a.eps")
    assert "PostScript" in refused(tmp_path / "a.eps")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def forbidden(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.png").write_bytes(b"")
    monkeypatch.setattr(Image, "open", forbidden)
    with pytest.raises(PermissionError, match="secret.png' may not be read: change its permissions"):
        read_image(str(tmp_path / "secret.png"))
