"""Caches belong to the view that made them; cached passes give what whole passes give, over several turns too."""

import copy
import re

import pytest
import torch
from tiny_genieblue import IMAGE, left_pad, prompt, row, tiles, tiny_genieblue
from tiny_models import PROMISED_FAMILIES, tiny_base
from transformers import DynamicCache, StaticCache

from modeling_genieblue.compat_genieblue import cache_field, takes_cache_of_generate

promised_family = pytest.mark.parametrize("family", PROMISED_FAMILIES)
# Llama has the layout of most, sliding windows and Gemma-3 caches of their own, BlueLM its own code.
telling_family = pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3_text", "bluelm"])
IMAGE_ROW = row(5, IMAGE, 9, 40, 41)
SECOND_TURN = row(50, 51, IMAGE, 52, 53)
PIXELS = tiles(2)


def close(one, other):
    torch.testing.assert_close(one, other, atol=3e-5, rtol=1e-4)


def greedy(model, ids, **kwargs):
    return model.generate(ids, **{"do_sample": False, "max_new_tokens": 7, "pad_token_id": 0, **kwargs})


def make_cache(kind, model):
    config = model.language_model.config
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=64)


# Cached passes equal whole passes


@promised_family
@torch.no_grad()
def test_cached_passes_equal_a_whole_pass_in_the_multimodal_view(family):
    model = tiny_genieblue(family)
    later = prompt(6)
    whole = model(torch.cat([IMAGE_ROW, later], dim=1), pixel_values=PIXELS[:1]).logits
    cache = model(IMAGE_ROW, pixel_values=PIXELS[:1], use_cache=True).past_key_values
    pieces = []
    for piece in later.split([1, 3, 2], dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    close(torch.cat(pieces, dim=1), whole[:, -6:])


@telling_family
@torch.no_grad()
def test_cached_passes_equal_a_whole_pass_in_the_text_view(family):
    base, model = tiny_base(family), tiny_genieblue(family)
    first, later = prompt(9), prompt(4, seed=8)
    outputs = model(first, use_cache=True)
    continued = model(later, past_key_values=outputs.past_key_values).logits
    plain = base(first, use_cache=True)
    assert torch.equal(continued, base(later, past_key_values=plain.past_key_values).logits)
    close(continued, base(torch.cat([first, later], dim=1)).logits[:, -4:])


@telling_family
@torch.no_grad()
def test_padded_batch_of_images_continues_as_its_rows_alone(family):
    model = tiny_genieblue(family)
    other = row(60, 61, 62, 63, IMAGE, 8, 9)
    batch = left_pad([IMAGE_ROW, other])
    later = prompt(3, batch=2)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(later)], dim=1)
    cache = model(**batch, pixel_values=PIXELS, use_cache=True).past_key_values
    logits = model(later, attention_mask=mask, past_key_values=cache).logits
    for index, ids in enumerate((IMAGE_ROW, other)):
        whole = model(torch.cat([ids, later[index : index + 1]], dim=1), pixel_values=PIXELS[index : index + 1]).logits
        close(logits[index], whole[0, -3:])


# Several turns


@telling_family
@pytest.mark.parametrize("given", ["only the new image", "all images"])
def test_second_turn_with_another_image_is_generated_from_the_cache(family, given):
    model = tiny_genieblue(family)
    first = greedy(model, IMAGE_ROW, pixel_values=PIXELS[:1], return_dict_in_generate=True, eos_token_id=None)
    ids = torch.cat([first.sequences, SECOND_TURN], dim=1)
    expected = greedy(model, ids, pixel_values=PIXELS)
    assert not torch.equal(expected, greedy(model, ids, pixel_values=PIXELS[[0, 0]]))  # the image matters
    cache = first.past_key_values
    length = cache.get_seq_length()
    assert length == first.sequences.shape[1] - 1
    pixels = PIXELS[1:] if given.startswith("only") else PIXELS
    found = greedy(model, ids, pixel_values=pixels, past_key_values=copy.deepcopy(cache))
    assert torch.equal(found, expected)


@telling_family
def test_second_turn_of_text_is_generated_from_the_cache(family):
    model = tiny_genieblue(family)
    first = greedy(model, IMAGE_ROW, pixel_values=PIXELS[:1], return_dict_in_generate=True, eos_token_id=None)
    ids = torch.cat([first.sequences, row(50, 51)], dim=1)
    expected = greedy(model, ids, pixel_values=PIXELS[:1])
    for pixels in (None, PIXELS[:1]):
        found = greedy(model, ids, pixel_values=pixels, past_key_values=copy.deepcopy(first.past_key_values))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bluelm"])
