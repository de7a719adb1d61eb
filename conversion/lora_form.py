"""The LoRA form: the multimodal language side as one stock PEFT adapter, copied blocks as LoRA of a higher rank."""

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from conversion.absorbed_norms import CopiedBlock, find_copied_blocks
from conversion.language_exports import (
    LARGEST_ERROR,
    LogitsGauge,
    embed_requests,
    export_facts,
    load_source,
)
from conversion.low_rank import BYTES_OF_HEADER, Spectrum, check_rank_choice, choose_ranks, factor_change
from conversion.quantization.hessians import Hessians, walk_blocks
from conversion.quantization.views import vlm_of
from conversion.staging import CONVERSION, explained_full_disk, lock_output
from hub_cards.exports import EXPORT_FACTS_NAME, SPECTRUM_NAME, write_export_card
from hub_cards.model_card import Measurement
from modeling_genieblue.language_adapter_genieblue import (
    ADAPTER,
    PEFT_PREFIX,
    adapter_parameters,
    find_blocks,
    make_lora_config,
    save_adapter_config,
)
from modeling_genieblue.model_files_genieblue import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    read_settings,
    some,
    write_json,
)
from modeling_genieblue.staging_genieblue import NewFolder

COPY = f"modules_to_save.{ADAPTER}."
Progress = Callable[[Iterable[int], str], Iterable[int]]


@dataclass(frozen=True)
class Matrix:
    """A linear layer of a copied block in the LoRA form.

    Attributes:
        error: of the layer's weights (of its outputs, if there was calibration), relative to them.
        lost: share of its change that is cut off.
    """

    block: int
    name: str
    shape: tuple[int, int]
    rank: int
    full_rank: int
    bytes: int
    error: float
    lost: float


@dataclass(frozen=True)
class LoraForm:
    """What was written: the folder, its matrices, what no LoRA carries (relative difference by name), the errors."""

    output: Path
    bytes: int
    matrices: list[Matrix]
    left_behind: dict[str, float]
    measurements: list[Measurement]


def export_lora(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    rank: int | None = None,
    error: float | None = None,
    max_bytes: int | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
    **load_kwargs: Any,
) -> LoraForm:
    """Writes the multimodal language side of a GenieBlue (folder or Hub id) as one LoRA for its untouched base.

    Without `rank`, `error` and `max_bytes` the copied blocks keep their full rank, and the adapter gives the exact
    logits, but for what no LoRA carries.

    Args:
        rank: of every linear layer of the copied blocks.
        error: each of these layers gets the least rank with at most this relative error of its weights or, with
            `calibration`, of its outputs.
        max_bytes: of the adapter's file; spent where it lowers the error most.
        calibration: chats as encoded by the model's processor, on which errors are measured.
        load_kwargs: of `GenieBlueForConditionalGeneration.from_pretrained`; `dtype` is also that of the file.

    Raises `ValueError` or `OSError`, leaving nothing behind, for settings that contradict each other or are out of
    range, a model that cannot be exported (see `load_source`), and an output that exists.
    """
    check_choice(rank, error, max_bytes)
    model, out = load_source(source, out, **load_kwargs)
    with lock_output(out, CONVERSION), explained_full_disk(out), NewFolder(out, "export", replace=False) as new:
        form = write_lora_form(
            model,
            new,
            new.staging,
            rank=rank,
            error=error,
            max_bytes=max_bytes,
            calibration=calibration,
            progress=progress,
        )
        write_export_card(new.staging, out.name, base_folder=Path(model.config.base_model_name_or_path))
        new.put_in_place()
    return form


