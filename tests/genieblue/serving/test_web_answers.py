"""What the page shows, without the page: tiles, growing answers, the base alone."""

import numpy as np
import pytest
from test_conversation import make_chat, picture

from genieblue.serving.web.answers import ask_base_alone, stream
from genieblue.serving.web.tiles import GAP, draw_tiles

SHORT = {"max_new_tokens": 6}


def test_the_base_alone_answers_as_the_text_view_does():
    chat = make_chat()
    alone = ask_base_alone(chat, "Which tree is it?", on_text=lambda piece: None, **SHORT)
    assert alone == {**chat.ask("Which tree is it?", **SHORT), "view": "base alone"}


def test_a_streamed_answer_ends_with_the_result_of_the_conversation():
    *growing, last = stream(make_chat().ask, "Which tree is it?", **SHORT)
    assert last.result == make_chat().ask("Which tree is it?", **SHORT)
    assert all(last.text.startswith(each.text) for each in growing) and "text view" in last.facts


def test_a_stream_that_is_left_changes_no_conversation():
    chat = make_chat()
    pieces = stream(chat.ask, "Which tree is it?", max_new_tokens=40)
    next(pieces)
    pieces.close()
    assert chat.messages == []


def test_an_error_of_the_conversation_is_raised_by_the_stream():
    with pytest.raises(ValueError, match="The prompt is empty"):
        list(stream(make_chat().ask, " "))


def test_tiles_are_drawn_as_the_processor_gives_them():
    processor = make_chat().processor.image_processor  # of 24 pixels
    image = picture(width=48)
    drawn, words = draw_tiles(image, processor)
    assert words == "thumbnail and 2×1 tiles"
    start = 24 + GAP + 3 * GAP
    pixels, source = np.asarray(drawn), np.asarray(image)
    assert (pixels[:24, start : start + 24] == source[:, :24]).all()
    assert (pixels[:24, start + 24 + GAP : start + 48 + GAP] == source[:, 24:]).all()


def test_an_image_of_one_tile_is_that_tile():
    image = picture(width=24)
    drawn, words = draw_tiles(image, make_chat().processor.image_processor)
    assert words == "1 tile, no thumbnail" and (np.asarray(drawn) == np.asarray(image)).all()
