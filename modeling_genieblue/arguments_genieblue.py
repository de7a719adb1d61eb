"""What a GenieBlue is made of, loaded with and saved in: refused by name before anything is read or written."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .addresses_genieblue import refuse_address

# What transformers' own `from_pretrained` and `save_pretrained` take, and why a GenieBlue cannot.
_ONE_FORMAT = "only safetensors files are read"
_BOTH_VIEWS = "it would not reach both views; load the base with it and give that as `base_model`"
REFUSED_TO_LOAD = {
    "ignore_mismatched_sizes": "weights that do not fit are an error, never replaced by random ones",
    "state_dict": "load the folder, then call `load_state_dict`",
    "key_mapping": "its files name the weights as the model does",
    **dict.fromkeys(("from_tf", "from_flax"), _ONE_FORMAT),
    "gguf_file": f"{_ONE_FORMAT}; load a base from GGUF by itself and give it as `base_model`",
    **dict.fromkeys(("tp_plan", "tp_size", "device_mesh", "distributed_config"), _BOTH_VIEWS),
    **dict.fromkeys(("fusion_config", "use_kernels", "kernel_config"), _BOTH_VIEWS),
}
REFUSED_TO_SAVE = {
    "distributed_checkpoint": "gather the weights and give them as `state_dict`",
    "save_function": "weights are written as safetensors, in one step with all that belongs to them",
    "tags": "write them into the card, README.md, which later saves keep",
}
# Those that would ask for another format if they were False.
SAVED_AS_EVER = {
    "safe_serialization": "weights are written as safetensors only",
    "save_peft_format": "the adapter is a stock one of PEFT",
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
    if hasattr(base, "_orig_mod"):  # its modules, and so the adapter's, would have other names than in the base
        raise TypeError(
            "The base is what `torch.compile` made of a model: give the model itself (`base._orig_mod`), and compile "
            "the views afterwards."
        )
    can_generate = getattr(base, "can_generate", None)
    if not isinstance(base, nn.Module) or not hasattr(base, "config") or can_generate is None or not can_generate():
        raise TypeError(
            f"The base is {_described(base)}: expected a loaded language model with its LM head, as "
            "`AutoModelForCausalLM.from_pretrained` gives it."
        )
    if getattr(base.config, "model_type", None) == "genieblue":  # `AutoModelForCausalLM` gives that, too
        raise ValueError("The base is a GenieBlue already: give the language model that it should be made from.")


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
    _refuse_by_name("loaded", kwargs, REFUSED_TO_LOAD)
    if kwargs.get("use_safetensors") is False:
        raise ValueError(f"A GenieBlue is not loaded with `use_safetensors=False`: {_ONE_FORMAT}.")
    # `AutoModel` hands on where it looked for an adapter.
    if kwargs.get("adapter_name") is not None or set(kwargs.get("adapter_kwargs") or ()) - {"revision", "token"}:
        raise ValueError(
            "A GenieBlue is not loaded with `adapter_name` or `adapter_kwargs`: it has one adapter, in its own folder."
        )
    config = kwargs.get("config")
    if config is not None and getattr(config, "model_type", None) != "genieblue":
        raise TypeError(f"`config` is {_described(config)}: expected a GenieBlueConfig.")


def refuse_offloaded(parameters: Iterable[nn.Parameter], title: str) -> None:
    """`ValueError` if one of them, of `title`, is on the meta device, where accelerate leaves what it offloads."""
    if any(parameter.is_meta for parameter in parameters):
        raise ValueError(f"Weights of {title} are offloaded: {OFFLOAD_ADVICE}")


def check_save_arguments(kwargs: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The further keywords of `save_pretrained` and `push_to_hub` that say something, all of them `known`.

    `ValueError` for what transformers takes and a GenieBlue cannot do, `TypeError` for what means nothing.
    """
    _refuse_by_name("saved", kwargs, REFUSED_TO_SAVE)
    for name, reason in SAVED_AS_EVER.items():
        if kwargs.get(name) is False:
            raise ValueError(f"A GenieBlue is not saved with `{name}=False`: {reason}.")
    # The files have one format, in which the weights have the model's own names.
    without_effect = (*REFUSED_TO_SAVE, *SAVED_AS_EVER, "save_original_format")
    kwargs = {name: value for name, value in kwargs.items() if name not in without_effect}
    if unknown := sorted(kwargs.keys() - set(known)):
        raise TypeError(f"`save_pretrained` does not know {', '.join(unknown)}.")
    return kwargs


def _refuse_by_name(done: str, kwargs: dict[str, Any], reasons: dict[str, str]) -> None:
    for name, reason in reasons.items():
        if kwargs.get(name) not in (None, False):
            raise ValueError(f"A GenieBlue is not {done} with `{name}`: {reason}.")


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
