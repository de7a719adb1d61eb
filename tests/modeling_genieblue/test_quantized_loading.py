"""Quantized models that are loaded: the stored values, equal answers in every mix and family, options."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_quantized import (
    ADAPTER,
    BASE_WEIGHTS,
    OWN_WEIGHTS,
    TEXT,
    answers,
    contents,
    large_pair,
    load,
    load_base,
    quantize,
    quantized_pair,
    same,
    save_large_pair,
    trust_of,
)
from transformers import AutoConfig, AutoModel, GenerationConfig

from conversion.quantization.rounding import round_weight
from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.as_built_genieblue import AsBuilt
from modeling_genieblue.quantized_linears_genieblue import FrozenLinear, group_size_of
from modeling_genieblue.quantized_packing_genieblue import unpack

LEFT_ALONE = {"llm": "w16a16", "lora": "w16a16", "vision_tower": "w16a16", "multi_modal_projector": "w16a16"}
OUTSIDE = {"lm_head": "w8a16", "embeddings": "w8a16"}
MIXES = {
    "default": {},
    "w8-rtn": {"llm": "w8a16", "rounding": "rtn"},
    "all-w4": {"vision_tower": "w4a16", "multi_modal_projector": "w4a16"},
    "tower-w4-projector-w16": {"vision_tower": "w4a16", "multi_modal_projector": "w16a16"},
    "tower-w16-projector-w4": {"vision_tower": "w16a16", "multi_modal_projector": "w4a16"},
    "only-base": LEFT_ALONE | {"llm": "w4a16", "replicated_blocks": "w16a16"},
    "only-copies-w8": LEFT_ALONE | {"replicated_blocks": "w8a16"},
    "only-lora": LEFT_ALONE | {"lora": "w8a16"},
    "only-tower": LEFT_ALONE | {"vision_tower": "w8a16"},
    "only-head": LEFT_ALONE | {"lm_head": "w8a16", "replicated_blocks": "w16a16"},
    "only-embeddings": LEFT_ALONE | {"embeddings": "w8a16", "replicated_blocks": "w16a16"},
    "copies-w8-over-w4": {"replicated_blocks": "w8a16"},
    "copies-w4-over-w8": {"llm": "w8a16", "replicated_blocks": "w4a16"},
    "lora-w16": {"lora": "w16a16"},
    "head-and-embeddings": OUTSIDE,
    "float16": {"activations": "float16", **OUTSIDE},
    "float32": {"activations": "float32", **OUTSIDE},
}
# With what makes each one special; the last four are named nowhere in the code.
FAMILIES = {
    "llama-tied": OUTSIDE,  # one weight for both
    "qwen2": {},  # biases
    "qwen3": OUTSIDE,  # tied, norms of queries and keys
    "mistral": {"llm": "w8a16"},
    "phi3": {},  # slices of a fused projection are read
    "gemma3_text": OUTSIDE,  # an embedding that scales
    "bluelm": OUTSIDE,  # remote code, an embedding with a LayerNorm
    "bluelm-outside": {},
    "olmo2": {},
    "granite": OUTSIDE,
    "stablelm": {"llm": "w8a16"},
    "starcoder2": {},
}


def relative_error(values, expected):
    return float((values.float() - expected.float()).norm() / expected.float().norm())


def frozen(model):
    """`{name: module}` of the quantized linears, by their first name in the tree."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}


# What is stored


