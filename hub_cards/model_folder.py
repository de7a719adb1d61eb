"""Reads a saved GenieBlue's folder without loading the model: configuration, weight headers, sizes."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError

from modeling_genieblue.model_files_genieblue import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    MODEL_TYPE,
    PEFT_PREFIX,
    QMAP_NAME,
    QUANT_METHOD,
    QUANTIZED_ADAPTER_NAME,
    WEIGHTS_NAME,
    ModelFiles,
    is_hub_id,
    read_settings,
    weight_files,
)

ADAPTER_CONFIG = f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG_NAME}"
QMAPS = (QMAP_NAME, f"{ADAPTER_FOLDER}/{QMAP_NAME}")
# Formats of linears in mixed precision, as recorded.
EIGHT_BITS = "w8"
FORMAT_TITLES = {f"w4g{size}": f"4 bits in groups of {size}" for size in (128, 64, 32)} | {EIGHT_BITS: "8 bits"}
MIXED = "mixed"
BASE_PARTS = {"llm": "linears of the blocks", "lm_head": "LM head", "embeddings": "embeddings"}

# For each safetensors float format: the unsigned integer type of its width, and its exponent bits.
EXPONENTS = {"F64": ("<u8", 0x7FF << 52), "F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
NUMBERS_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part of the model, and their bytes on disk."""

    parameters: int = 0
    bytes: int = 0

    def __add__(self, other: "PartSize") -> "PartSize":
        return PartSize(self.parameters + other.parameters, self.bytes + other.bytes)


def read_model_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a GenieBlue; `OSError` if it is missing or damaged, `ValueError` for another kind of model."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}: give the folder of a saved GenieBlue.")
    return check_is_genieblue(read_settings(path), path)


def check_is_genieblue(config: dict[str, Any], where: str | os.PathLike) -> dict[str, Any]:
    """`config`, or `ValueError` if it describes another kind of model."""
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{where} has model_type {config.get('model_type')!r}, expected {MODEL_TYPE!r}: give a GenieBlue."
        )
    return config


def copied_share(copied: Sequence[int], num_blocks: int | None, has_vlm: bool) -> str:
    """Whether `no`, `some` or `all` blocks are copies; only a GenieBlue of a VLM can have others than `some`."""
    if not has_vlm or 0 < len(copied) != num_blocks:
        return "some"
    return "all" if copied else "no"


def lora_ranks(config: dict[str, Any]) -> tuple[int, int] | None:
    """The least and the largest rank of LoRA; `None` if there is none, since all blocks are copied."""
    num_blocks = (config.get("text_config") or {}).get("num_hidden_layers")
    if len(config.get("replicated_layers") or []) == num_blocks:
        return None
    ranks = {config.get("lora_rank"), *(config.get("rank_pattern") or {}).values()} - {None}
    return (min(ranks), max(ranks)) if ranks else None


def lora_in_words(config: dict[str, Any]) -> str:
    """`LoRA of rank 8`, `LoRA of rank 8 to 13`, or `no LoRA`."""
    ranks = lora_ranks(config)
    return "no LoRA" if ranks is None else f"LoRA of rank {' to '.join(map(str, dict.fromkeys(ranks)))}"


def read_base_quantization(folder: Path) -> dict[str, Any] | None:
    """Quantization settings of a base that GenieBlue quantized; `None` for any other folder.

    Raises `OSError` for a damaged `config.json`.
    """
    path = folder / CONFIG_NAME
    quantization = read_settings(path).get("quantization_config") if path.is_file() else None
    is_ours = isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD
    return quantization if is_ours else None


def check_is_quantized_base(folder: Path) -> dict[str, Any]:
    """Quantization settings of a base that GenieBlue quantized; `ValueError` for any other folder."""
    settings = read_base_quantization(folder)
    if settings is None:
        raise ValueError(
            f"{folder} is not a base quantized by GenieBlue: give a folder written by `genieblue quantize`."
        )
    return settings


