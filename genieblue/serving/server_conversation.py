"""A conversation with a GenieBlue behind a server with OpenAI's API, such as `genieblue serve`."""

import base64
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from modeling_genieblue.image_reading_genieblue import read_image
from modeling_genieblue.view_routing_genieblue import MULTIMODAL, TEXT

SECONDS = 600  # without a word from the server


class ServerConversation:
    """Keeps the messages of a conversation, as `Conversation` does; the server formats and answers them.

    The key of a server that asks for one is read from OPENAI_API_KEY.
    """

    completes_only = False

    def __init__(self, address: str):
        """`address` is that of the server, with or without `/v1`; `OSError` if nothing answers there."""
        self.address = address.rstrip("/").removesuffix("/v1")
        with self._request("/v1/models") as response:
            models = json.load(response).get("data") or []
        if not models:
            raise OSError(f"The server at {self.address} offers no model: start it with one.")
        self.name = models[0]["id"]
        self.reset()

    def reset(self) -> None:
        """Starts a new conversation."""
        self.messages: list[dict[str, Any]] = []

    def ask(
        self,
        prompt: str,
        images: Sequence[Any] = (),
        *,
        max_new_tokens: int = 512,
        on_text: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """One greedy turn, see `Conversation.ask`; the view is the one in which a GenieBlue runs such a request."""
        if not prompt.strip() and not images:
            raise ValueError("The prompt is empty: give a text or an image.")
        parts = [_image_part(read_image(image, index)) for index, image in enumerate(images)]
        content = [*parts, {"type": "text", "text": prompt}] if parts else prompt
        messages = [*self.messages, {"role": "user", "content": content}]
        request = {
            "model": self.name, "messages": messages, "max_tokens": max_new_tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        text, usage = "", {}
        with self._request("/v1/chat/completions", request) as response:
            for event in _events(response):
                usage = event.get("usage") or usage
                for choice in event.get("choices") or ():
                    piece = choice["delta"].get("content") or ""
                    text += piece
                    if piece and on_text is not None:
                        on_text(piece)
        self.messages = [*messages, {"role": "assistant", "content": text}]
        has_image = any(isinstance(message["content"], list) for message in messages)
        return {
            "text": text,
            "view": MULTIMODAL if has_image else TEXT,
            "prompt_tokens": usage.get("prompt_tokens", 0),
            "generated_tokens": usage.get("completion_tokens", 0),
        }

    def _request(self, path: str, document: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if document is None else json.dumps(document).encode()
        try:
            return urllib.request.urlopen(urllib.request.Request(self.address + path, data, headers), timeout=SECONDS)
        except urllib.error.HTTPError as error:
            reason = error.read(2000).decode(errors="replace")
            raise ValueError(f"The server at {self.address} refused the request ({error.code}): {reason}") from error
        except OSError as error:
            raise OSError(f"No server answers at {self.address} ({error}): start one there.") from error


def _events(response: Any) -> Iterator[dict[str, Any]]:
    """The documents of a stream of server-sent events; `ValueError` or `OSError` if it breaks off."""
    for line in response:
        if not line.startswith(b"data:"):
            continue
        if (data := line[5:].strip()) == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ValueError(f"The server stopped in the middle of its answer: {event['error']}")
        yield event
    raise OSError("The server hung up in the middle of its answer: ask again.")


def _image_part(image: Any) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
