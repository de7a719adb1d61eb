"""Training with DeepSpeed's ZeRO, in an environment of its own, on the CPU; what accelerate's launcher asks for."""

import pytest
import torch
from training_processes import DEEPSPEED, run, run_processes
from training_setup import make_base, make_data, make_model, make_settings

from genieblue.training.stages import train
from genieblue.training.zero import engine_settings, zero_stage

# Four samples a step, four steps.
RUN = {"epochs": 2, "save_steps": 2, "keep_checkpoints": 9}
VALIDATED = {**RUN, "eval_steps": 2, "eval_answers": 1}
ASKED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "no"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """What one process finds without DeepSpeed."""
    output = tmp_path_factory.mktemp("alone") / "out"
    return run({
        "base": base, "output": output, "validates": True,
        "options": {**VALIDATED, "batch_size": 2, "gradient_accumulation": 2},
    })  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def compiled(tmp_path_factory):
    """DeepSpeed compiles its exchange between CPUs; the lock of a compilation once killed would be waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield


def check_same(found, alone) -> None:
    """Every step has the loss of one process, and the model is as it was found but for what was trained."""
    assert isinstance(found, dict), found.stderr
    assert found["losses"] == pytest.approx(alone["losses"], abs=1e-4) and len(found["losses"]) == 4
    assert found["weights"] == pytest.approx(alone["weights"], abs=1e-2)
    assert found["text_is_equal"] and found["is_plain"]


def two_processes(launcher, **request):
    assert DEEPSPEED.exists(), f"{DEEPSPEED} is missing: `make test-slow` makes its environment"
    return run_processes(2, launcher, **request)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ZeRO-1", "ZeRO-2"])
def test_two_processes_have_the_losses_of_one_in_training_and_validation(launcher, base, alone, tmp_path):
    options = {**VALIDATED, "gradient_accumulation": 2}
    found = two_processes(launcher, base=base, output=tmp_path / "out", validates=True, options=options)
    check_same(found, alone)
    assert found["validation"] == pytest.approx(alone["validation"], abs=1e-4) and len(found["validation"]) == 2


@pytest.mark.slow
def test_run_of_two_processes_goes_on_with_one_without_deepspeed(base, alone, tmp_path):
    output, options = tmp_path / "out", {**RUN, "gradient_accumulation": 2}
    assert two_processes("ZeRO-2", base=base, output=output, stop_at=3, options=options).returncode != 0
    options = {**RUN, "batch_size": 2, "gradient_accumulation": 2}
    check_same(run({"base": base, "output": output, "resume": True, "options": options}), alone)


@pytest.mark.slow
def test_run_of_one_process_goes_on_with_two_under_deepspeed(base, alone, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(SystemExit):
        run({"base": base, "output": output, "stop_at": 3, "options": {**RUN, "gradient_accumulation": 4}})
    options = {**RUN, "gradient_accumulation": 2}
    check_same(two_processes("ZeRO-2", base=base, output=output, resume=True, options=options), alone)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"DEEPSPEED_ZERO_STAGE": "3"}, "stage 3 is not supported.*base's weights.*--use_fsdp"),
        ({"DEEPSPEED_ZERO_STAGE": "0"}, "stage 0 is not supported"),
        ({"MIXED_PRECISION": "bf16"}, "--mixed_precision .*--bf16"),
        ({"DEEPSPEED_CONFIG_FILE": "zero2.json"}, "--deepspeed_config_file .*--zero_stage 2"),
        ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "--offload_optimizer_device "),
        ({"DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "--offload_param_device "),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_the_launcher_asks_for_and_training_cannot_do_is_refused(asked, reason, monkeypatch):
    for name, value in {**ASKED, **{f"ACCELERATE_{name}": value for name, value in asked.items()}}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=reason):
        zero_stage()


def test_the_launchers_stage_is_taken(monkeypatch):
    assert zero_stage() == 0
    for name, value in ASKED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
    assert zero_stage() == 2  # accelerate's default
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    assert zero_stage() == 1


def test_fsdp_and_deepspeed_together_are_refused(base, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="leave out one of them"):
        train(*make_model(base), make_data(), tmp_path / "out", make_settings(steps=1, fsdp=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=str)
def test_the_engine_has_the_autocast_and_the_sizes_of_the_run(dtype):
    settings = make_settings(batch_size=3, gradient_accumulation=5, max_grad_norm=0.7)
    found = engine_settings(2, settings, dtype)
    assert found["torch_autocast"]["enabled"] is (dtype is not None)
    assert not found.keys() & {"bf16", "fp16", "optimizer", "scheduler"}  # which would replace what the run has
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [found[name] for name in sizes] == [3, 5, 0.7]
