"""A conversation with a server: what it is sent, and what becomes of its stream."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image

from genieblue.serving.server_conversation import ServerConversation

ANSWER = [
    {"choices": [{"delta": {"role": "assistant"}}]},
    {"choices": [{"delta": {"content": "An "}}]},
    {"choices": [{"delta": {"content": "oak."}}]},
    {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}},
]
DONE = b"data: [DONE]\n\n"


class FakeServer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "reader"}]}).encode())

    def do_POST(self):
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.status)
        self.end_headers()
        for event in self.server.events:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(self.server.ending)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = HTTPServer(("127.0.0.1", 0), FakeServer)
    server.asked, server.status, server.events, server.ending = [], 200, ANSWER, DONE
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def conversation(server):
    return ServerConversation(f"http://127.0.0.1:{server.server_port}/v1")


def test_an_answer_is_streamed_and_stays_in_the_conversation(server, conversation):
    pieces = []
    result = conversation.ask("Which tree?", on_text=pieces.append)
    assert result == {"text": "An oak.", "view": "text", "prompt_tokens": 9, "generated_tokens": 3}
    assert pieces == ["An ", "oak."] and server.asked[0]["model"] == "reader"
    conversation.ask("And this?")
    assert [message["content"] for message in server.asked[1]["messages"]] == ["Which tree?", "An oak.", "And this?"]


def test_later_turns_keep_the_images_and_their_view(server, conversation):
    assert conversation.ask("This?", [Image.new("RGB", (4, 4))])["view"] == "multimodal"
    assert conversation.ask("And now?")["view"] == "multimodal"
    assert server.asked[1]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    "fault, error, message",
    [
        ({"status": 400}, ValueError, "refused the request \\(400\\)"),
        ({"events": [{"error": {"message": "out of memory"}}]}, ValueError, "out of memory"),
        ({"ending": b""}, OSError, "hung up in the middle"),
    ],
    ids=["refusal", "error in the stream", "hung up"],
)
def test_a_failed_turn_changes_nothing(server, conversation, fault, error, message):
    vars(server).update(fault)
    with pytest.raises(error, match=message):
        conversation.ask("Which tree?")
    assert conversation.messages == []


def test_an_address_without_a_server_is_named():
    with pytest.raises(OSError, match="No server answers at http://127.0.0.1:1"):
        ServerConversation("http://127.0.0.1:1")
