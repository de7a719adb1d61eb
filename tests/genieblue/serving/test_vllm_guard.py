"""Requests that vLLM would answer in silence with less than they ask for get a 400; all others pass as they came."""

import asyncio
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from genieblue.serving.vllm.guard import RequestGuard, guard_servers, refusal

CHAT = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}
PROMPT = {"prompt": "What is it?"}

REFUSED = {
    "ready-made features": ({"token_ids": [1], "features": {"mm_hashes": {"image": ["a"]}}}, "features"),
    "a view": ({**CHAT, "view": "multimodal"}, "view is 'multimodal'"),
    "a view among vLLM's own options": ({**CHAT, "vllm_xargs": {"view": "text"}}, "view is 'text'"),
    "a view in a literal extra_body": ({**CHAT, "extra_body": {"vllm_xargs": {"view": "text"}}}, "view is 'text'"),
    "a view among options of sampling": ({"token_ids": [1], "sampling_params": {"extra_args": {"view": "x"}}}, "view"),
    "a view for a template that is not there": ({**PROMPT, "chat_template_kwargs": {"view": "multimodal"}}, "view"),
    "images beside a prompt": ({**PROMPT, "images": ["AAAA"]}, "images: images are not read"),
    "an address beside a prompt": ({**PROMPT, "image_url": "data:,"}, "image_url"),
    "data as in LLM.generate": ({**PROMPT, "multi_modal_data": {"image": "AAAA"}}, "multi_modal_data"),
    "images beside a message's content": ({"messages": [{"role": "user", "content": "?", "images": ["A"]}]}, "images"),
    "images in one of several chats": ({"messages": [[{"role": "user", "content": "?", "image": "A"}]]}, "image"),
    "an image that is no message": ({"input": [{"type": "input_image", "image_url": "data:,"}]}, "image_url"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_is_refused_by_name(name):
    request, reason = REFUSED[name]
    assert reason in (refusal(request) or "")


@pytest.mark.parametrize(
    "request_",
    [
        CHAT,
        PROMPT,
        {**CHAT, "chat_template_kwargs": {"view": "multimodal"}, "metadata": {"view": "front"}},  # the renderer's
        {**PROMPT, "images": [], "view": None, "vllm_xargs": {"answer": 1}},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]},
        {"messages": ["no message"], "sampling_params": 3},
        ["a list"],
    ],
)
def test_other_requests_are_vllms(request_):
    assert refusal(request_) is None


def passed(body, method="POST", more=()):
    """What the server behind the guard gets, and what the client does, of a body in two pieces."""
    pieces = [{"type": "http.request", "body": piece, "more_body": True} for piece in (body[:5], body[5:])]
    events = [*pieces, {"type": "http.request", "body": b"", "more_body": False}, *more]
    got, sent = [], []

    async def receive():
        return events.pop(0)

    async def send(event):
        sent.append(event)

    async def server(scope, receive, send):
        while len(got) < 3 + len(more):
            got.append(await receive())

    asyncio.run(RequestGuard(server)({"type": "http", "method": method}, receive, send))
    return got, sent


@pytest.mark.parametrize("body", [json.dumps(CHAT).encode(), b'{"view": ', b"\xff\xfe", b"[" * 100_000])
def test_a_body_reaches_the_server_as_it_came_and_so_does_what_follows(body):
    got, sent = passed(body, more=[{"type": "http.disconnect"}])
    assert b"".join(event.get("body", b"") for event in got) == body and not sent
    assert got[-1]["type"] == "http.disconnect"


def test_a_refused_request_does_not_reach_the_server():
    got, (start, content) = passed(json.dumps({**CHAT, "view": "text"}).encode())
    assert not got and start["status"] == 400
    assert json.loads(content["body"])["error"]["message"].startswith("view is 'text'")


def test_what_is_not_posted_is_not_looked_at():
    assert len(passed(b'{"view": 1}', method="GET")[0]) == 3


def test_a_server_gets_the_guard_once_behind_what_vllm_puts_before_it(monkeypatch):
    added, launchers = [], "vllm.entrypoints.launchers"
    for name in ("vllm", "vllm.entrypoints", launchers, f"{launchers}.app"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[launchers].app = app = sys.modules[f"{launchers}.app"]
    app.init_entrypoints_middleware = lambda *_: added.append("vLLM's own")
    guard_servers()
    guard_servers()
    app.init_entrypoints_middleware(None, SimpleNamespace(add_middleware=added.append), ("generate",))
    assert added == [RequestGuard, "vLLM's own"]
