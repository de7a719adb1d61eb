"""Identifies a loaded model by digests of its tensors, independent of the dtype if it keeps their values."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from modeling_genieblue.language_adapter_genieblue import adapter_parameters

NamedTensors = Iterable[tuple[str, torch.Tensor]]


def tensors_digest(tensors: NamedTensors) -> str:
    """Hex digest of names, shapes and values (in float32) in their order."""
    digest = hashlib.sha256()
    for name, value in tensors:
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def trained_digests(model: Any) -> dict[str, str]:
    """Hex digests of what training changes in a GenieBlue: of everything (`sha256`), and of each set of constants.

    Compiled graphs have the replicated blocks (`copies_sha256`) and the vision tower and projector (`vision_sha256`)
    as constants.
    """
    adapter = [(name, value) for _, name, value in adapter_parameters(model.multimodal_language_model)]
    return {
        "sha256": tensors_digest((*adapter, *_vision_tensors(model))),
        "copies_sha256": tensors_digest((name, value) for name, value in adapter if ".lora_" not in name),
        "vision_sha256": tensors_digest(_vision_tensors(model)),
    }


def _vision_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for title in ("vision_tower", "multi_modal_projector"):
        for name, value in getattr(model, title).state_dict().items():
            yield f"{title}.{name}", value
