"""Names shared by export, runner and verification. Plain Python."""

VIEWS = ("text", "multimodal")
LORA_MODES = ("constants", "inputs")
ROUNDINGS = ("rtn", "seqmse")
BASE_BITS, LORA_BITS = 4, 8
STAGES = ("prefill", "decode")
# In the names of what the float graph says: with its own weights, and with those that the codes stand for.
EXACT, ROUNDED = "exact", "rounded"
UNFINISHED = ".unfinished"  # ending of what is being written, and gets its name when it is whole


def is_lora(name: str) -> bool:
    """Whether a weight belongs to LoRA."""
    return name.endswith((".lora_a", ".lora_b"))


def weight_bits(name: str) -> int:
    """Bits of a matrix of a decoder graph by its name."""
    return LORA_BITS if is_lora(name) else BASE_BITS
