"""Whether a base can be trained on packs: its attention must keep their samples apart."""

from typing import Any

import torch

from genieblue.data.collation import ChatCollator, joined
from modeling_genieblue.view_routing_genieblue import MULTIMODAL

LENGTH = 24  # tokens of each probe
# Largest relative error of the logits at a position. On SmolLM2-135M-Instruct, packs differ from single texts by
# 3e-6 in float32 and 0.03 in bfloat16, and with attention to the text before by 0.32 at least.
ROUNDING, ROUNDING_IN_16_BITS = 1e-3, 0.1
REMEDY = "Train without packing (`pack: false`, --no-pack); `group_by_length` (--group-by-length) also saves padding."


def uses_flash_attention(model: Any) -> bool:
    """Whether the multimodal view runs flash attention, which knows samples apart in a batch of one row only."""
    return "flash" in str(model.multimodal_language_model.config._attn_implementation)


@torch.no_grad()
def check_packing(model: Any, collator: ChatCollator) -> None:
    """`ValueError` naming the base unless two packed texts have the logits that each has alone, in either order."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(model.config.image_token_id, (2, LENGTH), generator=generator)
    first, second = ({"input_ids": text, "labels": text} for text in texts.tolist())
    batch = collator([[joined([first, second])], [joined([second, first])]])
    batch.pop("labels")
    was_training = model.training
    model.eval()
    try:
        packed, alone = (_logits(model, **inputs) for inputs in (batch, {"input_ids": texts}))
    except Exception as error:  # of the base's own code, which may know no positions
        raise ValueError(f"{_refusal(model)}: it raises {type(error).__name__} ({error}). {REMEDY}") from error
    finally:
        model.train(was_training)
    expected = alone.view(2, LENGTH, -1)[[0, 1, 1, 0]].flatten(0, 1)
    error = float(((packed - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    exact = model.language_model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    tolerance = ROUNDING if exact else ROUNDING_IN_16_BITS
    if not error <= tolerance:
        raise ValueError(
            f"{_refusal(model)}: packed texts change each other's logits by {error:.2g}, and {tolerance:g} would be "
            f"rounding. {REMEDY}"
        )


def _refusal(model: Any) -> str:
    base = model.language_model
    return (
        f"{type(base).__name__} ({model.config.base_model_name_or_path}) cannot be trained on packed samples with "
        f"attention {base.config._attn_implementation!r}"
    )


def _logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits of the multimodal view by token, without their mean, which no probability depends on."""
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    logits = model(**inputs, view=MULTIMODAL, use_cache=False).logits.float().flatten(0, 1)
    return logits - logits.mean(dim=-1, keepdim=True)
