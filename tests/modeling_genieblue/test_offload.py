"""Offloading: weights that two views share lie on a device, or the model is refused by name."""

import accelerate
import pytest
import torch
from accelerate.hooks import attach_align_device_hook
from tiny_genieblue import IMAGE, prompt, row, save_tiny_pair, tiles, tiny_genieblue
from tiny_models import tiny_base, tiny_vision_tower
from transformers import AutoModelForCausalLM

from modeling_genieblue import GenieBlueForConditionalGeneration

REQUEST, PIXELS = row(5, IMAGE, 9, 40, 41), tiles()
PARTS = ("vision_tower", "multi_modal_projector", "language_model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))


def load(folder, **kwargs):
    return GenieBlueForConditionalGeneration.from_pretrained(folder, **kwargs)


LOADS = {
    "too little memory": {"device_map": "auto", "max_memory": {"cpu": "30KB"}},
    "all on the disk": {"device_map": {"": "disk"}},
    "disk": {"device_map": "disk"},
    "the base on the disk": {"device_map": {**dict.fromkeys(PARTS, "cpu"), "language_model": "disk"}},
    "a block on the disk": {"device_map": {**dict.fromkeys(PARTS, "cpu"), "language_model.model.layers.2": "disk"}},
    "the tower on the disk": {"device_map": {**dict.fromkeys(PARTS, "cpu"), "vision_tower": "disk"}},
}


@pytest.mark.parametrize("options", LOADS.values(), ids=LOADS)
def test_load_that_offloads_is_refused_by_name(options, folder, tmp_path):
    with pytest.raises(ValueError, match="offload.*quantization_config.*device_map"):
        load(folder, offload_folder=tmp_path / "offload", **options)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, dict.fromkeys(PARTS, "cpu")], ids=str)
def test_map_of_whole_modules_onto_devices_is_allowed(device_map, folder):
    expected, model = load(folder), load(folder, device_map=device_map)
    assert torch.equal(model(REQUEST, pixel_values=PIXELS).logits, expected(REQUEST, pixel_values=PIXELS).logits)
    assert torch.equal(model(prompt()).logits, expected(prompt()).logits)


def test_offloaded_base_is_refused_and_stays_as_it_was(folder, tmp_path):
    options = {"device_map": {"model": "disk", "lm_head": "cpu"}, "offload_folder": tmp_path / "offload"}
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base", **options)
    expected = base(prompt()).logits
    for make in (lambda: load(folder, base_model=base),
                 lambda: GenieBlueForConditionalGeneration.from_base(base, tiny_vision_tower())):  # fmt: skip
        with pytest.raises(ValueError, match="offloaded"):
            make()
        assert torch.equal(base(prompt()).logits, expected)


OFFLOADS = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, str(folder)),
    "cpu_offload_with_hook": lambda model, folder: accelerate.cpu_offload_with_hook(model, "cpu"),
    "dispatch_model": lambda model, folder: accelerate.dispatch_model(
        model, {**dict.fromkeys((*PARTS, "multimodal_language_model"), "cpu"), "vision_tower": "disk"},
        offload_dir=str(folder),
    ),
    "force_hooks": lambda model, folder: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True),
}  # fmt: skip


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_offload_of_a_loaded_model_is_refused_before_anything_changes(offload, tmp_path):
    model = tiny_genieblue()
    expected = model(prompt()).logits, model(REQUEST, pixel_values=PIXELS).logits
    with pytest.raises(ValueError, match="accelerate cannot dispatch or offload a loaded GenieBlue"):
        offload(model, tmp_path)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    found = model(prompt()).logits, model(REQUEST, pixel_values=PIXELS).logits
    assert all(map(torch.equal, found, expected))


def test_model_on_one_device_is_dispatched_there():
    model = tiny_genieblue()
    accelerate.dispatch_model(model, {"": "cpu"})
    assert torch.equal(model(prompt()).logits, tiny_base("llama")(prompt()).logits)


@pytest.mark.parametrize("part", ["language_model", "multimodal_language_model", "vision_tower"])
def test_model_with_a_part_that_was_offloaded_never_runs(part):
    """By a function of accelerate that goes past the model, into a part of it."""
    model = tiny_genieblue()
    weights = {name: value.clone() for name, value in getattr(model, part).state_dict().items()}
    attach_align_device_hook(getattr(model, part), execution_device="cpu", offload=True, weights_map=weights)
    for run in (lambda: model(prompt()), lambda: model.generate(prompt(), max_new_tokens=1),
                lambda: model(REQUEST, pixel_values=PIXELS)):  # fmt: skip
        with pytest.raises(ValueError, match="offloaded"):
            run()
