"""The parts that GenieBlue adds to a base, quantized: vision tower, projector, replicated blocks, LoRA."""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .base_identity_genieblue import is_plain_weight
from .language_adapter_genieblue import adapter_dtype, adapter_parameters, parameter_device, set_parameter
from .loading_genieblue import LoadRequest
from .model_files_genieblue import ADAPTER_FOLDER, QMAP_NAME, QUANTIZED_ADAPTER_NAME, WEIGHTS_NAME, is_inner_folder
from .quantized_base_genieblue import (
    check_options,
    chosen_dtype,
    nothing_missing,
    on_meta_device,
    one_device,
    use_stored_generation_config,
)
from .quantized_configuration_genieblue import QuantizedGenieBlueConfig
from .quantized_files_genieblue import FLOATING, QuantizedFile, fill_from_quantized_file
from .quantized_linears_genieblue import FrozenLinear, sampled_codes, scales_of
from .quantized_precision_guard_genieblue import guard_tree, is_frozen
from .quantized_settings_genieblue import BASE_PARTS

STORED_FILES = (
    WEIGHTS_NAME, QMAP_NAME, f"{ADAPTER_FOLDER}/{QUANTIZED_ADAPTER_NAME}", f"{ADAPTER_FOLDER}/{QMAP_NAME}"
)  # fmt: skip


def load_quantized_parts(model_class: type, request: LoadRequest, base_model: Any) -> tuple[Any, dict]:
    """A model with vision tower and projector, still without a base; as strict as the loading of a plain one.

    Raises `OSError` for missing or damaged files, `ValueError` for tensors that do not fit and for a device map that
    spreads the model.
    """
    kwargs = dict(request.own_kwargs)
    config: Any = kwargs.pop("config", None)
    check_options(kwargs)
    if config is None:
        config = QuantizedGenieBlueConfig.from_pretrained(request.path, **request.hub_kwargs)
    config = copy.deepcopy(config)
    own: Any = base_model.dtype if isinstance(base_model, nn.Module) else config.quantization["activations"]
    dtype = chosen_dtype(kwargs.get("dtype") or kwargs.get("torch_dtype"), own)
    request.base_kwargs["dtype"] = dtype  # a base that is not quantized may be stored in another one
    attention = {} if kwargs.get("attn_implementation") is None else {
        "attn_implementation": kwargs["attn_implementation"]
    }  # fmt: skip
    device_map = kwargs.get("device_map")
    if device_map is None and isinstance(base_model, nn.Module):
        device_map = base_model.device
    model: Any = on_meta_device(lambda: model_class._from_config(config, dtype=dtype, **attention))
    file = QuantizedFile(request.file(WEIGHTS_NAME), request.file(QMAP_NAME))
    fill_from_quantized_file(model, file, dtype=dtype, device=one_device(device_map))
    for module in (model.vision_tower, model.multi_modal_projector):
        if any(map(is_frozen, module.modules())):
            guard_tree(module, dtype)
    use_stored_generation_config(model, request.path, request.hub_kwargs)
    model.config.name_or_path = request.path
    return model, nothing_missing()


def has_quantized_base(config: QuantizedGenieBlueConfig) -> bool:
    """Whether the base that a quantized GenieBlue runs on is quantized as well."""
    return any((config.quantization or {})[part] != "w16a16" for part in BASE_PARTS)


def quantized_values(base: nn.Module) -> dict[str, torch.Tensor]:
    """What a base is compared by: plain parameters; scales and some codes of quantized ones, by names of their own."""
    values = {}
    for name, parameter in base.named_parameters():
        if is_plain_weight(parameter):
            values[name] = parameter
        elif (scales := scales_of(parameter)) is not None:
            values |= {f"{name}._scale": scales, f"{name}._codes": sampled_codes(parameter)}
    return values


def check_base_is_quantized(base: nn.Module, config: QuantizedGenieBlueConfig, path: str) -> None:
    """`ValueError` for a 16-bit base under an adapter that was made for a quantized one."""
    if has_quantized_base(config) and all(scales_of(parameter) is None for parameter in base.parameters()):
        raise ValueError(
            f"{path} is for a base quantized to {(config.quantization or {})['llm']}, and was given one that is not: "
            f"load it onto {config.base_model_name_or_path}, or use the unquantized GenieBlue."
        )


