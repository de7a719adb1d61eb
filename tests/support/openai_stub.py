"""A server of OpenAI's protocol in this process, without a model: it answers and fails as a test tells it."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWER = [
    {"choices": [{"delta": {"role": "assistant"}}]},
    {"choices": [{"delta": {"content": "An "}}]},
    {"choices": [{"delta": {"content": "oak."}}]},
    {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}},
]


class OpenAIStub(ThreadingHTTPServer):
    """What it answers may be changed at any time; `asked` has the requests for answers."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[dict] = []
        self.models: bytes = json.dumps({"data": [{"id": "reader"}]}).encode()
        self.status = 200
        self.refusal: bytes = b'{"error": {"message": "too many images"}}'
        self.events: list[dict] = ANSWER
        self.ending: bytes = b"data: [DONE]\n\n"
        self.pause = 0.0  # seconds before each event
        self.announced = 0  # bytes that a reader waits for, besides those that come


class _Handler(BaseHTTPRequestHandler):
    server: OpenAIStub

    def do_GET(self):
        listed = self.path == "/v1/models"
        self._send(200 if listed else 404, self.server.models if listed else b"<html>Not found</html>")

    def do_POST(self):
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.server.status != 200:
            self._send(self.server.status, self.server.refusal)
            return
        events = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in self.server.events]
        self._send(200, *events, self.server.ending, more=self.server.announced)

    def _send(self, status: int, *pieces: bytes, more: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(sum(map(len, pieces)) + more))
        self.end_headers()
        with suppress(ConnectionError):  # a client that has left
            for piece in pieces:
                time.sleep(self.server.pause)
                self.wfile.write(piece)

    def log_message(self, *_):
        pass


@contextmanager
def openai_stub() -> Iterator[OpenAIStub]:
    """A server that is there for as long as the test needs it."""
    with OpenAIStub() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()
