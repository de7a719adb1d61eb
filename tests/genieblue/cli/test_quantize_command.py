"""`genieblue quantize --eval-data`: what it prints, its exit code, and options that do not go together."""

import json

import pytest
from command_line import error_of, run, run_json
from PIL import Image
from tiny_quantized import save_large_pair
from transformers import AutoTokenizer

from modeling_genieblue import GenieBlueConfig, GenieBlueProcessor

pytestmark = pytest.mark.usefixtures("settings_of_the_process_are_restored")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_large_pair(tmp_path_factory.mktemp("source"))
    config = GenieBlueConfig.from_pretrained(folder)
    GenieBlueProcessor.from_base(
        AutoTokenizer.from_pretrained(folder.parent / "base-llm"),
        image_token_id=config.image_token_id,
        image_seq_length=config.image_seq_length,
        tile_size=config.vision_config.image_size,
        max_tiles=1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (48, 24), "red").save(folder / "red.png")
    rows = [{"messages": [{"role": "user", "content": "<image>\nWhich?" if number % 2 else f"{number}?"}],
             "answers": "red", **({"images": ["red.png"]} if number % 2 else {})} for number in range(6)]  # fmt: skip
    (folder / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "held-out.jsonl"


def test_it_ends_with_tables_and_a_verdict(model, data, tmp_path):
    result = run("quantize", model, "--out", tmp_path / "new", "--llm", "w8a16", "--eval-data", data)
    lines = result.stdout.splitlines()
    assert any(line.split()[:3] == ["text", "all", "exact"] for line in lines)
    assert any(line.startswith("reference answers, multimodal view") for line in lines)
    assert any(line.startswith("vision_tower") and line.split()[1] == "–" for line in lines)
    # Random weights answer nothing.
    assert any(
        line.startswith("Verdict: too few samples to tell; the 16-bit model scores only 0.0 %") for line in lines
    )


def test_too_much_loss_ends_with_1_and_one_json_document(model, data, tmp_path):
    options = ["--llm", "w4a16", "--rounding", "rtn", "--group-size", 128, "--eval-data", data]
    options += ["--max-perplexity-ratio", "1"]
    document = run_json("quantize", model, "--out", tmp_path / "new", *options, "--accept-loss", "--json")
    verdict = document["verdict"]
    assert verdict["limits"] == {"answer_loss": 3.0, "perplexity_ratio": 1.0}
    assert set(verdict["views"]) == {"text", "multimodal"} and "llm" in verdict["error_by_part"]
    assert verdict["accepted"]


def test_without_data_it_says_that_nothing_was_measured(model, tmp_path):
    result = run("quantize", model, "--out", tmp_path / "new", "--llm", "w8a16")
    assert "Verdict: not measured; no held-out data was given (--eval-data)" in result.stdout
    assert "as recorded: not measured" in run("verify", tmp_path / "new").stdout


@pytest.mark.parametrize(
    "options, message",
    [
        (["--accept-loss"], "--eval-data"),
        (["--max-answer-loss", "2"], "--eval-data"),
        (["--metric", "anls"], "--eval-data"),
    ],
)
def test_options_about_data_need_some(model, tmp_path, options, message):
    assert message in error_of("quantize", model, "--out", tmp_path / "new", *options, code=2)


@pytest.mark.parametrize("limit", [["--max-answer-loss", "-1"], ["--max-perplexity-ratio", "nan"]])
def test_impossible_limits_are_refused(model, data, tmp_path, limit):
    error = error_of("quantize", model, "--out", tmp_path / "new", "--eval-data", data, *limit)
    assert limit[0] in error and not (tmp_path / "new").exists()
