"""Reads and checks files of quantized weights and their quantization maps, and fills module trees from them."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from .model_files_genieblue import read_settings
from .quantized_linears_genieblue import (
    BITS,
    GROUP_SIZES,
    FrozenLinear,
    FrozenWeight,
    check_quanto_installed,
    frozen,
    quanto_weight,
    reason_against,
)

FLOATING = ("BF16", "F16", "F32")  # as safetensors calls them
_PARTS = {"qint8": ("_data", "_scale"), "qint4": ("_data._data", "_scale", "_shift")}


class QuantizedFile:
    """A safetensors file with quantized weights, read by name; whatever is not asked for must not be there."""

    def __init__(self, path: str | os.PathLike, qmap: str | os.PathLike):
        check_quanto_installed()
        self.path = path
        self.qmap = read_qmap(qmap)
        try:
            self._file = safe_open(path, framework="pt")
        except Exception as error:  # safetensors raises its own type, which is no OSError
            raise OSError(f"{path} cannot be read ({error}): it is damaged; fetch it again.") from error

    def check(self, layout: dict[str, tuple[tuple, tuple]]) -> None:
        """`ValueError` unless the file holds exactly the tensors of `layout`, by name, shape and kind of number."""
        stored = set(self._file.keys())
        problems = [f"{name} is missing" for name in sorted(set(layout) - stored)]
        problems += [f"{name} is not expected" for name in sorted(stored - set(layout))]
        for name in sorted(set(layout) & stored):
            part = self._file.get_slice(name)
            shape, kinds = layout[name]
            kind, found = part.get_dtype(), list(part.get_shape())
            if found != list(shape) or kind not in kinds:
                problems.append(f"{name} is {kind} {found}, expected {' or '.join(kinds)} {list(shape)}")
        if problems:
            rest = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise ValueError(
                f"{self.path} does not fit its configuration: {'; '.join(problems[:4])}{rest}. Load the files "
                "that belong together (same repository, same revision)."
            )

    def layout(self, name: str, kind: str, out_features: int, in_features: int) -> dict[str, tuple[tuple, tuple]]:
        """`{key: (shape, dtypes that are accepted)}` of what the file must hold for the weight of module `name`.

        At 4 bits the file's own shape says how large the groups are, which must be one of those that we write.
        """
        if problem := reason_against(out_features, in_features, BITS[kind]):
            raise ValueError(f"{name} cannot be of {BITS[kind]} bits: {problem}. The quantization map is damaged.")
        layout = {f"{name}.input_scale": ((), FLOATING), f"{name}.output_scale": ((), FLOATING)}
        if kind == "qint8":
            codes, rows = {f"{name}.weight._data": ((out_features, in_features), ("I8",))}, out_features
        else:
            key = f"{name}.weight._data._data"
            found = self._file.get_slice(key).get_shape() if key in self._file.keys() else []
            sizes = [size for size in GROUP_SIZES if in_features % size == 0]
            group_size = found[-1] if found and found[-1] in sizes else sizes[0]  # any other fails the check
            rows = out_features * in_features // group_size
            codes = {key: ((rows // 2, group_size), ("U8",)), f"{name}.weight._shift": ((rows, 1), ("U8",))}
        return {**layout, **codes, f"{name}.weight._scale": ((rows, 1), FLOATING)}

    def tensor(self, name: str, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        """A stored tensor; floating-point ones in `dtype`."""
        value = self._file.get_tensor(name)
        return value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)

    def weight(self, name: str, kind: str, shape: Sequence[int], dtype: torch.dtype, device: Any) -> torch.Tensor:
        """quanto's tensor of the weight of module `name`."""
        parts = {part: self.tensor(f"{name}.weight.{part}", dtype, device) for part in _PARTS[kind]}
        return frozen(quanto_weight(parts, kind, shape))


