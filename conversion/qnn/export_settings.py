"""The settings of an export: which are impossible, and in which a continued export must equal the one it continues."""

import importlib.metadata
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conversion.qnn.bundle.metadata import FORMAT_VERSION
from conversion.qnn.graphs.decoder_shape import check_lengths
from conversion.qnn.graphs.names import EMBEDDING_BITS, GROUP_SIZES, LORA_MODES, PRECISIONS, ROUNDINGS
from conversion.qnn.npu.sessions import check_libraries_installed, compiler_version, npu_devices
from conversion.qnn.npu.soc import Soc
from conversion.qnn.qdq.language import LanguageSettings
from conversion.qnn.qdq.quantize import CACHE_DTYPES
from modeling_genieblue import GenieBlueConfig, QuantizedGenieBlueConfig, VlmGenieBlueConfig

# Their versions, like the compiler's, determine the bytes of a bundle.
PROGRAMS = ("genieblue", "torch", "transformers", "numpy", "onnx", "onnxscript")
LONGEST_DEFAULT = 2048  # tokens of a context
MIXED_BITS = 5.0  # a weight, on average: the default of `mixed`


def check_arguments(out: Path, model: Path, settings: LanguageSettings, parts: int, vision_tiles: int) -> None:
    """`ValueError` or `OSError` for impossible settings, an output in use, and what is not installed."""
    if model.is_dir() and out.is_relative_to(model):
        raise ValueError(f"{out} is inside the model's folder, with which it would be published: give another folder.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} already exists: give a new folder for the bundle.")
    for name, allowed in (
        ("lora", LORA_MODES), ("llm", PRECISIONS), ("group_size", GROUP_SIZES), ("rounding", ROUNDINGS),
        ("cache_bits", CACHE_DTYPES), ("embedding_bits", EMBEDDING_BITS),
    ):  # fmt: skip
        if (value := getattr(settings, name)) not in allowed:
            raise ValueError(f"{_named(name)} is {value!r}: expected {' or '.join(map(str, allowed))}.")
    _check_bits(settings)
    for name, value in (("parts", parts), ("vision_tiles", vision_tiles)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{_named(name)} is {value!r}: expected a whole number of at least 1.")
    npu_devices()
    check_libraries_installed()  # torch imports onnxscript late, in the export itself


def _named(setting: str) -> str:
    """A setting by its names in Python and on the command line."""
    return f"`{setting}` (--{setting.replace('_', '-')})"


def _check_bits(settings: LanguageSettings) -> None:
    """`ValueError` for an average of bits that cannot be, and for a budget that has no use."""
    bits = settings.bits_per_weight
    for name in ("bits_per_weight", "max_bytes"):
        if getattr(settings, name) is not None and settings.llm != "mixed":
            raise ValueError(
                f"{_named(name)} belongs to `llm='mixed'` (--llm mixed): {settings.llm} has one precision for all."
            )
    if bits is None:
        return
    if settings.max_bytes is not None:
        raise ValueError(f"Give either {_named('bits_per_weight')} or {_named('max_bytes')}, not both.")
    least = settings.four_bits.bits_per_weight
    if not least <= bits <= 8:
        raise ValueError(f"{_named('bits_per_weight')} is {bits:g}: expected {least:g} ({settings.four_bits}) to 8.")


def choose_context_length(given: int | None, config: GenieBlueConfig) -> int:
    """The context that is `given`, or else the longest usual one that the base supports, in tokens."""
    if given is not None:
        return given
    limit = getattr(config.text_config, "max_position_embeddings", None) or LONGEST_DEFAULT
    return min(LONGEST_DEFAULT, limit)


def check_vision_side(config: GenieBlueConfig, name: str) -> None:
    """`ValueError` for a GenieBlue that sees with a VLM."""
    if isinstance(config, VlmGenieBlueConfig):
        raise ValueError(
            f"{name} sees with a whole VLM ({config.vlm_config.model_type}), whose vision side and positions the "
            "graphs do not know: only a GenieBlue with a SigLIP and a projector (`genieblue init`) is exported."
        )


def check_config(config: GenieBlueConfig, settings: LanguageSettings, parts: int, name: str) -> None:
    """`ValueError` for what the configuration shows at once, and the weights would only show much later."""
    check_vision_side(config, name)
    if isinstance(config, QuantizedGenieBlueConfig):
        raise ValueError(f"{name} is quantized: export the 16-bit GenieBlue that it was made from.")
    base = None if config.text_config is None else config.text_config.get_text_config(decoder=True)
    check_lengths(base, settings.chunk_length, settings.context_length)
    if settings.llm != "w8a16" and settings.group_size:
        for title, width in _widths(base).items():
            if width % settings.group_size:
                raise ValueError(
                    f"The base's {title} of {width} is no multiple of the group size {settings.group_size}: take "
                    "another one, or 0 for a scale per channel."
                )
    # A base with its own code may use another name: then the loaded base decides.
    if (count := getattr(base, "num_hidden_layers", None)) is not None:
        divide_blocks(count, parts)


def _widths(base: Any) -> dict[str, int]:
    """The numbers of inputs that the matrices of a base have, by what they are in its configuration."""
    widths = {title: getattr(base, title, 0) for title in ("hidden_size", "intermediate_size")}
    heads = getattr(base, "num_attention_heads", None) or 1  # a base with its own code may use another name
    head_dim = getattr(base, "head_dim", None) or widths["hidden_size"] // heads
    return {**widths, "num_attention_heads × head_dim": heads * head_dim}


def resumable_settings(soc: Soc, settings: LanguageSettings, parts: int, vision_tiles: int) -> dict[str, Any]:
    """The settings, without those of the model, in which an export must equal the one that it continues."""
    return {
        **asdict(settings),
        "soc": soc.name,
        "parts": parts,
        "vision_tiles": vision_tiles,
        "compiler": compiler_version(),
        "format": FORMAT_VERSION,
        **{f"version of {name}": _version(name) for name in PROGRAMS},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return None


def divide_blocks(count: int, parts: int) -> list[range]:
    """`count` blocks in `parts` consecutive ranges of nearly equal size; `ValueError` for more parts than blocks."""
    if parts > count:
        raise ValueError(f"Cannot make {parts} parts of the base's {count} blocks: give at most {count}.")
    ends = [count * number // parts for number in range(parts + 1)]
    return [range(first, last) for first, last in zip(ends, ends[1:], strict=False)]
