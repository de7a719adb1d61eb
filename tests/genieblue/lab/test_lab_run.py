"""A lab from its file to its last cell: cells go on, fail alone, and are refused if they do not fit."""

import dataclasses
import errno
import json
import math
import shutil
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_lab import cells_in_this_process, write_tiny_lab
from tiny_models import save_tiny_base
from transformers import TrainerCallback

from conversion import staging
from conversion.staging import lock_output
from genieblue.lab import cells, run
from genieblue.lab.cells import CELL, IMAGES, LAB_FILE, RESULT, Cell, cells_of
from genieblue.lab.checks import check_lab
from genieblue.lab.lab_file import read_lab_file, write_lab_file
from genieblue.lab.report import _setting, write_report
from genieblue.lab.run import gather, lab_states, run_lab
from genieblue.lab.vision import PROJECTOR


def test_every_structure_is_run_with_its_seeds_and_the_first_seed_comes_first(finished):
    lab = read_lab_file(finished[0])
    assert [(cell.structure, cell.seed) for cell in cells_of(lab)] == [
        ("full", 0), ("lora", 0), ("genieblue-skip", 0), ("lora", 1), ("genieblue-skip", 1)
    ]  # fmt: skip
    assert set(lab_states(finished[1])) == set(cells_of(lab))


def test_a_cell_says_what_it_trained_how_long_and_how_well(finished):
    result = json.loads((Cell("mixed", "genieblue-skip", 0).folder(finished[1]) / RESULT).read_text())
    assert result["steps"] == 2 and result["copied_blocks"] == [3]
    assert result["trainable"] == sum(result["parts"].values())
    assert set(result["images"]) == {"digits", "naming"} and result["images"]["digits"]["count"] == 4
    assert result["seconds_per_step"] > 0 and result["peak_memory_gb"] > 0 and len(result["losses"]) == 2


def test_a_finished_lab_runs_nothing_again(lab, monkeypatch):
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: pytest.fail("a cell was run"))
    assert {state for state, _ in run_lab(*lab).values()} == {"done"}


def test_a_cell_that_was_killed_after_training_is_only_evaluated(lab, monkeypatch):
    place = Cell("mixed", "lora", 0).folder(lab[1])
    expected = (place / IMAGES).read_text()
    for name in (RESULT, IMAGES):
        (place / name).unlink()
    monkeypatch.setattr(cells, "train", lambda *_, **__: pytest.fail("it was trained again"))
    cells_in_this_process(monkeypatch)
    run_lab(*lab)
    assert (place / IMAGES).read_text() == expected


def test_a_cell_that_was_killed_in_training_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    training = {"steps": 3, "batch_size": 2, "logging_steps": 1, "save_steps": 1}
    lab = read_lab_file(write_tiny_lab(tmp_path, structures=["lora"], tasks=["digits"], training=training))
    cell = Cell("mixed", "lora", 0)
    place, started = cell.folder(tmp_path / "out"), []

    class StopOnce(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            started.append(state.global_step)
            if started == [0, 1, 2]:
                raise KeyboardInterrupt

    trained = cells.train
    monkeypatch.setattr(cells, "train", lambda *given, **options: trained(*given, **options, callbacks=[StopOnce()]))
    cells_in_this_process(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_lab(lab, tmp_path / "out")
    assert lab_states(tmp_path / "out")[cell] == ("started", "at step 2")
    assert run_lab(lab, tmp_path / "out")[cell][0] == "done"
    assert started == [0, 1, 2, 2]
    expected = json.loads((place / RESULT).read_text())["losses"]
    shutil.rmtree(place)
    run_lab(lab, tmp_path / "out")
    assert json.loads((place / RESULT).read_text())["losses"] == expected


def test_a_cell_that_fails_is_marked_and_the_lab_goes_on(lab, monkeypatch):
    for name in ("full", "lora"):
        shutil.rmtree(Cell("mixed", name, 0).folder(lab[1]))

    def train(structure, *arguments, **options):
        if structure.name == "full":
            raise ValueError("The loss is nan at step 1")
        return trained(structure, *arguments, **options)

    trained = cells.train
    monkeypatch.setattr(cells, "train", train)
    cells_in_this_process(monkeypatch)
    states = run_lab(*lab)
    assert states[Cell("mixed", "full", 0)] == ("failed", "The loss is nan at step 1")
    assert states[Cell("mixed", "lora", 0)][0] == "done"
    assert "The loss is nan" in write_report(lab[1]).read_text()


def test_a_cell_that_dies_is_named_and_the_lab_goes_on(lab, monkeypatch, caplog):
    for name in ("full", "lora"):
        shutil.rmtree(Cell("mixed", name, 0).folder(lab[1]))

    class Killed:
        returncode = -9

    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: Killed)
    states = run_lab(*lab)
    assert [state for state, _ in states.values()].count("missing") == 2
    assert caplog.text.count("exit code -9") == 2


def test_cells_run_at_a_time_on_equal_shares_of_the_cores(lab, monkeypatch):
    for name in ("full", "lora"):
        shutil.rmtree(Cell("mixed", name, 0).folder(lab[1]))
    both, threads = threading.Barrier(2, timeout=30), []

    def wait_for_the_other(_, *, check, env):
        threads.append(env.get("OMP_NUM_THREADS"))
        both.wait()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(run.subprocess, "run", wait_for_the_other)
    monkeypatch.setattr(run.torch, "get_num_threads", lambda: 6)
    run_lab(*lab, jobs=2)
    assert threads == ["3", "3"]


def test_only_the_structures_that_are_named_are_run(lab, monkeypatch):
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: pytest.fail("a cell was run"))
    assert {cell.structure for cell in run_lab(*lab, only=["genieblue-*"])} == {"genieblue-skip"}
    monkeypatch.setattr(run, "prepare", lambda *_: pytest.fail("too late"))
    for only in (["cogvlm-*"], ["lora", "cogvlm-*"]):
        with pytest.raises(ValueError, match="No structure is named like cogvlm-.: the lab has full, lora"):
            run_lab(*lab, only=only)


