"""A base that others quantized may be served if it is the recorded one, rounded; anything else is refused by name."""

import json
import re
from pathlib import Path

import pytest
import torch
from quantized_bases import KINDS, OF_GPTQ, packed, quantize_base, to_grid
from safetensors.torch import load_file, save_file
from vllm_engine import save_wide_pair

from genieblue.serving.vllm.base import find_base
from modeling_genieblue import GenieBlueConfig

Q = "model.layers.2.self_attn.q_proj"


def round_to(folder: Path, kind: str) -> tuple[Path, Path]:
    """A GenieBlue on a base in 32 bits, and that base rounded to the nearest codes."""
    model = save_wide_pair(folder, "llama-tied")
    bits, group_size, *_ = KINDS[kind]
    path = model.parent / "base/model.safetensors"
    whole = path.read_bytes()
    codes = to_grid(model.parent / "base", bits, group_size)
    path.write_bytes(whole)
    return model, quantize_base(model.parent / "base", kind, codes)


@pytest.fixture(params=KINDS)
def pair(request, tmp_path):
    return round_to(tmp_path, request.param)


@pytest.fixture
def w4a16(tmp_path):
    return round_to(tmp_path, "w4a16")


def found(pair):
    model, base = pair
    config = GenieBlueConfig.from_pretrained(model)
    config.base_model_name_or_path = str(base)
    return find_base(str(model), None, config)


def change(base, action):
    tensors = load_file(base / "model.safetensors")
    action(tensors)
    save_file(
        {name: each.contiguous() for name, each in tensors.items()}, base / "model.safetensors", {"format": "pt"}
    )


def settings(base, **changes):
    path = base / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def test_the_recorded_base_rounded_is_found_with_how_it_is_quantized(pair):
    base = found(pair)
    assert base.location == str(pair[1]) and base.weight_files == ["model.safetensors"]
    recorded = json.loads((pair[1] / "config.json").read_text())["quantization_config"]
    linears = (base.quantization or {}).pop("modules_in_block_to_quantize", None)
    assert base.quantization == recorded
    if recorded["quant_method"] == "gptq":
        assert linears is not None and len(linears) == 4 * 7 and Q in linears


@pytest.mark.parametrize("name", [f"{Q}.weight_scale", f"{Q}.weight_packed"])
def test_a_linear_that_lacks_a_part_is_refused_by_name(name, w4a16):
    change(w4a16[1], lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"{re.escape(name)} is missing"):
        found(w4a16)


def test_other_quantized_weights_are_refused_by_the_tensor(pair):
    def shuffle(tensors):
        name = next(f"{Q}.{part}" for part in ("qweight", "weight_packed", "weight") if f"{Q}.{part}" in tensors)
        tensors[name] = tensors[name].roll(5, 0)

    change(pair[1], shuffle)
    with pytest.raises(ValueError, match=f"{re.escape(Q)}.weight is [0-9.]+ steps of its grid"):
        found(pair)


def test_another_training_is_told_in_8_bits_by_all_weights_together(tmp_path):
    model, base = round_to(tmp_path, "w8a8")

    def train(tensors):
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if tensor.dtype is torch.int8:
                moved = tensor + torch.randint(-1, 2, tensor.shape, generator=generator)
                tensors[name] = moved.clamp(-128, 127).to(torch.int8)

    change(base, train)
    with pytest.raises(ValueError, match=r"its quantized weights are 0\.[89] steps of their grids"):
        found((model, base))


def test_other_values_of_what_is_not_quantized_are_refused_with_the_usual_reason(pair):
    change(pair[1], lambda tensors: tensors["model.layers.1.input_layernorm.weight"].mul_(1.5))
    with pytest.raises(ValueError, match="input_layernorm.weight contains .* .AWQ and SmoothQuant move scales"):
        found(pair)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
def test_another_shape_is_refused_by_name(part, w4a16):
    change(w4a16[1], lambda tensors: tensors.update({f"{Q}.{part}": tensors[f"{Q}.{part}"][:-1]}))
    with pytest.raises(ValueError, match=f"{re.escape(Q)}.{part} has shape"):
        found(w4a16)


def test_steps_that_are_no_numbers_are_refused(w4a16):
    change(w4a16[1], lambda tensors: tensors[f"{Q}.weight_scale"].fill_(torch.nan))
    with pytest.raises(ValueError, match=f"{re.escape(Q)}.weight is nan steps"):
        found(w4a16)


