"""Configuration of a GenieBlue with quantized weights."""

from typing import Any

from .configuration_genieblue import GenieBlueConfig, name_model_class
from .quantized_settings_genieblue import check_quantization


class QuantizedGenieBlueConfig(GenieBlueConfig):
    r"""A `GenieBlueConfig`, and the precision of each part.

    Args:
        quantization: by part `w4a16`, `w8a16` or `w16a16`, the number format of the activations, how it was rounded.
    """

    quantization: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.quantization is not None:
            check_quantization(self.quantization)

    @classmethod
    def describes(cls, settings: dict[str, Any]) -> bool:
        """Whether settings are those of a quantized GenieBlue."""
        return settings.get("quantization") is not None


QuantizedGenieBlueConfig.register_for_auto_class()
# The model type is the same, and the table has one class for each: the class's name is what matters.
name_model_class(f"quantized_{QuantizedGenieBlueConfig.model_type}", "QuantizedGenieBlueForConditionalGeneration")
