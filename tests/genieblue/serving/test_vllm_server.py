"""`genieblue serve` with OpenAI's client: right answers, and errors that the client is told while the server lives.

Run by `make test-vllm`.
"""

import base64
import io
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai_chats import image, mixed_chats, transformers_answers, user
from PIL import Image
from transformers import AutoTokenizer
from vllm_engine import ENVIRONMENT, save_wide_pair

import modeling_genieblue  # noqa: F401  # registers the classes that the references are loaded with

pytest.importorskip("vllm", reason="`make test-vllm` has an environment with it")
import openai  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_wide_pair(tmp_path_factory.mktemp("server"), "llama-tied")


@pytest.fixture(scope="module")
def address(model):
    """A server's address, as it prints it itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--max-images", "2", "--max-image-pixels", "1000000", "--max-length", "512"]
    command = [sys.executable, "-m", "genieblue", "serve", str(model), *options, "--dtype", "float32", "--"]
    log = model.parent / "serve.log"
    with open(log, "w") as file:
        server = subprocess.Popen(
            [*command, "--enforce-eager", "--disable-log-stats"],
            env={**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        for _ in range(1800):
            if found := re.search(r"Serving genieblue at (http://\S+)", log.read_text()):
                yield found[1]
                break
            assert server.poll() is None, log.read_text()[-4000:]
            time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-4000:])
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as client:
        yield client


@pytest.fixture
def ask(client):
    def ask(messages, **options):
        response = client.chat.completions.create(
            model=options.pop("model", "genieblue"), messages=messages, temperature=0, max_tokens=12, **options
        )
        if options.get("stream"):
            return "".join(chunk.choices[0].delta.content or "" for chunk in response if chunk.choices)
        return response.choices[0].message.content

    return ask


@pytest.fixture(scope="module")
def expected(model):
    """transformers' answers as text, by chat."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    answers = transformers_answers(model, mixed_chats())
    return {name: tokenizer.decode(ids, skip_special_tokens=True) for name, ids in answers.items()}


def test_requests_of_both_kinds_at_once_are_answered_as_by_transformers(ask, expected):
    chats = mixed_chats()
    with ThreadPoolExecutor(6) as pool:
        assert dict(zip(chats, pool.map(ask, chats.values()), strict=True)) == expected


@pytest.mark.parametrize("name", ["text", "image"])
def test_streams_give_the_same_answer(name, ask, expected):
    assert ask(mixed_chats()[name], stream=True) == expected[name]


def test_responses_give_the_same_answer(client, expected):
    picture, text = mixed_chats()["image"][0]["content"]
    content = [
        {"type": "input_image", "detail": "auto", "image_url": picture["image_url"]["url"]},
        {"type": "input_text", "text": text["text"]},
    ]
    response = client.responses.create(
        model="genieblue", input=[{"role": "user", "content": content}], temperature=0, max_output_tokens=12
    )
    assert response.output_text == expected["image"]


def large_image():
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def url(address):
    return {"type": "image_url", "image_url": {"url": address}}


BAD = {
    "broken base64": (lambda: user(url("data:image/png;base64,@@@"), "What?"), ""),
    "no image": (lambda: user(url("data:image/png;base64,AAAA"), "What?"), "image"),
    "100 megapixels": (lambda: user(url(large_image()), "What?"), "1000000"),
    "a web address": (lambda: user(url("http://127.0.0.1:1/x.png"), "What?"), "fetches no addresses"),
    "a file": (lambda: user(url("file:///etc/passwd"), "What?"), "fetches no addresses"),
    "too many images": (lambda: user(image(1), image(2), image(3), "What?"), "2"),
    "a long prompt": (lambda: user("word " * 10_000), "512"),
    "another medium": (lambda: user({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA"}}), ""),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_a_4xx_with_a_reason_and_the_next_is_right(name, ask, expected):
    message, reason = BAD[name]
    with pytest.raises(openai.APIStatusError) as caught:
        ask([message()])
    assert 400 <= caught.value.status_code < 500 and reason in str(caught.value)
    assert ask(mixed_chats()["image"]) == expected["image"]


def test_unknown_models_views_and_token_ids_are_a_4xx(ask, client):
    with pytest.raises(openai.NotFoundError):
        ask([user("Hello")], model="another")
    with pytest.raises(openai.BadRequestError, match="the view follows from the images"):
        ask([user("Hello")], extra_body={"chat_template_kwargs": {"view": "multimodal"}})
    with pytest.raises(openai.BadRequestError, match="out of vocabulary"):
        client.completions.create(model="genieblue", prompt=[5, 128, 7], max_tokens=4)
    with pytest.raises(openai.BadRequestError, match="mm_processor_kwargs"):
        ask(mixed_chats()["image"], extra_body={"mm_processor_kwargs": {"max_tiles": 1}})


def test_a_client_that_hangs_up_disturbs_nobody(ask, client, expected):
    stream = client.chat.completions.create(
        model="genieblue",
        messages=mixed_chats()["image"],
        max_tokens=300,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    assert ask(mixed_chats()["text"]) == expected["text"]
