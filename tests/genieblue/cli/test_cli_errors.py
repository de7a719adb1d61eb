"""What the command line says of models, bases, files and networks that are not as they should be."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import REPOSITORY, error_of, run_process
from PIL import Image
from tiny_genieblue import save_tiny_pair
from tiny_models import save_tiny_base

pytestmark = pytest.mark.usefixtures("settings_of_the_process_are_restored")


@pytest.mark.parametrize("command", ["info", "verify", "chat"])
def test_what_is_no_genieblue_is_told(work, command):
    options = ["-p", "hi"] if command == "chat" else []
    assert "not a " in error_of(command, work / "nothing", *options)
    (work / "empty").mkdir()
    assert "config.json" in error_of(command, "empty", *options)


def test_a_truncated_weight_file_is_told(work):
    path = work / "genieblue/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated or damaged" in error_of("info", "genieblue")
    assert "is damaged" in error_of("chat", "genieblue", "-p", "hi")


@pytest.fixture
def bad_images(work) -> Path:
    (work / "notes.png").write_text("dear diary")
    (work / "half.png").write_bytes((work / "scan.png").read_bytes()[:60])
    Image.new("1", (20_000, 20_000)).save(work / "bomb.png")
    return work


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "does not exist"),
        ("notes.png", "notes.png cannot be read as an image"),
        ("half.png", "half.png cannot be read as an image"),
        ("bomb.png", "decompression bomb"),
        (".", "cannot be read as an image"),
    ],
)
def test_bad_images_are_told_before_anything_is_loaded(bad_images, name, message):
    shutil.rmtree(bad_images / "base")  # would be missed later
    assert message in error_of("chat", "genieblue", "-p", "What is it?", "-i", name)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("genieblue", "genieblue is already a GenieBlue"),
        ("vision", "vision has model_type 'siglip_vision_model': expected a decoder-only language model"),
        ("nothing/here", "Give the folder or Hub id of the right base with --base."),
        ("other", "Give the folder or Hub id of the right base with --base."),
    ],
)
def test_a_wrong_base_is_told_in_words_of_the_command_line(work, base, message):
    save_tiny_base("llama", work / "other", seed=2)
    error = error_of("chat", "genieblue", "-p", "hi", "--base", f"./{base}")
    assert message in error.replace("./", "")
    assert "base_model=" not in error and "check_base" not in error and len(error) < 500


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        (["chat", "genieblue", "-p", "hi"], "Give the folder or Hub id of the right base with --base."),
        (["export", "lora", "genieblue", "--out", "o"], "Give the folder or Hub id of the right base with --base."),
        (["quantize", "genieblue", "--out", "o"], "This command takes no base but the recorded one."),
        (["stack", "genieblue", "--base", "vision/../base-2", "--out", "o"], "takes no base but the recorded one."),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_missing_base_is_told_with_what_the_command_has(work, command, remedy):
    (work / "base").rename(work / "base-2")
    error = error_of(*command)
    assert "that folder does not exist: put it there." in error and error.rstrip().endswith(remedy)


@pytest.mark.parametrize("command", [["chat", "-p", "hi"], ["quantize", "--out", "o"]], ids=lambda given: given[0])
def test_code_of_a_local_base_is_refused_with_the_option_that_allows_it(tmp_path, monkeypatch, command):
    monkeypatch.chdir(save_tiny_pair(tmp_path, "bluelm").parent)
    error = error_of(command[0], "genieblue", *command[1:])
    assert "needs Python code from its repository" in error and "the option is --trust-remote-code" in error
    assert "hf.co" not in error and "right base" not in error


ADDRESS = "http://us3r:passw0rd@127.0.0.1:1/x.png?key=t0ken#fr4gment"


@pytest.mark.parametrize(
    "command",
    [
        ["chat", "genieblue", "-p", "What is it?", "-i", ADDRESS],
        ["chat", "genieblue", "-p", "hi", "--base", ADDRESS],
        ["chat", ADDRESS, "-p", "hi"],
        ["info", ADDRESS],
        ["verify", ADDRESS],
        ["init", "--base", ADDRESS, "--vision", "vision", "--out", "reader"],
        ["init", "--base", "base", "--vision", ADDRESS, "--out", "reader"],
        ["push", "genieblue", ADDRESS],
    ],
    ids=lambda command: " ".join(command).replace(ADDRESS, "ADDRESS"),
)
def test_no_secret_of_an_address_is_told(work, command):
    error = error_of(*command)
    assert not [secret for secret in ("us3r", "passw0rd", "t0ken", "fr4gment") if secret in error], error


def test_a_debug_log_holds_no_secret_of_an_address(work):
    ran = run_process("--debug", "chat", work / "genieblue", "-p", "?", "-i", ADDRESS)
    assert "x.png could not be fetched" in ran.stderr
    # The command line itself is not in the traceback, but the last lines of the code that ran.
    assert not [secret for secret in ("us3r", "passw0rd", "t0ken", "fr4gment") if secret in ran.stderr], ran.stderr


@pytest.mark.parametrize("name", ["scan.png", "genieblue/config.json", ""])
def test_a_model_that_can_be_neither_a_folder_nor_on_the_hub_is_told(work, name):
    expected = "is a file: give the folder" if name else "name is empty: give a folder"
    for command in (["info", name], ["verify", name], ["chat", name, "-p", "hi"]):
        assert expected in error_of(*command)
    assert expected in error_of("init", "--base", name, "--vision", "vision", "--out", "reader")
    if not name:
        assert "name is empty" in error_of("info", "genieblue", "--base", "", code=2)


@pytest.mark.parametrize("file", ["model.safetensors", "processor_config.json"])
def test_an_incomplete_folder_is_told_in_one_sentence(work, file):
    (work / "genieblue" / file).unlink()
    message = error_of("chat", "genieblue", "-p", "hi")
    assert message == f"Error: genieblue has no {file}: it is incomplete; save or fetch it again.\n"


@pytest.mark.parametrize(("change", "name"), [(5, "text_config"), ([1], "base_model_name_or_path")])
def test_info_names_a_damaged_config(work, change, name):
    path = work / "genieblue/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: change}))
    assert f"config.json has {change} for {name}" in error_of("info", "genieblue")


def test_a_device_that_is_not_there_is_told(work):
    assert "Unknown device 'gpu'" in error_of("chat", "genieblue", "-p", "hi", "--device", "gpu")
    if not torch.cuda.is_available():
        assert "0 CUDA devices" in error_of("chat", "genieblue", "-p", "hi", "--device", "cuda")


def test_a_missing_repository_is_told(hub):
    for command in (["info"], ["verify"], ["chat", "-p", "hi"]):
        message = error_of(command[0], "you/nothing", *command[1:])
        assert "you/nothing is not a local folder" in message


def test_a_gated_repository_is_told(hub, good, monkeypatch):
    hub.commit_folder("you/reader", good / "genieblue")
    hub.gate("you/reader")
    monkeypatch.setenv("HF_TOKEN", hub.stranger_token)
    for command in (["info"], ["verify"], ["chat", "-p", "hi"]):
        assert "gated" in error_of(command[0], "you/reader", *command[1:]).lower()


def test_no_network_is_told(no_network):
    for command in (["info"], ["verify"], ["chat", "-p", "hi"]):
        message = error_of(command[0], "you/reader", *command[1:])
        assert (
            "you/reader is not a local folder. The Hub cannot be reached: check the network, or HF_ENDPOINT."
            in message
        )
        assert "offline" not in message and len(message.splitlines()) == 1 + ("retrying" in message)


def test_no_network_is_told_of_a_base(no_network, work):
    message = error_of("init", "--base", "you/base", "--vision", "vision", "--out", "reader")
    assert (
        "base you/base could not be loaded. The Hub cannot be reached: check the network, or HF_ENDPOINT." in message
    )


def test_retries_of_the_hub_are_one_line():
    """In a process of its own, whose libraries are imported after the command has begun to speak."""
    script = (
        "import logging; from genieblue.cli import terminal\nterminal.configure_logging()\nterminal.quiet_hub()\n"
        "log = logging.getLogger('huggingface_hub.utils._http')\n"
        "for number in (1, 2): log.warning('thrown while requesting'); log.warning('Retrying in %ds', number)\n"
        "log.warning('Something else')"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert process.stderr.splitlines() == [
        "Warning: The Hub does not respond; retrying …", "Warning: Something else"
    ]  # fmt: skip


@pytest.fixture(scope="module")
def logged() -> dict[str, str]:
    """By value of GENIEBLUE_DEBUG, what two libraries say: in processes that part when the libraries are imported."""
    script = (
        "import logging, os, sys, transformers, huggingface_hub\n"
        "from genieblue.cli import terminal\n"
        "for value in sys.argv[1:]:\n"
        "    if os.fork():\n"
        "        os.wait()\n"
        "        print('END', file=sys.stderr, flush=True)\n"
        "        continue\n"
        "    os.environ['GENIEBLUE_DEBUG'] = value\n"
        "    terminal.configure_logging()\n"
        "    terminal.quiet_transformers()\n"
        "    for name in ('transformers.x', 'huggingface_hub.x'):\n"
        "        logging.getLogger(name).info('http://u:pw@host/?t=S')\n"
        "    break\n"
    )
    values = ("1", "true", "0", "")
    command = [sys.executable, "-c", script, *values]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return dict(zip(values, process.stderr.split("END\n")[:-1], strict=True))


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_logs_of_the_libraries_are_shown_without_secrets_if_they_are_asked_for(logged, value, shown):
    lines = [line for line in logged[value].splitlines() if line.startswith("INFO") and ".x: " in line]
    assert [line.split()[1] for line in lines] == ["transformers.x:", "huggingface_hub.x:"] * shown
    assert "pw" not in logged[value] and "t=S" not in logged[value]


def test_a_full_disk_of_the_cache_is_named(hub, work, monkeypatch):
    def disk_full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    hub.commit_folder("you/reader", work / "genieblue")
    monkeypatch.setattr("huggingface_hub.file_download.http_get", disk_full)
    for command in (["info"], ["chat", "-p", "hi"]):
        message = error_of(command[0], "you/reader", *command[1:])
        assert f"cache, {hub.home}/hub, is full" in message and "HF_HOME" in message
