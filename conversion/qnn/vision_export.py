"""The vision tower and the projector → a calibrated W8A16 graph."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from conversion.qnn.float_onnx import to_float_onnx
from conversion.qnn.quantize import Encoding, Rounding, encodings_of, quantize_graph, round_to_nearest
from conversion.qnn.ranges import RangeMeter
from conversion.qnn.stored_graphs import ConstantStore
from conversion.qnn.vision_graph import VisionGraph

VISION_BITS = 8


@dataclass
class VisionResult:
    """What came out of the vision tower."""

    graph: Path
    boundary: dict[str, Encoding]
    probe: dict[str, np.ndarray]  # pixels of one batch of tiles, and the float features of them


def batches_of(tiles: list[np.ndarray], size: int) -> list[np.ndarray]:
    """Tiles (3, side, side) in arrays (size, 3, side, side), the last one filled up with its last tile."""
    batches = [tiles[start : start + size] for start in range(0, len(tiles), size)]
    return [np.stack([*batch, *[batch[-1]] * (size - len(batch))]).astype(np.float32) for batch in batches]


def quantize_vision(
    model: Any, tiles: list[np.ndarray], batch: int, folder: Path, *, rounding: Rounding = round_to_nearest
) -> VisionResult:
    """Writes `vision.onnx`, for `batch` tiles at a time, and `vision.data` into `folder`."""
    graph = VisionGraph(model)
    float_graph = to_float_onnx(graph, graph.example_inputs(batch), graph.input_names, graph.output_names)
    del graph
    probe: Mapping[str, np.ndarray] = {}
    with TemporaryDirectory() as work:
        meter = RangeMeter(float_graph, Path(work))
        for pixels in batches_of(tiles, batch):
            outputs = meter.run({"pixel_values": pixels})
            probe = probe or {"pixel_values": pixels, **outputs}
        ranges = meter.ranges
    encodings = encodings_of(float_graph, ranges)
    quantized, _ = quantize_graph(float_graph, encodings, lambda _name: VISION_BITS, name="vision", rounding=rounding)
    with ConstantStore(folder / "vision.data") as store:
        path = store.save(quantized, folder / "vision.onnx")
    boundary = {name: encodings[name] for name in (*VisionGraph.input_names, *VisionGraph.output_names)}
    return VisionResult(path, boundary, dict(probe))


__all__ = ["batches_of", "quantize_vision"]