@pytest.mark.parametrize("activations", ["bfloat16", "float32"])
@pytest.mark.parametrize(("llm", "group_size"), [("w4a16", 32), ("w4a16", 64), ("w8a16", 64)])
@torch.no_grad()
def test_weights_are_the_rounded_ones_of_the_source(llm, group_size, activations):
    """Compared in float32, where no kernel rounds; the codes are compared bit by bit."""
    dtype = getattr(torch, activations)
    recipe = {"llm": llm, "vision_tower": "w4a16", "rounding": "rtn", "group_size": group_size}
    folder = quantized_pair(**recipe, activations=activations)
    model, source = load(folder / "genieblue", dtype=torch.float32), load(large_pair(), dtype=dtype)
    files = {name: load_file(folder / name) for name in (OWN_WEIGHTS, ADAPTER, BASE_WEIGHTS)}
    # Without what is the base's own, seen through the view.
    modules = {name: module for name, module in frozen(model).items()
               if ".base_layer" not in name and ".original_module" not in name}  # fmt: skip
    assert len(modules) == 7 * (4 + 1) + 6 * 2 + 2 + 2  # base, copied block, tower, its head, projector
    for name, module in modules.items():
        bits = 4 if "int4" in str(module.weight.qtype) else 8
        group = module.in_features if bits == 8 else group_size_of(module.in_features, group_size)
        rounded = round_weight(source.get_submodule(name).weight, bits, group, dtype=dtype)
        torch.testing.assert_close(module.weight.dequantize(), rounded.dequantize(), rtol=1e-5, atol=1e-6)
        if name.startswith("language_model."):
            file, stored = BASE_WEIGHTS, name.removeprefix("language_model.")
        elif name.startswith("multimodal"):
            stock = name.replace("multimodal_language_model.", "base_model.model.")
            file, stored = ADAPTER, stock.replace(".modules_to_save.default", "")
        else:
            file, stored = OWN_WEIGHTS, name
        parts = {key.removeprefix(f"{stored}.weight."): value for key, value in files[file].items()}
        if bits == 4:
            assert parts["_data._data"].shape[1] == group
            assert torch.equal(unpack(parts["_data._data"]).view(rounded.codes.shape), rounded.codes)
            assert torch.equal(parts["_shift"].view(rounded.scale.shape), rounded.zero_point)
        else:
            assert torch.equal(parts["_data"], rounded.codes)
        assert torch.equal(parts["_scale"].view(rounded.scale.shape), rounded.scale)


@torch.no_grad()
def test_lora_has_one_scale_for_each_rank():
    folder = quantized_pair()
    stored = load_file(folder / ADAPTER)
    view, source = (load(path).multimodal_language_model for path in (folder / "genieblue", large_pair()))
    names = [name for name, _ in view.named_parameters() if ".lora_" in name]
    assert len(names) == 2 * 7 * 3
    for name in names:
        weight = source.get_parameter(name)
        by_rank = weight if ".lora_A" in name else weight.t()
        expected = round_weight(by_rank.contiguous(), 8, by_rank.shape[1]).dequantize()
        found = view.get_parameter(name)
        assert found.dtype == torch.float32
        assert torch.equal(found if ".lora_A" in name else found.t(), expected)
        codes = stored["base_model.model." + name.replace(".default", "") + "._data"]
        assert codes.dtype == torch.int8 and codes.shape == weight.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@torch.no_grad()
def test_every_quantized_linear_computes_with_its_own_weight(dtype):
    """Against the weights in float32, which no kernel has packed."""
    folder = quantized_pair(vision_tower="w4a16") / "genieblue"
    exact = frozen(load(folder, dtype=torch.float32))
    for name, module in frozen(load(folder, dtype=dtype)).items():
        weight = exact[name].weight.dequantize()
        for rows in (1, 5):
            inputs = torch.randn(2, rows, module.in_features, dtype=dtype)
            expected = inputs.float() @ weight.T + (0 if module.bias is None else module.bias.float())
            assert relative_error(module(inputs), expected) < 0.01, name


@torch.no_grad()
def test_answers_are_those_of_an_unquantized_model_with_the_rounded_weights():
    """Which shows that each layer is where it belongs, copies and LoRA too."""
    model = load(quantized_pair(**OUTSIDE) / "genieblue", dtype=torch.float32)
    plain = load(large_pair())
    before = answers(plain)
    for name, parameter in plain.named_parameters():
        other = model.get_parameter(name)
        parameter.copy_(other.dequantize() if hasattr(other, "qtype") else other)
    plain._as_built = AsBuilt(plain)  # a changed base is refused otherwise
    for expected, found, unrounded in zip(answers(plain)[:3], answers(model)[:3], before, strict=False):
        assert relative_error(found, expected) < 1e-3 < 0.05 < relative_error(found, unrounded)


# Round trip


@pytest.fixture
def beside():
    """Folders that a test writes beside what others read, for a base with the same relative path."""
    written = []
    yield written.append
    for folder in written:
        shutil.rmtree(folder)


