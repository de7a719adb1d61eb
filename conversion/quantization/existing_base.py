"""A base that was quantized before, used again: whether it is that of this model, and what it was rounded to."""

import os
from typing import Any

import torch
from torch import nn

from conversion.quantization.precision import QuantizationRecipe
from modeling_genieblue import GenieBlueConfig
from modeling_genieblue.base_identity_genieblue import tensor_samples, weight_file_hashes
from modeling_genieblue.loading_genieblue import hub_commit
from modeling_genieblue.quantized_base_genieblue import load_quantized_base, read_base_quantization
from modeling_genieblue.quantized_linears_genieblue import scales_of
from modeling_genieblue.settings_files_genieblue import BASE_PARTS

# Relative, of one weight matrix: far above what any rounding costs.
LARGEST_ROUNDING_ERROR = 0.5
# Where nothing is recorded of what a base was made from: above what rounding costs most matrices, below what many
# fine-tunes differ by.
LARGEST_UNRECORDED_ERROR = {"qint4": 0.25, "qint8": 0.1}


def check_existing_base(
    name: str, recipe: QuantizationRecipe, config: GenieBlueConfig, access: dict[str, Any]
) -> dict[str, Any]:
    """What a quantized base says of itself.

    Raises `ValueError` if it is not quantized, or otherwise than `recipe` asks for, or was made from other weights
    than those of the base that `config` names; `OSError` if it is not there. No weight is read.
    """
    is_folder = os.path.isdir(name)
    if not is_folder and (name.startswith((".", "~", os.sep)) or name.count("/") != 1):
        raise FileNotFoundError(f"There is no quantized base in {name}: give its folder or Hub id (org/name).")
    settings = read_base_quantization(name, **access)
    if settings is None:
        unseen = "" if is_folder else ", or it cannot be reached on the Hub"
        raise ValueError(f"{name} is no base that GenieBlue quantized{unseen}: leave it out, and one is made.")
    for part in (*BASE_PARTS, "activations"):
        if settings.get(part) != getattr(recipe, part):
            raise ValueError(
                f"{name} has {part} {settings.get(part)}, and {getattr(recipe, part)} was asked for: ask for what it "
                "has, or have another one made."
            )
    made_from, own = (settings.get("source") or {}).get("fingerprint"), config.base_model_fingerprint
    if made_from and own and made_from != own:
        raise ValueError(
            f"{name} is no quantized copy of this model's base, {config.base_model_name_or_path}: it was made from "
            f"files with sha256 {_short(made_from)}, those of this base have {_short(own)}. Leave it out, and one is "
            "made."
        )
    return settings


def use_existing_base(model: Any, name: str, settings: dict[str, Any], access: dict[str, Any]) -> dict[str, dict]:
    """Points the model at a base that is quantized already, and gives its own base the values of that one.

    `settings` are those that `check_existing_base` gave. Returns samples of its tensors; raises `ValueError` if it is
    another base.
    """
    is_recorded = bool((settings.get("source") or {}).get("fingerprint") and model.config.base_model_fingerprint)
    base = load_quantized_base(name, trust_remote_code=model.language_model.is_remote_code(), **access)
    _copy_rounded_values(base, model.language_model, name, is_recorded)
    model.config.base_model_name_or_path = os.path.realpath(name) if os.path.isdir(name) else name
    # The one that was just loaded, which the cache knows.
    model.config.base_model_revision = None if os.path.isdir(name) else hub_commit(name, None, **access)
    model.config.base_model_fingerprint = weight_file_hashes(name, model.config.base_model_revision, **access)
    return tensor_samples(base)


def rounding_of(settings: dict[str, Any], recipe: QuantizationRecipe) -> dict[str, str]:
    """Parts of a quantized base that were rounded otherwise than `recipe` says, and how."""
    other = {}
    if settings.get("rounding") != recipe.rounding:
        other = {part: f"{settings.get('rounding')}, as the base was rounded before"
                 for part in BASE_PARTS if getattr(recipe, part) != "w16a16"}  # fmt: skip
    return other | (settings.get("other_rounding") or {})


@torch.no_grad()
def _copy_rounded_values(quantized: nn.Module, base: nn.Module, name: str, is_recorded: bool) -> None:
    """Gives `base` the values of the quantized one; `ValueError` if they are not roundings of its own."""
    others = dict(quantized.named_parameters(remove_duplicate=False))
    for parameter_name, parameter in base.named_parameters():
        other = others.get(parameter_name)
        if other is None or other.shape != parameter.shape:
            raise ValueError(f"{name} is no quantized copy of this model's base: it has no {parameter_name} like its.")
        is_quantized = scales_of(other) is not None
        values = (other.dequantize() if is_quantized else other).float()
        distance = float((values - parameter.float()).norm() / parameter.float().norm().clamp(min=1e-12))
        allowed = 0.0
        if is_quantized:
            allowed = LARGEST_ROUNDING_ERROR if is_recorded else LARGEST_UNRECORDED_ERROR[other.qtype.name]
        if not distance <= allowed:  # NaN fails too
            raise ValueError(
                f"{name} is no quantized copy of this model's base: {parameter_name} differs by {distance:.1%}."
            )
        parameter.copy_(values)


def _short(fingerprint: dict[str, str]) -> str:
    return ", ".join(f"{sha256[:12]}… ({file})" for file, sha256 in sorted(fingerprint.items())[:2])


__all__ = ["check_existing_base", "rounding_of", "use_existing_base"]
