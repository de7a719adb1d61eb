"""What a GenieBlue is made of, loaded with and saved in: refused by name before anything is read or written."""

import os
from typing import Any

import torch
from torch import nn

from .addresses_genieblue import refuse_address

SIGLIP_TYPES = ("siglip", "siglip_vision_model")  # image and text, or the image half alone
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

OFFLOAD_ADVICE = (
    "both views share the base's weights, which must lie on a device. Load it in a smaller `dtype`, with a "
    "`quantization_config` for the base, or with a `device_map` of whole modules onto devices that have room, such as "
    "{'vision_tower': 0, 'multi_modal_projector': 0, 'language_model': 1}."
)


def check_base_model(base: Any) -> None:
    """`TypeError` unless `base` is a loaded language model with its LM head."""
    can_generate = getattr(base, "can_generate", None)
    if not isinstance(base, nn.Module) or not hasattr(base, "config") or can_generate is None or not can_generate():
        raise TypeError(
            f"The base is {_described(base)}: expected a loaded language model with its LM head, as "
            "`AutoModelForCausalLM.from_pretrained` gives it."
        )


def check_vision_tower(vision_tower: Any) -> None:
    """`TypeError` unless it is a loaded model, `ValueError` unless that is a SigLIP or the vision half of one."""
    model_type = getattr(getattr(vision_tower, "config", None), "model_type", None)
    if not isinstance(vision_tower, nn.Module) or model_type is None:
        raise TypeError(
            f"The vision tower is {_described(vision_tower)}: expected a loaded SigLIP, as "
            "`SiglipVisionModel.from_pretrained` gives it."
        )
    if model_type not in SIGLIP_TYPES:
        raise ValueError(
            f"The vision tower is of type {model_type!r}: expected {' or '.join(map(repr, SIGLIP_TYPES))}."
        )


def check_load_arguments(path: Any, base_model: Any, kwargs: dict[str, Any]) -> None:
    """An error for what `from_pretrained` can make nothing of; nothing has been read by then."""
    for name, value in (("model", path), ("base", base_model)):
        if isinstance(value, str) and not value:
            raise ValueError(f"The {name}'s name is empty: give a folder or a Hub id.")
        if isinstance(value, str | os.PathLike) and os.path.isfile(value):
            raise OSError(f"{value} is a file: give the {name}'s folder, or a Hub id.")
        refuse_address(value, f"The {name}")
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"The model is {_described(path)}: expected a folder or a Hub id.")
    if base_model is not None and not isinstance(base_model, str | os.PathLike):
        check_base_model(base_model)
        if kwargs.get("generation_config") is not None:
            raise ValueError(
                "`generation_config` is given beside a loaded base, which has settings of its own: set them on the "
                "base, or on the model once it is loaded."
            )
    if bits := [name for name in ("load_in_8bit", "load_in_4bit") if name in kwargs]:
        raise TypeError(
            f"`{bits[0]}` is not known: give `quantization_config`, with which the base is quantized as it is loaded."
        )
    device_map = kwargs.get("device_map")
    if "disk" in (device_map.values() if isinstance(device_map, dict) else [device_map]):
        raise ValueError(f"`device_map` offloads to the disk: {OFFLOAD_ADVICE}")
    config = kwargs.get("config")
    if config is not None and getattr(config, "model_type", None) != "genieblue":
        raise TypeError(f"`config` is {_described(config)}: expected a GenieBlueConfig.")


def refuse_offloaded(module: nn.Module, title: str) -> None:
    """`ValueError` if weights of `module` are on the meta device, where accelerate leaves what it offloads."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                raise ValueError(f"Weights of {title} ({name} and perhaps others) are offloaded: {OFFLOAD_ADVICE}")


def weight_dtype(dtype: Any) -> torch.dtype:
    """The precision that weights are to be written in, also if it is given by name; `ValueError` for integers."""
    given = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if given not in WEIGHT_DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in WEIGHT_DTYPES)
        raise ValueError(f"`dtype` is {dtype!r}: expected one of {names}. Weights of other kinds would be lost.")
    return given


def _described(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


__all__ = ["check_base_model", "check_load_arguments", "check_vision_tower", "refuse_offloaded", "weight_dtype"]
