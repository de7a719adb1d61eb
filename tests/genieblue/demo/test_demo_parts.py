"""The vision tower of the quick demo."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from genieblue.demo.digit_tower import DigitTiles, vision_config
from genieblue.lab.scans import (
    digit_cells,
    split_scans,
)


@pytest.fixture(scope="module")
def scans():
    return split_scans()


def test_tiles_show_the_digit_that_they_are_labelled_with(scans):
    tiles = DigitTiles(scans[1], 20, augment=False, reach=0)
    tile = tiles[3]
    assert tile["pixel_values"].shape == (3, 32, 32)
    assert tile["pixel_values"].min() >= -1 and tile["pixel_values"].max() <= 1
    assert torch.equal(tile["pixel_values"], tiles[3]["pixel_values"])
    # The middle of the tile holds an unchanged scan of that label.
    middle = (tile["pixel_values"][0].numpy() + 1) / 2
    same = scans[1].images[scans[1].labels == int(tile["labels"])]
    cells = digit_cells(same, np.random.default_rng(0), augment=False)
    assert min(np.abs(cell[:, 8:24] - middle[:, 8:24]).mean() for cell in cells) < 0.02


def test_vision_tower_sees_four_tokens_a_tile():
    config = vision_config()
    assert (config.image_size // config.patch_size // 2) ** 2 == 4
