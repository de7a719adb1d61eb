"""Tiny bases as others quantize them: weights moved to a grid, and its codes in formats that vLLM reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
Codes = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by linear: codes (out, in) from 0 on, steps (out, groups)


def to_grid(base: Path, bits: int = 4, group_size: int | None = GROUP) -> Codes:
    """Moves the linears of the blocks of a saved base to a grid, and returns their codes.

    Steps are numbers of bfloat16, so that values are exact in it for up to 4 bits.
    """
    path, half, found = base / "model.safetensors", 2 ** (bits - 1), {}
    tensors = load_file(path)
    for name, weight in tensors.items():
        if ".layers." not in name or weight.ndim != 2:
            continue
        grouped = weight.float().view(len(weight), -1, group_size or weight.shape[1])
        step = (grouped.abs().amax(-1, keepdim=True) / (half - 1)).bfloat16().float()
        codes = (grouped / step).round().clamp(-half, half - 1)
        tensors[name] = (codes * step).view_as(weight).to(weight.dtype)
        found[name.removesuffix(".weight")] = ((codes + half).view_as(weight).int(), step[..., 0])
    save_file(tensors, path, {"format": "pt"})
    return found


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes with their rows packed in integers of 32 bits, lowest bits first."""
    count = 32 // bits
    words = codes.view(len(codes), -1, count).long() << (torch.arange(count) * bits)
    words = words.sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _config(bits: int, strategy: str, kind: str, activations: dict | None) -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": False}
    weights["group_size"] = GROUP if strategy == "group" else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip


def _w4a16(codes: torch.Tensor, steps: torch.Tensor) -> dict[str, torch.Tensor]:
    shape = torch.tensor(codes.shape)
    return {"weight_packed": packed(codes, 4), "weight_scale": steps.bfloat16(), "weight_shape": shape}


def _w8a8(codes: torch.Tensor, steps: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": (codes - 128).to(torch.int8), "weight_scale": steps.bfloat16()}


def _gptq(codes: torch.Tensor, steps: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs, inputs = codes.shape
    zeros = torch.full((inputs // GROUP, outputs), 7)  # of a zero point of 8, one less is stored
    return {
        "qweight": packed(codes, 4).t().contiguous(),
        "qzeros": packed(zeros, 4),
        "scales": steps.t().half().contiguous(),
        "g_idx": (torch.arange(inputs) // GROUP).int(),
    }


BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
OF_GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True,
    "checkpoint_format": "gptq",
}  # fmt: skip
# name -> bits, size of groups (None for one by channel), `quantization_config`, and the tensors of a linear
KINDS: dict[str, tuple[int, int | None, dict, Callable]] = {
    "w4a16": (4, GROUP, _config(4, "group", "pack-quantized", None), _w4a16),
    "w8a8": (8, None, _config(8, "channel", "int-quantized", BY_TOKEN), _w8a8),
    "gptq": (4, GROUP, OF_GPTQ, _gptq),
}


def quantize_base(base: Path, kind: str, codes: Codes) -> Path:
    """Writes the codes of a base, which `to_grid` gave, in a format; returns the folder beside it."""
    _, _, settings, tensors_of = KINDS[kind]
    folder = base.with_name(f"{base.name}-{kind}")
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    for name, (of_linear, steps) in codes.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in tensors_of(of_linear, steps).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder
