"""The state dict is what is ours, and every client that restores one restores all of it or is told why not."""

import copy

import accelerate
import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, load_model, save_file, save_model
from tiny_genieblue import IMAGE, change_adapter, prompt, row, save_tiny_pair, tiles, tiny_genieblue
from tiny_models import tiny_base
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint

from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.language_adapter_genieblue import adapter_parameters

REQUEST, PIXELS = row(5, IMAGE, 9, 40, 41), tiles()


@torch.no_grad()
def other_genieblue(dtype=torch.float32):
    """As `tiny_genieblue`, on an equal base and with every tensor of ours another one."""
    model = change_adapter(tiny_genieblue(base=tiny_base("llama", dtype=dtype)), seed=23)
    for parameter in (*model.vision_tower.parameters(), *model.multi_modal_projector.parameters()):
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def values(model):
    return {name: (value.dtype, value.tolist()) for name, value in model.state_dict().items()}


def base_values(model):
    return {
        name: (id(value), value.tolist()) for name, value in model.language_model.state_dict(keep_vars=True).items()
    }


def only(state, *parts):
    return {name: value for name, value in state.items() if name.startswith(parts)}


def save_sharded(state, folder):
    """Two files of tensors and the index of them, as transformers writes large models."""
    folder.mkdir()
    names = sorted(state)
    index = {name: f"model-{1 + 2 * i // len(names):05}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(index.values()):
        part = {name: state[name].clone() for name in names if index[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        '{"metadata": {}, "weight_map": {' + ", ".join(f'"{name}": "{file}"' for name, file in index.items()) + "}}"
    )
    return folder


# What it holds


def test_state_dict_is_what_is_ours_once():
    model = tiny_genieblue()
    model(REQUEST, pixel_values=PIXELS)
    state, view = model.state_dict(), model.multimodal_language_model
    assert {*state} == {
        *(f"vision_tower.{name}" for name in model.vision_tower.state_dict()),
        *(f"multi_modal_projector.{name}" for name in model.multi_modal_projector.state_dict()),
        *(f"multimodal_language_model.{name}" for name, _, _ in adapter_parameters(view)),
    }
    own = dict(model.named_parameters())
    assert all(state[name].data_ptr() == own[name].data_ptr() for name in state if name in own)
    bases = {value.data_ptr() for value in (*model.language_model.parameters(), *model.language_model.buffers())}
    assert not bases & {value.data_ptr() for value in state.values()}


@pytest.mark.parametrize("family", ["llama-tied", "qwen3", "bluelm"])
def test_state_dict_of_any_base_goes_round(family):
    model, other = tiny_genieblue(family), change_adapter(tiny_genieblue(family), seed=3)
    assert not any(".base_layer." in name or ".original_module." in name for name in model.state_dict())
    other.load_state_dict(model.state_dict())
    assert values(other) == values(model)


def test_wrapper_has_the_same_state_under_its_prefix():
    model = tiny_genieblue()
    wrapped = nn.ModuleDict({"module": model, "head": nn.Linear(2, 2)})
    assert {*wrapped.state_dict()} == {*(f"module.{name}" for name in model.state_dict()), "head.weight", "head.bias"}


# Loading it, by every client


CLIENTS = {
    "load_state_dict": lambda model, state, _: model.load_state_dict(state),
    "not strict": lambda model, state, _: model.load_state_dict(state, strict=False),
    "assigned": lambda model, state, _: model.load_state_dict(state, assign=True),
    "in a wrapper": lambda model, state, _: nn.ModuleDict({"module": model}).load_state_dict(
        {f"module.{name}": value for name, value in state.items()}
    ),
    "a deep copy's": lambda model, state, _: model.load_state_dict(copy.deepcopy(model).state_dict() | state),
    "safetensors": lambda model, _, folder: load_model(model, folder / "model.safetensors"),
    "distributed checkpoint": lambda model, state, _: set_model_state_dict(model, state),
    "distributed, filled up": lambda model, state, _: set_model_state_dict(
        model, state, options=StateDictOptions(full_state_dict=True, strict=False)
    ),
}  # fmt: skip
clients = pytest.mark.parametrize("load", CLIENTS.values(), ids=CLIENTS)


@clients
def test_client_restores_all_of_ours_and_nothing_else(load, tmp_path):
    model, source = tiny_genieblue(), other_genieblue()
    source(REQUEST, pixel_values=PIXELS)
    save_model(source, tmp_path / "model.safetensors")
    state = {name: value.clone() for name, value in source.state_dict().items()}
    base = base_values(model)
    assert values(model) != values(source)
    load(model, state, tmp_path)
    assert values(model) == values(source)
    assert base_values(model) == base
    assert torch.equal(model(REQUEST, pixel_values=PIXELS).logits, source(REQUEST, pixel_values=PIXELS).logits)
    assert torch.equal(model(prompt()).logits, tiny_base("llama")(prompt()).logits)


# A deep copy's client adds what is missing, so it never loads a half.
@pytest.mark.parametrize("client", [name for name in CLIENTS if name != "a deep copy's"])
def test_client_with_half_of_it_is_refused_and_changes_nothing(client, tmp_path):
    load = CLIENTS[client]
    model = tiny_genieblue()
    half = only(other_genieblue().state_dict(), "vision_tower", "multi_modal_projector")
    save_file(half, tmp_path / "model.safetensors", {"format": "pt"})
    before, base = values(model), base_values(model)
    with pytest.raises(ValueError, match=r"missing: .*lora_A.* and \d+ more.*multi_modal_projector.load_state_dict"):
        load(model, half, tmp_path)
    assert values(model) == before and base_values(model) == base


SPOILS = {
    "weights of the base": (
        lambda state: state | {"language_model.lm_head.weight": torch.zeros(128, 32)}, "of the base"
    ),
    "weights under the view": (
        lambda state: state | {"multimodal_language_model.lm_head.weight": torch.zeros(128, 32)}, "of the base"
    ),
    "another rank": (
        lambda state: {name: value[:2] if ".lora_A." in name else value for name, value in state.items()},
        "of another shape",
    ),
    "names of PEFT": (
        lambda state: {name.replace(".default.", "."): value for name, value in state.items()}, "missing"
    ),
    "nothing": (lambda state: {}, "missing"),
}  # fmt: skip


@pytest.mark.parametrize("spoil, message", SPOILS.values(), ids=SPOILS)
def test_state_that_does_not_fit_is_refused_strict_or_not_and_changes_nothing(spoil, message):
    model, state = tiny_genieblue(), other_genieblue().state_dict()
    before, base = values(model), base_values(model)
    for strict in (True, False):
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(spoil(dict(state)), strict=strict)
    assert values(model) == before and base_values(model) == base


def test_unknown_entries_are_reported_as_torch_reports_them():
    model, state = tiny_genieblue(), other_genieblue().state_dict()
    result = model.load_state_dict({**state, "value_head.weight": torch.zeros(1)}, strict=False)
    assert result.missing_keys == [] and result.unexpected_keys == ["value_head.weight"]
    with pytest.raises(RuntimeError, match="value_head.weight"):
        model.load_state_dict({**state, "value_head.weight": torch.zeros(1)})


def test_part_is_loaded_by_the_part():
    model, other = tiny_genieblue(), other_genieblue()
    model.multi_modal_projector.load_state_dict(other.multi_modal_projector.state_dict())
    assert torch.equal(model.multi_modal_projector.linear_1.weight, other.multi_modal_projector.linear_1.weight)


def test_shards_are_refused_where_they_are_loaded_one_by_one(tmp_path):
    model = tiny_genieblue()
    folder, before = save_sharded(other_genieblue().state_dict(), tmp_path / "sharded"), values(model)
    with pytest.raises(ValueError, match="missing: "):
        load_sharded_checkpoint(model, str(folder), strict=False)
    assert values(model) == before


WHOLE = {"": "cpu"}
BY_ACCELERATE = {
    "in the model": lambda model, place, _: accelerate.load_checkpoint_in_model(model, place, device_map=WHOLE),
    "without a map": lambda model, place, _: accelerate.load_checkpoint_in_model(model, place),
    "onto the disk": lambda model, place, folder: accelerate.load_checkpoint_in_model(
        model, place, device_map={"": "disk"}, offload_folder=str(folder / "offloaded")
    ),
    "dispatched": lambda model, place, _: accelerate.load_checkpoint_and_dispatch(model, place, device_map="auto"),
    "the view alone": lambda model, place, _: accelerate.load_checkpoint_in_model(
        model.multimodal_language_model, place, device_map=WHOLE
    ),
}  # fmt: skip


@pytest.mark.parametrize("load", BY_ACCELERATE.values(), ids=BY_ACCELERATE)
def test_accelerate_which_would_restore_half_of_a_saved_folder_is_refused(load, tmp_path):
    model = tiny_genieblue()
    other_genieblue().save_pretrained(tmp_path / "other")
    before, base = values(model), base_values(model)
    with pytest.raises(ValueError, match="refused for a loaded GenieBlue.*from_pretrained"):
        load(model, str(tmp_path / "other"), tmp_path)
    assert values(model) == before and base_values(model) == base


def test_view_takes_its_adapter_and_no_weight_of_the_base():
    model, other = tiny_genieblue(), other_genieblue()
    view, source = model.multimodal_language_model, other.multimodal_language_model.state_dict()
    base = base_values(model)
    with torch.no_grad():
        other.language_model.lm_head.weight.add_(1)
    for part, prefix in ((view, ""), (view.model, "model.")):
        state = {name.removeprefix(prefix): value for name, value in source.items() if name.startswith(prefix)}
        foreign = {**state, next(iter(state)): next(iter(state.values())) + 1}
        with pytest.raises(ValueError, match="is not a tensor of the adapter"):
            part.load_state_dict(foreign, strict=False)
    adapter = {name: source[name] for name, _, _ in adapter_parameters(view)}
    assert view.load_state_dict(adapter, strict=False).unexpected_keys == []
    assert all(torch.equal(view.state_dict()[name], value) for name, value in adapter.items())
    view.load_state_dict(view.state_dict())
    assert base_values(model) == base


def test_weights_of_peft_are_refused_outside_of_their_folder(tmp_path):
    model = tiny_genieblue()
    other_genieblue().save_pretrained(tmp_path / "other")
    adapter, before = load_file(tmp_path / "other/language_adapter/adapter_model.safetensors"), values(model)
    for load in (lambda: set_peft_model_state_dict(model, adapter),
                 lambda: model.load_adapter(str(tmp_path / "other/language_adapter"))):  # fmt: skip
        with pytest.raises((ValueError, AttributeError)):
            load()
        assert values(model) == before


def test_distributed_checkpoint_takes_what_is_ours():
    model = tiny_genieblue()
    assert {*get_model_state_dict(model)} == {*model.state_dict()}


@pytest.fixture
def one_process():
    """A group of processes of which this one is all."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "DDP": lambda model: torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True),
    "FSDP2": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (1,))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_distributed_wrapper_restores_all_of_ours_or_nothing(wrap, one_process):
    wrapped, source = wrap(tiny_genieblue()), other_genieblue()
    options = StateDictOptions(full_state_dict=True, strict=False)
    state = {name: value.clone() for name, value in source.state_dict().items()}
    before = get_model_state_dict(wrapped, options=options)
    assert {*before} == {*state}
    with pytest.raises(ValueError, match="missing: "):
        set_model_state_dict(wrapped, only(state, "vision_tower"), options=options)
    after = get_model_state_dict(wrapped, options=options)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    set_model_state_dict(wrapped, dict(state), options=options)
    after = get_model_state_dict(wrapped, options=options)
    assert all(torch.equal(value, after[name]) for name, value in state.items())
    assert torch.equal(wrapped(prompt(), view="text").logits, tiny_base("llama")(prompt()).logits)


def test_accelerator_saves_and_loads_all_of_ours(tmp_path):
    source, model = other_genieblue(), tiny_genieblue()
    source(REQUEST, pixel_values=PIXELS)
    for each, step in ((source, "save_state"), (model, "load_state")):
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.prepare(each)
        getattr(accelerator, step)(str(tmp_path / "state"))
        accelerator.free_memory()
    assert values(model) == values(source)


# Trainer


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"input_ids": REQUEST[0], "labels": REQUEST[0].masked_fill(REQUEST[0] == 128, -100).roll(index)}


def collate(rows):
    batch = {name: torch.stack([one[name] for one in rows]) for name in ("input_ids", "labels")}
    return {**batch, "pixel_values": tiles(len(rows))}


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def trainer_of(model, folder, *callbacks, **options):
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=2, save_steps=2, report_to=[], use_cpu=True,
        learning_rate=1e-2, disable_tqdm=True, save_strategy="steps", seed=1, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Data(), eval_dataset=Data(), data_collator=collate,
                   callbacks=list(callbacks))  # fmt: skip


def trained(model, folder, *callbacks, resume=None, **options):
    trainer_of(model, folder, *callbacks, **options).train(resume_from_checkpoint=resume)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stock_trainer_resumes_bit_by_bit(dtype, tmp_path):
    def new():
        return tiny_genieblue(base=tiny_base("llama", dtype=dtype))

    whole = trained(new(), tmp_path / "whole")
    trained(new(), tmp_path / "cut", Interrupt())
    resumed = trained(new(), tmp_path / "cut", resume=str(tmp_path / "cut/checkpoint-2"))
    assert values(whole) != values(new())
    assert values(resumed) == values(whole)
    assert base_values(resumed).keys() == base_values(whole).keys()


def test_stock_trainer_ends_with_the_best_model(tmp_path):
    """By a loss that rises: the best is the first checkpoint, not the last state."""
    model = tiny_genieblue()
    at_two = {}

    class Remember(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                at_two.update(values(model))

    trainer = trainer_of(model, tmp_path, Remember(), load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
                         metric_for_best_model="step", greater_is_better=False)  # fmt: skip
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_step": trainer.state.global_step}
    trainer.train()
    assert values(model) == at_two


def test_stock_trainer_refuses_a_checkpoint_without_the_adapter(tmp_path):
    model = tiny_genieblue()
    trained(model, tmp_path, Interrupt())
    weights = tmp_path / "checkpoint-2/model.safetensors"
    save_file(only(load_file(weights), "vision_tower", "multi_modal_projector"), weights, {"format": "pt"})
    before = values(model)
    with pytest.raises(ValueError, match="missing: "):
        trained(model, tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert values(model) == before


# Saving it


def test_checkpoint_folder_loads_like_any_other(tmp_path):
    save_tiny_pair(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = tiny_genieblue(base=base)
    for name in ("checkpoint-7", "plain"):
        model.save_pretrained(tmp_path / name)
    state = load_file(tmp_path / "checkpoint-7/model.safetensors")
    assert {*state} == {*model.state_dict()}
    assert {*load_file(tmp_path / "plain/model.safetensors")} == {
        *only(model.state_dict(), "vision_tower", "multi_modal_projector")
    }
    loaded = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-7")
    assert values(loaded) == values(model)
    cards = [(tmp_path / name / "README.md").read_text().split("| total")[1] for name in ("checkpoint-7", "plain")]
    assert cards[0].splitlines()[0] == cards[1].splitlines()[0]


def test_given_state_dict_is_what_is_written(tmp_path):
    """As FSDP needs it, whose parameters in memory are pieces."""
    model, other = tiny_genieblue(), other_genieblue()
    model.save_pretrained(tmp_path / "given", state_dict=other.state_dict())
    loaded = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "given", base_model=tiny_base("llama"))
    assert values(loaded) == values(other)


def test_half_a_state_dict_is_not_written(tmp_path):
    model = tiny_genieblue()
    with pytest.raises(ValueError, match="missing: "):
        model.save_pretrained(tmp_path / "half", state_dict=only(model.state_dict(), "vision_tower"))
    assert not (tmp_path / "half").exists()


def test_what_was_added_to_a_model_is_not_lost_in_silence(tmp_path):
    model = tiny_genieblue()
    model.add_module("value_head", nn.Linear(2, 1))
    with pytest.raises(ValueError, match="no place for value_head.weight"):
        model.save_pretrained(tmp_path / "added")
    assert not (tmp_path / "added").exists()
