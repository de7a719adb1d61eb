"""The runtime's classes; importing this registers them with transformers' auto classes."""

import contextlib

from .compat_genieblue import require_transformers

require_transformers()

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_genieblue import GenieBlueConfig
from .image_processing_genieblue import GenieBlueImageProcessor
from .modeling_genieblue import GenieBlueForConditionalGeneration
from .processing_genieblue import GenieBlueProcessor
from .projector_genieblue import GenieBlueMultiModalProjector
from .quantized_configuration_genieblue import QuantizedGenieBlueConfig
from .quantized_modeling_genieblue import QuantizedGenieBlueForConditionalGeneration
from .quantized_vlm_configuration_genieblue import QuantizedVlmGenieBlueConfig
from .quantized_vlm_modeling_genieblue import QuantizedVlmGenieBlueForConditionalGeneration
from .vlm_configuration_genieblue import VlmGenieBlueConfig
from .vlm_modeling_genieblue import VlmGenieBlueForConditionalGeneration
from .vlm_processing_genieblue import VlmGenieBlueProcessor

AutoConfig.register(GenieBlueConfig.model_type, GenieBlueConfig, exist_ok=True)
for _config, _model in (
    (GenieBlueConfig, GenieBlueForConditionalGeneration),
    (QuantizedGenieBlueConfig, QuantizedGenieBlueForConditionalGeneration),
):
    with contextlib.suppress(ImportError):  # older versions want torchvision, which GenieBlue has no use for
        AutoImageProcessor.register(_config, GenieBlueImageProcessor, exist_ok=True)
    AutoProcessor.register(_config, GenieBlueProcessor, exist_ok=True)
    for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        _auto_class.register(_config, _model, exist_ok=True)
for _config, _model in (
    (VlmGenieBlueConfig, VlmGenieBlueForConditionalGeneration),
    (QuantizedVlmGenieBlueConfig, QuantizedVlmGenieBlueForConditionalGeneration),
):
    AutoProcessor.register(_config, VlmGenieBlueProcessor, exist_ok=True)
    for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        _auto_class.register(_config, _model, exist_ok=True)

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
