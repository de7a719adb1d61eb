"""Exports a saved GenieBlue as a bundle for a Snapdragon phone: context binaries and everything a runtime needs."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conversion.chat_ids import stop_token_ids
from conversion.origin import origin_of
from conversion.qnn.adapters import adapter_entries
from conversion.qnn.bundle.digests import tensors_digest, trained_digests
from conversion.qnn.bundle.export_state import UnfinishedExport, flatten
from conversion.qnn.bundle.metadata import ADAPTER, FORMAT_VERSION, METADATA, PROBE, Bundle, list_files, signed
from conversion.qnn.bundle.runtime_files import terms_of_base, write_runtime_files
from conversion.qnn.bundle_base import BundleBase
from conversion.qnn.export_settings import (
    LONGEST_DEFAULT,
    MIXED_BITS,
    check_arguments,
    check_config,
    choose_context_length,
    divide_blocks,
    resumable_settings,
)
from conversion.qnn.graphs.chunked_decoder import DecoderShape
from conversion.qnn.graphs.decoder_shape import compare_with_graphs, make_decoder_shape
from conversion.qnn.graphs.names import STAGES, VIEWS, is_lora
from conversion.qnn.graphs.rotation import Rotation
from conversion.qnn.npu.compile import compile_graphs, read_context
from conversion.qnn.npu.sessions import compiler_version
from conversion.qnn.npu.soc import Soc, find_soc
from conversion.qnn.qdq.calibration import Calibration, embedding_rows, prepare_calibration
from conversion.qnn.qdq.encoding import LEVELS, Encoding, Range
from conversion.qnn.qdq.files import describe_boundary
from conversion.qnn.qdq.language import LanguageSettings, Part, PartResult, codes_digest, quantize_part
from conversion.qnn.qdq.precision_plan import PrecisionPlan, choose_eight_bits, measure_damage
from conversion.qnn.qdq.vision import quantize_vision
from conversion.qnn.stored_size import matrix_budget
from conversion.qnn.verdict import HeldOutChats, judge, judged_on
from conversion.quantization.healing import warn_of_other_base
from conversion.staging import explained_full_disk, lock_output, write_json_whole
from conversion.unchanged import check_unchanged
from modeling_genieblue import (
    GenieBlueConfig,
    GenieBlueForConditionalGeneration,
    GenieBlueProcessor,
)
from modeling_genieblue.model_files_genieblue import HUB_KEYS, RECIPE_NAME

logger = logging.getLogger(__name__)


def export_bundle(
    model_folder: str | os.PathLike,
    out: str | os.PathLike,
    *,
    soc: str,
    calibration: Iterable[Mapping[str, Any]],
    chunk_length: int = 128,
    context_length: int | None = None,
    parts: int = 1,
    lora: str = "constants",
    cache_bits: int = 16,
    vision_tiles: int = 1,
    llm: str = "w4a16",
    group_size: int = 32,
    bits_per_weight: float | None = None,
    max_bytes: int | None = None,
    rounding: str | None = None,
    embedding_bits: int = 16,
    quantized_base: str | os.PathLike | None = None,
    encodings: bool = False,
    held_out: Iterable[Mapping[str, Any]] = (),
    eval_data: HeldOutChats | None = None,
    accept_loss: bool = False,
    remarks: Sequence[str] = (),
    on_step: Callable[[str, int, int], None] | None = None,
    **load_options: Any,
) -> Path:
    """Writes the bundle of a saved GenieBlue (folder or Hub id) into the new folder `out`; returns that folder.

    Its metadata have the verdict (see `conversion.qnn.verdict`); a bundle beyond the limits is written all the same.
    A stopped export continues if it is started again with the same arguments: its finished parts are in
    `<out>.unfinished`. With other arguments, or after an update, it is refused until that folder is removed. Only what
    is for the verdict may be other: then it is given anew.

    Args:
        soc: chip, such as `sm8750`.
        calibration: requests as encoded by the model's processor, some with images; read when the model is loaded.
        chunk_length: tokens per prefill call.
        context_length: tokens per conversation; by default 2048, or the base's maximum if that is less.
        parts: number of context binaries for the blocks; more parts need less memory here.
        lora: `constants`, or `inputs` of the graphs, so that one binary serves several adapters.
        cache_bits: 16, or 8 for half the cache.
        vision_tiles: image tiles per call of the vision graph.
        llm: the base's matrices in `w8a16`, `w4a16`, or `mixed`: 8 bits where 4 do most damage.
        group_size: inputs of a 4-bit matrix that share a scale: 32, 64, 128, or 0 for all of an output channel.
        bits_per_weight: of the base's matrices and their copies on average in `mixed`, by default 5.
        max_bytes: of all weights instead, embeddings and vision tower included, without the graphs' instructions.
        rounding: of these matrices: `rtn`, to nearest, or `gptq`, the default, in which 4-bit codes make up for each
            other's errors; those of 8 bits are always the nearest.
        embedding_bits: 16, or 8 for half the table.
        quantized_base: a bundle of the same base whose codes the base's matrices get; their copies get the same
            formats and rounding. A GenieBlue that was trained on them (`train --on-quantized`) belongs on them.
        encodings: also writes `qairt/`: the float graphs with AIMET `.encodings`, for Qualcomm's own converter.
        held_out: requests like `calibration`, but others, on which the bundle is compared with the model.
        eval_data: chats whose answers are compared too, for the verdict.
        accept_loss: records that a bundle beyond the limits of the verdict is accepted nevertheless.
        remarks: sentences about the held-out data, for the verdict.
        on_step: called with the next step's title, the number of finished steps, and the number of all steps.
        load_options: of `GenieBlueForConditionalGeneration.from_pretrained`.

    Raises, before any weights are read, `ValueError` for impossible settings or a quantized GenieBlue, `OSError` for
    an output in use or a computer without the compiler, and `ModuleNotFoundError` for another library; later
    `ValueError` for a model that the graphs do not reproduce, requests that cannot calibrate them or held-out chats
    that they cannot answer, and `CompileError` (an `OSError`) if the compiler refuses a graph.
    """
    out = Path(os.path.realpath(out))
    chip = find_soc(soc)
    chosen = rounding or "gptq"
    settings = LanguageSettings(
        chunk_length, LONGEST_DEFAULT, cache_bits, lora, llm, group_size,
        "rtn" if llm == "w8a16" and chosen == "gptq" else chosen,  # only 4 bits need more than the nearest code
        embedding_bits, encodings,
        MIXED_BITS if llm == "mixed" and bits_per_weight is None and max_bytes is None else bits_per_weight,
        max_bytes,
    )  # fmt: skip
    check_arguments(out, Path(os.path.realpath(model_folder)), settings, parts, vision_tiles)
    hub = {key: load_options[key] for key in HUB_KEYS if load_options.get(key) is not None}
    config = GenieBlueConfig.from_pretrained(model_folder, **hub)
    settings = replace(settings, context_length=choose_context_length(context_length, config))
    check_config(config, settings, parts, str(model_folder))
    base = None if quantized_base is None else BundleBase(quantized_base, config.base_model_fingerprint)
    if base is not None:
        if bits_per_weight is not None or max_bytes is not None:
            raise ValueError(
                "The matrices keep the bits of `quantized_base`: leave out `bits_per_weight`, `max_bytes`."
            )
        found = base.bundle.metadata["rounding"]
        if rounding is not None and settings.rounding != found:
            raise ValueError(f"{quantized_base} was rounded by {found}, not by {rounding}: leave `rounding` out.")
        settings = replace(settings, rounding=found)
        base.plan(settings)
    wanted = resumable_settings(chip, settings, parts, vision_tiles)
    wanted["quantized_base"] = None if base is None else base.digest
    work = UnfinishedExport(out)
    with lock_output(out, "export"), explained_full_disk(out, remedy=work.remedy):
        work.check_same_export(wanted)
        check_unchanged(model_folder, base_model=load_options.get("base_model"), subfolder=hub.get("subfolder"))
        model = GenieBlueForConditionalGeneration.from_pretrained(model_folder, **load_options)
        trust = {"trust_remote_code": bool(load_options.get("trust_remote_code"))}
        processor = GenieBlueProcessor.from_pretrained(model_folder, **trust, **hub)
        recipe = model.provenance.facts([RECIPE_NAME]).get(RECIPE_NAME, {})
        warn_of_other_base(recipe, lambda: None if base is None else base.digest)
        export = _Export(model, processor, chip, settings, vision_tiles, base, on_step)
        # All that the verdict reads is read now: what is bad in it must not be found after hours.
        requests = list(held_out)
        if eval_data is not None:
            eval_data.check(processor, settings.context_length, export.generation()["eos_token_ids"])
        export.run(work, calibration, divide_blocks(export.shape.num_blocks, parts), wanted)
        asked = judged_on(requests, eval_data, accept_loss, remarks)
        if not work.is_judged_on(asked):
            origin = origin_of(model_folder, config, out, load_options.get("revision"), hub)
            measured = (requests, None if eval_data is None else eval_data.answers)
            with work.judged_on(asked):
                export.judge(work, origin, lambda folder: judge(model, folder, *measured, accept_loss, remarks))
        work.hand_over()
    return out


class _Export:
    """The export of one model with one set of settings."""

    def __init__(
        self,
        model: GenieBlueForConditionalGeneration,
        processor: GenieBlueProcessor,
        soc: Soc,
        settings: LanguageSettings,
        vision_tiles: int,
        base: BundleBase | None,
        on_step: Callable[[str, int, int], None] | None,
    ):
        """Raises `ValueError` for a model that the graphs do not reproduce, or for too small a budget."""
        self.model, self.processor, self.soc = model, processor, soc
        self.settings, self.vision_tiles, self.base, self._on_step = settings, vision_tiles, base, on_step
        lengths = (settings.chunk_length, settings.context_length)
        self.shape: DecoderShape = make_decoder_shape(model.language_model, *lengths)
        title = f"The multimodal view of {type(model.language_model).__name__}"
        self.shape = compare_with_graphs(model.multimodal_language_model, self.shape, settings.context_length, title)
        self.views = {"text": model.language_model, "multimodal": model.multimodal_language_model}
        self.digests = trained_digests(model)
        self.rotation = Rotation(self.shape.hidden_size)
        if settings.llm == "mixed" and base is None:
            matrix_budget(model, settings)

    def run(
        self,
        work: UnfinishedExport,
        encoded: Iterable[Mapping[str, Any]],
        parts: Sequence[range],
        wanted: Mapping[str, Any],
    ) -> None:
        """Runs the remaining steps; `wanted` are the settings except the model's."""
        chunk, context = self.settings.chunk_length, self.settings.context_length
        self._steps = len(parts) + 3
        calibration = prepare_calibration(self.model, encoded, self.rotation, chunk, context - context % chunk)
        work.begin_or_continue({**wanted, **self._model_settings(calibration)})
        if not work.is_complete:
            self._make(work, calibration, parts)

    def judge(
        self, work: UnfinishedExport, origin: Mapping[str, Any], verdict_on: Callable[[Path], dict[str, Any]]
    ) -> None:
        """Compares the finished bundle with the model, and adds where that is, and the verdict, to its metadata."""
        self._announce("verdict", self._steps - 1, self._steps)
        metadata = Bundle(work.bundle).metadata
        self._write_metadata(work, metadata)  # an earlier run may have been stopped between README and metadata
        self._write_metadata(work, {**metadata, "model": origin, "verdict": verdict_on(work.bundle)})

    def _write_metadata(self, work: UnfinishedExport, metadata: Mapping[str, Any]) -> None:
        write_runtime_files(work.bundle, metadata, self.processor)
        write_json_whole(work.bundle / METADATA, signed({**metadata, "files": list_files(work.bundle)}))

    def _make(self, work: UnfinishedExport, calibration: Calibration, parts: Sequence[range]) -> None:
        (work.bundle / "qdq").mkdir(exist_ok=True)
        steps = self._steps
        self._announce("vision tower", 0, steps)
        vision = self._vision(work, calibration.tiles)
        embeddings = Encoding.of(calibration.embedding_range)
        streams: Mapping[str, list[np.ndarray]] = calibration.requests
        ranges: dict[str, Range] = dict.fromkeys(VIEWS, calibration.embedding_range)
        records = []
        plan = self._plan(work, streams)
        for number, blocks in enumerate(parts):
            self._announce(f"blocks {blocks.start} to {blocks.stop - 1}", number + 1, steps)
            codes = None if self.base is None else self.base.codes
            part = Part(self.shape, blocks, self.settings, self.rotation, plan, codes)
            record, streams, ranges = self._part(work, number, part, streams, ranges)
            records.append(record)
        self._announce("embeddings", steps - 2, steps)
        if self.settings.embedding_bits == 8:
            embeddings = Encoding.of(calibration.table_range, "uint8")
        with (work.bundle / "embeddings.raw").open("wb") as file:
            for rows in embedding_rows(self.model, self.rotation):
                file.write(embeddings.encode(rows).tobytes())
        work.gather([f"language_{number}" for number in range(len(parts))], calibration.requests)
        sdk = read_context(work.bundle / vision["graph"]["context"])[1]
        # Written last: a bundle with metadata is complete, but for the verdict.
        metadata = {**self._metadata(records, vision, embeddings, plan), "qairt": sdk, "verdict": None}
        self._write_metadata(work, metadata)

    def _announce(self, title: str, done: int, steps: int) -> None:
        logger.info("Exporting: %s (%d of %d).", title, done + 1, steps)
        if self._on_step is not None:
            self._on_step(title, done, steps)

    def _model_settings(self, calibration: Calibration) -> dict[str, Any]:
        """The model and calibration of an export, which must equal those of the one that it continues."""
        model = self.model
        samples = flatten({**calibration.requests, "tiles": calibration.tiles})
        return {
            "configuration": hashlib.sha256(model.config.to_json_string().encode()).hexdigest(),
            "dtype": str(model.dtype),
            "decoder": asdict(self.shape),
            "base": model.config.base_model_fingerprint or tensors_digest(model.language_model.state_dict().items()),
            "adapter": self.digests["sha256"],
            "calibration": tensors_digest((name, torch.from_numpy(array)) for name, array in samples.items()),
        }

    def _plan(self, work: UnfinishedExport, streams: Mapping[str, list[np.ndarray]]) -> PrecisionPlan:
        """The formats of the base's matrices."""
        settings = self.settings
        if self.base is not None:
            return self.base.plan(settings)
        if settings.llm != "mixed":
            return PrecisionPlan(settings.most_matrices, {})
        if (record := work.finished("plan")) is None:
            copied = self.model.config.replicated_layers
            damages = measure_damage(self.views, self.shape, streams, self.rotation, settings.four_bits, copied)
            chosen = choose_eight_bits(damages, settings.four_bits, matrix_budget(self.model, settings))
            record = {"eight_bits": list(chosen.items()), "damages": [asdict(damage) for damage in damages]}
            work.finish("plan", record)
            logger.info("8 bits for %d of %d matrices.", sum(map(len, chosen.values())), len(damages))
        return PrecisionPlan(settings.four_bits, {index: names for index, names in record["eight_bits"]})

    def _vision(self, work: UnfinishedExport, tiles: Sequence[np.ndarray]) -> dict[str, Any]:
        if (record := work.finished("vision")) is not None:
            return record
        folders = work.bundle / "qdq", self._float_folder(work)
        result = quantize_vision(self.model, list(tiles), self.vision_tiles, self.rotation, *folders)
        compile_graphs({"vision": result.graph}, self.soc, work.bundle / "vision", "vision.bin")
        np.savez(work.step("vision") / PROBE, **result.probe)
        record = {
            "binary": "vision/vision.bin",
            "tiles": self.vision_tiles,
            "graph": {
                "name_in_binary": read_context(work.bundle / "vision/vision_ctx.onnx")[0],
                "context": "vision/vision_ctx.onnx",
                "qdq": "qdq/vision.onnx",
                **describe_boundary(result.graph, result.boundary),
            },
        }
        work.finish("vision", record)
        return record

    def _part(
        self,
        work: UnfinishedExport,
        number: int,
        part: Part,
        streams: Mapping[str, list[np.ndarray]],
        ranges: Mapping[str, Range],
    ) -> tuple[dict[str, Any], Mapping[str, list[np.ndarray]], dict[str, Range]]:
        """The record of a part, and the next part's input with its ranges."""
        name = f"language_{number}"
        record = work.finished(name)
        if record is None:
            folder = work.bundle / name
            result = quantize_part(
                self.views,
                part,
                streams=streams,
                input_ranges=ranges,
                name=name,
                folder=work.bundle / "qdq",
                float_folder=self._float_folder(work),
            )
            compile_graphs(result.graphs, self.soc, folder, f"{name}.bin")
            step = work.step(name)
            np.savez(step / PROBE, **result.probe)
            work.save_streams(name, result.streams)
            if self.settings.lora == "inputs":
                np.savez(step / ADAPTER, **adapter_entries(number, result.codes["multimodal"]))
            record = self._part_record(folder, part.blocks, result)
            work.finish(name, record)
        streams = work.streams(name)
        output = part.output_name
        next_ranges = {}
        for view in VIEWS:
            found = next(x for x in record["graphs"][f"{view}_{STAGES[0]}"]["outputs"] if x["name"] == output)
            next_ranges[view] = (found["offset"] * found["scale"], (LEVELS + found["offset"]) * found["scale"])
        return record, streams, next_ranges

    def _part_record(self, folder: Path, blocks: range, part: PartResult) -> dict[str, Any]:
        name, graphs = folder.name, {}
        codes = (each for view in VIEWS for each in part.codes[view].items())
        matrices = {id(weight): weight for title, weight in codes if not is_lora(title)}.values()  # shared ones once
        for view in VIEWS:
            for stage in STAGES:
                path = part.graphs[f"{view}_{stage}"]
                graphs[f"{view}_{stage}"] = {
                    "name_in_binary": read_context(folder / f"{view}_{stage}_ctx.onnx")[0],
                    "context": f"{name}/{view}_{stage}_ctx.onnx",
                    "qdq": f"qdq/{path.name}",
                    "view": view,
                    "tokens": self.settings.tokens(stage),
                    **describe_boundary(path, part.boundary[view], part.codes[view]),
                }
        return {
            "blocks": [blocks.start, blocks.stop],
            "binary": f"{name}/{name}.bin",
            "base_weight_codes": codes_digest(part.codes["text"]),
            "base_weights": sum(weight.codes.size for weight in matrices),
            "base_weight_bits": sum(weight.codes.size * weight.format.bits_per_weight for weight in matrices),
            "graphs": graphs,
        }

    def _float_folder(self, work: UnfinishedExport) -> Path | None:
        return work.bundle / "qairt" if self.settings.encodings else None

    def _metadata(
        self, records: list[dict], vision: dict[str, Any], embeddings: Encoding, plan: PrecisionPlan
    ) -> dict[str, Any]:
        config = self.model.config
        rows = self.model.get_input_embeddings().weight.shape[0]
        return {
            "format_version": FORMAT_VERSION,
            "soc": asdict(self.soc),
            "compiler": compiler_version(),
            "base": {
                "name_or_path": config.base_model_name_or_path if config.base_model_revision else None,
                "revision": config.base_model_revision,
                "fingerprint": config.base_model_fingerprint,
                **terms_of_base(config),
            },
            "adapter": {
                **self.digests,
                "replicated_layers": config.replicated_layers,
                "lora_rank": config.lora_rank,
                "lora": self.settings.lora,
            },
            "chunk_length": self.settings.chunk_length,
            "context_length": self.settings.context_length,
            "cache_bits": self.settings.cache_bits,
            "llm": self.settings.llm,
            "weights": str(plan.four_bits),
            "eight_bits": {str(index): names for index, names in plan.eight_bits.items()},
            "bits_per_weight": round(
                sum(part["base_weight_bits"] for part in records) / sum(part["base_weights"] for part in records), 3
            ),
            "rounding": self.settings.rounding,
            "decoder": asdict(self.shape),
            "image_token_id": config.image_token_id,
            "image_seq_length": config.image_seq_length,
            "embeddings": {
                "file": "embeddings.raw",
                "shape": [rows, self.shape.hidden_size],
                "dtype": embeddings.dtype,
                "scale": embeddings.scale,
                "offset": -embeddings.zero_point,
            },
            "generation": self.generation(),
            "vision": vision,
            "parts": records,
        }

    def generation(self) -> dict[str, Any]:
        """The token at the start of a text, and those that end an answer."""
        config, tokenizer = self.model.generation_config, self.processor.tokenizer
        begin = tokenizer.bos_token_id if config.bos_token_id is None else config.bos_token_id
        ends = stop_token_ids(tokenizer if config.eos_token_id is None else config)
        return {"bos_token_id": begin, "eos_token_ids": list(ends)}
