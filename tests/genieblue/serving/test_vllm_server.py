"""`genieblue serve` with OpenAI's client: right answers, and errors that the client is told while the server lives.

Run by `make test-vllm`.
"""

import base64
import io
import os
import re
import socket
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

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


@contextmanager
def served(model, *vllm_options):
    """A server's address, as it prints it itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--max-images", "2", "--max-image-pixels", "1000000", "--max-length", "512"]
    command = [sys.executable, "-m", "genieblue", "serve", str(model), *options, "--dtype", "float32", "--"]
    log = model.parent / "serve.log"
    with open(log, "w") as file:
        server = subprocess.Popen(
            [*command, "--enforce-eager", "--disable-log-stats", *vllm_options],
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


@pytest.fixture(scope="module")
def address(model):
    with served(model) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as client:
        yield client


def answer_of(client, messages, **options):
    response = client.chat.completions.create(
        model=options.pop("model", "genieblue"), messages=messages, temperature=0, max_tokens=12, **options
    )
    if options.get("stream"):
        return "".join(chunk.choices[0].delta.content or "" for chunk in response if chunk.choices)
    return response.choices[0].message.content


@pytest.fixture
def ask(client):
    return partial(answer_of, client)


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


def bomb():
    """A small PNG whose header tells of 900 million pixels."""
    file = io.BytesIO()
    Image.new("1", (8, 8)).save(file, "PNG")
    small = file.getvalue()  # its header is the bytes from 12 to 29, a checksum follows
    header = small[12:16] + struct.pack(">II", 30_000, 30_000) + small[24:29]
    content = small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def url(address):
    return {"type": "image_url", "image_url": {"url": address}}


BAD = {
    "broken base64": (lambda: user(url("data:image/png;base64,@@@"), "What?"), "cannot be read: Non-base64"),
    "no image": (lambda: user(url("data:image/png;base64,AAAA"), "What?"), "image"),
    "100 megapixels": (lambda: user(url(large_image()), "What?"), "1000000"),
    "an image part without one": (lambda: user(url(""), "What?"), "holds no image"),
    "a path as what is an image in Python": (
        lambda: user({"type": "image_pil", "image_pil": __file__}, "What?"),
        "An image is a str",
    ),
    "paths in a list": (lambda: user({"type": "image_pil", "image_pil": [[__file__]]}, "What?"), "An image is a list"),
    "a decompression bomb": (lambda: user(url(bomb()), "What?"), "900000000 pixels"),
    "a web address": (lambda: user(url("http://127.0.0.1:1/x.png"), "What?"), "fetches no addresses"),
    "a file": (lambda: user(url("file:///etc/passwd"), "What?"), "fetches no addresses"),
    "too many images": (lambda: user(image(1), image(2), image(3), "What?"), "2"),
    "a long prompt": (lambda: user("word " * 10_000), "512"),
    "another medium": (lambda: user({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA"}}), "video"),
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
    with pytest.raises(openai.BadRequestError, match="mm_processor_kwargs are disabled"):
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


def test_a_request_may_lower_the_tiles_of_its_images_where_the_server_trusts_it(model, expected):
    name = "image of several tiles"
    chat = mixed_chats()[name]
    tokenizer = AutoTokenizer.from_pretrained(model)
    fewer = tokenizer.decode(transformers_answers(model, {name: chat}, max_tiles=4)[name], skip_special_tokens=True)
    assert fewer != expected[name]
    with (
        served(model, "--trust-request-mm-kwargs") as address,
        openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as client,
    ):

        def ask(**settings):
            return answer_of(client, chat, extra_body={"mm_processor_kwargs": settings})

        assert ask() == expected[name]
        assert ask(max_tiles=4) == fewer
        for settings, reason in (
            ({"max_tiles": 25}, "at most 16"),
            ({"max_tiles": 3}, "square number"),
            ({"max_tiles": "4"}, "square number"),
            ({"tile_size": 8}, "may set max_tiles alone"),
        ):
            with pytest.raises(openai.BadRequestError, match=reason):
                ask(**settings)
