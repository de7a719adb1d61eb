"""Keeps inherited methods of a VLM, called on it alone, away from the base's weights in its language model."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .frozen_base_genieblue import OfTheWholeModel
from .frozen_view_genieblue import SharedTree, check_is_adapter, shared_class


class VlmShell(SharedTree):
    """A VLM around a language model that is the multimodal view's; everything else is its own."""

    _shared: tuple[nn.Module, ...]  # the decoder and the head
    _decoder: nn.Module

    def _own_children(self) -> Iterator[nn.Module]:
        return (child for child in self.children() if not any(child is each for each in self._shared))

    def requires_grad_(self, requires_grad: bool = True) -> "VlmShell":
        """`nn.Module.requires_grad_` of the VLM's own parts, and of the adapter."""
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(requires_grad)
        for child in self._own_children():
            child.requires_grad_(requires_grad)
        self._decoder.requires_grad_(requires_grad)
        return self

    def apply(self, fn: Callable[[nn.Module], Any]) -> "VlmShell":
        """`nn.Module.apply` to the VLM's own parts."""
        for child in self._own_children():
            child.apply(fn)
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        if not isinstance(fn, OfTheWholeModel):
            return super()._apply(fn, recurse)  # refuses what would change anything
        for child in self._own_children():
            child._apply(fn)
        # Weights of the language model are moved with the view; what only the VLM has are buffers, which stay as
        # precise as they are.
        device = fn(torch.empty(0, dtype=torch.int64)).device
        for each in self._shared:
            if any(each is child for child in self.children()):
                each._apply(OfTheWholeModel(lambda tensor: tensor.to(device)))
        return nn.Module._apply(self, fn, recurse=False)


def guard_vlm(vlm: PreTrainedModel) -> None:
    """Makes `vlm`, and the models in it around and in its language model, classes that keep off the base's weights."""
    decoder: Any = vlm.get_decoder()
    shared = (decoder, vlm.get_output_embeddings())
    for module in decoder.modules():
        if isinstance(module, PreTrainedModel):
            module.__class__ = shared_class(SharedTree, type(module))
            module.register_load_state_dict_pre_hook(check_is_adapter)
    for module in vlm.modules():
        holds_decoder = any(each is decoder for each in module.modules()) and module is not decoder
        if isinstance(module, PreTrainedModel) and holds_decoder:
            module.__class__ = shared_class(VlmShell, type(module))
            vars(module)["_shared"], vars(module)["_decoder"] = shared, decoder  # not modules of it
