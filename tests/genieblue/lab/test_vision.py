"""The small SigLIP of a lab: tiles with captions, and a contrast that it learns."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import SiglipModel, SiglipVisionModel

pytest.importorskip("sklearn")

from tiny_models import save_tiny_base, tiny_config

from genieblue.lab.tasks import TASKS
from genieblue.lab.tasks.materials import SHAPES, SYMBOLS
from genieblue.lab.tile_reader import TILE_SIZE
from genieblue.lab.vision import (
    CAPTION_LENGTH,
    PROJECTOR,
    READ,
    CaptionedTiles,
    ImageTextContrast,
    draw_marked,
    draw_tile,
    make_small_siglip,
    siglip_config,
)


def test_a_tile_and_its_caption_depend_on_seed_and_index_alone():
    first, again = (CaptionedTiles(8, seed=3)[5] for _ in range(2))
    assert first["pixel_values"].shape == (3, TILE_SIZE, TILE_SIZE) and first["input_ids"].shape == (CAPTION_LENGTH,)
    assert -1 <= first["pixel_values"].min() and first["pixel_values"].max() <= 1
    assert all(torch.equal(first[name], again[name]) for name in first)
    _, caption = draw_tile(np.random.default_rng([3, 5]))
    assert bytes(first["input_ids"].tolist()).rstrip(b"\0").decode() == caption


def test_captions_are_of_all_kinds_and_fit():
    captions = [draw_tile(np.random.default_rng([1, index]))[1] for index in range(200)]
    assert max(map(len, captions)) <= CAPTION_LENGTH
    assert {caption.split()[0] for caption in captions} >= {"text", "number"}
    assert any(" bar " in caption for caption in captions) and any("circle" in caption for caption in captions)


def test_images_learn_their_own_captions():
    torch.manual_seed(0)
    contrast = ImageTextContrast(SiglipModel(siglip_config()))
    samples = [CaptionedTiles(8, seed=0)[index] for index in range(8)]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    optimizer = torch.optim.AdamW(contrast.parameters(), 1e-3)
    for _ in range(40):
        outputs = contrast(**batch)
        outputs["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (outputs["logits"].argmax(dim=1) == torch.arange(8)).sum() >= 7


def test_the_tower_and_the_projector_for_a_base_are_saved(tmp_path):
    base = save_tiny_base("llama", tmp_path / "base")
    make_small_siglip(tmp_path / "vision", base, contrast_steps=1, reading_steps=1)
    tower = SiglipVisionModel.from_pretrained(tmp_path / "vision")
    patches = tower(torch.zeros(1, 3, TILE_SIZE, TILE_SIZE)).last_hidden_state
    assert patches.shape == (1, 16, siglip_config().vision_config.hidden_size)
    projector = load_file(tmp_path / "vision" / PROJECTOR)
    assert len(projector["linear_2.bias"]) == tiny_config("llama").hidden_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "vision"]


def test_what_is_read_is_of_all_tasks():
    drawn = [draw_marked(np.random.default_rng([2, index])) for index in range(200)]
    labels = {mark.label for _, marks in drawn for mark in marks}
    assert labels & set(SYMBOLS.values()) and labels & set(SHAPES) and "7" in labels and "Q" in labels
    assert set(READ) - set(TASKS) == {"letters"} and sum(READ.values()) == pytest.approx(1)
