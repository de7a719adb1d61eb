"""A base that others quantized may be served if it is the recorded one, rounded; anything else is refused by name."""

import json
import re
from pathlib import Path

import pytest
import torch
from quantized_bases import KINDS, packed, quantize_base, to_grid
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
    missing = name if "scale" in name else f"{Q}.weight"
    with pytest.raises(ValueError, match=f"{re.escape(missing)} is missing"):
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


def test_zero_points_and_orders_of_activation_are_read(w4a16):
    """The same values in other codes: steps apart from their columns, and codes above a zero point."""

    def rewrite(tensors):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(1))
        tensors[f"{Q}.weight_scale"] = tensors[f"{Q}.weight_scale"][:, order]
        tensors[f"{Q}.weight_g_idx"] = order.argsort()[torch.arange(128) // 32].int()
        up = "model.layers.2.mlp.up_proj"
        zeros = torch.full((64, 4), 8)  # instead of 8 as the middle of the range
        tensors[f"{up}.weight_zero_point"] = packed(zeros.t().contiguous(), 4).t()

    change(w4a16[1], rewrite)
    assert found(w4a16).quantization is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, r"quantized in the format awq\. Served are"),
        ({"quant_method": "fp8"}, "quantized in the format fp8"),
        ({"format": "float-quantized"}, "format compressed-tensors float-quantized"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "with kv_cache_scheme"),
        ({"transform_config": {"config_groups": {}, "name": "spin"}}, "with transform_config"),
        ({"quant_method": "gptq", "sym": False, "bits": 4}, "gptq with bits 4 and sym False"),
        ({"quant_method": "gptq", "sym": True, "bits": 3}, "gptq with bits 3"),
        ({"quant_method": "gptq", "sym": True, "bits": 4, "lm_head": True}, "settings of single layers"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "format gptq marlin"),
    ],
)
def test_formats_that_were_not_tried_are_refused_by_name(changes, message, w4a16):
    settings(w4a16[1], **changes)
    with pytest.raises(ValueError, match=message):
        found(w4a16)
