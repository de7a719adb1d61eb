"""The processor: text exactly as the base's tokenizer has it, image tokens where the placeholders are."""

import copy
import subprocess

import pytest
import torch
from tiny_processor import (
    CONVERSATIONS,
    IMAGE_ID,
    KINDS,
    PART_READING_TEMPLATE,
    SEQ,
    SIZE,
    TEMPLATE,
    image_runs,
    make_processor,
    make_tokenizer,
    picture,
    snapshot,
)

from modeling_genieblue import GenieBlueProcessor


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return make_tokenizer(request.param)


# Text without images is the tokenizer's own affair


def test_text_only_is_exactly_the_tokenizer(tokenizer):
    processor = make_processor(tokenizer)
    assert processor.tokenizer is tokenizer
    for text in ("A red cat.", "a literal <image> here", ["yes", "no, please"], "", "<s>twice?"):
        expected = dict(tokenizer(text))
        assert dict(processor(text=text)) == expected
        if "literal" not in text:  # with `images=[]`, that is a placeholder without an image
            assert dict(processor(text=text, images=[])) == expected
        assert dict(processor(text, None, add_special_tokens=False)) == dict(tokenizer(text, add_special_tokens=False))
        options = {"truncation": True, "max_length": 4, "return_special_tokens_mask": True, "text_pair": text}
        assert dict(processor(text=text, **options)) == dict(tokenizer(text, **options))


def test_text_only_tensors(tokenizer):
    processor = make_processor(tokenizer)
    one = processor(text="A red cat.", return_tensors="pt")
    assert torch.equal(one["input_ids"], tokenizer("A red cat.", return_tensors="pt")["input_ids"])
    options = {"padding": True, "return_tensors": "pt"}
    several = processor(text=["A red cat.", "no"], return_tensors="pt")
    left = tokenizer(["A red cat.", "no"], padding_side="left", **options)
    right = tokenizer(["A red cat.", "no"], padding_side="right", **options)
    assert torch.equal(several["input_ids"], left["input_ids"])
    assert torch.equal(several["attention_mask"], left["attention_mask"])
    asked = processor(text=["A red cat.", "no"], padding_side="right", **options)
    assert torch.equal(asked["input_ids"], right["input_ids"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in CONVERSATIONS),
        ("turns", {"add_generation_prompt": True, "style": "brief"}),
        ("turns", {"tools": [{"type": "function"}]}),
    ],
)
def test_text_only_chats_are_exactly_the_tokenizers(name, options):
    tokenizer = make_tokenizer()
    processor, chat = make_processor(tokenizer), CONVERSATIONS[name]
    before = copy.deepcopy(chat)
    for more in ({"tokenize": False}, {"tokenize": True, "return_dict": False}):
        assert processor.apply_chat_template(chat, **options, **more) == tokenizer.apply_chat_template(
            chat, **options, **more
        )
    full = {"tokenize": True, "return_dict": True}
    assert dict(processor.apply_chat_template(chat, **full, **options)) == dict(
        tokenizer.apply_chat_template(chat, **full, **options)
    )
    assert chat == before


def test_text_only_chats_take_the_tokenizers_other_arguments():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    )
    processor, chat = make_processor(tokenizer), CONVERSATIONS["turns"]
    for options in (
        {"return_assistant_tokens_mask": True, "return_dict": True},
        {"sanitize_control_tokens": True, "return_dict": True},
        {"continue_final_message": True, "return_dict": True},
        {"truncation": True, "max_length": 5, "return_dict": True},
        {"chat_template": TEMPLATE, "return_dict": True, "tokenizer_kwargs": {"return_special_tokens_mask": True}},
    ):
        ours = processor.apply_chat_template(chat, tokenize=True, **options)
        assert dict(ours) == dict(tokenizer.apply_chat_template(chat, **options))
    tensors = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template(CONVERSATIONS["batch"], **tensors)
    left = tokenizer.apply_chat_template(
        CONVERSATIONS["batch"], padding=True, tokenizer_kwargs={"padding_side": "left"}, **tensors
    )
    assert torch.equal(batch["input_ids"], left["input_ids"])


def test_lists_of_text_parts_become_strings_where_the_template_cannot_read_them():
    chat = [{"role": "user", "content": [{"type": "text", "text": " yes "}, {"type": "text", "text": " no "}]}]
    strings = [{"role": "user", "content": " yes  no "}]
    processor = make_processor()
    assert processor.apply_chat_template(chat) == processor.tokenizer.apply_chat_template(strings, tokenize=False)
    reading = make_processor(make_tokenizer(chat_template=PART_READING_TEMPLATE))
    assert reading.apply_chat_template(chat) == "yesno"


