"""Quantizes a 16-bit GenieBlue, on a quantized base that others can use too."""

import logging
import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.hub import cached_file

from conversion.cpu_threads import warn_of_threads
from conversion.quantization.bases import (
    base_folder,
    check_existing_base,
    check_places,
    check_source,
    plain_state,
    record_verdict,
    rounding_of,
    save_aligned,
    use_existing_base,
    write_quantized_base,
)
from conversion.quantization.error import errors_by_part, measured_errors, view_logits
from conversion.quantization.healing import warn_of_other_base
from conversion.quantization.hessians import linear_hessians
from conversion.quantization.mixed import FITTED, Budget, MixedLinear
from conversion.quantization.mixed_model import MixedModel, Plans, four_bit_weights
from conversion.quantization.precision import (
    LayerPlan,
    QuantizationRecipe,
    describe,
    plan_adapter,
    plan_base,
    plan_own_parts,
)
from conversion.quantization.rounder import CalibrationSamples, Progress, Rounder
from conversion.quantization.rounding import round_weight
from conversion.quantization.sensitivity import REQUESTS, inputs_by_weight
from conversion.staging import explained_full_disk
from conversion.verdict import HeldOut, nothing_measured
from hub_cards.model_folder import parameter_sizes
from hub_cards.verdicts import measurement_rows
from modeling_genieblue import (
    GenieBlueConfig,
    GenieBlueForConditionalGeneration,
    QuantizedGenieBlueForConditionalGeneration,
)
from modeling_genieblue.base_identity_genieblue import tensor_samples, weight_file_hashes
from modeling_genieblue.language_adapter_genieblue import adapter_parameters, find_blocks, set_parameter
from modeling_genieblue.loading_genieblue import LoadRequest, hub_commit
from modeling_genieblue.model_files_genieblue import (
    ACCESS_KEYS,
    ADAPTER_FOLDER,
    HUB_KEYS,
    INNER_BASE,
    MEASUREMENTS_NAME,
    QMAP_NAME,
    QUANTIZED_ADAPTER_NAME,
    QUANTIZED_WEIGHTS_NAME,
    RECIPE_NAME,
    WEIGHTS_NAME,
    write_json,
)
from modeling_genieblue.quantized_base_genieblue import load_quantized_base
from modeling_genieblue.quantized_files_genieblue import qmap_content
from modeling_genieblue.quantized_linears_genieblue import stored_tensors
from modeling_genieblue.quantized_parts_genieblue import quantized_adapter_entries, quantized_values
from modeling_genieblue.quantized_settings_genieblue import BASE_PARTS, QUANTIZED_PARTS
from modeling_genieblue.staging_genieblue import NewFolder, StagingFolder

logger = logging.getLogger(__name__)

VISION_BLOCKS = "encoder.layers"


@dataclass(frozen=True)
class QuantizationReport:
    """The result of a quantization.

    The output folders, the layers in another precision with the reason, the error of each view, the verdict, and, with
    a budget, the linears among which it was spent.
    """

    output: Path
    base: str
    other_precision: dict[str, str]
    errors: dict[str, float]
    verdict: dict[str, Any]
    mixed: list[MixedLinear]


