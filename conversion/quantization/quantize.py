"""Quantizes a 16-bit GenieBlue, on a quantized base that others can use too."""

import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from conversion.cpu_threads import warn_of_threads
from conversion.origin import origin_of
from conversion.quantization.bases import (
    check_existing_base,
    check_places,
    check_source,
    files_of_others,
    keep_edited_card,
    record_verdict,
    rounding_of,
    warn_of_parted_base,
)
from conversion.quantization.error import errors_by_part, measured_errors, unrelated_views, view_logits
from conversion.quantization.healing import base_digest, warn_of_other_base
from conversion.quantization.hessians import check_runs_by_blocks
from conversion.quantization.mixed import Budget, MixedLinear
from conversion.quantization.mixed_model import MixedModel, Plans
from conversion.quantization.parts import round_parts
from conversion.quantization.precision import QuantizationRecipe, plan_adapter, plan_base, plan_own_parts
from conversion.quantization.rounder import Progress, Rounder
from conversion.quantization.views import CalibrationSamples
from conversion.staging import CONVERSION, explained_full_disk, lock_output, uninterrupted
from conversion.unchanged import check_unchanged
from conversion.verdict import HeldOut, nothing_measured, of_text_view, with_problems
from hub_cards.model_folder import parameter_sizes
from hub_cards.verdicts import measurement_rows
from modeling_genieblue import GenieBlueConfig, GenieBlueForConditionalGeneration, VlmGenieBlueConfig
from modeling_genieblue.loading_genieblue import LoadRequest
from modeling_genieblue.model_files_genieblue import (
    ACCESS_KEYS,
    HUB_KEYS,
    INNER_BASE,
    MEASUREMENTS_NAME,
    QUANTIZED_WEIGHTS_NAME,
    RECIPE_NAME,
)
from modeling_genieblue.saving_genieblue import prepared_save
from modeling_genieblue.staging_genieblue import NewFolder, StagingFolder


