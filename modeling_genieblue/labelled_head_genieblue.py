"""The loss of a training pass whose LM head reads only the positions that have a label.

About one token in twenty is labelled in multimodal data, while logits over a whole vocabulary are the largest tensors
of a pass.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

IGNORED = -100


class _LabelledPositions:
    """A forward pre-hook of an LM head: hidden states (batch, length, hidden) → (labelled, hidden), once."""

    def __init__(self, mask: torch.Tensor):
        self.mask, self.used = mask, False

    def __call__(self, _head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.used or not args or args[0].shape[:2] != self.mask.shape:
            return None
        self.used = True
        return args[0][self.mask], *args[1:]


def labelled_loss(
    view: PreTrainedModel, inputs: dict[str, Any], labels: torch.Tensor, num_items_in_batch: Any = None
) -> tuple[torch.Tensor, Any]:
    """The view's own loss for labels (batch, length), and its outputs, whose logits are of labelled positions alone.

    What the view does to logits (scaling, capping) it does to these. Where that cannot be (a head that does not read
    all hidden states at once, a loss of the user's that takes no shifted labels), all logits give the same loss.
    """
    compute: Any = view.loss_function
    if "shift_labels" not in inspect.signature(compute).parameters:
        outputs = view(**inputs, return_dict=True)
        options = {"vocab_size": outputs.logits.shape[-1], "num_items_in_batch": num_items_in_batch}
        return compute(logits=outputs.logits, labels=labels, **options), outputs
    shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    hook = _LabelledPositions(shifted != IGNORED)
    head: Any = view.get_output_embeddings()
    handle = head.register_forward_pre_hook(hook)
    try:
        outputs = view(**inputs, return_dict=True)
    finally:
        handle.remove()
    logits = outputs.logits
    options = {"vocab_size": logits.shape[-1], "num_items_in_batch": num_items_in_batch}
    if not hook.used:
        return compute(logits=logits, labels=labels, **options), outputs
    return compute(logits=logits, labels=None, shift_labels=shifted[hook.mask], **options), outputs


__all__ = ["labelled_loss"]
