"""How much the error of each linear layer changes what a model says, from gradients on calibration requests."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

SEED = 0  # of the answers that are drawn from the model


def damage_inputs(view: Any, batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Rows X (tokens, in) by linear of `view`: an error E (out, in) of its weight costs about `|X E^T|^2`.

    The cost is the divergence, in nats per token, of the model's predictions from those without the error. To second
    order it is half the mean square of `g e`, where e is the error of the layer's output at a token, and g the
    gradient there of the log-probability of tokens drawn from the model's own predictions (the Fisher information).
    Here the direction of e counts as independent of that of g, and tokens as independent of one another.

    Args:
        batches: arguments of `view`; positions where an `attention_mask` is zero do not count.
        names: linears in the blocks; those that no batch reaches are left out.
    """
    rows: dict[str, list[torch.Tensor]] = {}
    tokens = 0
    for batch in batches:
        mask = batch.get("attention_mask")
        tokens += int(mask.sum()) if mask is not None else next(iter(batch.values())).shape[:2].numel()
        for name, (inputs, gradients) in _pass(view, batch, names).items():
            weights = gradients.float().square().mean(-1, keepdim=True).sqrt()
            rows.setdefault(name, []).append((inputs * weights).bfloat16())  # the range of float32, half the memory
    return {name: torch.cat(parts) * (2 * tokens) ** -0.5 for name, parts in rows.items()}


def _pass(view: Any, batch: Mapping[str, Any], names: Sequence[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The inputs (tokens, in) and the outputs' gradients (tokens, out) of each linear that ran."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(name: str, linear: nn.Module) -> Any:
        def after(_linear: nn.Module, args: tuple, output: torch.Tensor) -> None:
            inputs = args[0].detach().flatten(0, -2)
            output.register_hook(lambda grad: seen.update({name: (inputs, grad.flatten(0, -2))}))

        return linear.register_forward_hook(after)

    with _frozen(view), torch.enable_grad():
        handles = [watch(name, view.get_submodule(name)) for name in names]
        handles.append(view.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_(True)))
        try:
            arguments = dict(batch)
            if "inputs_embeds" in arguments:
                arguments["inputs_embeds"] = arguments["inputs_embeds"].detach().requires_grad_(True)
            logits = view(**arguments, use_cache=False).logits.float().flatten(0, -2)
            generator = torch.Generator(logits.device).manual_seed(SEED)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            losses = functional.cross_entropy(logits, drawn, reduction="none")
            mask = batch.get("attention_mask")
            (losses if mask is None else losses * mask.flatten()).sum().backward()
        finally:
            for handle in handles:
                handle.remove()
    return seen


@contextmanager
def _frozen(view: nn.Module) -> Iterator[None]:
    """No gradients of weights, which would take as much memory as the model."""
    trained = [parameter for parameter in view.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
