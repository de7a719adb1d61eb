"""Weight files of a GenieBlue that vLLM would serve with holes in them are refused by the tensor before it starts."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_genieblue import save_tiny_pair

from genieblue.serving.vllm.base import find_base
from modeling_genieblue import GenieBlueConfig

K_OF_TOWER = "vision_tower.encoder.layers.0.self_attn.k_proj.weight"
BLOCKS = "base_model.model.model.layers"
K_OF_COPY, LORA_OF_Q = f"{BLOCKS}.3.self_attn.k_proj.weight", f"{BLOCKS}.0.self_attn.q_proj.lora_A.weight"
OWN, ADAPTER = "model.safetensors", "language_adapter/adapter_model.safetensors"


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def stored(request, tmp_path_factory):
    """A saved GenieBlue and its two weight files' tensors."""
    model = save_tiny_pair(tmp_path_factory.mktemp(request.param), request.param)
    return model, {place: load_file(model / place) for place in (OWN, ADAPTER)}


def refusal(stored, place, tensors):
    """What is said of the model when one of its files holds `tensors`."""
    model, originals = stored
    save_file(tensors, model / place, {"format": "pt"})
    try:
        find_base(str(model), None, GenieBlueConfig.from_pretrained(model))
    except ValueError as error:
        return str(error)
    finally:
        save_file(originals[place], model / place, {"format": "pt"})
    return None


def test_whole_files_are_accepted(stored):
    model, originals = stored
    assert refusal(stored, OWN, originals[OWN]) is None
    assert find_base(str(model), None, GenieBlueConfig.from_pretrained(model)).weight_files == ["model.safetensors"]


@pytest.mark.parametrize(
    ("place", "name"),
    [(OWN, K_OF_TOWER), (OWN, "multi_modal_projector.linear_1.bias"), (ADAPTER, K_OF_COPY), (ADAPTER, LORA_OF_Q)],
)
def test_a_missing_tensor_is_refused_by_name_even_with_another_in_its_place(stored, place, name):
    tensors = {key: value for key, value in stored[1][place].items() if key != name}
    assert re.search(f"{name} is missing", refusal(stored, place, tensors) or "")
    other = f"{BLOCKS}.3.self_attn.rotary_emb.inv_freq"
    assert re.search(
        f"{name} is missing, {other} is not exp", refusal(stored, place, {**tensors, other: torch.ones(4)})
    )


@pytest.mark.parametrize(("place", "name"), [(OWN, K_OF_TOWER), (ADAPTER, K_OF_COPY), (ADAPTER, LORA_OF_Q)])
def test_another_shape_and_another_kind_of_number_are_refused_by_name(stored, place, name):
    tensors = stored[1][place]
    shape = list(tensors[name].shape)
    found = refusal(stored, place, {**tensors, name: tensors[name][:1].contiguous()}) or ""
    assert f"{name} has shape {[1, *shape[1:]]}, expected {shape}" in found
    assert f"{name} holds I32" in (refusal(stored, place, {**tensors, name: tensors[name].int()}) or "")


def test_a_damaged_file_is_told(stored):
    model, originals = stored
    (model / OWN).write_bytes(b"no weights")
    try:
        with pytest.raises(OSError, match="model.safetensors cannot be read"):
            find_base(str(model), None, GenieBlueConfig.from_pretrained(model))
    finally:
        save_file(originals[OWN], model / OWN, {"format": "pt"})
