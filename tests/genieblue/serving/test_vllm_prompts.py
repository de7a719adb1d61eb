"""Prompts of requests with images in vLLM, as far as they need no vLLM."""

import pytest

from genieblue.serving.vllm.prompts import (
    cache_salt,
    check_image_tokens,
    one_token_per_image,
    take_view,
    with_stand_ins,
)

IMAGE = 99


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([1, 2], [1, 2]), ([1, *[IMAGE] * 4], [1, IMAGE]), ([*[IMAGE] * 8, 5, *[IMAGE] * 4], [IMAGE, IMAGE, 5, IMAGE])],
    ids=["none", "one", "two side by side"],
)  # fmt: skip
def test_the_tokens_of_an_images_tile_become_one(ids, expected):
    assert one_token_per_image(ids, IMAGE, 4) == expected


@pytest.mark.parametrize("ids", [[1, 2], [1, IMAGE, IMAGE]])
def test_another_number_of_image_tokens_than_images_is_refused_with_both(ids):
    with pytest.raises(ValueError, match=f"{ids.count(IMAGE)} image tokens for 1 images"):
        check_image_tokens(ids, IMAGE, 1)


def test_image_tokens_are_replaced_by_a_token_of_the_prompt():
    assert with_stand_ins([IMAGE, 7, IMAGE], IMAGE) == [7, 7, 7]
    assert with_stand_ins([IMAGE], IMAGE) == [0]


def test_no_salt_of_a_text_request_is_one_of_the_multimodal_view():
    given = [None, "", "multimodal:", "multimodal", "text:"]
    texts, pictured = ({cache_salt(view, salt) for salt in given} for view in ("text", "multimodal"))
    assert not texts & pictured
    assert cache_salt("text", None) is None  # the base's own blocks


@pytest.mark.parametrize(("view", "has_images"), [("multimodal", False), ("text", True), ("both", True)])
def test_a_view_that_is_not_the_requests_own_is_refused(view, has_images):
    with pytest.raises(ValueError, match="the view follows from the images"):
        take_view({"view": view}, has_images)


def test_the_requests_own_view_may_be_named_and_does_not_reach_the_template():
    assert take_view({"view": "text", "tools": None}, False) == {"tools": None}