def test_three_turns_with_one_growing_cache(family):
    model = tiny_genieblue(family)
    cache, ids = None, row(3)
    images = tiles(3)
    for turn in range(3):
        ids = torch.cat([ids, row(50 + turn, IMAGE, 60 + turn)], dim=1)
        expected = greedy(model, ids, pixel_values=images[: turn + 1], eos_token_id=None)
        options = {"return_dict_in_generate": True, "eos_token_id": None}
        outputs = greedy(model, ids, pixel_values=images[turn : turn + 1], past_key_values=cache, **options)
        assert torch.equal(outputs.sequences, expected), turn
        cache, ids = outputs.past_key_values, outputs.sequences


@telling_family
def test_second_turn_of_a_text_chat_is_the_bases(family):
    base, model = tiny_base(family), tiny_genieblue(family)
    answers = []
    for each in (base, model):
        options = {"return_dict_in_generate": True, "eos_token_id": None}
        first = greedy(each, prompt(6), **options)
        ids = torch.cat([first.sequences, row(50, 51)], dim=1)
        second = {**options, "past_key_values": first.past_key_values, "output_scores": True}
        if not takes_cache_of_generate(base):  # the base alone cannot go on from a cache: no more can its text view
            with pytest.raises(ValueError, match=r"`model_kwargs` are not used by the model: \['cache'\]"):
                greedy(each, ids, **second)
            second = {**options, "output_scores": True}
        answers.append(greedy(each, ids, **second))
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert all(torch.equal(one, other) for one, other in zip(answers[0].scores, answers[1].scores, strict=True))


def test_first_image_in_a_later_turn_is_prefilled_again():
    model = tiny_genieblue()
    first = greedy(model, prompt(6), return_dict_in_generate=True)
    ids = torch.cat([first.sequences, SECOND_TURN], dim=1)
    with pytest.raises(ValueError, match="prefill.* again"):
        greedy(model, ids, pixel_values=PIXELS[:1], past_key_values=first.past_key_values)
    assert greedy(model, ids, pixel_values=PIXELS[:1]).shape[1] > ids.shape[1]


def test_cached_turn_that_ends_in_an_image_is_refused():
    model = tiny_genieblue()
    first = greedy(model, IMAGE_ROW, pixel_values=PIXELS[:1], return_dict_in_generate=True, eos_token_id=None)
    ids = torch.cat([first.sequences, row(50, IMAGE)], dim=1)
    with pytest.raises(ValueError, match="end in text"):
        greedy(model, ids, pixel_values=PIXELS[1:], past_key_values=first.past_key_values)


# A cache belongs to its view


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_cache_of_the_text_view_is_refused_by_the_multimodal_view(kind):
    model = tiny_genieblue()
    cache = make_cache(kind, model)
    model(prompt(5), past_key_values=cache, use_cache=True)
    message = "made by the text view.*multimodal view.*prefill"
    with pytest.raises(ValueError, match=message):
        model(SECOND_TURN, pixel_values=PIXELS[:1], past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        model(prompt(2), past_key_values=cache, view="multimodal")
    model.train()
    with pytest.raises(ValueError, match=message):
        model(prompt(2), past_key_values=cache)


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "deep copy"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_cache_of_the_multimodal_view_is_refused_by_the_text_view(kind, copied):
    model = tiny_genieblue()
    cache = make_cache(kind, model)
    model(IMAGE_ROW, pixel_values=PIXELS[:1], past_key_values=cache, use_cache=True)
    cache = copy.deepcopy(cache) if copied else cache
    length = int(cache.get_seq_length())
    with pytest.raises(ValueError, match="made by the multimodal view.*text view.*prefill"):
        model(prompt(2), past_key_values=cache, view="text")
    with pytest.raises(ValueError, match="made by the multimodal view"):
        greedy(model, torch.cat([IMAGE_ROW, prompt(2)], dim=1)[:, -2:], past_key_values=cache, view="text")
    assert int(cache.get_seq_length()) == length  # a refused request leaves it fit for use
    continued = model(prompt(2), past_key_values=cache).logits  # without `view` it is continued where it was made
    whole = model(torch.cat([IMAGE_ROW, prompt(2)], dim=1), pixel_values=PIXELS[:1]).logits
    close(continued, whole[:, -2:])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"},
                                     {"num_return_sequences": 2, "do_sample": True}], ids=str)  # fmt: skip
@torch.no_grad()
def test_generated_cache_of_the_multimodal_view_carries_its_mark(options):
    model = tiny_genieblue()
    outputs = greedy(model, IMAGE_ROW, pixel_values=PIXELS[:1], return_dict_in_generate=True, **options)
    rows = outputs.past_key_values.layers[0].keys.shape[0]
    with pytest.raises(ValueError, match="made by the multimodal view"):
        model(prompt(2, batch=rows), past_key_values=outputs.past_key_values, view="text")


