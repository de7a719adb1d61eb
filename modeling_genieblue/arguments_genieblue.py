"""Checks the arguments of making, loading and saving a GenieBlue, before anything is read or written."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .addresses_genieblue import refuse_address
from .model_files_genieblue import MODEL_TYPE

# Arguments of transformers' `from_pretrained` and `save_pretrained` that a GenieBlue cannot support, and why.
_ONE_FORMAT = "only safetensors files are read"
_BOTH_VIEWS = "it would not apply to both views; load the base with it and pass that as `base_model`"
REFUSED_TO_LOAD = {
    "ignore_mismatched_sizes": "weights that do not fit are an error, never replaced by random ones",
    "state_dict": "load the folder, then call `load_state_dict`",
    "key_mapping": "its files already use the model's weight names",
    **dict.fromkeys(("from_tf", "from_flax"), _ONE_FORMAT),
    "gguf_file": f"{_ONE_FORMAT}; load a base from GGUF separately and pass it as `base_model`",
    **dict.fromkeys(("tp_plan", "tp_size", "device_mesh", "distributed_config"), _BOTH_VIEWS),
    **dict.fromkeys(("fusion_config", "use_kernels", "kernel_config"), _BOTH_VIEWS),
}
REFUSED_TO_SAVE = {
    "distributed_checkpoint": "gather the weights and pass them as `state_dict`",
    "save_function": "weights are written as safetensors, together with all other files",
    "tags": "write them into the model card, README.md, which later saves keep",
}
# Arguments that would request another format if they were False.
SAVED_AS_EVER = {
    "safe_serialization": "weights are written as safetensors only",
    "save_peft_format": "the adapter is always in stock PEFT format",
}
PUSH_KEYWORDS = (
    "repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "max_shard_size",
    "dtype",
)  # fmt: skip

SIGLIP_TYPES = ("siglip", "siglip_vision_model")  # image and text, or the image half alone
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

OFFLOAD_ADVICE = (
    "both views share the base's weights, which must lie on a device. Load it in a smaller `dtype`, with a "
    "`quantization_config` for the base, or with a `device_map` of whole modules onto devices that have room, such as "
    "{'vision_tower': 0, 'multi_modal_projector': 0, 'language_model': 1}."
)


def check_base_model(base: Any) -> None:
    """`TypeError` unless `base` is a loaded language model with its LM head, `ValueError` if it is a GenieBlue."""
    if hasattr(base, "_orig_mod"):  # its modules have different names, and so would the adapter's
        raise TypeError(
            "The base was returned by `torch.compile`: give the original model (`base._orig_mod`), and compile the "
            "views afterwards."
        )
    can_generate = getattr(base, "can_generate", None)
    if not isinstance(base, nn.Module) or not hasattr(base, "config") or can_generate is None or not can_generate():
        raise TypeError(
            f"The base is {_described(base)}: expected a loaded language model with its LM head, as "
            "`AutoModelForCausalLM.from_pretrained` returns it."
        )
    if getattr(base.config, "model_type", None) == MODEL_TYPE:  # `AutoModelForCausalLM` loads that, too
        raise ValueError("The base is already a GenieBlue: give the language model to make one from.")


def check_vision_tower(vision_tower: Any) -> None:
    """`TypeError` unless it is a loaded model, `ValueError` unless that is a SigLIP or the vision half of one."""
    model_type = getattr(getattr(vision_tower, "config", None), "model_type", None)
    if not isinstance(vision_tower, nn.Module) or model_type is None:
        raise TypeError(
            f"The vision tower is {_described(vision_tower)}: expected a loaded SigLIP, as "
            "`SiglipVisionModel.from_pretrained` returns it."
        )
    if model_type not in SIGLIP_TYPES:
        raise ValueError(
            f"The vision tower is of type {model_type!r}: expected {' or '.join(map(repr, SIGLIP_TYPES))}."
        )


def check_vlm(vlm: Any) -> None:
    """`TypeError` unless it is a loaded model with a language model in it."""
    if not isinstance(vlm, nn.Module) or not hasattr(vlm, "config") or not hasattr(vlm, "get_decoder"):
        raise TypeError(
            f"The VLM is {_described(vlm)}: expected a loaded model, as "
            "`AutoModelForImageTextToText.from_pretrained` returns it."
        )


def check_load_arguments(path: Any, base_model: Any, kwargs: dict[str, Any]) -> None:
    """Raises an error for unsupported arguments of `from_pretrained`, before anything is read."""
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
                "`generation_config` is given with a loaded base, which has its own settings: set them on the "
                "base, or on the model after loading."
            )
    if bits := [name for name in ("load_in_8bit", "load_in_4bit") if name in kwargs]:
        raise TypeError(
            f"`{bits[0]}` is not supported: give `quantization_config` to quantize the base while loading it."
        )
    device_map = kwargs.get("device_map")
    if "disk" in (device_map.values() if isinstance(device_map, dict) else [device_map]):
        raise ValueError(f"`device_map` offloads to the disk: {OFFLOAD_ADVICE}")
    _check_unsupported("loaded", kwargs, REFUSED_TO_LOAD)
    if kwargs.get("use_safetensors") is False:
        raise ValueError(f"A GenieBlue cannot be loaded with `use_safetensors=False`: {_ONE_FORMAT}.")
    # `AutoModel` passes on where it looked for an adapter.
    if kwargs.get("adapter_name") is not None or set(kwargs.get("adapter_kwargs") or ()) - {"revision", "token"}:
        raise ValueError(
            "A GenieBlue cannot be loaded with `adapter_name` or `adapter_kwargs`: it has only its own adapter."
        )
    config = kwargs.get("config")
    if config is not None and getattr(config, "model_type", None) != MODEL_TYPE:
        raise TypeError(f"`config` is {_described(config)}: expected a GenieBlueConfig.")


def check_not_offloaded(parameters: Iterable[nn.Parameter], title: str) -> None:
    """`ValueError` if a parameter is on the meta device, where accelerate leaves offloaded weights."""
    if any(parameter.is_meta for parameter in parameters):
        raise ValueError(f"Weights of {title} are offloaded: {OFFLOAD_ADVICE}")


def check_save_arguments(kwargs: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The remaining keywords of `save_pretrained` and `push_to_hub` that have an effect, all of them `known`.

    `ValueError` for keywords of transformers that a GenieBlue does not support, `TypeError` for unknown ones.
    """
    _check_unsupported("saved", kwargs, REFUSED_TO_SAVE)
    for name, reason in SAVED_AS_EVER.items():
        if kwargs.get(name) is False:
            raise ValueError(f"A GenieBlue cannot be saved with `{name}=False`: {reason}.")
    # The files have a single format, with the model's own weight names.
    without_effect = (*REFUSED_TO_SAVE, *SAVED_AS_EVER, "save_original_format")
    kwargs = {name: value for name, value in kwargs.items() if name not in without_effect}
    if unknown := sorted(kwargs.keys() - set(known)):
        raise TypeError(f"`save_pretrained` got unknown arguments: {', '.join(unknown)}.")
    return kwargs


def _check_unsupported(done: str, kwargs: dict[str, Any], reasons: dict[str, str]) -> None:
    for name, reason in reasons.items():
        if kwargs.get(name) not in (None, False):
            raise ValueError(f"A GenieBlue cannot be {done} with `{name}`: {reason}.")


def weight_dtype(dtype: Any) -> torch.dtype:
    """The dtype to write weights in, given as a dtype or by name; `ValueError` for integers."""
    given = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if given not in WEIGHT_DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in WEIGHT_DTYPES)
        raise ValueError(f"`dtype` is {dtype!r}: expected one of {names}. Other dtypes would lose precision.")
    return given


def _described(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
