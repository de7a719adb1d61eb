"""Quantizes the vision tower and projector: a calibrated W8A16 graph."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from conversion.qnn.graphs.float_onnx import to_float_onnx
from conversion.qnn.graphs.rotation import Rotation
from conversion.qnn.graphs.vision_graph import VisionGraph
from conversion.qnn.npu.sessions import cpu_session
from conversion.qnn.qdq.aimet_encodings import save_with_encodings
from conversion.qnn.qdq.encoding import Encoding
from conversion.qnn.qdq.quantize import apply_codes, encodings_of, quantize_graph, round_weights
from conversion.qnn.qdq.ranges import measure_ranges
from conversion.qnn.qdq.stored_graphs import ConstantStore, save_copy

VISION_BITS = 8
# Largest difference of the graph's features (float32) from the model's (32 or 16 bits), relative to their norm.
TOLERANCE, TOLERANCE_16_BITS = 1e-3, 1e-1


@dataclass
class VisionResult:
    """The result for the vision tower."""

    graph: Path
    boundary: dict[str, Encoding]
    probe: dict[str, np.ndarray]  # one batch of tiles, and its float features


def batches_of(tiles: list[np.ndarray], size: int) -> list[np.ndarray]:
    """Tiles (3, side, side) in arrays (size, 3, side, side), the last one padded with its last tile."""
    batches = [tiles[start : start + size] for start in range(0, len(tiles), size)]
    return [np.stack([*batch, *[batch[-1]] * (size - len(batch))]).astype(np.float32) for batch in batches]


def quantize_vision(
    model: Any, tiles: list[np.ndarray], batch: int, rotation: Rotation, folder: Path, float_folder: Path | None = None
) -> VisionResult:
    """Writes `vision.onnx`, for `batch` tiles at a time with rotated features, and `vision.data` into `folder`.

    The float graph with its encodings goes into `float_folder`, if there is one. Raises `ValueError` if the float
    graph does not give the model's features for the first batch.
    """
    graph = VisionGraph(model, rotation)
    float_graph = to_float_onnx(graph, graph.example_inputs(batch), graph.input_names, graph.output_names)
    del graph
    codes = round_weights(float_graph, lambda _name: VISION_BITS)
    batches = batches_of(tiles, batch)
    with TemporaryDirectory() as work:
        session = cpu_session(save_copy(float_graph, Path(work) / "vision.onnx"))
        features = session.run(["image_features"], {"pixel_values": batches[0]})[0]
        del session
        _check_features(model, batches[0], features, rotation)
        apply_codes(float_graph, codes)
        ranges = measure_ranges(float_graph, ({"pixel_values": pixels} for pixels in batches), Path(work))
    probe = {"pixel_values": batches[0], "image_features": features}
    encodings = encodings_of(float_graph, ranges)
    quantized = quantize_graph(float_graph, encodings, codes, name="vision")
    with ConstantStore(folder / "vision.data") as store:
        path = store.save(quantized, folder / "vision.onnx")
    if float_folder is not None:
        float_folder.mkdir(exist_ok=True)
        with ConstantStore(float_folder / "vision.data") as store:
            save_with_encodings(float_graph, encodings, codes, store, float_folder / "vision.onnx")
    boundary = {name: encodings[name] for name in (*VisionGraph.input_names, *VisionGraph.output_names)}
    return VisionResult(path, boundary, probe)


@torch.no_grad()
def _check_features(model: Any, pixels: np.ndarray, found: np.ndarray, rotation: Rotation) -> None:
    """`ValueError` unless the features `found` for `pixels` are the model's own, rotated."""
    own = rotation.states(model.get_image_features(torch.from_numpy(pixels)).pooler_output).cpu().numpy()
    dtypes = {parameter.dtype for part in (model.vision_tower, model.multi_modal_projector)
              for parameter in part.parameters()}  # fmt: skip
    tolerance = TOLERANCE if dtypes == {torch.float32} else TOLERANCE_16_BITS
    error = float(np.linalg.norm(found - own) / np.linalg.norm(own)) if found.shape == own.shape else float("inf")
    if not error <= tolerance:
        raise ValueError(
            f"The vision tower and the projector cannot be exported to QNN: for {len(pixels)} tiles their graph gives "
            f"features of shape {found.shape}, the model {own.shape}, with a relative difference of {error:.2g} (at "
            f"most {tolerance:g}): they compute something other than a SigLIP with their weights."
        )
