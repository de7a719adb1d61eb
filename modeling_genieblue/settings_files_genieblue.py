"""JSON files that come with a model: read as settings, and refused by name when they hold something else."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

# What a precision is recorded for: in a quantized base, and in a quantized GenieBlue.
BASE_PARTS = ("llm", "lm_head", "embeddings")
QUANTIZED_PARTS = (*BASE_PARTS, "replicated_blocks", "lora", "vision_tower", "multi_modal_projector")
PRECISIONS = ("w4a16", "w8a16", "w16a16")
ACTIVATIONS = ("bfloat16", "float16", "float32")
# Where files come from: the same for our repository and the base's, but for the revision and the subfolder.
SHARED_HUB_KEYS = ("token", "cache_dir", "local_files_only", "force_download", "proxies")
HUB_KEYS = (*SHARED_HUB_KEYS, "revision", "subfolder")
# By file, a setting without which it is not what its name says.
PROCESSOR_FILES = {"processor_config.json": "image_token_id", "tokenizer_config.json": None, "tokenizer.json": "model"}

# By setting of a GenieBlue's config.json, what it holds where it is not null; a map of code is never null.
CONFIG_KINDS = {
    "text_config": dict, "vision_config": dict, "base_model_name_or_path": str, "base_model_revision": str,
    "base_model_fingerprint": dict, "lora_dropout": (int, float), "dtype": str, "auto_map": dict,
}  # fmt: skip


def read_settings(path: str | os.PathLike, needed: Iterable[str] = ()) -> dict[str, Any]:
    """The JSON object in a file; `OSError` that names the file if it holds anything else, or lacks what is needed."""
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} cannot be read ({error}): it is damaged; fetch it again.") from error
    if not isinstance(settings, dict):
        kind = type(settings).__name__
        raise OSError(f"{path} holds a JSON {kind}, expected settings by name: it is damaged; fetch it again.")
    if lacking := [name for name in needed if name not in settings]:
        raise OSError(f"{path} has no {', '.join(lacking)}: it is damaged, or of another model; fetch it again.")
    return settings


def refuse_broken_settings(
    source: str | os.PathLike, files: dict[str, str | None], required: str | None = None, **kwargs: Any
) -> None:
    """`OSError` if one of `files` of a folder or Hub id is there and broken, or a folder lacks the `required` one."""
    if required is not None and os.path.isdir(source):
        if not os.path.isfile(os.path.join(source, kwargs.get("subfolder") or "", required)):
            raise FileNotFoundError(f"{source} has no {required}: it is incomplete; save or fetch it again.")
    hub_kwargs = {key: kwargs[key] for key in HUB_KEYS if kwargs.get(key) is not None}
    lenient = ("gated_repo", "missing_entries", "connection_errors")
    hub_kwargs |= {f"_raise_exceptions_for_{problem}": False for problem in lenient}
    for name, needed in files.items():
        if (path := cached_file(source, name, **hub_kwargs)) is not None:
            read_settings(path, [needed] if needed else [])


def check_config_kinds(settings: dict[str, Any], where: str | os.PathLike) -> None:
    """`OSError` that names `where` if a setting of a GenieBlue's config.json is of a kind that it cannot be."""
    for name, kind in CONFIG_KINDS.items():
        value = settings.get(name)
        if not isinstance(value, kind) and (value is not None or name == "auto_map" and name in settings):
            expected = {dict: "settings by name", str: "a text"}.get(kind, "a number")
            raise OSError(f"{where} has {value!r} for {name}, expected {expected}: it is damaged; fetch it again.")


def check_quantization(
    quantization: Any, parts: tuple[str, ...] = QUANTIZED_PARTS, where: str = "`quantization`"
) -> None:
    """`ValueError` unless every part has one of the precisions, and the activations have one of the number formats."""
    if not isinstance(quantization, dict):
        raise ValueError(f"{where} is {quantization!r}: expected a precision for each of {', '.join(parts)}.")
    for part in parts:
        if quantization.get(part) not in PRECISIONS:
            raise ValueError(
                f"{where} has {quantization.get(part)!r} for {part}: expected one of {', '.join(PRECISIONS)}. "
                "The file is damaged; fetch it again."
            )
    if quantization.get("activations") not in ACTIVATIONS:
        raise ValueError(
            f"{where} has {quantization.get('activations')!r} for activations: expected one of "
            f"{', '.join(ACTIVATIONS)}. The file is damaged; fetch it again."
        )


__all__ = ["check_config_kinds", "check_quantization", "read_settings", "refuse_broken_settings"]
