"""The image processor: grids, tiles, settings."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from plain_images import BLACK, BLUE, GREEN, RED, SIZE, WHITE, colours, flat_image, processor

from modeling_genieblue.image_processing_genieblue import GenieBlueImageProcessor


def reference_grid(width: int, height: int, side: int, tile: int = 384, alpha: float = 0.1) -> tuple[int, int]:
    """The published rule, written down a second time, for images whose resized sides are at least a pixel."""
    best, best_effective, best_wasted = None, 0, 0
    for m in reversed(range(1, side + 1)):
        for n in reversed(range(1, side + 1)):
            scale = min(tile * m / width, tile * n / height)
            effective = min(int(width * scale) * int(height * scale), width * height)
            wasted = tile * m * tile * n - effective
            if effective - best_effective > alpha * best_effective or (
                best_effective - effective < alpha * best_effective and wasted < best_wasted
            ):
                best, best_effective, best_wasted = (m, n), effective, wasted
    return best


@pytest.mark.parametrize("max_tiles", [9, 16])
@pytest.mark.parametrize(
    ("size", "grid"), [((394, 390), (1, 1)), ((380, 76), (1, 1)), ((380, 393), (1, 1)), ((500, 102), (2, 1))]
)
def test_worked_examples_of_the_paper(size, grid, max_tiles):
    assert GenieBlueImageProcessor(max_tiles=max_tiles).select_grid(*size) == grid


@pytest.mark.parametrize("side", [2, 3, 4])
def test_grids_follow_the_published_rule(side):
    chooser = GenieBlueImageProcessor(max_tiles=side * side)
    sizes = np.random.default_rng(0).integers(20, 3000, size=(300, 2)).tolist()
    assert [chooser.select_grid(*size) for size in sizes] == [reference_grid(*size, side) for size in sizes]


@pytest.mark.parametrize(
    ("size", "tiles"), [((384, 384), 1), ((768, 384), 3), ((768, 1536), 9), ((1536, 1536), 17), ((4000, 4000), 17)]
)
def test_a_grid_of_several_tiles_has_a_thumbnail_and_one_tile_has_none(size, tiles):
    assert GenieBlueImageProcessor().count_tiles(*size) == tiles


def test_alpha_decides_how_much_detail_a_smaller_canvas_may_lose():
    assert GenieBlueImageProcessor(relaxed_alpha=0.1).select_grid(394, 390) == (1, 1)
    assert GenieBlueImageProcessor(relaxed_alpha=0.0).select_grid(394, 390) != (1, 1)


@pytest.mark.parametrize(("size", "grid"), [((1, 10000), (1, 4)), ((10000, 1), (4, 1)), ((1, 1), (1, 1))])
def test_extreme_images_get_a_sensible_grid_and_pixels(size, grid):
    chooser = processor()
    assert chooser.select_grid(*size) == grid
    pixels = chooser(flat_image(GREEN, *size))["pixel_values"]
    assert len(pixels) == chooser.count_tiles(*size)
    assert np.isfinite(pixels).all()
    assert (pixels[:, 1] > 0.9).any() and (pixels[:, 0] < -0.9).any()  # some green is left of it


def test_thumbnail_first_then_tiles_row_by_row():
    image = Image.new("RGB", (2 * SIZE, 3 * SIZE))
    cells = [RED, GREEN, BLUE, WHITE, BLACK, (255, 255, 0)]
    for position, colour in enumerate(cells):
        image.paste(flat_image(colour), (position % 2 * SIZE, position // 2 * SIZE))
    output = processor()(image, return_tensors="pt")
    assert output["num_tiles"].tolist() == [7]
    assert output["pixel_values"].shape == (7, 3, SIZE, SIZE)
    assert colours(output["pixel_values"][1:]) == cells
    thumbnail = output["pixel_values"][0]
    assert (thumbnail[:, :, 0] == 0).all() and (thumbnail[:, :, -1] == 0).all()  # 2:3 leaves padding at both sides
    assert thumbnail[0, 0, 2] > 0.5 and thumbnail[1, 0, -3] > 0.5  # red above left, green above right


def test_padding_is_centred_and_exactly_zero():
    (tile,) = processor()(flat_image(WHITE, SIZE, SIZE // 2), max_tiles=1)["pixel_values"]
    assert (tile[:, : SIZE // 4] == 0).all() and (tile[:, -SIZE // 4 :] == 0).all()
    assert (tile[:, SIZE // 4 : -SIZE // 4] == 1).all()


@pytest.mark.parametrize(
    ("settings", "white", "padding"),
    [
        ({"do_normalize": False}, 1.0, 0.5),
        ({"do_normalize": False, "do_rescale": False}, 255.0, 127.5),
        ({"image_mean": [0.25, 0.25, 0.25], "image_std": 0.25}, 3.0, 0.0),
    ],
)
def test_padding_has_the_mean_colour_whatever_the_scaling(settings, white, padding):
    (tile,) = processor(max_tiles=1, **settings)(flat_image(WHITE, SIZE, SIZE // 2))["pixel_values"]
    assert tile[0, SIZE // 2, 0] == pytest.approx(white)
    assert tile[0, 0, 0] == pytest.approx(padding)


def test_several_images_are_concatenated_and_counted():
    images = [flat_image(RED), flat_image(GREEN, 2 * SIZE, SIZE), flat_image(BLUE)]
    output = processor()(images, return_tensors="pt")
    assert output["num_tiles"].tolist() == [1, 3, 1]
    assert colours(output["pixel_values"]) == [RED, GREEN, GREEN, GREEN, BLUE]
    nested = processor()([[images[0]], [], [images[1], images[2]]], return_tensors="pt")
    assert torch.equal(nested["pixel_values"], output["pixel_values"])


def test_settings_of_one_call_do_not_stay():
    chooser = processor()
    wide = flat_image(RED, 4 * SIZE, SIZE)
    assert chooser(wide, max_tiles=1)["num_tiles"].tolist() == [1]
    assert chooser(wide)["num_tiles"].tolist() == [5]


# Saving


def test_settings_survive_saving(tmp_path):
    saved = processor(max_tiles=9, relaxed_alpha=0.2, image_mean=[0.4, 0.5, 0.6], resample=2, do_rescale=False)
    saved.save_pretrained(tmp_path)
    loaded = GenieBlueImageProcessor.from_pretrained(tmp_path)
    assert loaded._settings() == saved._settings()
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["auto_map"] == {"AutoImageProcessor": "image_processing_genieblue.GenieBlueImageProcessor"}
    overridden = GenieBlueImageProcessor.from_pretrained(tmp_path, max_tiles=4)
    assert overridden.max_tiles == 4 and overridden.relaxed_alpha == 0.2


def test_auto_class_loads_the_saved_code_without_the_package(tmp_path):
    processor(max_tiles=4).save_pretrained(tmp_path / "model")
    script = (
        "import sys\n"
        "sys.modules['modeling_genieblue'] = None  # it cannot be imported, installed or not\n"
        "from transformers import AutoImageProcessor\n"
        "from PIL import Image\n"
        "loaded = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "output = loaded(Image.new('RGB', (32, 16)), return_tensors='pt')\n"
        "loaded.save_pretrained(sys.argv[1] + '-again')\n"
        "print(type(loaded).__module__.split('.')[0], loaded.max_tiles, *output['pixel_values'].shape)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model")], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["transformers_modules", "4", "3", "3", str(SIZE), str(SIZE)]
    assert (tmp_path / "model-again" / "image_processing_genieblue.py").exists()