def without_path(origin: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The record of the model that the one in `folder` was made from, without a local path, to be published."""
    name = origin.get("name")
    if not isinstance(name, str) or (is_hub_id(name, folder) and "/" in name):
        return origin
    return {**origin, "name": "../" + os.path.basename(os.path.normpath(name))}


def count_formats(formats: dict[str, str] | None) -> str:
    """How many linears have which format in mixed precision; empty if there are none."""
    counts = Counter((formats or {}).values())
    return ", ".join(f"{counts[one]} at {title}" for one, title in FORMAT_TITLES.items() if counts[one])


def shown_precisions(recorded: Mapping[str, Any]) -> dict[str, str]:
    """The precision of each part as recorded, but `mixed` for blocks whose linears have 4 or 8 bits each."""
    shown = {part: value for part, value in recorded.items() if isinstance(value, str) and value[0] == "w"}
    for part, is_replicated in (("llm", False), ("replicated_blocks", True)):
        formats = (recorded.get("formats") or {}).items()
        own = {one for name, one in formats if name.startswith(PEFT_PREFIX) == is_replicated}
        if EIGHT_BITS in own:
            shown[part] = MIXED if len(own) > 1 else "w8a16"
    return shown


def precision_tags(shown: Mapping[str, str]) -> list[str]:
    """What a quantized model is found by."""
    return ["mixed-precision" if one == MIXED else one for one in shown.values() if one != "w16a16"]


def own_weight_files(model: str | os.PathLike, find: Callable[[str], Path | None] | None = None) -> list[str]:
    """Names of a model's own weight files; `OSError` if they or their index are incomplete.

    `find` gives the path of a file, or `None`; by default in the folder `model`.
    """
    if files := weight_files(find or ModelFiles(model).find):
        return list(files)
    raise FileNotFoundError(f"{model} has neither {WEIGHTS_NAME} nor {INDEX_NAME}: save or download it again.")


def read_tensor_sizes(path: Path) -> dict[str, PartSize]:
    """Size of each tensor in a safetensors file, from its header alone.

    Raises `OSError` if the file is missing, is not safetensors, or is longer or shorter than its header says.
    """
    try:
        tensors = parse_local_safetensors_file_metadata(path).tensors
        sizes = {name: stored_size(tensor) for name, tensor in tensors.items()}
    except (SafetensorsParsingError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OSError(f"{path} has no readable safetensors header ({error}): save or download it again.") from error
    with path.open("rb") as file:
        header_bytes = 8 + int.from_bytes(file.read(8), "little")
    expected = header_bytes + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if path.stat().st_size != expected:
        raise OSError(
            f"{path} has {path.stat().st_size:,} bytes, its header describes {expected:,}: it is truncated or "
            "damaged; save or download it again."
        )
    return sizes


def stored_size(tensor: Any) -> PartSize:
    """Size of a tensor as a safetensors header describes it."""
    return PartSize(tensor.parameter_count, tensor.data_offsets[1] - tensor.data_offsets[0])


def are_zero(path: Path, names: list[str]) -> bool:
    """Whether these tensors in a safetensors file are all zero."""
    tensors = parse_local_safetensors_file_metadata(path).tensors
    return not any(piece.any() for name in names for piece in _pieces(path, tensors[name], "u1"))


def not_finite(path: Path) -> list[str]:
    """Names of tensors in a safetensors file that contain NaN or infinity."""
    broken = []
    for name, tensor in parse_local_safetensors_file_metadata(path).tensors.items():
        if tensor.dtype in EXPONENTS:
            integers, exponent = EXPONENTS[tensor.dtype]
            # All bits of the exponent are ones only in NaN and infinity.
            if any(((piece & exponent) == exponent).any() for piece in _pieces(path, tensor, integers)):
                broken.append(name)
    return sorted(broken)


def _pieces(path: Path, tensor: Any, dtype: str) -> Iterator[np.ndarray]:
    """The bytes of a tensor in a safetensors file, read as numbers of `dtype`, a piece at a time.

    NumPy has no bfloat16, and torch is not needed for a look at bits.
    """
    start, end = tensor.data_offsets
    count = (end - start) // np.dtype(dtype).itemsize
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little") + start)
        for done in range(0, count, NUMBERS_AT_A_TIME):
            yield np.fromfile(file, dtype, min(NUMBERS_AT_A_TIME, count - done))


def adapter_weights(config: dict[str, Any]) -> str:
    """Path of the adapter's weights; quantized ones have a name that stock PEFT ignores."""
    name = ADAPTER_WEIGHTS_NAME if config.get("quantization") is None else QUANTIZED_ADAPTER_NAME
    return f"{ADAPTER_FOLDER}/{name}"


def parameter_sizes(path: Path) -> dict[str, PartSize]:
    """Like `read_tensor_sizes`, but counts parameters of the model: see `as_parameters`."""
    return {name: as_parameters(name, size) for name, size in read_tensor_sizes(path).items()}


def as_parameters(name: str, size: PartSize) -> PartSize:
    """Size of a stored tensor in model parameters: two per byte at 4 bits, none for scales and zero points."""
    if name.endswith("._data._data"):
        return PartSize(2 * size.parameters, size.bytes)
    if name.endswith(("._scale", "._shift", ".input_scale", ".output_scale")):
        return PartSize(0, size.bytes)
    return size


def sum_by_part(own: Iterable[dict[str, PartSize]], adapter: dict[str, PartSize]) -> dict[str, PartSize]:
    """Parameters and bytes of each part, from the sizes of the tensors in the model's own files and in its adapter."""
    named = [(name.split(".", 1)[0], size) for sizes in own for name, size in sizes.items()]
    named = [(part, size) for part, size in named if part != "multimodal_language_model"]  # in a checkpoint: it again
    named += [("lora" if ".lora_" in name else "replicated_blocks", size) for name, size in adapter.items()]
    parts: dict[str, PartSize] = {}
    for part, size in named:
        parts[part] = parts.get(part, PartSize()) + size
    return parts


def count_parts(folder: Path) -> dict[str, PartSize]:
    """Parameters and bytes of each part in the folder, which does not include the base.

    Raises `OSError` for a missing or damaged weight file.
    """
    own = (parameter_sizes(folder / file) for file in own_weight_files(folder))
    return sum_by_part(own, parameter_sizes(folder / adapter_weights(read_model_config(folder))))
