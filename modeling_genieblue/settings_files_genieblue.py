"""JSON files that come with a model: read as settings, and refused by name when they hold something else."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

HUB_KEYS = ("token", "cache_dir", "local_files_only", "force_download", "proxies", "revision", "subfolder")
# By file, a setting without which it is not what its name says.
PROCESSOR_FILES = {"processor_config.json": "image_token_id", "tokenizer_config.json": None, "tokenizer.json": "model"}


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


def refuse_broken_settings(source: str | os.PathLike, files: dict[str, str | None], **kwargs: Any) -> None:
    """`OSError` if one of `files` of a folder or Hub id is there and broken; what is absent is not looked at."""
    hub_kwargs = {key: kwargs[key] for key in HUB_KEYS if kwargs.get(key) is not None}
    lenient = ("gated_repo", "missing_entries", "connection_errors")
    hub_kwargs |= {f"_raise_exceptions_for_{problem}": False for problem in lenient}
    for name, needed in files.items():
        if (path := cached_file(source, name, **hub_kwargs)) is not None:
            read_settings(path, [needed] if needed else [])


__all__ = ["read_settings", "refuse_broken_settings"]
