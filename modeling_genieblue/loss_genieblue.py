"""The loss of a pass, and how it reads only the positions that have a label.

About one token in twenty is labelled in multimodal data, while logits over a whole vocabulary are the largest tensors
of a pass.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

IGNORED = -100
OF_A_VLM = ("image_hidden_states", "video_hidden_states", "rope_deltas")  # which a language model does not return


def run_with_loss(view: PreTrainedModel, inputs: dict[str, Any], keep_logits: bool = True) -> CausalLMOutputWithPast:
    """The view's outputs for `inputs`, and their loss if these have `labels` (batch, length).

    Without `keep_logits` the LM head reads only positions that predict a label, and no logits are returned. What the
    view does to logits (scaling, capping) it does to these. Where that cannot be (a head that does not read all hidden
    states at once, a loss of the user's that takes no shifted labels), all logits give the same loss.
    """
    inputs = dict(inputs)
    labels, num_items = inputs.pop("labels", None), inputs.pop("num_items_in_batch", None)
    if labels is None:
        return view(**inputs, return_dict=True)
    if keep_logits or "shift_labels" not in inspect.signature(view.loss_function).parameters:
        outputs = view(**inputs, return_dict=True)
        loss = loss_of(view, outputs.logits, labels, num_items)
    else:
        loss, outputs = _labelled_loss(view, inputs, labels, num_items)
    dropped = ("loss", *OF_A_VLM) if keep_logits else ("loss", "logits", *OF_A_VLM)
    return CausalLMOutputWithPast(loss=loss, **{name: value for name, value in outputs.items() if name not in dropped})


def loss_of(view: PreTrainedModel, logits: torch.Tensor, labels: torch.Tensor, num_items: Any = None) -> torch.Tensor:
    """The view's own loss of logits (batch, length, vocabulary) for labels (batch, length)."""
    compute: Any = view.loss_function
    return compute(logits=logits, labels=labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items)


def _labelled_loss(
    view: PreTrainedModel, inputs: dict[str, Any], labels: torch.Tensor, num_items: Any
) -> tuple[torch.Tensor, Any]:
    shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    hook = _LabelledPositions(shifted != IGNORED)
    head: Any = view.get_output_embeddings()
    handle = head.register_forward_pre_hook(hook)
    try:
        outputs = view(**inputs, return_dict=True)
    finally:
        handle.remove()
    if not hook.used:
        return loss_of(view, outputs.logits, labels, num_items), outputs
    compute: Any = view.loss_function
    options = {"vocab_size": outputs.logits.shape[-1], "num_items_in_batch": num_items}
    return compute(logits=outputs.logits, labels=None, shift_labels=shifted[hook.mask], **options), outputs


class _LabelledPositions:
    """A forward pre-hook of an LM head: hidden states (batch, length, hidden) → (labelled, hidden), once."""

    def __init__(self, mask: torch.Tensor):
        self.mask, self.used = mask, False

    def __call__(self, _head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.used or not args or args[0].shape[:2] != self.mask.shape:
            return None
        self.used = True
        return args[0][self.mask], *args[1:]
