"""What clients and serving engines reach of the processor: every public name does the right thing or is refused."""

import pytest
import torch
from tiny_processor import CONVERSATIONS, IMAGE_ID, SIZE, make_processor, make_tokenizer, picture
from transformers import ProcessorMixin, StopStringCriteria

from modeling_genieblue import GenieBlueProcessor
from modeling_genieblue.decoding_genieblue import BatchDecoding, ImageTokenDecoding

# What each public name of transformers' processors is here. A name that a new version adds has to be decided on.
OURS = {
    "apply_chat_template", "batch_decode", "chat_template", "decode", "from_args_and_dict", "from_pretrained",
    "post_process_image_text_to_text", "return_mm_token_type_ids", "save_pretrained", "to_dict",
}  # fmt: skip
REFUSED = {
    "get_text_with_replacements", "replace_audio_token", "replace_image_token", "replace_video_token",
    "validate_inputs",
}  # fmt: skip
AS_INHERITED = {
    "all_special_multimodal_tokens",  # the placeholder
    "audio_token_ids", "video_token_ids",  # [None]: there is no such token
    # Loading and saving, by way of what is ours:
    "check_argument_for_proper_class", "get_attributes", "get_possibly_dynamic_module", "get_processor_dict",
    "register_for_auto_class", "to_json_file", "to_json_string", "validate_init_kwargs",
    "create_mm_token_type_ids", "image_token_ids", "model_input_names", "unused_input_names",
    "parse_response",  # the tokenizer's
    "post_process_multimodal_output",  # by way of `post_process_image_text_to_text`
    "prepare_inputs_layout",  # by way of the image processor's `fetch_images`
    "push_to_hub",  # by way of `save_pretrained`
    "return_text_replacement_offsets", "skip_tensor_conversion",
    "valid_processor_kwargs",  # settings of the class
}  # fmt: skip


def public_names(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_every_public_name_of_transformers_processors_is_decided_on():
    names = public_names(ProcessorMixin)
    assert names - OURS - REFUSED - AS_INHERITED == set()
    own = {*vars(GenieBlueProcessor), *vars(ImageTokenDecoding), *vars(BatchDecoding)}
    assert not (OURS | REFUSED) & names - own and not AS_INHERITED & own


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_steps_of_other_processors_are_refused_with_the_way_to_go(name):
    with pytest.raises(ValueError, match="call the processor with text and images"):
        getattr(make_processor(), name)(["<image>"])


def test_inherited_names_tell_of_the_image_token():
    processor = make_processor()
    assert processor.all_special_multimodal_tokens == ["<image>"]
    assert processor.image_token_ids == [processor.image_token_id] == [IMAGE_ID]
    assert processor.video_token_ids == processor.audio_token_ids == [None]
    assert processor.model_input_names[:2] == ["pixel_values", "num_tiles"]
    assert processor.model_input_names[2:] == processor.tokenizer.model_input_names
    assert processor.post_process_multimodal_output([[4, IMAGE_ID, IMAGE_ID, 200]]) == processor.batch_decode(
        [[4, 200]], skip_special_tokens=True
    )


def test_inputs_that_are_laid_out_for_a_call_give_the_same(tmp_path):
    processor, path = make_processor(), tmp_path / "image.png"
    picture(2).save(path)
    images, text, *_ = processor.prepare_inputs_layout(images=[str(path)], text="<image> yes")
    laid_out, direct = processor(text=text, images=images), processor(text="<image> yes", images=picture(2))
    assert laid_out["input_ids"] == direct["input_ids"]
    assert (laid_out["pixel_values"] == direct["pixel_values"]).all()


# What serving engines ask for


@pytest.mark.parametrize("size", [(SIZE, SIZE), (SIZE, 2 * SIZE), (3 * SIZE, SIZE), (7, 100)])
def test_tokens_of_an_image_are_told_from_its_height_and_width(size):
    processor = make_processor()
    height, width = size
    image = picture().resize((width, height))
    for options in ({}, {"max_tiles": 4}, {"images_kwargs": {"max_tiles": 1}}):
        output = processor(text="<image>", images=image, **options)
        told = processor._get_num_multimodal_tokens(image_sizes=[size, size], **options)
        assert told["num_image_tokens"] == [output["input_ids"][0].count(IMAGE_ID)] * 2
        assert told["num_image_patches"] == [len(output["pixel_values"])] * 2
    assert "num_image_tokens" not in processor._get_num_multimodal_tokens()


def test_image_tokens_are_marked_by_type_on_request():
    processor = make_processor()
    options = {"return_mm_token_type_ids": True, "return_tensors": "pt"}
    chats = [[{"role": "user", "content": [{"type": "image", "image": picture(2)}]}], CONVERSATIONS["turns"]]
    for output in (
        processor(text=["<image> yes or no?", "<image>"], images=[picture(), picture(2)], **options),
        processor.apply_chat_template(chats, tokenize=True, return_dict=True, **options),
    ):
        assert torch.equal(output["mm_token_type_ids"], (output["input_ids"] == IMAGE_ID).long())
        assert output["mm_token_type_ids"].tolist() == processor.create_mm_token_type_ids(output["input_ids"])
    assert "mm_token_type_ids" not in processor(text="<image>", images=picture())


@pytest.mark.parametrize("tensors", [None, "pt"])
def test_a_request_without_images_has_types_only_on_request(tensors):
    processor = make_processor(make_tokenizer(pad_token=None))
    texts = ["yes", "yes or no?"]
    plain = processor(text=texts, return_tensors=tensors)
    typed = processor(text=texts, return_tensors=tensors, return_mm_token_type_ids=True)
    types = typed.pop("mm_token_type_ids")
    assert str(dict(typed)) == str(dict(plain)) and "mm_token_type_ids" not in plain
    assert [len(row) for row in types] == [len(row) for row in plain["input_ids"]]
    assert not any(int(value) for row in types for value in row)


def test_a_server_stops_at_strings_with_the_processor_for_a_tokenizer():
    processor = make_processor()
    ids = processor(text="<image> yes or no", images=picture(), return_tensors="pt")["input_ids"]
    for words, stops in (("no", True), ("maybe", False)):
        criteria = StopStringCriteria(processor, stop_strings=[words])
        expected = StopStringCriteria(processor.tokenizer, stop_strings=[words])
        assert criteria(ids, None).tolist() == expected(ids, None).tolist() == [stops]
    assert processor.get_vocab() == processor.tokenizer.get_vocab()
