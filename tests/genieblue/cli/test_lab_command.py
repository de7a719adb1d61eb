"""`genieblue lab`: a lab from the command line, each cell in a process of its own."""

import pytest
from command_line import error_of, run, run_json, run_process
from tiny_genieblue import save_tiny_pair
from tiny_lab import write_tiny_lab

from genieblue.lab.lab_file import read_lab_file, write_lab_file


@pytest.fixture
def lab_folder(tmp_path):
    """The folder of a lab of which nothing has been run."""
    (tmp_path / "out").mkdir()
    write_lab_file(tmp_path / "out/lab.yaml", read_lab_file(write_tiny_lab(tmp_path)))
    return tmp_path / "out"


def test_status_shows_each_cell(lab_folder):
    rows = run_json("lab", "status", lab_folder, "--json")
    assert [(row["structure"], row["seed"], row["state"]) for row in rows][:2] == [
        ("full", 0, "missing"), ("lora", 0, "missing")
    ]  # fmt: skip
    assert "genieblue-skip" in run("lab", "status", lab_folder).stdout


def test_what_is_no_lab_is_refused_in_one_sentence(lab_folder, tmp_path):
    assert "not the folder of a lab" in error_of("lab", "status", tmp_path / "none")
    assert "No cell of" in error_of("lab", "report", lab_folder)
    assert "is not a file" in error_of("lab", "run", tmp_path / "none.yaml")
    assert "Unknown base 'gpt'" in error_of("lab", "base", "gpt", "--out", tmp_path / "base")
    assert "is there already" in error_of("lab", "base", "toy", "--out", lab_folder)


def test_a_model_without_text_tasks_to_compare_is_refused(tmp_path):
    model = save_tiny_pair(tmp_path)
    options = ["--base", tmp_path / "base", "--mllm", model, "--facts", 0, "--english", 0, "--trust-remote-code"]
    assert "No text task is asked for" in error_of("lab", "text-drop", *options)


@pytest.mark.slow
def test_a_lab_runs_in_processes_and_goes_on_where_one_was_removed(tmp_path):
    path = write_tiny_lab(tmp_path, structures=["lora", "cogvlm-skip"], tasks=["digits"])
    finished = run_process("lab", "run", path, "--out", tmp_path / "out")
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "out/report/report.md").is_file()
    (tmp_path / "out/cells/mixed/lora/seed-0/result.json").unlink()
    rows = run_json("lab", "status", tmp_path / "out", "--json")
    assert {row["structure"]: row["state"] for row in rows} == {"lora": "started", "cogvlm-skip": "done"}
    assert run_process("lab", "run", path, "--out", tmp_path / "out").returncode == 0


@pytest.mark.slow
def test_text_drop_of_a_genieblue_is_nothing(tmp_path):
    pytest.importorskip("lm_eval", reason="the extra `lab` installs it")
    model = save_tiny_pair(tmp_path)
    options = ["--base", tmp_path / "base", "--mllm", model, "--facts", 0, "--english", 2, "--trust-remote-code"]
    scores = run_json("lab", "text-drop", *options, "--json")
    assert scores["base"]["english"]["values"] == scores["mllm"]["english"]["values"]
    assert "| mllm |" in run("lab", "text-drop", *options).stdout
