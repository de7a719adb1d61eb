"""The plan of a run: parameters, memory, disk and steps, against the run itself."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from training_setup import make_base, make_data, make_model, make_settings

from genieblue.data.chats import ChatDataset
from genieblue.training import plan as module
from genieblue.training.plan import check_disk, format_plan, remaining
from genieblue.training.stages import plan, train
from genieblue.training.structure import GenieBlueStructure


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def pair(base):
    return make_model(base)


def of(pair, **options):
    return plan(*pair, ChatDataset(make_data()), make_settings(**options))


def test_trained_parameters_are_those_that_training_takes(pair):
    model = pair[0]
    structure = GenieBlueStructure(model)
    numbers = dict.fromkeys(structure.groups, 0)
    for name, parameter in model.named_parameters():
        if group := structure.group_of(name):
            numbers[group] += parameter.numel()
    assert of(pair).trained == numbers
    assert of(pair, stage=1).trained == {"multi_modal_projector": numbers["multi_modal_projector"]}
    assert of(pair).parameters["base"] == sum(each.numel() for each in model.language_model.parameters())


def test_a_checkpoint_has_the_size_that_was_planned(pair, base, tmp_path):
    model, processor = make_model(base)
    planned = of(pair, save_steps=1, keep_checkpoints=1, steps=1)
    train(model, processor, make_data(), tmp_path / "out", make_settings(save_steps=1, keep_checkpoints=1, steps=1))
    checkpoint = tmp_path / "out-run/checkpoint-1"
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
    tensors = [*load_file(checkpoint / "trained_parameters.safetensors").values()]
    tensors += [value for state in moments for name, value in state.items() if name != "step"]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == planned.checkpoint


def test_with_fsdp_a_device_has_its_share_of_what_is_trained_and_all_of_the_base(pair, monkeypatch):
    alone = of(pair)
    monkeypatch.setenv("WORLD_SIZE", "4")
    replicated, shared = of(pair), of(pair, fsdp=True)
    name = "optimizer (AdamW, float32)"
    assert shared.memory[name] == pytest.approx(alone.memory[name] / 4, abs=32)
    assert replicated.memory[name] == alone.memory[name] and shared.memory["base"] == alone.memory["base"]
    assert shared.checkpoint == alone.checkpoint
    assert sum(shared.memory.values()) < sum(replicated.memory.values())


@pytest.mark.parametrize("stage", [1, 2])
def test_with_zero_a_device_has_all_weights_and_shares_of_the_rest(stage, pair, monkeypatch):
    count = sum(of(pair).trained.values())
    for name, value in {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": str(stage)}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.setenv("WORLD_SIZE", "4")
    memory = of(pair).memory
    assert memory["trained weights (float32)"] == pytest.approx((1 + 1 / 4) * 4 * count, abs=4)
    assert memory["gradients (float32)"] == pytest.approx(4 * count if stage == 1 else count, abs=4)
    assert memory["optimizer (AdamW, float32)"] == pytest.approx(8 * count / 4, abs=8)


@pytest.mark.parametrize("options", [{"epochs": 3}, {"steps": 5}, {"epochs": 2, "gradient_accumulation": 2}], ids=str)
def test_the_steps_are_those_of_the_run(base, tmp_path, options):
    model, processor = make_model(base)
    planned = plan(model, processor, ChatDataset(make_data()), make_settings(**options)).steps
    assert train(model, processor, make_data(), tmp_path / "out", make_settings(**options)).steps == planned


def test_memory_is_itemised_and_grows_with_what_is_trained(pair):
    second, first = of(pair), of(pair, stage=1)
    weights = sum(each.numel() * each.element_size() for each in pair[0].parameters())
    for planned in (first, second):
        kinds = ("base", "trained weights (float32)", "untrained parts")
        assert sum(planned.memory.get(kind, 0) for kind in kinds) == weights
    assert second.memory["optimizer (AdamW, float32)"] == 8 * sum(second.trained.values())
    assert sum(second.memory.values()) > sum(first.memory.values())
    less = of(pair, gradient_checkpointing=True).memory["activations (estimate)"]
    assert less < second.memory["activations (estimate)"]


def test_a_disk_that_will_be_full_is_refused_before_training(pair, tmp_path, monkeypatch):
    planned = of(pair, save_steps=1)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _path: SimpleNamespace(free=planned.kept - 1))
    with pytest.raises(OSError, match=r"will write .* free some space, .*--keep-checkpoints"):
        check_disk(planned, tmp_path / "not yet" / "there")
    model, processor = pair
    with pytest.raises(OSError, match="will write"):
        train(model, processor, make_data(), tmp_path / "out", make_settings(save_steps=1))
    assert not list(tmp_path.iterdir())


def test_what_a_resumed_run_has_written_needs_no_space_again(pair, tmp_path, monkeypatch):
    planned = of(pair, save_steps=1)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1/optimizer.pt").write_bytes(bytes(1000))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _path: SimpleNamespace(free=planned.kept - 1000))
    check_disk(planned, tmp_path)


def test_the_plan_says_what_is_trained_kept_and_learned(pair):
    text = "\n".join(format_plan(of(pair, save_steps=1)))
    for words in ("replicated_blocks", "stay frozen", "Memory per device", "per checkpoint", "tokens"):
        assert words in text


@pytest.mark.parametrize(
    "steps, seconds, words",
    [
        (7200, 1.0, "2.0 hours left for 7,200 steps of 1.00 s, about 6.00 at 3 an hour"),
        (120, 2.0, "4 minutes"),
        (10, 1.0, "10 s left"),
    ],
    ids=["hours", "minutes", "seconds"],
)
def test_time_and_cost_of_what_is_left(steps, seconds, words):
    assert words in remaining(steps, seconds, 3.0)
