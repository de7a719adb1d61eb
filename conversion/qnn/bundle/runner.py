"""Runs a bundle without a phone: on the NPU's emulator, or its QDQ graphs on the CPU, which is faster.

NumPy and ONNX Runtime only, besides the processor. It is the reference for whoever writes an app.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from conversion.qnn.bundle.metadata import ADAPTER, Bundle, encoding_of, read_adapter
from conversion.qnn.graphs.chunked_decoder import ChunkedDecoder, boundary_names
from conversion.qnn.graphs.names import VIEWS
from conversion.qnn.npu.sessions import cpu_session, npu_session
from conversion.qnn.npu.soc import find_soc

logger = logging.getLogger(__name__)
BACKENDS = ("cpu", "emulator")
DEFAULT_NEW_TOKENS = 256
OpenSession = Callable[[Mapping[str, Any]], onnxruntime.InferenceSession]


class CodedGraph:
    """A quantized graph that accepts float arrays and codes, and returns codes."""

    def __init__(self, record: Mapping[str, Any], session: onnxruntime.InferenceSession, fixed: Mapping[str, Any]):
        """`record` is the graph's entry in the metadata; `fixed` are inputs that are the same in every call."""
        self.session, self.fixed = session, fixed
        self.inputs = {tensor["name"]: encoding_of(tensor) for tensor in record["inputs"]}
        self.outputs = {tensor["name"]: encoding_of(tensor) for tensor in record["outputs"]}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Codes by output name; float inputs are encoded, codes are passed on as they are."""
        coded = {**feeds, **self.fixed}
        inputs = {}
        for name, encoding in self.inputs.items():
            value = coded[name]
            inputs[name] = encoding.encode(value) if np.issubdtype(value.dtype, np.floating) else value
        names = list(self.outputs)
        return dict(zip(names, self.session.run(names, inputs), strict=True))


class ViewGraphs:
    """The graphs of one view, part by part, for chunks and for single tokens; opened at their first call.

    LoRA inputs are read at once from the file `adapter`, by default the bundle's own.
    """

    def __init__(self, bundle: Bundle, view: str, open_session: OpenSession, adapter: str | os.PathLike | None = None):
        self.bundle, self.view, self._open_session = bundle, view, open_session
        file = bundle.path(ADAPTER) if adapter is None else Path(adapter)
        expected = [bundle.lora_inputs(number, view) for number in range(len(bundle.metadata["parts"]))]
        self._lora = [read_adapter(file, number, lora) if lora else {} for number, lora in enumerate(expected)]
        self._graphs: dict[tuple[int, int], CodedGraph] = {}

    def open(self) -> None:
        """Opens all graphs of the view now."""
        for number in range(len(self.bundle.metadata["parts"])):
            for tokens in (self.bundle.metadata["chunk_length"], 1):
                self.part(number, tokens)

    def part(self, number: int, tokens: int) -> CodedGraph:
        """The graph of a part for `tokens` at a time."""
        if (number, tokens) not in self._graphs:
            part = self.bundle.metadata["parts"][number]
            record = next(
                graph for graph in part["graphs"].values() if (graph["view"], graph["tokens"]) == (self.view, tokens)
            )
            self._graphs[number, tokens] = CodedGraph(record, self._open_session(record), self._lora[number])
        return self._graphs[number, tokens]

    def run(self, tokens: int, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All parts in turn; logits as floats, caches as codes."""
        outputs: dict[str, np.ndarray] = {}
        hidden = feeds["inputs_embeds"]
        shape = self.bundle.decoder
        for number, part in enumerate(self.bundle.metadata["parts"]):
            graph = self.part(number, tokens)
            first_input, first_output = boundary_names(shape, range(*part["blocks"]))
            new = graph.run({**feeds, first_input: hidden})
            hidden = new.pop(first_output)  # codes: the next part reads them as they are
            outputs.update(new)
        return {**outputs, "logits": graph.outputs["logits"].decode(hidden)}

    def empty_caches(self) -> dict[str, np.generic]:
        """The code of zero by cache name."""
        tensors = [
            tensor
            for part in self.bundle.metadata["parts"]
            for tensor in part["graphs"][f"{self.view}_decode"]["inputs"]
        ]
        return {tensor["name"]: encoding_of(tensor).zero for tensor in tensors if tensor["name"].startswith("past_")}

    def decoder(self) -> ChunkedDecoder:
        """An empty conversation in this view."""
        facts = self.bundle.metadata
        lengths = facts["chunk_length"], facts["context_length"]
        return ChunkedDecoder(self.bundle.decoder, self.run, *lengths, empty=self.empty_caches())


