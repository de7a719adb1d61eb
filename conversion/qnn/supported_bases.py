"""Which bases the QNN graphs reproduce, and a sentence for each that they do not."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from modeling_genieblue.language_views_genieblue import find_blocks

SUPPORTED_TYPES = ("llama", "mistral", "qwen2", "qwen3")
BLOCK_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Kinds of rotary embedding whose frequencies depend on the length of the request, which a static graph cannot know.
DYNAMIC_ROPE_TYPES = ("dynamic", "longrope")


def refuse_unsupported_base(base: nn.Module, context_length: int) -> None:
    """`ValueError` that names what the QNN graphs cannot reproduce of `base` in a context of `context_length`."""
    config = base.config.get_text_config(decoder=True)
    reasons = [*_structure_problems(base), *_config_problems(config, context_length)]
    if not reasons and config.model_type not in SUPPORTED_TYPES:
        reasons = [f"its blocks are of type {config.model_type!r}, whose arithmetic was never compared"]
    if reasons:
        raise ValueError(
            f"{type(base).__name__} cannot be exported to QNN: {'; '.join(reasons)}. Supported are decoders of type "
            f"{', '.join(SUPPORTED_TYPES)}."
        )


def _structure_problems(base: nn.Module) -> Iterator[str]:
    experts = [name for name, _ in base.named_modules() if "expert" in name.rsplit(".", 1)[-1]]
    if experts:
        yield f"it has per-token experts ({experts[0]}), and the NPU has no routing by token (no MoE)"
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


def _config_problems(config, context_length: int) -> Iterator[str]:
    activation = getattr(config, "hidden_act", "silu")
    if activation != "silu":
        yield f"its activation is {activation!r}, expected 'silu'"
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    if window is not None and slides and window < context_length:
        yield (
            f"it attends to a sliding window of {window} tokens only, shorter than the context of {context_length} "
            "(a context no longer than the window would do)"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in DYNAMIC_ROPE_TYPES:
        yield f"its rotary embedding is of type {kind!r}, which changes with the length of a request"


def rotary_frequencies(base: nn.Module) -> tuple[torch.Tensor, float]:
    """Angles per position, (head_dim / 2,), and the factor on cosine and sine, as the base itself computes them.

    Raises `ValueError` if the base's own cosines are not those of plain rotary embedding with these numbers.
    """
    config = base.config.get_text_config(decoder=True)
    rotary = next((module for name, module in base.named_modules() if name.endswith("rotary_emb")), None)
    frequencies = getattr(rotary, "inv_freq", None)
    if frequencies is None:
        raise ValueError(f"{type(base).__name__} has no rotary embedding with `inv_freq`, which a QNN export needs.")
    frequencies, scaling = frequencies.detach().float().cpu(), float(getattr(rotary, "attention_scaling", 1.0))
    head_dim = _head_dim(config)
    if len(frequencies) * 2 != head_dim:
        raise ValueError(
            f"{type(base).__name__} turns {len(frequencies) * 2} of {head_dim} dimensions of a head only (partial "
            "rotary embedding), which the QNN graphs do not do."
        )
    positions = torch.tensor([[0, 1, 2, 17, 255]], device=rotary.inv_freq.device)
    cos, sin = rotary(torch.zeros(1, 1, dtype=torch.float32, device=positions.device), positions)
    angles = positions[0].cpu().float()[:, None] * frequencies
    for own, expected in ((cos, angles.cos() * scaling), (sin, angles.sin() * scaling)):
        if not torch.allclose(own[0].cpu().float(), expected.repeat(1, 2), atol=1e-5):
            raise ValueError(
                f"{type(base).__name__} has a rotary embedding of another form than two halves of the same angles: it "
                "cannot be exported to QNN."
            )
    return frequencies, scaling


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def is_rms_norm(norm: nn.Module) -> bool:
    """Whether a norm is `x / rms(x) * weight`; found out by trying it (Gemma's multiplies by 1 + weight)."""
    if getattr(norm, "bias", None) is not None or not hasattr(norm, "variance_epsilon"):
        return False
    weight = norm.weight.detach().float()
    x = torch.linspace(-2.0, 3.0, weight.numel(), device=weight.device).reshape(1, 1, -1)
    expected = functional.rms_norm(x, (weight.numel(),), weight, norm.variance_epsilon)
    with torch.no_grad():
        found = norm(x.to(norm.weight.dtype)).float()
    tolerance = 1e-4 if norm.weight.dtype == torch.float32 else 5e-2
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


__all__ = ["is_rms_norm", "refuse_unsupported_base", "rotary_frequencies"]
