"""Quantizes some blocks of both views: four QDQ graphs over one store of weights, for one context binary.

The four are prefill and decode of the text view and of the multimodal view. They are calibrated and quantized part by
part, so only one part's blocks are in memory in full precision.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx

from conversion.qnn.graphs.chunked_decoder import ChunkedDecoder, DecoderShape, RunGraph, boundary_names, cache_names
from conversion.qnn.graphs.decoder_graph import DecoderGraph
from conversion.qnn.graphs.float_onnx import structure, to_float_onnx
from conversion.qnn.graphs.names import EXACT, ROUNDED, STAGES, VIEWS, is_lora
from conversion.qnn.graphs.rotation import Rotation
from conversion.qnn.npu.sessions import cpu_session
from conversion.qnn.qdq.aimet_encodings import save_with_encodings
from conversion.qnn.qdq.block_rounding import BaseCodes, FormatOf, round_blocks
from conversion.qnn.qdq.encoding import Encoding, Range, WeightCodes, WeightFormat
from conversion.qnn.qdq.quantize import apply_codes, encodings_of, quantize_graph, weights_of
from conversion.qnn.qdq.ranges import RangeMeter
from conversion.qnn.qdq.stored_graphs import ConstantStore, save_copy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageSettings:
    """How the decoder graphs are made."""

    chunk_length: int
    context_length: int
    cache_bits: int
    lora: str
    llm: str = "w4a16"
    group_size: int = 32
    rounding: str = "gptq"
    embedding_bits: int = 16
    encodings: bool = False  # write float graphs with AIMET encodings as well
    bits_per_weight: float | None = None  # of `mixed`, or
    max_bytes: int | None = None  # of all weights

    @property
    def four_bits(self) -> WeightFormat:
        """The format of matrices in 4 bits."""
        return WeightFormat(4, self.group_size)

    @property
    def most_matrices(self) -> WeightFormat:
        """The format of all matrices, or in `mixed` of those that have not 8 bits."""
        return WeightFormat(8) if self.llm == "w8a16" else self.four_bits

    def tokens(self, stage: str) -> int:
        """Tokens per call of the `prefill` or the `decode` graph."""
        return self.chunk_length if stage == "prefill" else 1


@dataclass(frozen=True)
class Part:
    """Some blocks, and how their graphs read a request."""

    shape: DecoderShape
    blocks: range
    settings: LanguageSettings
    rotation: Rotation
    format_of: FormatOf
    base_codes: BaseCodes | None = None  # the base's matrices, if they are not to be rounded

    @property
    def input_name(self) -> str:
        """What a graph reads: embeddings, or hidden states of the part before."""
        return boundary_names(self.shape, self.blocks)[0]

    @property
    def output_name(self) -> str:
        """What a graph gives: hidden states, or logits."""
        return boundary_names(self.shape, self.blocks)[1]

    def read(self, run: RunGraph, stream: np.ndarray) -> dict[str, np.ndarray]:
        """The output (tokens, hidden_size or vocabulary) and the caches of one request, read in chunks by `run`."""
        settings = self.settings
        lengths = settings.chunk_length, settings.context_length
        decoder = ChunkedDecoder(self.shape, run, *lengths, blocks=self.blocks)
        return {self.output_name: decoder.read(stream, only_chunks=True), **decoder.cache}

    def probe(self, requests: list[np.ndarray]) -> np.ndarray:
        """The start of the first request, which verification compares number by number."""
        return requests[0][: sum(probe_lengths(self.settings.chunk_length, len(requests[0])))]


@dataclass
class PartResult:
    """The result for one part of the blocks."""

    graphs: dict[str, Path]  # `text_prefill`, … → QDQ file
    boundary: dict[str, dict[str, Encoding]]  # by view, encodings of inputs and outputs
    codes: dict[str, dict[str, WeightCodes]]  # by view
    streams: dict[str, list[np.ndarray]]  # by view, input of the next part
    probe: dict[str, np.ndarray]  # float outputs for the first request of each view, the longest


@dataclass
class _ViewResult:
    """The result for one view of a part."""

    graphs: dict[str, Path]  # by stage, QDQ file
    boundary: dict[str, Encoding]
    stream: list[np.ndarray]  # by request, input of the next part
    values: dict[str, dict[str, np.ndarray]]  # of the probe: `EXACT` and `ROUNDED`, by tensor


class _PartFiles:
    """The files of a part: QDQ graphs, and float graphs with encodings if there is a folder for them.

    Graphs of one kind share one store of constants, open until `stack` ends.
    """

    def __init__(self, stack: ExitStack, name: str, folder: Path, float_folder: Path | None):
        self.name, self.folder, self.float_folder = name, folder, float_folder
        self._store = stack.enter_context(ConstantStore(folder / f"{name}.data"))
        if float_folder is not None:
            float_folder.mkdir(exist_ok=True)
            self._float_store = stack.enter_context(ConstantStore(float_folder / f"{name}.data"))

    def write(
        self,
        key: str,
        model: onnx.ModelProto,
        encodings: Mapping[str, Encoding],
        codes: Mapping[str, WeightCodes],
    ) -> Path:
        """Quantizes a float graph; returns the QDQ file `<name>_<key>.onnx`.

        The float graph is useless afterwards: if it is written too, its weights move to its store.
        """
        title = f"{self.name}_{key}"
        quantized = quantize_graph(model, encodings, codes, name=title)
        path = self._store.save(quantized, self.folder / f"{title}.onnx")
        if self.float_folder is not None:
            save_with_encodings(model, encodings, codes, self._float_store, self.float_folder / path.name)
        return path


def quantize_part(
    views: Mapping[str, Any],
    part: Part,
    *,
    streams: Mapping[str, list[np.ndarray]],
    input_ranges: Mapping[str, Range],
    name: str,
    folder: Path,
    float_folder: Path | None = None,
) -> PartResult:
    """Writes the four QDQ graphs of a part as `<name>_<view>_<stage>.onnx` and `<name>.data` into `folder`.

    Args:
        views: the modules of the text and the multimodal view.
        streams: by view, the input of the blocks in each request, (tokens, hidden_size).
        input_ranges: by view, the range of that input as the previous part encodes it.
        float_folder: for the float graphs with their encodings, if wanted.
    """
    result = PartResult({}, {}, {}, {}, {})
    settings = part.settings
    codes = round_blocks(
        views, part.shape, part.blocks, streams, part.rotation, part.format_of,
        gptq=settings.rounding == "gptq", lora_as_inputs=settings.lora == "inputs", base_codes=part.base_codes,
    )  # fmt: skip
    with ExitStack() as stack:
        files = _PartFiles(stack, name, folder, float_folder)
        for view in VIEWS:
            found = _quantize_view(
                view,
                views[view],
                part,
                requests=streams[view],
                exact=streams.get(f"{view}/{EXACT}", [part.probe(streams[view])])[0],
                input_range=input_ranges[view],
                codes=codes[view],
                files=files,
            )
            result.graphs.update({f"{view}_{stage}": path for stage, path in found.graphs.items()})
            result.boundary[view], result.codes[view] = found.boundary, codes[view]
            result.streams[view] = found.stream
            result.streams[f"{view}/{EXACT}"] = [found.values[EXACT][part.output_name]]
            for kind, values in found.values.items():
                result.probe.update({f"{view}/{kind}/{tensor}": value for tensor, value in values.items()})
            logger.info("Quantized blocks %d to %d of the %s view.", part.blocks.start, part.blocks.stop - 1, view)
    return result


def _quantize_view(
    view: str,
    module: Any,
    part: Part,
    *,
    requests: list[np.ndarray],
    exact: np.ndarray,
    input_range: Range,
    codes: Mapping[str, WeightCodes],
    files: _PartFiles,
) -> _ViewResult:
    """Calibrates and writes the two graphs of one view.

    Args:
        requests: the input of its blocks in each request, (tokens, hidden_size), after blocks with rounded weights.
        exact: the same for the probe, after blocks with their own weights.
        input_range: of the requests, as the previous part encodes it.
    """
    blocks, settings = part.blocks, part.settings
    graph = DecoderGraph(module, part.shape, blocks.start, blocks.stop, part.rotation)
    models = {stage: make_float_graph(graph, settings, stage) for stage in STAGES}
    if structure(models["prefill"]) != structure(models["decode"]):
        raise RuntimeError(f"The graphs of the {view} view differ in more than their shapes.")
    del graph
    _drop_matrices(models["decode"])  # the other graph has the same, and they return as codes
    with _float_run(models["prefill"]) as run:
        exact_values = part.read(run, exact)
    # Ranges are measured with rounded weights: the quantized graph will have these values.
    for stage in STAGES if settings.encodings else STAGES[:1]:
        apply_codes(models[stage], codes)
    ranges, outputs, rounded_values = _calibrate(models["prefill"], part, requests)
    ranges |= _fixed_ranges(part, input_range)
    tied = dict(zip(cache_names(blocks, "in"), cache_names(blocks, "out"), strict=True))
    encodings = encodings_of(models["prefill"], ranges, tied, cache_bits=settings.cache_bits)
    boundary = [value.name for value in (*models["decode"].graph.input, *models["decode"].graph.output)]
    graphs = {stage: files.write(f"{view}_{stage}", models[stage], encodings, codes) for stage in STAGES}
    return _ViewResult(
        graphs=graphs,
        boundary={tensor: encodings[tensor] for tensor in boundary},
        stream=outputs,
        values={EXACT: exact_values, ROUNDED: rounded_values},
    )


def _drop_matrices(model: onnx.ModelProto) -> None:
    """Empties the matrices of a float graph, of which only the codes are needed."""
    names = weights_of(model).keys()
    for tensor in model.graph.initializer:
        if tensor.name in names:
            tensor.ClearField("raw_data")


def make_float_graph(graph: DecoderGraph, settings: LanguageSettings, stage: str) -> onnx.ModelProto:
    """The float ONNX of blocks for the tokens of a stage, `prefill` or `decode`, in a context of fixed length."""
    inputs = graph.example_inputs(settings.tokens(stage), settings.context_length)
    return to_float_onnx(graph, inputs, graph.input_names, graph.output_names)


def _fixed_ranges(part: Part, input_range: Range) -> dict[str, Range]:
    """Ranges that are equal in all graphs, so that a caller encodes such an input once for all parts."""
    rotary = (-abs(part.shape.rotary_scaling), abs(part.shape.rotary_scaling))
    return {
        part.input_name: input_range,
        "attention_mask": (part.shape.masked, 0.0),
        "position_ids_cos": rotary,
        "position_ids_sin": rotary,
    }


def probe_lengths(chunk_length: int, available: int) -> tuple[int, int]:
    """Of the request that is compared number by number: tokens of its prompt, and tokens decoded after it."""
    decoded = 2 if available > 3 else 0
    return min(2 * chunk_length + chunk_length // 2, available - decoded), decoded


@contextmanager
def _float_run(model: onnx.ModelProto) -> Iterator[RunGraph]:
    """Runs a float graph, as `ChunkedDecoder` calls it."""
    with TemporaryDirectory() as folder:
        session = cpu_session(save_copy(model, Path(folder) / "float.onnx"))
        names = [value.name for value in session.get_outputs()]
        yield lambda _tokens, feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _calibrate(
    model: onnx.ModelProto, part: Part, requests: list[np.ndarray]
) -> tuple[dict[str, Range], list[np.ndarray], dict[str, np.ndarray]]:
    """Ranges, what the next part reads in each request, and the float numbers of the probe."""
    with TemporaryDirectory() as folder:
        meter = RangeMeter(model, Path(folder))

        def run(_tokens: int, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return meter.run(feeds)

        outputs = [part.read(run, request)[part.output_name] for request in requests]
        values = part.read(run, part.probe(requests))
    is_last = part.blocks.stop == part.shape.num_blocks
    return meter.ranges, [] if is_last else outputs, values


def codes_digest(codes: Mapping[str, WeightCodes]) -> str:
    """Hex digest of the base's matrices in a graph: names, codes and scales, without LoRA."""
    digest = hashlib.sha256()
    for name in sorted(codes):
        if not is_lora(name):
            digest.update(name.encode())
            digest.update(codes[name].codes.tobytes())
            digest.update(codes[name].scales.tobytes())
            if codes[name].multiples is not None:
                digest.update(codes[name].multiples.tobytes())
    return digest.hexdigest()
