"""A 16-bit GenieBlue in, a quantized one out, on a quantized base that others can use too."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conversion.quantization.bases import (
    NewFolder,
    base_folder,
    plain_state,
    refuse_taken_places,
    refuse_unfit_source,
    save_aligned,
    write_json,
    write_quantized_base,
)
from conversion.quantization.error import measured_errors, view_logits
from conversion.quantization.existing_base import check_existing_base, rounding_of, use_existing_base
from conversion.quantization.hessians import linear_hessians, walk_blocks
from conversion.quantization.precision import (
    LayerPlan,
    QuantizationRecipe,
    describe,
    plan_adapter,
    plan_base,
    plan_own_parts,
)
from conversion.quantization.rounding import round_weight
from conversion.staging import StagingFolder, explained_full_disk
from modeling_genieblue import GenieBlueConfig, GenieBlueForConditionalGeneration
from modeling_genieblue.base_identity_genieblue import WEIGHTS_NAME, tensor_samples, weight_file_hashes
from modeling_genieblue.language_views_genieblue import ADAPTER_FOLDER, adapter_parameters, find_blocks, set_parameter
from modeling_genieblue.loading_genieblue import ACCESS_KEYS, LoadRequest, hub_commit
from modeling_genieblue.quantized_base_genieblue import load_quantized_base
from modeling_genieblue.quantized_files_genieblue import qmap_content
from modeling_genieblue.quantized_linears_genieblue import BITS, QMAP_NAME, group_size_of, stored_tensors
from modeling_genieblue.quantized_parts_genieblue import QUANTIZED_ADAPTER_NAME, quantized_adapter_entries
from modeling_genieblue.saving_genieblue import save_model, use_stored_parts
from modeling_genieblue.settings_files_genieblue import BASE_PARTS, HUB_KEYS

logger = logging.getLogger(__name__)

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
VISION_BLOCKS = "encoder.layers"
BLOCK_TITLES = {"vision_tower": "vision tower", "llm": "language model", "replicated_blocks": "replicated blocks"}


@dataclass(frozen=True)
class CalibrationSamples:
    """What `gptq` sees: rows of ids (1, length) for the base, requests with images for what GenieBlue adds."""

    text: list[torch.Tensor] = field(default_factory=list)
    multimodal: list[dict[str, torch.Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class QuantizationReport:
    """Where the results lie, what was left in another precision and why, and the error of each view."""

    output: Path
    base: str
    other_precision: dict[str, str]
    errors: dict[str, float]


def quantize_genieblue(
    source: str | os.PathLike,
    output: str | os.PathLike,
    recipe: QuantizationRecipe | None = None,
    *,
    base_output: str | os.PathLike | None = None,
    quantized_base: str | os.PathLike | None = None,
    self_contained: bool = False,
    samples: CalibrationSamples | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **load_kwargs: Any,
) -> QuantizationReport:
    """Quantizes the GenieBlue `source` into the folder `output`, and its base into a folder of its own.

    Args:
        source: folder or Hub id of a GenieBlue in 16 or 32 bits; it is only read.
        base_output: folder of the quantized base; by default `<name of the base>-<precision>` beside `output`.
        quantized_base: folder or Hub id of a base that was quantized before, to be used again; none is written then.
        self_contained: the quantized base goes into the sub-folder `base` of `output`.
        samples: calibration data, which `gptq` needs.
        load_kwargs: how `source` is loaded (`token`, `revision`, `trust_remote_code`, …).

    Raises `ValueError` or `OSError`, with nothing half-written, for a source that is quantized already, folders that
    are taken, a recipe or a quantized base that does not fit, options without a meaning, and samples that are too few
    or too long.
    """
    recipe, samples, progress = recipe or QuantizationRecipe(), samples or CalibrationSamples(), progress or _silent
    output = Path(os.path.realpath(output))
    if sum(map(bool, (base_output, quantized_base, self_contained))) > 1:
        raise ValueError(
            "`base_output`, `quantized_base` and `self_contained` say different things about where the quantized base "
            "is: give one of them."
        )
    if recipe.rounding == "gptq" and not samples.text:
        raise ValueError("gptq needs calibration samples of text: give some, or round with hqq or rtn.")
    if not recipe.changes_base and (base_output or quantized_base or self_contained):
        raise ValueError(
            "The base is left at 16 bits, so there is no quantized base to write or to use: leave `base_output`, "
            "`quantized_base` and `self_contained` out, or quantize the language model."
        )
    where = {key: load_kwargs[key] for key in HUB_KEYS if load_kwargs.get(key) is not None}
    LoadRequest.from_arguments(source, where).check_layout()
    config = GenieBlueConfig.from_pretrained(source, **where)
    refuse_unfit_source(source, config)
    target = None
    if recipe.changes_base and not self_contained and quantized_base is None:
        name = f"{os.path.basename(os.path.normpath(config.base_model_name_or_path))}-{recipe.llm}"
        target = output.parent / name if base_output is None else Path(os.path.realpath(base_output))
    refuse_taken_places(source, config, output, target, overwrite, is_base_named=base_output is not None)
    _refuse_long_samples(samples, config)
    access = {key: load_kwargs[key] for key in ACCESS_KEYS if load_kwargs.get(key) is not None}
    existing = None
    if quantized_base is not None:
        quantized_base = os.fspath(quantized_base)
        existing = check_existing_base(quantized_base, recipe, config, access)

    model = GenieBlueForConditionalGeneration.from_pretrained(source, dtype=recipe.dtype, **load_kwargs)
    rounder = _Rounder(recipe, samples, progress, {} if existing is None else rounding_of(existing, recipe))
    plans = [plan_own_parts(model, recipe), plan_base(model.language_model, recipe)]
    before = view_logits(model)
    origin = _origin(source, output, load_kwargs.get("revision"), access)
    with ExitStack() as stack:
        stack.enter_context(explained_full_disk(output, target))
        staging = stack.enter_context(StagingFolder(output, "quantizing"))
        # Entered last, so that nothing that can fail comes between the save of the GenieBlue and its end.
        new_base = stack.enter_context(NewFolder(target)) if target is not None else None
        files = _round_own_parts(model, plans[0], rounder, staging)
        base_samples = None
        if existing is not None:
            base_samples = use_existing_base(model, quantized_base, existing, access)
        elif recipe.changes_base:
            folder = staging / "base" if new_base is None else new_base.staging
            base_samples = _quantize_base(model, plans[1], rounder, folder, access)
            model.config.base_model_name_or_path = "./base" if self_contained else str(folder)
            if self_contained:
                files |= {f"base/{path.name}": path for path in folder.iterdir()}
        files |= _round_adapter(model, recipe, plans[0], rounder, staging)
        use_stored_parts(model, files, base_samples)
        model.config.quantization = describe(recipe, plans) | {
            "other_rounding": rounder.other_rounding(), "source": origin
        }  # fmt: skip
        rounder.warn_of_missing_samples()
        model.requires_grad_(False)
        # Saved once in passing, to measure what a user will load.
        save_model(model, staging / "trial")
        consent = {key: load_kwargs[key] for key in ("trust_remote_code",) if key in load_kwargs}
        quantized = GenieBlueForConditionalGeneration.from_pretrained(staging / "trial", **access, **consent)
        errors, measurements = measured_errors(before, view_logits(quantized), recipe)
        if new_base is not None:
            # Before the GenieBlue, which never points at a base that is not there, and whose card reads the base's.
            # Should the save fail, the context puts the old base back.
            new_base.put_in_place()
            quantized.config.base_model_name_or_path = str(target)
        save_model(quantized, output, facts={"measurements.json": measurements})
    name = quantized.config.base_model_name_or_path
    return QuantizationReport(output, name, quantized.config.quantization["other_precision"], errors)


def _refuse_long_samples(samples: CalibrationSamples, config: GenieBlueConfig) -> None:
    """`ValueError` for rows of text that are longer than the base can take."""
    longest = max((ids.shape[1] for ids in samples.text), default=0)
    most = getattr(config.text_config, "max_position_embeddings", None)
    if isinstance(most, int) and longest > most:
        raise ValueError(
            f"Calibration rows have {longest} tokens, the base takes at most {most}: give shorter ones "
            "(--sample-length)."
        )


def _origin(source: Any, output: Path, revision: str | None, access: dict[str, Any]) -> dict[str, Any]:
    """Where the unquantized GenieBlue is, for a reader and for `verify`."""
    if os.path.isdir(source):
        return {"name": os.path.relpath(os.path.realpath(source), output), "revision": None}
    return {"name": str(source), "revision": hub_commit(str(source), revision, **access)}


class _Rounder:
    """Rounds linears one by one, and puts the rounded values in their place, for what comes after them to see."""

    def __init__(
        self, recipe: QuantizationRecipe, samples: CalibrationSamples, progress: Progress, of_existing: dict[str, str]
    ):
        self.recipe, self.samples, self.progress = recipe, samples, progress
        self.uses_samples = recipe.rounding == "gptq"
        self.methods: dict[str, Counter[str]] = {}  # by part, how many layers were rounded by which method
        self.of_existing_base = of_existing  # as `other_rounding`

    def other_rounding(self) -> dict[str, str]:
        """Parts with layers that were rounded otherwise than the recipe says, and how."""
        other = dict(self.of_existing_base)
        for part, methods in self.methods.items():
            rest = [f"{method}: {count}" for method, count in methods.items() if method != self.recipe.rounding]
            if rest:
                other[part] = f"{', '.join(rest)} of {methods.total()} layers"
        return other

    def warn_of_missing_samples(self) -> None:
        """Names the parts that `gptq` was asked for and that no sample reached."""
        # What lies outside of these is never run on samples, whatever they are.
        reached = (*BLOCK_TITLES, "multi_modal_projector")
        other = self.other_rounding()
        lacking = {part: other[part] for part in reached if part in other and part in self.methods}
        if self.uses_samples and lacking:
            logger.warning(
                "No calibration sample reached some layers, which were not rounded by gptq: %s. Samples with images "
                "reach the vision tower and the projector.",
                "; ".join(f"{part} ({how})" for part, how in lacking.items()),
            )

    def note(self, part: str, method: str) -> None:
        """Counts a layer of `part` that `method` rounded."""
        self.methods.setdefault(part, Counter())[method] += 1

    @torch.no_grad()
    def round(self, weight: torch.Tensor, kind: str, part: str, hessian: torch.Tensor | None = None) -> dict[str, Any]:
        """`codes`, `scale`, `zero_point` of a weight (out_features, in_features), which takes the rounded values."""
        bits = BITS[kind]
        method = self.recipe.rounding
        if (method == "gptq" and hessian is None) or (method == "hqq" and bits == 8):
            method = "rtn" if bits == 8 else "hqq"
        self.note(part, method)
        group_size = weight.shape[1] if bits == 8 else group_size_of(weight.shape[1])
        rounded = round_weight(weight, bits, group_size, method=method, dtype=self.recipe.dtype, hessian=hessian)
        weight.copy_(rounded.dequantize())
        return {
            "codes": rounded.codes.cpu(),
            "scale": rounded.scale.cpu(),
            "zero_point": None if rounded.zero_point is None else rounded.zero_point.cpu(),
        }

    def round_blocks(
        self, tree: nn.Module, path: str, kinds: dict[str, str], batches: list[dict], part: str
    ) -> dict[str, torch.Tensor]:
        """quanto's state dict of the linears `kinds` names, all of them in the blocks at `path` of `tree`."""
        title = BLOCK_TITLES[part]
        tensors: dict[str, torch.Tensor] = {}
        by_block: dict[int, dict[str, str]] = {}
        for name, kind in kinds.items():
            index, _, inner = name.removeprefix(f"{path}.").partition(".")
            by_block.setdefault(int(index), {})[inner] = kind

        def process(index: int, block: nn.Module, hessians: dict[str, torch.Tensor]) -> None:
            for inner, kind in by_block.get(index, {}).items():
                weight = block.get_submodule(inner).weight
                rounded = self.round(weight, kind, part, hessians.get(inner))
                tensors.update(stored_tensors(f"{path}.{index}.{inner}", **rounded))

        def steps(indices: Iterable[int]) -> Iterable[int]:
            return self.progress(indices, title)

        blocks = tree.get_submodule(path)
        if self.uses_samples and batches and by_block:
            walk_blocks(tree, batches, path, process, select=lambda index, _: by_block.get(index, ()), progress=steps)
        else:
            for index in steps(range(len(blocks))):
                process(index, blocks[index], {})
        return tensors

    @torch.no_grad()
    def image_batches(self, model: Any) -> list[torch.Tensor]:
        """Tiles (num_tiles, 3, side, side) of each multimodal sample, as the vision tower wants them."""
        tower = model.vision_tower
        tiles = [sample.get("pixel_values") for sample in self.samples.multimodal]
        return [pixels.to(tower.device, tower.dtype) for pixels in tiles if pixels is not None]


