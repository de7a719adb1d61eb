"""The runtime of a GenieBlue: what a Hub repository carries, importable as a package and registered for `Auto…`."""

from .compat_genieblue import require_transformers

require_transformers()

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_genieblue import GenieBlueConfig
from .image_processing_genieblue import GenieBlueImageProcessor
from .modeling_genieblue import GenieBlueForConditionalGeneration
from .processing_genieblue import GenieBlueProcessor
from .projector_genieblue import GenieBlueMultiModalProjector

AutoConfig.register("genieblue", GenieBlueConfig, exist_ok=True)
AutoImageProcessor.register(GenieBlueConfig, GenieBlueImageProcessor, exist_ok=True)
AutoProcessor.register(GenieBlueConfig, GenieBlueProcessor, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(GenieBlueConfig, GenieBlueForConditionalGeneration, exist_ok=True)

__all__ = [
    "GenieBlueConfig",
    "GenieBlueForConditionalGeneration",
    "GenieBlueImageProcessor",
    "GenieBlueMultiModalProjector",
    "GenieBlueProcessor",
]