@pytest.mark.parametrize("mix", MIXES)
def test_saved_loaded_and_saved_again_in_every_mix(mix, beside):
    folder = quantized_pair(**MIXES[mix])
    model = load(folder / "genieblue")
    expected = answers(model)
    assert not any(torch.isnan(part.float()).any() for part in expected)
    assert model.dtype == getattr(torch, model.config.quantization["activations"])
    assert same(answers(load(folder / "genieblue")), expected)
    again = folder / "again"
    model.save_pretrained(again)
    beside(again)
    first, second = contents(folder / "genieblue"), contents(again)
    assert first.keys() - second.keys() <= {"measurements.json"} and second.keys() <= first.keys()
    assert {name for name in second if first[name] != second[name]} <= {"README.md"}
    assert same(answers(load(again)), expected)
    source = answers(load(large_pair(), dtype=model.dtype))
    assert all(relative_error(*pair) < 0.8 for pair in zip(expected[:3], source[:3], strict=True))
    assert not same(expected, source)


@pytest.mark.parametrize("mix", ["default", "w8-rtn", "only-head", "only-embeddings", "float32"])
def test_text_is_the_quantized_bases_own_in_every_mix(mix):
    assert_text_is_the_bases_own(quantized_pair(**MIXES[mix]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_and_answers_text_as_its_base(family):
    folder, trust = quantized_pair(family, **FAMILIES[family]), trust_of(family)
    model = load(folder / "genieblue", **trust)
    source = answers(load(large_pair(family), dtype=torch.bfloat16, **trust))
    errors = [relative_error(*pair) for pair in zip(answers(model)[:3], source[:3], strict=True)]
    assert all(0 < error < 0.8 for error in errors), errors
    assert_text_is_the_bases_own(folder, **trust)


def assert_text_is_the_bases_own(folder, **trust):
    """Bit for bit, alone and with the base given as an object and as a folder, with gradients and without."""
    base = load_base(folder / "base")
    model = load(folder / "genieblue", **trust)
    expected = answers(model)
    with torch.no_grad():
        assert torch.equal(base(TEXT).logits, expected[0])
        for use_cache in (True, False):
            ids = base.generate(TEXT, do_sample=False, max_new_tokens=4, pad_token_id=0, use_cache=use_cache)
            assert torch.equal(ids, expected[3])
    assert torch.equal(base(TEXT).logits, model(TEXT).logits)
    onto = load(folder / "genieblue", base_model=base, **trust)
    assert onto.language_model is base
    assert same(answers(onto), expected)
    assert same(answers(load(folder / "genieblue", base_model=folder / "base", **trust)), expected)
    assert torch.equal(base(TEXT).logits, model(TEXT).logits)


def test_two_genieblues_share_one_base_in_memory():
    folder = quantized_pair()
    base = load_base(folder / "base")
    first, second = (load(folder / "genieblue", base_model=base) for _ in range(2))
    assert first.language_model is second.language_model is base
    assert same(answers(first), answers(second))


@pytest.mark.parametrize(("stored", "asked"), [
    ("bfloat16", torch.float16), ("bfloat16", "float32"), ("bfloat16", "auto"), ("float16", "auto"),
    ("float16", torch.float32), ("float32", torch.bfloat16),
], ids=str)  # fmt: skip
def test_loads_in_every_dtype(asked, stored):
    folder = quantized_pair(activations=stored, **OUTSIDE)
    model = load(folder / "genieblue", dtype=asked)
    dtype = getattr(torch, stored) if asked == "auto" else getattr(torch, str(asked).removeprefix("torch."))
    assert model.dtype == model.language_model.dtype == model.vision_tower.dtype == dtype
    base = load_base(folder / "base", dtype=asked)
    found, expected = answers(model), answers(load(folder / "genieblue"))
    assert found[0].dtype == found[1].dtype == dtype
    assert torch.equal(base(TEXT).logits, found[0])
    assert all(relative_error(*pair) < 0.06 for pair in zip(found[:3], expected[:3], strict=True))
    assert same(answers(load(folder / "genieblue", base_model=base)), found)


def test_dtype_is_the_given_bases():
    folder = quantized_pair()
    model = load(folder / "genieblue", base_model=load_base(folder / "base", dtype=torch.float16))
    assert model.dtype == model.vision_tower.dtype == torch.float16


# Options


@pytest.mark.parametrize("through", [GenieBlueForConditionalGeneration, AutoModel], ids=lambda each: each.__name__)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementation_reaches_every_part(attention, through):
    folder = quantized_pair()
    model = through.from_pretrained(folder / "genieblue", attn_implementation=attention)
    for part in (model.language_model, model.multimodal_language_model, model.vision_tower):
        assert part.config._attn_implementation == attention
    base = load_base(folder / "base", attn_implementation=attention)
    assert base.config._attn_implementation == attention
    assert torch.equal(base(TEXT).logits, model(TEXT).logits)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu"),
    {"vision_tower": "cpu", "multi_modal_projector": "cpu", "language_model": "cpu"}], ids=str)  # fmt: skip
