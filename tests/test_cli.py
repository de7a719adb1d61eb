"""The command line as a user meets it: what is printed where, which exit code, what an error says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_genieblue import save_tiny_pair, train_a_little
from tiny_models import save_tiny_base, tiny_vision_tower
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from conversion import verify
from genieblue import terminal
from genieblue.cli import app

REPOSITORY = Path(__file__).parents[1]
TABLE_PARTS = ["language_model", "vision_tower", "multi_modal_projector", "replicated_blocks", "lora"]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """`base`, `vision`, a trained-looking `genieblue`, and `scan.png`."""
    folder = tmp_path_factory.mktemp("good")
    save_tiny_pair(folder)
    tiny_vision_tower().save_pretrained(folder / "vision")
    Image.new("RGB", (48, 24), "red").save(folder / "scan.png")
    return folder


@pytest.fixture
def work(good, tmp_path, monkeypatch) -> Path:
    """A copy that a test may change, as the current folder."""
    folder = shutil.copytree(good, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True)
def settings_of_the_process_are_restored(monkeypatch):
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    monkeypatch.delenv("GENIEBLUE_DEBUG", raising=False)
    yield
    terminal._debug = False
    transformers_logging.set_verbosity(verbosity)
    if had_bars:
        transformers_logging.enable_progress_bar()


def run(*arguments, code: int = 0, **options):
    """Runs the command in this process; fails unless it ends with `code`."""
    result = CliRunner().invoke(app, list(map(str, arguments)), **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments, **options):
    """The one JSON document that is all of stdout."""
    return json.loads(run(*arguments, **options).stdout)


def error_of(*arguments, code: int = 1, **options) -> str:
    result = run(*arguments, code=code, **options)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def run_process(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "genieblue", *map(str, arguments)]
    options = {"cwd": REPOSITORY, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run(command, **options)


# The program


def test_help_comes_without_the_heavy_libraries():
    script = (
        "import sys; from typer.testing import CliRunner; from genieblue.cli import app\n"
        "for line in (['--help'], ['train', '--help'], ['chat']):\n    print(CliRunner().invoke(app, line).output)\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'huggingface_hub') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True).stdout
    assert output.splitlines()[-1] == "[]"
    for command in ("init", "train", "chat", "info", "params", "verify", "push", "demo"):
        assert f"  {command} " in output


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["info"],
        ["init", "--base", "x"],
        ["train", "--stage", "3"],
        ["chat", "x", "--view", "both"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_exit_code_2(arguments):
    assert error_of(*arguments, code=2)


def test_debug_shows_where_an_error_comes_from(work):
    with pytest.raises(FileNotFoundError):
        run("--debug", "info", work / "nothing")


def test_a_mistake_of_the_program_is_not_taken_for_a_users(monkeypatch):
    def broken(*_args):
        raise TypeError("a mistake")

    monkeypatch.setattr("genieblue.parameters.count_trainable", broken)
    with pytest.raises(TypeError):
        run("params", "bluelm-3b")


@pytest.mark.parametrize(
    ("text", "name", "extra"),
    [
        ("no", "sklearn.datasets", "demo"),
        ("no", "accelerate", "train"),
        ("Loading needs it: `pip install 'genieblue[quantization]'`.", "accelerate", "quantization"),
    ],
)
def test_a_missing_optional_library_names_its_extra(monkeypatch, text, name, extra):
    def broken(*_args):
        raise ModuleNotFoundError(text, name=name)

    monkeypatch.setattr("genieblue.parameters.count_trainable", broken)
    assert f"pip install 'genieblue[{extra}]'" in error_of("params", "bluelm-3b")


# params and info


def test_params_as_json():
    counted = run_json("params", "bluelm-3b", "--json")
    assert set(counted) == {"trainable_parameters", "parts"}
    assert f"{counted['trainable_parameters'] / 1e6:.2f}" == "1005.73"
    assert sum(counted["parts"].values()) == counted["trainable_parameters"]


def test_params_as_a_table():
    output = run("params", "qwen2.5-3b", "--structure", "lora", "--placement", "post").stdout
    assert "456.84 M" in output and "replicated_blocks" not in output


def test_an_unknown_preset_is_told_with_the_known_ones():
    assert "choose one of bluelm-3b, qwen2.5-3b" in error_of("params", "gpt-5")


def test_info_as_json(work):
    parts = run_json("info", "genieblue", "--json")["parts"]
    assert list(parts) == TABLE_PARTS
    own = load_file(work / "genieblue/model.safetensors")
    projector = [value for name, value in own.items() if name.startswith("multi_modal_projector.")]
    assert parts["multi_modal_projector"] == {
        "parameters": sum(value.numel() for value in projector),
        "bytes": sum(value.numel() * 4 for value in projector),
    }
    base = load_file(work / "base/model.safetensors")
    assert parts["language_model"]["parameters"] == sum(value.numel() for value in base.values())


def test_info_as_a_table(work):
    output = run("info", "genieblue").stdout
    assert "GenieBlue on ../base" in output and "LoRA rank 4" in output
    assert all(part in output for part in TABLE_PARTS)


def test_info_without_the_base_still_tells_of_the_rest(work):
    shutil.rmtree(work / "base")
    result = run("info", "genieblue", "--json")
    assert json.loads(result.stdout)["parts"]["language_model"] == {"parameters": None, "bytes": None}
    assert "size of the base is not known" in result.stderr


def test_info_of_a_repository_downloads_no_weights(hub, good):
    hub.commit_folder("maker/base", good / "base")
    config = json.loads((good / "genieblue/config.json").read_text())
    hub.commit_folder("you/reader", good / "genieblue")
    hub.commit("you/reader", {"config.json": json.dumps(config | {"base_model_name_or_path": "maker/base"}).encode()})
    local = run_json("info", good / "genieblue", "--json")
    assert run_json("info", "you/reader", "--json") == local
    assert not [path for path in hub.home.rglob("*.safetensors")]


@pytest.mark.parametrize("command", ["info", "verify", "chat"])
def test_what_is_no_genieblue_is_told(work, command):
    options = ["-p", "hi"] if command == "chat" else []
    assert "no folder" in error_of(command, work / "nothing", *options)
    (work / "empty").mkdir()
    assert "config.json" in error_of(command, "empty", *options)


def test_a_truncated_weight_file_is_told(work):
    path = work / "genieblue/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated or damaged" in error_of("info", "genieblue")
    assert "is damaged" in error_of("chat", "genieblue", "-p", "hi")


# chat


def test_chat_as_json(work):
    answer = run_json("chat", "genieblue", "-p", "What is it?", "-i", "scan.png", "--json", "--max-new-tokens", 4)
    assert set(answer) == {"text", "view", "prompt_tokens", "generated_tokens"}
    assert (answer["view"], answer["generated_tokens"]) == ("multimodal", 4)
    text_only = run_json("chat", "genieblue", "-p", "What is it?", "--json", "--max-new-tokens", 4)
    assert text_only["view"] == "text" and text_only["prompt_tokens"] < answer["prompt_tokens"]


def test_an_answer_goes_to_stdout_and_its_view_to_stderr(work):
    arguments = ("chat", "genieblue", "-p", "What is it?", "--max-new-tokens", 4)
    result = run(*arguments)
    assert result.stdout == run_json(*arguments, "--json")["text"] + "\n"
    assert "[text view, " in result.stderr


def test_stdout_of_a_process_is_json_and_stderr_is_empty(work):
    process = run_process("chat", work / "genieblue", "-p", "hi", "--json", "--max-new-tokens", 2)
    assert set(json.loads(process.stdout)) == {"text", "view", "prompt_tokens", "generated_tokens"}
    assert process.stderr == ""


def test_a_conversation_reads_lines_and_commands(work):
    lines = "Hello\n/image scan.png\nAnd this?\nWhy?\n/image none.png\n/what\n\n/reset\nHello\n/quit\nnever\n"
    result = run("chat", "genieblue", "--max-new-tokens", 4, input=lines)
    views = [line.split()[0] for line in result.stderr.splitlines() if " view, " in line]
    assert views == ["[text", "[multimodal", "[multimodal", "[text"]
    answers = result.stdout.splitlines()
    assert len(answers) == 4 and answers[0] == answers[3]
    assert "'none.png' does not exist" in result.stderr and "no command /what" in result.stderr


def test_an_image_of_the_command_line_goes_with_the_first_line(work):
    result = run("chat", "genieblue", "-i", "scan.png", "--max-new-tokens", 2, input="What is it?\n")
    assert "[multimodal view" in result.stderr


def test_a_turn_that_fails_does_not_end_the_conversation(work):
    result = run(
        "chat", "genieblue", "--view", "text", "--max-new-tokens", 2, input="/image scan.png\nhi\n/reset\nhi\n"
    )
    assert "cannot see" in result.stderr and "[text view" in result.stderr


def test_a_base_without_chat_template_is_said_to_complete(tmp_path):
    folder = save_tiny_pair(tmp_path)
    for place in ("base", "genieblue"):
        (tmp_path / place / "chat_template.jinja").unlink()
    settings = json.loads((folder / "processor_config.json").read_text()) | {"base_has_chat_template": False}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    assert "no chat template" in run("chat", folder, "-p", "A tree", "--max-new-tokens", 2).stderr


def test_json_needs_one_prompt(work):
    assert "--prompt" in error_of("chat", "genieblue", "--json", code=2)


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


def test_a_base_elsewhere_can_be_named(work):
    (work / "base").rename(work / "elsewhere")
    assert "there is no such folder" in error_of("chat", "genieblue", "-p", "hi")
    run("chat", "genieblue", "-p", "hi", "--base", "elsewhere", "--max-new-tokens", 2)


def test_remote_code_is_never_asked_about(tmp_path):
    folder = save_tiny_pair(tmp_path, "bluelm")
    result = run("chat", folder, "-p", "hi", code=1, input="y\n")
    assert "--trust-remote-code" in result.stderr and "[y/N]" not in result.output
    run("chat", folder, "-p", "hi", "--trust-remote-code", "--max-new-tokens", 2)


def test_a_device_that_is_not_there_is_told(work):
    assert "Unknown device 'gpu'" in error_of("chat", "genieblue", "-p", "hi", "--device", "gpu")
    if not torch.cuda.is_available():
        assert "0 CUDA devices" in error_of("chat", "genieblue", "-p", "hi", "--device", "cuda")


# The Hub


def test_a_missing_repository_is_told(hub):
    for command in (["info"], ["verify"], ["chat", "-p", "hi"]):
        message = error_of(command[0], "you/nothing", *command[1:])
        assert "you/nothing is no folder here" in message


def test_a_gated_repository_is_told(hub, good, monkeypatch):
    hub.commit_folder("you/reader", good / "genieblue")
    hub.gate("you/reader")
    monkeypatch.setenv("HF_TOKEN", hub.stranger_token)
    for command in (["info"], ["verify"], ["chat", "-p", "hi"]):
        assert "gated" in error_of(command[0], "you/reader", *command[1:]).lower()


def test_no_network_is_told(no_network):
    for command in (["info"], ["verify"], ["chat", "-p", "hi"]):
        assert "you/reader is no folder here" in error_of(command[0], "you/reader", *command[1:])


def test_push_publishes_and_prints_the_address(hub, work, tmp_path):
    hub.commit_folder("maker/base", work / "base")
    run("init", "--base", "maker/base", "--vision", "vision", "--out", "reader")
    train_a_little(work / "reader")
    result = run("push", "reader", "you/reader", "--private")
    assert len(hub.commits("you/reader")) == 1
    assert result.stdout.strip().startswith(hub.endpoint)
    run("chat", "you/reader", "-p", "hi", "--max-new-tokens", 2)


def test_push_tells_how_to_log_in(hub, work, monkeypatch):
    hub.commit_folder("maker/base", work / "base")
    run("init", "--base", "maker/base", "--vision", "vision", "--out", "reader")
    train_a_little(work / "reader")
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in error_of("push", "reader", "you/reader")
    monkeypatch.setattr("socket.socket.connect", lambda *_args: (_ for _ in ()).throw(ConnectionRefusedError("no")))
    huggingface_hub.close_session()
    assert "cannot be reached" in error_of("push", "reader", "you/reader", "--token", hub.token)


def test_push_refuses_a_local_base(hub, work):
    message = error_of("push", "genieblue", "you/reader")
    assert "local path" in message and "nothing was sent" in message


# init, train, verify


def test_init_makes_a_model_that_chats(work):
    result = run("init", "--base", "base", "--vision", "vision", "--out", "reader", "--rank", 2, "--placement", "post")
    assert "LoRA rank 2" in result.stdout and "(post)" in result.stdout
    assert "genieblue train --stage 1 --model reader" in result.stderr
    run("chat", "reader", "-p", "What is it?", "-i", "scan.png", "--max-new-tokens", 2)


def test_init_does_not_overwrite_unasked(work):
    assert "--overwrite" in error_of("init", "--base", "base", "--vision", "vision", "--out", "genieblue")
    run("init", "--base", "base", "--vision", "vision", "--out", "genieblue", "--overwrite")


def test_init_reads_a_chat_template_from_a_file(work):
    (work / "base/chat_template.jinja").unlink()
    template = "{% for message in messages %}{{ message['content'] }};{% endfor %}"
    (work / "mine.jinja").write_text(template)
    run("init", "--base", "base", "--vision", "vision", "--out", "reader", "--chat-template", "mine.jinja")
    assert (work / "reader/chat_template.jinja").read_text() == template
    arguments = ("init", "--base", "base", "--vision", "vision", "--out", "other", "--chat-template", "none.jinja")
    assert "none.jinja" in error_of(*arguments)


def test_init_names_what_is_wrong_with_a_base(work):
    save_tiny_base("llama", work / "short", num_hidden_layers=2)
    arguments = ("--vision", "vision", "--out", "reader")
    assert "at least 4 blocks" in error_of("init", "--base", "short", *arguments)
    assert "expected a SigLIP" in error_of("init", "--base", "base", "--vision", "base", "--out", "reader")


def write_data(path: Path, bad_line: bool = False) -> Path:
    content = [{"type": "image", "image": "scan.png"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    lines = [json.dumps({"messages": messages})] * 4
    path.write_text("\n".join(lines[:2] + ["{oops"] * bad_line + lines[2:]))
    return path


def test_train_runs_both_stages(work):
    write_data(work / "data.jsonl")
    common = ("--data", "data.jsonl", "--batch-size", 2, "--learning-rate", 1e-2)
    first = run("train", "--stage", 1, "--model", "genieblue", "--out", "one", *common)
    assert "stage 1, 2 steps over 4 samples" in first.stdout
    second = run("train", "--stage", 2, "--model", "one", "--out", "two", "--epochs", 2, *common)
    assert "stage 2, 4 steps over 4 samples" in second.stdout
    before, after = (load_file(work / place / "model.safetensors") for place in ("one", "two"))
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("vision_tower."))


def test_train_names_a_bad_line_and_can_leave_it_out(work):
    write_data(work / "data.jsonl", bad_line=True)
    common = ("train", "--stage", 2, "--model", "genieblue", "--data", "data.jsonl", "--steps", 1, "--batch-size", 2)
    message = error_of(*common, "--out", "two")
    assert "data.jsonl:3" in message and "--skip-bad" in message
    assert not (work / "two").exists()
    assert "over 4 samples" in run(*common, "--out", "two", "--skip-bad").stdout


def test_verify_as_json(work, monkeypatch):
    monkeypatch.setattr(verify, "CHECKS", {name: verify.CHECKS[name] for name in ("folder", "text_view")})
    verified = run_json("verify", "genieblue", "--json")
    assert set(verified) == {"ok", "checks"} and verified["ok"] is True
    assert [check["name"] for check in verified["checks"]] == ["folder", "text_view"]
    assert all(set(check) == {"name", "ok", "detail"} for check in verified["checks"])


def test_verify_fails_with_exit_code_1(work, monkeypatch):
    monkeypatch.setattr(verify, "CHECKS", {name: verify.CHECKS[name] for name in ("folder", "base_files")})
    weights = work / "base/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    output = run("verify", "genieblue", code=1).stdout
    assert output.count("ok    ") == 1 and "FAIL  base_files" in output and "1 of 2 checks passed" in output
    verified = run_json("verify", "genieblue", "--json", code=1)
    assert (verified["ok"], [check["ok"] for check in verified["checks"]]) == (False, [True, False])
