"""Features of a frozen vision tower, kept on disk: each tile is computed once and read back in later epochs."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from genieblue.training.frozen_weights import tensor_digests
from hub_cards.short_numbers import short_bytes

logger = logging.getLogger(__name__)

FEATURES = "image_features"  # folder in the run's folder


def check_cacheable(tower: PreTrainedModel, is_trained: bool) -> None:
    """`ValueError` for a tower that gives a tile other features each time."""
    if is_trained:
        raise ValueError(
            "`cache_image_features` (--cache-image-features) is on, but the vision tower is trained, so its features "
            "change with every step: leave it out, or freeze the tower (learning_rates: {vision_tower: 0})."
        )
    if dropout := {name: p for name, p in tower.config.to_dict().items() if name.endswith("dropout") and p}:
        raise ValueError(
            f"`cache_image_features` (--cache-image-features) is on, but the vision tower drops features at random "
            f"({dropout}): leave it out, or set this to 0."
        )


def bytes_of_tile(tower: PreTrainedModel) -> int:
    """Bytes of the features of a tile."""
    config: Any = tower.config
    # On a GPU, autocast gives the output of the tower's last norm in float32.
    size = torch.float32.itemsize if torch.cuda.is_available() else tower.dtype.itemsize
    return (config.image_size // config.patch_size) ** 2 * config.hidden_size * size


@contextlib.contextmanager
def cached_features(tower: PreTrainedModel, run: Path, reserve: int) -> Iterator[None]:
    """Inside, `tower` computes each tile once, and reads it from the `run`'s folder from then on.

    Features are removed at the end; after an error they stay, for a run that resumes. `reserve` bytes of the disk are
    left free. A key is the sha256 of all that features depend on, so those of another tower, dtype or image are never
    read; several processes share the files.
    """
    cache = _FeatureCache(tower, run / FEATURES, reserve)
    tower.forward = cache.forward
    try:
        yield
    finally:
        del tower.forward
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    shutil.rmtree(run / FEATURES, ignore_errors=True)


class _FeatureCache:
    """Features on disk, one file for each tile."""

    def __init__(self, tower: PreTrainedModel, folder: Path, reserve: int):
        self._compute = tower.forward
        self._folder, self._reserve = folder, reserve
        self._is_full = False
        weights = tensor_digests(tower, "Hashing the vision tower")
        versions = torch.__version__, transformers.__version__, tower.config._attn_implementation
        identity = json.dumps([weights, tower.config.to_dict(), versions], sort_keys=True, default=str)
        self._identity = hashlib.sha256(identity.encode()).hexdigest()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """Tiles (num_tiles, 3, image_size, image_size) → `last_hidden_state` of the tower, computed or read.

        A batch with a new tile is computed as a whole: rounding depends on how many tiles a batch has, so the first
        epoch is the same as without a cache, and so are the others if all batches have equally many.
        """
        if kwargs != {"return_dict": True}:
            return self._compute(pixel_values, **kwargs)
        paths = [self._path(tile) for tile in pixel_values]
        found = [features for path in paths if (features := _read(path)) is not None]
        if len(found) == len(paths):
            features = torch.stack(found).to(pixel_values.device)
            return BaseModelOutputWithPooling(last_hidden_state=features)  # pyright: ignore[reportArgumentType]
        outputs = self._compute(pixel_values, **kwargs)
        for path, features in zip(paths, outputs.last_hidden_state.detach(), strict=True):
            self._write(path, features)
        return outputs

    def _path(self, tile: torch.Tensor) -> Path:
        device = tile.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = hashlib.sha256(f"{self._identity} {tile.dtype} {tuple(tile.shape)} {device} {autocast}".encode())
        key.update(tile.cpu().contiguous().view(torch.uint8).numpy())
        name = key.hexdigest()
        return self._folder / name[:2] / f"{name}.safetensors"

    def _write(self, path: Path, features: torch.Tensor) -> None:
        if self._is_full or path.exists():
            return
        unfinished = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < self._reserve:
                raise OSError(f"less than the {short_bytes(self._reserve)} that the run itself needs are free")
            save_file({FEATURES: features.cpu().clone()}, unfinished)
            unfinished.replace(path)
        except (OSError, SafetensorError) as error:
            self._is_full = True
            logger.warning("No further image features are kept; the others are computed each time: %s.", error)
            unfinished.unlink(missing_ok=True)


def _read(path: Path) -> torch.Tensor | None:
    try:
        return load_file(path)[FEATURES]
    except (FileNotFoundError, SafetensorError):  # new, or cut off when the computer went down
        return None
