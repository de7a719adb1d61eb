"""The runtime of a GenieBlue: a Hub repository's code, importable as a package that registers the auto classes."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# `hub_cards` needs no more than `model_files_genieblue`. Where it came first, what takes seconds to import, torch and
# transformers, and the registration wait until a class is asked for.
if TYPE_CHECKING or "hub_cards" not in sys.modules:
    from .registration import (
        GenieBlueConfig,
        GenieBlueForConditionalGeneration,
        GenieBlueImageProcessor,
        GenieBlueMultiModalProjector,
        GenieBlueProcessor,
        QuantizedGenieBlueConfig,
        QuantizedGenieBlueForConditionalGeneration,
        QuantizedVlmGenieBlueConfig,
        QuantizedVlmGenieBlueForConditionalGeneration,
        VlmGenieBlueConfig,
        VlmGenieBlueForConditionalGeneration,
        VlmGenieBlueProcessor,
    )
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(".registration", __name__), name)


__all__ = [
    "GenieBlueConfig",
    "GenieBlueForConditionalGeneration",
    "GenieBlueImageProcessor",
    "GenieBlueMultiModalProjector",
    "GenieBlueProcessor",
    "QuantizedGenieBlueConfig",
    "QuantizedGenieBlueForConditionalGeneration",
    "QuantizedVlmGenieBlueConfig",
    "QuantizedVlmGenieBlueForConditionalGeneration",
    "VlmGenieBlueConfig",
    "VlmGenieBlueForConditionalGeneration",
    "VlmGenieBlueProcessor",
]
