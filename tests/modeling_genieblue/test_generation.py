"""`generate` with images: it equals whole passes, and the options of transformers' `generate` mean what they say."""

import copy

import pytest
import torch
from tiny_genieblue import (
    IMAGE,
    IMAGE_ID,
    greedy,
    left_pad,
    new_tokens,
    reference_generate,
    row,
    tiles,
    tiny_genieblue,
)
from tiny_models import tiny_base
from transformers import RepetitionPenaltyLogitsProcessor

telling_family = pytest.mark.parametrize(
    "family", ["llama", "mistral-sliding", "phi3", "gemma3_text", "bluelm", "bluelm-outside"]
)
TEXT = row(5, 17, 30, 9, 77)
IMAGES = [row(5, IMAGE, 9, 40, 41), row(60, 61, IMAGE, 44, IMAGE, 8)]
PIXELS = tiles(3)


@telling_family
@pytest.mark.parametrize("place", ["first", "middle", "last", "alone"])
def test_generation_with_an_image_equals_whole_passes(family, place):
    rows = {"first": (IMAGE, 9, 40), "middle": (5, IMAGE, 9), "last": (5, 9, IMAGE), "alone": (IMAGE,)}
    ids = row(*rows[place])
    model = tiny_genieblue(family)
    expected = reference_generate(model, ids, PIXELS[:1])
    assert greedy(model, ids, pixel_values=PIXELS[:1]).tolist() == expected.tolist()
    assert greedy(model, ids, pixel_values=PIXELS[:1], use_cache=False).tolist() == expected.tolist()


@telling_family
def test_padded_image_rows_are_generated_as_alone(family):
    model = tiny_genieblue(family)
    batch = left_pad(IMAGES)
    ids = batch.pop("input_ids")
    together = greedy(model, ids, **batch, pixel_values=PIXELS)
    assert torch.equal(together[:, : ids.shape[1]], ids)
    for index, pixels in enumerate((PIXELS[:1], PIXELS[1:])):
        (alone,) = new_tokens(model, IMAGES[index], pixel_values=pixels)
        assert together[index, ids.shape[1] :].tolist()[: len(alone)] == alone


@pytest.mark.parametrize("rows", [[0, 1], [0], [1]], ids=["batch", "short", "long"])
def test_attention_mask_is_made_as_transformers_makes_it_for_texts(rows):
    """Without a mask `generate` takes padding ids for padding; image tokens are none, whatever stands before them."""
    model = tiny_genieblue()
    batch = left_pad([*IMAGES, row(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)])
    ids, mask = batch["input_ids"][rows], batch["attention_mask"][rows]
    pixels = torch.cat([[PIXELS[:1], PIXELS[1:]][index] for index in rows])
    expected = greedy(model, ids, attention_mask=mask, pixel_values=pixels)
    assert torch.equal(greedy(model, ids, pixel_values=pixels), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "length_penalty": 0.5, "early_stopping": True},
        {"do_sample": True, "num_return_sequences": 3},
        {"min_new_tokens": 5},
        {"max_length": 11, "max_new_tokens": None},
        {"bad_words_ids": [[17]], "encoder_repetition_penalty": 1.2},
        {"do_sample": True, "top_k": 10, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9},
        {"output_scores": True, "return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_generation_options_work_with_images(options):
    model = tiny_genieblue()
    torch.manual_seed(0)
    generated = greedy(model, IMAGES[0], pixel_values=PIXELS[:1], **options)
    sequences = getattr(generated, "sequences", generated)
    length = IMAGES[0].shape[1]
    assert sequences.shape[0] == options.get("num_return_sequences", 1)
    assert (sequences[:, :length] == IMAGES[0]).all()
    assert length < sequences.shape[1] <= options.get("max_length", length + 7)
    assert (sequences[:, length:] < IMAGE_ID).all()


def test_repetition_penalty_counts_the_words_of_the_prompt():
    model = tiny_genieblue()
    processor = RepetitionPenaltyLogitsProcessor(3.0)
    ids = IMAGES[0]
    with torch.no_grad():
        scores = model(ids, pixel_values=PIXELS[:1]).logits[:, -1]
    words = ids[ids != IMAGE_ID][None]
    expected = processor(words, scores).argmax().item()
    assert new_tokens(model, ids, pixel_values=PIXELS[:1], repetition_penalty=3.0)[0][0] == expected


def test_sampling_with_images_repeats_with_its_seed():
    model, other = tiny_genieblue(), tiny_genieblue()
    answers = []
    for each in (model, other):
        torch.manual_seed(4)
        answers.append(greedy(each, IMAGES[0], pixel_values=PIXELS[:1], do_sample=True).tolist())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("with_image", [False, True])
def test_generation_config_of_the_model_is_honoured(with_image):
    model = tiny_genieblue()
    ids, pixels = (IMAGES[0], PIXELS[:1]) if with_image else (TEXT, None)
    first = new_tokens(model, ids, pixel_values=pixels)[0]
    model.generation_config.max_new_tokens = 3
    model.generation_config.eos_token_id = None
    assert model.generate(ids, pixel_values=pixels, pad_token_id=0).shape[1] == ids.shape[1] + 3
    model.generation_config.eos_token_id = first[0]
    assert model.generate(ids, pixel_values=pixels, pad_token_id=0).shape[1] == ids.shape[1] + 1
    own = copy.deepcopy(model.generation_config)
    own.max_new_tokens, own.eos_token_id = 2, None
    model.generation_config.max_new_tokens = 5
    assert model.generate(ids, pixel_values=pixels, pad_token_id=0, generation_config=own).shape[1] == ids.shape[1] + 2


def test_a_change_of_the_bases_generation_config_reaches_text_requests():
    """Text requests are the base's own `generate`."""
    base = tiny_base("llama")
    model = tiny_genieblue(base=base)
    base.generation_config.max_new_tokens = 3
    base.generation_config.eos_token_id = None
    torch.manual_seed(0)
    expected = base.generate(TEXT)
    torch.manual_seed(0)
    assert torch.equal(model.generate(TEXT), expected)


class Collector:
    def __init__(self):
        self.received, self.ended = [], False

    def put(self, value):
        self.received.append(value)

    def end(self):
        self.ended = True


@pytest.mark.parametrize("with_image", [False, True])
def test_streamer_gets_the_prompt_and_each_token(with_image):
    model, streamer = tiny_genieblue(), Collector()
    ids, pixels = (IMAGES[0], PIXELS[:1]) if with_image else (TEXT, None)
    generated = greedy(model, ids, pixel_values=pixels, streamer=streamer)
    assert streamer.ended
    streamed = torch.cat([piece.reshape(-1) for piece in streamer.received[1:]]).tolist()
    assert streamed == generated[0, ids.shape[1] :].tolist()
    assert streamer.received[0].tolist() == ids[ids != IMAGE_ID][None].tolist()  # image tokens have no text


@pytest.mark.parametrize("with_image", [False, True])
def test_static_cache_gives_the_same_answer(with_image):
    model = tiny_genieblue()
    ids, pixels = (IMAGES[0], PIXELS[:1]) if with_image else (TEXT, None)
    expected = greedy(model, ids, pixel_values=pixels)
    for _ in range(2):
        assert torch.equal(greedy(model, ids, pixel_values=pixels, cache_implementation="static"), expected)
