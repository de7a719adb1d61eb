"""Reports libraries that are too old in one sentence, before an import fails on something they lack.

An old version is recognised by features, never by its number, so that no newer version can be refused by mistake.
"""

import dataclasses
from importlib.metadata import PackageNotFoundError, version

import transformers


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


__all__ = ["require_peft", "require_transformers"]
