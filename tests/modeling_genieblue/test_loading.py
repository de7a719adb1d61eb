"""Loading: options reach the base as by hand, the right base is accepted and another one refused, damage is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_genieblue import IMAGE, prompt, row, save_tiny_pair, tiles, tiny_genieblue
from tiny_models import PROMISED_FAMILIES, REMOTE_CODE_FAMILIES, save_tiny_base, tiny_base, tiny_vision_tower
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlamaConfig,
)

from modeling_genieblue import (
    GenieBlueConfig,
    GenieBlueForConditionalGeneration,
    GenieBlueImageProcessor,
    GenieBlueProcessor,
)

REQUEST, PIXELS = row(5, IMAGE, 9, 40, 41), tiles()
ADAPTER = "language_adapter/adapter_model.safetensors"


def load(folder, **kwargs):
    return GenieBlueForConditionalGeneration.from_pretrained(folder, **kwargs)


@torch.no_grad()
def answers(model):
    return model(prompt(9)).logits, model(REQUEST, pixel_values=PIXELS).logits, model.generate(
        REQUEST, pixel_values=PIXELS, do_sample=False, max_new_tokens=5, pad_token_id=0
    )  # fmt: skip


def same(one, other):
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


# Round trip and the auto classes


@pytest.mark.parametrize("family", PROMISED_FAMILIES)
def test_saved_model_comes_back_with_equal_answers(family, tmp_path):
    save_tiny_base(family, tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    model = tiny_genieblue(base=base)
    model.save_pretrained(tmp_path / "genieblue")
    loaded = load(tmp_path / "genieblue", trust_remote_code=family in REMOTE_CODE_FAMILIES)
    assert same(answers(loaded), answers(model))
    assert same(answers(loaded)[:1], answers(model)[:1])
    assert not loaded.training and not any(module.training for module in loaded.modules())
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / ADAPTER).read_bytes() == (tmp_path / "genieblue" / ADAPTER).read_bytes()
    onto = load(tmp_path / "again", base_model=base)
    assert onto.language_model is base
    assert same(answers(onto), answers(model))


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_auto_classes_load_with_the_package_and_without_trust(auto_class, tmp_path):
    folder = save_tiny_pair(tmp_path)
    model = auto_class.from_pretrained(folder)
    assert type(model) is GenieBlueForConditionalGeneration
    assert same(answers(model), answers(load(folder)))


def test_auto_config_and_processors_load_with_the_package(tmp_path):
    folder = save_tiny_pair(tmp_path)
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is GenieBlueConfig
    assert (config.image_token_id, config.image_seq_length, config.lora_rank) == (128, 4, 4)
    assert config.text_config.model_type == "llama"
    assert type(AutoProcessor.from_pretrained(folder)) is GenieBlueProcessor
    assert type(AutoImageProcessor.from_pretrained(folder)) is GenieBlueImageProcessor


def test_config_given_by_the_user_is_used_and_left_alone(tmp_path):
    folder = save_tiny_pair(tmp_path)
    config = AutoConfig.from_pretrained(folder)
    before = config.to_json_string(use_diff=False)
    assert same(answers(load(folder, config=config)), answers(load(folder)))
    assert config.to_json_string(use_diff=False) == before


def test_loading_info_can_be_asked_for(tmp_path):
    model, info = load(save_tiny_pair(tmp_path), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.language_model is not None


# Options


@pytest.mark.parametrize(("given", "dtype"), [
    ("object", torch.bfloat16), ("object", torch.float16), ("name", torch.bfloat16), ("torch_dtype", torch.bfloat16)
], ids=str)  # fmt: skip
def test_dtype_reaches_every_part(dtype, given, tmp_path):
    folder = save_tiny_pair(tmp_path)
    name = str(dtype).removeprefix("torch.")
    options = {"object": {"dtype": dtype}, "name": {"dtype": name}, "torch_dtype": {"torch_dtype": dtype}}
    model = load(folder, **options[given])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    assert model.dtype == model.language_model.dtype == model.vision_tower.dtype == dtype
    assert next(model.multi_modal_projector.parameters()).dtype == dtype
    with torch.no_grad():
        assert torch.equal(model(prompt(9)).logits, plain(prompt(9)).logits)
        seen = model(REQUEST, pixel_values=PIXELS).logits
        assert seen.dtype == dtype
        exact = load(folder)(REQUEST, pixel_values=PIXELS).logits
    assert (seen - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_precision_on_disk_is_the_precision_in_memory(dtype, tmp_path):
    folder = save_tiny_pair(tmp_path, dtype=dtype)
    for file in ("model.safetensors", ADAPTER):
        assert {tensor.dtype for tensor in load_file(folder / file).values()} == {dtype}
    for options in ({}, {"dtype": "auto"}):
        model = load(folder, **options)
        assert model.dtype == model.language_model.dtype == dtype
    assert load(folder, dtype=torch.float32).language_model.dtype == torch.float32


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto", {"": torch.device("cpu")}], ids=str)
def test_device_map_reaches_every_part(device_map, tmp_path):
    folder = save_tiny_pair(tmp_path)
    model = load(folder, device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert same(answers(model), answers(load(folder)))


def test_device_map_can_name_modules(tmp_path):
    folder = save_tiny_pair(tmp_path)
    device_map = {"vision_tower": "cpu", "multi_modal_projector": "cpu", "language_model": "cpu"}
    assert same(answers(load(folder, device_map=device_map)), answers(load(folder)))


@pytest.mark.parametrize("through", [GenieBlueForConditionalGeneration, AutoModel], ids=lambda each: each.__name__)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementation_reaches_base_and_vision_tower(attention, through, tmp_path):
    folder = save_tiny_pair(tmp_path)
    model = through.from_pretrained(folder, attn_implementation=attention)
    assert model.language_model.config._attn_implementation == attention
    assert model.multimodal_language_model.config._attn_implementation == attention
    assert model.vision_tower.config._attn_implementation == attention
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation=attention)
    with torch.no_grad():
        assert torch.equal(model(prompt(9)).logits, plain(prompt(9)).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_options_do_not_alter_a_base_that_is_given(attention, tmp_path):
    folder = save_tiny_pair(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation=attention, dtype=torch.bfloat16)
    with torch.no_grad():
        before = base(prompt(9)).logits
    other = {"eager": "sdpa", "sdpa": "eager"}[attention]
    model = load(folder, base_model=base, attn_implementation=other, dtype=torch.float32, device_map="cpu")
    assert base.config._attn_implementation == attention
    assert base.dtype == torch.bfloat16
    assert model.vision_tower.config._attn_implementation == other
    with torch.no_grad():
        assert torch.equal(model(prompt(9)).logits, before)
        assert model(REQUEST, pixel_values=PIXELS).logits.shape[-1] == 128


def test_unknown_options_are_not_swallowed(tmp_path):
    with pytest.raises(TypeError, match="no_such_option"):
        load(save_tiny_pair(tmp_path), no_such_option=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": True}, "`load_in_8bit` is not supported: give `quantization_config`"),
        ({"config": LlamaConfig()}, "a LlamaConfig: expected a GenieBlueConfig"),
        ({"base_model": 5}, "base is 5: expected a loaded language model"),
        ({"base_model": tiny_base("llama").model}, "a LlamaModel: expected a loaded language model with its LM head"),
        ({"base_model": ""}, "base's name is empty"),
    ],
    ids=["8 bits", "config", "number", "headless", "empty"],
)
def test_arguments_of_another_kind_are_refused_before_anything_is_read(options, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        load(tmp_path / "nothing", **options)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((tiny_base("llama").model, tiny_vision_tower()), "base is a LlamaModel: expected .* with its LM head"),
        (("base", tiny_vision_tower()), "base is 'base': expected a loaded language model"),
        ((tiny_base("llama"), "siglip"), "vision tower is 'siglip': expected a loaded SigLIP"),
        ((tiny_base("llama"), tiny_base("llama")), "vision tower is of type 'llama'"),
    ],
    ids=["headless", "path", "vision path", "no SigLIP"],
)
def test_parts_of_another_kind_are_refused(parts, message):
    with pytest.raises((TypeError, ValueError), match=message):
        GenieBlueForConditionalGeneration.from_base(*parts)


# The right base


@pytest.mark.parametrize("file_dtype, base_dtype", [
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16),
    (torch.float16, torch.bfloat16),
], ids=str)  # fmt: skip
def test_right_base_in_another_dtype_is_accepted(file_dtype, base_dtype, tmp_path):
    folder = save_tiny_pair(tmp_path, dtype=file_dtype)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=base_dtype)
    model = load(folder, base_model=base)
    assert model.language_model is base and base.dtype == base_dtype
    assert model(REQUEST, pixel_values=PIXELS).logits.dtype == base_dtype


@pytest.mark.parametrize("weights", ["int8", "float8", pytest.param("int4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("given", ["object", "option"])
def test_right_base_is_accepted_when_quantized(weights, given, tmp_path):
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    folder = save_tiny_pair(tmp_path)
    quantization = {"quantization_config": QuantoConfig(weights=weights)}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **quantization)
    with torch.no_grad():
        expected = plain(prompt(9)).logits
        if given == "object":
            model = load(folder, base_model=plain)
            assert model.language_model is plain
        else:
            model = AutoModel.from_pretrained(folder, **quantization)
        assert type(model.language_model.model.layers[0].mlp.up_proj).__name__ == "QLinear"
        assert type(model.vision_tower.encoder.layers[0].mlp.fc1) is torch.nn.Linear
        assert torch.equal(model(prompt(9)).logits, expected)
        seen, exact = model(REQUEST, pixel_values=PIXELS).logits, load(folder)(REQUEST, pixel_values=PIXELS).logits
        assert torch.equal(plain(prompt(9)).logits, expected)
    assert (seen - exact).abs().mean() < {"int8": 0.1, "float8": 0.3, "int4": 0.8}[weights] * exact.abs().mean()
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / ADAPTER).read_bytes() == (folder / ADAPTER).read_bytes()


def test_quantized_base_cannot_be_trained_from():
    pytest.importorskip("optimum.quanto")
    from optimum.quanto import freeze, qint8, quantize

    base = tiny_base("llama")
    quantize(base, weights=qint8)
    freeze(base)
    with pytest.raises(ValueError, match="quantized"):
        tiny_genieblue(base=base)


def test_other_quantized_base_is_refused(tmp_path):
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    folder = save_tiny_pair(tmp_path)
    other = save_tiny_base("llama", tmp_path / "other", seed=2)
    base = AutoModelForCausalLM.from_pretrained(other, quantization_config=QuantoConfig(weights="int8"))
    with pytest.raises(ValueError, match="is not the base"):
        load(folder, base_model=base)


# Another base


def assert_refused(folder, base, *identities):
    with pytest.raises(ValueError, match="is not the base") as error:
        load(folder, base_model=base)
    for identity in (*identities, str(folder), "check_base=False"):
        assert identity in str(error.value)


def test_base_of_another_seed_is_refused_with_both_identities(tmp_path):
    folder = save_tiny_pair(tmp_path)
    other = save_tiny_base("llama", tmp_path / "other", seed=2)
    identities = str(other), str(tmp_path / "base")
    assert_refused(folder, AutoModelForCausalLM.from_pretrained(other), *identities)
    assert_refused(folder, str(other), *identities)
    assert_refused(folder, other, *identities)
    model = load(folder, base_model=other, check_base=False)
    assert torch.equal(model(prompt()).logits, tiny_base("llama", seed=2)(prompt()).logits)


@pytest.mark.parametrize(("name", "dtype"), [
    ("layers.2.mlp.up_proj.weight", torch.float32), ("layers.2.mlp.up_proj.weight", torch.bfloat16),
    ("norm.weight", torch.float32), ("embed_tokens.weight", torch.float32),
], ids=str)  # fmt: skip
@torch.no_grad()
def test_fine_tune_that_moved_one_tensor_is_refused(name, dtype, tmp_path):
    folder = save_tiny_pair(tmp_path, dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    step = 2 * torch.finfo(dtype).eps  # the smallest that survives rounding
    base.model.get_parameter(name).mul_(1 + step)
    assert_refused(folder, base, name)
    assert load(folder, base_model=base, check_base=False).language_model is base


@torch.no_grad()
def test_fine_tune_loaded_in_bfloat16_is_refused(tmp_path):
    folder = save_tiny_pair(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.model.layers[1].self_attn.q_proj.weight.mul_(1.02)
    assert_refused(folder, base.to(torch.bfloat16), "layers.1.self_attn.q_proj")


@pytest.mark.parametrize("changes", [{"intermediate_size": 96}, {"num_hidden_layers": 5}, {"hidden_size": 64},
                                     {"vocab_size": 144}, {"attention_bias": True}], ids=str)  # fmt: skip
def test_base_of_another_shape_is_refused(changes, tmp_path):
    folder = save_tiny_pair(tmp_path)
    other = save_tiny_base("llama", tmp_path / "other", **changes)
    with pytest.raises(ValueError, match="is not the base|hidden size"):
        load(folder, base_model=AutoModelForCausalLM.from_pretrained(other))


@pytest.mark.parametrize("changes", [{"intermediate_size": 96}, {"hidden_size": 64}], ids=str)
def test_base_of_another_shape_is_refused_unchecked_too(changes, tmp_path):
    folder = save_tiny_pair(tmp_path)
    with pytest.raises(ValueError, match="shape|hidden size"):
        load(folder, base_model=tiny_base("llama", **changes), check_base=False)


def test_base_of_another_family_is_refused(tmp_path):
    folder = save_tiny_pair(tmp_path)
    with pytest.raises(ValueError, match="is not the base"):
        load(folder, base_model=tiny_base("phi3"))


def test_exchanged_base_folder_is_refused(tmp_path):
    folder = save_tiny_pair(tmp_path)
    save_tiny_base("llama", tmp_path / "base", seed=2)
    with pytest.raises(ValueError, match="is not the base"):
        load(folder)


def test_missing_base_folder_is_named_with_the_way_out(tmp_path):
    folder = save_tiny_pair(tmp_path)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="that folder does not exist.*base_model=") as error:
        load(folder)
    assert str(tmp_path / "base") in str(error.value)
    assert same(answers(load(folder, base_model=tmp_path / "elsewhere")),
                answers(load(folder, base_model=str(tmp_path / "elsewhere"))))  # fmt: skip


@pytest.mark.parametrize("given", ["model", "model in memory", "folder", "Hub id"])
def test_repository_that_names_a_local_base_loads_onto_a_given_one(given, hub, tmp_path):
    folder = save_tiny_pair(tmp_path)
    hub.commit_folder("you/reader", folder)
    commit = hub.commit_folder("you/base", tmp_path / "base")
    with pytest.raises(ValueError, match="another computer.*base_model="):
        load("you/reader")
    base, location = {
        "model": (AutoModelForCausalLM.from_pretrained(tmp_path / "base"), (str(tmp_path / "base"), None)),
        "model in memory": (tiny_base("llama"), (None, None)),
        "folder": (tmp_path / "base", (str(tmp_path / "base"), None)),
        "Hub id": ("you/base", ("you/base", commit)),
    }[given]
    model = load("you/reader", base_model=base)
    assert same(answers(model), answers(load(folder)))
    assert (model.config.base_model_name_or_path, model.config.base_model_revision) == location
    model.save_pretrained(tmp_path / "again")
    assert same(answers(load(tmp_path / "again", base_model=None if location[0] else base)), answers(model))
    with pytest.raises(ValueError, match=r"is not the base that you/reader was made for, \.\./base"):
        load("you/reader", base_model=tiny_base("llama", seed=2))


def test_base_that_is_given_because_the_recorded_one_is_gone_is_recorded(tmp_path):
    folder = save_tiny_pair(tmp_path)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    model = load(folder, base_model=tmp_path / "elsewhere")
    assert model.config.base_model_name_or_path == str(tmp_path / "elsewhere")


def test_pair_can_be_moved_together(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    expected = answers(load(save_tiny_pair(tmp_path / "here")))
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert same(answers(load(tmp_path / "there" / "genieblue")), expected)
    monkeypatch.chdir(tmp_path / "there")
    assert same(answers(load("genieblue")), expected)
    monkeypatch.chdir(tmp_path / "there" / "genieblue")
    assert same(answers(load(".")), expected)


def test_base_inside_of_the_models_folder(tmp_path):
    folder = tmp_path / "genieblue"
    save_tiny_base("llama", folder / "base")
    model = tiny_genieblue(base=AutoModelForCausalLM.from_pretrained(folder / "base"))
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["base_model_name_or_path"] == "./base"
    assert same(answers(load(folder)), answers(model))
    model.save_pretrained(folder)
    assert same(answers(load(folder)), answers(model))
