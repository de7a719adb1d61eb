"""Rules of a request: views by row, mixed batches, caches that belong to a view, several turns, bad input."""

import pytest
import torch
from tiny_genieblue import (
    IMAGE,
    IMAGE_ID,
    greedy,
    left_pad,
    new_tokens,
    prompt,
    reference_generate,
    row,
    tiles,
    tiny_genieblue,
)
from tiny_models import tiny_base
from transformers import DynamicCache

from modeling_genieblue import GenieBlueConfig, GenieBlueForConditionalGeneration

# Llama has the layout of most, Gemma-3 two kinds of attention, BlueLM its own `prepare_inputs_for_generation`.
telling_family = pytest.mark.parametrize(
    "family", ["llama", "mistral-sliding", "phi3", "gemma3_text", "bluelm", "bluelm-outside"]
)
TEXTS = [row(5, 17, 30, 9, 77), row(80, 33, 64)]
IMAGES = [row(5, IMAGE, 9, 40, 41), row(60, 61, IMAGE, 44, IMAGE, 8)]
PIXELS = tiles(3)


def close(one, other):
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


# Routing


@torch.no_grad()
def test_rows_are_routed_by_their_images():
    base, model = tiny_base("llama"), tiny_genieblue()
    assert torch.equal(model(TEXTS[0]).logits, base(TEXTS[0]).logits)
    assert torch.equal(model(TEXTS[0], view="text").logits, base(TEXTS[0]).logits)
    seen = model(IMAGES[0], pixel_values=PIXELS[:1]).logits
    assert torch.equal(model(IMAGES[0], pixel_values=PIXELS[:1], view="multimodal").logits, seen)
    ablation = model(TEXTS[0], view="multimodal").logits
    assert not torch.allclose(ablation, base(TEXTS[0]).logits, atol=1e-2)
    assert greedy(model, TEXTS[0], view="multimodal").tolist() == reference_generate(model, TEXTS[0], None).tolist()


@torch.no_grad()
def test_answer_depends_on_the_image_and_on_its_place():
    model = tiny_genieblue()
    seen = model(IMAGES[0], pixel_values=PIXELS[:1]).logits
    assert not torch.allclose(model(IMAGES[0], pixel_values=PIXELS[1:2]).logits[:, -1], seen[:, -1], atol=1e-3)
    # What lies before the image cannot know of it.
    close(model(IMAGES[0], pixel_values=PIXELS[1:2]).logits[:, 0], seen[:, 0])
    swapped = model(IMAGES[1], pixel_values=PIXELS[[1, 0]]).logits
    assert not torch.allclose(model(IMAGES[1], pixel_values=PIXELS[:2]).logits[:, -1], swapped[:, -1], atol=1e-3)


@telling_family
@torch.no_grad()
def test_image_features_take_the_places_of_the_image_tokens(family):
    model = tiny_genieblue(family)
    embeddings = []
    features = model.get_image_features(PIXELS[:1]).pooler_output
    assert features.shape == (1, 4, 32)

    def record(_module, args, kwargs):
        embeddings.append(kwargs.get("inputs_embeds", torch.empty(1, 0)))

    handle = model.multimodal_language_model.register_forward_pre_hook(record, with_kwargs=True)
    model(IMAGES[0], pixel_values=PIXELS[:1])
    handle.remove()
    assert torch.equal(embeddings[-1][0, 1:5], features[0])


@telling_family
@torch.no_grad()
def test_multimodal_view_embeds_text_as_the_base_does(family):
    """With an adapter that does nothing, texts in the multimodal view give the base's own logits."""
    model = tiny_genieblue(family, trained=False)
    close(model(prompt(10), view="multimodal").logits, tiny_base(family)(prompt(10)).logits)
    assert new_tokens(model, prompt(10), view="multimodal") == new_tokens(tiny_base(family), prompt(10))


@torch.no_grad()
def test_training_runs_everything_in_the_multimodal_view():
    model = tiny_genieblue()
    expected = model(TEXTS[0], view="multimodal").logits
    model.train()
    assert not model.language_model.training
    close(model(TEXTS[0]).logits, expected)
    batch = left_pad([TEXTS[0], IMAGES[0]])
    close(model(**batch, pixel_values=PIXELS[:1]).logits[:1, -5:], expected)
    model.eval()
    assert torch.equal(model(TEXTS[0]).logits, tiny_base("llama")(TEXTS[0]).logits)


