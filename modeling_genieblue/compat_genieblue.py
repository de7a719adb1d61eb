"""What differs between versions of libraries: too old ones, and the two names of a cache.

Libraries that are too old are named in one sentence, before an import fails on something that they lack. An old
version is known by a trait that later ones lost, never by its number: no newer one can be refused by mistake.

What transformers calls `cache` from 5.24 on was `past_key_values` before; code of a base's own goes on to call it so.
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

    # Before 5.10: of a folder's code it copies what the first file imports, but not what those files import in turn.
    code = dynamic_module_utils.get_cached_module_file.__code__
    if "modules_needed" in code.co_varnames and "get_relative_import_files" not in code.co_names:
        return True
    # Before 5.12: a static cache does not know all kinds of layers that a dynamic one knows.
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
