"""The processor: text exactly as the base's tokenizer has it, image tokens where the placeholders are."""

import copy
import itertools
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
from transformers.pipelines.image_text_to_text import Chat, ImageTextToTextPipeline, ReturnType

from modeling_genieblue.image_processing_genieblue import GenieBlueImageProcessor
from modeling_genieblue.processing_genieblue import GenieBlueProcessor

SIZE, SEQ, IMAGE_ID = 8, 3, 1000
CORPUS = [
    "What is in this picture? A red cat sits on the mat.",
    "user assistant system answer in one word, please: yes or no.",
    "<|user|>\n<|assistant|>\n1 2 3 4 5 6 7 8 9 0 <image> literal\n",
]
TEMPLATE = (
    "{{ bos_token or '' }}{% if tools %}[{{ tools | length }} tools]{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{{ style or '' }}"
)
PART_READING_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] | trim }}{% endfor %}{% endif %}{% endfor %}"
)
KINDS = ("byte_level", "metaspace_first", "metaspace_legacy")


def make_tokenizer(kind: str = "byte_level", **settings) -> PreTrainedTokenizerFast:
    """Byte-level BPE without BOS (as Qwen), or Metaspace BPE with BOS, prefix spaces new and legacy (as Llama 2)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "byte_level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "metaspace_first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if kind != "byte_level":
        alphabet = sorted(set("".join(CORPUS) + "▁"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 40, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    names = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    if kind != "byte_level":
        names["bos_token"] = "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, "padding_side": "right", **settings})


def make_processor(tokenizer=None, **settings) -> GenieBlueProcessor:
    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    settings = {"image_token_id": IMAGE_ID, "image_seq_length": SEQ, **settings}
    return GenieBlueProcessor(GenieBlueImageProcessor(tile_size=SIZE), tokenizer, **settings)


def picture(columns: int = 1, rows: int = 1) -> Image.Image:
    """An image of one tile, or of `columns` x `rows` tiles and a thumbnail."""
    return Image.new("RGB", (columns * SIZE, rows * SIZE), (255, 0, 0))


def image_runs(ids) -> list[int]:
    """Lengths of the runs of image tokens."""
    return [len(list(run)) for is_image, run in itertools.groupby(list(ids), lambda i: int(i) == IMAGE_ID) if is_image]


def snapshot(tokenizer) -> tuple:
    names = ("padding_side", "truncation_side", "chat_template", "pad_token", "init_kwargs", "_processor_class")
    return (
        tokenizer.backend_tokenizer.to_str(),
        len(tokenizer),
        tokenizer.all_special_tokens,
        copy.deepcopy([getattr(tokenizer, name, None) for name in names]),
    )


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return make_tokenizer(request.param)


# Text without images is the tokenizer's own affair


@pytest.mark.parametrize("text", ["A red cat.", "a literal <image> here", ["yes", "no, please"], "", "<s>twice?"])
def test_text_only_is_exactly_the_tokenizer(tokenizer, text):
    processor = make_processor(tokenizer)
    expected = dict(tokenizer(text))
    assert processor.tokenizer is tokenizer
    assert dict(processor(text=text)) == expected
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


CONVERSATIONS = {
    "question": [{"role": "user", "content": "What is in this picture?"}],
    "literal": [{"role": "user", "content": "a literal <image> here"}],
    "turns": [
        {"role": "system", "content": "answer in one word"},
        {"role": "user", "content": "yes or no?"},
        {"role": "assistant", "content": "yes"},
    ],
}
CONVERSATIONS["batch"] = [CONVERSATIONS["question"], CONVERSATIONS["turns"]]


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize(
    "options", [{}, {"add_generation_prompt": True, "style": "brief"}, {"tools": [{"type": "function"}]}]
)
def test_text_only_chats_are_exactly_the_tokenizers(tokenizer, name, options):
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


# Bad input


def message_of(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "images", "numbers"),
    [
        ("<image><image> hi", 1, "(tokens: 2, images: 1)"),
        ("<image> hi", 2, "(tokens: 1, images: 2)"),
        ("hi", 1, "(tokens: 0, images: 1)"),
        (["<image>", "<image>"], 3, "The request needs one image for each placeholder (tokens: 2, images: 3)"),
    ],
)
def test_a_wrong_number_of_images_names_both_numbers_and_the_remedy(text, images, numbers):
    message = message_of(lambda: make_processor()(text=text, images=[picture()] * images))
    assert numbers in message
    assert "Give the images in the order of the placeholders" in message
    assert "a literal '<image>' in the text counts as a placeholder too" in message


def test_wrong_numbers_in_nested_images_and_conversations():
    processor = make_processor()
    nested = [[picture()], [picture()]]
    message = message_of(lambda: processor(text=["<image>", "<image><image>"], images=nested))
    assert "Row 1 needs one image for each placeholder (tokens: 2, images: 1)" in message
    unread = [["absent.png"], [picture()]]  # counting comes before reading
    assert "(tokens: 2, images: 1)" in message_of(lambda: processor(text=["<image>", "<image>" * 2], images=unread))
    message = message_of(lambda: processor(text=["<image>"], images=nested))
    assert "images has 2 lists for 1 rows of text" in message
    with_literal = [{"type": "image", "image": picture()}, {"type": "text", "text": "what does <image> mean?"}]
    chat = [{"role": "user", "content": with_literal}]
    message = message_of(lambda: processor.apply_chat_template(chat, tokenize=True))
    assert "(tokens: 2, images: 1)" in message and "a literal '<image>' in the text" in message
    chat = [{"role": "user", "content": [{"type": "image"}]}]
    message = message_of(lambda: processor.apply_chat_template(chat, tokenize=True))
    assert "(tokens: 1, images: 0)" in message
    message = message_of(lambda: processor.apply_chat_template([chat, chat], images=[[picture()], []], tokenize=True))
    assert "Row 1 needs one image for each placeholder (tokens: 1, images: 0)" in message
    assert "(tokens: 2, images: 1)" in message_of(lambda: processor.encode_with_images("<image> <image>", [1]))


def test_a_bad_image_is_named_by_its_number(tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    with pytest.raises(OSError, match="cut.png cannot be read"):
        make_processor()(text="<image>", images=str(tmp_path / "cut.png"))
    message = message_of(lambda: make_processor()(text="<image><image>", images=[picture(), np.zeros((0, 1, 3))]))
    assert "Image 1 has shape 0x1x3" in message


def test_truncation_never_cuts_an_image(tokenizer):
    processor = make_processor(tokenizer)
    text = "<image> What is in this picture?"
    full = processor(text=text, images=picture(2))["input_ids"][0]
    assert len(full) > 12
    options = {"truncation": True, "max_length": 12}
    assert processor(text=text, images=picture(2), **options)["input_ids"][0] == full[:12]
    assert processor(text=text, images=picture(2), truncation=True, max_length=500)["input_ids"][0] == full
    for limit in (8, 2):
        options["max_length"] = limit
        message = message_of(lambda: processor(text=text, images=picture(2), **options))
        assert f"has {len(full)} tokens, 9 of them for images, and truncation to {limit} would cut" in message
        assert f"Set max_length to at least {len(full)}" in message
    options["max_length"] = len(full) + 2
    message = message_of(lambda: processor(text=f"{text} {text}", images=[picture(2), picture()], **options))
    assert "would cut an image" in message
    plain = {"truncation": True, "max_length": 10}
    both = processor(text=["<image>", text[7:]], images=[[picture(2)], []], padding=False, **plain)
    assert both["input_ids"][1] == tokenizer(text[7:], **plain)["input_ids"]


def test_rows_without_a_padding_token_are_padded_with_eos():
    tokenizer = make_tokenizer(pad_token=None)
    processor = make_processor(tokenizer)
    texts = ["<image>", "<image> yes or no?"]
    output = processor(text=texts, images=[picture(), picture()], return_tensors="pt")
    assert output["input_ids"][0, 0] == tokenizer.eos_token_id and output["attention_mask"][0, 0] == 0
    text_only = processor(text=["no", "yes or no?"], padding=True, return_tensors="pt")
    assert text_only["input_ids"][0, 0] == tokenizer.eos_token_id and text_only["attention_mask"][0, 0] == 0
    single = processor(text="no", padding="max_length", max_length=9)
    assert (
        single["input_ids"]
        == [tokenizer.eos_token_id] * (9 - len(tokenizer("no")["input_ids"])) + tokenizer("no")["input_ids"]
    )
    chats = processor.apply_chat_template(
        CONVERSATIONS["batch"], tokenize=True, return_dict=True, return_tensors="pt", chat_template=TEMPLATE
    )
    assert chats["attention_mask"][0, 0] == 0
    assert tokenizer.pad_token is None


def test_padding_without_any_token_to_pad_with_is_refused():
    processor = make_processor(make_tokenizer(pad_token=None, eos_token=None))
    assert len(processor(text="<image>", images=picture())["input_ids"]) == 1
    message = message_of(lambda: processor(text=["<image>", "<image>yes"], images=[picture(), picture()]))
    assert "neither a padding nor an end-of-sequence token. Set tokenizer.pad_token" in message


def test_arguments_that_images_do_not_allow():
    processor = make_processor()
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}]}]
    assert "['text_pair']" in message_of(lambda: processor(text="<image>", images=picture(), text_pair="more"))
    assert "text is of type Image" in message_of(lambda: processor(picture(), picture()))
    for name in ("return_assistant_tokens_mask", "sanitize_control_tokens"):
        call = {name: True, "tokenize": True, "return_dict": True}
        assert f"{name} works for text-only" in message_of(
            lambda call=call: processor.apply_chat_template(chat, **call)
        )
    message = message_of(lambda: processor(text="<image>", images=picture(), padding="max_length"))
    assert "expected a max_length" in message


@pytest.mark.parametrize(
    "part", [{"type": "video", "path": "x.mp4"}, {"type": "text"}, {"text": "no type"}, {"type": "audio"}]
)
def test_parts_that_are_neither_text_nor_image_are_refused(part):
    chat = [{"role": "user", "content": [part]}]
    assert f"a part of type {part.get('type')!r}" in message_of(lambda: make_processor().apply_chat_template(chat))


def test_a_placeholder_or_id_that_the_tokenizer_knows_is_refused():
    tokenizer = make_tokenizer()
    assert "expected an id beyond its" in message_of(lambda: make_processor(tokenizer, image_token_id=5))
    assert "image_token_id is None" in message_of(lambda: make_processor(tokenizer, image_token_id=None))
    assert "at least 1 token" in message_of(lambda: make_processor(tokenizer, image_seq_length=0))
    assert "a chat template of its own" in message_of(lambda: make_processor(tokenizer, chat_template="other"))
    tokenizer.add_tokens(["<image>"])
    message = message_of(lambda: make_processor(tokenizer))
    assert "'<image>' is already in the tokenizer's vocabulary" in message and "from_base" in message


def test_from_base_takes_the_first_free_placeholder():
    tokenizer = make_tokenizer()
    settings = {"image_token_id": IMAGE_ID, "image_seq_length": SEQ, "tile_size": SIZE, "max_tiles": 4}
    made = GenieBlueProcessor.from_base(tokenizer, **settings)
    assert made.image_token == "<image>" and made.image_processor.max_tiles == 4 and made.tokenizer is tokenizer
    tokenizer.add_tokens(["<image>", "<|image|>"])
    made = GenieBlueProcessor.from_base(tokenizer, **settings)
    assert made.image_token == "<|genieblue_image|>"
    known = tokenizer.convert_tokens_to_ids("<image>")
    ids = made(text="<image><|genieblue_image|>", images=picture())["input_ids"][0]
    assert ids == [known, *[IMAGE_ID] * SEQ]
    tokenizer.add_tokens(["<|genieblue_image|>"])
    assert "an image_token of your own" in message_of(lambda: GenieBlueProcessor.from_base(tokenizer, **settings))


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


# Saving


def text_results(processor) -> list:
    chat = {"tokenize": True, "return_dict": True}
    return [
        [dict(processor.tokenizer(text)) for text in (*CORPUS, "a literal <image> here")],
        [dict(processor.apply_chat_template(chats, **chat)) for chats in CONVERSATIONS.values()],
        processor.apply_chat_template(CONVERSATIONS["turns"], add_generation_prompt=True),
    ]


@pytest.mark.parametrize("own_template", [False, True])
def test_saving_and_loading_keeps_everything(tokenizer, tmp_path, own_template):
    if own_template:
        tokenizer.chat_template = None
    saved = GenieBlueProcessor(
        GenieBlueImageProcessor(tile_size=SIZE, max_tiles=4, relaxed_alpha=0.3),
        tokenizer,
        chat_template=TEMPLATE if own_template else None,
        image_token="<|picture|>",
        image_token_id=IMAGE_ID,
        image_seq_length=SEQ,
    )
    before = snapshot(tokenizer)
    saved.save_pretrained(tmp_path)
    loaded = GenieBlueProcessor.from_pretrained(tmp_path)
    assert snapshot(tokenizer) == before
    assert text_results(loaded) == text_results(saved)
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    assert loaded.chat_template == saved.chat_template == TEMPLATE
    assert (loaded.image_token, loaded.image_token_id, loaded.image_seq_length) == ("<|picture|>", IMAGE_ID, SEQ)
    assert loaded.image_processor._settings() == saved.image_processor._settings()
    assert loaded.model_input_names == saved.model_input_names
    assert {"pixel_values", "num_tiles", "input_ids"} <= set(loaded.model_input_names)
    request = {"text": "<|picture|> yes", "images": picture(2)}
    assert loaded(**request)["input_ids"] == saved(**request)["input_ids"]
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_the_saved_tokenizer_is_the_bases(tokenizer, tmp_path):
    make_processor(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "base")
    base = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    ours = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert ours.pop("processor_class") == "GenieBlueProcessor"
    assert ours == base
    kept = (tmp_path / "model" / "tokenizer.json").read_bytes()
    assert kept == (tmp_path / "base" / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("yes <image>") == tokenizer("yes <image>")


def test_a_template_given_at_loading_is_used_by_a_base_without_one(tmp_path):
    make_processor(make_tokenizer(chat_template=None), chat_template=TEMPLATE).save_pretrained(tmp_path)
    loaded = GenieBlueProcessor.from_pretrained(tmp_path, chat_template="{{ messages[0]['content'] }}!")
    assert loaded.apply_chat_template(CONVERSATIONS["question"]) == "What is in this picture?!"


REMOTE_SCRIPT = """
import json, sys
sys.modules["modeling_genieblue"] = None  # it cannot be imported, installed or not
from PIL import Image
from transformers import AutoProcessor
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
picture = Image.new("RGB", (16, 8))
output = processor(text=["<image> yes", "no"], images=[[picture], []], padding=False)
processor.save_pretrained(folder + "-again")
again = AutoProcessor.from_pretrained(folder + "-again", trust_remote_code=True)
assert again(text="<image>", images=picture)["num_tiles"].tolist() == [3]
print(json.dumps([type(processor).__module__.split(".")[0], output["input_ids"], list(output["pixel_values"].shape)]))
"""


def test_auto_processor_loads_the_saved_code_without_the_package(tmp_path):
    processor = make_processor(make_tokenizer("metaspace_first"))
    processor.save_pretrained(tmp_path / "model")
    ran = subprocess.run(
        [sys.executable, "-c", REMOTE_SCRIPT, str(tmp_path / "model")], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    module, ids, shape = json.loads(ran.stdout.splitlines()[-1])
    assert module == "transformers_modules"
    assert ids == processor(text=["<image> yes", "no"], images=[[picture(2)], []], padding=False)["input_ids"]
    assert shape == [3, 3, SIZE, SIZE]


def test_auto_processor_uses_the_package_where_it_is_installed(tmp_path):
    import modeling_genieblue  # noqa: F401  registers the classes

    make_processor().save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is GenieBlueProcessor


# transformers' pipeline


class RecordedModel:
    """Stands in for a model: remembers its inputs and answers with the same tokens to all."""

    dtype = torch.bfloat16

    def __init__(self, answer):
        self.answer, self.inputs = answer, None

    def generate(self, **inputs):
        self.inputs = inputs
        return torch.cat([inputs["input_ids"], self.answer.expand(len(inputs["input_ids"]), -1)], dim=1)


@pytest.mark.parametrize("with_image", [False, True])
def test_pipeline_conventions(with_image):
    processor = make_processor()
    # The constructor wants a real model; the three stages that a call runs do not.
    pipeline = object.__new__(ImageTextToTextPipeline)
    pipeline.processor, pipeline.tokenizer = processor, processor.tokenizer
    pipeline.model = RecordedModel(processor.tokenizer("yes", return_tensors="pt")["input_ids"])
    pipeline._prepare_generate_kwargs = lambda generate_kwargs, **_: generate_kwargs
    content = [{"type": "text", "text": "no?"}]
    content = [{"type": "image", "image": picture(2)}, *content] if with_image else content
    inputs = pipeline.preprocess(Chat([{"role": "user", "content": content}]))
    outputs = pipeline._forward(inputs)
    assert ("pixel_values" in pipeline.model.inputs) == with_image
    if with_image:
        assert pipeline.model.inputs["pixel_values"].dtype == torch.bfloat16
    (record,) = pipeline.postprocess(outputs, return_type=ReturnType.NEW_TEXT)
    assert record["generated_text"] == "yes"


def test_a_processor_logs_nothing_in_ordinary_use(caplog):
    with caplog.at_level(logging.WARNING):
        make_processor()(text="<image> yes", images=picture(4, 4), return_tensors="pt")
    assert not caplog.records