def write_lora_form(
    model: Any,
    new: NewFolder,
    folder: Path,
    *,
    rank: int | None = None,
    error: float | None = None,
    max_bytes: int | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> LoraForm:
    """Writes the adapter of a loaded model, its facts and the spectrum (of copied blocks) into `folder`, for `new`.

    For the other arguments see `export_lora`; they were checked.
    """
    export = _LoraExport(model, embed_requests(model, calibration), calibration is not None)
    budget = None if max_bytes is None else export.bytes_for_ranks(max_bytes)
    spectra = export.factor(new.folder, progress or (lambda steps, _title: steps))
    number = export.dtype.itemsize
    ranks = choose_ranks(spectra, rank=rank, error=error, max_bytes=budget, bytes_per_number=number)
    export.write(folder, new.folder, ranks)
    form = LoraForm(
        new.target,
        (folder / ADAPTER_WEIGHTS_NAME).stat().st_size,
        [export.describe(name, spectra[name], ranks[name]) for name in spectra],
        export.left_behind,
        export.measure(folder),
    )
    facts = export_facts(
        "lora",
        model,
        new.target,
        form.measurements,
        choice={"rank": rank, "error": error, "max_bytes": max_bytes},
        calibrated=export.is_calibrated,
        matrices=[asdict(matrix) for matrix in form.matrices],
        left_behind=form.left_behind,
    )
    write_json(folder / EXPORT_FACTS_NAME, facts)
    if spectra:
        draw_spectra(form.matrices, spectra.values(), folder / SPECTRUM_NAME, export.is_calibrated)
    export.name_base(folder, facts["base"]["name"])
    return form


def check_choice(rank: int | None, error: float | None, max_bytes: int | None) -> None:
    """`ValueError` for more than one choice of ranks or one out of range, `ModuleNotFoundError` for no matplotlib."""
    check_rank_choice(rank, error, max_bytes)
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("The spectrum is drawn with matplotlib: pip install 'genieblue[train]'.")


class _LoraExport:
    """One GenieBlue on its way to the LoRA form."""

    def __init__(self, model: Any, requests: list[dict[str, torch.Tensor]], is_calibrated: bool):
        self.model, self.requests, self.is_calibrated = model, requests, is_calibrated
        self.base, self.view = model.language_model, model.multimodal_language_model
        self.dtype = self.base.dtype
        self.path, blocks = find_blocks(self.base)
        self.lora_config = copy.deepcopy(model._lora_config)
        if len(model.config.replicated_layers) == len(blocks):  # it names no layers, and here all get LoRA
            settings = copy.copy(model.config)
            settings.replicated_layers = []
            self.lora_config = make_lora_config(self.base, settings)
        self.blocks = find_copied_blocks(
            self.view, self.path, model.config.replicated_layers, set(self.lora_config.target_modules), requests[0]
        )
        self.lora = {
            stock: weight.detach().to("cpu", self.dtype)
            for _, stock, weight in adapter_parameters(self.view)
            if ".lora_" in stock
        }
        self._gauge = LogitsGauge(model, requests, is_calibrated)
        self._check_vlm()
        self._measurements = [self._gauge.measure("Logits of the base without the adapter", self.base)[1]]
        self.left_behind = self._measure_left_behind()

    def _check_vlm(self) -> None:
        """`ValueError` for a VLM whose language model is not the base's with other matrices alone."""
        if vlm_of(self.model) is None:
            return
        own, remedy = self.model.own_language, "`genieblue export merged` keeps it, or run the GenieBlue itself."
        names = [name for name, _ in own.tensors.named_parameters()]
        names += [f"rows of the {name}" for name in ("embedding", "head") if getattr(own, name) is not None]
        if names:
            raise ValueError(
                f"The VLM has of its own, outside the matrices that LoRA changes: {some(names)}. No LoRA on the base "
                f"carries that: {remedy}"
            )
        error, _ = self._gauge.measure("Logits of the view", self.view)
        if not error <= LARGEST_ERROR[self.dtype]:
            raise ValueError(
                f"The VLM's language model has other settings than its base: with the same weights, the logits differ "
                f"by {error:.2g} of their size. No LoRA on the base carries that: {remedy}"
            )

    def _measure_left_behind(self) -> dict[str, float]:
        """The relative difference of each parameter that no LoRA carries; measures what they cost together."""
        before: list[tuple[nn.Parameter, torch.Tensor]] = []
        differences = {}
        with torch.no_grad():
            for index, block in self.blocks.items():
                for name, value in block.left_behind().items():
                    own = block.copy.get_parameter(name)
                    difference = (own.float() - value).norm() / value.norm().clamp(min=1e-30)
                    differences[f"{self.path}.{index}.{name}"] = float(difference)
                    before.append((own, own.clone()))
                    own.copy_(value)
            if before:
                title = "Logits without what no LoRA carries, everything else exact"
                self._measurements.append(self._gauge.measure(title, self.view)[1])
            for own, value in before:
                own.copy_(value)
        return differences

    def factor(self, folder: Path, progress: Progress) -> dict[str, Spectrum]:
        """Writes the factors of each copied block to a file in `folder`; returns the spectra by matrix."""
        spectra: dict[str, Spectrum] = {}

        def process(index: int, _block: nn.Module, hessians: Hessians) -> None:
            block = self.blocks.get(index)
            if block is None:
                return
            factors = {}
            for name in block.linears:
                hessian = hessians.get(COPY + name)
                b, a, spectrum = factor_change(*block.weights(name), _behind_base_norm(block, name, hessian))
                factors |= {f"{name}.A": a.contiguous().cpu(), f"{name}.B": b.contiguous().cpu()}
                spectra[f"{self.path}.{index}.{name}"] = spectrum
            save_file(factors, folder / f"{index}.safetensors")

        if not self.is_calibrated:
            for index in progress(sorted(self.blocks), "copied blocks"):
                process(index, self.blocks[index].copy, {})
            return spectra

        def select(index: int, _block: nn.Module) -> list[str]:
            return [COPY + name for name in self.blocks[index].linears] if index in self.blocks else []

        walk_blocks(
            self.view,
            self.requests,
            self.path,
            process,
            select=select,
            progress=lambda steps: progress(steps, "blocks"),
        )
        return spectra

    def bytes_for_ranks(self, max_bytes: int) -> int:
        """What a file of this size leaves to the copied blocks; `ValueError` if that is less than rank 1 takes."""
        names = [*self.lora, *(f"{PEFT_PREFIX}{self.path}.{index}.{name}.lora_{kind}.weight"
                 for index, block in self.blocks.items() for name in block.linears for kind in "AB")]  # fmt: skip
        header = sum(len(name) + BYTES_OF_HEADER for name in names)
        fixed = header + sum(weight.numel() for weight in self.lora.values()) * self.dtype.itemsize
        layers = [block.original.get_submodule(name) for block in self.blocks.values() for name in block.linears]
        least = fixed + sum(sum(layer.weight.shape) for layer in layers) * self.dtype.itemsize
        if max_bytes < least:
            raise ValueError(
                f"A file of {max_bytes:,} bytes cannot hold rank 1 for {len(layers)} matrices of the copied blocks "
                f"beside the LoRA of the other blocks: the least is {least:,}."
            )
        return max_bytes - fixed

    def write(self, staging: Path, folder: Path, ranks: Mapping[str, int]) -> None:
        """The adapter: LoRA of the other blocks as it is, and the factors in `folder` at these ranks."""
        config, tensors = self.lora_config, dict(self.lora)
        for index, block in self.blocks.items():
            with safe_open(folder / f"{index}.safetensors", framework="pt") as file:
                for name in block.linears:
                    key = f"{self.path}.{index}.{name}"
                    rank = ranks[key]
                    a, b = file.get_slice(f"{name}.A")[:rank], file.get_slice(f"{name}.B")[:, :rank]
                    # PEFT multiplies by alpha / rank; other programs know no alpha by matrix.
                    b = b * (rank / config.lora_alpha)
                    tensors[f"{PEFT_PREFIX}{key}.lora_A.weight"] = a.to(self.dtype).contiguous()
                    tensors[f"{PEFT_PREFIX}{key}.lora_B.weight"] = b.to(self.dtype).contiguous()
        config.modules_to_save = config.layers_to_transform = None
        if not _adapts_elsewhere(self.base, self.path, config.target_modules):
            config.layers_pattern = None
        else:  # of a vision encoder, say
            config.layers_to_transform = list(range(len(self.base.get_submodule(self.path))))
        of_copies = {name: rank for name, rank in ranks.items() if rank != config.r}
        config.rank_pattern = {**(config.rank_pattern or {}), **of_copies}  # other blocks may have ranks of their own
        save_file(tensors, staging / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})
        save_adapter_config(config, staging)

    def measure(self, folder: Path) -> list[Measurement]:
        """Loads the adapter with stock PEFT on the plain base, and compares the logits with the exact form's."""
        peft = PeftModel.from_pretrained(self.base, str(folder))
        try:
            return [*self._measurements, self._gauge.measure("Logits of this adapter", peft)[1]]
        finally:
            peft.unload()

    def describe(self, name: str, spectrum: Spectrum, rank: int) -> Matrix:
        """The row of a matrix in the table."""
        index, _, inner = name.removeprefix(f"{self.path}.").partition(".")
        size = spectrum.numbers(rank) * self.dtype.itemsize
        error = float(spectrum.errors()[rank])
        return Matrix(int(index), inner, spectrum.shape, rank, spectrum.full_rank, size, error, spectrum.lost(rank))

    def name_base(self, folder: Path, name: str) -> None:
        """Writes the base's name and commit into PEFT's configuration; a path is relative to the folder."""
        settings = read_settings(folder / ADAPTER_CONFIG_NAME)
        base = {"base_model_name_or_path": name, "revision": self.model.config.base_model_revision}
        write_json(folder / ADAPTER_CONFIG_NAME, settings | base)


