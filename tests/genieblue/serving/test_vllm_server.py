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
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

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


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@contextmanager
def running(command, log, address_in, **variables):
    """The address of a server that was started, once `address_in` finds it in what the server has written."""
    with open(log, "w") as file:
        server = subprocess.Popen(
            [*command, "--enforce-eager", "--disable-log-stats"],
            env={**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **variables},
            stdout=file, stderr=file,
        )  # fmt: skip
    try:
        for _ in range(1800):
            if (address := address_in(log.read_text())) is not None:
                yield address
                break
            assert server.poll() is None, log.read_text()[-4000:]
            time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-4000:])
    finally:
        server.terminate()
        server.wait(timeout=60)


def served(model, *vllm_options):
    """A server's address, as `genieblue serve` prints it."""
    options = ["--port", free_port(), "--max-images", "2", "--max-image-pixels", "1000000", "--max-length", "512"]
    command = [sys.executable, "-m", "genieblue", "serve", str(model), *options, "--dtype", "float32", "--"]

    def printed(log):
        found = re.search(r"Serving genieblue at (http://\S+)", log)
        return found[1] if found else None

    return running([*command, *vllm_options], model.parent / "serve.log", printed)


def served_by_vllm(model, names):
    """As `served`, by vLLM's own command as its users know it; `names` is a folder for the name of its package."""
    (names / "vllm-0.32.0.dist-info").mkdir()  # the build for CPUs has another, and the command asks for this one
    (names / "vllm-0.32.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    port = free_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--trust-remote-code"]
    command += ["--served-model-name", "genieblue", "--port", port, "--dtype", "float32", "--max-model-len", "512"]

    def answered(_):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        except OSError:
            return None
        return f"http://127.0.0.1:{port}/v1"

    paths = os.pathsep.join([str(names), os.environ.get("PYTHONPATH", "")])
    return running(command, names / "serve.log", answered, PYTHONPATH=paths)


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


def features():
    """What the endpoint for token ids takes for an image that was cut elsewhere."""
    return {"mm_hashes": {"image": ["0" * 64]}, "mm_placeholders": {"image": [{"offset": 1, "length": 4}]}}


def test_what_vllm_would_not_read_is_a_4xx(ask, client):
    for options in ({"view": "multimodal"}, {"vllm_xargs": {"view": "multimodal"}}):
        with pytest.raises(openai.BadRequestError, match="view is 'multimodal'"):
            ask([user("Hello")], extra_body=options)
    with pytest.raises(openai.BadRequestError, match="images: images are not read"):
        client.completions.create(model="genieblue", prompt="What?", max_tokens=4, extra_body={"images": ["AAAA"]})
    root = str(client.base_url).removesuffix("v1/")
    request = {"token_ids": [5, 0, 0, 0, 0, 7], "sampling_params": {"max_tokens": 4}}
    assert client.post(f"{root}inference/v1/generate", body=request, cast_to=dict)["choices"]
    with pytest.raises(openai.BadRequestError, match="features: this server cuts images itself"):
        client.post(f"{root}inference/v1/generate", body={**request, "features": features()}, cast_to=dict)


def test_vllms_own_command_answers_and_refuses_alike(model, expected, tmp_path):
    with (
        served_by_vllm(model, tmp_path) as address,
        openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as client,
    ):
        for name in ("text", "image"):
            assert answer_of(client, mixed_chats()[name]) == expected[name]
        for name in ("broken base64", "no image", "a web address", "a file"):
            message, reason = BAD[name]
            with pytest.raises(openai.BadRequestError, match=reason):
                answer_of(client, [message()])
        with pytest.raises(openai.BadRequestError, match="view is 'multimodal'"):
            answer_of(client, [user("Hello")], extra_body={"view": "multimodal"})
        assert answer_of(client, mixed_chats()["image"]) == expected["image"]


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