def test_device_map_of_one_device(device_map):
    folder = quantized_pair()
    assert same(answers(load(folder / "genieblue", device_map=device_map)), answers(load(folder / "genieblue")))


def test_device_map_over_several_devices_is_refused():
    device_map = {"vision_tower": "cpu", "multi_modal_projector": "meta", "language_model": "cpu"}
    with pytest.raises(ValueError, match="one device"):
        load(quantized_pair() / "genieblue", device_map=device_map)


@pytest.mark.parametrize("dtype", ["fp16", torch.int8], ids=str)
def test_a_dtype_that_is_no_floating_point_format_is_refused(dtype):
    with pytest.raises(ValueError, match="`dtype` is .*: expected one of bfloat16"):
        load(quantized_pair() / "genieblue", dtype=dtype)


def test_config_given_by_the_user_is_used_and_left_alone():
    folder = quantized_pair() / "genieblue"
    config = AutoConfig.from_pretrained(folder)
    before = config.to_json_string(use_diff=False)
    assert same(answers(load(folder, config=config)), answers(load(folder)))
    assert config.to_json_string(use_diff=False) == before


def test_unknown_options_are_not_swallowed():
    folder = quantized_pair()
    with pytest.raises(TypeError, match="no_such_option"):
        load(folder / "genieblue", no_such_option=1)
    with pytest.raises(TypeError, match="no_such_option"):
        load_base(folder / "base", no_such_option=1)


def test_auto_class_takes_a_base_that_is_given():
    folder = quantized_pair()
    base = load_base(folder / "base")
    model = AutoModel.from_pretrained(folder / "genieblue", base_model=base)
    assert model.language_model is base
    assert same(answers(model), answers(load(folder / "genieblue")))


def test_loading_info_can_be_asked_for():
    _, info = load(quantized_pair() / "genieblue", output_loading_info=True)
    assert not any(info.values())


def settings_without_version(model):
    return {name: value for name, value in model.generation_config.to_dict().items() if name != "transformers_version"}


def test_generation_settings_come_from_the_folder_as_the_bases_do(tmp_path):
    # A base that was trained often says `use_cache: false`, which is where settings made from its config would end.
    source = save_large_pair(tmp_path, use_cache=False)
    base = load_base(tmp_path / "base-llm")
    base.generation_config = GenerationConfig(do_sample=False, max_new_tokens=20, pad_token_id=0, use_cache=True)
    base.generation_config.save_pretrained(tmp_path / "base-llm")
    base.generation_config.save_pretrained(source)
    quantize(source, tmp_path / "w4", llm="w4a16")
    expected = settings_without_version(base)
    quantized = load(tmp_path / "w4/genieblue")
    quantized_base = load_base(tmp_path / "w4/base")
    assert settings_without_version(quantized) == settings_without_version(quantized_base) == expected
    quantized.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/generation_config.json").read_text())["max_new_tokens"] == 20


@pytest.mark.parametrize("precision", ["w4a16", "w8a16"])
def test_long_cached_decoding_of_texts_is_the_quantized_bases(precision):
    folder = quantized_pair(llm=precision)
    base, model = load_base(folder / "base"), load(folder / "genieblue")
    options = {"do_sample": False, "max_new_tokens": 70, "min_new_tokens": 70, "pad_token_id": 0,
               "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    expected, found = base.generate(TEXT, **options), model.generate(TEXT, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    both = torch.cat([TEXT, TEXT.flip(1)])
    embeds = {"inputs_embeds": base.get_input_embeddings()(both), "attention_mask": torch.ones_like(both)}
    cached = [tree(**embeds, use_cache=True).past_key_values for tree in (base, model)]
    for length in range(both.shape[1] + 1, both.shape[1] + 40):  # past every multiple that a kernel may treat apart
        step = {"input_ids": both[:, :1], "attention_mask": torch.ones(2, length, dtype=torch.long)}
        one, other = (tree(**step, past_key_values=cache) for tree, cache in zip((base, model), cached, strict=True))
        assert torch.equal(one.logits, other.logits)
