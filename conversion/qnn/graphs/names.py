"""Names shared by export, runner and verification. Plain Python."""

VIEWS = ("text", "multimodal")
LORA_MODES = ("constants", "inputs")
ROUNDINGS = ("rtn", "seqmse")
BASE_BITS, LORA_BITS = 4, 8
STAGES = ("prefill", "decode")
# Outputs of the float graph: with its own weights, and with the values of their codes.
EXACT, ROUNDED = "exact", "rounded"
UNFINISHED = ".unfinished"  # suffix of files and folders until they are complete


def is_lora(name: str) -> bool:
    """Whether a weight belongs to LoRA."""
    return name.endswith((".lora_a", ".lora_b"))


def weight_bits(name: str) -> int:
    """Bits of a matrix of a decoder graph by its name."""
    return LORA_BITS if is_lora(name) else BASE_BITS