@dataclass(frozen=True)
class QuantizationReport:
    """The result of a quantization.

    The output folders, the layers in another precision with the reason, the error of each view, the verdict, and, with
    a budget, the linears among which it was spent. `on_reused_base` is the verdict on the text view, if that is a
    reused base's.
    """

    output: Path
    base: str
    other_precision: dict[str, str]
    errors: dict[str, float]
    verdict: dict[str, Any]
    mixed: list[MixedLinear]
    on_reused_base: dict[str, Any] | None = None


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
    accept_loss: bool = False,
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
        accept_loss: records that logits unrelated to those in 16 bits are accepted; for other losses `held_out` does.
        load_kwargs: how `source` is loaded (`token`, `revision`, `trust_remote_code`, …).

    Raises `ValueError` or `OSError`, leaving nothing half-written, for an already quantized source, folders in use, a
    recipe or quantized base that does not fit, contradicting options, a budget that cannot be met, and samples that
    are too few or too long.
    """
    samples = samples or CalibrationSamples()
    where = {key: load_kwargs[key] for key in HUB_KEYS if load_kwargs.get(key) is not None}
    config = _checked_config(source, samples, where)
    recipe = recipe or QuantizationRecipe.for_config(config)
    recipe.check(config)
    _check_options(recipe, samples, base_output, quantized_base, self_contained, budget)
    places = _places(recipe, config, output, base_output, quantized_base, self_contained)
    warn_of_parted_base(places.output, places.new_base)
    check = partial(
        check_places, source, config, places.output, places.new_base, overwrite,
        is_base_named=base_output is not None, existing_base=quantized_base,
    )  # fmt: skip
    check()
    of_base = nullcontext() if places.new_base is None else lock_output(places.new_base, CONVERSION)
    with lock_output(places.output, CONVERSION), of_base:
        check()  # another run may just have ended
        return _quantize(
            source, config, recipe, places, samples, budget, held_out, accept_loss, overwrite, progress, load_kwargs
        )


def _quantize(
    source: str | os.PathLike,
    config: GenieBlueConfig,
    recipe: QuantizationRecipe,
    places: "_Places",
    samples: CalibrationSamples,
    budget: Budget | None,
    held_out: HeldOut | None,
    accept_loss: bool,
    overwrite: bool,
    progress: Progress | None,
    load_kwargs: dict[str, Any],
) -> QuantizationReport:
    """The work of `quantize_genieblue`, once its arguments and places are checked, and the places are its own."""
    where = {key: load_kwargs[key] for key in HUB_KEYS if load_kwargs.get(key) is not None}
    access = {key: where[key] for key in ACCESS_KEYS if key in where}
    reload = {**access, "trust_remote_code": bool(load_kwargs.get("trust_remote_code"))}
    quantized_base = places.existing_base
    check_unchanged(source, base_model=load_kwargs.get("base_model"), subfolder=where.get("subfolder"))
    existing = None if quantized_base is None else check_existing_base(quantized_base, recipe, config, access)

    load = partial(GenieBlueForConditionalGeneration.from_pretrained, source, dtype=recipe.dtype, **load_kwargs)
    model = load()
    if model.device.type == "cpu":
        warn_of_threads()
    origin = origin_of(source, config, places.output, load_kwargs.get("revision"), access)
    warn_of_other_base(
        model.provenance.facts([RECIPE_NAME]).get(RECIPE_NAME, {}),
        lambda: None if quantized_base is None else base_digest(quantized_base, access),
    )
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
    if not all(logits.isfinite().all() for logits in before.values()):
        raise ValueError(
            f"The logits of {source} in {recipe.activations} are NaN or infinite, so it overflows or is damaged: "
            "choose other `activations` (--activations), and check it (`genieblue verify`)."
        )
    # Before any rounding, which takes long, so that a bad sample is named early.
    measured = None if held_out is None else held_out.measure(model)

    with (
        explained_full_disk(places.output, places.new_base),
        StagingFolder(places.output, "quantizing") as staging,
        NewFolder(places.new_base, replace=overwrite) if places.new_base is not None else nullcontext() as new_base,
    ):
        inner_base = new_base.staging if new_base is not None else staging / INNER_BASE
        rounded = round_parts(
            model, plans, rounder, places.existing_base, existing, staging, inner_base, access, mixed,
            inside=new_base is None,
        )  # fmt: skip

        rounded.config.quantization["source"] = origin
        # Saved once in passing, to measure what a user will load.
        rounded.save_pretrained(staging / "trial")
        # `model` has the rounded values by now, so the exact ones are read again.
        by_part = {} if held_out is None else errors_by_part(load(), rounded, held_out.logits)
        quantized = GenieBlueForConditionalGeneration.from_pretrained(staging / "trial", **reload)
        errors, facts = measured_errors(before, view_logits(quantized), recipe, isinstance(config, VlmGenieBlueConfig))
        verdict = nothing_measured()
        if held_out is not None:
            verdict = held_out.verdict(measured, held_out.measure(quantized), by_part)
        of_base = with_problems(of_text_view(verdict), unrelated_views({"text": errors["text"]}), accept_loss)
        verdict = with_problems(verdict, unrelated_views(errors), accept_loss)
        quantized.config.quantization["verdict"] = verdict
        if existing is None and recipe.changes_base:
            record_verdict(inner_base if new_base is not None else staging / "trial" / INNER_BASE, of_base)
        if new_base is not None:
            quantized.config.base_model_name_or_path = str(places.new_base)
        facts = {MEASUREMENTS_NAME: [*facts, *measurement_rows(verdict)]}
        with uninterrupted(), prepared_save(quantized, places.output, facts=facts, replace=overwrite) as put_in_place:
            # Both are whole by now, so that a run that is killed parts them only between a few renames.
            if new_base is not None:
                # Before the GenieBlue, which must never point at a missing base. If that one cannot be put in its
                # place, the context puts the old base back.
                keep_edited_card(new_base.target, new_base.staging)
                new_base.put_in_place(files_of_others)
            put_in_place()
            if new_base is not None:
                new_base.keep()
    other = quantized.config.quantization["other_precision"]
    spent = mixed.linears if mixed else []
    base = quantized.config.base_model_name_or_path
    reused = None if existing is None else of_base
    return QuantizationReport(places.output, base, other, errors, verdict, spent, reused)


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
            "`base_output` (--base-out), `quantized_base` (--quantized-base) and `self_contained` (--self-contained) "
            "contradict each other about the quantized base: give only one of them."
        )
    if recipe.rounding == "gptq" and not samples.text:
        raise ValueError("gptq needs calibration samples with text: give some (--calibration), or use mse or rtn.")
    if budget is not None and recipe.rounding != "gptq":
        raise ValueError(
            f"A budget is spent by the damage measured on calibration samples, which {recipe.rounding} does not use: "
            "give samples and gptq. Errors of weights alone do not tell where 4 bits hurt."
        )
    if of_base and not recipe.changes_base:
        raise ValueError(
            "The base stays at 16 bits, so there is no quantized base to write or use: leave out `base_output` "
            "(--base-out), `quantized_base` (--quantized-base) and `self_contained` (--self-contained), or quantize "
            "the language model (--llm)."
        )


def _checked_config(source: Any, samples: CalibrationSamples, where: dict[str, Any]) -> GenieBlueConfig:
    """The configuration of `source`; `OSError` or `ValueError` if it cannot be quantized with these samples."""
    LoadRequest.from_arguments(source, where).check_layout()
    config = GenieBlueConfig.from_pretrained(source, **where)
    check_source(source, config)
    rows = [*samples.text, *(request["input_ids"] for request in samples.multimodal)]
    longest = max((ids.shape[1] for ids in rows), default=0)
    most = getattr(config.text_config, "max_position_embeddings", None)
    if isinstance(config, VlmGenieBlueConfig) and samples.multimodal:
        check_runs_by_blocks(config.vlm_config.model_type, "give texts, or chats without images")
    if isinstance(most, int) and longest > most:
        raise ValueError(
            f"A calibration sample has {longest} tokens, but the base supports only {most}: use shorter texts "
            "(--sample-length), and leave out longer chats."
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


def _silent(steps: Iterable[Any], _title: str) -> Iterable[Any]:
    return steps