def test_a_cell_of_another_configuration_is_refused_with_what_differs(lab):
    place = Cell("mixed", "lora", 1).folder(lab[1]) / CELL
    recorded = json.loads(place.read_text())
    recorded["lab"]["training"]["steps"] = 7
    place.write_text(json.dumps(recorded))
    for use in (lambda: run_lab(*lab), lambda: write_report(lab[1]), lambda: lab_states(lab[1])):
        with pytest.raises(ValueError, match=r"another configuration: lab\.training\.steps was 7 and is 2"):
            use()


def test_another_lab_in_the_folder_is_refused(lab, finished, tmp_path):
    other = write_tiny_lab(finished[0].parent / "other", held_out=5)
    with pytest.raises(ValueError, match=r"another configuration: lab\.held_out was 4 and is 5"):
        run_lab(read_lab_file(other), lab[1])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    with pytest.raises(ValueError, match="something other than a lab"):
        run_lab(lab[0], tmp_path / "photos")


@pytest.mark.parametrize("name", ["base", "vision"])
def test_another_base_or_tower_is_refused_before_there_is_a_cell(lab, finished, name, tmp_path):
    shutil.rmtree(lab[1] / "cells")
    other = write_tiny_lab(tmp_path / "other", **{name: "changed"})
    shutil.copytree(getattr(lab[0], name), tmp_path / "other" / "changed")
    with (tmp_path / "other" / "changed" / "model.safetensors").open("ab") as file:
        file.write(b"~")
    with pytest.raises(ValueError, match=rf"another configuration: {name}\.model"):
        run_lab(read_lab_file(other), lab[1])


def test_a_lab_goes_on_where_its_files_lie_elsewhere(lab, tmp_path, monkeypatch):
    recorded = read_lab_file(lab[1] / LAB_FILE)
    write_lab_file(lab[1] / LAB_FILE, dataclasses.replace(recorded, texts=("/elsewhere/texts.jsonl",)))
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: pytest.fail("a cell was run"))
    assert {state for state, _ in run_lab(*lab).values()} == {"done"}


