"""A tower that learns to read tiles: their labels, and a projector that ends at a language model's embeddings."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, SiglipVisionModel

pytest.importorskip("sklearn")

from tiny_models import save_tiny_base, tiny_config

from genieblue.lab.drawings import Mark, draw_word
from genieblue.lab.tasks import TASKS
from genieblue.lab.tasks.materials import LABELS
from genieblue.lab.tile_reader import (
    PATCH_SIZE,
    TILE_SIZE,
    TOKENS,
    MarkedTiles,
    Spelling,
    TileReader,
    join_tiles,
    read_tiles,
    tower_config,
)
from modeling_genieblue import GenieBlueConfig, GenieBlueMultiModalProjector

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class LetterSpelling:
    """A token for each letter."""

    def __getitem__(self, label):
        return [1 + LETTERS.index(label)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base("llama", tmp_path_factory.mktemp("tiles") / "base")


def draw(rng, word="WAVED"):
    drawing = draw_word(word, rng)
    return drawing.image, drawing.marks


def test_each_tile_is_labelled_with_its_own_letters_from_left_to_right():
    found = 0
    for index in range(30):
        image, _ = draw(np.random.default_rng([0, index]))
        tiles = MarkedTiles(draw, LetterSpelling(), 30)[index]
        count = len(tiles["pixel_values"])
        assert tiles["pixel_values"].shape == (count, 3, TILE_SIZE, TILE_SIZE)
        assert tiles["columns"].shape == (count, TILE_SIZE // PATCH_SIZE) and tiles["tokens"].shape == (count, TOKENS)
        read = "".join(LETTERS[label - 1] for label in tiles["tokens"].flatten().tolist() if label)
        assert read == "WAVED" or image.height > 40  # a letter that is cut by a row of tiles may be lost
        for row in tiles["tokens"]:
            letters = row.nonzero().flatten().tolist()
            assert letters == list(range(len(letters)))  # no gap before a letter
        found += read == "WAVED"
    assert found >= 25


def test_a_mark_of_several_tokens_takes_several_and_what_does_not_fit_is_left_out():
    class TwoTokens:
        def __getitem__(self, label):
            return {"a": [1, 2], "b": [3], "c": [4, 5]}[label]

    image, _ = draw(np.random.default_rng(0))
    square = image.resize((TILE_SIZE, TILE_SIZE))
    marks = (Mark("c", 40, 24), Mark("a", 4, 20), Mark("b", 14, 30))
    tiles = MarkedTiles(lambda rng: (square, marks), TwoTokens(), 1)[0]
    assert tiles["tokens"].tolist() == [[1, 2, 3, 4]] and tiles["columns"].tolist() == [[1, 3, 0, 4]]


def test_labels_are_spelled_as_inside_a_text(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    spelling = Spelling(["a", "7", "red circle"], tokenizer)
    assert spelling.tokens[0] == tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    for label, text in {"a": " a", "7": "7", "red circle": " red circle"}.items():
        written = [spelling.tokens[place] for place in spelling[label]]
        assert written == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_marks_of_all_tasks_have_labels_and_lie_in_the_image():
    for task, drawn_by in TASKS.items():
        for seed in range(20):
            drawn = drawn_by(np.random.default_rng([3, seed]), False)
            assert drawn.marks, task
            assert {mark.label for mark in drawn.marks} <= set(LABELS)
            width, height = drawn.image.size
            assert all(0 <= mark.x <= width and 0 <= mark.y <= height for mark in drawn.marks), (task, seed)


def test_the_loss_of_the_tower_falls_with_the_right_letters():
    torch.manual_seed(0)
    config = GenieBlueConfig(text_config=tiny_config("llama").to_dict(), vision_config=tower_config().to_dict())
    projector = GenieBlueMultiModalProjector(config)
    embeddings = torch.randn(1 + len(LETTERS), config.text_config.hidden_size)
    reader = TileReader(SiglipVisionModel(tower_config()), projector, embeddings)
    rng = np.random.default_rng(0)
    batch = join_tiles([MarkedTiles(lambda _: draw(rng, "CAB"), LetterSpelling(), 4)[index] for index in range(4)])
    optimizer = torch.optim.Adam(reader.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        outputs = reader(**batch)
        outputs["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs["loss"].item())
    assert outputs["logits"].shape == (len(batch["tokens"]), TOKENS, 1 + len(LETTERS))
    assert losses[-1] < 0.3 * losses[0]
    assert torch.equal(reader.embeddings, embeddings)


def test_a_tower_and_its_projector_are_trained_for_a_base(base):
    torch.manual_seed(0)
    tower = SiglipVisionModel(tower_config())
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    projector = read_tiles(tower, base, draw, LETTERS, steps=2)
    changed = [name for name, value in tower.state_dict().items() if not torch.equal(value, before[name])]
    assert any("encoder.layers.0" in name for name in changed)
    assert projector.linear_2.weight.shape[0] == tiny_config("llama").hidden_size
