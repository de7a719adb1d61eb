"""A base that others quantized in a format that vLLM reads: whether it is the recorded one, rounded. Needs no vLLM.

LoRA and copies were trained on the base's own values. On rounded ones they do nearly the same, as long as everything
else stays as it was: what is not quantized must be the recorded values. What the settings say of the weights must be
what the files hold: vLLM goes by the settings, cuts off what is too long, and lets a linear go without its weights.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from modeling_genieblue.model_files_genieblue import some

# What is served, by the `quant_method` of a base's `quantization_config`; docs/serving.md says what of it was run.
FORMATS = {"compressed-tensors": ("pack-quantized", "int-quantized"), "gptq": ("gptq",)}
WORD = 32  # bits of the integers that codes are packed in
# Mean distance from the recorded values, of all linears and of one. Rounding to nearest is 0.25 steps away, GPTQ up
# to 0.42 (weights of SmolLM2, strongly correlated inputs), other weights about 4.
LARGEST_STEPS, LARGEST_STEPS_OF_ONE = 0.75, 1.5
FLOATS = ("F64", "F32", "F16", "BF16")
STEPS = (torch.float32, torch.float16, torch.bfloat16)
LINEAR_OF_BLOCK = re.compile(r"model\.layers\.\d+\..+\.weight")
UNREAD = (".bias", ".rotary_emb.inv_freq")  # endings of tensors that vLLM leaves out if the model has no such
# Linears that vLLM runs as one, whose settings are those of all.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
Find = Callable[[str], torch.Tensor | None]


class Scheme(NamedTuple):
    """How a linear's weights are stored; without a `group_size` each output has one step."""

    kind: str
    bits: int
    group_size: int | None
    is_symmetric: bool = True


def check_quantization(base: str, quantization: Any) -> None:
    """`ValueError` for a `quantization_config` in a format that is not served, or a broken one."""
    if not isinstance(quantization, dict):
        problem: str | None = f"by settings that are a {type(quantization).__name__}, expected settings by name"
    else:
        method = str(quantization.get("quant_method", "")).replace("_", "-")
        if method not in FORMATS:
            problem = f"in the format {method}"
        else:
            problem = (_problem_of_gptq if method == "gptq" else _problem_of_compressed_tensors)(quantization)
    if problem:
        raise ValueError(
            f"The base {base} is quantized {problem}. Served are bases in 16 or 32 bits, and those of "
            "compressed-tensors (pack-quantized or int-quantized) and gptq (symmetric, 4 or 8 bits)."
        )


def _problem_of_gptq(settings: dict[str, Any]) -> str | None:
    found = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    bits, group_size, order = (settings.get(name) for name in ("bits", "group_size", "desc_act"))
    if found not in FORMATS["gptq"]:
        return f"in the format gptq {found}"
    if settings.get("sym") is not True or type(bits) is not int or bits not in (4, 8):
        return f"by gptq with bits {bits!r} and sym {settings.get('sym')!r}"
    if type(group_size) is not int or group_size < 1 and group_size != -1:
        return f"by gptq with group_size {group_size!r}, expected a number of inputs or -1"
    if order is not False and (order is not True or group_size != -1):
        return f"by gptq with desc_act {order!r}, expected false: vLLM does not read the order of columns"
    if settings.get("dynamic") or settings.get("lm_head"):
        return "by gptq with settings of single layers, or of the head"
    return None


def _problem_of_compressed_tensors(settings: dict[str, Any]) -> str | None:
    if (found := settings.get("format")) not in FORMATS["compressed-tensors"]:
        return f"in the format compressed-tensors {found}"
    if others := [name for name in ("kv_cache_scheme", "transform_config") if settings.get(name)]:
        return f"with {' and '.join(others)}"
    sparsity = settings.get("sparsity_config") or {}  # a dense one has no targets
    if not isinstance(sparsity, dict) or sparsity.get("targets"):
        return "with a sparsity_config"
    groups, ignored = settings.get("config_groups"), settings.get("ignore", [])
    if not (isinstance(groups, dict) and groups) or not _is_list_of_names(ignored):
        return "by settings without config_groups by name, or whose ignore is not a list of names"
    targets: list[str] = []
    for name, group in groups.items():
        if not isinstance(group, dict) or not _is_list_of_names(group.get("targets")):
            return f"by settings whose {name} has no list of targets"
        if problem := _problem_of_group(group, str(found)):
            return f"by settings whose {name} has {problem}"
        targets += group["targets"]
    for pattern in (*targets, *ignored):
        try:
            re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            return f"by settings with the pattern {pattern!r}, which is none ({error})"
    if others := [name for name in targets if name != "Linear" and "." not in name and not name.startswith("re:")]:
        return f"by settings with the targets {some(others)}, expected Linear, names of linears or re: and a pattern"
    whole = [name for name in ("lm_head", "model.embed_tokens") if _first(name, targets) and not _first(name, ignored)]
    return f"with {' and '.join(whole)} among the targets, expected in ignore" if whole else None