class QnnRunner:
    """Answers requests with the graphs of a bundle."""

    def __init__(self, path: str | os.PathLike, backend: str = "cpu", adapter: str | os.PathLike | None = None):
        """Opens a bundle; `backend` is `cpu` for the QDQ graphs, or `emulator` for the NPU's own arithmetic.

        `adapter` is a file written by `export_adapter`, for a bundle with LoRA as inputs; by default its own. Raises
        `ValueError` for a bundle with changed files or another bundle's adapter, `OSError` if there is no bundle or
        adapter.
        """
        if backend not in BACKENDS:
            raise ValueError(f"Unknown backend {backend!r}: choose {' or '.join(BACKENDS)}.")
        self.bundle = Bundle(path)
        if problems := self.bundle.changed_files():
            raise ValueError(f"{path} is not what was exported: {'; '.join(problems)}. Export the bundle again.")
        if adapter is not None and self.bundle.metadata["adapter"]["lora"] != "inputs":
            raise ValueError(f"The LoRA of {path} is part of its binaries: it takes no other adapter.")
        self.backend = backend
        self.views = {view: ViewGraphs(self.bundle, view, self._open, adapter) for view in VIEWS}
        self._vision: CodedGraph | None = None
        self._table = self.bundle.embeddings()

    def _open(self, record: Mapping[str, Any]) -> onnxruntime.InferenceSession:
        path = self.bundle.path(record["qdq"])
        if self.backend == "cpu":
            return cpu_session(path)
        return npu_session(path, find_soc(self.bundle.metadata["soc"]["name"]))

    @cached_property
    def processor(self) -> Any:
        """The model's processor, from the bundle."""
        from modeling_genieblue import GenieBlueProcessor

        return GenieBlueProcessor.from_pretrained(self.bundle.path("processor"))

    def image_features(self, pixel_values: np.ndarray) -> np.ndarray:
        """Tiles (num_tiles, 3, side, side) → (num_tiles, image_seq_length, hidden_size)."""
        record = self.bundle.metadata["vision"]
        expected = tuple(record["graph"]["inputs"][0]["shape"][1:])
        if len(pixel_values) == 0 or pixel_values.shape[1:] != expected:
            raise ValueError(
                f"`pixel_values` has the shape {pixel_values.shape}, expected one or more tiles of {expected}: use "
                "the bundle's own processor."
            )
        if self._vision is None:
            self._vision = CodedGraph(record["graph"], self._open(record["graph"]), {})
        size = record["tiles"]
        features = []
        for start in range(0, len(pixel_values), size):
            batch = np.asarray(pixel_values[start : start + size], np.float32)
            # Padded with its last tile, as in calibration: any other padding might exceed the measured ranges.
            padding = np.repeat(batch[-1:], size - len(batch), axis=0)
            codes = self._vision.run({"pixel_values": np.concatenate([batch, padding])})["image_features"]
            features.append(self._vision.outputs["image_features"].decode(codes)[: len(batch)])
        return np.concatenate(features)

    def embed(self, input_ids: Sequence[int], pixel_values: np.ndarray | None = None) -> np.ndarray:
        """Ids (length,) → embeddings (length, hidden_size), image features in the places of image tokens.

        Raises `ValueError` for ids that are not in the table, and if tiles and image tokens do not match.
        """
        ids = np.asarray(input_ids).reshape(-1)
        facts = self.bundle.metadata
        is_image = ids == facts["image_token_id"]
        if ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"`input_ids` are {ids.size} values of type {ids.dtype}: expected whole numbers.")
        if (strange := ids[~is_image & ((ids < 0) | (ids >= len(self._table)))]).size:
            raise ValueError(
                f"The id {strange[0]} is not in the table of embeddings, which has the ids 0 to "
                f"{len(self._table) - 1}: use the bundle's own processor."
            )
        embeddings = encoding_of(facts["embeddings"]).decode(self._table[np.where(is_image, 0, ids)])
        tiles = 0 if pixel_values is None else len(pixel_values)
        if is_image.sum() != tiles * facts["image_seq_length"]:
            raise ValueError(
                f"Image tokens and image features do not match: tokens: {is_image.sum()}, features: "
                f"{tiles * facts['image_seq_length']} ({tiles} tiles of {facts['image_seq_length']})."
            )
        if tiles:
            embeddings[is_image] = self.image_features(pixel_values).reshape(-1, embeddings.shape[-1])
        return embeddings

    def logits(self, input_ids: Sequence[int], pixel_values: np.ndarray | None = None, view: str | None = None) -> Any:
        """Logits (length, vocabulary) of a whole request, by default in the view that it runs."""
        return self.views[choose_view(view, pixel_values)].decoder().read(self.embed(input_ids, pixel_values))

    def generate(
        self,
        input_ids: Sequence[int],
        pixel_values: np.ndarray | None = None,
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        view: str | None = None,
    ) -> Iterator[int]:
        """Greedy decoding: yields new ids up to an end token (not included), the limit, or the end of the context."""
        decoder = self.views[choose_view(view, pixel_values)].decoder()
        return self.continue_from(decoder, input_ids, pixel_values, max_new_tokens=max_new_tokens)

    def continue_from(
        self,
        decoder: ChunkedDecoder,
        input_ids: Sequence[int],
        pixel_values: np.ndarray | None = None,
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
    ) -> Iterator[int]:
        """Like `generate`, after what `decoder` has already read; ids and tiles are the new ones.

        At the end `decoder` has read them and the generated tokens, except for a last one that no end token followed.
        """
        ends = set(self.bundle.metadata["generation"]["eos_token_ids"])
        (logits,) = decoder.read(self.embed(input_ids, pixel_values), last_only=True)
        for number in range(1, max_new_tokens + 1):
            token = int(logits.argmax())
            if token in ends:
                return
            yield token
            if number == max_new_tokens:
                return  # nobody asks what follows the last one
            if decoder.length == decoder.context_length:
                logger.warning("The answer is cut off: the graphs' context of %d tokens is full.", decoder.length)
                return
            (logits,) = decoder.read(self.embed([token]))


def choose_view(view: str | None, pixel_values: Any) -> str:
    """The view that a request runs; `ValueError` for an unknown view, or for images in the text view."""
    if view is None:
        return "text" if pixel_values is None else "multimodal"
    if view not in VIEWS:
        raise ValueError(f"Unknown view {view!r}: choose {' or '.join(VIEWS)}.")
    if view == "text" and pixel_values is not None:
        raise ValueError("The text view reads no images: leave them out, or use the multimodal view.")
    return view
