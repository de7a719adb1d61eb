"""What the page shows, without the page: tiles, growing answers, the base alone."""

import threading

import numpy as np
import pytest
from test_conversation import make_chat, picture

from genieblue.serving.web.answers import Progress, ask_base_alone, stream
from genieblue.serving.web.look import facts
from genieblue.serving.web.tiles import GAP, draw_tiles

SHORT = {"max_new_tokens": 6}


def test_the_base_alone_answers_as_the_text_view_does():
    chat = make_chat()
    alone = ask_base_alone(chat, "Which tree is it?", on_text=lambda piece: None, **SHORT)
    assert alone == {**chat.ask("Which tree is it?", **SHORT), "view": "base alone"}


def test_a_streamed_answer_ends_with_the_result_of_the_conversation():
    *growing, last = stream(make_chat().ask, "Which tree is it?", stop=threading.Event(), **SHORT)
    assert last.result == make_chat().ask("Which tree is it?", **SHORT)
    assert growing and all(last.text.startswith(each.text) for each in growing)


def test_an_answer_that_is_stopped_ends_at_its_next_word_and_changes_no_conversation():
    chat, stop = make_chat(), threading.Event()
    pieces = stream(chat.ask, "Which tree is it?", stop=stop, max_new_tokens=1000)
    first = next(pieces)
    stop.set()
    *_, last = pieces
    assert last.stopped and last.result is None and last.text.startswith(first.text)
    assert chat.messages == []


def test_a_stream_that_is_left_ends_its_generation_before_the_next_one_begins():
    chat, lock = make_chat(), threading.Lock()
    pieces = stream(chat.ask, "Which tree is it?", stop=threading.Event(), lock=lock, max_new_tokens=1000)
    next(pieces)
    pieces.close()
    with lock:
        assert chat.messages == []


def test_an_error_of_the_conversation_is_raised_by_the_stream():
    with pytest.raises(ValueError, match="The prompt is empty"):
        list(stream(make_chat().ask, " ", stop=threading.Event()))


def answered(**result) -> Progress:
    return Progress("Oak", {"text": "Oak", "view": "text", "prompt_tokens": 9, "generated_tokens": 6, **result}, 2.0)


@pytest.mark.parametrize(
    "progress, words",
    [
        (answered(), ">text view</b> 9 prompt tokens · 6 generated in 2.0 s · 3.0 tokens/s<"),
        (answered(view="multimodal", generated_tokens=8), "· 4.0 tokens/s, cut off at the limit<"),
        (answered(view="server", generated_tokens=None), ">server</b> 2.0 s; the server does not count tokens<"),
        (Progress("Oa", stopped=True), ">Stopped: this turn is not part of the conversation.<"),
    ],
    ids=["whole", "cut off", "not counted", "stopped"],
)
def test_under_an_answer_stands_what_ran(progress, words):
    assert words in facts(progress, max_new_tokens=8)


def test_tiles_are_drawn_as_the_processor_gives_them_and_small_ones_enlarged():
    image = picture(width=48)
    drawn, words = draw_tiles(image, make_chat().processor.image_processor)  # of 24 pixels
    assert words == "thumbnail and 2×1 tiles (48×24 pixels, tiles of 24×24)"
    start = 96 + GAP + 3 * GAP
    pixels, source = np.asarray(drawn.convert("RGB")), np.asarray(image).repeat(4, axis=0).repeat(4, axis=1)
    assert (pixels[:, start : start + 96] == source[:, :96]).all()
    assert (pixels[:, start + 96 + GAP : start + 2 * 96 + GAP] == source[:, 96:]).all()


def test_an_image_of_one_tile_is_that_tile():
    image = picture(width=24)
    drawn, words = draw_tiles(image, make_chat().processor.image_processor)
    assert words == "1 tile without a thumbnail (24×24 pixels, tiles of 24×24)"
    assert (np.asarray(drawn)[::4, ::4] == np.asarray(image)).all()
