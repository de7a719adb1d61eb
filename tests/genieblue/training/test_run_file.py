"""A run as a YAML file: what it holds, what is refused, and that it is saved with the run."""

from pathlib import Path

import pytest
from command_line import error_of, run, run_json
from tiny_genieblue import save_tiny_pair
from training_setup import make_base, make_data, make_model, make_settings

from genieblue.training.run_file import read_run_file, settings_of, write_run_file
from genieblue.training.stages import train

pytestmark = pytest.mark.usefixtures("settings_of_the_process_are_restored")
CHAT = '{"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"}]}\n'


def read(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    return read_run_file(tmp_path / "run.yaml")


def test_numbers_texts_and_mappings_get_their_types(tmp_path):
    values = read(
        tmp_path,
        "stage: 2\nmodel: m\nout: o\ndata: a.jsonl\nlearning_rate: 1e-4\nlearning_rates: {lora: 2e-4}\n"
        "adam_betas: [0.9, 0.95]\nbf16: true\nsteps: 10\nreport_to: tensorboard\n",
    )
    assert values["data"] == ["a.jsonl"]
    settings = settings_of(values)
    assert (settings.learning_rate, settings.learning_rates, settings.bf16) == (1e-4, {"lora": 2e-4}, True)
    assert (settings.adam_betas, settings.report_to) == ((0.9, 0.95), ("tensorboard",))


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    values = read(tmp_path, "model: ~/m\non_quantized: ~/q\ndata: [~/a.jsonl]\n")
    assert [values["model"], values["on_quantized"]] == [f"{tmp_path}/m", f"{tmp_path}/q"]
    assert values["data"] == [f"{tmp_path}/a.jsonl"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("lerning_rate: 1", "Did you mean `learning_rate`"),
        ("qwertyuiop: 1", "is no setting of a run. Known are"),
        ("steps: many", "`steps` is 'many', expected a whole number"),
        ("steps: 1.5", "expected a whole number"),
        ("bf16: 1", "expected true or false"),
        ("learning_rate: fast", "expected a number"),
        ("learning_rates: 3", "expected a mapping"),
        ("- 1", "holds no settings"),
        ("", "holds no settings"),
        ("a: [", "is not YAML"),
        ("a: !!python/object:os.system {}", "is not YAML"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_what_a_run_needs_is_named(tmp_path):
    with pytest.raises(ValueError, match="A run needs model, data, out: give --model, --data, --out"):
        settings_of(read(tmp_path, "stage: 1"))


def test_what_is_written_reads_back(tmp_path):
    values = {"stage": 1, "model": "m", "data": [Path("a")], "out": Path("o"), "learning_rates": {"lora": 1e-5}}
    write_run_file(tmp_path / "run.yaml", {**values, "steps": None})
    assert read_run_file(tmp_path / "run.yaml") == {**values, "data": ["a"], "out": "o"}


def test_a_run_from_python_saves_its_settings(tmp_path):
    model, processor = make_model(make_base(tmp_path / "base"))
    settings = make_settings(steps=1, adam_epsilon=1e-7)
    train(model, processor, make_data(), tmp_path / "out", settings)
    saved = read_run_file(tmp_path / "out-run/run.yaml")
    assert settings_of({**saved, "model": "m", "data": ["d"], "out": "o"}) == settings


def test_options_win_over_the_file_and_the_result_is_saved(tmp_path):
    model = save_tiny_pair(tmp_path)
    (tmp_path / "data.jsonl").write_text(CHAT * 3)
    (tmp_path / "run.yaml").write_text(
        f"stage: 2\nmodel: {model}\ndata: {tmp_path / 'data.jsonl'}\nout: {tmp_path / 'out'}\nsteps: 9\nseed: 7\n"
    )
    document = run_json("train", "--config", tmp_path / "run.yaml", "--steps", 2, "--json")
    assert document["steps"] == 2
    saved = read_run_file(tmp_path / "out-run/run.yaml")
    assert (saved["steps"], saved["seed"]) == (2, 7)


def test_a_plan_trains_nothing(tmp_path):
    model = save_tiny_pair(tmp_path)
    (tmp_path / "data.jsonl").write_text(CHAT)
    options = ["--stage", 2, "--model", model, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out", "--plan"]
    assert "Trained parameters" in run("train", *options).stdout
    assert run_json("train", *options, "--json")["memory_total"] > 0
    assert not (tmp_path / "out").exists() and not (tmp_path / "out-run").exists()


def test_settings_of_validation_without_data_are_refused(tmp_path):
    (tmp_path / "data.jsonl").write_text(CHAT)
    options = ["--stage", 2, "--model", "m", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out"]
    assert "(--eval-data)" in error_of("train", *options, "--patience", 2)
    model, processor = make_model(make_base(tmp_path / "base"))
    with pytest.raises(ValueError, match="`eval_steps` is set.* give `validation`"):
        train(model, processor, make_data(), tmp_path / "out", make_settings(eval_steps=2))


def test_an_unknown_tracker_is_refused_before_training(tmp_path):
    model = save_tiny_pair(tmp_path)
    (tmp_path / "data.jsonl").write_text(CHAT)
    options = ["--stage", 2, "--model", model, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out"]
    assert "'trackme'" in error_of("train", *options, "--report-to", "trackme")
    assert not (tmp_path / "out-run").exists()