def _problem_of_group(group: dict[str, Any], kind: str) -> str | None:
    """What of a group of linears is not one of W4A16, W8A16 (`pack-quantized`) and W8A8 (`int-quantized`)."""
    weights, inputs, outputs = (group.get(name) for name in ("weights", "input_activations", "output_activations"))
    if group.get("format") not in (None, kind):
        return f"the format {group['format']}, and all together {kind}"
    if not isinstance(weights, dict):
        return f"weights {weights!r}, expected settings by name"
    if outputs:
        return "output_activations, expected none"
    is_packed = kind == "pack-quantized"
    by_token = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    if is_packed and inputs:
        return "input_activations, expected none with pack-quantized"
    if not is_packed and not (isinstance(inputs, dict) and inputs | by_token == inputs):
        return f"input_activations that are not {by_token}"
    expected: dict[str, tuple] = {
        "type": ("int",),
        "num_bits": (4, 8) if is_packed else (8,),
        "symmetric": (True, False) if is_packed else (True,),
        "strategy": ("group", "channel") if is_packed else ("channel",),
        "dynamic": (False,),
        "actorder": (None, False, "weight", "static"),  # of others vLLM would need the order of columns
    }
    for name, values in expected.items():
        found = weights.get(name)
        if not any(found == value and type(found) is type(value) for value in values):
            return f"weights with {name} {found!r}, expected {' or '.join(map(repr, values))}"
    size, is_grouped = weights.get("group_size"), weights["strategy"] == "group"
    if not (type(size) is int and size > 0 if is_grouped else size in (None, -1)):
        return f"weights with the strategy {weights['strategy']} and group_size {size!r}"
    return None


def _is_list_of_names(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(name, str) for name in found)


def compare_rounded(
    paths: Sequence[Path], samples: dict[str, dict], quantization: dict[str, Any]
) -> tuple[list[str], set[str]]:
    """Differences of quantized linears from recorded samples, and the names of those that were compared.

    Rounding to a grid moves values by half a step at most, and by methods that make up for errors a little further. So
    other weights are told, and in 8 bits those of another training too; in 4 bits a small one is not, unless it also
    changed what is not quantized. Tensors that belong to nothing are differences, too.
    """
    differences: list[str] = []
    steps: list[torch.Tensor] = []
    compared, expected = set(), {*samples, "lm_head.weight"}  # which a base with a tied head may have
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        places = {name: file for file in files for name in file.keys()}

        def find(name: str) -> torch.Tensor | None:
            expected.add(name)
            return places[name].get_tensor(name) if name in places else None

        for name, sample in sorted(samples.items()):
            if len(sample["shape"]) != 2 or not LINEAR_OF_BLOCK.fullmatch(name):
                continue
            linear = name.removesuffix(".weight")
            try:
                if (scheme := _scheme_of(linear, quantization, places)) is None:
                    if f"{linear}.weight_packed" in places:
                        raise _WrongParts(f"{linear} is quantized, and by quantization_config it is not")
                    continue
                compared.add(name)
                if name in places and places[name].get_slice(name).get_dtype() in FLOATS:
                    raise _WrongParts(
                        f"{name} holds plain values, and by quantization_config, or what vLLM runs it together with, "
                        "it is quantized"
                    )
                expected.discard(name)
                values, step = _rounded(find, linear, sample, scheme)
            except _WrongParts as error:
                differences.append(str(error))
                compared.add(name)
                continue
            away = (values - torch.tensor(sample["values"])).abs() / step.abs().clamp(min=1e-12)
            steps.append(away)
            if not away.mean() <= LARGEST_STEPS_OF_ONE:  # NaN too
                differences.append(f"{name} is {away.mean():.1f} steps of its grid from the recorded values")
    if steps and not (mean := torch.cat(steps).mean()) <= LARGEST_STEPS:
        differences.append(f"its quantized weights are {mean:.1f} steps of their grids from the recorded ones")
    if not differences:  # of a linear that is wrong not all parts were looked for
        others = [name for name in places if name not in expected and not name.endswith(UNREAD)]
        differences += [f"{name} is not expected" for name in sorted(others)]
    if not steps and not differences:
        differences.append("none of its linears is quantized, and quantization_config says that some are")
    return differences, compared


class _WrongParts(ValueError):
    """The tensors of a quantized linear do not belong together, or not to the settings."""


