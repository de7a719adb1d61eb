"""Resuming: a run that was interrupted ends where an uninterrupted one does, whatever it was interrupted in."""

import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from training_setup import RUN, AtStep, losses, make_base, make_data, make_model, make_settings

from genieblue.data.chats import ChatDataset
from genieblue.data.mixture import MixedChats
from genieblue.training.stages import train
from genieblue.training.structure import GenieBlueStructure

ROOT = Path(__file__).parents[3]
SUPPORT = ROOT / "tests" / "support"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("bases") / "base")


class Interrupted(Exception):
    pass


def interrupt(_model=None, *args, **kwargs) -> None:
    raise Interrupted


def start(base, output, *, stop_at=None, resume=False, **options):
    """Trains a new model; returns it with the result."""
    model, processor = make_model(base)
    callbacks = [] if stop_at is None else [AtStep(stop_at, interrupt)]
    settings = make_settings(**{**RUN, **options})
    return model, train(model, processor, make_data(), output, settings, resume=resume, callbacks=callbacks)


def checkpoints(output) -> list[str]:
    folder = output.with_name(f"{output.name}-run")
    return sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())


def same_weights(first, second) -> bool:
    others = dict(second.named_parameters())
    return all(torch.equal(value, others[name]) for name, value in first.named_parameters())


