"""Exports another LoRA for a bundle that takes it as inputs: one binary, several adapters.

The replicated blocks, the vision tower and the projector are part of the binaries, so that adapters of one bundle
differ in their LoRA alone. The scales of the inputs are the bundle's, since they are compiled; a file holds them too,
which tells it from those of other bundles.
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
from conversion.qnn.graphs.names import UNFINISHED, is_lora, weight_bits
from conversion.qnn.qdq.encoding import WeightCodes, round_with_scales
from modeling_genieblue import GenieBlueConfig, GenieBlueForConditionalGeneration, QuantizedGenieBlueConfig
from modeling_genieblue.model_files_genieblue import HUB_KEYS

logger = logging.getLogger(__name__)
# Share of the LoRA values that may lie beyond the scales of the bundle, and are cut.
LARGEST_CUT = 0.01


def adapter_entries(part: int, codes: Mapping[str, WeightCodes]) -> dict[str, np.ndarray]:
    """The int8 arrays of a part's LoRA and their scales, by the names that they have in an adapter file."""
    entries = {}
    for name, weight in codes.items():
        if is_lora(name):
            entries[f"{part}/{name}"] = weight.codes
            entries[f"{part}/{scale_name(name)}"] = np.asarray(weight.scales, np.float32)
    return entries


def export_adapter(
    model_folder: str | os.PathLike, bundle_folder: str | os.PathLike, out: str | os.PathLike, **load_options: Any
) -> Path:
    """Writes the LoRA of a saved GenieBlue as a file that the graphs of a bundle take; returns that file.

    Args:
        model_folder: folder or Hub id of a GenieBlue that differs in its LoRA alone from the one of the bundle.
        load_options: of `GenieBlueForConditionalGeneration.from_pretrained`.

    Raises `ValueError` for a bundle with LoRA as constants, for a quantized model, for one with another base, other
    replicated blocks, vision tower, projector or LoRA, and when more than 1 % of its values lie beyond the scales of
    the bundle; `OSError` if `out` is taken or its folder is missing.
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
        raise ValueError(f"{model_folder} was made for another base than {bundle_folder}: its LoRA would not fit.")
    model = GenieBlueForConditionalGeneration.from_pretrained(model_folder, **load_options)
    if model.multimodal_language_model is None:
        raise ValueError(f"{model_folder} has no adapter: give a saved GenieBlue, with its base.")
    _check_binaries(facts["adapter"], trained_digests(model), str(model_folder))
    entries, cut, total = {}, 0, 0
    for number, part in enumerate(facts["parts"]):
        inputs = bundle.lora_inputs(number, "multimodal")
        graph = DecoderGraph(model.multimodal_language_model, bundle.decoder, *part["blocks"])
        lora = {name: value.cpu().numpy() for name, value in graph.named_buffers() if is_lora(name)}
        if {name: list(value.shape) for name, value in lora.items()} != {
            name: tensor["shape"] for name, tensor in inputs.items()
        }:
            raise ValueError(
                f"{model_folder} has LoRA of rank {config.lora_rank} in {len(lora)} matrices of blocks "
                f"{part['blocks'][0]} to {part['blocks'][1] - 1}; the bundle takes {len(inputs)} of rank "
                f"{facts['adapter']['lora_rank']}, of other names or shapes: export a bundle of its own."
            )
        codes = {}
        for name, weight in lora.items():
            scale = np.float32(inputs[name]["scale"])
            codes[name] = round_with_scales(weight, scale, weight_bits(name), None)
            cut += int((np.abs(weight) > 127.5 * scale).sum())
            total += weight.size
        entries |= adapter_entries(number, codes)
    _check_cut(cut, total, str(model_folder))
    _write(out, entries)
    return out


def _check_output(out: Path, bundle: Bundle) -> None:
    if out.exists():
        raise FileExistsError(f"{out} is taken: give the name of a new file.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"The folder {out.parent} is not there: make it, or give another place for the file.")
    if out.resolve().is_relative_to(bundle.folder.resolve()):
        raise ValueError(f"{out} lies in the bundle, which must stay as it was exported: give a place outside of it.")


def _check_binaries(expected: Mapping[str, Any], found: Mapping[str, str], name: str) -> None:
    """`ValueError` if anything that the binaries hold is another model's."""
    for key, title in (("copies_sha256", "replicated blocks"), ("vision_sha256", "vision tower or projector")):
        if found[key] != expected[key]:
            raise ValueError(
                f"{name} has other {title} than the bundle, and those are part of its binaries: export a bundle of "
                "its own."
            )


def _check_cut(cut: int, total: int, name: str) -> None:
    """`ValueError` if so many values were cut that the file would be another adapter; a warning for fewer."""
    if not cut:
        return
    told = f"{cut} of {total} LoRA values of {name} ({cut / total:.2%}) are larger than the bundle's scales can say"
    if cut > LARGEST_CUT * total:
        raise ValueError(
            f"{told}; at most {LARGEST_CUT:.0%} may be cut: export the bundle with the adapter of the largest values."
        )
    logger.warning("%s, and were cut: it was exported with an adapter of smaller ones.", told)


def _write(out: Path, entries: Mapping[str, np.ndarray]) -> None:
    """Writes an adapter file as a whole or not at all."""
    unfinished = out.with_name(out.name + UNFINISHED)
    try:
        with unfinished.open("wb") as file:
            np.savez(file, **entries)
        os.replace(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)
