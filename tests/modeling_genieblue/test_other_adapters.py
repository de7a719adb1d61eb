"""PEFT from outside: no other adapter reaches a GenieBlue, and nothing is changed by the attempt."""

import pytest
import torch
from peft import (
    LoraConfig,
    LoraModel,
    PeftMixedModel,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
)
from portrait import portrait
from tiny_genieblue import prompt, save_tiny_pair, tiny_genieblue
from tiny_models import tiny_base
from torch import nn

PROMPT_TUNING = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=4, token_dim=32,
                                   num_attention_heads=4)  # fmt: skip
OTHERS_ADAPTERS = {
    "a linear of the base": lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])),
    "every linear": lambda model: get_peft_model(model, LoraConfig(target_modules="all-linear")),
    "the projector": lambda model: get_peft_model(model, LoraConfig(target_modules=["linear_1", "linear_2"])),
    "a parameter": lambda model: get_peft_model(model, LoraConfig(target_parameters=["lm_head.weight"])),
    "mixed": lambda model: PeftMixedModel(model, LoraConfig(target_modules=["q_proj"]), "mine"),
    "PeftModel": lambda model: PeftModel(model, LoraConfig(target_modules=["q_proj"])),
    "prompt tuning": lambda model: get_peft_model(model, PROMPT_TUNING),
    "low_cpu_mem_usage": lambda model: get_peft_model(model, LoraConfig(target_modules=["fc1"]),
                                                      low_cpu_mem_usage=True),
    "injection": lambda model: inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model, "mine"),
    "the decoder of the view": lambda model: get_peft_model(
        model.multimodal_language_model.model, LoraConfig(target_modules=["q_proj"])
    ),
    "a block of the view": lambda model: get_peft_model(
        model.multimodal_language_model.model.layers[0], LoraConfig(target_modules=["q_proj"])
    ),
    "the multimodal view": lambda model: get_peft_model(
        model.multimodal_language_model, LoraConfig(target_modules=["q_proj"])
    ),
    "a module around it": lambda model: get_peft_model(nn.Sequential(model), LoraConfig(target_modules=["q_proj"])),
    "injection into a module around it": lambda model: inject_adapter_in_model(
        LoraConfig(target_modules=["q_proj"]), nn.ModuleList([model]), "mine"
    ),
    "all but the head": lambda model: LoraModel(model.base_model, LoraConfig(target_modules=["q_proj"]), "mine"),
    "injection into the view": lambda model: inject_adapter_in_model(
        LoraConfig(target_modules=["q_proj"]), model.multimodal_language_model, "mine"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def unchanged():
    """A model that a test must not change, and its portrait."""
    model = tiny_genieblue()
    return model, portrait(model)


@pytest.mark.parametrize("add", OTHERS_ADAPTERS.values(), ids=OTHERS_ADAPTERS)
def test_another_adapter_is_refused_before_anything_changes(add, unchanged):
    model, before = unchanged
    with pytest.raises(ValueError, match="lora_rank"):
        add(model)
    assert portrait(model) == before


@pytest.mark.parametrize("part", ["", "base_model", "multimodal_language_model"])
def test_casting_by_peft_is_refused_before_anything_changes(part):
    model = tiny_genieblue(base=tiny_base("llama", dtype=torch.bfloat16))
    types = {name: (parameter.dtype, parameter.requires_grad) for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="`prepare_model_for_kbit_training` is refused"):
        prepare_model_for_kbit_training(getattr(model, part) if part else model)
    assert types == {name: (each.dtype, each.requires_grad) for name, each in model.named_parameters()}


def test_saved_adapter_is_not_put_over_a_genieblue(tmp_path, unchanged):
    model, before = unchanged
    folder = save_tiny_pair(tmp_path)
    with pytest.raises(ValueError, match="lora_rank"):
        PeftModel.from_pretrained(model, str(folder / "language_adapter"))
    assert portrait(model) == before


def test_others_models_still_get_their_adapters():
    peft_model = get_peft_model(tiny_base("llama"), LoraConfig(target_modules=["q_proj"]))
    assert peft_model(prompt()).logits.shape == (1, 8, 128)