def _round_own_parts(model: Any, plan: LayerPlan, rounder: _Rounder, staging: Path) -> dict[str, Path]:
    """Vision tower and projector as files of the new folder."""
    tower, projector = model.vision_tower, model.multi_modal_projector
    in_blocks = {name: kind for name, kind in plan.kinds.items() if name.startswith(f"vision_tower.{VISION_BLOCKS}.")}
    images = rounder.image_batches(model)
    local = {name.removeprefix("vision_tower."): kind for name, kind in in_blocks.items()}
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
    for name, kind in plan.kinds.items():
        if name not in in_blocks:
            hessian = hessians.get(name.removeprefix(prefix))
            weight = model.get_submodule(name).weight
            # The tower's pooling head, which GenieBlue does not run, is on its own: `vision_tower.head`.
            part = ".".join(name.split(".")[:2]) if name.startswith("vision_tower.") else "multi_modal_projector"
            tensors |= stored_tensors(name, **rounder.round(weight, kind, part, hessian))
    own = nn.ModuleDict({"vision_tower": tower, "multi_modal_projector": projector})
    return _write(staging, WEIGHTS_NAME, QMAP_NAME, plain_state(own, plan.kinds) | tensors, plan.kinds)


def _quantize_base(
    model: Any, plan: LayerPlan, rounder: _Rounder, folder: Path, access: dict[str, Any]
) -> dict[str, dict]:
    """Writes the quantized base into `folder`; returns samples of its tensors, to know it by.

    The base in memory holds the rounded values afterwards, and the model's configuration the new base's hashes.
    """
    config, base = model.config, model.language_model
    folder.mkdir(exist_ok=True)
    source = base_folder(config.base_model_name_or_path, config.base_model_revision, access)
    is_local = os.path.isabs(config.base_model_name_or_path)
    # A path of this computer is nobody else's business.
    origin = os.path.basename(source) if is_local else config.base_model_name_or_path
    origin = {"name": origin, "revision": config.base_model_revision, "fingerprint": config.base_model_fingerprint}
    settings = describe(rounder.recipe, [plan]) | {"source": origin}
    for part in ("replicated_blocks", "lora", "vision_tower", "multi_modal_projector"):
        settings.pop(part)
    path, _ = find_blocks(base)
    embedding = base.get_input_embeddings()
    outside = {name: kind for name, kind in plan.kinds.items() if not name.startswith(f"{path}.")}
    inside = {name: kind for name, kind in plan.kinds.items() if name not in outside}
    batches = [{"input_ids": ids.to(base.device)} for ids in rounder.samples.text]
    tensors = rounder.round_blocks(base, path, inside, batches, "llm")
    stored: set[int] = set()
    for name, kind in outside.items():
        module = base.get_submodule(name)
        if id(module.weight) not in stored:  # an LM head and an embedding that are one
            stored.add(id(module.weight))
            part = "embeddings" if module is embedding else "lm_head"
            tensors |= stored_tensors(name, **rounder.round(module.weight, kind, part))
    other = rounder.other_rounding()
    settings["other_rounding"] = {part: other[part] for part in BASE_PARTS if part in other}
    write_quantized_base(folder, base, source, plan.kinds, tensors, settings)
    config.base_model_fingerprint = weight_file_hashes(folder)
    config.base_model_revision = None
    return tensor_samples(load_quantized_base(folder, trust_remote_code=base.is_remote_code()))


