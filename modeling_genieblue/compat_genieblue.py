"""Differences between versions of libraries: versions that are too old, and the two names of a cache.

A library that is too old is reported in one sentence, before an import fails on something it lacks. An old version is
recognised by features, never by its number, so that no newer version can be refused by mistake.

transformers 5.24 renamed the argument `past_key_values` to `cache`; remote code of a base keeps the old name.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

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
        raise _too_old("peft", "0.18", f" ({error})") from None
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


def cache_argument(function: Callable) -> str:
    """The name under which a model's method takes a cache."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


def cache_field(kind: Any) -> str:
    """The name of the cache in an output object, or in a class of them."""
    return "cache" if hasattr(kind, "cache") else "past_key_values"


# The name under which transformers' `generate` takes and hands on a cache.
CACHE = cache_field(CausalLMOutputWithPast)


def takes_cache_of_generate(model: Any) -> bool:
    """Whether `generate` can hand its cache to a model, whose own code may know only the other name."""
    return cache_argument(model.prepare_inputs_for_generation) == CACHE


def adapt_to_cache_of_generate(view: Any) -> None:
    """Hands `view` the cache of `generate` under the name that its own code knows.

    Code that misses its cache takes every step for the first one, and answers the prompt's embeddings again and again.
    """
    if not takes_cache_of_generate(view):
        view.prepare_inputs_for_generation = _PreparesWithOtherName(view.prepare_inputs_for_generation)
    if (name := cache_argument(view.forward)) != CACHE:
        view.register_forward_pre_hook(functools.partial(_rename_cache, name), with_kwargs=True)


class _PreparesWithOtherName:
    """`prepare_inputs_for_generation` of a view with the signature that `generate` reads, but for the cache's name.

    An object, because a deep copy of the view copies it along; a closure would stay with the first view.
    """

    def __init__(self, prepare: Callable[..., dict[str, Any]]):
        self._prepare, self._name = prepare, cache_argument(prepare)
        signature = inspect.signature(prepare)
        parameters = [
            each.replace(name=CACHE) if each.name == self._name else each for each in signature.parameters.values()
        ]
        self.__signature__ = signature.replace(parameters=parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._prepare(*args, **{self._name: take_cache(kwargs)}, **kwargs)


def _rename_cache(name: str, _view: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook: the cache comes as `name`."""
    cache = take_cache(kwargs)
    return args, kwargs if cache is None else {**kwargs, name: cache}
