"""What quanto, PEFT and transformers do wrong in silence with quantized models: refused, or made right."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_base, tiny_vision_tower
from tiny_quantized import (
    ADAPTER,
    BASE_WEIGHTS,
    OWN_WEIGHTS,
    PIXELS,
    REQUEST,
    SHAPE,
    TEXT,
    TOWER,
    answers,
    contents,
    large_pair,
    load,
    load_base,
    own_copy,
    quantize,
    quantized_pair,
    same,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    QuantoConfig,
)

from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.as_built_genieblue import AsBuilt
from modeling_genieblue.quantized_linears_genieblue import FrozenLinear, reason_against

W8 = {"llm": "w8a16", "rounding": "rtn"}


@pytest.fixture
def model():
    return load(quantized_pair() / "genieblue")


# Precision and place


@pytest.mark.parametrize("cast", [
    lambda module: module.half(), lambda module: module.float(), lambda module: module.double(),
    lambda module: module.to(torch.float16), lambda module: module.to("cpu", torch.float32),
    lambda module: module.to(dtype=torch.float32), lambda module: module.to(torch.zeros(1)),
], ids=["half", "float", "double", "to", "to-device-and-dtype", "to-keyword", "to-tensor"])  # fmt: skip
def test_cast_is_refused_and_changes_nothing(cast, model):
    before = answers(model)
    with pytest.raises(ValueError, match="Load the model again with `dtype="):
        cast(model)
    assert same(answers(model), before)


@pytest.mark.parametrize("part", ["", "model.layers.0", "model.layers.0.mlp.up_proj", "model.rotary_emb",
                                  "model.norm", "model.embed_tokens", "lm_head"])  # fmt: skip
def test_cast_of_a_part_of_a_quantized_base_is_refused_and_changes_nothing(part):
    base = load_base(quantized_pair(lm_head="w8a16", embeddings="w8a16") / "base")
    expected, frequencies = base(TEXT).logits, base.model.rotary_emb.inv_freq.clone()
    module = base.get_submodule(part)
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(ValueError, match="Load the model again with `dtype="):
            module.to(dtype)
    with pytest.raises(ValueError, match="Load the model again with `dtype="):
        module.half()
    assert module.to(torch.bfloat16) is module and module.to("cpu") is module
    assert torch.equal(base(TEXT).logits, expected)
    assert torch.equal(base.model.rotary_emb.inv_freq, frequencies)


def test_cast_of_a_part_of_the_vision_tower_is_refused(model):
    before = answers(model)
    with pytest.raises(ValueError, match="Load the model again with `dtype="):
        model.vision_tower.encoder.layers.half()
    assert same(answers(model), before)


@pytest.mark.parametrize("mix", [{}, W8, {"activations": "float32"}, {"activations": "float16"}], ids=str)
def test_move_and_cast_to_its_own_dtype_change_nothing(mix):
    model = load(quantized_pair(**mix) / "genieblue")
    before = answers(model)
    for moved in (model.to("cpu"), model.cpu(), model.to(model.dtype), model.to("cpu", model.dtype)):
        assert moved is model
        assert same(answers(model), before)
    assert model.multimodal_language_model.model.layers[0].mlp.up_proj.lora_A["default"].weight.dtype == torch.float32


@pytest.mark.parametrize("mix", [{}, W8, {"lm_head": "w8a16", "embeddings": "w8a16"}, {"activations": "float32"}],
                         ids=str)  # fmt: skip
def test_copies_answer_as_the_original(mix):
    folder = quantized_pair(**mix)
    model = load(folder / "genieblue")
    twin = copy.deepcopy(model)
    assert twin.language_model is not model.language_model
    assert same(answers(twin), answers(model))
    base = load_base(folder / "base")
    other = copy.deepcopy(base)
    assert torch.equal(other(TEXT).logits, base(TEXT).logits)
    weights = [module.model.layers[0].mlp.up_proj.weight for module in (base, other)]
    assert weights[0] is not weights[1] and type(weights[0]) is type(weights[1])


def test_strided_and_oddly_placed_activations():
    """The kernels refuse the one and crash on the other."""
    for mix in ({}, W8):
        linear = load(quantized_pair(**mix) / "genieblue").language_model.model.layers[0].mlp.up_proj
        plain = torch.randn(3, 64, dtype=torch.bfloat16)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                expected = linear(plain)
                wide = torch.zeros(3, 129, dtype=torch.bfloat16)
                wide[:, 1:65] = plain
                assert torch.equal(linear(wide[:, 1:65]), expected)
                assert torch.equal(linear(plain.t().contiguous().t()), expected)
                for offset in range(1, 17):
                    block = torch.zeros(3 * 64 + offset, dtype=torch.bfloat16)
                    block[offset:] = plain.flatten()
                    assert torch.equal(linear(block[offset:].view(3, 64)), expected)
                assert torch.equal(linear(plain[0]), linear(plain[:1])[0])
                assert linear(plain[:0]).shape == (0, 160)
                assert linear(plain.view(1, 3, 1, 64)).shape == (1, 3, 1, 160)


def test_files_of_another_writer_may_lie_at_any_place(tmp_path):
    """The 8-bit kernel crashes on codes that are not aligned, and a stock writer aligns to 8 bytes only."""
    expected = answers(load(quantized_pair(**W8) / "genieblue"))
    folder = own_copy(quantized_pair(**W8), tmp_path)
    for shift in range(8):
        for name in (OWN_WEIGHTS, ADAPTER, BASE_WEIGHTS):
            rewrite_with_shift(folder / name, shift)
        assert same(answers(load(folder / "genieblue", check_base=False)), expected)


def rewrite_with_shift(path, shift):
    """The same tensors behind a header that is longer by `shift` bytes, which every reader must take."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip(b" ")
    padded = header + b" " * (-len(header) % 8 + shift)
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + content[8 + length :])


