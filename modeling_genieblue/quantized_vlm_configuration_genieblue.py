"""Configuration of a GenieBlue with a VLM whose language model is quantized."""

from typing import Any

from .configuration_genieblue import name_model_class
from .quantized_configuration_genieblue import QuantizedGenieBlueConfig
from .vlm_configuration_genieblue import VlmGenieBlueConfig


class QuantizedVlmGenieBlueConfig(QuantizedGenieBlueConfig, VlmGenieBlueConfig):
    """A `VlmGenieBlueConfig`, and the precision of each part; the VLM's vision side and connector have 16 bits."""

    @classmethod
    def describes(cls, settings: dict[str, Any]) -> bool:
        """Whether settings are those of a quantized GenieBlue with a VLM."""
        return QuantizedGenieBlueConfig.describes(settings) and VlmGenieBlueConfig.describes(settings)


QuantizedVlmGenieBlueConfig.register_for_auto_class()
# The model type is the same, and the table has one class for each: the class's name is what matters.
name_model_class(
    f"quantized_vlm_{QuantizedVlmGenieBlueConfig.model_type}", "QuantizedVlmGenieBlueForConditionalGeneration"
)
