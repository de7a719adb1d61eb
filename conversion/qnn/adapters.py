"""Exports another LoRA for a bundle that takes it as inputs: one binary, several adapters.

The replicated blocks, the vision tower and the projector are part of the binaries, so adapters for one bundle differ
only in their LoRA. The scales of these inputs are compiled, so they are the bundle's; an adapter file records them, so
that it is not used with another bundle.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conversion.qnn.bundle.digests import trained_digests
from conversion.qnn.bundle.metadata import Bundle, scale_name
from conversion.qnn.graphs.decoder_graph import DecoderGraph
from conversion.qnn.graphs.names import is_lora
from conversion.qnn.graphs.rotation import Rotation
from conversion.qnn.qdq.block_rounding import LORA_BITS
from conversion.qnn.qdq.encoding import WeightCodes, round_with_scales
from conversion.staging import UNFINISHED
from conversion.unchanged import check_unchanged
from modeling_genieblue import GenieBlueConfig, GenieBlueForConditionalGeneration, QuantizedGenieBlueConfig
from modeling_genieblue.model_files_genieblue import HUB_KEYS

logger = logging.getLogger(__name__)
# Share of the LoRA values that may exceed the range of the bundle's scales, and are clipped.
LARGEST_CLIPPED = 0.01


def adapter_entries(part: int, codes: Mapping[str, WeightCodes]) -> dict[str, np.ndarray]:
    """The int8 arrays of a part's LoRA and their scales, by their names in an adapter file."""
    entries = {}
    for name, weight in codes.items():
        if is_lora(name):
            entries[f"{part}/{name}"] = weight.codes
            entries[f"{part}/{scale_name(name)}"] = np.asarray(weight.scales, np.float32)
    return entries


def export_adapter(
    model_folder: str | os.PathLike, bundle_folder: str | os.PathLike, out: str | os.PathLike, **load_options: Any
) -> Path:
    """Writes the LoRA of a saved GenieBlue as an adapter file for a bundle; returns that file.

    Args:
        model_folder: folder or Hub id of a GenieBlue that differs from the exported one only in its LoRA.
        load_options: of `GenieBlueForConditionalGeneration.from_pretrained`.

    Raises `ValueError` for a bundle with LoRA as constants, a quantized model, a model with a different base,
    replicated blocks, vision tower, projector or shape of LoRA, and if more than 1 % of its values exceed the range of
    the bundle's scales; `OSError` if `out` exists or its folder does not.
    """
    out, bundle = Path(out), Bundle(bundle_folder)
    facts = bundle.metadata
    _check_output(out, bundle)
    if facts["adapter"]["lora"] != "inputs":
        raise ValueError(
            f"The LoRA of {bundle_folder} is part of its binaries: export the bundle with `lora='inputs'` (--lora "
            "inputs) to use several adapters with it."
        )
    hub = {key: load_options[key] for key in HUB_KEYS if load_options.get(key) is not None}
    config = GenieBlueConfig.from_pretrained(model_folder, **hub)
    if isinstance(config, QuantizedGenieBlueConfig):
        raise ValueError(f"{model_folder} is quantized: give the GenieBlue in 16 bits that it was made from.")
    if config.base_model_fingerprint != facts["base"]["fingerprint"]:
        raise ValueError(f"{model_folder} and {bundle_folder} were made from different bases: the LoRA would not fit.")
    check_unchanged(model_folder, base_model=load_options.get("base_model"), subfolder=hub.get("subfolder"))
    model = GenieBlueForConditionalGeneration.from_pretrained(model_folder, **load_options)
    _check_binaries(facts["adapter"], trained_digests(model), str(model_folder))
    rotation = Rotation(bundle.decoder.hidden_size)
    entries, clipped, total = {}, 0, 0
    for number, part in enumerate(facts["parts"]):
        inputs = bundle.lora_inputs(number, "multimodal")
        graph = DecoderGraph(model.multimodal_language_model, bundle.decoder, *part["blocks"], rotation=rotation)
        lora = {name: value.cpu().numpy() for name, value in graph.named_buffers() if is_lora(name)}
        if {name: list(value.shape) for name, value in lora.items()} != {
            name: tensor["shape"] for name, tensor in inputs.items()
        }:
            raise ValueError(
                f"{model_folder} has LoRA of rank {config.lora_rank} in {len(lora)} matrices of blocks "
                f"{part['blocks'][0]} to {part['blocks'][1] - 1}; the bundle takes {len(inputs)} matrices of rank "
                f"{facts['adapter']['lora_rank']} with other names or shapes: export a separate bundle."
            )
        codes = {}
        for name, weight in lora.items():
            scale = np.float32(inputs[name]["scale"])
            codes[name] = round_with_scales(weight, scale, LORA_BITS, None)
            clipped += int((np.abs(weight) > 127.5 * scale).sum())
            total += weight.size
        entries |= adapter_entries(number, codes)
    _check_clipped(clipped, total, str(model_folder))
    _write(out, entries)
    return out


def _check_output(out: Path, bundle: Bundle) -> None:
    if out.exists():
        raise FileExistsError(f"The output {out} already exists: give the name of a new file.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"The folder {out.parent} does not exist: create it, or give another output file.")
    if out.resolve().is_relative_to(bundle.folder.resolve()):
        raise ValueError(f"{out} is inside the bundle, which must stay as it was exported: give a file outside.")


def _check_binaries(expected: Mapping[str, Any], found: Mapping[str, str], name: str) -> None:
    """`ValueError` if anything in the binaries differs from the model's."""
    for key, title in (("copies_sha256", "replicated blocks"), ("vision_sha256", "vision tower and projector")):
        if found[key] != expected[key]:
            raise ValueError(
                f"{name} does not have the bundle's {title}, which are part of its binaries: export a separate bundle."
            )


def _check_clipped(clipped: int, total: int, name: str) -> None:
    """`ValueError` if so many values were clipped that the file would be another adapter; a warning for fewer."""
    if not clipped:
        return
    found = f"{clipped} of {total} LoRA values of {name} ({clipped / total:.2%}) exceed the bundle's scales"
    if clipped > LARGEST_CLIPPED * total:
        raise ValueError(
            f"{found}; at most {LARGEST_CLIPPED:.0%} may be clipped: export the bundle with the adapter that has the "
            "largest values."
        )
    logger.warning("%s and were clipped: the bundle was exported with an adapter of smaller values.", found)


def _write(out: Path, entries: Mapping[str, np.ndarray]) -> None:
    """Writes an adapter file atomically."""
    unfinished = out.with_name(out.name + UNFINISHED)
    try:
        with unfinished.open("wb") as file:
            np.savez(file, **entries)
        if out.exists():  # another run may have made it since
            raise FileExistsError(f"The output {out} already exists: give the name of a new file.")
        os.replace(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)