def test_a_tokenized_conversation_of_parts_is_a_batch_of_one_with_and_without_images():
    """As clients expect it of processors; with strings for contents it is what a tokenizer returns."""
    processor = make_processor()
    text = [{"role": "user", "content": [{"type": "text", "text": "yes or no?"}]}]
    image = [{"role": "user", "content": [{"type": "image", "image": picture()}]}]
    strings = [{"role": "user", "content": "yes or no?"}]
    expected = processor.tokenizer.apply_chat_template(strings, return_dict=True)
    for options in ({}, {"return_tensors": "pt"}):
        for chat in (text, image):
            output = processor.apply_chat_template(chat, tokenize=True, return_dict=True, **options)
            assert [len(output[name]) for name in ("input_ids", "attention_mask")] == [1, 1]
            assert len(output["input_ids"][0]) == len(output["attention_mask"][0]) > 1
    output = processor.apply_chat_template(text, tokenize=True, return_dict=True)
    assert dict(output) == {name: [values] for name, values in expected.items()}
    assert processor.apply_chat_template(text, tokenize=True) == output["input_ids"]


def test_no_template_at_all_is_the_tokenizers_error():
    tokenizer = make_tokenizer(chat_template=None)
    with pytest.raises(ValueError) as expected:
        tokenizer.apply_chat_template(CONVERSATIONS["question"])
    with pytest.raises(ValueError) as raised:
        make_processor(tokenizer).apply_chat_template(CONVERSATIONS["question"])
    assert str(raised.value) == str(expected.value)


def test_nothing_changes_the_tokenizer(tokenizer, tmp_path):
    before = snapshot(tokenizer)
    processor = make_processor(tokenizer)
    settings = processor.to_dict()
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "yes?"}]}]
    output = processor.apply_chat_template([chat, chat], tokenize=True, return_dict=True, return_tensors="pt")
    processor.batch_decode(output["input_ids"])
    processor.save_pretrained(tmp_path)
    repr(processor)
    assert snapshot(tokenizer) == before
    assert processor.to_dict() == settings
    assert "<image>" not in tokenizer.get_vocab()


# Rows with images


@pytest.mark.parametrize(
    "text", ["<image>\nWhat is this?", "Look: <image> a cat", "yes<image>", " <image> no <image>"]
)
def test_image_rows_are_tokenized_around_the_placeholder_as_around_a_special_token(tokenizer, text):
    aware = copy.deepcopy(tokenizer)
    aware.add_special_tokens({"additional_special_tokens": ["<image>"]})
    placeholder = aware.convert_tokens_to_ids("<image>")
    expected = []
    for token in aware(text)["input_ids"]:
        expected += [IMAGE_ID] * 2 * SEQ if token == placeholder else [token]
    assert make_processor(tokenizer).encode_with_images(text, [2] * text.count("<image>")) == expected


def test_an_image_becomes_tokens_by_its_tiles():
    output = make_processor()(text="<image>\nWhat is this?", images=picture(2, 1), return_tensors="pt")
    assert sorted(output) == ["attention_mask", "input_ids", "num_tiles", "pixel_values"]
    assert image_runs(output["input_ids"][0]) == [3 * SEQ]
    assert output["attention_mask"].tolist() == [[1] * output["input_ids"].shape[1]]
    assert output["pixel_values"].shape == (3, 3, SIZE, SIZE)
    assert output["num_tiles"].tolist() == [3]


@pytest.mark.parametrize(
    "settings", [{"model_input_names": ["input_ids", "token_type_ids"]}, {"split_special_tokens": True}]
)
def test_unusual_tokenizer_settings_do_not_change_what_an_image_request_returns(settings):
    processor = make_processor(make_tokenizer(**settings))
    output = processor(text="<image> yes", images=picture())
    assert sorted(output) == ["attention_mask", "input_ids", "num_tiles", "pixel_values"]
    assert image_runs(output["input_ids"][0]) == [SEQ]
    assert dict(processor(text="yes <image></s>")) == dict(processor.tokenizer("yes <image></s>"))


