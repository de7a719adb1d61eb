"""Training by several processes, on the CPU: DDP and FSDP2, other numbers of processes at a resume, ends."""

import json
import time

import pytest
from command_line import error_of
from training_processes import launch, run, run_in_turn, run_processes
from training_setup import make_base, make_data, make_model, make_settings

from genieblue.training.feature_cache import FEATURES
from genieblue.training.sharding import wants_fsdp
from genieblue.training.stages import train

# Four samples a step, four steps.
RUN = {"epochs": 2, "save_steps": 2, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """What one process finds."""
    output = tmp_path_factory.mktemp("alone") / "out"
    options = {**RUN, "batch_size": 2, "gradient_accumulation": 2, "eval_steps": 2, "eval_answers": 1}
    return run({"base": base, "output": output, "validates": True, "options": options})


def check_same(found, alone) -> None:
    """Every step has the loss of one process, and the model is as it was found but for what was trained."""
    assert isinstance(found, dict), found.stderr
    assert found["losses"] == pytest.approx(alone["losses"], abs=1e-4) and len(found["losses"]) == 4
    assert found["weights"] == pytest.approx(alone["weights"], abs=1e-2)
    assert found["text_is_equal"] and found["is_plain"]


@pytest.fixture(scope="module", params=[False, True], ids=["DDP", "FSDP2"])
def together(request, base, tmp_path_factory):
    """A folder, and what two processes find: with validation, in one that keeps no features, and in one that does."""
    folder = tmp_path_factory.mktemp("together")
    validated = {**RUN, "gradient_accumulation": 2, "eval_steps": 2, "eval_answers": 1}
    frozen = {"epochs": 3, "learning_rates": {"vision_tower": 0.0}}
    runs = {"validated": validated, "plain": frozen, "kept": {**frozen, "cache_image_features": True}}
    requests = [
        {"base": base, "output": folder / name, "validates": name == "validated",
         "options": {**options, "fsdp": request.param}}
        for name, options in runs.items()
    ]  # fmt: skip
    return folder, *run_in_turn(2, *requests)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_in_training_and_validation(together, alone):
    found = together[1]
    check_same(found, alone)
    assert found["validation"] == pytest.approx(alone["validation"], abs=1e-4) and len(found["validation"]) == 2


@pytest.mark.slow
def test_two_processes_share_the_features_that_they_keep(together):
    """With texts, for which FSDP runs a black tile."""
    folder, _, plain, found = together
    assert isinstance(found, dict), found.stderr
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert found["weights"] == pytest.approx(plain["weights"], abs=1e-4)
    assert not (folder / "kept-run" / FEATURES).exists()


@pytest.mark.slow
def test_accelerate_launch_shards_too(base, alone, tmp_path):
    options = {**RUN, "gradient_accumulation": 2, "gradient_checkpointing": True}
    check_same(run_processes(2, "accelerate", base=base, output=tmp_path / "out", options=options), alone)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
def test_run_of_two_processes_goes_on_with_one(fsdp, base, alone, tmp_path):
    output = tmp_path / "out"
    options = {**RUN, "gradient_accumulation": 2, "fsdp": fsdp}
    assert run_processes(2, base=base, output=output, stop_at=3, options=options).returncode != 0
    with pytest.raises(ValueError, match="of a run with 4 samples per step, this one has 3.*4 again"):
        train(*make_model(base), make_data()[2:10], output, make_settings(**RUN, batch_size=3), resume=True)
    options = {**RUN, "batch_size": 2, "gradient_accumulation": 2}
    check_same(run({"base": base, "output": output, "resume": True, "options": options}), alone)


@pytest.mark.slow
def test_run_of_one_process_goes_on_with_two(base, alone, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(SystemExit):
        run({"base": base, "output": output, "stop_at": 3, "options": {**RUN, "gradient_accumulation": 4}})
    options = {**RUN, "batch_size": 2, "fsdp": True}
    check_same(run_processes(2, base=base, output=output, resume=True, options=options), alone)


@pytest.mark.slow
def test_process_that_is_killed_ends_all_and_leaves_a_checkpoint(base, alone, tmp_path):
    output, options = tmp_path / "out", {**RUN, "gradient_accumulation": 2, "fsdp": True}
    started = time.monotonic()
    assert run_processes(2, base=base, output=output, kill_at=3, options=options).returncode != 0
    assert time.monotonic() - started < 60 and not output.exists()
    options = {**RUN, "gradient_accumulation": 4}
    check_same(run({"base": base, "output": output, "resume": True, "options": options}), alone)


@pytest.mark.slow
def test_the_command_prints_once_and_saves_once(base, tmp_path):
    model, processor = make_model(base)
    model.save_pretrained(tmp_path / "model", processor=processor)
    rows = [{**row, "images": []} for row in make_data()[8:]]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "-m", "genieblue", "train", "--stage", "2", "--model", str(tmp_path / "model"), "--batch-size", "1", "--fsdp",
        "--steps", "2", "--out", str(tmp_path / "out"), "--data",
    ]  # fmt: skip
    done = launch(2, *command, str(tmp_path / "data.jsonl"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stage 2, 2 steps over 3 samples") == 1
    assert done.stderr.count("Trained parameters:") == done.stderr.count("The base's bytes are unchanged") == 1
    assert (tmp_path / "out" / "config.json").is_file()
    failed = launch(2, *command, str(tmp_path / "none.jsonl"))
    assert failed.returncode != 0 and failed.stderr.count("none.jsonl") == 1


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "--fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_a_launcher_asks_for_and_training_cannot_do_is_refused(environment, reason, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=reason):
        wants_fsdp(False)


def test_fsdp_with_one_process_is_refused_with_the_command_for_several(base, tmp_path):
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        train(*make_model(base), make_data(), tmp_path / "out", make_settings(steps=1, fsdp=True))


def test_other_process_than_the_first_reports_an_error_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as the command sets it; here, so that it is taken back
    monkeypatch.setattr("genieblue.cli.terminal.SECONDS_TO_FAIL_FIRST", 0)
    assert "stage" in error_of("train", "--model", tmp_path)


def test_the_launchers_fsdp_holds_for_a_plan_and_for_the_run_after_it(monkeypatch):
    monkeypatch.setattr("os.environ", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
    assert [wants_fsdp(False), wants_fsdp(False)] == [True, True]
