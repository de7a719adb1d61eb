"""Calibration requests in the form of the graphs' inputs: embeddings for decoders, tiles for the vision tower."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from conversion.qnn.qdq.encoding import Range
from conversion.qnn.qdq.ranges import union

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """What the graphs are calibrated on."""

    requests: dict[str, list[np.ndarray]]  # by view, embeddings (tokens, hidden_size), longest first
    tiles: list[np.ndarray]  # each (3, image_size, image_size)
    embedding_range: Range  # of all embeddings there are, images included


@torch.no_grad()
def prepare_calibration(
    model: Any, encoded: Iterable[Mapping[str, Any]], chunk_length: int, context_length: int
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
            requests["text"].append(_embed(model, text_ids, None))
        if pixels is not None:
            pixels = torch.as_tensor(pixels)
            requests["multimodal"].append(_embed(model, ids, pixels)[:context_length])
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
    embeddings = chain(embedding_rows(model), requests["multimodal"])
    return Calibration(requests, tiles, union(*((float(rows.min()), float(rows.max())) for rows in embeddings)))


def _embed(model: Any, ids: torch.Tensor, pixels: torch.Tensor | None) -> np.ndarray:
    device = model.language_model.device
    pixels = None if pixels is None else pixels.to(device)
    return model.embed_request(ids.to(device), pixels)[0].float().cpu().numpy()


@torch.no_grad()
def embedding_rows(model: Any, batch: int = 4096) -> Iterable[np.ndarray]:
    """The base's embeddings in the order of their ids, `batch` rows at a time, (rows, hidden_size)."""
    count = model.get_input_embeddings().weight.shape[0]
    for start in range(0, count, batch):
        yield _embed(model, torch.arange(start, min(start + batch, count))[None], None)
