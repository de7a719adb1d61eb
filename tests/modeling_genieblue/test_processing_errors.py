"""What the processor must refuse: wrong numbers of images, truncation that would cut one, padding without a token."""

import numpy as np
import pytest
from tiny_processor import CONVERSATIONS, IMAGE_ID, KINDS, SEQ, SIZE, TEMPLATE, make_processor, make_tokenizer, picture

from modeling_genieblue.processing_genieblue import GenieBlueProcessor


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return make_tokenizer(request.param)


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
    chat = [{"role": "user", "content": [{"type": "image"}]}]
    message = message_of(lambda: processor.apply_chat_template(chat, tokenize=True))
    assert "(tokens: 1, images: 0)" in message
    message = message_of(lambda: processor.apply_chat_template([chat, chat], images=[[picture()], []], tokenize=True))
    assert "Row 1 needs one image for each placeholder (tokens: 1, images: 0)" in message
    assert "(tokens: 2, images: 1)" in message_of(lambda: processor.encode_with_images("<image> <image>", [1]))


@pytest.mark.parametrize("images", [[], [None], ()])
def test_a_placeholder_is_no_text_where_images_are_given_but_none_is_there(images):
    processor = make_processor()
    for text in ("<image> yes", ["no", "<image> yes"]):
        assert "(tokens: 1, images: 0)" in message_of(lambda text=text: processor(text=text, images=images))
    assert dict(processor(text="yes", images=images)) == dict(processor.tokenizer("yes"))
    rows = processor(text=["<image> yes"], images=[[]])  # says of its row that it is text
    assert dict(rows) == dict(processor.tokenizer(["<image> yes"])) == dict(processor(text=["<image> yes"]))


@pytest.mark.parametrize("images", [None, []])
def test_no_text_at_all_is_refused(images):
    assert "expected a string, or a list of at least one" in message_of(
        lambda: make_processor()(text=[], images=images)
    )


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
    assert "['text_pair']" in message_of(lambda: processor(text="<image>", images=picture(), text_pair="more"))
    assert "text is of type Image" in message_of(lambda: processor(picture(), picture()))
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