# Eleven samples make six steps an epoch: within the first epoch, at its end, within the second one.
@pytest.mark.parametrize("stop_at", [3, 6, 9])
def test_resumed_run_equals_an_uninterrupted_one_bit_by_bit(stop_at, base, tmp_path):
    whole_model, whole = start(base, tmp_path / "whole")
    with pytest.raises(Interrupted):
        start(base, tmp_path / "cut", stop_at=stop_at)
    assert not (tmp_path / "cut").exists()
    model, result = start(base, tmp_path / "cut", resume=True)
    assert losses(result) == losses(whole) and list(losses(result)) == list(range(1, 19))
    assert same_weights(model, whole_model)


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one_with_accumulation_in_bfloat16(base, tmp_path):
    options = {"gradient_accumulation": 2, "bf16": True, "batch_size": 1}
    whole_model, whole = start(base, tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        start(base, tmp_path / "cut", stop_at=5, **options)
    model, result = start(base, tmp_path / "cut", resume=True, **options)
    assert losses(result) == losses(whole) and same_weights(model, whole_model)


def test_run_killed_by_the_system_resumes_to_the_same_losses_and_weights(base, tmp_path):
    command = [sys.executable, str(SUPPORT / "training_setup.py"), str(base), str(tmp_path / "killed"), "7"]
    path = os.pathsep.join([str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoints(tmp_path / "killed") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    model, resumed = start(base, tmp_path / "killed", resume=True)
    whole_model, whole = start(base, tmp_path / "whole")
    assert losses(resumed) == losses(whole) and same_weights(model, whole_model)


def test_checkpoint_cut_short_while_it_is_written_is_never_taken(base, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with pytest.raises(Interrupted):
        start(base, output, stop_at=3)
    with monkeypatch.context() as patch:
        patch.setattr("genieblue.training.trainer.StageTrainer._save_rng_state", interrupt)
        with pytest.raises(Interrupted):
            start(base, output, resume=True)
    assert checkpoints(output) == ["checkpoint-2", "unfinished"]
    _, result = start(base, output, resume=True, save_steps=9)
    assert result.steps == 18 and checkpoints(output) == ["checkpoint-18", "checkpoint-2", "checkpoint-9"]


def test_without_a_checkpoint_resume_starts_from_the_beginning_and_says_so(base, tmp_path, caplog):
    _, result = start(base, tmp_path / "out", resume=True, epochs=1)
    assert result.steps == 6 and "starts from the beginning" in caplog.text


def test_new_run_does_not_mix_with_the_checkpoints_of_an_earlier_one(base, tmp_path):
    with pytest.raises(Interrupted):
        start(base, tmp_path / "out", stop_at=3)
    with pytest.raises(ValueError, match="An earlier run left checkpoints"):
        start(base, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"learning_rate": 5e-4}, "learning_rate was 0.001, now 0.0005"),
        ({"stage": 1}, "stage was 2, now 1"),
        ({"epochs": 4}, "epochs was 3, now 4"),
    ],
)
def test_checkpoint_of_a_run_with_other_settings_is_refused(options, reason, base, tmp_path):
    with pytest.raises(Interrupted):
        start(base, tmp_path / "out", stop_at=3)
    with pytest.raises(ValueError, match=reason):
        start(base, tmp_path / "out", resume=True, **options)


@pytest.mark.parametrize("bases", [("a", "b"), ("a", None), (None, "b")], ids=str)
def test_checkpoint_of_a_run_on_another_quantized_base_is_refused(bases, base, tmp_path):
    def run(quantized_base, resume, *callbacks):
        model, processor = make_model(base)
        structure = GenieBlueStructure(model, quantized_base and {"quantized base": quantized_base})
        settings = make_settings(**RUN)
        train(structure, processor, make_data(), tmp_path / "out", settings, resume=resume, callbacks=callbacks)

    with pytest.raises(Interrupted):
        run(bases[0], False, AtStep(3, interrupt))
    with pytest.raises(ValueError, match=f"quantized base was {bases[0]!r}, now {bases[1]!r}"):
        run(bases[1], True)


def test_checkpoint_of_a_run_over_other_data_is_refused(base, tmp_path):
    with pytest.raises(Interrupted):
        start(base, tmp_path / "out", stop_at=3)
    other = make_data()
    other[-1]["messages"][-1]["content"] = "Another answer."
    with pytest.raises(ValueError, match="sha256 of the data was"):
        train(*make_model(base), other, tmp_path / "out", make_settings(**RUN), resume=True)


def test_second_run_to_the_same_output_is_refused_at_once(base, tmp_path):
    refused = []

    def start_another(_model):
        with pytest.raises(OSError, match="Another training is writing to .*out-run") as error:
            start(base, tmp_path / "out")
        refused.append(error)

    train(
        *make_model(base), make_data(), tmp_path / "out", make_settings(steps=2), callbacks=[AtStep(1, start_another)]
    )
    assert refused and checkpoints(tmp_path / "out") == []


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 6336 vs 6228"),
            marks=pytest.mark.slow,
            id="torch",
        ),
        pytest.param(OSError(28, "No space left on device"), id="system"),
    ],
)
def test_full_disk_leaves_the_last_checkpoint_to_go_on_from(error, base, tmp_path, monkeypatch):
    whole_model, whole = start(base, tmp_path / "whole")
    output, save, calls = tmp_path / "out", torch.save, []

    def full(content, path, *args, **kwargs):
        calls.append(path)
        if "checkpoint-4" in str(path):
            raise error
        save(content, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", full)
        with pytest.raises(OSError, match=r"checkpoint-4 could not be written to .*out-run .*--resume"):
            start(base, output)
    assert calls and checkpoints(output) == ["checkpoint-2"]
    model, result = start(base, output, resume=True)
    assert losses(result) == losses(whole) and same_weights(model, whole_model)


def test_settings_that_do_not_change_what_is_learned_may_change_on_resume(base, tmp_path):
    with pytest.raises(Interrupted):
        start(base, tmp_path / "out", stop_at=3)
    _, result = start(base, tmp_path / "out", resume=True, keep_checkpoints=1, gradient_checkpointing=True)
    assert result.steps == 18 and len(checkpoints(tmp_path / "out")) == 1


def test_folder_that_is_no_complete_checkpoint_is_refused(base, tmp_path):
    with pytest.raises(Interrupted):
        start(base, tmp_path / "out", stop_at=3)
    checkpoint = tmp_path / "out-run" / "checkpoint-2"
    (checkpoint / "optimizer.pt").unlink()
    for path in (True, checkpoint, tmp_path / "none"):
        with pytest.raises(ValueError, match="not a complete checkpoint.*optimizer.pt"):
            start(base, tmp_path / "out", resume=path)


def test_damaged_weights_in_a_checkpoint_are_an_error(base, tmp_path):
    with pytest.raises(Interrupted):
        start(base, tmp_path / "out", stop_at=3)
    weights = tmp_path / "out-run" / "checkpoint-2" / "trained_parameters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match="cannot be read"):
        start(base, tmp_path / "out", resume=True)


@pytest.mark.parametrize("steps", [4, 6], ids=["within an epoch", "at its end"])
def test_resuming_a_finished_run_trains_no_further_step(steps, base, tmp_path):
    first_model, first = start(base, tmp_path / "out", epochs=None, steps=steps)
    model, result = start(base, tmp_path / "out", resume=True, epochs=None, steps=steps)
    assert result.steps == first.steps == steps and losses(result) == losses(first)
    assert same_weights(model, first_model)


def test_a_mixture_resumes_to_the_same_losses(base, tmp_path):
    def start_mixture(output, **options):
        model, processor = make_model(base)
        parts = {"pictures": ChatDataset(make_data()[:8]), "texts": ChatDataset(make_data()[8:])}
        chats = MixedChats(parts, {"pictures": Fraction(1), "texts": Fraction(1)})
        return train(model, processor, chats, output, make_settings(epochs=1, save_steps=2), **options)

    whole = start_mixture(tmp_path / "whole")
    with pytest.raises(Interrupted):
        start_mixture(tmp_path / "cut", callbacks=[AtStep(5, interrupt)])
    assert losses(start_mixture(tmp_path / "cut", resume=True)) == losses(whole)
    assert whole.steps == 8 and whole.num_samples == 11  # sixteen drawn
