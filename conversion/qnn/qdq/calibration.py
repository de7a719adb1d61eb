"""Calibration requests in the form of the graphs' inputs: embeddings for decoders, tiles for the vision tower."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from conversion.qnn.graphs.rotation import Rotation
from conversion.qnn.qdq.encoding import Range
from conversion.qnn.qdq.ranges import union

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """What the graphs are calibrated on."""

    requests: dict[str, list[np.ndarray]]  # by view, rotated embeddings (tokens, hidden_size), longest first
    tiles: list[np.ndarray]  # each (3, image_size, image_size)
    table_range: Range  # of the base's embeddings
    embedding_range: Range  # the same with images


@torch.no_grad()
def prepare_calibration(
    model: Any, encoded: Iterable[Mapping[str, Any]], rotation: Rotation, chunk_length: int, context_length: int
) -> Calibration:
    """Embeds requests that a processor has encoded.

    Args:
        encoded: each with `input_ids`, (length,) or (1, length), image tokens in their places, and `pixel_values`
            (num_tiles, 3, image_size, image_size) for images. Whole conversations with answers calibrate better than
            questions alone. Requests are cut to the context.
        chunk_length: tokens per call. Only longer requests calibrate how graphs continue from their cache; a warning
            names a view that has none.

    Texts calibrate the text view; those with images calibrate the multimodal view and, without their images, the text
    view too. Raises `ValueError` if no request has an image, or none has a text.
    """
    image_token = model.config.image_token_id
    requests: dict[str, list[np.ndarray]] = {"text": [], "multimodal": []}
    tiles: list[np.ndarray] = []
    for request in encoded:
        ids = torch.as_tensor(request["input_ids"]).reshape(1, -1)
        pixels = request.get("pixel_values")
        text_ids = ids[ids != image_token][None, :context_length]
        if text_ids.numel():
            requests["text"].append(_embed(model, text_ids, None, rotation))
        if pixels is not None:
            pixels = torch.as_tensor(pixels)
            requests["multimodal"].append(_embed(model, ids, pixels, rotation)[:context_length])
            tiles.extend(pixels.float().cpu().numpy())
    if not requests["text"]:
        raise ValueError("The calibration has no requests with text: give some from your training data.")
    if not tiles:
        raise ValueError(
            "The calibration has no images, so the vision tower and the multimodal view cannot be calibrated: give "
            "requests with images."
        )
    for view, arrays in requests.items():
        # `verify` reads the first one, and only a long one uses everything in the graphs.
        arrays.sort(key=len, reverse=True)
        if len(arrays[0]) <= chunk_length + 2:
            logger.warning(
                "The longest %s request of the calibration has %d tokens, and a chunk has %d: how the graphs continue "
                "from their cache is hardly calibrated, nor compared by `verify`. Give longer ones.",
                view, len(arrays[0]), chunk_length,
            )  # fmt: skip
    table = _range(embedding_rows(model, rotation))
    return Calibration(requests, tiles, table, union(table, _range(requests["multimodal"])))


def _range(arrays: Iterable[np.ndarray]) -> Range:
    return union(*((float(rows.min()), float(rows.max())) for rows in arrays))


def _embed(model: Any, ids: torch.Tensor, pixels: torch.Tensor | None, rotation: Rotation) -> np.ndarray:
    device = model.language_model.device
    pixels = None if pixels is None else pixels.to(device)
    return rotation.states(model.embed_request(ids.to(device), pixels)[0]).cpu().numpy()


@torch.no_grad()
def embedding_rows(model: Any, rotation: Rotation, batch: int = 4096) -> Iterable[np.ndarray]:
    """The base's embeddings, rotated, in the order of their ids, `batch` rows at a time, (rows, hidden_size)."""
    count = model.get_input_embeddings().weight.shape[0]
    for start in range(0, count, batch):
        yield _embed(model, torch.arange(start, min(start + batch, count))[None], None, rotation)