def test_each_tile_stands_between_the_texts_of_the_processor(tmp_path):
    make_processor(image_prefix="yes", image_suffix="no").save_pretrained(tmp_path)
    processor = GenieBlueProcessor.from_pretrained(tmp_path)
    before, after = (processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("yes", "no"))
    tile = [*before, *[IMAGE_ID] * SEQ, *after]
    output = processor(text="<image> yes", images=picture(2, 1), return_mm_token_type_ids=True)
    plain = make_processor()(text="<image> yes", images=picture(2, 1))["input_ids"][0]
    first = plain.index(IMAGE_ID)
    assert output["input_ids"] == [[*plain[:first], *tile * 3, *plain[first + 3 * SEQ :]]]
    assert output["attention_mask"] == [[1] * len(output["input_ids"][0])]
    assert output["mm_token_type_ids"] == [[int(token == IMAGE_ID) for token in output["input_ids"][0]]]
    assert processor("yes")["input_ids"] == processor.tokenizer("yes")["input_ids"]


def test_several_images_per_turn_and_several_turns():
    first, second, third = picture(), picture(2, 1), picture(1, 2)
    chat = [
        {"role": "user", "content": [{"type": "image", "image": first}, {"type": "text", "text": "and"},
                                     {"type": "image", "image": second}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "image", "image": third}, {"type": "text", "text": "no?"}]},
    ]  # fmt: skip
    processor = make_processor()
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    output = processor.apply_chat_template(chat, **options)
    assert image_runs(output["input_ids"][0]) == [SEQ, 3 * SEQ, 3 * SEQ]
    assert output["num_tiles"].tolist() == [1, 3, 3]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == (
        "<|user|>\n<image>\nand<image></s>\n<|assistant|>\nyes</s>\n<|user|>\n<image>\nno?</s>\n<|assistant|>\n"
    )
    assert processor.decode(output["input_ids"][0]) == text
    ids = processor.encode_with_images(text, [1, 3, 3], add_special_tokens=False)
    assert ids == output["input_ids"][0].tolist()


@pytest.mark.parametrize("form", ["kwarg", "path", "url", "image_url", "base64", "processor_kwargs", "null columns"])
def test_an_image_part_may_bring_its_image_in_several_forms(tmp_path, form):
    processor = make_processor()
    path = tmp_path / "image.png"
    picture().save(path)
    path_part = {"type": "image", "path": path, "url": None, "image": None}
    base64_text = "".join(subprocess.run(["base64", str(path)], capture_output=True, text=True).stdout.split())
    part, options = {
        "kwarg": ({"type": "image"}, {"images": picture()}),
        "processor_kwargs": ({"type": "image"}, {"processor_kwargs": {"images": [picture()]}}),
        "path": ({"type": "image", "path": str(path)}, {}),
        "null columns": (path_part, {}),
        "url": ({"type": "image", "url": f"data:image/png;base64,{base64_text}"}, {}),
        "image_url": ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_text}"}}, {}),
        "base64": ({"type": "image", "base64": base64_text}, {}),
    }[form]
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "yes?"}]}]
    output = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt", **options)
    expected = processor(text="<|user|>\n<image>\nyes?</s>\n", images=picture(), return_tensors="pt")
    assert torch.equal(output["input_ids"], expected["input_ids"])
    assert torch.equal(output["pixel_values"], expected["pixel_values"])


def test_rows_are_padded_on_the_left(tokenizer):
    processor = make_processor(tokenizer)
    texts = ["<image>\nyes or no?", "<image>", "one <image> two <image>"]
    images = [picture(), picture(2, 2), picture(), picture()]
    output = processor(text=texts, images=images, return_tensors="pt")
    counts = [[1], [5], [1, 1]]
    single = [processor.encode_with_images(text, tiles) for text, tiles in zip(texts, counts, strict=True)]
    rows = zip(output["input_ids"].tolist(), output["attention_mask"].tolist(), single, strict=True)
    for ids, mask, expected in rows:
        padding = len(ids) - len(expected)
        assert ids == [tokenizer.pad_token_id] * padding + expected
        assert mask == [0] * padding + [1] * len(expected)
    right = processor(text=texts, images=images, padding_side="right", pad_to_multiple_of=16, return_tensors="pt")
    assert right["input_ids"].shape[1] % 16 == 0
    assert right["input_ids"][0, : len(single[0])].tolist() == single[0]
    assert right["attention_mask"][0, len(single[0]) :].sum() == 0
    fixed = processor(text=texts, images=images, padding="max_length", max_length=64)
    assert [len(ids) for ids in fixed["input_ids"]] == [64, 64, 64]
    ragged = processor(text=texts, images=images, padding=False)
    assert ragged["input_ids"] == single


