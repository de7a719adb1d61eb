"""A conversation with a GenieBlue behind a server with OpenAI's API, such as `genieblue serve`."""

import base64
import http.client
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from modeling_genieblue.image_reading_genieblue import read_image

SECONDS_TO_LIST, SECONDS_TO_ANSWER = 20, 300  # without a word from the server
# No server tells which view ran, or whether there is a GenieBlue at all.
ASKED_TEXT, ASKED_PICTURES = "server, asked without pictures", "server, asked with pictures"
NO_API = (
    "What answers at {} is no server with OpenAI's API: give the address that such a server prints when it starts, "
    "without a path."
)
LLAMACPP = "llamacpp"  # the owner of its models


class ServerConversation:
    """Keeps the messages of a conversation, as `Conversation` does; the server formats and answers them.

    The key of a server that asks for one is read from OPENAI_API_KEY.
    """

    completes_only = False

    def __init__(self, address: str, name: str | None = None):
        """`address` is that of the server, with or without `/v1`, and `name` that of the model if it has several.

        Raises `OSError` if nothing answers there as OpenAI's API does, and `ValueError` for a choice of models.
        """
        self.address = address.rstrip("/").removesuffix("/v1")
        with self._request("/v1/models") as response:
            try:
                models = {each["id"]: each for each in json.load(response)["data"]}
            except (ValueError, LookupError, TypeError) as error:
                raise OSError(NO_API.format(self.address)) from error
        if any(each.get("owned_by") == LLAMACPP for each in models.values()):
            raise ValueError(
                f"The server at {self.address} is llama.cpp, which needs to be told the view of each request and "
                "would cut pictures its own way: ask it with examples/llamacpp_client.py."
            )
        if name is None and len(models) != 1:
            offered = ", ".join(sorted(models)) or "none"
            raise ValueError(f"The server at {self.address} has these models: {offered}. Name one (--served-model).")
        self.name = name or next(iter(models))
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
        """One greedy turn, see `Conversation.ask`; `view` says what the server was asked, as it tells no more."""
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
                    piece = (choice.get("delta") or {}).get("content") or ""
                    text += piece
                    if piece and on_text is not None:
                        on_text(piece)
        self.messages = [*messages, {"role": "assistant", "content": text}]
        has_image = any(isinstance(message["content"], list) for message in messages)
        return {
            "text": text,
            "view": ASKED_PICTURES if has_image else ASKED_TEXT,
            "prompt_tokens": usage.get("prompt_tokens"),  # None if the server does not count
            "generated_tokens": usage.get("completion_tokens"),
        }

    def _request(self, path: str, document: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data, seconds = None, SECONDS_TO_LIST
        if document is not None:
            data, seconds = json.dumps(document).encode(), SECONDS_TO_ANSWER
        try:
            return urllib.request.urlopen(urllib.request.Request(self.address + path, data, headers), timeout=seconds)
        except urllib.error.HTTPError as error:
            if error.code == 404 and document is None:
                raise OSError(NO_API.format(self.address)) from error
            remedy = " Set OPENAI_API_KEY." if error.code in (401, 403) else ""
            reason = _reason(error.read(100_000))
            raise ValueError(
                f"The server at {self.address} refused the request ({error.code}): {reason}{remedy}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"No server answers at {self.address} ({error}): start one there.") from error


def _events(response: Any) -> Iterator[dict[str, Any]]:
    """The documents of a stream of server-sent events; `ValueError` or `OSError` if it breaks off."""
    is_whole = False
    for line in _lines(response):
        if not line.startswith(b"data:"):
            continue
        if (data := line[5:].strip()) == b"[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise OSError(f"The server sent what is no part of an answer ({data[:80]!r}): ask again.") from error
        if "error" in event:
            raise ValueError(f"The server stopped in the middle of its answer: {_reason(data)}")
        is_whole |= any(choice.get("finish_reason") for choice in event.get("choices") or ())
        yield event
    if not is_whole:  # `transformers serve` says nothing after the last piece
        raise OSError("The server hung up in the middle of its answer: ask again.")


def _lines(response: Any) -> Iterator[bytes]:
    try:
        yield from response
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"The server hung up in the middle of its answer ({error}): ask again.") from error


def _reason(content: bytes) -> str:
    """What a server gives as the reason of an error, in the words of OpenAI's API, of FastAPI, or its own."""
    text = content.decode(errors="replace").strip()
    try:
        found = json.loads(text)
        found = found.get("error") or found.get("detail") or text
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        pass
    return text if len(text) <= 500 else f"{text[:500]} …"


def _image_part(image: Any) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