def quantize_genieblue(
    source: str | os.PathLike,
    output: str | os.PathLike,
    recipe: QuantizationRecipe | None = None,
    *,
    base_output: str | os.PathLike | None = None,
    quantized_base: str | os.PathLike | None = None,
    self_contained: bool = False,
    samples: CalibrationSamples | None = None,
    budget: Budget | None = None,
    held_out: HeldOut | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **load_kwargs: Any,
) -> QuantizationReport:
    """Quantizes the GenieBlue `source` (16 or 32 bits) into the folder `output`, and its base into another folder.

    Args:
        base_output: folder of the quantized base; by default `<name of the base>-<precision>` beside `output`.
        quantized_base: folder or Hub id of a quantized base to reuse; none is written then.
        self_contained: puts the quantized base into the subfolder `base` of `output`.
        samples: calibration data, which `gptq` needs.
        budget: gives each linear that would have 4 bits 4 or 8, by what they damage on `samples`; needs `gptq`. A
            reused base keeps what it has, so the budget is for the replicated blocks alone.
        held_out: data for the verdict; without any, it says that nothing was measured. What fails is written too, and
            marked in `config.json` and the card: publishing refuses it.
        load_kwargs: how `source` is loaded (`token`, `revision`, `trust_remote_code`, …).

    Raises `ValueError` or `OSError`, leaving nothing half-written, for an already quantized source, folders in use, a
    recipe or quantized base that does not fit, contradicting options, a budget that cannot be met, and samples that
    are too few or too long.
    """
    recipe, samples = recipe or QuantizationRecipe(), samples or CalibrationSamples()
    where = {key: load_kwargs[key] for key in HUB_KEYS if load_kwargs.get(key) is not None}
    access = {key: where[key] for key in ACCESS_KEYS if key in where}
    reload = {**access, "trust_remote_code": bool(load_kwargs.get("trust_remote_code"))}
    _check_options(recipe, samples, base_output, quantized_base, self_contained, budget)
    config = _checked_config(source, samples, where)
    places = _places(recipe, config, output, base_output, quantized_base, self_contained)
    check_places(source, config, places.output, places.new_base, overwrite, is_base_named=base_output is not None)
    existing = None if quantized_base is None else check_existing_base(quantized_base, recipe, config, access)

    load = partial(GenieBlueForConditionalGeneration.from_pretrained, source, dtype=recipe.dtype, **load_kwargs)
    model = load()
    if model.device.type == "cpu":
        warn_of_threads()
    origin = _origin(source, places.output, load_kwargs.get("revision"), access)
    warn_of_other_base(model.provenance.facts([RECIPE_NAME]).get(RECIPE_NAME, {}), quantized_base, access)
    rounder = Rounder(recipe, samples, progress or _silent, rounding_of(existing, recipe))
    plans = Plans(
        plan_own_parts(model, recipe),
        plan_adapter(model.multimodal_language_model, recipe),
        plan_base(model.language_model, recipe),
    )
    plans.base.mix((existing or {}).get("formats", {}))
    mixed = None
    if budget is not None:
        size_of_base = None if quantized_base is None else _size_of_base(quantized_base, access)
        mixed = MixedModel(budget, model, plans, recipe, size_of_base)
    before = view_logits(model)
    # Before any rounding, which takes long, so that a bad sample is named early.
    measured = None if held_out is None else held_out.measure(model)

    with (
        explained_full_disk(places.output, places.new_base),
        StagingFolder(places.output, "quantizing") as staging,
        # Entered last: nothing that can fail may come between the save of the GenieBlue and the end of this one.
        NewFolder(places.new_base) if places.new_base is not None else nullcontext() as new_base,
    ):
        inner_base = new_base.staging if new_base is not None else staging / INNER_BASE
        rounded = _round(model, plans, rounder, places, existing, staging, inner_base, access, mixed)
        rounded.config.quantization["source"] = origin
        # Saved once in passing, to measure what a user will load.
        rounded.save_pretrained(staging / "trial")
        # `model` has the rounded values by now, so the exact ones are read again.
        by_part = {} if held_out is None else errors_by_part(load(), rounded, held_out.logits)
        quantized = GenieBlueForConditionalGeneration.from_pretrained(staging / "trial", **reload)
        errors, facts = measured_errors(before, view_logits(quantized), recipe)
        verdict = nothing_measured()
        if held_out is not None:
            verdict = held_out.verdict(measured, held_out.measure(quantized), by_part)
        quantized.config.quantization["verdict"] = verdict
        if existing is None and recipe.changes_base:
            record_verdict(inner_base if new_base is not None else staging / "trial" / INNER_BASE, verdict)
        if new_base is not None:
            # Before the GenieBlue, which must never point at a missing base, and whose card reads the base's. If the
            # save fails, the context puts the old base back.
            new_base.put_in_place()
            quantized.config.base_model_name_or_path = str(places.new_base)
        quantized.save_pretrained(places.output, facts={MEASUREMENTS_NAME: [*facts, *measurement_rows(verdict)]})
    other = quantized.config.quantization["other_precision"]
    spent = mixed.linears if mixed else []
    return QuantizationReport(places.output, quantized.config.base_model_name_or_path, other, errors, verdict, spent)


@dataclass(frozen=True)
class _Places:
    """Folders of the results: the GenieBlue, and its new base unless an existing one is used."""

    output: Path
    new_base: Path | None
    existing_base: str | os.PathLike | None


