"""Requests that vLLM would answer with less than they ask for, or in the wrong view: refused before it reads them.

Needs no vLLM, but to be put into its server.
"""

import functools
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

# Fields of a request in which a client may have put options, none of which vLLM reads for a `view`.
OPTIONS = ("extra_body", "vllm_xargs", "mm_processor_kwargs", "sampling_params", "extra_args")
IMAGE_NAMES = ("image", "multi_modal", "multimodal", "pixel_values")  # in names of fields, of which vLLM has none


def refusal(request: Any) -> str | None:
    """Why a request, the content of its JSON body, cannot be answered; `None` for one that vLLM reads as a whole."""
    if not isinstance(request, dict):
        return None
    if request.get("features"):
        # They reach the engine past the renderer, without what keeps cached blocks of the two views apart.
        return (
            "features: this server cuts images itself. Send them as image_url parts of messages to "
            "/v1/chat/completions."
        )
    for options in _options(request):
        if options.get("view") is not None:
            return (
                f"view is {options['view']!r}: in vLLM the view follows from the images, multimodal with them and "
                "text without. Leave it out."
            )
    for fields in (*_options(request), *_messages(request)):
        if (name := next((name for name in fields if fields[name] and _is_of_images(name)), None)) is not None:
            return (
                f"{name}: images are not read from there. Send them as image_url parts of a message's content to "
                "/v1/chat/completions; /v1/completions takes text alone."
            )
    return None


def _options(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The request itself, and the options inside of it."""
    yield request
    waiting = [request]
    while waiting:
        fields = waiting.pop()
        found = [fields[name] for name in OPTIONS if isinstance(fields.get(name), dict)]
        yield from found
        waiting += found
    template_options = request.get("chat_template_kwargs")
    has_messages = "messages" in request or "input" in request  # of which the renderer looks at these options
    if isinstance(template_options, dict) and not has_messages:
        yield template_options


def _messages(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Messages of a chat or of several; images belong into the parts of their content."""
    for name in ("messages", "input"):
        listed = request.get(name)
        for message in listed if isinstance(listed, list) else ():
            chat = message if isinstance(message, list) else [message]
            yield from (each for each in chat if isinstance(each, dict))


def _is_of_images(name: str) -> bool:
    return any(part in name.lower() for part in IMAGE_NAMES)


class RequestGuard:
    """ASGI middleware that answers what `refusal` tells of with 400, in the form of OpenAI's errors."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Reads the body of a POST, and hands it on as it came."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        events = [await receive()]
        while events[-1].get("more_body"):
            events.append(await receive())
        try:
            problem = refusal(json.loads(b"".join(event.get("body", b"") for event in events)))
        except (ValueError, RecursionError):  # no JSON, of which vLLM tells
            problem = None
        if problem is None:
            await self.app(scope, _replay(events, receive), send)
            return
        error = {"message": problem, "type": "BadRequestError", "param": None, "code": 400}
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})


def _replay(events: list[Any], receive: Callable) -> Callable[[], Awaitable[Any]]:
    """`receive` that gives the events once more, and then the later ones."""

    async def next_event() -> Any:
        return events.pop(0) if events else await receive()

    return next_event


def guard_servers() -> None:
    """Puts the guard into every server that this process starts from now on, behind vLLM's check of keys."""
    from vllm.entrypoints.launchers import app

    add_others = app.init_entrypoints_middleware
    if hasattr(add_others, "has_guard"):
        return

    @functools.wraps(add_others)
    def add_all(args: Any, server: Any, supported_tasks: Any) -> None:
        server.add_middleware(RequestGuard)
        add_others(args, server, supported_tasks)

    add_all.has_guard = True  # pyright: ignore[reportFunctionMemberAccess]
    app.init_entrypoints_middleware = add_all