def read_qmap(path: str | os.PathLike) -> dict[str, str]:
    """`{module: "qint4" | "qint8"}` of quanto's map; `OSError` if it is damaged, `ValueError` for other precisions."""
    content = read_settings(path)
    kinds: dict[str, Any] = {
        name: entry.get("weights") if isinstance(entry, dict) else entry for name, entry in content.items()
    }
    unknown = [f"{name}: {kind!r}" for name, kind in kinds.items() if not isinstance(kind, str) or kind not in BITS]
    if unknown:
        raise ValueError(f"{path} names an unknown precision ({unknown[0]}): expected {' or '.join(BITS)}.")
    return kinds


def qmap_content(kinds: dict[str, str]) -> dict[str, dict[str, str]]:
    """The quantization map in quanto's form."""
    return {name: {"weights": kind, "activations": "none"} for name, kind in kinds.items()}


def quantized_modules(tree: nn.Module, qmap: dict[str, str]) -> Iterator[tuple[str, str, nn.Linear | nn.Embedding]]:
    """`(name, kind, module)` for each entry of a map; `ValueError` if a name is no linear or embedding of `tree`."""
    for name, kind in qmap.items():
        try:
            module = tree.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear) and not (isinstance(module, nn.Embedding) and kind == "qint8"):
            raise ValueError(
                f"The quantization map names {name!r} ({kind}), which is not such a layer of {type(tree).__name__}: "
                "the map belongs to another model, or is damaged."
            )
        yield name, kind, module


def fill_from_quantized_file(
    tree: nn.Module,
    file: QuantizedFile,
    *,
    dtype: torch.dtype,
    device: Any = "cpu",
    tied: tuple[str, str] | None = None,
) -> None:
    """Gives `tree`, built on the meta device, all its weights, quantized where the file's map says so.

    `tied` names an LM head and the embedding whose weight it shares, which is stored once. Raises `ValueError` unless
    the file holds exactly what the tree and the map need.
    """
    found = list(quantized_modules(tree, file.qmap))
    quantized_names = {f"{name}.weight" for name, _, _ in found}
    head_weight = f"{tied[0]}.weight" if tied else None
    layout: dict[str, tuple[tuple, tuple]] = {}
    plain = {
        name: tuple(parameter.shape)
        for name, parameter in tree.named_parameters(remove_duplicate=False)
        if name not in quantized_names and name != head_weight
    }
    stored = tree.state_dict().keys()  # without the buffers that are no part of a checkpoint
    buffers = {name: buffer for name, buffer in tree.named_buffers() if name in stored}
    layout |= {name: (shape, FLOATING) for name, shape in plain.items()}
    layout |= {name: (tuple(buffer.shape), (*FLOATING, "I64", "I32", "BOOL")) for name, buffer in buffers.items()}
    for name, kind, module in found:
        if f"{name}.weight" != head_weight:
            layout |= file.layout(name, kind, *module.weight.shape)
    file.check(layout)
    for name in (*plain, *buffers):
        _assign(tree, name, file.tensor(name, dtype, device), is_buffer=name in buffers)
    for name, kind, module in found:
        if f"{name}.weight" == head_weight:
            continue
        weight = file.weight(name, kind, module.weight.shape, dtype, device)
        if isinstance(module, nn.Embedding):
            module.weight = nn.Parameter(weight, requires_grad=False)
        else:
            tree.set_submodule(name, FrozenLinear(weight, module.bias, kind))
    if tied:
        head: Any = tree.get_submodule(tied[0])
        embedding: Any = tree.get_submodule(tied[1])
        if isinstance(embedding.weight, FrozenWeight):
            head = FrozenLinear(embedding.weight, head.bias, "qint8")
            tree.set_submodule(tied[0], head)
        head.weight = embedding.weight
    for module in tree.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _assign(tree: nn.Module, name: str, value: torch.Tensor, *, is_buffer: bool) -> None:
    path, _, leaf = name.rpartition(".")
    module = tree.get_submodule(path)
    if is_buffer:
        module._buffers[leaf] = value
    else:
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