def test_zero_points_are_read(w4a16):
    """The same values in other codes: where there is room, one step above another zero point."""

    def rewrite(tensors):
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            outputs, groups = tensors[name.replace("packed", "scale")].shape
            codes = torch.stack([tensors[name] >> shift & 15 for shift in range(0, 32, 4)], -1).flatten(1)
            zeros = 8 + (codes.view(outputs, groups, -1).amax(-1) < 15).int()
            codes += (zeros - 8).repeat_interleave(codes.shape[1] // groups, 1)
            tensors[name] = packed(codes, 4)
            tensors[name.replace("packed", "zero_point")] = packed(zeros.t().contiguous(), 4).t()

    change(w4a16[1], rewrite)
    of_group(w4a16[1], symmetric=False)
    assert found(w4a16).quantization is not None
    change(w4a16[1], lambda tensors: tensors.pop(f"{Q}.weight_zero_point"))
    with pytest.raises(ValueError, match=f"{re.escape(Q)}.weight_zero_point is missing"):
        found(w4a16)


def set_to(value, *names):
    return lambda tensors: [tensors[name].fill_(value) for name in names]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (set_to(3, f"{Q}.g_idx"), "g_idx orders columns otherwise"),  # vLLM does not read g_idx: silently wrong
        (set_to(0, f"{Q}.qzeros"), "qzeros has zero points other than 7"),
        (lambda tensors: tensors.update({f"{Q}.scales": tensors[f"{Q}.scales"][:0]}), r"scales has shape \[0, 128\]"),
        (lambda tensors: tensors.update({f"{Q}.qweight": tensors[f"{Q}.qweight"].float()}), "holds float32.* int32"),
        (lambda tensors: tensors.update({f"{Q}.weight": torch.zeros(128, 128)}), "weight holds plain values"),
        (lambda tensors: tensors.update({f"{Q}.input_scale": torch.ones(1)}), "input_scale is not expected"),
        (lambda tensors: tensors.update({"lm_head.qweight": torch.ones(1).int()}), "lm_head.qweight is not expected"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(Q)], "q_proj.qweight is"),
    ],
)  # fmt: skip
def test_tensors_that_vllm_would_read_otherwise_are_refused_by_name(action, message, tmp_path):
    pair = round_to(tmp_path, "gptq")
    change(pair[1], action)
    with pytest.raises(ValueError, match=message):
        found(pair)


def test_what_vllm_does_not_read_and_does_not_miss_may_be_there(tmp_path):
    pair = round_to(tmp_path, "gptq")
    more = {f"{Q}.bias": torch.zeros(128), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    change(pair[1], lambda tensors: tensors.update(more))
    written = {"pack_dtype": "int32", "meta": {"quantizer": ["gptqmodel:4.2.5"]}, "dynamic": None, "lm_head": False}
    settings(pair[1], static_groups=False, true_sequential=True, format="gptq", **written)
    assert found(pair).quantization is not None


def of_group(base, **weights):
    groups = json.loads((base / "config.json").read_text())["quantization_config"]["config_groups"]
    groups["group_0"]["weights"] |= weights
    settings(base, config_groups=groups)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 8}, r"weight_packed has shape \[\d+, 16\], expected \[\d+, 32\]"),
        ({"group_size": 64}, r"weight_scale has shape \[\d+, 4\], expected \[\d+, 2\]"),
        ({"group_size": 96}, "has 128 inputs, expected a multiple of the group_size 96"),
        ({"strategy": "channel"}, "the strategy channel and group_size 32"),
        ({"symmetric": False}, "weight_zero_point is missing"),
        ({"num_bits": "4"}, "num_bits '4', expected 4 or 8"),
        ({"type": "float"}, "type 'float'"),
        ({"actorder": "group"}, "actorder 'group', expected"),
    ],
)
def test_settings_that_are_not_those_of_the_files_are_refused_by_name(weights, message, w4a16):
    """vLLM goes by the settings, and cuts off what is too long in linears that it splits by inputs."""
    of_group(w4a16[1], **weights)
    with pytest.raises(ValueError, match=message):
        found(w4a16)