@pytest.mark.parametrize("in_features", [588, 40])
def test_shapes_that_kernels_cannot_take_are_named(in_features):
    assert str(in_features) in reason_against(64, in_features, 8)
    assert str(in_features) in reason_against(64, in_features, 4)


def test_shapes_that_fit_8_bits_only_are_named():
    assert "4304" in reason_against(64, 4304, 4) and reason_against(64, 4304, 8) is None
    assert "out_features 10" in reason_against(10, 64, 4) and reason_against(10, 64, 8) is None
    assert reason_against(64, 64, 4) is None


# Quantized again


@pytest.mark.parametrize("mix", [{}, {"llm": "w16a16"}], ids=str)
def test_quantization_config_on_top_is_refused(mix):
    with pytest.raises(ValueError, match="already quantized"):
        load(quantized_pair(**mix) / "genieblue", quantization_config=QuantoConfig(weights="int8"))


def test_quantization_config_on_a_quantized_base_is_refused():
    with pytest.raises(ValueError, match="already quantized"):
        load_base(quantized_pair() / "base", quantization_config=QuantoConfig(weights="int8"))


@pytest.mark.parametrize("mix", [{}, {"llm": "w16a16"}], ids=str)
def test_quantizing_twice_is_refused(mix, tmp_path):
    with pytest.raises(ValueError, match="already quantized"):
        quantize(quantized_pair(**mix) / "genieblue", tmp_path, **W8)
    assert not list(tmp_path.iterdir())


def test_new_genieblue_is_not_made_on_a_quantized_base():
    base = load_base(quantized_pair() / "base")
    with pytest.raises(ValueError, match="quantized"):
        GenieBlueForConditionalGeneration.from_base(base, tiny_vision_tower(**TOWER), lora_rank=4)


@pytest.mark.parametrize("load_stock", [
    AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained,
    LlamaForSequenceClassification.from_pretrained, AutoModel.from_pretrained,
    lambda folder: AutoModel.from_pretrained(folder, trust_remote_code=True),
], ids=["auto-without-trust", "own-class", "another-head", "without-head", "without-head-trusted"])  # fmt: skip
def test_stock_classes_never_load_a_quantized_base_at_random(load_stock):
    with pytest.raises((ValueError, OSError)):
        load_stock(quantized_pair() / "base")


# The wrong base


@pytest.mark.parametrize("mix", [{}, {"llm": "w16a16", "embeddings": "w8a16"}], ids=str)
def test_unquantized_base_is_refused_checked_or_not(mix):
    folder, plain = quantized_pair(**mix), large_pair().parent / "base-llm"
    for base, check in ((plain, True), (load_base(plain), False)):
        with pytest.raises(ValueError, match="for a base quantized to"):
            load(folder / "genieblue", base_model=base, check_base=check)


def test_base_that_transformers_quantized_is_refused():
    base = load_base(large_pair().parent / "base-llm", quantization_config=QuantoConfig(weights="int8"))
    with pytest.raises(ValueError):
        load(quantized_pair(**W8) / "genieblue", base_model=base)


