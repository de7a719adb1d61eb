"""The base of a GenieBlue that vLLM is to serve is found, and checked before anything is loaded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_genieblue import save_tiny_pair, tiny_genieblue
from tiny_models import save_tiny_base
from transformers import AutoModelForCausalLM

from genieblue.serving.vllm.base import find_base
from modeling_genieblue import GenieBlueConfig


@pytest.fixture
def model(tmp_path):
    return save_tiny_pair(tmp_path, "llama")


def found(model):
    """Where the base is, its revision, architectures and files of weights."""
    return find_base(str(model), None, GenieBlueConfig.from_pretrained(model))


def test_a_base_on_the_hub_is_found_at_the_recorded_commit(hub, tmp_path):
    commit = hub.commit_folder("you/base-llm", save_tiny_base("llama", tmp_path / "base"))
    tiny_genieblue(base=AutoModelForCausalLM.from_pretrained("you/base-llm")).push_to_hub("you/genieblue-tiny")
    hub.commit_folder("you/base-llm", save_tiny_base("llama", tmp_path / "newer", seed=2))
    files = ["model.safetensors"]
    assert found("you/genieblue-tiny") == ("you/base-llm", commit, ["LlamaForCausalLM"], files, None)


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_the_recorded_base_is_found_beside_the_model(model):
    files = ["model.safetensors"]
    assert found(model) == (str(model.parent / "base"), None, ["LlamaForCausalLM"], files, None)


def test_only_the_files_that_were_checked_are_to_be_loaded(model):
    base = model.parent / "base"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="20KB")
    (base / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 1
    for name in ("consolidated.safetensors", "other.safetensors"):
        save_file({"model.norm.weight": torch.zeros(32)}, base / name)
    assert found(model).weight_files == shards


def test_a_base_with_other_values_is_refused_by_the_tensor(model):
    path = model.parent / "base/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.up_proj.weight"] += 0.5
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="model.layers.2.mlp.up_proj.weight contains"):
        found(model)


def test_the_error_names_the_recorded_base_if_another_was_given(model, tmp_path):
    config = GenieBlueConfig.from_pretrained(model)
    config.base_model_name_or_path = str(save_tiny_base("llama", tmp_path / "newer", seed=2))
    with pytest.raises(ValueError, match=r"newer is not the base .* made for, \.\./base: "):
        find_base(str(model), None, config)


def test_an_adapter_without_its_rank_has_pefts(model):
    path = model / "language_adapter/adapter_config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "r"}))
    with pytest.raises(ValueError, match="r 8, config.json means"):
        found(model)


def test_lora_of_several_ranks_is_refused(tmp_path):
    model = save_tiny_pair(tmp_path, "llama", rank_pattern={"model.layers.0.self_attn.q_proj": 2})
    with pytest.raises(ValueError, match="LoRA of several ranks"):
        found(model)


def test_a_base_that_lacks_a_tensor_is_refused(model):
    path = model.parent / "base/model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="model.norm.weight is missing"):
        found(model)


def test_a_base_that_computes_something_else_is_refused(model):
    change(model.parent / "base/config.json", rms_norm_eps=0.1)
    with pytest.raises(ValueError, match="rms_norm_eps 0.1"):
        found(model)


def test_a_base_that_is_gone_is_told(model):
    shutil.rmtree(model.parent / "base")
    with pytest.raises(OSError, match="base"):
        found(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization_config": {"quant_method": "genieblue_quanto"}}, "`genieblue quantize`"),
        ({"quantization_config": {"quant_method": "awq"}}, "is quantized in the format awq"),
        ({"architectures": ["OlmoForCausalLM"]}, "OlmoForCausalLM.*served by vLLM are"),
        ({"model_type": "genieblue"}, "expected its base"),
    ],
)
def test_a_base_that_vllm_cannot_run_in_two_views_is_refused_by_name(settings, message, model):
    change(model.parent / "base/config.json", **settings)
    with pytest.raises(ValueError, match=message):
        found(model)


def test_our_own_quantized_weights_are_refused_with_the_way_to_go(model):
    change(model / "config.json", quantization={"parts": {}})
    config = GenieBlueConfig(**json.loads((model / "config.json").read_text()) | {"quantization": None})
    with pytest.raises(ValueError, match="serve the 16-bit GenieBlue"):
        find_base(str(model), None, config)


def test_another_scale_of_lora_in_the_adapter_is_refused(model):
    change(model / "language_adapter/adapter_config.json", lora_alpha=99)
    with pytest.raises(ValueError, match="lora_alpha 99"):
        found(model)
