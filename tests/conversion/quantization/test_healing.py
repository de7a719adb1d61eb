"""Training on the values of a quantized base: what is in memory, what is saved, and what is refused."""

import logging
import shutil

import pytest
import torch
from tiny_quantized import large_pair, load, quantized_pair
from transformers import AutoModelForCausalLM

from conversion.quantization.bases import record_verdict
from conversion.quantization.healing import base_digest, put_on_quantized_base, warn_of_other_base
from conversion.verification.verify import verify_model
from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.quantized_base_genieblue import load_quantized_base

RECIPE = {"rounding": "rtn"}


@pytest.fixture(scope="module")
def quantized_base():
    return quantized_pair(**RECIPE) / "base"


def healing_model():
    return GenieBlueForConditionalGeneration.from_pretrained(large_pair())


def test_both_views_stand_on_the_values_of_the_quantized_base(quantized_base):
    model = healing_model()
    put_on_quantized_base(model, quantized_base)
    rounded = load_quantized_base(quantized_base)
    name = "model.layers.0.self_attn.q_proj"
    expected = rounded.get_submodule(name).weight.dequantize().float()
    assert torch.equal(model.language_model.get_submodule(name).weight, expected)
    in_view = model.multimodal_language_model.get_submodule(name)
    assert getattr(in_view, "base_layer", in_view).weight is model.language_model.get_submodule(name).weight


def test_a_failed_base_is_warned_of(quantized_base, tmp_path, caplog):
    base = shutil.copytree(quantized_base, tmp_path / "base")
    record_verdict(base, {"result": "failed", "accepted": False, "reasons": ["the text view loses 9 points"]})
    put_on_quantized_base(healing_model(), base)
    assert f"{base} lost too much by its verdict: the text view loses 9 points. " in caplog.text


def test_what_is_saved_is_an_adapter_for_the_original_base(quantized_base, tmp_path):
    model = healing_model()
    put_on_quantized_base(model, quantized_base)
    model.multi_modal_projector.linear_1.bias.data += 1.0
    model.save_pretrained(tmp_path / "healed")
    original = AutoModelForCausalLM.from_pretrained(large_pair().parent / "base-llm")
    healed = load(tmp_path / "healed")
    for name, weight in original.named_parameters():
        assert torch.equal(dict(healed.language_model.named_parameters())[name], weight), name
    checks = {check.name: check.ok for check in verify_model(tmp_path / "healed")}
    assert checks["base_files"] and checks["text_view"]


@pytest.mark.parametrize(
    ("of", "told"),
    [("base-llm", "is not a base quantized by GenieBlue"), ("nothing", "There is no quantized base in")],
)
def test_a_base_that_is_none_is_refused_before_anything_changes(of, told):
    model = healing_model()
    before = [weight.clone() for weight in model.language_model.parameters()]
    with pytest.raises((ValueError, OSError), match=told):
        put_on_quantized_base(model, large_pair().parent / of)
    assert all(map(torch.equal, before, model.language_model.parameters()))


def test_a_base_that_differs_in_one_late_matrix_changes_nothing(quantized_base):
    model = healing_model()
    last = list(model.language_model.parameters())[-2]
    last.data.mul_(-1)
    before = [weight.clone() for weight in model.language_model.parameters()]
    with pytest.raises(ValueError, match="is not a quantized copy of this model's base: .* differs by"):
        put_on_quantized_base(model, quantized_base)
    assert all(map(torch.equal, before, model.language_model.parameters()))


def test_a_quantized_copy_of_another_base_is_refused(quantized_base):
    model = healing_model()
    model.config.base_model_fingerprint = {"model.safetensors": "0" * 64}
    with pytest.raises(ValueError, match="is not a quantized copy of this model's base"):
        put_on_quantized_base(model, quantized_base)


def test_quantizing_on_another_base_than_it_was_trained_on_is_warned_of(quantized_base, caplog):
    facts = put_on_quantized_base(healing_model(), quantized_base)
    recipe = {"stage 2": {"steps": 3}, "stage 2 on a quantized base": {"steps": 1, **facts}}
    with caplog.at_level(logging.WARNING):
        warn_of_other_base({"stage 2": {"steps": 3}}, lambda: None)
        warn_of_other_base(recipe, lambda: base_digest(quantized_base, {}))
        assert not caplog.messages
        warn_of_other_base(recipe, lambda: None)
        warn_of_other_base(recipe, lambda: base_digest(quantized_pair(llm="w8a16", rounding="rtn") / "base", {}))
    assert len(caplog.messages) == 2 and "--quantized-base" in caplog.messages[0]