@pytest.mark.parametrize("mine, other", [
    ({}, W8), (W8, {}), ({}, {"rounding": "rtn"}), ({"rounding": "rtn"}, {"rounding": "gptq"}),
    (W8, {**W8, "rounding": "gptq"}), (W8, {**W8, "lm_head": "w8a16"}), ({**W8, "embeddings": "w8a16"}, W8),
], ids=str)  # fmt: skip
def test_base_quantized_otherwise_is_refused(mine, other):
    base = quantized_pair(**other) / "base"
    with pytest.raises(ValueError, match="is not the base"):
        load(quantized_pair(**mine) / "genieblue", base_model=load_base(base))


def test_quantized_base_of_other_weights_is_refused(tmp_path):
    folder = own_copy(quantized_pair(**W8), tmp_path)
    source = own_copy(large_pair().parent, tmp_path / "source")
    save_tiny_base("llama", source / "base-llm", seed=2, **SHAPE)
    model = load(source / "genieblue", check_base=False)
    model.provenance.base_samples = {}
    with torch.no_grad():  # the samples of the other base are written
        GenieBlueForConditionalGeneration.from_base(
            load_base(source / "base-llm"), model.vision_tower, lora_rank=4
        ).save_pretrained(tmp_path / "source/other/genieblue")
    quantize(tmp_path / "source/other/genieblue", tmp_path / "other", **W8)
    with pytest.raises(ValueError, match="is not the base"):
        load(folder / "genieblue", base_model=tmp_path / "other/base")


# PEFT


@pytest.mark.parametrize("name", ["language_adapter", "subfolder"])
def test_stock_peft_does_not_load_a_quantized_adapter_at_random(name):
    folder = quantized_pair() / "genieblue"
    path, options = (str(folder / name), {}) if name == "language_adapter" else (
        str(folder), {"subfolder": "language_adapter"}
    )  # fmt: skip
    for base in (load_base(large_pair().parent / "base-llm"), load_base(quantized_pair() / "base")):
        with pytest.raises((ValueError, OSError)):
            PeftModel.from_pretrained(base, path, **options)
    with pytest.raises((ValueError, OSError)):
        load_base(large_pair().parent / "base-llm").load_adapter(str(folder / "language_adapter"))


