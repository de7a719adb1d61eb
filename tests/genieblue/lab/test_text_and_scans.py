"""What lab and demos are made of: the English that ships with Python, a small base on it, and scanned digits."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn")

from genieblue.evaluation.samples import EvaluationDataset
from genieblue.lab import text, toy_base
from genieblue.lab.readings import write_readings
from genieblue.lab.scans import (
    LONGEST_NUMBER,
    NumberScans,
    compose,
    digit_cells,
    draw_held_out,
    split_scans,
)
from modeling_genieblue import GenieBlueImageProcessor


@pytest.fixture(scope="module")
def split():
    return text.split_documents()


@pytest.fixture(scope="module")
def tokenizer(split):
    return toy_base.train_tokenizer(split.train)


@pytest.fixture(scope="module")
def scans():
    return split_scans()


class SameLogits(torch.nn.Module):
    """A language model that gives each of its tokens the same logit, but for what `bonus` adds to the next id."""

    def __init__(self, vocabulary: int, bonus: float = 0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.vocabulary, self.bonus = vocabulary, bonus

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        following = (input_ids + 1) % self.vocabulary
        return SimpleNamespace(logits=logits.scatter(-1, following[..., None], self.bonus))


# Text


def test_held_out_text_shares_no_paragraph_with_the_training_text(split):
    def paragraphs(documents):
        return {" ".join(paragraph.split()) for document in documents for paragraph in document.paragraphs}

    assert len(split.held_out) >= 5
    assert sum(len(document.body) for document in split.train) > 200_000
    assert not paragraphs(split.train) & paragraphs(split.held_out)


def test_every_digit_is_one_token(tokenizer):
    ids = tokenizer("x = 1234567890", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[-10:] == list("1234567890")
    assert len(tokenizer) == 1024


def test_text_survives_the_tokenizer(tokenizer):
    sentence = "Zwölf Boxkämpfer, 12 of them:\n\tif x: return 'é'  # 100 %"
    assert tokenizer.decode(tokenizer(sentence, add_special_tokens=False)["input_ids"]) == sentence


def test_prompt_tokens_begin_the_tokens_of_the_answered_chat(tokenizer):
    chat = [{"role": "user", "content": "Which number?"}, {"role": "assistant", "content": "1234"}]
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(chat, return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert tokenizer.convert_ids_to_tokens(whole[len(prompt) :]) == ["1", "2", "3", "4", "<eos>"]
    assert prompt[0] == tokenizer.bos_token_id


def test_chat_template_is_saved_with_the_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    loaded = type(tokenizer).from_pretrained(tmp_path)
    rendered = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<bos><|system|>Be short.<|user|>Hello<|assistant|>"


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    ids = torch.arange(1000) % 50
    assert text.perplexity(SameLogits(50), ids) == pytest.approx(50, rel=1e-6)


def test_perplexity_judges_the_next_token():
    ids = torch.arange(1000) % 50
    bonus = 3.0
    expected = (np.exp(bonus) + 49) / np.exp(bonus)
    assert text.perplexity(SameLogits(50, bonus), ids) == pytest.approx(expected, rel=1e-5)


def test_perplexity_does_not_depend_on_the_batch_size(tokenizer):
    model = toy_base.build_base(tokenizer).eval()
    ids = torch.arange(128 * 5 + 17) % 900
    values = [text.perplexity(model, ids, batch_size=size) for size in (1, 2, 5)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_perplexity_of_the_first_windows_leaves_out_the_others():
    ids = torch.cat([torch.arange(256) % 50, torch.zeros(256, dtype=torch.long)])
    bonus = SameLogits(50, 3.0)
    assert text.perplexity(bonus, ids, windows=2) == text.perplexity(bonus, ids[:256]) != text.perplexity(bonus, ids)


def test_perplexity_refuses_a_text_shorter_than_a_window():
    with pytest.raises(ValueError, match="100 tokens, fewer than one window of 128"):
        text.perplexity(SameLogits(5), torch.zeros(100, dtype=torch.long))


def test_windows_are_the_same_in_every_run():
    ids = torch.arange(5000)
    first, second = (toy_base.TokenWindows(ids, samples=10, seed=3) for _ in range(2))
    other = toy_base.TokenWindows(ids, samples=10, seed=4)
    assert all(torch.equal(first[index]["input_ids"], second[index]["input_ids"]) for index in range(10))
    assert not all(torch.equal(first[index]["input_ids"], other[index]["input_ids"]) for index in range(10))
    assert first[0]["input_ids"].shape == (128,)


# Scans


def test_no_scan_is_both_trained_on_and_held_out(scans):
    train, held_out = scans
    assert not set(train.indices) & set(held_out.indices)
    assert len(train) + len(held_out) == 1797
    assert len(held_out) == round(1797 * 0.2)
    assert set(train.labels) == set(held_out.labels) == set(range(10))


def test_samples_are_chats_about_an_image(scans):
    sample = NumberScans(scans[0], 10)[7]
    user, assistant = sample["messages"]
    image = user["content"][0]["image"]
    assert image.mode == "L" and image.height == 32
    assert user["content"][1]["type"] == "text"
    assert assistant["role"] == "assistant" and assistant["content"].isdigit()


def test_a_sample_depends_on_its_index_alone(scans):
    forwards = NumberScans(scans[0], 40, seed=5)
    drawn = [forwards.draw(index) for index in range(40)]
    backwards = NumberScans(scans[0], 40, seed=5)
    for index in reversed(range(40)):
        image, answer = backwards.draw(index)
        assert answer == drawn[index][1] and image.tobytes() == drawn[index][0].tobytes()
    other = NumberScans(scans[0], 40, seed=6)
    assert [other.draw(index)[1] for index in range(40)] != [answer for _, answer in drawn]


def test_numbers_grow_during_the_curriculum(scans):
    numbers = NumberScans(scans[0], 1000, curriculum=0.37)
    longest = [numbers.longest_at(index) for index in range(1000)]
    assert longest == sorted(longest)
    assert longest[0] == 1 and longest[369] == 3 and longest[370] == LONGEST_NUMBER
    early = {len(numbers.draw(index)[1]) for index in range(0, 100)}
    late = {len(numbers.draw(index)[1]) for index in range(900, 1000)}
    assert early == {1} and late == {1, 2, 3, 4}


def test_without_a_curriculum_all_lengths_occur_from_the_start(scans):
    numbers = NumberScans(scans[0], 1000, curriculum=0)
    assert {len(numbers.draw(index)[1]) for index in range(60)} == {1, 2, 3, 4}


def test_reading_past_the_end_stops(scans):
    numbers = NumberScans(scans[0], 3)
    assert len(list(numbers)) == 3
    with pytest.raises(IndexError):
        numbers.draw(-1)


@pytest.mark.parametrize("samples, curriculum", [(0, 0.3), (5, 1.5), (5, -0.1)])
def test_a_senseless_length_of_the_data_is_refused(scans, samples, curriculum):
    with pytest.raises(ValueError, match=f"Got {samples} samples and a curriculum over {curriculum}"):
        NumberScans(scans[0], samples, curriculum=curriculum)


def test_long_numbers_are_cut_into_several_tiles_through_their_digits(scans):
    processor = GenieBlueImageProcessor(tile_size=32)
    grids = {len(each.answer): processor.select_grid(*each.image.size) for each in draw_held_out(scans[1], 5)}
    assert grids[4][0] >= 3 and grids[3][0] >= 2
    straddling = 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        cells = digit_cells(scans[1].images[:4], rng, augment=False)
        _, middles = compose(cells, rng, noise=0)
        straddling += sum(min(middle % 32, 32 - middle % 32) < 8 for middle in middles)  # a tile's edge cuts the digit
    assert straddling > 30


def test_a_digit_keeps_its_shape_when_it_is_enlarged(scans):
    image = scans[0].images[:1]
    cell = digit_cells(image, np.random.default_rng(0), augment=False)[0]
    again = np.asarray(Image.fromarray((cell[1:31, 1:31] * 255).astype(np.uint8)).resize((8, 8), Image.Resampling.BOX))
    assert np.corrcoef(again.ravel(), image.ravel())[0, 1] > 0.95


def test_held_out_folder_is_data_for_an_evaluation_whose_names_tell_nothing(scans, tmp_path):
    readings = draw_held_out(scans[1], per_length=2)
    data = EvaluationDataset(write_readings(tmp_path / "held-out", readings))
    samples = [data[index] for index in range(len(data))]
    assert [len(sample.references[0]) for sample in samples] == [1, 2, 3, 4, 1, 2, 3, 4]
    assert [sample.references[0] for sample in samples] == [reading.answer for reading in readings]
    assert [sample.task for sample in samples[:3]] == ["1 digit", "2 digits", "3 digits"]
    assert [Path(sample.images[0]).name for sample in samples[:2]] == ["0000.png", "0001.png"]
    assert all(Image.open(sample.images[0]).height == 32 for sample in samples)
