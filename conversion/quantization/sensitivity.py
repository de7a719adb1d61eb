"""How much the error of each linear layer changes what a model says, from gradients on calibration requests."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from conversion.quantization.views import CalibratedView

REQUESTS = 4  # of each view
SEED = 0  # of the tokens that are drawn from the model's predictions
SHARE = 1 / 3  # of the Hessian of weighted inputs beside that of plain ones
TINY = 1e-30  # inputs may all be zero


def inputs_by_weight(views: Sequence[CalibratedView], weights: Collection[int]) -> dict[int, torch.Tensor]:
    """`damage_inputs` of all `views` together, by the `id` of the linears' weights, of those in `weights`.

    Of the requests of a view the first few count.
    """
    rows: dict[int, list[torch.Tensor]] = {}
    for view in views:
        modules = view.model.named_modules()
        linears = {name: id(module.weight) for name, module in modules if isinstance(module, nn.Linear)}
        names = [name for name, weight in linears.items() if weight in weights]
        for name, found in damage_inputs(view.model, view.requests[:REQUESTS], names).items():
            rows.setdefault(linears[name], []).append(found)
    return {weight: torch.cat(parts) for weight, parts in rows.items()}


def balanced_hessian(hessian: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """A Hessian for gptq: that of plain inputs, and a share of that of `inputs` from `damage_inputs`.

    By the plain ones alone, the few tokens that all others attend to hardly count. By the others alone, the rest does
    not, and a few requests are too few.
    """
    rows = inputs.to(hessian.device).float()
    plain, weighted = (each / each.diagonal().mean().clamp(min=TINY) for each in (hessian, rows.t() @ rows))
    return plain + SHARE * weighted


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
    if not names:
        return {}
    rows: dict[str, list[torch.Tensor]] = {}
    tokens = 0
    with _frozen(view), torch.enable_grad():
        handles = [_weigh_inputs(view.get_submodule(name), rows.setdefault(name, [])) for name in names]
        handles.append(view.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_(True)))
        try:
            for batch in batches:
                tokens += _send_back(view, batch)
        finally:
            for handle in handles:
                handle.remove()
    return {name: torch.cat(parts) * (2 * tokens) ** -0.5 for name, parts in rows.items() if parts}


def _weigh_inputs(linear: nn.Module, rows: list[torch.Tensor]) -> RemovableHandle:
    """Appends the inputs of each pass to `rows`, times the root mean square of the gradient of their outputs."""

    def after(_linear: nn.Module, args: tuple, output: torch.Tensor) -> None:
        inputs = args[0].detach().flatten(0, -2)

        def weigh(gradient: torch.Tensor) -> None:
            weights = gradient.flatten(0, -2).float().square().mean(-1, keepdim=True).sqrt()
            rows.append((inputs * weights).bfloat16())  # the range of float32 in half the memory

        output.register_hook(weigh)

    return linear.register_forward_hook(after)


def _send_back(view: Any, batch: Mapping[str, Any]) -> int:
    """Back-propagates the log-probabilities of drawn tokens; returns the number of positions that count."""
    arguments = dict(batch)
    if "inputs_embeds" in arguments:
        arguments["inputs_embeds"] = arguments["inputs_embeds"].detach().requires_grad_(True)
    logits = view(**arguments, use_cache=False).logits.float().flatten(0, -2)
    generator = torch.Generator(logits.device).manual_seed(SEED)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    losses = functional.cross_entropy(logits, drawn, reduction="none")
    mask = batch.get("attention_mask")
    (losses if mask is None else losses * mask.flatten()).sum().backward()
    return len(losses) if mask is None else int(mask.sum())


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