def _round_adapter(
    model: Any, recipe: QuantizationRecipe, plan: LayerPlan, rounder: _Rounder, staging: Path
) -> dict[str, Path]:
    """LoRA and the copied blocks as files of the new folder; LoRA first, which the blocks after it run with."""
    view = model.multimodal_language_model
    adapter = plan_adapter(view, recipe)
    plan.kept |= adapter.kept
    tensors: dict[str, torch.Tensor] = {}
    copies: dict[str, str] = {}  # by their names in the view, which the blocks are walked by
    for name, stock, weight in list(quantized_adapter_entries(view)):
        if stock not in adapter.kinds:
            continue
        if ".lora_" in name:
            tensors |= _round_lora(view, name, stock, weight, recipe.dtype)
            rounder.note("lora", "rtn")
        else:
            copies[name] = stock
    path, _ = find_blocks(view)
    kinds = {name: adapter.kinds[stock] for name, stock in copies.items()}
    rounded = rounder.round_blocks(view, path, kinds, _embedded(model, rounder), "replicated_blocks")
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
def _embedded(model: Any, rounder: _Rounder) -> list[dict[str, torch.Tensor]]:
    """Multimodal samples as the multimodal view is run on them; without any, the text ones."""
    if not rounder.uses_samples:
        return []
    samples = rounder.samples.multimodal
    if not samples:
        logger.warning("The calibration data has no image: the replicated blocks are rounded on its text.")
        samples = [{"input_ids": ids} for ids in rounder.samples.text]
    device = model.multimodal_language_model.device
    batches = []
    for sample in samples:
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


__all__ = ["CalibrationSamples", "QuantizationReport", "quantize_genieblue"]