# Mixed batches


@telling_family
@torch.no_grad()
def test_mixed_batch_equals_one_by_one(family):
    model = tiny_genieblue(family)
    batch = left_pad([TEXTS[0], IMAGES[0], TEXTS[1], IMAGES[1]])
    outputs = model(**batch, pixel_values=PIXELS, output_hidden_states=True)
    single = [model(TEXTS[0]), model(IMAGES[0], pixel_values=PIXELS[:1]), model(TEXTS[1]),
              model(IMAGES[1], pixel_values=PIXELS[1:])]  # fmt: skip
    hidden = outputs.hidden_states[-1]
    assert len(outputs.hidden_states) == 5
    for index, one in enumerate(single):
        length = one.logits.shape[1]
        # Left padding without `position_ids` shifts positions, which rotary embeddings do not notice.
        close(outputs.logits[index, -length:], one.logits[0])
        assert hidden[index].shape == (batch["input_ids"].shape[1], 32)


@torch.no_grad()
def test_rows_of_a_mixed_batch_are_those_of_the_base_bit_for_bit():
    base, model = tiny_base("llama"), tiny_genieblue()
    batch = left_pad([TEXTS[0], IMAGES[0], TEXTS[1], IMAGES[1]])
    outputs = model(**batch, pixel_values=PIXELS, output_hidden_states=True)
    plain = base(batch["input_ids"][[0, 2]], batch["attention_mask"][[0, 2]], output_hidden_states=True)
    assert torch.equal(outputs.logits[[0, 2]], plain.logits)
    assert torch.equal(outputs.hidden_states[2][[0, 2]], plain.hidden_states[2])


@torch.no_grad()
def test_loss_of_a_mixed_batch_is_the_mean_over_its_tokens():
    model = tiny_genieblue()
    batch = left_pad([TEXTS[0], IMAGES[0]])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == IMAGE_ID, -100)
    outputs = model(**batch, pixel_values=PIXELS[:1], labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:])
    close(outputs.loss, expected)


@pytest.mark.parametrize("rows", [[0], [1], [0, 1]], ids=["text", "image", "mixed"])
@torch.no_grad()
def test_image_tokens_in_labels_are_ignored(rows):
    """Labels that are a copy of the ids are what most training code makes."""
    model = tiny_genieblue()
    batch = left_pad([[TEXTS[0], IMAGES[0]][index] for index in rows])
    pixels = {"pixel_values": PIXELS[:1]} if 1 in rows else {}
    labels = batch["input_ids"].clone()
    expected = model(**batch, **pixels, labels=labels.masked_fill(labels == IMAGE_ID, -100)).loss
    close(model(**batch, **pixels, labels=labels).loss, expected)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in ("llama", "mistral-sliding", "phi3", "gemma3_text", "bluelm", "bluelm-outside")),
        *((family, {"num_beams": 2, "num_return_sequences": 2}) for family in ("llama", "bluelm")),
    ],
    ids=str,
)
def test_mixed_batch_is_generated_as_one_by_one(family, options):
    model = tiny_genieblue(family)
    rows = [(TEXTS[0], None), (IMAGES[0], PIXELS[:1]), (TEXTS[1], None), (IMAGES[1], PIXELS[1:])]
    batch = left_pad([ids for ids, _ in rows])
    generated = greedy(model, **{"ids": batch.pop("input_ids")}, **batch, pixel_values=PIXELS, **options)
    per_row = options.get("num_return_sequences", 1)
    assert len(generated) == 4 * per_row
    for index, (ids, pixels) in enumerate(rows):
        expected = new_tokens(model, ids, pixel_values=pixels, **options)
        for found, alone in zip(generated[index * per_row : (index + 1) * per_row], expected, strict=True):
            answer = found[-(generated.shape[1] - batch["attention_mask"].shape[1]) :].tolist()
            assert answer[: len(alone)] == alone
            assert set(answer[len(alone) :]) <= {0}


