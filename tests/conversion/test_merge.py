"""The merged language model: a plain checkpoint that gives the multimodal view's logits without our code."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_genieblue import prompt, save_tiny_pair
from tiny_models import EOS_ID
from tiny_quantized import contents, leftovers, quantized_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion import merge
from conversion.merge import export_merged
from conversion.quantization.error import logits_error
from modeling_genieblue import GenieBlueForConditionalGeneration


def load(folder):
    return GenieBlueForConditionalGeneration.from_pretrained(folder, trust_remote_code=True)


@torch.no_grad()
def logits(model):
    return model(prompt(12), use_cache=False).logits[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base and a trained-looking GenieBlue: only to be read."""
    return save_tiny_pair(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3"])
def test_the_checkpoint_loads_without_our_code_and_gives_the_views_logits(tmp_path, family):
    source = save_tiny_pair(tmp_path, family)
    export_merged(source, tmp_path / "merged")
    model = load(source)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged) is type(model.language_model)
    assert logits_error(logits(model.multimodal_language_model), logits(merged))[0] < 1e-3
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("the answer").input_ids
    assert ids == AutoTokenizer.from_pretrained(tmp_path / "base")("the answer").input_ids


def test_code_of_the_base_goes_along(tmp_path):
    source = save_tiny_pair(tmp_path, "bluelm")
    export_merged(source, tmp_path / "merged", trust_remote_code=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert logits_error(logits(load(source).multimodal_language_model), logits(merged))[0] < 1e-3


def test_a_tied_head_stays_tied(tmp_path):
    source = save_tiny_pair(tmp_path, "llama-tied")
    export_merged(source, tmp_path / "merged")
    names = set(load_file(tmp_path / "merged/model.safetensors"))
    assert names == set(load_file(tmp_path / "base/model.safetensors"))


def test_lora_is_merged_in_float32_and_cast_to_the_bases_dtype(tmp_path):
    source = save_tiny_pair(tmp_path, dtype=torch.bfloat16)
    export_merged(source, tmp_path / "merged")
    tensors, base = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "base"))
    view = load(source).multimodal_language_model
    layer = view.get_submodule("model.layers.0.mlp.up_proj")
    name = "model.layers.0.mlp.up_proj.weight"
    expected = base[name].float() + layer.get_delta_weight("default").float()
    assert torch.equal(tensors[name], expected.to(torch.bfloat16))
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}


def test_it_stops_where_the_genieblue_stops(tmp_path):
    source = save_tiny_pair(tmp_path)
    model = load(source)
    model.generation_config.eos_token_id = [EOS_ID, 7]
    model.save_pretrained(source)
    export_merged(source, tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config.eos_token_id == [EOS_ID, 7]


def test_only_the_output_is_written(llama, tmp_path):
    before = contents(llama.parent)
    export_merged(llama, tmp_path / "merged")
    assert contents(llama.parent) == before
    assert leftovers(tmp_path) == ["merged"]


def test_a_result_with_other_logits_is_refused_and_leaves_nothing(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "merged_state", lambda base, _view: base.state_dict())
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be merged"):
        export_merged(llama, tmp_path / "merged")
    assert leftovers(tmp_path) == []


def test_a_quantized_genieblue_is_refused_with_the_way_to_go(tmp_path):
    with pytest.raises(ValueError, match="is already quantized .* give the 16-bit GenieBlue it was made"):
        export_merged(quantized_pair() / "genieblue", tmp_path / "merged")
    assert leftovers(tmp_path) == []
