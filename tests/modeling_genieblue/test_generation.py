"""`generate` with images: it equals whole passes, alone, padded and streamed."""

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

telling_family = pytest.mark.parametrize(
    "family", ["llama", "mistral-sliding", "phi3", "gemma3_text", "bluelm", "bluelm-outside"]
)
TEXT = row(5, 17, 30, 9, 77)
IMAGES = [row(5, IMAGE, 9, 40, 41), row(60, 61, IMAGE, 44, IMAGE, 8)]
PIXELS = tiles(3)


@pytest.mark.parametrize(("family", "place"), [
    *(("llama", place) for place in ("first", "middle", "last", "alone")),
    *((family, "first") for family in ("mistral-sliding", "phi3", "gemma3_text", "bluelm", "bluelm-outside")),
])  # fmt: skip
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


def test_sampling_with_images_repeats_with_its_seed():
    model, other = tiny_genieblue(), tiny_genieblue()
    answers = []
    for each in (model, other):
        torch.manual_seed(4)
        answers.append(greedy(each, IMAGES[0], pixel_values=PIXELS[:1], do_sample=True).tolist())
    assert answers[0] == answers[1]


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
