"""Checks that are specific to a quantized GenieBlue: codes, precisions and quantization error."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

from conversion.quantization.error import measured_errors, unrelated_views, view_logits
from conversion.quantization.precision import (
    FORMATS,
    LayerPlan,
    QuantizationRecipe,
    describe,
    plan_adapter,
    plan_base,
    plan_own_parts,
)
from conversion.quantization.rounding import TOP_CODE
from conversion.verdict import nothing_measured
from conversion.verification.checks import CheckFailed, fail_on
from conversion.verification.saved_model import SavedModel, foreign_code
from hub_cards.verdicts import FAILED, failures, measurement_rows, summary
from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.model_files_genieblue import (
    ADAPTER_FOLDER,
    MEASUREMENTS_NAME,
    QMAP_NAME,
    WEIGHTS_NAME,
    read_json,
    some,
)
from modeling_genieblue.quantized_files_genieblue import read_qmap
from modeling_genieblue.quantized_parts_genieblue import quantized_adapter_entries
from modeling_genieblue.quantized_precision_guard_genieblue import is_frozen
from modeling_genieblue.quantized_settings_genieblue import BASE_PARTS

logger = logging.getLogger(__name__)

STOCK_PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def may_run_code_of_base(subject: SavedModel) -> bool:
    """Whether code files in a quantized base's repository may run: if the user allowed it, or if they equal ours."""
    name, options = subject.base
    is_folder = os.path.isdir(name)
    if subject.trust or is_folder and (subject.is_local or subject.base_override is not None):
        return True
    hub = {key: options[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in options}
    # A folder is that of a self-contained model here, which was downloaded.
    folder = Path(name) if is_folder else Path(snapshot_download(name, allow_patterns="*.py", **hub))
    return not foreign_code(folder)


def find_invalid_values(path: Path) -> Iterator[str]:
    """Tensors in a file of weights with NaN, infinity or codes that no rounding produces, one sentence each."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not tensor.isfinite().all():
                yield f"{name} contains NaN or infinity"
            elif name.endswith("._scale") and not (tensor > 0).all():
                yield f"{name} contains a scale that is not positive"
            elif name.endswith("._shift") and (tensor > TOP_CODE[4]).any():
                yield f"{name} contains a zero point above {TOP_CODE[4]}"
            elif tensor.dtype == torch.int8 and (tensor < -TOP_CODE[8]).any():
                yield f"{name} contains a code below {-TOP_CODE[8]}"


def check_quantization(subject: SavedModel) -> str:
    """Each part has the precision in config.json, all numbers are valid, and each view is close to the 16-bit one."""
    recorded = subject.config.quantization
    recipe = _recipe(recorded)
    model = subject.model  # loading checks the stored dtypes against the maps
    plans = {
        QMAP_NAME: plan_own_parts(model, recipe),
        f"{ADAPTER_FOLDER}/{QMAP_NAME}": plan_adapter(model.multimodal_language_model, recipe),
    }
    formats = recorded.get("formats") or {}
    problems = [
        f"config.json gives {name} the format {one!r}, expected one of {', '.join(FORMATS)}"
        for name, one in formats.items()
        if one not in FORMATS
    ]
    fail_on(problems)
    for name, plan in plans.items():
        plan.mix(formats)
        problems += _other_precisions(name, plan.kinds, read_qmap(subject.folder / name))
    of_base = LayerPlan()
    if recipe.changes_base:
        of_base = plan_base(subject.plain, recipe)
        of_base.mix(formats)
        problems += _other_precisions("the base", of_base.kinds, _kinds_in_memory(subject.plain))
        own = subject.base_quantization or {}
        problems += [
            f"the base's config.json has {part} {own.get(part)!r}, this one {recorded.get(part)!r}"
            for part in (*BASE_PARTS, "group_size", "activations")
            if own.get(part) != recorded.get(part)
        ]
    own_parts, adapter = plans.values()
    every = [own_parts, adapter, of_base]
    mixed = {name for plan in every for name in plan.formats}
    problems += [
        f"config.json has a format for {name}, which cannot have one" for name in formats if name not in mixed
    ]
    view = model.multimodal_language_model
    copies = ((stock, view.get_submodule(name)) for name, stock, _ in quantized_adapter_entries(view))
    problems += _other_groups(model.named_modules(), own_parts, recipe)
    problems += _other_groups(copies, adapter, recipe)
    problems += _other_groups(model.language_model.named_modules(), of_base, recipe)
    explained = describe(recipe, every)["other_precision"]
    if recorded.get("other_precision") != explained:
        names = sorted(set(recorded.get("other_precision") or {}) ^ set(explained)) or sorted(explained)
        problems.append(f"config.json has the wrong list of layers with another precision: {some(names)}")
    problems += find_invalid_values(subject.folder / WEIGHTS_NAME)
    stock = [file for file in STOCK_PEFT_FILES if (subject.folder / ADAPTER_FOLDER / file).exists()]
    problems += [f"{ADAPTER_FOLDER}/{file} exists, which stock PEFT would load" for file in stock]
    fail_on(problems)
    parts = ", ".join(f"{part} {precision}" for part, precision in recipe.parts().items())
    return (
        f"{parts}: matches the maps and the stored dtypes; {_errors(subject, recipe)}; stock PEFT cannot load the "
        "adapter, as intended"
    )


def _recipe(recorded: dict[str, Any]) -> QuantizationRecipe:
    try:
        return QuantizationRecipe(**{name: recorded[name] for name in QuantizationRecipe.__dataclass_fields__})
    except KeyError as error:
        raise CheckFailed(
            f"config.json does not record the precision of {error}: quantize the model again."
        ) from error


def _kinds_in_memory(base: Any) -> dict[str, str]:
    """The quantization map of a loaded base, including 8-bit embeddings."""
    kinds = {name: module.weight_qtype.name for name, module in base.named_modules()
             if is_frozen(module)}  # fmt: skip
    embedding = base.get_input_embeddings()
    if hasattr(embedding.weight, "qtype"):
        names = {id(module): name for name, module in base.named_modules()}
        kinds[names[id(embedding)]] = embedding.weight.qtype.name
    return kinds


def _other_precisions(place: str, meant: dict[str, str], found: dict[str, str]) -> list[str]:
    other = sorted(name for name in meant.keys() | found.keys() if meant.get(name) != found.get(name))
    return [
        f"{place} differs in precision from config.json for {len(other)} layer(s): {first} is "
        f"{found.get(first, '16 bits')}, expected {meant.get(first, '16 bits')}"
        for first in other[:1]
    ]


def _other_groups(modules: Iterable[tuple[str, Any]], plan: LayerPlan, recipe: QuantizationRecipe) -> Iterator[str]:
    for name, module in modules:
        if plan.kinds.get(name) == "qint4" and is_frozen(module) and module.weight_qtype.name == "qint4":
            meant = plan.group_size(name, module.weight, recipe)
            if (found := module.weight._group_size or module.in_features) != meant:
                yield f"{name} has groups of {found}, by config.json {meant}"


def _errors(subject: SavedModel, recipe: QuantizationRecipe) -> str:
    """Describes the error of each view's logits, measured again if the 16-bit GenieBlue is available.

    Raises `CheckFailed` for logits that are unrelated to the 16-bit ones, unless that was accepted.
    """
    after = view_logits(subject.model)
    subject.release()  # the 16-bit model needs the memory
    try:
        source, load = _source(subject)
        before = view_logits(load())
    except (OSError, ValueError) as error:
        logger.info("The quantization error is not measured again: %s", error)
        return _recorded_errors(subject, error)
    errors, _ = measured_errors(before, after, recipe, subject.has_vlm)
    listed = ", ".join(f"{view} view {error:.3f}" for view, error in errors.items())
    problems = [f"{problem}, against {source}, which it was made from" for problem in unrelated_views(errors)]
    if not _is_accepted(subject.config.quantization.get("verdict") or {}):
        fail_on(problems)
    accepted = "".join(f"; accepted: {problem}" for problem in problems)
    return f"relative L2 error of the logits, measured again against {source}: {listed}{accepted}"


def _is_accepted(recorded: Mapping[str, Any]) -> bool:
    """Whether a verdict is a failure that was accepted."""
    return recorded.get("result") == FAILED and bool(recorded.get("accepted"))


def check_verdict(subject: SavedModel) -> str:
    """The recorded verdicts, on it and on its base, are not that quantization costs too much, unless accepted."""
    verdict = subject.config.quantization.get("verdict") or nothing_measured()
    found = f"as recorded: {summary(verdict)}"
    if not verdict["accepted"]:
        raise CheckFailed(found)
    of_base = (subject.base_quantization or {}).get("verdict") or nothing_measured()
    is_known = set(of_base["reasons"]) <= set(verdict["reasons"])  # unless the base was reused
    if of_base["result"] == FAILED and not (of_base["accepted"] and is_known):
        accepted = ", accepted" if of_base["accepted"] else ""
        found += f"; its base {subject.base[0]}: {FAILED}{accepted}; {failures(of_base)}"
    if not of_base["accepted"]:
        raise CheckFailed(f"{found}; quantize the base anew, or accept its loss (`push --accept-loss` of the base)")
    return found


def check_verdict_on_data(subject: SavedModel) -> str:
    """The same of the verdict on other data; a failure that was accepted is accepted again."""
    if subject.held_out is None:
        raise ValueError("There is no data for a verdict: give `held_out`.")
    source, load = _source(subject)  # before what takes long
    after = subject.held_out.measure(subject.model)
    subject.release()  # the 16-bit model needs the memory
    verdict = subject.held_out.verdict(subject.held_out.measure(load()), after)
    verdict["accepted"] |= _is_accepted(subject.config.quantization.get("verdict") or {})
    figures = [f"{row['name']}: {row['value']}" for row in measurement_rows(verdict)]
    found = "; ".join([f"against {source}: {summary(verdict)}", *figures])
    if not verdict["accepted"]:
        raise CheckFailed(found)
    return found


def _source(subject: SavedModel) -> tuple[str, Callable[[], GenieBlueForConditionalGeneration]]:
    """Name of the 16-bit GenieBlue, and what loads it; `OSError` if it is not available, or another one by now."""
    name, where = subject.origin
    if where:
        where = where | subject.hub

    def load() -> GenieBlueForConditionalGeneration:
        model = GenieBlueForConditionalGeneration.from_pretrained(
            name, dtype=_recipe(subject.config.quantization).dtype, trust_remote_code=subject.trust, **where
        )
        return model.to(subject.device)

    return name, load


def _recorded_errors(subject: SavedModel, reason: Exception) -> str:
    path = subject.folder / MEASUREMENTS_NAME
    rows = [row for row in read_json(path) if " logits against " in row["name"]] if path.is_file() else []
    why = " ".join(str(reason).split())
    if not rows:
        return f"quantization error neither recorded nor measured ({why})"
    return f"as recorded, not measured again ({why}): " + ", ".join(f"{row['name']} {row['value']}" for row in rows)
