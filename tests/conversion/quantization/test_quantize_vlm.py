"""Quantizing a GenieBlue with a VLM: calibrated as the VLM runs, verified, healed, published, and what is refused."""

import json
import shutil

import pytest
import torch
from tiny_quantized import contents, leftovers, load, load_base
from tiny_quantized_vlms import TEXT, W8, quantize_vlm, quantized_vlm, vlm_samples, vlm_source
from tiny_vlms import image_request
from vlm_training_setup import TEMPLATE, extract_tiny

from conversion.quantization.healing import put_on_quantized_base
from conversion.quantization.mixed import Budget
from conversion.quantization.precision import QuantizationRecipe
from conversion.quantization.quantize import quantize_genieblue
from conversion.quantization.views import multimodal_view
from conversion.verification.verify import verify_model
from hub_cards.publish import files_to_publish, find_problems
from modeling_genieblue import VlmGenieBlueProcessor


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a GenieBlue of a LLaVA, `mine`, its base, and a self-contained `small` of 4 bits: only read."""
    folder = tmp_path_factory.mktemp("vlm")
    source = extract_tiny(folder)
    quantize_genieblue(source, folder / "small", self_contained=True)
    return folder


def settings(folder):
    return json.loads((folder / "config.json").read_text())


def image_error(model, exact, request) -> float:
    with torch.no_grad():
        found, expected = model(**request).logits.float(), exact(**request).logits.float()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_calibration_runs_the_vlm_on_its_own_inputs(family, tmp_path):
    source, samples = vlm_source(family), vlm_samples(family)
    report = quantize_vlm(source, tmp_path, {"samples": samples, "budget": Budget()}, rounding="gptq")
    recorded = settings(tmp_path / "genieblue")["quantization"]
    assert recorded["other_rounding"] == {"lora": "rtn: 28 of 28 layers"}  # each copy was reached
    # Of all blocks, each measured in a view that runs it; copies by the VLM alone.
    assert {(linear.block, linear.is_replicated) for linear in report.mixed} == {
        *((block, False) for block in range(4)), (1, True), (3, True)
    }  # fmt: skip
    assert all(linear.damages[0] > 0 for linear in report.mixed if linear.is_replicated)
    exact = load(source, dtype=torch.bfloat16)
    request = samples.multimodal[0]
    plain, calibrated = load(quantized_vlm(family, llm="w4a16") / "genieblue"), load(tmp_path / "genieblue")
    assert image_error(calibrated, exact, request) < image_error(plain, exact, request)
    with torch.no_grad():
        assert torch.equal(calibrated(TEXT).logits, load_base(tmp_path / "base")(TEXT).logits)


def test_copies_are_calibrated_on_images_by_all_that_the_processor_returns():
    model, samples = load(vlm_source("qwen2_5_vl")), vlm_samples("qwen2_5_vl", 2)
    view = multimodal_view(model, samples)
    assert view.model is model.vlm and view.blocks == "model.language_model.layers"
    assert view.requests[0].keys() == samples.multimodal[0].keys() >= {"image_grid_thw", "mm_token_type_ids"}
    assert view.model.get_submodule(view.blocks)[1].mlp.up_proj.weight is next(
        each for name, each in model.multimodal_language_model.named_parameters()
        if name.startswith("model.layers.1.modules_to_save.") and "up_proj" in name
    )  # fmt: skip


def test_a_budget_of_bytes_is_what_the_weights_take(tmp_path):
    options = {"samples": vlm_samples("llava"), "budget": Budget(max_bytes=145_000), "self_contained": True}
    quantize_vlm(vlm_source("llava"), tmp_path, options, rounding="gptq")
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    header = sum(8 + int.from_bytes(path.open("rb").read(8), "little") for path in tmp_path.rglob("*.safetensors"))
    assert 143_000 < size - header <= 145_000


@pytest.mark.slow
def test_every_check_of_verify_passes(made):
    checks = verify_model(made / "small")
    assert [(check.name, check.detail) for check in checks if not check.ok] == []
    details = {check.name: check.detail for check in checks}
    assert "vision_tower w16a16" in details["quantization"] and "measured again against" in details["quantization"]
    assert "gives the text view's logits" in details["remote_code"]
    assert "stock_peft" not in details and "adapter_tensors" not in details


@pytest.mark.parametrize(
    ("place", "check"),
    [
        ("language_adapter/quantized_adapter.safetensors", "own_files"),
        ("model.safetensors", "own_files"),
        ("base/quantized_model.safetensors", "base_files"),
    ],
)
def test_verify_notices_one_changed_byte(made, tmp_path, place, check, monkeypatch):
    from conversion.verification import verify

    monkeypatch.setattr(verify, "CHECKS", {name: verify.CHECKS[name] for name in ("own_files", "base_files")})
    shutil.copytree(made / "small", tmp_path / "small")
    shutil.copytree(made / "base", tmp_path / "base")
    assert all(each.ok for each in verify_model(tmp_path / "small"))
    content = bytearray((tmp_path / "small" / place).read_bytes())
    content[-1] ^= 1  # the last tensor of a file is one of codes
    (tmp_path / "small" / place).write_bytes(content)
    assert [each.name for each in verify_model(tmp_path / "small") if not each.ok] == [check]


def test_it_can_be_published_whole(made):
    assert find_problems(made / "small") == []
    files = set(files_to_publish(made / "small"))
    assert {"quanto_qmap.json", "vlm/generation_config.json", "vlm/chat_template.jinja"} <= files
    assert {"quantized_vlm_modeling_genieblue.py", "base/quantized_model.safetensors"} <= files


def test_its_card_says_what_stays_at_16_bits(made):
    card = (made / "small/README.md").read_text()
    assert "The VLM's vision side and connector, and its own norms" in card
    assert "| `vlm` | w16a16 |" in card and "| `replicated_blocks` | w4a16 |" in card
    assert "a VLM of type `llava`" in card and "without an image" in card


def test_its_processor_is_the_vlms(made):
    processor = VlmGenieBlueProcessor.from_pretrained(made / "small")
    assert processor.vlm_processor.chat_template == TEMPLATE


# Other bases, and healing


@torch.no_grad()
def test_an_adapter_is_quantized_for_a_base_that_is_quantized_already(tmp_path):
    base = quantized_vlm("llava", **W8) / "base"
    before = contents(base)
    quantize_vlm(vlm_source("llava"), tmp_path, {"quantized_base": base}, **W8)
    request = image_request("llava")
    expected = load(quantized_vlm("llava", **W8) / "genieblue")(**request).logits
    assert torch.equal(load(tmp_path / "genieblue")(**request).logits, expected)
    assert contents(base) == before


@torch.no_grad()
def test_training_on_a_quantized_base_sees_its_values_in_both_views():
    """What is trained is what the quantized model runs, but for the rounding of what is trained."""
    folder = quantized_vlm("qwen2_5_vl", **W8, activations="float32")
    model, quantized = load(vlm_source("qwen2_5_vl")), load(folder / "genieblue")
    request = image_request("qwen2_5_vl")
    before = model(**request).logits
    put_on_quantized_base(model, folder / "base")
    assert (model(TEXT).logits - quantized(TEXT).logits).norm() < 1e-5 * quantized(TEXT).logits.norm()
    now = model(**request).logits
    assert not torch.equal(now, before)
    adapter = quantized.multimodal_language_model
    for name, parameter in model.multimodal_language_model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            value = adapter.get_parameter(name)
            parameter.copy_(value.dequantize() if hasattr(value, "qtype") else value)
    assert image_error(model, quantized, request) < 1e-5


# Refused


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector"])
def test_a_vision_side_in_few_bits_is_refused_by_name(part, tmp_path):
    with pytest.raises(ValueError, match=f"stay at 16 bits, and {part} w8a16 was requested: leave out --vision"):
        quantize_vlm(vlm_source("llava"), tmp_path, **{part: "w8a16"})
    with pytest.raises(ValueError, match="QuantizationRecipe.for_config"):
        quantize_genieblue(vlm_source("llava"), tmp_path / "out", QuantizationRecipe())
    assert leftovers(tmp_path) == []


def test_images_between_whose_blocks_something_is_added_are_refused_for_calibration(tmp_path):
    options = {"samples": vlm_samples("qwen3_vl")}
    with pytest.raises(ValueError, match="'qwen3_vl' adds features of images between its blocks.*without images"):
        quantize_vlm(vlm_source("qwen3_vl"), tmp_path, options, rounding="gptq")
    assert leftovers(tmp_path) == []


def test_a_quantized_one_is_not_quantized_again(tmp_path):
    with pytest.raises(ValueError, match="already quantized"):
        quantize_genieblue(quantized_vlm("llava", **W8) / "genieblue", tmp_path / "out")
