"""transformers' pipelines on the folder of a GenieBlue."""

import pytest
from PIL import Image
from tiny_genieblue import save_tiny_pair
from transformers import pipeline

OPTIONS = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
TEXT = [{"role": "user", "content": "What does the sign say?"}]


def about(image, text):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


SEEN = about(Image.new("RGB", (50, 30), "red"), "What?")
WIDE = about(Image.new("RGB", (90, 30), "blue"), "What does the sign on the door say? It says")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def sees(pair):
    return pipeline("image-text-to-text", model=str(pair))


@pytest.mark.parametrize("inputs", [TEXT, "What does the sign", ["What does the sign", "How many digits"]], ids=str)
def test_text_generation_gives_the_bases_answers(inputs, pair):
    ours, bases = (pipeline("text-generation", model=str(folder)) for folder in (pair, pair.parent / "base"))
    assert type(ours.model).__name__ == "GenieBlueForConditionalGeneration"
    options = {**OPTIONS, "batch_size": 2}
    assert ours(inputs, **options) == bases(inputs, **options)


def test_texts_and_images_in_one_list_are_answered_as_alone(sees):
    assert sees(text=[SEEN, TEXT, WIDE], **OPTIONS) == [sees(text=chat, **OPTIONS) for chat in (SEEN, TEXT, WIDE)]


def test_images_in_one_batch_are_answered_as_alone(sees):
    assert sees(text=[SEEN, WIDE], batch_size=2, **OPTIONS) == [sees(text=chat, **OPTIONS) for chat in (SEEN, WIDE)]


def test_text_without_images_is_answered_as_the_base_does(sees, pair):
    (answer,) = sees(text=TEXT, **OPTIONS)
    (expected,) = pipeline("text-generation", model=str(pair.parent / "base"))(TEXT, **OPTIONS)
    assert answer["generated_text"] == expected["generated_text"]


def test_texts_in_one_batch_are_answered_as_alone_if_padded_on_the_left(sees, monkeypatch):
    """As transformers warns; it is the base that generates."""
    monkeypatch.setattr(sees.tokenizer, "padding_side", "left")
    texts = [TEXT, [{"role": "user", "content": "What does <image> do?"}]]
    assert sees(text=texts, batch_size=2, **OPTIONS) == [sees(text=chat, **OPTIONS) for chat in texts]