@torch.no_grad()
def test_cache_is_marked_when_tuples_are_returned():
    model = tiny_genieblue()
    cache = make_cache("dynamic", model)
    model(IMAGE_ROW, pixel_values=PIXELS[:1], past_key_values=cache, use_cache=True, return_dict=False)
    with pytest.raises(ValueError, match="made by the multimodal view"):
        model(prompt(2), past_key_values=cache, view="text")


@torch.no_grad()
def test_cache_of_a_pass_that_died_halfway_is_not_taken_for_the_bases():
    model = tiny_genieblue()
    cache = make_cache("dynamic", model)

    def out_of_memory(*_):
        raise MemoryError

    handle = model.multimodal_language_model.model.norm.register_forward_pre_hook(out_of_memory)
    with pytest.raises(MemoryError):
        model(IMAGE_ROW, pixel_values=PIXELS[:1], past_key_values=cache, use_cache=True)
    handle.remove()
    with pytest.raises(ValueError, match="made by the multimodal view"):
        model(prompt(2), past_key_values=cache, view="text")


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_emptied_cache_belongs_to_nobody(kind):
    base, model = tiny_base("llama"), tiny_genieblue()
    cache = make_cache(kind, model)
    model(IMAGE_ROW, pixel_values=PIXELS[:1], past_key_values=cache, use_cache=True)
    if kind == "static":
        cache.reset()
    else:
        cache.crop(-int(cache.get_seq_length()))
    plain = make_cache(kind, model)
    for ids in (prompt(5), prompt(2, seed=8)):
        ours = model(ids, past_key_values=cache, use_cache=True).logits
        assert torch.equal(ours, base(ids, past_key_values=plain, use_cache=True).logits)


@torch.no_grad()
def test_emptied_cache_of_the_text_view_can_be_filled_with_an_image():
    model = tiny_genieblue()
    cache = make_cache("static", model)
    model(prompt(5), past_key_values=cache, use_cache=True)
    cache.reset()
    logits = model(IMAGE_ROW, pixel_values=PIXELS[:1], past_key_values=cache, use_cache=True).logits
    close(logits, model(IMAGE_ROW, pixel_values=PIXELS[:1]).logits)


@torch.no_grad()
def test_cache_that_the_plain_base_filled_is_continued_in_the_text_view():
    base, model = tiny_base("llama"), tiny_genieblue()
    cache = base(prompt(5), use_cache=True).past_key_values
    expected = base(prompt(2, seed=8), past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(model(prompt(2, seed=8), past_key_values=copy.deepcopy(cache)).logits, expected)
    with pytest.raises(ValueError, match="prefill"):
        model(SECOND_TURN, pixel_values=PIXELS[:1], past_key_values=cache)


def test_error_names_both_views_and_the_way_out():
    model = tiny_genieblue()
    cache = model(prompt(5), use_cache=True).past_key_values
    with pytest.raises(ValueError) as error:
        model(SECOND_TURN, pixel_values=PIXELS[:1], past_key_values=cache)
    assert re.search("text view.*multimodal view.*without `past_key_values`", str(error.value))


# Its two names: `cache` from transformers 5.24 on, `past_key_values` before


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@torch.no_grad()
def test_a_cache_is_known_by_either_name(name):
    model, later = tiny_genieblue(), prompt(4)
    whole = model(torch.cat([IMAGE_ROW, later], dim=1), pixel_values=PIXELS[:1]).logits[:, -4:]

    def cache():
        outputs = model(IMAGE_ROW, pixel_values=PIXELS[:1], use_cache=True)
        return getattr(outputs, cache_field(outputs))

    close(model(later, **{name: cache()}).logits, whole)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="made by the multimodal view"):
            call(later, view="text", **{name: cache()})
    both = torch.cat([IMAGE_ROW, later], dim=1)
    expected = greedy(model, both, pixel_values=PIXELS[:1])
    assert torch.equal(greedy(model, both, pixel_values=PIXELS[:1], **{name: cache()}), expected)
    with pytest.raises(ValueError, match="base_model"):
        model.base_model(later, **{name: cache()})


@torch.no_grad()
def test_a_cache_under_both_names_is_refused():
    model = tiny_genieblue()
    with pytest.raises(ValueError, match="two names of one argument"):
        model(IMAGE_ROW, pixel_values=PIXELS[:1], past_key_values=DynamicCache(), cache=DynamicCache())
