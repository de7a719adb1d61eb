"""A GenieBlue without its LM head: returns hidden states, for trainers that run the head themselves."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from .compat_genieblue import take_cache
from .frozen_base_genieblue import TensorGuard
from .view_routing_genieblue import MULTIMODAL, TEXT, check_inputs, merge_rows, split_rows, take_rows


class GenieBlueBackbone(TensorGuard, nn.Module):
    """The `base_model` of a GenieBlue: the same modules, with a forward that stops before the LM head."""

    _genieblue: Any
    # Read by transformers when it plans for several devices.
    _tp_plan = _pp_plan = None

    def __init__(self, model: PreTrainedModel):
        nn.Module.__init__(self)
        self._modules = model._modules  # the same objects, so parameters and buffers are the model's
        object.__setattr__(self, "_genieblue", model)  # not a module of this one
        self.config = model.config

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        num_tiles: torch.LongTensor | None = None,
        view: str | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Like the model's `forward`, but returns `last_hidden_state` (batch, length, hidden_size) instead of logits.

        No cache is supported. Positions before an image token carry no gradient, as their next id is no vocabulary id.
        """
        model = self._genieblue
        if take_cache(kwargs) is not None:
            raise ValueError(
                "`base_model` does not support `past_key_values`: run the model itself, or the whole text."
            )
        check_inputs(input_ids, pixel_values, num_tiles)
        inputs = {name: value for name, value in {"input_ids": input_ids, **kwargs}.items() if value is not None}
        inputs |= {"use_cache": False, "return_dict": True}
        is_multimodal = model._route(input_ids, None, view, pixel_values)
        if not any(is_multimodal):
            return _decoder(model.language_model)(**inputs)
        if all(is_multimodal):
            return self._multimodal_forward(pixel_values, inputs)
        rows = split_rows(is_multimodal)
        text = _decoder(model.language_model)(**take_rows(inputs, rows[TEXT]))
        multimodal = self._multimodal_forward(pixel_values, take_rows(inputs, rows[MULTIMODAL]))
        return BaseModelOutputWithPast(**merge_rows(text, multimodal, rows))

    def _multimodal_forward(
        self, pixel_values: torch.Tensor | None, inputs: dict[str, Any]
    ) -> BaseModelOutputWithPast:
        outputs = _decoder(self._genieblue.multimodal_language_model)(
            **self._genieblue._embedded(pixel_values, inputs)
        )
        if "input_ids" in inputs:
            is_image = (inputs["input_ids"] == self.config.image_token_id).to(outputs.last_hidden_state.device)
            before_image = nn.functional.pad(is_image[:, 1:], (0, 1)).unsqueeze(-1)
            hidden_states = outputs.last_hidden_state
            outputs.last_hidden_state = torch.where(before_image, hidden_states.detach(), hidden_states)
        return outputs


def _of_the_model(name: str) -> Callable:
    def call(self: GenieBlueBackbone, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self._genieblue, name)(*args, **kwargs)
        return self if result is self._genieblue else result

    call.__name__, call.__doc__ = name, f"`{name}` of the model, which keeps it away from the base."
    return call


# What changes modules or weights, or hands them out, as the model itself does it.
for _name in (
    "train", "requires_grad_", "apply", "_apply", "state_dict", "load_state_dict", "add_module", "set_submodule",
    "to_empty", "_replicate_for_data_parallel",
):  # fmt: skip
    setattr(GenieBlueBackbone, _name, _of_the_model(_name))


def _decoder(view: PreTrainedModel) -> nn.Module:
    if view.base_model is view:
        raise ValueError(f"{type(view).__name__} has no `base_model`, so it cannot be run without its LM head.")
    return view.base_model
