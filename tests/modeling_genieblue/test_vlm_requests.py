"""Requests to a GenieBlue of a VLM by each family's own processor."""

import pytest
import torch
from PIL import Image
from tiny_models import tiny_tokenizer
from tiny_vlm_processors import PROCESSORS, tiny_genieblue_of
from tiny_vlms import image_request, tiny_vlm_pair
from transformers import pipeline
from transformers.feature_extraction_utils import BatchFeature

from modeling_genieblue import GenieBlueForConditionalGeneration

PICTURES = [Image.linear_gradient("L").convert("RGB").resize(size) for size in ((28, 28), (28, 56))]
OPTIONS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def question(text, *pictures):
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


QUESTIONS = [question("What?", PICTURES[0]), question("What does the sign say?", *PICTURES)]


@pytest.mark.parametrize("family", PROCESSORS)
def test_rows_that_are_padded_on_the_right_are_answered_as_on_the_left(family):
    model, processor = tiny_genieblue_of(family)
    left, right = (
        processor.apply_chat_template(QUESTIONS, processor_kwargs={"padding": True, "padding_side": side}, **OPTIONS)
        for side in ("left", "right")
    )
    assert not right["attention_mask"][:, -1].all()
    expected = model.vlm.generate(**left, **GREEDY)
    assert torch.equal(model.generate(**right, **GREEDY), expected)
    cache = model(**left, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="padding_side='left'|prefill the whole conversation"):
        model.generate(**right, past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_pixels_that_are_not_those_of_their_sizes_are_refused_with_both_numbers(family):
    vlm, base = tiny_vlm_pair(family)
    model = GenieBlueForConditionalGeneration.from_vlm(vlm, base, replicated_layers=[1], lora_rank=4)
    request = image_request(family)
    request["pixel_values"] = torch.cat([request["pixel_values"]] * 2)
    rows, means = (32, 16) if family.startswith("qwen") else (2, 1)
    with pytest.raises(ValueError, match=rf"`pixel_values` has {rows} rows, but `image_\w+` means {means}"):
        model(**request)


def test_fewer_images_than_image_tokens_are_refused_with_both_numbers():
    vlm, base = tiny_vlm_pair("qwen2_5_vl")
    model = GenieBlueForConditionalGeneration.from_vlm(vlm, base, replicated_layers=[1], lora_rank=4)
    request = image_request("qwen2_5_vl", images=2)
    request |= {
        name: each for name, each in image_request("qwen2_5_vl").items() if name.startswith(("pixel", "image"))
    }
    with pytest.raises(ValueError, match="8 image tokens, but `image_grid_thw` means 4"):
        model.generate(**request, **GREEDY)


@pytest.mark.parametrize("family", PROCESSORS)
def test_tokens_that_only_the_vlm_has_are_decoded_by_its_tokenizer(family):
    _, processor = tiny_genieblue_of(family)
    own = processor.vlm_processor
    of_vlm = next(index for token, index in own.tokenizer.get_vocab().items() if token == "<unused3>")
    answer, text = [20, of_vlm, 30], [20, 30]
    assert "<unused3>" in processor.decode(answer) == own.decode(answer)
    assert processor.decode(text) == tiny_tokenizer().decode(text)
    assert processor.batch_decode([answer, text]) == [own.decode(answer), tiny_tokenizer().decode(text)]
    assert processor.decode(torch.tensor([text, text])) == [tiny_tokenizer().decode(text)] * 2
    assert processor.decode(torch.tensor(of_vlm)) == "<unused3>"


@pytest.mark.parametrize("family", PROCESSORS)
def test_the_pipeline_answers_images_as_the_vlm_and_texts_as_the_base(family):
    model, processor = tiny_genieblue_of(family)
    run = pipeline("image-text-to-text", model=model, processor=processor)
    inputs = processor.vlm_processor.apply_chat_template(QUESTIONS[0], **OPTIONS)
    ids = model.vlm.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    (answer,) = run(text=QUESTIONS[0], return_full_text=False, **GREEDY)
    assert answer["generated_text"] == processor.vlm_processor.decode(ids, skip_special_tokens=True)
    inputs = tiny_tokenizer().apply_chat_template([{"role": "user", "content": "What?"}], **OPTIONS)
    expected = model.language_model.generate(**inputs, **GREEDY)
    (answer,) = run(text=question("What?"), return_tensors=True, **GREEDY)
    assert torch.equal(answer["generated_token_ids"], expected[0])


def test_a_text_is_a_processors_batch_and_its_options_reach_the_bases_tokenizer():
    _, processor = tiny_genieblue_of("internvl")
    chats = [question("What?"), question("What does the sign say?")]
    encoded = processor.apply_chat_template(
        chats, processor_kwargs={"padding": True, "padding_side": "left"}, **OPTIONS
    )
    assert isinstance(encoded, BatchFeature)
    expected = tiny_tokenizer().apply_chat_template(
        [[{"role": "user", "content": each[0]["content"][0]["text"]}] for each in chats], padding=True,
        tokenizer_kwargs={"padding_side": "left"}, **OPTIONS,
    )  # fmt: skip
    assert torch.equal(encoded["input_ids"], expected["input_ids"])
    assert not encoded["attention_mask"][0, 0]
