"""`genieblue export lora`, `export gguf` and `export merged`: what they print, bad options, runs that are killed."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import REPOSITORY, error_of, run, run_json
from PIL import Image
from tiny_genieblue import save_tiny_pair

# All but the card is written.
KILLED = """
import importlib, os, signal, sys
from genieblue.cli.app import app
importlib.import_module(sys.argv[1]).write_export_card = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
app(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_tiny_pair(tmp_path_factory.mktemp("qwen2"), "qwen2")


@pytest.fixture
def chats(tmp_path) -> Path:
    """Three chats, two of them with an image."""
    Image.new("RGB", (24, 24), "red").save(tmp_path / "red.png")
    image, answer = {"type": "image", "image": "red.png"}, {"role": "assistant", "content": "answer"}
    lines = [
        [{"role": "user", "content": [*images, {"type": "text", "text": text}]}, answer]
        for text, images in (("What is it?", [image]), ("Why?", []), ("And this?", [image]))
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in lines))
    return path


def test_lora_prints_each_matrix_what_is_not_carried_and_the_measured_logits(source, tmp_path, chats):
    result = run("export", "lora", source, "--out", tmp_path / "lora", "--error", "0.3", "--calibration", chats)
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["matrix", "shape", "rank"] and len([line for line in lines if " of " in line]) > 7
    assert "Logits of this adapter: " in result.stdout and "of 3 calibration chats" in result.stdout
    assert "q_proj.bias: no LoRA carries it" in result.stderr


def test_lora_as_json_is_the_whole_table(source, tmp_path):
    table = run_json("export", "lora", source, "--out", tmp_path / "lora", "--rank", "2", "--json")
    assert {row["rank"] for row in table["matrices"]} == {2} and len(table["left_behind"]) == 3
    assert table["bytes"] == (tmp_path / "lora/adapter_model.safetensors").stat().st_size


def test_a_size_may_have_a_unit(source, tmp_path):
    table = run_json("export", "lora", source, "--out", tmp_path / "lora", "--max-bytes", "50kB", "--json")
    assert 40_000 < table["bytes"] <= 50_000


def test_gguf_prints_the_command_that_serves_it(source, tmp_path):
    result = run("export", "gguf", source, "--out", tmp_path / "gguf", "--language-only", "--rank", "2")
    assert "2 of 16" in result.stdout and "Logits of this adapter: " in result.stdout
    command = f"llama-server -m base.gguf --lora-scaled {tmp_path}/gguf/lora.gguf:0 --cache-ram 0 --no-cache-prompt"
    assert f"Next: {command}\n" in result.stderr


def test_gguf_says_what_llama_cpp_cannot_run(source, tmp_path):
    assert "--language-only" in error_of("export", "gguf", source, "--out", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "module"),
    [("lora", "conversion.lora_form"), ("gguf", "conversion.llamacpp.export"), ("merged", "conversion.merge")],
)
def test_an_export_that_is_killed_leaves_nothing_half_and_the_next_one_is_whole(source, tmp_path, kind, module):
    options = ["--language-only"] if kind == "gguf" else []
    command = ["export", kind, str(source), "--out", str(tmp_path / "out"), *options]
    killed = subprocess.run([sys.executable, "-c", KILLED, module, *command], cwd=REPOSITORY, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    assert {path.name[:5] for path in tmp_path.iterdir()} == {".out."}  # hidden, and removed by the next run
    run(*command)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/README.md").exists()


def test_merged_prints_the_measured_logits(source, tmp_path):
    result = run("export", "merged", source, "--out", tmp_path / "merged")
    assert "Logits of this model: " in result.stdout and "AutoModelForCausalLM" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--rank", "2", "--error", "0.1"], 1, "give only one of them"),
        (["--max-bytes", "many"], 2, "'many' is not a size"),
        (["--image-folder", "."], 2, "--image-folder is for images of --calibration"),
        (["--calibration", "missing.jsonl"], 1, "missing.jsonl"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_contradicting_options_are_refused(source, tmp_path, options, code, told):
    assert told in error_of("export", "lora", source, "--out", tmp_path / "lora", *options, code=code)
    assert not (tmp_path / "lora").exists()


def test_a_plain_base_is_refused(source, tmp_path):
    assert "expected 'genieblue'" in error_of("export", "merged", source.parent / "base", "--out", tmp_path / "x")
