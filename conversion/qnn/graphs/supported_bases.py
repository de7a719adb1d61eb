"""Which bases the QNN graphs reproduce, and the reason for each unsupported one."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from modeling_genieblue.language_adapter_genieblue import find_blocks

BLOCK_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Rotary embeddings whose frequencies depend on the length of the request, which a static graph cannot know.
DYNAMIC_ROPE_TYPES = ("dynamic", "longrope")


def check_structure(base: nn.Module, context_length: int) -> None:
    """`ValueError` that names everything in `base` that QNN graphs with this context cannot have."""
    config = base.config.get_text_config(decoder=True)
    reasons = [*_structure_problems(base), *_config_problems(config, context_length)]
    if reasons:
        raise ValueError(
            f"{type(base).__name__} cannot be exported to QNN: {'; '.join(reasons)}. Supported are Llama-style "
            "decoders, such as Llama, Mistral, Qwen2, Qwen3 and BlueLM."
        )


def _structure_problems(base: nn.Module) -> Iterator[str]:
    experts = [name for name, _ in base.named_modules() if "expert" in name.rsplit(".", 1)[-1]]
    if experts:
        yield f"it is a mixture of experts ({experts[0]}), and the NPU cannot route tokens"
        return
    _, blocks = find_blocks(base)
    block = blocks[0]
    for title, module, expected in (
        ("blocks", block, BLOCK_PARTS),
        ("attention", getattr(block, "self_attn", None), ATTENTION_PARTS),
        ("MLP", getattr(block, "mlp", None), MLP_PARTS),
    ):
        if module is None:
            continue
        found = {name for name, _ in module.named_children()}
        if extra := found - expected:
            yield f"its {title} have {', '.join(sorted(extra))}, which Llama-style {title} do not"
        if missing := expected - found - {"q_norm", "k_norm", "rotary_emb", "act_fn"}:
            yield f"its {title} lack {', '.join(sorted(missing))}"


def _config_problems(config: Any, context_length: int) -> Iterator[str]:
    activation = getattr(config, "hidden_act", "silu")
    if activation != "silu":
        yield f"its activation is {activation!r}, expected 'silu'"
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    if window is not None and slides and window < context_length:
        yield (
            f"its sliding window of {window} tokens is shorter than the context of {context_length} (use a context "
            "no longer than the window)"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in DYNAMIC_ROPE_TYPES:
        yield f"its rotary embedding is of type {kind!r}, which changes with the length of a request"


def rotary_frequencies(base: nn.Module) -> tuple[torch.Tensor, float]:
    """Radians per position, (head_dim / 2,), and the factor on cosine and sine; `ValueError` if there are none."""
    config = base.config.get_text_config(decoder=True)
    rotary = next((module for name, module in base.named_modules() if name.endswith("rotary_emb")), None)
    frequencies = getattr(rotary, "inv_freq", None)
    if frequencies is None:
        raise ValueError(f"{type(base).__name__} has no rotary embedding with `inv_freq`, which a QNN export needs.")
    frequencies, scaling = frequencies.detach().float().cpu(), float(getattr(rotary, "attention_scaling", 1.0))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if len(frequencies) * 2 != head_dim:
        raise ValueError(
            f"{type(base).__name__} rotates only {len(frequencies) * 2} of {head_dim} dimensions of a head (partial "
            "rotary embedding), which QNN graphs cannot do."
        )
    return frequencies, scaling


def norm_epsilon(norm: nn.Module) -> float:
    """The epsilon of a norm; `ValueError` unless it computes `x / rms(x) * weight` (Gemma's has 1 + weight)."""
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if epsilon is not None and getattr(norm, "bias", None) is None:
        weight = norm.weight.detach().float()
        x = torch.linspace(-2.0, 3.0, weight.numel(), device=weight.device).reshape(1, 1, -1)
        expected = functional.rms_norm(x, (weight.numel(),), weight, epsilon)
        with torch.no_grad():
            found = norm(x.to(norm.weight.dtype)).float()
        tolerance = 1e-4 if norm.weight.dtype == torch.float32 else 5e-2
        if torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
            return epsilon
    raise ValueError(f"{type(norm).__name__} is not a plain RMSNorm: the base cannot be exported to QNN.")
