"""The command line as a user meets it: what is printed where, which exit code, what an error says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from chat_lines import good_line
from command_line import REPOSITORY, error_of, run, run_json, run_process
from safetensors.torch import load_file
from tiny_genieblue import save_tiny_pair, train_a_little
from tiny_models import save_tiny_base

from conversion.verification import verify
from genieblue.cli.terminal import with_home

TABLE_PARTS = ["language_model", "vision_tower", "multi_modal_projector", "replicated_blocks", "lora"]
pytestmark = pytest.mark.usefixtures("settings_of_the_process_are_restored")


# The program


def test_help_comes_without_the_heavy_libraries():
    script = (
        "import sys; from typer.testing import CliRunner; from genieblue.cli.app import app\n"
        "for line in (['--help'], ['train', '--help'], ['chat']):\n    print(CliRunner().invoke(app, line).output)\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'huggingface_hub') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True).stdout
    assert output.splitlines()[-1] == "[]"
    for command in ("init", "train", "chat", "info", "params", "verify", "push", "demo"):
        assert f"  {command} " in output


def test_the_home_folder_is_expanded_but_in_free_text(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["train", "--out=~/x", "--model", "~/m", "-i", "~", "--prompt", "~/x?", "--prompt=~/x?", "-p", "~", "a~/b"]
    expected = ["train", "--out=/home/me/x", "--model", "/home/me/m", "-i", "/home/me", *given[6:]]
    assert with_home(given) == expected


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

    monkeypatch.setattr("genieblue.lab.parameters.count_trainable", broken)
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

    monkeypatch.setattr("genieblue.lab.parameters.count_trainable", broken)
    assert f"pip install 'genieblue[{extra}]'" in error_of("params", "bluelm-3b")


def test_a_library_that_is_too_old_is_one_sentence_and_a_broken_import_a_traceback(monkeypatch):
    def old(*_args):
        raise ImportError("GenieBlue needs transformers 5.12 or newer; 5.4.0 is installed", name="transformers")

    monkeypatch.setattr("genieblue.lab.parameters.count_trainable", old)
    assert error_of("params", "bluelm-3b") == (
        "Error: GenieBlue needs transformers 5.12 or newer; 5.4.0 is installed\n"
    )

    def broken(*_args):
        from genieblue.cli.app import nothing  # noqa: F401

    monkeypatch.setattr("genieblue.lab.parameters.count_trainable", broken)
    with pytest.raises(ImportError, match="cannot import name"):
        run("params", "bluelm-3b")


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        (
            "matplotlib",
            "train",
            ["train", "--model", "genieblue", "--data", "chats.jsonl", "--stage", 2, "--out", "o"],
        ),
        ("matplotlib", "train", ["data", "check", "chats.jsonl", "--out", "report.png"]),
        ("rapidfuzz", "eval", ["eval", "genieblue", "--data", "chats.jsonl", "--metric", "anls"]),
    ],
    ids=["train", "data check", "eval"],
)
def test_a_package_that_is_needed_at_the_end_is_missed_at_the_start(work, monkeypatch, package, extra, arguments):
    for module in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    Path("chats.jsonl").write_text(json.dumps(good_line()) + "\n")
    for step in ("genieblue.training.trainer.StageTrainer.train", "genieblue.data.report.check_data",
                 "genieblue.evaluation.evaluate.evaluate"):  # fmt: skip
        monkeypatch.setattr(step, lambda *_, **__: pytest.fail("began"))
    told = error_of(*arguments)
    assert package in told and f"pip install 'genieblue[{extra}]'" in " ".join(told.split())


# params and info


def test_params_as_json():
    counted = run_json("params", "bluelm-3b", "--json")
    assert set(counted) == {"trainable_parameters", "parts"}
    assert f"{counted['trainable_parameters'] / 1e6:.2f}" == "1005.73"
    assert sum(counted["parts"].values()) == counted["trainable_parameters"]


def test_params_as_a_table():
    output = run("params", "qwen2.5-3b", "--structure", "lora", "--placement", "post").stdout
    assert "456,837,184" in output and "replicated_blocks" not in output


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
    assert "GenieBlue on ../base" in output and "LoRA of rank 4" in output
    assert all(part in output for part in TABLE_PARTS)


def test_info_without_the_base_still_tells_of_the_rest(work):
    shutil.rmtree(work / "base")
    result = run("info", "genieblue", "--json")
    assert json.loads(result.stdout)["parts"]["language_model"] == {"parameters": None, "bytes": None}
    assert "base's size is unknown" in result.stderr


def test_info_of_a_repository_downloads_no_weights(hub, good):
    hub.commit_folder("maker/base", good / "base")
    config = json.loads((good / "genieblue/config.json").read_text())
    hub.commit_folder("you/reader", good / "genieblue")
    hub.commit("you/reader", {"config.json": json.dumps(config | {"base_model_name_or_path": "maker/base"}).encode()})
    local = run_json("info", good / "genieblue", "--json")
    assert run_json("info", "you/reader", "--json") == local
    assert not [path for path in hub.home.rglob("*.safetensors")]


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
    result = run("chat", "genieblue", "--max-new-tokens", 4, input=lines, code=1)  # for the image that is not there
    views = [line.split()[0] for line in result.stderr.splitlines() if " view, " in line]
    assert views == ["[text", "[multimodal", "[multimodal", "[text"]
    answers = result.stdout.splitlines()
    assert len(answers) == 4 and answers[0] == answers[3]
    assert "'none.png' does not exist" in result.stderr and "Unknown command /what" in result.stderr


def test_an_image_of_the_command_line_goes_with_the_first_line(work):
    result = run("chat", "genieblue", "-i", "scan.png", "--max-new-tokens", 2, input="What is it?\n")
    assert "[multimodal view" in result.stderr


def test_a_turn_that_fails_does_not_end_the_conversation(work):
    lines = "/image scan.png\nhi\n/reset\nhi\n"
    result = run("chat", "genieblue", "--view", "text", "--max-new-tokens", 2, input=lines, code=1)
    assert "cannot process image tokens" in result.stderr and "[text view" in result.stderr
    assert "images stay for your next message; /reset drops them" in result.stderr


@pytest.mark.parametrize("stdin", ["", None], ids=["empty", "closed"])
def test_a_conversation_without_a_line_is_told_how_to_ask(work, monkeypatch, stdin):
    if stdin is None:
        monkeypatch.setattr("builtins.input", lambda _prompt: (_ for _ in ()).throw(RuntimeError("input(): lost")))
    assert "stdin is empty. Ask with --prompt" in error_of("chat", "genieblue", input=stdin)


def test_a_base_without_chat_template_is_said_to_complete(tmp_path):
    folder = save_tiny_pair(tmp_path)
    for place in ("base", "genieblue"):
        (tmp_path / place / "chat_template.jinja").unlink()
    settings = json.loads((folder / "processor_config.json").read_text()) | {"base_has_chat_template": False}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    assert "no chat template" in run("chat", folder, "-p", "A tree", "--max-new-tokens", 2).stderr


def test_json_needs_one_prompt(work):
    assert "--prompt" in error_of("chat", "genieblue", "--json", code=2)


def test_a_base_elsewhere_can_be_named(work):
    (work / "base").rename(work / "elsewhere")
    assert "that folder does not exist" in error_of("chat", "genieblue", "-p", "hi")
    run("chat", "genieblue", "-p", "hi", "--base", "elsewhere", "--max-new-tokens", 2)


def test_remote_code_is_never_asked_about(tmp_path):
    folder = save_tiny_pair(tmp_path, "bluelm")
    result = run("chat", folder, "-p", "hi", code=1, input="y\n")
    assert "--trust-remote-code" in result.stderr and "[y/N]" not in result.output
    run("chat", folder, "-p", "hi", "--trust-remote-code", "--max-new-tokens", 2)


# The Hub


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
    assert "local path" in message and "nothing was uploaded" in message


# init, train, verify


def test_init_makes_a_model_that_chats(work):
    result = run("init", "--base", "base", "--vision", "vision", "--out", "reader", "--rank", 2, "--placement", "post")
    assert "LoRA of rank 2" in result.stdout and "(post)" in result.stdout
    assert "genieblue train --stage 1 --model reader" in result.stderr
    assert "Generation stops at '</s>'" in result.stderr
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
    assert "none.jinja cannot be read (No such file" in error_of(*arguments)
    assert "vision cannot be read (Is a directory): expected a Jinja text file" in error_of(*arguments[:-1], "vision")
    assert "scan.png cannot be read (it is not UTF-8 text)" in error_of(*arguments[:-1], "scan.png")


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