def quantized_adapter_entries(view: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """`(module in the tree, module in the file, weight)` of every linear of the adapter."""
    for name, stock, parameter in adapter_parameters(view):
        if name.endswith(".weight") and isinstance(view.get_submodule(name.removesuffix(".weight")), nn.Linear):
            yield name.removesuffix(".weight"), stock.removesuffix(".weight"), parameter


def lora_layout(name: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple, tuple]]:
    """What a file holds for an 8-bit LoRA matrix: one scale per rank, which is a row of A and a column of B."""
    scales = (shape[0], 1) if ".lora_A" in name else (1, shape[1])
    return {f"{name}.weight._data": (tuple(shape), ("I8",)), f"{name}.weight._scale": (scales, FLOATING)}


def load_quantized_adapter(view: nn.Module, request: LoadRequest, base_dtype: torch.dtype) -> None:
    """Fills the adapter of `view`: copied blocks stay quantized, LoRA is expanded (in memory it is float32).

    Raises `ValueError` for missing, unexpected or differently shaped tensors, `OSError` for a damaged file.
    """
    qmap = request.adapter_file(QMAP_NAME)
    file = QuantizedFile(request.adapter_file(QUANTIZED_ADAPTER_NAME), qmap)
    linears = {stock: (name, parameter) for name, stock, parameter in quantized_adapter_entries(view)}
    if unknown := sorted(set(file.qmap) - set(linears)):
        raise ValueError(f"{qmap} names {unknown[0]!r}, which is not a linear of this adapter.")
    if other := [name for name, kind in file.qmap.items() if ".lora_" in name and kind != "qint8"]:
        raise ValueError(f"{qmap} gives {other[0]} {file.qmap[other[0]]}: LoRA has 8 bits or 16.")
    layout: dict[str, tuple[tuple, tuple]] = {}
    plain = {}
    for name, stock, parameter in adapter_parameters(view):
        module = stock.rpartition(".")[0]
        if stock.endswith(".weight") and module in file.qmap:
            is_lora = ".lora_" in stock
            layout |= lora_layout(module, tuple(parameter.shape)) if is_lora else file.layout(
                module, file.qmap[module], *parameter.shape
            )  # fmt: skip
        else:
            plain[stock] = name
            layout[stock] = (tuple(parameter.shape), FLOATING)
    file.check(layout)
    for stock, name in plain.items():
        set_parameter(view, name, file.tensor(stock, adapter_dtype(name, base_dtype), parameter_device(view, name)))
    for stock, kind in file.qmap.items():
        name, parameter = linears[stock]
        device = parameter_device(view, f"{name}.weight")
        if ".lora_" in name:
            dtype = adapter_dtype(name, base_dtype)
            codes, scale = (file.tensor(f"{stock}.weight.{part}", dtype, device) for part in ("_data", "_scale"))
            set_parameter(view, f"{name}.weight", codes.to(dtype) * scale)
        else:
            weight = file.weight(stock, kind, parameter.shape, base_dtype, device)
            plain_linear: Any = view.get_submodule(name)
            view.set_submodule(name, FrozenLinear(weight, plain_linear.bias, kind))
    for _, _, parameter in adapter_parameters(view):
        parameter.requires_grad_(False)  # what is saved is the files: training would be lost


def stored_files(request: LoadRequest, config: QuantizedGenieBlueConfig) -> dict[str, Path]:
    """The stored files of a quantized model, by their place in its folder: a save copies them."""
    places = {name: os.path.split(name) for name in STORED_FILES}
    files = {name: Path(request.file(file, folder=folder)) for name, (folder, file) in places.items()}
    if is_inner_folder(config.base_model_name_or_path):
        folder = Path(str(request.base_location(config)))
        files |= {f"{folder.name}/{path.name}": path for path in sorted(folder.iterdir()) if path.is_file()}
    return files
