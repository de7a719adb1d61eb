"""`genieblue lab`: a lab from the command line, each cell in a process of its own."""

import pytest
from command_line import error_of, run, run_json, run_process
from tiny_genieblue import save_tiny_pair
from tiny_lab import write_tiny_lab
from tiny_models import save_tiny_base
from tiny_vlms import save_tiny_vlm_pair

from genieblue.lab import run as lab_run
from genieblue.lab.lab_file import RECORD, read_lab_file, write_lab_file


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


def test_the_file_in_a_labs_folder_goes_on_there(lab_folder, monkeypatch):
    (lab_folder / RECORD).write_text("{}")
    folders = []
    monkeypatch.setattr(lab_run, "run_lab", lambda lab, folder, only, jobs: folders.append(folder) or {})
    run("lab", "run", lab_folder / "lab.yaml")
    run("lab", "run", lab_folder.parent / "lab.yaml")
    assert folders == [lab_folder, lab_folder.parent / "lab"]


def test_a_model_that_is_no_vlm_or_that_is_not_there_is_refused_before_any_question(tmp_path):
    save_tiny_base("llama", tmp_path / "base")
    options = ["--base", tmp_path / "base", "--english", 2]
    refused = error_of("lab", "text-drop", *options, "--mllm", tmp_path / "base")
    assert "model_type 'llama', which AutoModelForImageTextToText does not load" in refused
    assert "none is not a folder" in error_of("lab", "text-drop", *options, "--mllm", tmp_path / "none")
    vlm, base = save_tiny_vlm_pair(tmp_path / "pair")
    assert "base's tokenizer" in error_of("lab", "text-drop", "--base", tmp_path / "none", "--mllm", vlm)
    (base / "chat_template.jinja").unlink()
    (tmp_path / "mt.jsonl").write_text('{"turns": ["Why?"]}\n')
    asked = ["--facts", 0, "--english", 0, "--mt-bench", tmp_path / "mt.jsonl", "--mt-bench-questions", 1]
    refused = error_of("lab", "text-drop", "--base", base, "--mllm", vlm, *asked)
    assert "base has no chat template, which `mt_bench` needs" in refused


@pytest.mark.slow
def test_text_drop_asks_a_vlm_in_the_form_that_its_template_writes(tmp_path):
    pytest.importorskip("lm_eval", reason="the extra `lab` installs it")
    vlm, base = save_tiny_vlm_pair(tmp_path, change=0.0)
    (tmp_path / "mt.jsonl").write_text('{"turns": ["Why?"]}\n{"turns": ["And how many?"]}\n')
    options = ["--base", base, "--mllm", vlm, "--facts", 0, "--english", 2, "--mt-bench", tmp_path / "mt.jsonl",
               "--mt-bench-questions", 2]  # fmt: skip
    scores = run_json("lab", "text-drop", *options, "--json")
    assert len(set(scores["mllm"]["mt_bench"]["answers"])) == 2
    row = next(line for line in run("lab", "text-drop", *options).stdout.splitlines() if line.startswith("| mllm"))
    assert row.count("±") == 4  # two tasks, the average, and what is retained


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