def test_mixed_batch_pads_the_shorter_answer_of_one_view():
    model = tiny_genieblue()
    batch = left_pad([TEXTS[0], IMAGES[0]])
    ids = batch.pop("input_ids")
    (text_answer,) = new_tokens(model, TEXTS[0])
    stopped = greedy(model, ids, **batch, pixel_values=PIXELS[:1], eos_token_id=text_answer[1], pad_token_id=3)
    assert stopped[0, ids.shape[1] :].tolist()[:2] == text_answer[:2]
    assert set(stopped[0, ids.shape[1] + 2 :].tolist()) <= {3}
    assert stopped.shape[1] > ids.shape[1] + 2


@torch.no_grad()
def test_mixed_batch_continues_from_its_cache():
    model = tiny_genieblue()
    batch = left_pad([TEXTS[0], IMAGES[0], TEXTS[1]])
    outputs = model(**batch, pixel_values=PIXELS[:1], use_cache=True)
    later = prompt(3, batch=3)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(later)], dim=1)
    whole = model(torch.cat([batch["input_ids"], later], dim=1), attention_mask=mask, pixel_values=PIXELS[:1]).logits
    continued = model(later, attention_mask=mask, past_key_values=outputs.past_key_values)
    close(continued.logits, whole[:, -3:])
    with pytest.raises(ValueError, match="prefill"):
        model(later[:2], past_key_values=continued.past_key_values)


def test_mixed_batch_generates_from_its_cache():
    model = tiny_genieblue()
    batch = left_pad([TEXTS[0], IMAGES[0]])
    positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)  # as `generate` counts them
    with torch.no_grad():
        cache = model(**batch, position_ids=positions, pixel_values=PIXELS[:1], use_cache=True).past_key_values
    later = prompt(3, batch=2)
    ids = torch.cat([batch["input_ids"], later], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(later)], dim=1)
    expected = greedy(model, ids, attention_mask=mask, pixel_values=PIXELS[:1])
    assert torch.equal(greedy(model, ids, attention_mask=mask, past_key_values=cache), expected)


@pytest.mark.parametrize("call", ["forward", "generate"])
@torch.no_grad()
def test_mixed_batch_does_not_put_two_views_into_one_cache(call):
    model = tiny_genieblue()
    batch = left_pad([TEXTS[0], IMAGES[0], TEXTS[1]])
    request = {**batch, "pixel_values": PIXELS[:1]}
    cache = DynamicCache(config=model.language_model.config)
    ids = request.pop("input_ids")
    with pytest.raises(ValueError, match="cache"):
        greedy(model, ids, **request, past_key_values=cache) if call == "generate" else model(
            ids, **request, past_key_values=cache
        )
    assert cache.get_seq_length() == 0


def test_mixed_batch_with_scores_is_refused():
    batch = left_pad([TEXTS[0], IMAGES[0]])
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        tiny_genieblue().generate(**batch, pixel_values=PIXELS[:1], return_dict_in_generate=True, max_new_tokens=2)


