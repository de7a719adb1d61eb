"""How a quantized model records the precision of each part."""

from typing import Any

from .model_files_genieblue import QUANT_METHOD

# What a precision is recorded for: in a quantized base, and in a quantized GenieBlue.
BASE_PARTS = ("llm", "lm_head", "embeddings")
QUANTIZED_PARTS = (*BASE_PARTS, "replicated_blocks", "lora", "vision_tower", "multi_modal_projector")
PRECISIONS = ("w4a16", "w8a16", "w16a16")
ACTIVATIONS = ("bfloat16", "float16", "float32")


def is_our_quantization(settings: Any) -> bool:
    """Whether the `quantization_config` of a base is one that GenieBlue wrote."""
    return isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD


def check_quantization(
    quantization: Any, parts: tuple[str, ...] = QUANTIZED_PARTS, where: str = "`quantization`"
) -> None:
    """`ValueError` unless every part has one of the precisions, and the activations have one of the number formats."""
    if not isinstance(quantization, dict):
        raise ValueError(f"{where} is {quantization!r}: expected a precision for each of {', '.join(parts)}.")
    for name, allowed in (*((part, PRECISIONS) for part in parts), ("activations", ACTIVATIONS)):
        if quantization.get(name) not in allowed:
            raise ValueError(
                f"{where} has {quantization.get(name)!r} for {name}: expected one of {', '.join(allowed)}. The file "
                "is damaged; fetch it again."
            )
