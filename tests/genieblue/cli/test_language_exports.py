"""`genieblue export lora` and `export merged`: what they print, and options that contradict each other."""

import json
from pathlib import Path

import pytest
from command_line import error_of, run, run_json
from PIL import Image
from tiny_genieblue import save_tiny_pair


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


def test_merged_prints_the_measured_logits(source, tmp_path):
    result = run("export", "merged", source, "--out", tmp_path / "merged")
    assert "Logits of this model: " in result.stdout and "AutoModelForCausalLM" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--rank", "2", "--error", "0.1"], 1, "give only one of them"),
        (["--max-bytes", "many"], 2, "'many' is no size"),
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
