"""`genieblue quantize --eval-data`: what it prints, its exit code, and options that do not go together."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import error_of, run, run_json
from PIL import Image
from tiny_quantized import save_large_pair, with_processor

from conversion.quantization import quantize as quantize_module
from conversion.quantization.quantize import QuantizationReport
from conversion.verdict import Limits, nothing_measured
from genieblue.cli.verdict import open_held_out
from modeling_genieblue.quantized_settings_genieblue import QUANTIZED_PARTS

pytestmark = pytest.mark.usefixtures("settings_of_the_process_are_restored")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_processor(save_large_pair(tmp_path_factory.mktemp("source")))


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "whole"
    quantize_module.quantize_genieblue(model, folder, self_contained=True)
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
    said = "Verdict: too few samples to tell; the text view's answers score only 0.0 % in 16 bits"
    assert any(line.startswith(said) for line in lines)


def test_a_failed_verdict_ends_with_1_and_says_what_to_do(model, quantized, tmp_path, monkeypatch):
    verdict = {"result": "failed", "accepted": False, "reasons": ["it lost too much"]}
    report = QuantizationReport(quantized, "base", {}, {}, verdict, [])
    monkeypatch.setattr(quantize_module, "quantize_genieblue", lambda *_arguments, **_options: report)
    command = "quantize", model, "--out", tmp_path / "new"
    result = run(*command, code=1)
    assert "Verdict: failed; it lost too much." in result.stdout and "`push --accept-loss` publishes" in result.stderr
    assert run_json(*command, "--json", code=1)["verdict"] == verdict


def test_a_failed_reused_base_is_to_be_quantized_anew(model, quantized, tmp_path, monkeypatch):
    verdict = {"result": "failed", "accepted": False, "reasons": ["it lost too much"]}
    report = QuantizationReport(quantized, "base", {}, {}, verdict, [], verdict)
    monkeypatch.setattr(quantize_module, "quantize_genieblue", lambda *_arguments, **_options: report)
    result = run("quantize", model, "--out", tmp_path / "new", "--quantized-base", "base", code=1)
    assert "Less is lost with a base quantized anew, without --quantized-base" in result.stderr


def test_a_loss_may_be_accepted_without_data(model, quantized, tmp_path, monkeypatch):
    given = {}

    def note(*_arguments, **options):
        given.update(options)
        return QuantizationReport(quantized, "base", {}, {}, nothing_measured(), [])

    monkeypatch.setattr(quantize_module, "quantize_genieblue", note)
    run("quantize", model, "--out", tmp_path / "new", "--accept-loss")
    assert given["accept_loss"] and given["held_out"] is None


def test_a_chart_of_no_formats_is_not_drawn(model, quantized, tmp_path, monkeypatch):
    report = QuantizationReport(quantized, "base", {}, {}, nothing_measured(), [])
    monkeypatch.setattr(quantize_module, "quantize_genieblue", lambda *_arguments, **_options: report)
    (tmp_path / "text.txt").write_text("The answer is in the question. " * 9)
    options = "--llm", "w8a16", "--calibration", tmp_path / "text.txt", "--sample-length", "8"
    result = run("quantize", model, "--out", tmp_path / "new", *options, "--chart", tmp_path / "formats.png")
    assert "formats.png was not drawn" in result.stderr and not (tmp_path / "formats.png").exists()


@pytest.mark.parametrize("place", ["dir.png", "nowhere/chart.png", "chart.pdf", "locked/chart.png"])
@pytest.mark.parametrize("command", ["quantize", "data"])
def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(model, data, tmp_path, place, command, monkeypatch):
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr("os.access", lambda path, *_mode: Path(path).name != "locked")  # root may write anywhere
    arguments = {
        "quantize": ["quantize", model, "--out", tmp_path / "new", "--calibration", data, "--chart"],
        "data": ["data", "check", data, "--out"],
    }
    message = error_of(*arguments[command], tmp_path / place, code=2)
    assert arguments[command][-1] in message and Path(place).name in message and not (tmp_path / "new").exists()


def test_a_report_is_printed_before_its_picture(model, quantized, tmp_path, monkeypatch):
    report = QuantizationReport(quantized, "base", {}, {}, nothing_measured(), ["a linear"])
    monkeypatch.setattr(quantize_module, "quantize_genieblue", lambda *_arguments, **_options: report)
    monkeypatch.setattr("genieblue.cli.quantize._print_mixed", lambda _linears: None)
    (tmp_path / "text.txt").write_text("The answer is in the question. " * 9)

    def disk_full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("conversion.quantization.mixed.draw", disk_full)
    options = "--calibration", tmp_path / "text.txt", "--sample-length", "8", "--chart", tmp_path / "formats.png"
    assert "Verdict: not measured" in run("quantize", model, "--out", tmp_path / "new", *options, code=1).stdout


def test_the_json_document_has_the_whole_verdict(model, data, tmp_path):
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
        (["--max-answer-loss", "2"], "--eval-data"),
        (["--metric", "anls"], "--eval-data"),
    ],
)
def test_options_about_data_need_some(model, tmp_path, options, message):
    assert message in error_of("quantize", model, "--out", tmp_path / "new", *options, code=2)


@pytest.mark.parametrize("option", [["--metric", "anls"], ["--max-answer-loss", "2"]])
def test_options_about_answers_need_chats(model, data, tmp_path, option):
    (tmp_path / "text.txt").write_text("The answer is in the question. " * 9)
    command = "quantize", model, "--out", tmp_path / "new", "--eval-data", tmp_path / "text.txt", *option
    error = error_of(*command, code=2)
    assert option[0] in error and "--eval-data has only texts: give chats too" in error
    assert not (tmp_path / "new").exists()
    metric, loss = ("anls", None) if option[0] == "--metric" else (None, 2.0)
    assert open_held_out([str(data), str(tmp_path / "text.txt")], str(model), {}, metric, loss, None) is not None


LOST = {"result": "failed", "accepted": False, "reasons": ["it lost 9 points"]}
TOLD = "lost too much by its verdict: it lost 9 points. Expect worse answers"


@pytest.fixture
def mark(quantized, tmp_path):
    """A copy of the quantized model with another verdict."""

    def marked(verdict):
        folder = shutil.copytree(quantized, tmp_path / "marked")
        settings = json.loads((folder / "config.json").read_text())
        settings["quantization"]["verdict"] = verdict
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return marked


@pytest.mark.parametrize("verdict, times", [(LOST, 1), (LOST | {"accepted": True}, 0)], ids=["failed", "accepted"])
def test_a_failed_model_that_answers_is_warned_of_once(mark, data, caplog, verdict, times):
    folder = mark(verdict)
    run("chat", folder, "--prompt", "4?", "--max-new-tokens", 1)
    assert caplog.text.count(TOLD) == times
    run("eval", folder, "--data", data, "--max-new-tokens", 1)
    assert caplog.text.count(TOLD) == 2 * times


def test_an_empty_name_of_a_quantized_base_is_no_missing_one(model, tmp_path):
    command = "quantize", model, "--out", tmp_path / "new", "--quantized-base", ""
    assert "name is empty" in error_of(*command, code=2)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("given, ratio", [(None, 7.0), (2.0, 2.0)])
def test_a_repeated_verdict_has_the_limits_of_the_first(model, data, tmp_path, given, ratio):
    quantized = shutil.copytree(model, tmp_path / "quantized")
    settings = json.loads((quantized / "config.json").read_text())
    precisions = dict.fromkeys(QUANTIZED_PARTS, "w8a16") | {"activations": "bfloat16"}
    settings["quantization"] = precisions | {"verdict": {"limits": {"answer_loss": 9.0, "perplexity_ratio": 7.0}}}
    (quantized / "config.json").write_text(json.dumps(settings))
    held_out = open_held_out([str(data)], str(quantized), {}, None, None, given)
    assert held_out.limits == Limits(answer_loss=9.0, perplexity_ratio=ratio)


@pytest.mark.parametrize("limit", [["--max-answer-loss", "-1"], ["--max-perplexity-ratio", "nan"]])
def test_impossible_limits_are_refused(model, data, tmp_path, limit):
    error = error_of("quantize", model, "--out", tmp_path / "new", "--eval-data", data, *limit)
    assert limit[0] in error and not (tmp_path / "new").exists()
