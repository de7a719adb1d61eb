"""The error of a quantized GenieBlue against the 16-bit one, per view and by part."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from conversion.quantization.views import own_state, vlm_of
from conversion.verification.saved_model import PROMPTS, logits_of
from modeling_genieblue.language_adapter_genieblue import adapter_parameters
from modeling_genieblue.view_routing_genieblue import MULTIMODAL, TEXT

LARGEST_ERROR = 1.0  # that of unrelated logits is larger

ViewLogits = dict[str, torch.Tensor]  # float32 logits (positions, vocabulary) on fixed requests, by view


def probe_requests(model: Any) -> list[dict[str, torch.Tensor]]:
    """Fixed prompts behind one tile with a pattern in it, as requests of the multimodal view; for a VLM no image, of
    which each family has inputs of its own."""
    config, vlm = model.config, vlm_of(model)
    embeddings = [each.get_input_embeddings().weight for each in (model.language_model, vlm) if each is not None]
    size = min(*(weight.shape[0] for weight in embeddings), 256)
    rows = [torch.tensor([[byte % size for byte in prompt.encode()]], device=model.device) for prompt in PROMPTS]
    if vlm is not None:
        return [{"input_ids": ids} for ids in rows]
    waves = torch.linspace(0, 25, config.vision_config.image_size)
    tile = torch.stack([torch.sin(waves[None] + phase) * torch.cos(waves[:, None]) for phase in (0.0, 1.0, 2.0)])
    pixels = tile[None].to(model.device, model.vision_tower.dtype)
    image = torch.full((1, config.image_seq_length), config.image_token_id, device=model.device)
    return [{"input_ids": torch.cat([image, ids], dim=1), "pixel_values": pixels} for ids in rows]


@torch.no_grad()
def view_logits(model: Any) -> ViewLogits:
    """Logits of both views on the same ids of `probe_requests`."""
    length = 0 if vlm_of(model) is not None else model.config.image_seq_length
    requests = probe_requests(model)
    text = [logits_of(model, request["input_ids"][:, length:])[0] for request in requests]
    multimodal = [logits_of(model, **request, view=MULTIMODAL)[0, length:] for request in requests]
    return {"text": torch.cat(text).float().cpu(), "multimodal": torch.cat(multimodal).float().cpu()}


def logits_error(exact: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Relative L2 error of logits (positions, vocabulary), and the share of positions with the same top token."""
    # Softmax ignores a constant, so it is no error.
    exact, other = (logits - logits.mean(dim=-1, keepdim=True) for logits in (exact, other))
    return float((other - exact).norm() / exact.norm()), float((other.argmax(-1) == exact.argmax(-1)).float().mean())


def measured_errors(
    before: ViewLogits, after: ViewLogits, recipe: Any, has_vlm: bool
) -> tuple[dict[str, float], list[dict]]:
    """Relative L2 error of the logits by view, and the same as rows for the model card."""
    errors, rows = {}, []
    behind = " without an image" if has_vlm else " after one tile with a pattern"
    for view, place in ((TEXT, ""), (MULTIMODAL, behind)):
        errors[view], agreeing = logits_error(before[view], after[view])
        rows.append(
            {
                "name": f"Error of the {view} view's logits against {recipe.activations}",
                "value": f"{errors[view]:.3f} relative L2; the same top token at {agreeing:.1%} of positions",
                "how": f"{len(before[view])} positions of three fixed prompts{place}",
            }
        )
    return errors, rows


def unrelated_views(errors: Mapping[str, float]) -> list[str]:
    """One sentence for each view whose error is that of logits that have nothing to do with the 16-bit ones."""
    return [
        f"the logits of the {view} view are unrelated to those in 16 bits (relative L2 error {error:.3g})"
        for view, error in errors.items()
        if not error < LARGEST_ERROR  # NaN is one of them
    ]


def errors_by_part(exact: Any, rounded: Any, logits: Callable[[Any], ViewLogits]) -> dict[str, dict[str, float]]:
    """Relative L2 error of the logits by view, with only one part rounded at a time; unchanged parts are absent.

    Args:
        exact: the 16-bit model; unchanged afterwards.
        rounded: the same with the rounded values of all parts, in 16 bits; unchanged afterwards.
    """
    before, errors = logits(exact), {}
    others = _parameters_by_part(rounded)
    for part, own in _parameters_by_part(exact).items():
        pairs = [pair for pair in zip(own, others[part], strict=True) if not torch.equal(*pair)]
        if not pairs:
            continue
        _swap(pairs)  # so that no part is in memory twice
        after = logits(exact)
        _swap(pairs)
        errors[part] = {view: logits_error(values, after[view])[0] for view, values in before.items()}
    return errors


def _parameters_by_part(model: Any) -> dict[str, list[torch.Tensor]]:
    """The base, with its embeddings and LM head, counts as `llm`."""
    adapter = [(name, parameter) for name, _, parameter in adapter_parameters(model.multimodal_language_model)]
    own = {part: [value for name, value in own_state(model).items() if name.startswith(f"{part}.")]
           for part in model.own_modules}  # fmt: skip
    return {
        **own,
        "llm": list(model.language_model.parameters()),
        "replicated_blocks": [parameter for name, parameter in adapter if ".lora_" not in name],
        "lora": [parameter for name, parameter in adapter if ".lora_" in name],
    }


def _swap(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Swaps values, by way of `.data`: a model refuses requests once the values of its base are seen to change."""
    for one, other in pairs:
        kept = one.data.clone()
        one.data.copy_(other.data)
        other.data.copy_(kept)