def test_rows_without_images_beside_rows_with_images_are_plain_text(tokenizer):
    processor = make_processor(tokenizer)
    texts = ["<image>yes", "a literal <image> here", "no"]
    output = processor(text=texts, images=[[picture()], [], None], padding=False)
    assert image_runs(output["input_ids"][0]) == [SEQ]
    assert output["input_ids"][1:] == tokenizer(texts[1:])["input_ids"]
    chats = [
        [{"role": "user", "content": [{"type": "text", "text": "yes?"}, {"type": "image", "image": picture()}]}],
        CONVERSATIONS["literal"],
    ]
    mixed = processor.apply_chat_template(chats, tokenize=True, return_dict=True, padding=False)
    assert image_runs(mixed["input_ids"][0]) == [SEQ]
    assert mixed["input_ids"][1] == tokenizer.apply_chat_template(chats[1], return_dict=False)


def test_flat_images_go_to_the_placeholders_in_order():
    output = make_processor()(
        text=["<image> a <image>", "none", "<image>"], images=[picture(), picture(2), picture(3)]
    )
    assert [image_runs(ids) for ids in output["input_ids"]] == [[SEQ, 3 * SEQ], [], [4 * SEQ]]
    assert output["num_tiles"].tolist() == [1, 3, 4]


def test_images_of_several_conversations_may_be_given_apart():
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "image", "image": picture(3)}]}],
        [{"role": "user", "content": [{"type": "image"}]}],
    ]
    for images in ([picture(), picture(2)], [[picture()], [picture(2)]]):
        output = make_processor().apply_chat_template(chats, images=images, tokenize=True, return_dict=True)
        assert output["num_tiles"].tolist() == [1, 4, 3]
    assert make_processor().apply_chat_template(chats)[1] == "<|user|>\n<image></s>\n"


def test_the_other_keys_of_a_message_with_an_image_reach_the_template():
    processor = make_processor(
        make_tokenizer(chat_template="{{ messages[0]['name'] + ':' + messages[0]['content'] }}")
    )
    chat = [{"role": "user", "name": "Ann", "content": [{"type": "image"}]}]
    assert processor.apply_chat_template(chat) == "Ann:<image>"


def test_a_rendered_chat_gets_no_second_bos():
    tokenizer = make_tokenizer("metaspace_first")
    processor = make_processor(tokenizer)
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}]}]
    ids = processor(text=processor.apply_chat_template(chat), images=picture())["input_ids"][0]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids == processor.apply_chat_template(chat, tokenize=True)[0]
    assert processor(text="<image>", images=picture())["input_ids"][0][0] == tokenizer.bos_token_id


def test_image_settings_of_a_call_reach_the_image_processor():
    processor = make_processor()
    for options in ({"max_tiles": 1}, {"images_kwargs": {"max_tiles": 1}}):
        output = processor(text="<image>", images=picture(2), **options)
        assert output["num_tiles"].tolist() == [1] and image_runs(output["input_ids"][0]) == [SEQ]
    assert dict(processor(text="yes", max_tiles=1)) == dict(processor.tokenizer("yes"))
    pixels = processor(images=[picture(2)], return_tensors="np")
    assert sorted(pixels) == ["num_tiles", "pixel_values"] and pixels["pixel_values"].shape[0] == 3


def test_a_changed_tokenizer_is_noticed():
    processor = make_processor()
    first = processor.encode_with_images("<image> cat&dog", [1])
    processor.tokenizer.add_tokens(["cat&dog"])
    second = processor.encode_with_images("<image> cat&dog", [1])
    assert len(second) < len(first)
    assert second[-1] == processor.tokenizer.convert_tokens_to_ids("cat&dog")


# Decoding


def test_decoding_shows_each_run_of_image_tokens_as_one_placeholder(tokenizer):
    processor = make_processor(tokenizer)
    text = "yes <image> and <image> no"
    ids = processor.encode_with_images(text, [1, 4], add_special_tokens=False)
    aware = copy.deepcopy(tokenizer)
    aware.add_special_tokens({"additional_special_tokens": ["<image>"]})
    plain = aware(text, add_special_tokens=False)["input_ids"]
    assert processor.decode(ids) == aware.decode(plain)
    assert processor.decode(ids).count("<image>") == 2
    skipped = processor.decode(torch.tensor(ids), skip_special_tokens=True)
    assert skipped == aware.decode(plain, skip_special_tokens=True) and "image" not in skipped
    batch = torch.tensor([ids, ids])
    assert processor.batch_decode(batch, skip_special_tokens=True) == [skipped, skipped]
    assert processor.decode(batch) == [processor.decode(ids)] * 2
    assert processor.post_process_image_text_to_text(batch) == [skipped, skipped]
    text_ids = tokenizer("yes or no")["input_ids"]
    assert processor.decode(text_ids) == tokenizer.decode(text_ids)
    assert processor.decode([]) == tokenizer.decode([])
