"""A conversation with a server: what it is sent, and what becomes of its stream."""

import json

import pytest
from openai_stub import openai_stub
from PIL import Image

from genieblue.serving.server_conversation import ASKED_PICTURES, ASKED_TEXT, ServerConversation


@pytest.fixture
def server():
    with openai_stub() as server:
        yield server


@pytest.fixture
def conversation(server):
    return ServerConversation(f"{server.address}/v1")


def test_an_answer_is_streamed_and_stays_in_the_conversation(server, conversation):
    pieces = []
    result = conversation.ask("Which tree?", on_text=pieces.append)
    assert result == {"text": "An oak.", "view": ASKED_TEXT, "prompt_tokens": 9, "generated_tokens": 3}
    assert pieces == ["An ", "oak."] and server.asked[0]["model"] == "reader"
    conversation.ask("And this?")
    assert [message["content"] for message in server.asked[1]["messages"]] == ["Which tree?", "An oak.", "And this?"]


def test_later_turns_keep_the_images(server, conversation):
    assert conversation.ask("This?", [Image.new("RGB", (4, 4))])["view"] == ASKED_PICTURES
    assert conversation.ask("And now?")["view"] == ASKED_PICTURES
    assert server.asked[1]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_a_server_that_does_not_count_tokens_is_not_counted_for(server, conversation):
    server.events = server.events[:-1]
    assert conversation.ask("Which tree?")["generated_tokens"] is None


def test_an_answer_is_whole_with_its_reason_to_finish_though_the_server_says_no_more(server, conversation):
    last = {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}
    server.events, server.ending = [*server.events[:-1], last], b""
    assert conversation.ask("Which tree?")["text"] == "An oak."


@pytest.mark.parametrize(
    "fault, error, message",
    [
        ({"status": 400}, ValueError, r"refused the request \(400\): too many images$"),
        ({"status": 422, "refusal": b'{"detail": "no such field"}'}, ValueError, r"\(422\): no such field$"),
        ({"status": 502, "refusal": b"<html>Bad gateway</html>"}, ValueError, r"\(502\): <html>Bad gateway</html>$"),
        ({"status": 401}, ValueError, "Set OPENAI_API_KEY"),
        ({"events": [{"error": {"message": "out of memory"}}]}, ValueError, "of its answer: out of memory$"),
        ({"ending": b""}, OSError, "hung up in the middle"),
        ({"ending": b"", "announced": 99}, OSError, "hung up in the middle"),
        ({"ending": b"data: {\n\n"}, OSError, "no part of an answer"),
    ],
    ids=["refusal", "refusal of FastAPI", "refusal of a proxy", "key", "error in the stream", "ended", "died",
         "no JSON"],
)  # fmt: skip
def test_a_failed_turn_changes_nothing(server, conversation, fault, error, message):
    vars(server).update(fault)
    with pytest.raises(error, match=message):
        conversation.ask("Which tree?")
    assert conversation.messages == []


def models(*entries: dict) -> bytes:
    return json.dumps({"data": list(entries)}).encode()


@pytest.mark.parametrize(
    "content, error, message",
    [
        (b"<html>Hello</html>", OSError, "no server with OpenAI's API"),
        (b"[]", OSError, "no server with OpenAI's API"),
        (models(), ValueError, "has these models: none. Name one"),
        (models({"id": "reader"}, {"id": "base"}), ValueError, "has these models: base, reader. Name one"),
        (
            models({"id": "reader", "owned_by": "llamacpp"}),
            ValueError,
            "is llama.cpp, which needs to be told the view",
        ),
    ],
    ids=["a web page", "another API", "no model", "several models", "llama.cpp"],
)
def test_a_server_that_cannot_be_asked_is_refused_by_name(server, content, error, message):
    server.models = content
    with pytest.raises(error, match=message):
        ServerConversation(server.address)


def test_an_address_with_a_path_is_refused_by_name(server):
    with pytest.raises(OSError, match="without a path"):
        ServerConversation(f"{server.address}/elsewhere")


def test_one_of_several_models_can_be_named(server):
    server.models = models({"id": "reader"}, {"id": "base"})
    conversation = ServerConversation(server.address, "reader")
    conversation.ask("Which tree?")
    assert server.asked[0]["model"] == "reader"


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://"])
def test_an_address_without_a_server_is_named(address):
    with pytest.raises(OSError, match=f"No server answers at {address.rstrip('/')}"):
        ServerConversation(address)
