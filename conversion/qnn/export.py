"""A saved GenieBlue → a bundle for a Snapdragon phone: context binaries, and all that a runtime needs."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conversion.qnn.adapters import adapter_entries, fixed_digests
from conversion.qnn.aimet_rounding import require_aimet
from conversion.qnn.bundle import ADAPTER, FORMAT_VERSION, METADATA, list_files, signed
from conversion.qnn.calibration import embedding_rows, prepare_calibration
from conversion.qnn.chunked_decoder import DecoderShape, boundary_names
from conversion.qnn.compile import compile_graphs
from conversion.qnn.decoder_shape import make_decoder_shape
from conversion.qnn.encoding import LEVELS, Encoding, Range
from conversion.qnn.language_export import LanguageSettings, codes_digest, quantize_part
from conversion.qnn.names import LORA_MODES, ROUNDINGS, STAGES, VIEWS
from conversion.qnn.npu import compiler_version, npu_devices
from conversion.qnn.qdq_files import describe_boundary
from conversion.qnn.quantize import CACHE_DTYPES
from conversion.qnn.runtime_files import write_runtime_files
from conversion.qnn.soc import Soc, find_soc
from conversion.qnn.vision_export import quantize_vision
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor
from modeling_genieblue.language_views_genieblue import adapter_parameters

logger = logging.getLogger(__name__)
UNFINISHED = ".unfinished"
DONE = "done.json"


def export_bundle(
    model_folder: str | os.PathLike,
    out: str | os.PathLike,
    *,
    soc: str,
    calibration: Iterable[Mapping[str, Any]],
    chunk_length: int = 128,
    context_length: int = 2048,
    parts: int = 1,
    lora: str = "constants",
    cache_bits: int = 16,
    vision_tiles: int = 1,
    rounding: str = "rtn",
    encodings: bool = False,
    on_step: Callable[[str, int, int], None] | None = None,
    **load_options: Any,
) -> Path:
    """Writes the bundle of a saved GenieBlue into the new folder `out`; returns that folder.

    An export that was stopped goes on where it was, if it is started again with the same arguments: finished parts
    lie in `<out>.unfinished`.

    Args:
        model_folder: folder or Hub id of a GenieBlue.
        soc: chip, such as `sm8750`.
        calibration: requests as the model's processor encodes them, some of them with images.
        chunk_length, context_length: tokens that prefill takes at a time, and that a conversation may have.
        parts: context binaries that the blocks are divided among. More need less memory here.
        lora: `constants`, or `inputs` of the graphs, so that one binary serves several adapters.
        cache_bits: 16, or 8 for half the cache.
        vision_tiles: image tiles per call of the vision graph.
        rounding: of the decoder's matrices: `rtn`, to nearest, or `seqmse` of the `aimet` extra.
        encodings: write `qairt/` as well: the float graphs with AIMET `.encodings`, for Qualcomm's own converter.
        on_step: called with what begins next, the number of steps done, and of all steps.
        load_options: of `GenieBlueForConditionalGeneration.from_pretrained`.

    Raises `ValueError` or `OSError`, before any weights are read, for settings that cannot be, an output that is
    taken, and a computer on which the compiler does not run; `RuntimeError` when the compiler refuses a graph.
    """
    out = Path(out)
    chip = find_soc(soc)
    settings = LanguageSettings(chunk_length, context_length, cache_bits, lora, rounding, encodings)
    _check_arguments(out, settings, parts, vision_tiles)
    npu_devices()
    model = GenieBlueForConditionalGeneration.from_pretrained(model_folder, **load_options)
    hub = {key: load_options[key] for key in ("revision", "token", "cache_dir") if key in load_options}
    processor = GenieBlueProcessor.from_pretrained(model_folder, **hub)
    export = _Export(model, processor, chip, settings, vision_tiles, on_step)
    return export.run(out, calibration, parts)


def _check_arguments(out: Path, settings: LanguageSettings, parts: int, vision_tiles: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is taken: give a new folder for the bundle.")
    for name, allowed in (("lora", LORA_MODES), ("rounding", ROUNDINGS), ("cache_bits", CACHE_DTYPES)):
        if (value := getattr(settings, name)) not in allowed:
            raise ValueError(f"`{name}` is {value!r}: expected {' or '.join(map(str, allowed))}.")
    for name, value in (("parts", parts), ("vision_tiles", vision_tiles)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` is {value!r}: expected a whole number of at least 1.")
    if settings.rounding == "seqmse":
        require_aimet()


def divide_blocks(count: int, parts: int) -> list[range]:
    """`count` blocks in `parts` consecutive ranges, as even as can be; `ValueError` for more parts than blocks."""
    if parts > count:
        raise ValueError(f"{parts} parts were asked for, but the base has {count} blocks only.")
    ends = [count * number // parts for number in range(parts + 1)]
    return [range(first, last) for first, last in zip(ends, ends[1:], strict=False)]


class _Export:
    def __init__(
        self, model: Any, processor: Any, soc: Soc, settings: LanguageSettings, vision_tiles: int, on_step: Any
    ):
        self.model, self.processor, self.soc = model, processor, soc
        self.settings, self.vision_tiles, self._on_step = settings, vision_tiles, on_step
        lengths = (settings.chunk_length, settings.context_length)
        self.shape: DecoderShape = make_decoder_shape(model.language_model, *lengths)
        self.views = {"text": model.language_model, "multimodal": model.multimodal_language_model}
        _refuse_untrained(model)

    def run(self, out: Path, encoded: Iterable[Mapping[str, Any]], parts: int) -> Path:
        blocks = divide_blocks(self.shape.num_blocks, parts)
        lengths = self.settings
        usable = lengths.context_length - lengths.context_length % lengths.chunk_length
        calibration = prepare_calibration(self.model, encoded, usable)
        work = out.with_name(out.name + UNFINISHED)
        self._begin_or_go_on(work, calibration, parts)
        (work / "qdq").mkdir(exist_ok=True)
        steps = len(blocks) + 2
        self._tell("vision tower", 0, steps)
        vision = self._vision(work, calibration.tiles)
        embeddings = Encoding.of(calibration.embedding_range)
        streams: Mapping[str, list[np.ndarray]] = calibration.requests
        ranges: dict[str, Range] = dict.fromkeys(VIEWS, calibration.embedding_range)
        records = []
        for number, part in enumerate(blocks):
            self._tell(f"blocks {part.start} to {part.stop - 1}", number + 1, steps)
            record, streams, ranges = self._part(work, number, part, streams, ranges)
            records.append(record)
        self._tell("embeddings", steps - 1, steps)
        self._write_embeddings(work, embeddings)
        probes = {f"request/{view}": calibration.requests[view][0] for view in VIEWS}
        np.savez(work / "probe.npz", **probes)
        metadata = self._metadata(records, vision, embeddings)
        write_runtime_files(work, metadata, self.processor)
        self._finish(work, metadata)
        if out.is_dir():
            out.rmdir()
        os.rename(work, out)
        return out

    def _tell(self, title: str, done: int, steps: int) -> None:
        logger.info("Exporting: %s (%d of %d).", title, done + 1, steps)
        if self._on_step is not None:
            self._on_step(title, done, steps)

    def _begin_or_go_on(self, work: Path, calibration: Any, parts: int) -> None:
        """Keeps what a stopped export of the same model with the same settings has finished; clears anything else."""
        digest = hashlib.sha256()
        for arrays in (*calibration.requests.values(), calibration.tiles):
            for array in arrays:
                digest.update(np.ascontiguousarray(array).tobytes())
        wanted = {
            "settings": asdict(self.settings),
            "soc": self.soc.name,
            "parts": parts,
            "vision_tiles": self.vision_tiles,
            "compiler": compiler_version(),
            "base": self.model.config.base_model_fingerprint,
            "adapter": _adapter_digest(self.model),
            "calibration": digest.hexdigest(),
        }
        state = work / "export.json"
        if state.is_file() and json.loads(state.read_text(encoding="utf-8")) == wanted:
            logger.info("Going on with the export in %s.", work)
            return
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        _write_json(state, wanted)

    def _vision(self, work: Path, tiles: Sequence[np.ndarray]) -> dict[str, Any]:
        folder = work / "vision"
        if (record := _finished(folder)) is not None:
            return record
        float_folder = work / "qairt" if self.settings.encodings else None
        result = quantize_vision(self.model, list(tiles), self.vision_tiles, work / "qdq", float_folder)
        shutil.rmtree(folder, ignore_errors=True)
        compile_graphs({"vision": result.graph}, self.soc, folder, "vision.bin")
        np.savez(folder / "probe.npz", **result.probe)
        record = {
            "binary": "vision/vision.bin",
            "tiles": self.vision_tiles,
            "graph": {
                "context": "vision/vision_ctx.onnx",
                "qdq": "qdq/vision.onnx",
                **describe_boundary(result.graph, result.boundary),
            },
        }
        _write_json(folder / DONE, record)
        return record

    def _part(
        self, work: Path, number: int, blocks: range, streams: Mapping[str, Any], ranges: Mapping[str, Range]
    ) -> tuple[dict[str, Any], Mapping[str, list[np.ndarray]], dict[str, Range]]:
        """One part's record, and what the next part reads with its ranges."""
        name = f"language_{number}"
        folder = work / name
        record = _finished(folder)
        if record is None:
            part = quantize_part(
                self.views, self.shape, blocks, streams, ranges, self.settings, work / "qdq", name, work / "qairt"
            )
            shutil.rmtree(folder, ignore_errors=True)
            compile_graphs(part.graphs, self.soc, folder, f"{name}.bin")
            np.savez(folder / "probe.npz", **part.probe)
            np.savez(folder / "streams.npz", **_flatten(part.streams))
            if self.settings.lora == "inputs":
                np.savez(folder / ADAPTER, **adapter_entries(number, part.codes["multimodal"]))
            record = {
                "blocks": [blocks.start, blocks.stop],
                "binary": f"{name}/{name}.bin",
                "base_weight_codes": codes_digest(part.codes["text"]),
                "graphs": {
                    key: {
                        "context": f"{name}/{key}_ctx.onnx",
                        "qdq": f"qdq/{path.name}",
                        "view": key.split("_")[0],
                        "tokens": self.settings.tokens(key.split("_")[1]),
                        **describe_boundary(path, part.boundary[key.split("_")[0]], part.codes[key.split("_")[0]]),
                    }
                    for key, path in part.graphs.items()
                },
            }
            _write_json(folder / DONE, record)
        with np.load(folder / "streams.npz") as file:
            streams = _unflatten(file)
        output = boundary_names(self.shape, blocks)[1]
        next_ranges = {}
        for view in VIEWS:
            found = next(x for x in record["graphs"][f"{view}_{STAGES[0]}"]["outputs"] if x["name"] == output)
            next_ranges[view] = (found["offset"] * found["scale"], (LEVELS + found["offset"]) * found["scale"])
        return record, streams, next_ranges

    def _write_embeddings(self, work: Path, encoding: Encoding) -> None:
        with (work / "embeddings.raw").open("wb") as file:
            for rows in embedding_rows(self.model):
                file.write(encoding.encode(rows).tobytes())

    def _metadata(self, records: list[dict], vision: dict[str, Any], embeddings: Encoding) -> dict[str, Any]:
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
            },
            "adapter": {
                "sha256": _adapter_digest(self.model),
                **fixed_digests(self.model),
                "replicated_layers": config.replicated_layers,
                "lora_rank": config.lora_rank,
                "lora": self.settings.lora,
            },
            "chunk_length": self.settings.chunk_length,
            "context_length": self.settings.context_length,
            "cache_bits": self.settings.cache_bits,
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
            "generation": self._generation(),
            "vision": vision,
            "parts": records,
        }

    def _generation(self) -> dict[str, Any]:
        """What ends an answer."""
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.processor.tokenizer.eos_token_id
        return {"eos_token_ids": [] if ends is None else ends if isinstance(ends, list) else [ends]}

    def _finish(self, work: Path, metadata: dict[str, Any]) -> None:
        """Gathers probes and adapters in one file each, drops what only served to go on, and signs every file."""
        values, adapter = dict(np.load(work / "probe.npz")), {}
        for folder in [work / "vision", *(work / f"language_{number}" for number in range(len(metadata["parts"])))]:
            with np.load(folder / "probe.npz") as file:
                values.update({f"{folder.name}/{key}": file[key] for key in file})
            if (folder / ADAPTER).exists():
                with np.load(folder / ADAPTER) as file:
                    adapter.update(file)
            for leftover in ("probe.npz", "streams.npz", ADAPTER, DONE):
                (folder / leftover).unlink(missing_ok=True)
        np.savez(work / "probe.npz", **values)
        if adapter:
            np.savez(work / ADAPTER, **adapter)
        (work / "export.json").unlink()
        _write_json(work / METADATA, signed({**metadata, "files": list_files(work)}))


