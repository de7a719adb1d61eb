"""Rounds the parts of a GenieBlue in the order of a request, and writes their files."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conversion.quantization.bases import (
    base_folder,
    plain_state,
    save_aligned,
    use_existing_base,
    write_quantized_base,
)
from conversion.quantization.hessians import linear_hessians
from conversion.quantization.mixed import FITTED
from conversion.quantization.mixed_model import MixedModel, Plans, four_bit_weights
from conversion.quantization.precision import LayerPlan, describe
from conversion.quantization.rounder import Rounder
from conversion.quantization.rounding import round_weight
from conversion.quantization.sensitivity import REQUESTS, inputs_by_weight
from conversion.quantization.views import CalibratedView, CalibrationSamples, multimodal_view, own_state, text_view
from modeling_genieblue import QuantizedGenieBlueForConditionalGeneration
from modeling_genieblue.base_identity_genieblue import tensor_samples, weight_file_hashes
from modeling_genieblue.language_adapter_genieblue import adapter_parameters, find_blocks, set_parameter
from modeling_genieblue.model_files_genieblue import (
    ADAPTER_FOLDER,
    INNER_BASE,
    QMAP_NAME,
    QUANTIZED_ADAPTER_NAME,
    WEIGHTS_NAME,
    write_json,
)
from modeling_genieblue.quantized_base_genieblue import load_quantized_base
from modeling_genieblue.quantized_files_genieblue import qmap_content
from modeling_genieblue.quantized_linears_genieblue import stored_tensors
from modeling_genieblue.quantized_parts_genieblue import quantized_adapter_entries, quantized_values
from modeling_genieblue.quantized_settings_genieblue import BASE_PARTS, QUANTIZED_PARTS

logger = logging.getLogger(__name__)

VISION_BLOCKS = "encoder.layers"


def round_parts(
    model: Any,
    plans: Plans,
    rounder: Rounder,
    existing_base: str | os.PathLike | None,
    existing: dict[str, Any] | None,
    staging: Path,
    base_folder: Path,
    access: dict[str, Any],
    mixed: MixedModel | None,
    *,
    inside: bool,
) -> QuantizedGenieBlueForConditionalGeneration:
    """Rounds all parts in the order of a request, so that later ones can compensate for earlier errors.

    Returns the model with the files of its parts in `staging`, and those of a new base in `base_folder`, which is
    `inside` the new folder or stands by itself. `existing` are the settings of an `existing_base` to use instead.
    """
    recipe = rounder.recipe
    files = _round_own_parts(model, plans.own_parts, rounder, staging)
    base_samples = None
    if existing is not None:
        base_samples = use_existing_base(model, existing_base, existing, access)
    if rounder.uses_samples:
        views = text_view(model, rounder.samples), multimodal_view(model, rounder.samples, REQUESTS + FITTED)
        weights = four_bit_weights(model, plans, is_base_rounded=existing is not None)
        rounder.weighted_inputs = inputs_by_weight(views, set(map(id, weights.values())))
        if mixed is not None:
            mixed.choose(views, rounder.weighted_inputs, rounder.progress)
    if existing is None and recipe.changes_base:
        base_samples = _round_base(model, plans.base, rounder, base_folder, access)
        model.config.base_model_name_or_path = str(base_folder)
        if inside:
            model.config.base_model_name_or_path = f"./{INNER_BASE}"
            files |= {f"{INNER_BASE}/{path.name}": path for path in base_folder.iterdir()}
    files |= _round_adapter(model, plans.adapter, rounder, staging)
    rounder.warn_of_missing_samples()
    quantization = describe(recipe, [plans.own_parts, plans.adapter, plans.base])
    quantization["other_rounding"] = rounder.other_rounding()
    return QuantizedGenieBlueForConditionalGeneration.of_rounded(model, quantization, files, base_samples)


def _round_own_parts(model: Any, plan: LayerPlan, rounder: Rounder, staging: Path) -> dict[str, Path]:
    """Vision tower and projector as files of the new folder, or what a VLM adds to the base, which is not rounded."""
    tensors = _round_vision(model, plan, rounder) if plan.kinds else {}
    return _write(staging, WEIGHTS_NAME, QMAP_NAME, plain_state(own_state(model), plan.kinds) | tensors, plan.kinds)


def _round_vision(model: Any, plan: LayerPlan, rounder: Rounder) -> dict[str, torch.Tensor]:
    tower, projector = model.vision_tower, model.multi_modal_projector
    in_blocks = [name for name in plan.kinds if name.startswith(f"vision_tower.{VISION_BLOCKS}.")]
    images = rounder.image_batches(model)
    sizes = {name: plan.group_size(name, model.get_submodule(name).weight, rounder.recipe) for name in plan.kinds}
    local = {name.removeprefix("vision_tower."): sizes[name] for name in in_blocks}
    blocks = CalibratedView(tower, VISION_BLOCKS, [{"pixel_values": pixels} for pixels in images])
    tensors = rounder.round_blocks(blocks, local, "vision_tower")
    tensors = {f"vision_tower.{name}": value for name, value in tensors.items()}
    hessians = {}
    prefix = "multi_modal_projector."
    of_projector = [name.removeprefix(prefix) for name in plan.kinds if name.startswith(prefix)]
    if rounder.uses_samples and images and of_projector:
        hessians = linear_hessians(
            projector, lambda: [model.get_image_features(pixels) for pixels in images], of_projector
        )
    for name in plan.kinds:
        if name not in in_blocks:
            hessian = hessians.get(name.removeprefix(prefix))
            weight = model.get_submodule(name).weight
            # The tower's pooling head, which GenieBlue does not run, counts as a separate part: `vision_tower.head`.
            part = ".".join(name.split(".")[:2]) if name.startswith("vision_tower.") else "multi_modal_projector"
            tensors |= stored_tensors(name, **rounder.round(weight, sizes[name], part, hessian))
    return tensors


def _round_base(
    model: Any, plan: LayerPlan, rounder: Rounder, folder: Path, access: dict[str, Any]
) -> dict[str, dict]:
    """Writes the quantized base into `folder`; returns samples of its tensors, which identify it.

    Afterwards the base in memory has the rounded values, and the model's configuration the new base's hashes.
    """
    config, base = model.config, model.language_model
    folder.mkdir(exist_ok=True)
    source = base_folder(config.base_model_name_or_path, config.base_model_revision, access)
    is_local = os.path.isabs(config.base_model_name_or_path)
    # Do not store a local path.
    origin = os.path.basename(source) if is_local else config.base_model_name_or_path
    origin = {"name": origin, "revision": config.base_model_revision, "fingerprint": config.base_model_fingerprint}
    settings = describe(rounder.recipe, [plan]) | {"source": origin}
    for part in set(QUANTIZED_PARTS) - set(BASE_PARTS):
        settings.pop(part)
    path, _ = find_blocks(base)
    embedding = base.get_input_embeddings()
    weights = {name: base.get_submodule(name).weight for name in plan.kinds}
    sizes = {name: plan.group_size(name, weight, rounder.recipe) for name, weight in weights.items()}
    inside = {name: size for name, size in sizes.items() if name.startswith(f"{path}.")}
    tensors = rounder.round_blocks(text_view(model, rounder.samples), inside, "llm")
    stored: set[int] = set()
    for name, weight in weights.items():
        if name not in inside and id(weight) not in stored:  # the LM head may be the embedding
            stored.add(id(weight))
            part = "embeddings" if base.get_submodule(name) is embedding else "lm_head"
            tensors |= stored_tensors(name, **rounder.round(weight, sizes[name], part))
    other = rounder.other_rounding()
    settings["other_rounding"] = {part: other[part] for part in BASE_PARTS if part in other}
    write_quantized_base(folder, base, source, plan.kinds, tensors, settings)
    config.base_model_fingerprint = weight_file_hashes(folder)
    config.base_model_revision = None
    quantized = load_quantized_base(folder, trust_remote_code=base.is_remote_code())
    return tensor_samples(quantized_values(quantized))


def _round_adapter(model: Any, adapter: LayerPlan, rounder: Rounder, staging: Path) -> dict[str, Path]:
    """LoRA and the copied blocks as files of the new folder; LoRA first, because later blocks run with it."""
    view, recipe = model.multimodal_language_model, rounder.recipe
    tensors: dict[str, torch.Tensor] = {}
    copied: dict[int, tuple[str, nn.Parameter]] = {}
    for name, stock, weight in list(quantized_adapter_entries(view)):
        if stock not in adapter.kinds:
            continue
        if ".lora_" in name:
            tensors |= _round_lora(view, name, stock, weight, recipe.dtype)
            rounder.note("lora", "rtn")
        else:
            copied[id(weight)] = stock, weight
    walked = multimodal_view(model, rounder.samples if rounder.uses_samples else CalibrationSamples())
    copies: dict[str, str] = {}  # by their names in the model whose blocks are walked
    sizes: dict[str, int | None] = {}
    for name, module in walked.model.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) in copied:
            copies[name], weight = copied[id(module.weight)]
            sizes[name] = adapter.group_size(copies[name], weight, recipe)
    if rounder.uses_samples and not rounder.samples.multimodal:
        logger.warning("The calibration data has no images, so the replicated blocks are calibrated on text.")
    rounded = rounder.round_blocks(walked, sizes, "replicated_blocks")
    for name, stock in copies.items():
        own = {key: value for key, value in rounded.items() if key.startswith(f"{name}.")}
        tensors |= {stock + key.removeprefix(name): value for key, value in own.items()}
    state = {
        stock: parameter.detach().cpu().to(recipe.dtype).contiguous()
        for _, stock, parameter in adapter_parameters(view)
        if stock.removesuffix(".weight") not in adapter.kinds
    }
    weights, qmap = f"{ADAPTER_FOLDER}/{QUANTIZED_ADAPTER_NAME}", f"{ADAPTER_FOLDER}/{QMAP_NAME}"
    return _write(staging, weights, qmap, state | tensors, adapter.kinds)


@torch.no_grad()
def _round_lora(
    view: nn.Module, name: str, stock: str, weight: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A LoRA matrix in int8 with one scale per rank: rows of A, columns of B."""
    by_rank = weight.detach() if ".lora_A" in name else weight.detach().t()
    rounded = round_weight(by_rank.contiguous(), 8, by_rank.shape[1], dtype=dtype)
    codes, scale, values = rounded.codes, rounded.scale, rounded.dequantize()
    if ".lora_B" in name:
        codes, scale, values = codes.t().contiguous(), scale.t().contiguous(), values.t().contiguous()
    set_parameter(view, f"{name}.weight", values.to(weight.device, weight.dtype))
    return {f"{stock}.weight._data": codes.cpu(), f"{stock}.weight._scale": scale.cpu()}


def _write(staging: Path, weights: str, qmap: str, tensors: dict, kinds: dict[str, str]) -> dict[str, Path]:
    (staging / weights).parent.mkdir(exist_ok=True)
    save_aligned(tensors, staging / weights)
    write_json(staging / qmap, qmap_content(kinds))
    return {weights: staging / weights, qmap: staging / qmap}
