"""A GenieBlue of an existing PEFT adapter and a SigLIP."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_genieblue import prompt
from tiny_models import save_tiny_base, tiny_vision_tower
from transformers import AutoModelForCausalLM

from conversion.from_peft import create_from_peft
from modeling_genieblue import GenieBlueForConditionalGeneration


@pytest.fixture
def sources(tmp_path):
    tiny_vision_tower().save_pretrained(tmp_path / "siglip")
    return save_tiny_base("qwen2", tmp_path / "base"), tmp_path / "siglip"


def save_adapter(base, folder, **settings):
    """An adapter with random values on a saved base."""
    torch.manual_seed(0)
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    return folder


ADAPTERS = {
    "LoRA on some layers": {},
    "ranks that differ": {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    "whole blocks": {"modules_to_save": ["layers.1"], "layers_to_transform": [0, 2, 3], "layers_pattern": "layers"},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_multimodal_view_gives_the_adapters_logits(sources, tmp_path, kind):
    base, siglip = sources
    adapter = save_adapter(base, tmp_path / "adapter", **ADAPTERS[kind])
    result = create_from_peft(adapter, siglip, tmp_path / "mine")
    model = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "mine")
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(model(prompt()).logits, plain(prompt()).logits)
    expected = PeftModel.from_pretrained(plain, adapter)(prompt()).logits
    assert torch.allclose(model(prompt(), view="multimodal").logits, expected, atol=1e-4)
    assert result.replicated_layers == ([1] if kind == "whole blocks" else [3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"modules_to_save": ["lm_head"]}, "also has lm_head"),
        ({"target_modules": ["q_proj", "lm_head"]}, "also has base_model.model.lm_head"),
    ],
)
def test_what_a_genieblue_has_no_place_for_is_refused(sources, tmp_path, settings, message):
    base, siglip = sources
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(ValueError, match=message):
        create_from_peft(adapter, siglip, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_ranks_that_the_adapter_lacks_can_be_trained(sources, tmp_path):
    base, siglip = sources
    adapter = save_adapter(base, tmp_path / "adapter", rank_pattern={"v_proj": 5})
    create_from_peft(adapter, siglip, tmp_path / "mine")
    model = GenieBlueForConditionalGeneration.from_pretrained(tmp_path / "mine")
    lora = model.multimodal_language_model.get_submodule("model.layers.0.self_attn.q_proj")
    (a,), (b,) = lora.lora_A.values(), lora.lora_B.values()
    assert a.weight[3:].abs().min() > 0 and not b.weight[:, 3:].any()


def test_a_folder_that_is_no_adapter_is_refused(sources, tmp_path):
    base, siglip = sources
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json"):
        create_from_peft(base, siglip, tmp_path / "mine")