def _refuse_untrained(model: Any) -> None:
    if model.multimodal_language_model is None:
        raise ValueError("This GenieBlue has no adapter: load a saved one, with its base.")


def _adapter_digest(model: Any) -> str:
    """Hex digest of everything that training changes: adapter, vision tower, projector."""
    digest = hashlib.sha256()
    adapter = ((name, value) for _, name, value in adapter_parameters(model.multimodal_language_model))
    others = (
        item for module in (model.vision_tower, model.multi_modal_projector) for item in module.state_dict().items()
    )
    for name, value in (*adapter, *others):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _flatten(streams: Mapping[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    return {f"{view}/{number}": array for view, arrays in streams.items() for number, array in enumerate(arrays)}


def _unflatten(file: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    streams: dict[str, list[np.ndarray]] = {view: [] for view in VIEWS}
    for key in sorted(file, key=lambda key: int(key.rpartition("/")[2])):
        streams.setdefault(key.rpartition("/")[0], []).append(file[key])
    return streams


def _finished(folder: Path) -> dict[str, Any] | None:
    """The record of a part that an earlier run has finished."""
    path = folder / DONE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write_json(path: Path, value: Any) -> None:
    """Writes a JSON file as a whole or not at all."""
    staged = path.with_name(path.name + UNFINISHED)
    staged.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(staged, path)


__all__ = ["divide_blocks", "export_bundle"]