def group(targets, **others):
    weights = KINDS["w4a16"][2]["config_groups"]["group_0"]["weights"]
    return {"config_groups": {"group_0": {"targets": targets, "weights": weights, **others}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (group(["re:.*_proj"]), None),
        (group(["re:.*mlp.*", "re:.*[qkv]_proj", "re:.*o_proj"], format="pack-quantized"), None),
        ({"sparsity_config": {"format": "dense", "targets": []}, "transform_config": {}, "version": "0.12.2"}, None),
        ({"sparsity_config": {"format": "sparse-24-bitmask", "targets": ["Linear"]}}, "with a sparsity_config"),
        (group(["re:.*mlp.*"]), r"self_attn\.k_proj is quantized, and by quantization_config it is not"),
        (group(["re:.*"]) | {"ignore": []}, "lm_head and model.embed_tokens among the targets"),
        (group(["re:*"]), r"pattern 're:\*', which is none"),
        (group(["LlamaAttention"]), "targets LlamaAttention, expected Linear"),
        (group("Linear"), "group_0 has no list of targets"),
        (group(["Linear"], format="int-quantized"), "format int-quantized, and all together pack-quantized"),
        (group(["Linear"], input_activations={"num_bits": 8}), "input_activations, expected none"),
        (group(["Linear"], output_activations={"num_bits": 8}), "output_activations, expected none"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "W4A16 has no list of targets"),
        ({"config_groups": None}, "without config_groups"),
        ({"ignore": None}, "ignore is not a list of names"),
        ({"ignore": [f"{Q}"]}, "ignore names some of .*q_proj.*, which vLLM runs as one"),
        ({"ignore": ["re:.*v_proj"]}, "q_proj is quantized, and by"),  # a match of vLLM's qkv_proj, too
    ],
)
def test_linears_are_quantized_that_vllm_takes_for_such_by_the_settings(changes, message, w4a16):
    settings(w4a16[1], **changes)
    if message is None:
        assert found(w4a16).quantization is not None
    else:
        with pytest.raises(ValueError, match=message):
            found(w4a16)


def test_a_linear_that_is_not_quantized_must_be_in_ignore(w4a16):
    model, base = w4a16
    down = "model.layers.2.mlp.down_proj"
    plain = load_file(model.parent / "base/model.safetensors")[f"{down}.weight"]
    parts = ("weight_packed", "weight_scale", "weight_shape")
    change(base, lambda tensors: [tensors.pop(f"{down}.{part}") for part in parts])
    change(base, lambda tensors: tensors.update({f"{down}.weight": plain}))
    with pytest.raises(ValueError, match="down_proj.weight holds plain values, and by quantization_config"):
        found(w4a16)
    settings(base, ignore=["lm_head", down])
    assert found(w4a16).quantization is not None


def test_activations_of_8_bits_have_scales_by_token(tmp_path):
    model, base = round_to(tmp_path, "w8a8")
    groups = json.loads((base / "config.json").read_text())["quantization_config"]["config_groups"]
    for inputs in (None, {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}):
        groups["group_0"]["input_activations"] = inputs
        settings(base, config_groups=groups)
        with pytest.raises(ValueError, match="input_activations that are not"):
            found((model, base))


def test_damaged_files_and_settings_and_tensors_in_two_files_are_told(w4a16):
    model, base = w4a16
    path = base / "model.safetensors"
    tensors = load_file(path)
    for name in ("a", "b"):
        save_file(tensors, base / f"{name}.safetensors", {"format": "pt"})
    index = {"weight_map": {"1": "a.safetensors", "2": "b.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(ValueError, match="is in 2 files"):
        found(w4a16)
    path.write_bytes(whole[:-100])
    with pytest.raises(OSError, match=r"model.safetensors cannot be read .* fetch it again"):
        found(w4a16)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": ["gptq"]}))
    with pytest.raises(ValueError, match="by settings that are a list, expected settings by name"):
        found(w4a16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, r"quantized in the format awq\. Served are"),
        ({"quant_method": "fp8"}, "quantized in the format fp8"),
        ({"format": "float-quantized"}, "format compressed-tensors float-quantized"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "with kv_cache_scheme"),
        ({"transform_config": {"config_groups": {}, "name": "spin"}}, "with transform_config"),
        (OF_GPTQ | {"sym": False}, "gptq with bits 4 and sym False"),
        (OF_GPTQ | {"bits": 3}, "gptq with bits 3"),
        (OF_GPTQ | {"lm_head": True}, "settings of single layers"),
        (OF_GPTQ | {"bits": 4.0}, r"gptq with bits 4\.0"),
        (OF_GPTQ | {"desc_act": True}, "gptq with desc_act True, expected false"),
        (OF_GPTQ | {"group_size": None}, "gptq with group_size None"),
        (OF_GPTQ | {"checkpoint_format": "marlin"}, "format gptq marlin"),
    ],
)
def test_formats_that_were_not_tried_are_refused_by_name(changes, message, w4a16):
    settings(w4a16[1], **changes)
    with pytest.raises(ValueError, match=message):
        found(w4a16)
