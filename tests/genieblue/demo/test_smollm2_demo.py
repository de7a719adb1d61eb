"""The parts of the demo on a real LLM: its vision tower, questions and words."""

import numpy as np
import pytest
import torch
from transformers import SiglipVisionModel

pytest.importorskip("sklearn")

from tiny_models import save_tiny_base, tiny_config

from genieblue.demo import smollm2
from genieblue.demo.character_tower import (
    CHARACTERS,
    PATCH_SIZE,
    TILE_SIZE,
    CharacterReader,
    CharacterTiles,
    character_embeddings,
    join_tiles,
    tower_config,
)
from genieblue.lab.drawings import draw_word
from genieblue.lab.scans import split_scans
from modeling_genieblue import GenieBlueConfig, GenieBlueMultiModalProjector


@pytest.fixture(scope="module")
def scans():
    return split_scans()


@pytest.fixture
def demo(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "none.gguf")
    made = smollm2.SmolLM2Demo(scale=0.1)
    made._train_words, made._held_out_words = ["CAT", "HORSE"], ["MOUSE", "DOG"]
    return made


# Vision tower


def test_each_tile_is_labelled_with_its_own_characters_in_reading_order():
    found = 0
    for index in range(30):
        drawing = draw_word("WAVED", np.random.default_rng([0, index]))
        tiles = CharacterTiles(lambda rng: draw_word("WAVED", rng), 30)[index]
        count = len(tiles["pixel_values"])
        assert tiles["pixel_values"].shape == (count, 3, TILE_SIZE, TILE_SIZE)
        assert tiles["columns"].shape == tiles["tokens"].shape == (count, TILE_SIZE // PATCH_SIZE)
        read = "".join(CHARACTERS[label - 1] for label in tiles["tokens"].flatten().tolist() if label)
        assert read in ("WAVED",) or drawing.image.height > 40  # a letter that is cut by a row of tiles may be lost
        assert torch.equal(tiles["tokens"].sort(dim=1).values, tiles["columns"].sort(dim=1).values)
        for row in tiles["tokens"]:
            letters = row.nonzero().flatten().tolist()
            assert letters == list(range(len(letters)))  # no gap before a letter
        found += read == "WAVED"
    assert found >= 25


def test_the_loss_of_the_tower_falls_with_the_right_characters():
    torch.manual_seed(0)
    config = GenieBlueConfig(text_config=tiny_config("llama").to_dict(), vision_config=tower_config().to_dict())
    projector = GenieBlueMultiModalProjector(config)
    embeddings = torch.randn(1 + len(CHARACTERS), config.text_config.hidden_size)
    reader = CharacterReader(SiglipVisionModel(tower_config()), projector, embeddings)
    rng = np.random.default_rng(0)
    batch = join_tiles([CharacterTiles(lambda _: draw_word("CAB", rng), 4)[index] for index in range(4)])
    optimizer = torch.optim.Adam(reader.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        outputs = reader(**batch)
        outputs["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs["loss"].item())
    assert outputs["logits"].shape == (len(batch["tokens"]), 4, 1 + len(CHARACTERS))
    assert losses[-1] < 0.3 * losses[0]
    assert torch.equal(reader.embeddings, embeddings)


# Questions


def test_held_out_words_are_never_trained_on_and_are_real_words():
    vocabulary = {f"Ġ{word}": 0 for word in ("python", "object", "class", "zzzqq", "method", "a", "toolongtobeone")}
    vocabulary |= {f"Ġ{word}": 0 for word in smollm2.split_words.__doc__.lower().split() if word.isalpha()}
    import pydoc_data.topics

    text = " ".join(pydoc_data.topics.topics.values()).split()
    vocabulary |= {f"Ġ{word}": 0 for word in text if word.isalpha() and word.islower()}
    trained, held_out = smollm2.split_words(vocabulary, seed=0)
    assert len(held_out) == smollm2.HELD_OUT_WORDS and not set(trained) & set(held_out)
    assert "ZZZQQ" in trained and "ZZZQQ" not in held_out
    assert all(3 <= len(word) <= 7 and set(word) <= set(CHARACTERS) for word in trained + held_out)


def test_a_chat_asks_several_questions_about_one_drawing(demo):
    chats = demo.training_data(2)
    for index in range(20):
        messages = chats[index]["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * smollm2.TURNS
        kinds = [part["type"] for message in messages[::2] for part in message["content"]]
        assert kinds == ["image"] + ["text"] * smollm2.TURNS
    assert chats[3]["messages"][1] == chats[3]["messages"][1]
    assert str(chats[3]["messages"][1:]) == str(demo.training_data(2)[3]["messages"][1:])


def test_held_out_answers_are_right_and_tasks_alternate(demo):
    readings = demo.held_out()
    assert [reading.task for reading in readings[: len(smollm2.QUESTIONS)]] == list(smollm2.QUESTIONS)
    assert len(readings) == sum(-(-count // 10) for count in smollm2.ASKED.values())
    for reading in readings:
        assert reading.question == smollm2.QUESTIONS[reading.task]
        if reading.task in ("word", "spelled"):
            assert reading.answer.replace(" ", "") in ("MOUSE", "DOG")
            assert (" " in reading.answer) == (reading.task == "spelled")
        else:
            assert reading.answer.isdigit()


def test_the_larger_number_is_larger(demo):
    for seed in range(30):
        _, answers = demo._ask("larger", np.random.default_rng(seed))
        larger, smaller, both = answers.values()
        assert int(larger) > int(smaller)
        assert both in (f"{larger} and {smaller}", f"{smaller} and {larger}")


def test_characters_have_the_embeddings_of_their_tokens(tmp_path):
    with pytest.raises(ValueError, match="no single token for ' A'"):
        character_embeddings(save_tiny_base("llama", tmp_path / "base"))
