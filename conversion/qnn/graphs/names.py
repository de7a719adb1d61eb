"""Names shared by export, runner and verification. Plain Python."""

VIEWS = ("text", "multimodal")
LORA_MODES = ("constants", "inputs")
ROUNDINGS = ("rtn", "gptq")
PRECISIONS = ("w8a16", "w4a16", "mixed")  # of the base's matrices
GROUP_SIZES = (0, 32, 64, 128)  # inputs that share a scale in 4 bits; 0: all of an output channel
EMBEDDING_BITS = (16, 8)
STAGES = ("prefill", "decode")
# Outputs of the float graph: with its own weights, and with the values of their codes.
EXACT, ROUNDED = "exact", "rounded"


def is_lora(name: str) -> bool:
    """Whether a weight belongs to LoRA."""
    return name.endswith((".lora_a", ".lora_b"))
