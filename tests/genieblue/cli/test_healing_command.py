"""`genieblue train --on-quantized`, from a quantized base to a healed model on it."""

import json

import pytest
import torch
from command_line import run, run_json
from PIL import Image
from tiny_genieblue import prompt
from tiny_quantized import contents, load, load_base, save_large_pair, with_processor

pytestmark = pytest.mark.usefixtures("settings_of_the_process_are_restored")


@pytest.fixture
def model(tmp_path):
    return with_processor(save_large_pair(tmp_path / "source"))


@pytest.fixture
def chats(tmp_path):
    Image.new("RGB", (48, 24), "red").save(tmp_path / "red.png")
    rows = [{"messages": [{"role": "user", "content": f"<image>\n{number}?"}, {"role": "assistant", "content": "red"}],
             "images": ["red.png"]} for number in range(4)]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "chats.jsonl"


def test_a_healed_model_is_trained_on_a_quantized_base_and_quantized_on_it(model, chats, tmp_path):
    first, base, healed, second = (tmp_path / name for name in ("first", "base", "healed", "second"))
    options = ["--llm", "w4a16", "--rounding", "rtn"]
    run("quantize", model, "--out", first, "--base-out", base, *options)
    before = contents(base)
    settings = ["--data", chats, "--steps", 2, "--batch-size", 2, "--learning-rate", "0.01"]
    command = ["train", "--stage", 2, "--model", model, "--on-quantized", base, *settings, "--out", healed]
    result = run(*command)
    assert f"genieblue quantize {healed} --quantized-base {base}" in result.stderr
    recipe = json.loads((healed / "training_recipe.json").read_text())
    assert any(str(stage.get("quantized base", "")).startswith("base, sha256 ") for stage in recipe.values())
    assert contents(base) == before

    # What was trained is an adapter for the original base, and not what it started from.
    own, trained = (dict(load(folder).multimodal_language_model.named_parameters()) for folder in (model, healed))
    assert any(not torch.equal(own[name], trained[name]) for name in own if "lora_B" in name)
    plain = [dict(load(folder).language_model.named_parameters()) for folder in (model, healed)]
    assert all(torch.equal(weight, plain[1][name]) for name, weight in plain[0].items())

    document = run_json("quantize", healed, "--quantized-base", base, "--out", second, *options, "--json")
    assert document["base"] == str(base) and contents(base) == before
    ids = prompt()
    assert torch.equal(load(second)(ids).logits, load_base(base)(ids).logits)
    run("verify", second)