def _scheme_of(linear: str, settings: dict[str, Any], names: Iterable[str]) -> Scheme | None:
    """How vLLM takes the weights of a linear to be stored; `None` if as they are.

    It asks for the module that it runs the linear in, of which others may be a part.
    """
    parent, _, part = linear.rpartition(".")
    whole, parts = next(((whole, parts) for whole, parts in FUSED.items() if part in parts), (part, (part,)))
    whole, linears = f"{parent}.{whole}", [f"{parent}.{each}" for each in parts]
    if settings["quant_method"] == "gptq":  # by what is in the files, which `find_base` tells it
        size = settings["group_size"]
        is_quantized = any(f"{each}.qweight" in names for each in linears)
        return Scheme("gptq", settings["bits"], size if size > 0 else None) if is_quantized else None

    def matches(patterns: Iterable[str]) -> list[str | None]:
        return [_first(whole, patterns) or _first(each, patterns) for each in linears]

    if any(ignored := matches(settings.get("ignore", []))):
        if not all(ignored):
            raise _WrongParts(f"ignore names some of {', '.join(linears)}, which vLLM runs as one: expected all")
        return None
    groups = {target: group for group in settings["config_groups"].values() for target in group["targets"]}
    target = targets[0] if all(targets := matches(groups)) else "Linear"
    if target not in groups:
        return None
    weights = groups[target]["weights"]
    size = weights["group_size"] if weights["strategy"] == "group" else None
    return Scheme(settings["format"], weights["num_bits"], size, weights["symmetric"])


def _first(name: str, patterns: Iterable[str]) -> str | None:
    """The first of the names, or patterns after `re:`, that a name matches, as vLLM does."""
    for pattern in patterns:
        if re.match(pattern[3:], name) if pattern.startswith("re:") else pattern == name:
            return pattern
    return None


def _rounded(find: Find, linear: str, sample: dict[str, Any], scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Values at a sample's positions, and the steps of their grids."""
    (outputs, inputs), bits = sample["shape"], scheme.bits
    size, half = scheme.group_size or inputs, 2 ** (scheme.bits - 1)
    if inputs % size:
        raise _WrongParts(f"{linear} has {inputs} inputs, expected a multiple of the group_size {size}")
    positions = torch.tensor(sample["positions"])
    rows, columns = positions // inputs, positions % inputs
    groups, count = columns // size, inputs // size

    def part(name: str, shape: list[int], *dtypes: torch.dtype) -> torch.Tensor:
        return _part(find, f"{linear}.{name}", shape, dtypes)

    if scheme.kind == "gptq":
        words = part("qweight", [inputs * bits // WORD, outputs], torch.int32)
        steps = part("scales", [count, outputs], *STEPS).t()
        zeros = part("qzeros", [count, outputs * bits // WORD], torch.int32)  # vLLM takes them for one less than half
        if not ((zeros.long() & 2**WORD - 1) == sum(half - 1 << shift for shift in range(0, WORD, bits))).all():
            raise _WrongParts(f"{linear}.qzeros has zero points other than {half - 1}, which sym leaves unread")
        order = find(f"{linear}.g_idx")  # vLLM does not read it
        if order is not None and order.tolist() != [column // size for column in range(inputs)]:
            raise _WrongParts(f"{linear}.g_idx orders columns otherwise than in groups of {size} one by one")
        codes = _unpacked(words.t(), rows, columns, bits) - half
    elif scheme.kind == "pack-quantized":
        words = part("weight_packed", [outputs, -(-inputs * bits // WORD)], torch.int32)
        steps = part("weight_scale", [outputs, count], *STEPS)
        if find(f"{linear}.weight_shape") is not None:
            part("weight_shape", [2], torch.int64, torch.int32)
        codes = _unpacked(words, rows, columns, bits)
        if scheme.is_symmetric:
            codes -= half
        else:
            zeros = part("weight_zero_point", [-(-outputs * bits // WORD), count], torch.int32)
            codes -= _unpacked(zeros.t(), groups, rows, bits)
    else:
        codes = part("weight", [outputs, inputs], torch.int8)[rows, columns].float()
        steps = part("weight_scale", [outputs, count], *STEPS)
    step = steps[rows, groups].float()
    return codes * step, step


def _unpacked(words: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes at places of a matrix whose rows are packed in integers of 32 bits, lowest bits first."""
    count = WORD // bits
    shifts = (columns % count) * bits
    return ((words[rows, columns // count].long() >> shifts) & (2**bits - 1)).float()


def _part(find: Find, name: str, shape: list[int], dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
    tensor = find(name)
    if tensor is None:
        raise _WrongParts(f"{name} is missing")
    if list(tensor.shape) != shape:
        raise _WrongParts(f"{name} has shape {list(tensor.shape)}, expected {shape}")
    if tensor.dtype not in dtypes:
        named = [str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes)]
        raise _WrongParts(f"{name} holds {named[0]}, expected {' or '.join(named[1:])}")
    return tensor
