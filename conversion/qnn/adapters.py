"""Other LoRA for a bundle whose graphs take it as inputs: one binary, several adapters.

The replicated blocks, the vision tower and the projector are part of the binaries, so that adapters of one bundle
differ in their LoRA alone. The scales of the inputs are the bundle's, since they are compiled.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conversion.qnn.bundle import Bundle
from conversion.qnn.decoder_graph import DecoderGraph
from conversion.qnn.encoding import WeightCodes, round_with_scales
from conversion.qnn.names import is_lora, weight_bits
from conversion.qnn.qdq_files import read_codes
from modeling_genieblue import GenieBlueForConditionalGeneration

logger = logging.getLogger(__name__)


def adapter_entries(part: int, codes: Mapping[str, WeightCodes]) -> dict[str, np.ndarray]:
    """The int8 arrays of a part's LoRA, by the names that they have in an adapter file."""
    return {f"{part}/{name}": weight.codes for name, weight in codes.items() if is_lora(name)}


def export_adapter(
    model_folder: str | os.PathLike, bundle_folder: str | os.PathLike, out: str | os.PathLike, **load_options: Any
) -> Path:
    """Writes the LoRA of a saved GenieBlue as a file that the graphs of a bundle take; returns that file.

    Args:
        model_folder: folder or Hub id of a GenieBlue that differs in its LoRA alone from the one of the bundle.
        load_options: of `GenieBlueForConditionalGeneration.from_pretrained`.

    Raises `ValueError` for a bundle with LoRA as constants, and for a model of another base or with other replicated
    blocks; `FileExistsError` if `out` is taken.
    """
    out, bundle = Path(out), Bundle(bundle_folder)
    if out.exists():
        raise FileExistsError(f"{out} is taken: give the name of a new file.")
    facts = bundle.metadata
    if facts["adapter"]["lora"] != "inputs":
        raise ValueError(
            f"The LoRA of {bundle_folder} is part of its binaries: export the bundle with `lora='inputs'` (--lora "
            "inputs) to use several adapters with it."
        )
    model = GenieBlueForConditionalGeneration.from_pretrained(model_folder, **load_options)
    if model.config.base_model_fingerprint != facts["base"]["fingerprint"]:
        raise ValueError(f"{model_folder} was made for another base than {bundle_folder}: its LoRA would not fit.")
    entries, clipped, total = {}, 0, 0
    for number, part in enumerate(facts["parts"]):
        record = part["graphs"]["multimodal_decode"]
        inputs = {tensor["name"]: tensor for tensor in record["inputs"]}
        graph = DecoderGraph(model.multimodal_language_model, bundle.decoder, *part["blocks"])
        weights = {name: value.cpu().numpy() for name, value in graph.named_buffers() if value.ndim == 2}
        _refuse_other_blocks(bundle.path(record["qdq"]), weights, str(model_folder))
        for name, weight in weights.items():
            if is_lora(name):
                if name not in inputs or list(weight.shape) != inputs[name]["shape"]:
                    raise ValueError(f"{model_folder} has another LoRA rank than the bundle ({name} {weight.shape}).")
                scale = np.float32(inputs[name]["scale"])
                entries[f"{number}/{name}"] = round_with_scales(weight, scale, weight_bits(name), None).codes
                clipped += int((np.abs(weight) > 127.5 * scale).sum())
                total += weight.size
    if clipped:
        logger.warning(
            "%d of %d LoRA values (%.2g %%) are larger than the bundle's scales can say, and were cut: it was "
            "exported with an adapter of smaller ones.", clipped, total, 100 * clipped / total,
        )  # fmt: skip
    unfinished = out.with_name(out.name + ".unfinished")
    with unfinished.open("wb") as file:
        np.savez(file, **entries)
    os.replace(unfinished, out)
    return out


def _refuse_other_blocks(qdq: Path, weights: Mapping[str, np.ndarray], name: str) -> None:
    """`ValueError` if the matrices in a bundle's graph are not those of the model, rounded."""
    for key, stored in read_codes(qdq).items():
        own = round_with_scales(weights[key], stored.scales, stored.bits, stored.axis)
        if not np.array_equal(own.codes, stored.codes):
            raise ValueError(
                f"{name} has other replicated blocks than the bundle ({key} differs), and those are part of its "
                "binaries: export a bundle of its own."
            )


__all__ = ["adapter_entries", "export_adapter"]
