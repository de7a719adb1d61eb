"""Differences between versions of libraries: versions that are too old, and the two names of a cache.

A library that is too old is reported in one sentence, before an import fails on something it lacks. An old version is
recognised by features, never by its number, so that no newer version can be refused by mistake.

transformers 5.24 renamed the argument `past_key_values` to `cache`; remote code of a base keeps the old name.
"""

import dataclasses
import inspect
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import transformers

CACHE_NAMES = ("past_key_values", "cache")


def require_transformers() -> None:
    """`ImportError` with transformers before 5.12."""
    if _is_old_transformers():
        raise _too_old("transformers", "5.12")


def _is_old_transformers() -> bool:
    if not dataclasses.is_dataclass(getattr(transformers, "PreTrainedConfig", None)):  # before 5.4
        return True
    from transformers import cache_utils, dynamic_module_utils

    # Before 5.10: copies the files that a folder's first code file imports, but not what these import in turn.
    code = dynamic_module_utils.get_cached_module_file.__code__
    if "modules_needed" in code.co_varnames and "get_relative_import_files" not in code.co_names:
        return True
    # Before 5.12: a static cache does not support all layer types that a dynamic one supports.
    static = hasattr(cache_utils, "LAYER_TYPE_STATIC_CACHE_MAPPING")
    return hasattr(cache_utils, "LAYER_TYPE_CACHE_MAPPING") and not static


def require_peft() -> None:
    """`ImportError` without peft, or with one before 0.18."""
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError as error:  # before 0.18 and from 0.16 on: it asks transformers for what version 5 has not
        raise _too_old("peft", "0.18", f" ({error})") from error
    if hasattr(LoraLayer, "dora_init"):  # before 0.16
        raise _too_old("peft", "0.18")


def _too_old(library: str, needed: str, reason: str = "") -> ImportError:
    try:
        found = f"{version(library)} is installed{reason}"
    except PackageNotFoundError:
        found = "none is installed"
    return ImportError(f"GenieBlue needs {library} {needed} or newer; {found}: pip install -U {library}", name=library)


def take_cache(arguments: dict[str, Any]) -> Any:
    """The cache among the arguments of a call, under either name, which is taken out; `ValueError` for both."""
    given = {name: arguments.pop(name) for name in CACHE_NAMES if name in arguments}
    caches = [cache for cache in given.values() if cache is not None]
    if len(caches) > 1:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: give one of them.")
    return caches[0] if caches else None


def cache_argument(model: Any) -> str:
    """The name under which the forward of a model takes its cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_field(kind: Any) -> str:
    """The name of the cache in an output object, or in a class of them."""
    return "cache" if hasattr(kind, "cache") else "past_key_values"


__all__ = ["cache_argument", "cache_field", "require_peft", "require_transformers", "take_cache"]