@torch.no_grad()
def test_large_mixed_batch_keeps_order():
    model = tiny_genieblue()
    rows = [TEXTS[i % 2] if i % 3 else IMAGES[0] for i in range(9)]
    outputs = model(**left_pad(rows), pixel_values=tiles(3))
    images = tiles(3)
    for index, ids in enumerate(rows):
        pixels = None if index % 3 else images[index // 3 : index // 3 + 1]
        close(outputs.logits[index, -ids.shape[1] :], model(ids, pixel_values=pixels).logits[0])


# Bad input


MISFITS = [
    (IMAGES[0], {}, "4 image tokens but no `pixel_values`"),
    (IMAGES[0], {"pixel_values": PIXELS[:2]}, "tokens: 4, features: 8"),
    (IMAGES[1], {"pixel_values": PIXELS[:1]}, "tokens: 8, features: 4"),
    (IMAGES[0][:, :-4], {"pixel_values": PIXELS[:1]}, "tokens: 3, features: 4"),
    (IMAGES[0], {"pixel_values": PIXELS[:1], "num_tiles": torch.tensor([2])}, "counts 2 tiles.*holds 1"),
    (IMAGES[0], {"pixel_values": PIXELS[0]}, r"\(3, 24, 24\)"),
    (IMAGES[0], {"pixel_values": PIXELS[None, :1]}, r"\(1, 1, 3, 24, 24\)"),
    (TEXTS[0], {"pixel_values": PIXELS[:1]}, "no image tokens"),
    (IMAGES[0], {"pixel_values": PIXELS[:1], "view": "text"}, "text view cannot process image tokens"),
    (TEXTS[0], {"view": "vision"}, "'vision'"),
    (IMAGES[0], {"pixel_values": PIXELS[:1].numpy()}, "`pixel_values` is a ndarray: expected a tensor"),
    (IMAGES[0], {"pixel_values": [PIXELS[0]]}, "`pixel_values` is a list: expected a tensor"),
    (IMAGES[0], {"pixel_values": PIXELS[:1, :2]}, r"tiles of \(2, 24, 24\), expected \(3, 24, 24\)"),
    (TEXTS[0][0], {}, r"shape \(5,\) in int64: expected token ids as a tensor \(batch, length\)"),
    (TEXTS[0][:, :0], {}, "at least one in each row"),
    (TEXTS[0].float(), {}, "in float32: expected token ids"),
    (left_pad([IMAGES[0], IMAGES[0]])["input_ids"], {"pixel_values": PIXELS[:1]}, "tokens: 8, features: 4"),
    (left_pad([TEXTS[0], IMAGES[0]])["input_ids"], {}, "no `pixel_values`"),
    (left_pad([TEXTS[0], IMAGES[0]])["input_ids"], {"pixel_values": PIXELS}, "tokens: 4, features: 12"),
]


@pytest.mark.parametrize(
    ("call", "ids", "request_kwargs", "message"),
    [*(("forward", *case) for case in MISFITS), *(("generate", *case) for case in MISFITS[:4])],
)
def test_request_that_does_not_fit_together_is_refused(call, ids, request_kwargs, message):
    model = tiny_genieblue()
    before = model(TEXTS[0]).logits
    with pytest.raises(ValueError, match=message):
        if call == "generate":
            greedy(model, ids, **request_kwargs)
        else:
            model(ids, **request_kwargs)
    assert torch.equal(model(TEXTS[0]).logits, before)  # and the model is as good as before


def test_images_without_ids_are_refused():
    with pytest.raises(ValueError, match="input_ids"):
        tiny_genieblue()(inputs_embeds=torch.zeros(1, 5, 32), pixel_values=PIXELS[:1])


def test_tiles_of_another_size_are_refused():
    with pytest.raises(ValueError, match="32"):
        tiny_genieblue()(IMAGES[0], pixel_values=torch.zeros(1, 3, 32, 32))


def test_embeddings_cannot_be_resized():
    model = tiny_genieblue()
    with pytest.raises(ValueError, match="base"):
        model.resize_token_embeddings(140)
    assert model.get_input_embeddings() is model.language_model.get_input_embeddings()
    assert model.get_input_embeddings().weight.shape[0] == IMAGE_ID


def test_model_without_a_base_says_so():
    with pytest.raises(ValueError, match="from_base"):
        GenieBlueForConditionalGeneration(GenieBlueConfig())
    empty = GenieBlueForConditionalGeneration(tiny_genieblue().config)
    with pytest.raises(ValueError, match="from_pretrained"):
        empty(TEXTS[0])


@torch.no_grad()
def test_tuples_are_returned_on_request():
    model = tiny_genieblue()
    for ids, pixels in ((TEXTS[0], None), (IMAGES[0], PIXELS[:1])):
        whole = model(ids, pixel_values=pixels, labels=ids.masked_fill(ids == IMAGE_ID, -100))
        parts = model(ids, pixel_values=pixels, labels=ids.masked_fill(ids == IMAGE_ID, -100), return_dict=False)
        assert torch.equal(parts[0], whole.loss)
        assert torch.equal(parts[1], whole.logits)


@torch.no_grad()
def test_logits_can_be_asked_for_the_last_position_only():
    model = tiny_genieblue()
    batch = left_pad([TEXTS[0], IMAGES[0]])
    whole = model(**batch, pixel_values=PIXELS[:1]).logits
    close(model(**batch, pixel_values=PIXELS[:1], logits_to_keep=1).logits, whole[:, -1:])