def _check_options(
    recipe: QuantizationRecipe,
    samples: CalibrationSamples,
    base_output: Any,
    quantized_base: Any,
    self_contained: bool,
    budget: Budget | None,
) -> None:
    """`ValueError` for options that contradict one another."""
    of_base = [option for option in (base_output, quantized_base, self_contained) if option]
    if len(of_base) > 1:
        raise ValueError(
            "`base_output`, `quantized_base` and `self_contained` contradict each other about the quantized base: "
            "give only one of them."
        )
    if recipe.rounding == "gptq" and not samples.text:
        raise ValueError("gptq needs calibration samples with text: give some, or use mse or rtn.")
    if budget is not None and recipe.rounding != "gptq":
        raise ValueError(
            f"A budget is spent by the damage measured on calibration samples, which {recipe.rounding} does not use: "
            "give samples and gptq. Errors of weights alone do not tell where 4 bits hurt."
        )
    if of_base and not recipe.changes_base:
        raise ValueError(
            "The base stays at 16 bits, so there is no quantized base to write or use: leave out `base_output`, "
            "`quantized_base` and `self_contained`, or quantize the language model."
        )


def _checked_config(source: Any, samples: CalibrationSamples, where: dict[str, Any]) -> GenieBlueConfig:
    """The configuration of `source`; `OSError` or `ValueError` if it cannot be quantized with these samples."""
    LoadRequest.from_arguments(source, where).check_layout()
    config = GenieBlueConfig.from_pretrained(source, **where)
    check_source(source, config)
    longest = max((ids.shape[1] for ids in samples.text), default=0)
    most = getattr(config.text_config, "max_position_embeddings", None)
    if isinstance(most, int) and longest > most:
        raise ValueError(
            f"Calibration rows have {longest} tokens, but the base supports only {most}: use shorter ones "
            "(--sample-length)."
        )
    return config


def _places(
    recipe: QuantizationRecipe,
    config: GenieBlueConfig,
    output: str | os.PathLike,
    base_output: str | os.PathLike | None,
    quantized_base: str | os.PathLike | None,
    self_contained: bool,
) -> _Places:
    output, new_base = Path(os.path.realpath(output)), None
    if recipe.changes_base and not self_contained and quantized_base is None:
        name = f"{os.path.basename(os.path.normpath(config.base_model_name_or_path))}-{recipe.llm}"
        new_base = output.parent / name if base_output is None else Path(os.path.realpath(base_output))
    return _Places(output, new_base, quantized_base)


def _size_of_base(name: str | os.PathLike, access: dict[str, Any]) -> int:
    """Bytes of the weights of a quantized base, which is downloaded if it is not here."""
    path: Any = cached_file(os.fspath(name), QUANTIZED_WEIGHTS_NAME, **access)
    return sum(size.bytes for size in parameter_sizes(Path(path)).values())


def _origin(source: Any, output: Path, revision: str | None, access: dict[str, Any]) -> dict[str, Any]:
    """The location of the unquantized GenieBlue, for readers and for `verify`."""
    if os.path.isdir(source):
        return {"name": os.path.relpath(os.path.realpath(source), output), "revision": None}
    return {"name": str(source), "revision": hub_commit(str(source), revision, **access)}


