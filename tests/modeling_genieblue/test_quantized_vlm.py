"""A GenieBlue with a VLM and a quantized language part: text runs that base, images the VLM on its values."""

import json

import pytest
import torch
from clean_process import run_clean
from safetensors.torch import load_file
from tiny_quantized import contents, load, load_base
from tiny_quantized_vlms import TEXT, W8, dequantized, quantize_vlm, quantized_vlm, vlm_source
from tiny_vlms import FAMILIES, image_request, tiny_vlm_pair
from transformers import AutoConfig, AutoModel

from modeling_genieblue import (
    GenieBlueForConditionalGeneration,
    QuantizedVlmGenieBlueConfig,
    QuantizedVlmGenieBlueForConditionalGeneration,
)
from modeling_genieblue.quantized_precision_guard_genieblue import is_frozen

FEW = ("llava", "qwen2_5_vl", "gemma3")
W4 = {"llm": "w4a16"}
ALL_8 = {**W8, "lm_head": "w8a16", "embeddings": "w8a16"}
ROUNDING = {"w4a16": 0.7, "w8a16": 0.1}  # of tiny random weights: the largest relative error of logits


def families():
    return [family if family in FEW else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@torch.no_grad()
@pytest.mark.parametrize("mix", [W8, W4], ids=["w8", "w4"])
@pytest.mark.parametrize("family", families())
def test_text_is_the_quantized_base_and_images_are_near_those_in_16_bits(family, mix):
    folder, request = quantized_vlm(family, **mix), image_request(family, 2)
    model, base = load(folder / "genieblue"), load_base(folder / "base")
    assert type(model) is QuantizedVlmGenieBlueForConditionalGeneration
    assert torch.equal(model(TEXT).logits, base(TEXT).logits)
    assert model.generate(TEXT, max_new_tokens=4, do_sample=False).equal(
        base.generate(TEXT, max_new_tokens=4, do_sample=False)
    )
    exact = load(vlm_source(family), dtype=torch.bfloat16)
    assert 0 < error(model(**request).logits, exact(**request).logits) < ROUNDING[mix["llm"]]
    generated = model.generate(**request, max_new_tokens=3, do_sample=False)
    assert generated.equal(model.vlm.generate(**request, max_new_tokens=3, do_sample=False))


@torch.no_grad()
@pytest.mark.parametrize("mix", [W8, W4, ALL_8], ids=["w8", "w4", "all 8"])
@pytest.mark.parametrize("family", families())
def test_images_have_the_logits_of_the_vlm_on_dequantized_values(family, mix):
    """In float32, so that no kernel rounds."""
    folder, request = quantized_vlm(family, **mix, activations="float32"), image_request(family, 2)
    model = load(folder / "genieblue")
    plain = dequantized(model, vlm_source(family))
    assert not any(is_frozen(module) for module in plain.modules())
    assert error(model(**request).logits, plain(**request).logits) < 1e-5
    assert error(model(TEXT).logits, plain(TEXT).logits) < 1e-5
    assert error(model(TEXT, view="multimodal").logits, plain(TEXT, view="multimodal").logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["idefics3"])
def test_a_tied_head_in_8_bits_reads_the_rows_of_the_vlm(family):
    folder = quantized_vlm(family, True, **ALL_8, activations="float32")
    model, request = load(folder / "genieblue"), image_request(family)
    plain = dequantized(model, vlm_source(family, True))
    assert error(model(**request).logits, plain(**request).logits) < 1e-5
    assert torch.equal(model(TEXT).logits, load_base(folder / "base")(TEXT).logits)


@torch.no_grad()
def test_biases_of_the_vlm_stay_out_of_the_quantized_base():
    """Both views have the same quantized modules, where one bias would be that of both."""
    model = load(quantized_vlm("qwen2_5_vl", **W8) / "genieblue")
    name = "model.layers.0.self_attn.q_proj"
    own = model.own_language.tensors.get_parameter(f"{name}.bias")
    of_base = model.language_model.get_submodule(name)
    of_vlm = model.vlm.model.language_model.layers[0].self_attn.q_proj.base_layer
    assert of_vlm.bias is own and of_base.bias is not own
    assert of_vlm.weight is of_base.weight  # no second copy in memory
    expected = load_base(quantized_vlm("qwen2_5_vl", **W8) / "base").get_submodule(name).bias
    assert torch.equal(of_base.bias, expected) and not torch.equal(own, expected)


def test_no_weight_is_in_memory_twice():
    model = load(quantized_vlm("llava", **W4) / "genieblue")
    base = {id(module.weight) for module in model.language_model.modules() if is_frozen(module)}
    decoder = model.vlm.model.language_model
    shared = [module for name, module in decoder.named_modules() if is_frozen(module) and "base_layer" in name]
    assert len(shared) == 14 and all(id(module.weight) in base for module in shared)
    copies = [module for name, module in decoder.named_modules() if is_frozen(module) and "base_layer" not in name]
    assert len(copies) == 14 and not any(id(module.weight) in base for module in copies)


def test_what_the_vlm_sees_with_is_stored_as_it_was():
    quantized, plain = (load_file(folder / "model.safetensors") for folder in
                        (quantized_vlm("llava", **W4) / "genieblue", vlm_source("llava")))  # fmt: skip
    assert quantized.keys() == plain.keys()
    assert all(value.equal(plain[name].to(value.dtype)) for name, value in quantized.items())


def test_every_way_in_gives_the_class_of_both_kinds():
    folder = quantized_vlm("llava", **W8) / "genieblue"
    for way in (AutoModel, GenieBlueForConditionalGeneration, QuantizedVlmGenieBlueForConditionalGeneration):
        assert type(way.from_pretrained(folder)) is QuantizedVlmGenieBlueForConditionalGeneration
    assert type(AutoConfig.from_pretrained(folder)) is QuantizedVlmGenieBlueConfig
    settings = json.loads((folder / "config.json").read_text())
    assert settings["auto_map"]["AutoModel"].startswith("quantized_vlm_modeling_genieblue.QuantizedVlm")
    precisions = {part: settings["quantization"][part] for part in ("llm", "vision_tower", "multi_modal_projector")}
    assert precisions == {"llm": "w8a16", "vision_tower": "w16a16", "multi_modal_projector": "w16a16"}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_it_loads_in_a_clean_process_and_from_what_that_saves(family, hub, tmp_path):
    folder, request = quantized_vlm(family, **W4) / "genieblue", image_request(family)
    torch.save(request, tmp_path / "request.pt")
    code = f"""
    from transformers import AutoModel
    model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
    with torch.no_grad():
        logits = model(**torch.load("request.pt")).logits, model(torch.arange(20, 29)[None]).logits
    model.save_pretrained("saved")
    answer([type(model).__module__.split(".")[0], *(each.double().tolist() for each in logits)])
    """
    model = load(folder)
    module, *found = run_clean(code, tmp_path, hub.env())
    assert module == "transformers_modules"
    expected = [model(**request).logits, model(TEXT).logits]
    assert found == [each.double().tolist() for each in expected]
    again = load(tmp_path / "saved")
    assert torch.equal(again(**request).logits, expected[0]) and torch.equal(again(TEXT).logits, expected[1])


def test_a_save_of_a_loaded_model_has_the_same_weights(tmp_path):
    folder = quantized_vlm("llava", **W4) / "genieblue"
    load(folder).save_pretrained(tmp_path / "again")
    before, after = contents(folder), contents(tmp_path / "again")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"config.json", "language_adapter/adapter_config.json", "README.md"}  # the base is elsewhere


