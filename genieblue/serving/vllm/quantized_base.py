"""A base that others quantized in a format that vLLM reads: whether it is the recorded one, rounded. Needs no vLLM.

LoRA and copies were trained on the base's own values. On rounded ones they do nearly the same, as long as everything
else stays as it was: what is not quantized must be the recorded values.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

# What the tests run in both views, by the `quant_method` of a base's `quantization_config`.
FORMATS = {"compressed-tensors": ("pack-quantized", "int-quantized"), "gptq": ("gptq",)}
WORD = 32  # bits of the integers that codes are packed in
# Mean distance from the recorded values, of all linears and of one. Rounding to nearest is 0.25 steps away, GPTQ up
# to 0.42 (weights of SmolLM2, strongly correlated inputs), other weights about 4.
LARGEST_STEPS, LARGEST_STEPS_OF_ONE = 0.75, 1.5
FLOATS = ("F64", "F32", "F16", "BF16")
Find = Callable[[str], torch.Tensor | None]


def check_quantization(base: str, quantization: dict[str, Any]) -> None:
    """`ValueError` for a `quantization_config` in a format that has not been tried in both views."""
    method = str(quantization.get("quant_method", "")).replace("_", "-")
    is_gptq = method == "gptq"
    found = quantization.get("checkpoint_format", method) if is_gptq else quantization.get("format")
    if method not in FORMATS:
        problem = f"in the format {method}"
    elif found not in FORMATS[method]:
        problem = f"in the format {method} {found}"
    elif is_gptq and (quantization.get("sym") is not True or quantization.get("bits") not in (4, 8)):
        problem = f"by gptq with bits {quantization.get('bits')!r} and sym {quantization.get('sym')!r}"
    elif is_gptq and (quantization.get("dynamic") or quantization.get("lm_head")):
        problem = "by gptq with settings of single layers, or of the head"
    else:
        others = [name for name in ("kv_cache_scheme", "transform_config") if quantization.get(name)]
        problem = f"with {' and '.join(others)}" if others else None
    if problem:
        raise ValueError(
            f"The base {base} is quantized {problem}. Served are bases in 16 or 32 bits, and those of "
            "compressed-tensors (pack-quantized or int-quantized) and gptq (symmetric, 4 or 8 bits)."
        )


def quantized_linears(paths: Sequence[Path]) -> list[str]:
    """Names of the linears in files of gptq."""
    names: list[str] = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            names += [name.removesuffix(".qweight") for name in file.keys() if name.endswith(".qweight")]
    return sorted(names)


def compare_rounded(
    paths: Sequence[Path], samples: dict[str, dict], quantization: dict[str, Any]
) -> tuple[list[str], set[str]]:
    """Differences of quantized linears from recorded samples, and the names of those that were compared.

    Rounding to a grid moves values by half a step at most, and by methods that make up for errors a little further. So
    other weights are told, and in 8 bits those of another training too; in 4 bits a small one is not, unless it also
    changed what is not quantized.
    """
    differences: list[str] = []
    steps: list[torch.Tensor] = []
    compared = set()
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        places = {name: file for file in files for name in file.keys()}

        def find(name: str) -> torch.Tensor | None:
            return places[name].get_tensor(name) if name in places else None

        for name, sample in sorted(samples.items()):
            if name in places and places[name].get_slice(name).get_dtype() in FLOATS:
                continue
            if len(sample["shape"]) != 2 or not name.endswith(".weight"):
                continue
            try:
                found = _rounded(find, name.removesuffix(".weight"), sample, quantization)
            except _WrongParts as error:
                differences.append(str(error))
                compared.add(name)
                continue
            if found is None:
                continue
            compared.add(name)
            values, step = found
            away = (values - torch.tensor(sample["values"])).abs() / step.abs().clamp(min=1e-12)
            steps.append(away)
            if not away.mean() <= LARGEST_STEPS_OF_ONE:  # NaN too
                differences.append(f"{name} is {away.mean():.1f} steps of its grid from the recorded values")
    if steps and not (mean := torch.cat(steps).mean()) <= LARGEST_STEPS:
        differences.append(f"its quantized weights are {mean:.1f} steps of their grids from the recorded ones")
    return differences, compared


class _WrongParts(ValueError):
    """The tensors of a quantized linear do not belong together."""


def _rounded(
    find: Find, linear: str, sample: dict[str, Any], quantization: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Values at a sample's positions and the steps of their grids; `None` if the linear is not in the files."""
    outputs, inputs = sample["shape"]
    positions = torch.tensor(sample["positions"])
    rows, columns = positions // inputs, positions % inputs
    if (words := find(f"{linear}.qweight")) is not None:
        scales, groups = _part(find, f"{linear}.scales"), find(f"{linear}.g_idx")
        bits = quantization["bits"]
        _check_shape(f"{linear}.qweight", words, [-(-inputs * bits // WORD), outputs])
        groups = columns // -(-inputs // len(scales)) if groups is None else groups[columns].long()
        codes = _unpacked(words.t(), rows, columns, bits)
        step = scales[groups, rows].float()
        return (codes - 2 ** (bits - 1)) * step, step
    if (words := find(f"{linear}.weight_packed")) is not None:
        bits = WORD * words.shape[1] // inputs
        if bits not in (4, 8):
            raise _WrongParts(f"{linear}.weight_packed has {bits} bits a weight, expected 4 or 8")
        _check_shape(f"{linear}.weight_packed", words, [outputs, -(-inputs * bits // WORD)])
        codes, half = _unpacked(words, rows, columns, bits), 2 ** (bits - 1)
    elif (words := find(f"{linear}.weight")) is not None:
        if words.dtype is not torch.int8:
            raise _WrongParts(f"{linear}.weight holds {str(words.dtype).removeprefix('torch.')}, expected int8")
        _check_shape(f"{linear}.weight", words, [outputs, inputs])
        codes, half = words[rows, columns].float(), 0
        bits = 8
    else:
        return None
    scales, groups = _part(find, f"{linear}.weight_scale"), find(f"{linear}.weight_g_idx")
    scales = scales.reshape(-1, 1) if scales.ndim < 2 else scales
    if len(scales) not in (1, outputs):
        raise _WrongParts(f"{linear}.weight_scale has shape {list(scales.shape)}, expected {outputs} rows or one")
    groups = columns // -(-inputs // scales.shape[1]) if groups is None else groups[columns].long()
    rows_of_scales = rows if len(scales) > 1 else torch.zeros_like(rows)
    step = scales[rows_of_scales, groups].float()
    if (zeros := find(f"{linear}.weight_zero_point")) is not None:
        is_packed = zeros.dtype is torch.int32
        codes -= _unpacked(zeros.t(), groups, rows_of_scales, bits) if is_packed else zeros[rows_of_scales, groups]
        return codes * step, step
    return (codes - half) * step, step


def _unpacked(words: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes at places of a matrix whose rows are packed in integers of 32 bits, lowest bits first."""
    count = WORD // bits
    shifts = (columns % count) * bits
    return ((words[rows, columns // count].long() >> shifts) & (2**bits - 1)).float()


def _part(find: Find, name: str) -> torch.Tensor:
    tensor = find(name)
    if tensor is None:
        raise _WrongParts(f"{name} is missing")
    return tensor


def _check_shape(name: str, tensor: torch.Tensor, expected: list[int]) -> None:
    if list(tensor.shape) != expected:
        raise _WrongParts(f"{name} has shape {list(tensor.shape)}, expected {expected}")
