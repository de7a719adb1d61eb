"""`transformers serve` and `transformers chat` on the folder of a GenieBlue, with the client of OpenAI."""

import base64
import io
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from tiny_genieblue import save_tiny_pair
from transformers_server import COMMAND, serving

from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor

openai = pytest.importorskip("openai", reason="the extra `clients` installs it")
pytest.importorskip("fastapi", reason="the extra `clients` installs it")
pytestmark = pytest.mark.slow

TEXT = [{"role": "user", "content": "What does the sign say?"}]


def about(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}
    ]}]  # fmt: skip


RED, BLUE = about(Image.new("RGB", (50, 30), "red")), about(Image.new("RGB", (90, 30), "blue"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    (home / "hub").mkdir()  # which `/v1/models` lists
    return {**os.environ, "HF_HOME": str(home)}


@pytest.fixture(scope="module")
def address(env, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("elsewhere"), env) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def ask(client, pair):
    def ask(messages, model=pair, **options):
        """The greedy answer; a streamed one put together."""
        options = {"temperature": 0, "max_tokens": 12, **options}
        response = client.chat.completions.create(model=str(model), messages=messages, **options)
        if options.get("stream"):
            return "".join(chunk.choices[0].delta.content or "" for chunk in response)
        return response.choices[0].message.content

    return ask


def test_texts_are_answered_as_by_the_base(ask, pair):
    answer = ask(TEXT)
    assert answer == ask(TEXT, stream=True) == ask(TEXT, model=pair.parent / "base")
    system = [{"role": "system", "content": "Be brief."}, *TEXT]
    assert ask(system) == ask(system, model=pair.parent / "base") != answer


def test_images_are_seen(ask):
    answers = [ask(RED), ask(BLUE), ask(TEXT)]
    assert len(set(answers)) == 3
    assert ask(RED, stream=True) == answers[0]


def test_images_are_answered_as_by_generate(ask, pair):
    processor = GenieBlueProcessor.from_pretrained(pair)
    inputs = processor.apply_chat_template(
        RED, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    model = GenieBlueForConditionalGeneration.from_pretrained(pair)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert ask(RED) == processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("messages", [TEXT, RED], ids=["text", "image"])
def test_stop_strings_end_an_answer(messages, ask):
    whole = ask(messages)
    stop = whole[len(whole) // 2]
    answer = ask(messages, stop=[stop])
    assert whole.startswith(answer) and len(answer) < len(whole) and stop in answer


def test_requests_at_once_are_answered_as_one_by_one(ask):
    chats = [TEXT, RED, BLUE, TEXT]
    with ThreadPoolExecutor(len(chats)) as pool:
        assert list(pool.map(ask, chats)) == [ask(chat) for chat in chats]


def test_responses_and_completions_are_answered(ask, client, pair):
    options = {"model": str(pair), "max_output_tokens": 12, "temperature": 0}
    assert client.responses.create(input=TEXT[0]["content"], stream=False, **options).output_text == ask(TEXT)
    events = client.responses.create(input=TEXT[0]["content"], stream=True, **options)
    assert [event.type for event in events][-1] == "response.completed"
    both = [
        client.completions.create(model=str(model), prompt="What does", max_tokens=5, temperature=0).choices[0].text
        for model in (pair, pair.parent / "base")
    ]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ],
    ids=["audio", "no image"],
)
def test_server_outlives_a_bad_request(part, ask, address, pair):
    expected = ask(TEXT)
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as other:
        with pytest.raises(openai.APIError):
            other.chat.completions.create(model=str(pair), messages=[{"role": "user", "content": [part]}])
    assert ask(TEXT) == expected


def test_chat_command_talks_to_it(ask, address, env, pair):
    command = [*COMMAND, "chat", str(pair), f"{address}/v1", "max_new_tokens=12", "do_sample=False"]
    typed = f"{TEXT[0]['content']}\nn\n!exit\n"  # no, do not go on generating
    result = subprocess.run(command, input=typed, cwd=pair, env=env, capture_output=True, text=True, timeout=120)
    assert ask(TEXT).split()[0] in result.stdout, result.stdout + result.stderr
