"""The error of a quantized GenieBlue against the 16-bit one, per view."""

from typing import Any

import torch

from conversion.verification.saved_model import PROMPTS, logits_of

ViewLogits = dict[str, torch.Tensor]  # float32 logits (positions, vocabulary) on fixed requests, by view


@torch.no_grad()
def view_logits(model: Any) -> ViewLogits:
    """Logits of both views on the same ids; the multimodal ones follow one tile with a pattern in it."""
    config = model.config
    size = min(config.image_token_id, 256)
    rows = [torch.tensor([[byte % size for byte in prompt.encode()]], device=model.device) for prompt in PROMPTS]
    waves = torch.linspace(0, 25, config.vision_config.image_size)
    tile = torch.stack([torch.sin(waves[None] + phase) * torch.cos(waves[:, None]) for phase in (0.0, 1.0, 2.0)])
    pixels = tile[None].to(model.device, model.vision_tower.dtype)
    image = torch.full((1, config.image_seq_length), config.image_token_id, device=model.device)
    text = [logits_of(model, ids)[0] for ids in rows]
    with_image = [logits_of(model, torch.cat([image, ids], dim=1), pixel_values=pixels)[0] for ids in rows]
    multimodal = [logits[image.shape[1] :] for logits in with_image]
    return {"text": torch.cat(text).float().cpu(), "multimodal": torch.cat(multimodal).float().cpu()}


def measured_errors(before: ViewLogits, after: ViewLogits, recipe: Any) -> tuple[dict[str, float], list[dict]]:
    """Relative L2 error of the logits by view, and the same as rows for the model card."""
    errors, rows = {}, []
    for view, place in (("text", ""), ("multimodal", " after one tile with a pattern")):
        # Softmax ignores a constant, so it is no error.
        exact, rounded = (logits[view] - logits[view].mean(dim=-1, keepdim=True) for logits in (before, after))
        errors[view] = float((rounded - exact).norm() / exact.norm())
        agreeing = float((rounded.argmax(-1) == exact.argmax(-1)).float().mean())
        rows.append(
            {
                "name": f"Error of the {view} view's logits against {recipe.activations}",
                "value": f"{errors[view]:.3f} relative L2; the same top token at {agreeing:.1%} of positions",
                "how": f"{len(exact)} positions of three fixed prompts{place}",
            }
        )
    return errors, rows