@pytest.mark.parametrize(
    ("mix", "safe"), [({}, True), ({}, False), (W8, False), ({"activations": "float32"}, False)], ids=str
)
def test_lora_is_not_merged_into_a_quantized_base(mix, safe):
    model = load(quantized_pair(**mix) / "genieblue")
    before = answers(model)
    layers = [module for module in model.multimodal_language_model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 7 * 3
    for layer in layers:
        with pytest.raises(ValueError, match="16 bits"):
            layer.merge(safe_merge=safe)
    assert same(answers(model), before)


def test_lora_is_merged_where_the_base_has_16_bits():
    model = load(quantized_pair(llm="w16a16", replicated_blocks="w8a16", activations="float32") / "genieblue")
    before = answers(model)
    for module in model.multimodal_language_model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    torch.testing.assert_close(answers(model)[1], before[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mix", [{}, W8], ids=str)
def test_stock_lora_runs_on_a_quantized_base_and_is_not_dropped_by_merging(mix):
    base = load_base(quantized_pair(**mix) / "base")
    with torch.no_grad():
        plain = base(TEXT).logits
        lora = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
        expected = lora(TEXT).logits
        assert not torch.equal(expected, plain)
        with lora.disable_adapter():
            assert torch.equal(lora(TEXT).logits, plain)
        with pytest.raises(ValueError, match="16 bits"):
            lora.merge_and_unload()


# Use


@pytest.mark.parametrize("mix", [{}, W8, {"lm_head": "w8a16", "embeddings": "w8a16"}, {"activations": "float32"}],
                         ids=str)  # fmt: skip
def test_gradients_reach_lora_and_no_quantized_weight(mix):
    model = load(quantized_pair(**mix) / "genieblue")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    train_lora(model)
    before = answers(model)
    model.train()
    model(REQUEST, pixel_values=PIXELS, labels=REQUEST).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if ".lora_" in name}
    assert len(gradients) == 2 * 7 * 3
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    quantized = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    assert all(module.weight.grad is None and not module.weight.requires_grad for module in quantized)
    model.eval()
    assert same(answers(model), before)


def train_lora(model):
    """What a user does by hand who wants gradients all the same; nothing of it is ever saved."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(True)


def test_gradients_are_those_of_the_dequantized_model():
    model = load(quantized_pair(activations="float32", **W8) / "genieblue")
    train_lora(model)
    plain = load(large_pair())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            other = model.get_parameter(name)
            parameter.copy_(other.dequantize() if hasattr(other, "qtype") else other)
    plain._as_built = AsBuilt(plain)  # a changed base is refused otherwise
    found = []
    for each in (model, plain):
        each(REQUEST, pixel_values=PIXELS, labels=REQUEST).loss.backward()
        found.append(each.multimodal_language_model.model.layers[0].mlp.up_proj.lora_A["default"].weight.grad)
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-5)


def test_model_in_memory_is_saved_in_its_own_precision_only(model, tmp_path):
    with pytest.raises(ValueError, match="quantized for bfloat16"):
        model.save_pretrained(tmp_path / "x", dtype=torch.float32)
    for base in (model.language_model, model.multimodal_language_model):
        with pytest.raises(ValueError, match="not saved from memory|`save_pretrained` is refused"):
            base.save_pretrained(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_quantized_over_unquantized_leaves_no_file_of_the_other(tmp_path):
    """The old adapter would still be found by stock PEFT, and is not this model's."""
    plain, quantized = large_pair(), quantized_pair() / "genieblue"
    load(quantized).save_pretrained(tmp_path / "fresh")
    load(plain).save_pretrained(tmp_path / "model")
    load(quantized).save_pretrained(tmp_path / "model")
    assert contents(tmp_path / "model").keys() == contents(tmp_path / "fresh").keys()
    load(plain).save_pretrained(tmp_path / "model")
    assert contents(tmp_path / "model").keys() == contents(plain).keys()
    assert same(answers(load(tmp_path / "model")), answers(load(plain)))


def test_embeddings_of_8_bits_are_looked_up_by_row(model):
    folder = quantized_pair(lm_head="w8a16", embeddings="w8a16")
    base = load_base(folder / "base")
    embedding = base.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    assert torch.equal(embedding(TEXT), embedding.weight.dequantize()[TEXT])
    settings = json.loads((folder / "base/config.json").read_text())["quantization_config"]
    assert (settings["lm_head"], settings["embeddings"]) == ("w8a16", "w8a16")


def test_file_written_by_stock_safetensors_loads(tmp_path):
    folder = own_copy(quantized_pair(), tmp_path)
    for name in (OWN_WEIGHTS, ADAPTER, BASE_WEIGHTS):
        save_file(load_file(folder / name), folder / name)
    assert same(answers(load(folder / "genieblue")), answers(load(quantized_pair() / "genieblue")))


# What tools do with any model


@pytest.mark.parametrize("mix", [{}, W8, {"lm_head": "w8a16", "embeddings": "w8a16"}, {"activations": "float32"}],
                         ids=str)  # fmt: skip
def test_state_dict_names_what_the_unquantized_model_has(mix):
    model, plain = load(quantized_pair(**mix) / "genieblue"), load(large_pair())
    before = answers(model)
    assert {*plain.state_dict()} <= {*model.state_dict()}
    assert same(answers(model), before)


@pytest.mark.parametrize("mix", [{}, W8, {"activations": "float32"}], ids=str)
def test_state_dict_that_is_loaded_back_changes_nothing_or_is_refused(mix):
    model = load(quantized_pair(**mix) / "genieblue")
    before = answers(model)
    try:
        model.language_model.load_state_dict(model.language_model.state_dict())
    except (ValueError, RuntimeError):
        pass
    assert same(answers(model), before)


@pytest.mark.parametrize("mix", [{}, W8, {"activations": "float32"}], ids=str)
@torch.no_grad()
def test_compiled_model_answers_as_itself(mix):
    model = load(quantized_pair(**mix) / "genieblue")
    expected = model(TEXT).logits
    torch._dynamo.reset()
    found = torch.compile(model.language_model, backend="eager")(TEXT).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype, autocast", [
    (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
], ids=str)  # fmt: skip
@torch.no_grad()
def test_runs_under_autocast(dtype, autocast):
    model = load(quantized_pair() / "genieblue", dtype=dtype)
    expected = model(REQUEST, pixel_values=PIXELS).logits.float()
    with torch.autocast("cpu", dtype=autocast):
        found = model(REQUEST, pixel_values=PIXELS).logits.float()
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_nothing_trains_unless_asked_for(model):
    """The files are saved as they are: what was trained would be gone in silence."""
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.train()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_option_of_none_is_none_given():
    folder = quantized_pair()
    options = dict.fromkeys(("variant", "generation_config", "key_mapping", "gguf_file", "quantization_config"))
    assert same(answers(load(folder / "genieblue", **options)), answers(load(folder / "genieblue")))
    base = load_base(folder / "base", **options)
    assert torch.equal(base(TEXT).logits, load_base(folder / "base")(TEXT).logits)


def test_training_by_hand_is_not_saved_as_if_it_were(tmp_path):
    model = load(quantized_pair() / "genieblue")
    train_lora(model)
    with pytest.raises(ValueError, match="train in 16 bits"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
