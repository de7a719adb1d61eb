"""`genieblue extract`, and the commands that go on with what it makes."""

import json

import pytest
from command_line import error_of, run, run_json
from PIL import Image
from tiny_vlms import save_tiny_vlm_pair
from vlm_training_setup import chat, extract_tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_tiny_vlm_pair(tmp_path_factory.mktemp("pair"))


def test_extract_prints_the_parts_the_plan_and_the_measured_logits(pair, tmp_path):
    mine = tmp_path / "mine"
    result = run("extract", "--mllm", pair[0], "--base", pair[1], "--out", mine, "--placement", "auto", "--copies", 1)
    assert "images run a VLM of type llava" in result.stdout
    assert "Logits against the VLM's own: " in result.stdout


def test_what_extract_makes_is_trained_evaluated_and_asked(tmp_path):
    mine, data = extract_tiny(tmp_path), tmp_path / "chats.jsonl"
    Image.new("RGB", (28, 28), "red").save(tmp_path / "red.png")
    data.write_text(json.dumps(chat("<image>\nColour?", "Red.", "red.png")))
    healed = tmp_path / "healed"
    options = ["--steps", "30", "--learning-rate", "0.01", "--save-steps", "0"]
    run("train", "--stage", "2", "--model", mine, "--data", data, "--out", healed, *options)
    assert run_json("eval", healed, "--data", data, "--json")["scores"][0]["mean"] == 1
    asked = run_json("chat", healed, "--prompt", "Colour?", "--image", tmp_path / "red.png", "--json")
    assert (asked["view"], asked["text"]) == ("multimodal", "Red.")


def test_extract_as_json_has_the_plan(pair, tmp_path):
    options = ["--max-bytes", "40kB", "--placement", "auto", "--json"]
    found = run_json("extract", "--mllm", pair[0], "--base", pair[1], "--out", tmp_path / "mine", *options)
    assert 0 < found["plan"]["bytes"] <= 40_000
    assert found["difference"] < 0.2


def test_ranks_chosen_twice_are_refused(pair, tmp_path):
    options = ["--rank", "4", "--error", "0.1"]
    message = error_of("extract", "--mllm", pair[0], "--base", pair[1], "--out", tmp_path / "mine", *options)
    assert "give only one of them" in message
    assert not (tmp_path / "mine").exists()


def test_a_folder_of_images_without_chats_is_refused(pair, tmp_path):
    options = ["--mllm", pair[0], "--base", pair[1], "--out", tmp_path / "mine", "--image-folder", tmp_path]
    assert "--image-folder is for images of --calibration" in error_of("extract", *options, code=2)
    assert not (tmp_path / "mine").exists()


def test_the_merged_language_model_is_measured_on_chats_with_images(tmp_path):
    mine, data = extract_tiny(tmp_path), tmp_path / "chats.jsonl"
    Image.new("RGB", (28, 28), "red").save(tmp_path / "red.png")
    rows = [chat("<image>\nColour?", "Red.", "red.png"), chat("Colour?", "Which?")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("export", "merged", mine, "--out", tmp_path / "merged", "--calibration", data)
    assert "of 1 calibration chats" in result.stdout