@torch.no_grad()
def test_it_loads_onto_a_quantized_base_that_is_there(tmp_path):
    folder, request = quantized_vlm("llava", **W4), image_request("llava")
    base = load_base(folder / "base")
    model = load(folder / "genieblue", base_model=base)
    assert model.language_model is base
    assert torch.equal(model(**request).logits, load(folder / "genieblue")(**request).logits)
    with pytest.raises(ValueError, match="was given one that is not"):
        load(folder / "genieblue", base_model=tiny_vlm_pair("llava", dtype=torch.bfloat16)[1])


@torch.no_grad()
def test_a_mixed_batch_runs_each_row_in_its_own_view():
    folder, request = quantized_vlm("idefics3", **W8), image_request("idefics3")
    model, length = load(folder / "genieblue"), request["input_ids"].shape[1]
    both = {name: torch.cat([each, torch.zeros_like(each)]) for name, each in request.items()}
    both["input_ids"][1], both["attention_mask"][1] = torch.arange(20, 20 + length), 1
    image, text = model(**both).logits
    base = load_base(folder / "base")(both["input_ids"][1:]).logits[0]
    assert torch.equal(text[:, : base.shape[-1]], base)
    assert error(image, model(**request).logits[0]) < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.half(), "cannot be turned into torch.float16|would change its text answers|quantized"),
        (lambda model: model.vlm.half(), "the base's own weights|quantized"),
        (lambda model: model.save_pretrained("x", dtype="float16"), "cannot be saved in torch.float16"),
        (lambda model: model.vlm.save_pretrained("x"), "most of its weights are the base's own"),
    ],
    ids=["cast", "cast of the VLM", "save", "save of the VLM"],
)
def test_what_would_change_its_weights_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change(load(quantized_vlm("llava", **W8) / "genieblue"))


def test_an_adapter_of_the_quantized_parts_alone_leaves_the_base_in_16_bits(tmp_path):
    source, request = vlm_source("llava"), image_request("llava")
    options = {"base_output": None}
    quantize_vlm(source, tmp_path, options, llm="w16a16", replicated_blocks="w8a16")
    model, plain = load(tmp_path / "genieblue"), load(source, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(TEXT).logits, plain(TEXT).logits)
        assert 0 < error(model(**request).logits, plain(**request).logits) < 0.1