def _round(
    model: Any,
    plans: Plans,
    rounder: Rounder,
    places: _Places,
    existing: dict[str, Any] | None,
    staging: Path,
    base_folder: Path,
    access: dict[str, Any],
    mixed: MixedModel | None,
) -> QuantizedGenieBlueForConditionalGeneration:
    """Rounds all parts in the order of a request, so that later ones can compensate for earlier errors.

    Returns the model with the files of its parts in `staging`, and those of a new base in `base_folder`.
    """
    recipe = rounder.recipe
    files = _round_own_parts(model, plans.own_parts, rounder, staging)
    base_samples = None
    if existing is not None:
        base_samples = use_existing_base(model, places.existing_base, existing, access)
    if rounder.uses_samples:
        views = (
            (model.language_model, [{"input_ids": ids.to(model.device)} for ids in rounder.samples.text]),
            (model.multimodal_language_model, _embedded(model, rounder, REQUESTS + FITTED)),
        )
        weights = four_bit_weights(model, plans, is_base_rounded=existing is not None)
        rounder.weighted_inputs = inputs_by_weight(views, set(map(id, weights.values())))
        if mixed is not None:
            mixed.choose(views, rounder.weighted_inputs, rounder.progress)
    if existing is None and recipe.changes_base:
        base_samples = _round_base(model, plans.base, rounder, base_folder, access)
        model.config.base_model_name_or_path = str(base_folder)
        if places.new_base is None:
            model.config.base_model_name_or_path = f"./{INNER_BASE}"
            files |= {f"{INNER_BASE}/{path.name}": path for path in base_folder.iterdir()}
    files |= _round_adapter(model, plans.adapter, rounder, staging)
    rounder.warn_of_missing_samples()
    quantization = describe(recipe, [plans.own_parts, plans.adapter, plans.base])
    quantization["other_rounding"] = rounder.other_rounding()
    return QuantizedGenieBlueForConditionalGeneration.of_rounded(model, quantization, files, base_samples)


def _round_own_parts(model: Any, plan: LayerPlan, rounder: Rounder, staging: Path) -> dict[str, Path]:
    """Vision tower and projector as files of the new folder."""
    tower, projector = model.vision_tower, model.multi_modal_projector
    in_blocks = [name for name in plan.kinds if name.startswith(f"vision_tower.{VISION_BLOCKS}.")]
    images = rounder.image_batches(model)
    sizes = {name: plan.group_size(name, model.get_submodule(name).weight, rounder.recipe) for name in plan.kinds}
    local = {name.removeprefix("vision_tower."): sizes[name] for name in in_blocks}
    batches = [{"pixel_values": pixels} for pixels in images]
    tensors = rounder.round_blocks(tower, VISION_BLOCKS, local, batches, "vision_tower")
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
    own = nn.ModuleDict({"vision_tower": tower, "multi_modal_projector": projector})
    return _write(staging, WEIGHTS_NAME, QMAP_NAME, plain_state(own, plan.kinds) | tensors, plan.kinds)


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
    batches = [{"input_ids": ids.to(base.device)} for ids in rounder.samples.text]
    tensors = rounder.round_blocks(base, path, inside, batches, "llm")
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
    copies: dict[str, str] = {}  # by their names in the view, whose blocks are walked
    for name, stock, weight in list(quantized_adapter_entries(view)):
        if stock not in adapter.kinds:
            continue
        if ".lora_" in name:
            tensors |= _round_lora(view, name, stock, weight, recipe.dtype)
            rounder.note("lora", "rtn")
        else:
            copies[name] = stock
    path, _ = find_blocks(view)
    sizes = {name: adapter.group_size(stock, view.get_submodule(name).weight, recipe)
             for name, stock in copies.items()}  # fmt: skip
    if rounder.uses_samples and not rounder.samples.multimodal:
        logger.warning("The calibration data has no images, so the replicated blocks are calibrated on text.")
    rounded = rounder.round_blocks(view, path, sizes, _embedded(model, rounder), "replicated_blocks")
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


@torch.no_grad()
def _embedded(model: Any, rounder: Rounder, count: int | None = None) -> list[dict[str, torch.Tensor]]:
    """The first `count` multimodal samples as inputs of the multimodal view; text samples if there are none."""
    if not rounder.uses_samples:
        return []
    samples = rounder.samples.multimodal
    if not samples:
        samples = [{"input_ids": ids} for ids in rounder.samples.text]
    device = model.multimodal_language_model.device
    batches = []
    for sample in samples[:count]:
        embeds = model.embed_request(sample["input_ids"].to(device), sample.get("pixel_values"))
        mask = {"attention_mask": sample["attention_mask"].to(device)} if "attention_mask" in sample else {}
        batches.append({"inputs_embeds": embeds, **mask})
    return batches


def _write(staging: Path, weights: str, qmap: str, tensors: dict, kinds: dict[str, str]) -> dict[str, Path]:
    (staging / weights).parent.mkdir(exist_ok=True)
    save_aligned(tensors, staging / weights)
    write_json(staging / qmap, qmap_content(kinds))
    return {weights: staging / weights, qmap: staging / qmap}


def _silent(steps: Iterable[Any], _title: str) -> Iterable[Any]:
    return steps
