"""`genieblue eval`: what it prints, what it writes, and what it refuses before a model is loaded."""

import json

import pytest
from command_line import error_of, run, run_json
from PIL import Image
from tiny_genieblue import save_tiny_pair

pytestmark = pytest.mark.usefixtures("settings_of_the_process_are_restored")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_pair(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (48, 24), "red").save(folder / "red.png")
    question = {"role": "user", "content": "<image>\nWhich colour?"}
    rows = [
        {"messages": [question], "images": ["red.png"], "answers": "red", "task": "colours"},
        {"messages": [{"role": "user", "content": "1?"}], "answers": "1", "choices": ["1", "2"], "task": "numbers"},
    ]
    (folder / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "held-out.jsonl"


def test_it_prints_a_table_by_task(model, data, tmp_path):
    result = run("eval", model, "--data", data, "--out", tmp_path / "report", "--max-new-tokens", 3)
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [
        ["task", "metric"], ["all", "mixed"], ["colours", "exact"], ["numbers", "choice"]
    ]  # fmt: skip
    assert (tmp_path / "report/answers.jsonl").is_file()


def test_json_has_scores_and_paired_differences(model, data):
    document = run_json("eval", model, "--data", data, "--compare", model, "--max-new-tokens", 3, "--json")
    assert [score["task"] for score in document["scores"]] == ["all", "colours", "numbers"]
    assert all(each["difference"] == 0 and each["worse"] == 0 for each in document["differences"])


def test_one_metric_serves_all_samples_that_name_none(model, data):
    document = run_json("eval", model, "--data", data, "--metric", "anls", "--max-new-tokens", 3, "--json")
    assert {score["metric"] for score in document["scores"]} == {"anls"}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--metric", "bleu"], "--metric"),
        (["--record"], "give --out"),
        (["--npu", "emulator"], "only to a bundle"),
        (["--limit", "0"], "--limit"),
    ],
    ids=lambda value: str(value),
)
def test_options_that_do_not_go_together_are_refused(model, data, options, message):
    assert message in error_of("eval", model, "--data", data, *options, code=2)


def test_a_metric_that_does_not_fit_is_refused_with_file_and_line(model, data):
    error = error_of("eval", model, "--data", data, "--metric", "choice")
    assert "held-out.jsonl:1" in error and "`choices`" in error


def test_a_model_is_not_taken_for_an_output_folder(model, data):
    assert "something other than an evaluation" in error_of("eval", model, "--data", data, "--out", model)


def test_a_report_that_could_not_be_written_is_refused_before_the_answers(data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    assert "file is a file, so" in error_of("eval", "nowhere/m", "--data", data, "--out", tmp_path / "file/x")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "Nothing may be written in" in error_of("eval", "nowhere/m", "--data", data, "--out", tmp_path / "x")


@pytest.mark.parametrize("content", ["", "[]", "\n\n"], ids=["nothing", "a list", "empty lines"])
def test_data_without_samples_is_refused(model, tmp_path, content):
    (tmp_path / "data.jsonl").write_text(content)
    assert "is not JSONL" in error_of("eval", model, "--data", tmp_path / "data.jsonl")