def test_a_file_is_no_folder_of_a_lab(lab, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file is a file: give the folder of the lab"):
        run_lab(lab[0], tmp_path / "file")


@pytest.mark.parametrize("shared", ["start/seed-0/model/model.safetensors", "held-out/digits/0000.png"])
def test_a_cell_that_started_elsewhere_or_is_asked_something_else_is_refused(lab, tmp_path, shared):
    shutil.copytree(lab[1], tmp_path / "elsewhere")
    shutil.rmtree(Cell("mixed", "lora", 0).folder(lab[1]))
    with (lab[1] / shared).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"~")
    with pytest.raises(ValueError, match=f"another configuration: {shared.partition('/')[0]}"):
        gather(lab[1], [tmp_path / "elsewhere"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"mine": {"train": "mine.jsonl", "eval": "mine.jsonl"}}}, "has 1 questions, and `held_out` is 4"),
        ({"texts": ["texts.jsonl"], "training": {"steps": 2, "max_length": 4}}, "All 3 texts have more than 4 tokens"),
        ({"texts": ["gone.jsonl"]}, "gone.jsonl is not a file"),
        ({"base": "/nowhere/gone"}, "base /nowhere/gone is not a folder"),
        ({"base": "tiny-tower"}, "tiny-tower"),
        ({"base": "shallow"}, "3 blocks has no quarter to replicate"),
        ({"base": "silent"}, "silent has no chat template"),
        ({"vision": "/nowhere/gone"}, "vision model /nowhere/gone is not a folder"),
        ({"vision": "tiny-base"}, "has model_type 'llama': expected a SigLIP"),
        pytest.param(  # slow is where the extra `lab` is installed
            {"text_tasks": {"facts": 10**6}}, "`facts` is 1000000, but there are", marks=pytest.mark.slow
        ),
    ],
    ids=["too few questions", "too long texts", "missing texts", "missing base", "no base", "too few blocks",
         "no chat template", "missing tower", "no tower", "too many facts"],
)  # fmt: skip
def test_wrong_data_is_refused_before_anything_is_trained(tmp_path, monkeypatch, changes, message):
    for name in ("create_genieblue", "base_texts", "train"):
        monkeypatch.setattr(run, name, lambda *_, **__: pytest.fail("too late"))
    path = write_tiny_lab(tmp_path, **changes)
    if changes.get("base") == "shallow":
        save_tiny_base("llama", tmp_path / "shallow", num_hidden_layers=3)
    if changes.get("base") == "silent":
        shutil.copytree(tmp_path / "tiny-base", tmp_path / "silent")
        (tmp_path / "silent/chat_template.jinja").unlink()
    image = path.with_name("image.png")
    Image.new("RGB", (8, 8)).save(image)
    part = {"type": "image", "image": image.name}
    turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}]
    (tmp_path / "mine.jsonl").write_text(json.dumps({"messages": turns, "answers": ["a"]}) + "\n")
    with pytest.raises((ValueError, OSError), match=message):
        run_lab(read_lab_file(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()  # so that the lab can be corrected


@pytest.fixture
def own_task(tmp_path):
    """A lab with a task of its own, whose questions are those of its training data."""
    path = write_tiny_lab(tmp_path, tasks={"mine": {"train": "mine.jsonl", "eval": "mine.jsonl"}}, held_out=2)
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    lines = []
    for number in range(3):
        turns = [{"role": "user", "content": f"<image>{number}?"}, {"role": "assistant", "content": "a"}]
        lines.append(json.dumps({"messages": turns, "images": ["image.png"]}) + "\n")
    (tmp_path / "mine.jsonl").write_text("".join(lines))
    return read_lab_file(path)


def test_a_task_of_ones_own_is_trained_and_asked(own_task, tmp_path, monkeypatch):
    cells_in_this_process(monkeypatch)
    lab = dataclasses.replace(own_task, structures={"lora": 1})
    assert {state for state, _ in run_lab(lab, tmp_path / "out").values()} == {"done"}
    result = json.loads((Cell("mixed", "lora", 0).folder(tmp_path / "out") / RESULT).read_text())
    assert set(result["images"]) == {"mine"} and result["images"]["mine"]["count"] == 2


def test_questions_that_are_in_the_training_data_are_counted(own_task, caplog):
    check_lab(own_task)
    assert "2 of 2 questions of the task 'mine' are also in its training data" in caplog.text


def test_chats_without_an_image_are_refused_where_the_projector_is_trained_alone(own_task, tmp_path):
    with (tmp_path / "mine.jsonl").open("a") as file:
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        file.write(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(ValueError, match="1 of 4 chats in the training data of the task 'mine' have no image"):
        check_lab(own_task)
    check_lab(dataclasses.replace(own_task, projector_steps=0))


def test_a_full_disk_is_named_and_the_lab_goes_on_later(tmp_path, monkeypatch):
    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    lab = read_lab_file(write_tiny_lab(tmp_path, tasks=["digits"]))
    with monkeypatch.context() as full:
        full.setattr(run, "write_held_out", fill)
        with pytest.raises(OSError, match="No space left on device while writing .*out: free some space"):
            run_lab(lab, tmp_path / "out")
    monkeypatch.setattr(run, "base_texts", lambda *_: pytest.fail("here it goes on"))
    with pytest.raises(pytest.fail.Exception, match="here it goes on"):
        run_lab(lab, tmp_path / "out")


def test_a_loss_that_is_not_a_number_marks_its_cell(lab, monkeypatch):
    shutil.rmtree(Cell("mixed", "lora", 0).folder(lab[1]))

    def make(*given):
        structure, processor = made(*given)
        structure.model.vision_tower.embeddings.patch_embedding.bias.data.fill_(math.nan)
        return structure, processor

    made = cells.make_structure
    monkeypatch.setattr(cells, "make_structure", make)
    cells_in_this_process(monkeypatch)
    state, reason = run_lab(*lab)[Cell("mixed", "lora", 0)]
    assert state == "failed" and "nan" in reason.lower()


def test_a_cell_whose_evaluation_fails_is_not_marked_as_failed(lab, monkeypatch):
    place = Cell("mixed", "lora", 0).folder(lab[1])
    for name in (RESULT, IMAGES):
        (place / name).unlink()

    def fail(*_):
        raise ValueError("lm-eval is not installed")

    monkeypatch.setattr(cells, "image_scores", fail)
    with pytest.raises(ValueError, match="lm-eval is not installed"):
        cells.run_cell(lab[1], Cell("mixed", "lora", 0))
    assert lab_states(lab[1])[Cell("mixed", "lora", 0)] == ("started", "trained, to be evaluated")


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / RESULT
    staging.write_json_whole(path, {"average": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(staging.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        staging.write_json_whole(path, {"average": 2})
    assert json.loads(path.read_text()) == {"average": 1} and list(tmp_path.iterdir()) == [path]


def test_a_cell_that_another_process_is_running_is_left_to_it(lab, monkeypatch, caplog):
    cell = Cell("mixed", "lora", 0)
    (cell.folder(lab[1]) / RESULT).unlink()

    def start(command, *, check, env):
        monkeypatch.setattr(sys, "argv", command[2:])
        with pytest.raises(SystemExit) as ended:
            cells.main()
        return SimpleNamespace(returncode=ended.value.code)

    monkeypatch.setattr(run.subprocess, "run", start)
    with lock_output(cell.folder(lab[1]), "lab"), caplog.at_level("INFO"):
        assert run_lab(*lab)[cell][0] == "started"
    assert f"{cell} is left to the process that is running it" in caplog.text


def test_blocks_that_do_not_divide_by_four_are_named(finished, tmp_path, caplog):
    start = cells.start_folder(tmp_path, 0)
    start.mkdir(parents=True)
    (start / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 30}}))
    lab = dataclasses.replace(
        read_lab_file(finished[0]), structures={"full": 1, "genieblue-skip": 1, "cogvlm-post": 1}
    )
    with caplog.at_level("INFO"):
        run._log_blocks(lab, tmp_path)
    copied = "skip [3, 7, 11, 15, 19, 23, 27]; post [23, 24, 25, 26, 27, 28, 29]"
    assert f"30 blocks do not divide by four; copied are: {copied}" in caplog.text


@pytest.mark.parametrize("steps", [0, 2])
def test_all_seeds_start_from_the_projector_that_learned_with_the_small_tower(tmp_path, steps):
    path = write_tiny_lab(
        tmp_path, vision="small", vision_steps=1, reading_steps=2, projector_steps=steps, max_tiles=4,
        structures={"lora": 2},
    )  # fmt: skip
    lab = read_lab_file(path)
    run.prepare(lab, tmp_path)
    learned = load_file(tmp_path / "vision" / PROJECTOR)
    for seed in (0, 1):
        start = load_file(cells.start_folder(tmp_path, seed) / "model.safetensors")
        equal = [torch.equal(start[f"multi_modal_projector.{name}"], value) for name, value in learned.items()]
        assert all(equal) == (steps == 0)
        tower = load_file(tmp_path / "vision" / "model.safetensors")
        assert all(torch.equal(start[f"vision_tower.{name}"], value) for name, value in tower.items()
                   if f"vision_tower.{name}" in start)  # fmt: skip
    said = f"trained for {lab.vision_steps} steps on captions and {lab.reading_steps} on reading"
    assert said in "".join(_setting(SimpleNamespace(lab=lab, decisive=1, groups={}, failed=[], missing=[])))