def _behind_base_norm(block: CopiedBlock, linear: str, hessian: torch.Tensor | None) -> torch.Tensor | None:
    """The Hessian of a layer's inputs behind the base's norm, from that of its inputs in the copy."""
    gain = block.gains.get(block.readers.get(linear, ""))
    if hessian is None or gain is None:
        return hessian
    inverse = torch.where(gain == 0, 0.0, 1 / gain)
    return hessian * inverse[:, None] * inverse


def _adapts_elsewhere(base: nn.Module, path: str, targets: Iterable[str]) -> bool:
    """Whether layers outside the blocks have the name of one that gets LoRA."""
    targets = set(targets)
    return any(
        name.rpartition(".")[2] in targets and not name.startswith(f"{path}.") for name, _ in base.named_modules()
    )


def draw_spectra(matrices: Sequence[Matrix], spectra: Iterable[Spectrum], path: Path, is_calibrated: bool) -> None:
    """Writes a PNG: the error of each matrix by rank, one panel for each kind, with a dot at the rank it is cut at."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(matrix.name for matrix in matrices))
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis, kind in zip(axes.flat, kinds, strict=False):
        axis.set(title=kind, xlabel="rank")
        axis.set_yscale("symlog", linthresh=1e-4)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    for matrix, spectrum in zip(matrices, spectra, strict=True):
        axis = axes.flat[kinds.index(matrix.name)]
        (line,) = axis.plot(spectrum.errors(), linewidth=1, label=str(matrix.block))
        axis.plot(matrix.rank, matrix.error, ".", color=line.get_color())
    axes[0, 0].set_ylabel("relative error of outputs" if is_calibrated else "relative error of weights")
    axes[0, 0].legend(title="block", fontsize="small")
    figure.savefig(path, dpi=110, format="png")
