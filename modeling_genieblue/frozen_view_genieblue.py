"""Keeps inherited methods of the multimodal view, called on it alone, away from the base's weights that it shares."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .frozen_base_genieblue import REFUSALS, OfTheWholeModel, TensorGuard, refusal
from .language_adapter_genieblue import adapter_parameters, is_adapter_name

try:
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError:  # Without a try transformers would import peft before `require_peft` can check it.
    raise

_WHOLE_MODEL = "most of its weights are the base's own. Save the whole GenieBlue, whose adapter PEFT reads too."
_NOT_FOR_ONE_VIEW = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
VIEW_REFUSALS = {name: reason for name, reason in REFUSALS.items() if name not in _NOT_FOR_ONE_VIEW}
VIEW_REFUSALS |= {"save_pretrained": _WHOLE_MODEL, "push_to_hub": _WHOLE_MODEL}


class SharedTree(TensorGuard):
    """A model within the multimodal view, whose parameters are the base's own but for the adapter's."""

    _plain_class: type[PreTrainedModel]

    def requires_grad_(self, requires_grad: bool = True) -> "SharedTree":
        """`nn.Module.requires_grad_` of the adapter alone."""
        for _, _, parameter in adapter_parameters(self):
            parameter.requires_grad_(requires_grad)
        return self

    def apply(self, fn: Callable[[nn.Module], Any]) -> "SharedTree":
        """`nn.Module.apply` to the modules of the adapter alone."""
        for owner in dict.fromkeys(name.rpartition(".")[0] for name, _, _ in adapter_parameters(self)):
            fn(self.get_submodule(owner))
        return self

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the `Parameter` objects are the base's, which are tied as they should be."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        if not isinstance(fn, OfTheWholeModel):
            for dtype, device in {(each.dtype, each.device) for each in (*self.parameters(), *self.buffers())}:
                result = fn(torch.empty(0, dtype=dtype, device=device))
                if (result.dtype, result.device) != (dtype, device):
                    raise ValueError(
                        f"From {dtype} on {device} to {result.dtype} on {result.device}: the multimodal view has the "
                        "base's own weights, so only a part would be cast or moved. Move the whole GenieBlue, and for "
                        "another precision load it again with `dtype=`."
                    )
        return super()._apply(OfTheWholeModel(fn), recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        if "_plain_class" not in vars(type(self)):  # something else was made of this class
            return reduced
        return (_new_shared, (type(self).__mro__[1], self._plain_class), *reduced[2:])


for _name, _reason in VIEW_REFUSALS.items():
    setattr(SharedTree, _name, refusal(SharedTree, _name, _reason))


class _SharedView(SharedTree):
    """The multimodal view; its settings are the base's, of which there is one truth."""

    _base: PreTrainedModel

    @property
    def generation_config(self) -> Any:
        """The base's own object."""
        return self._base.generation_config

    @generation_config.setter
    def generation_config(self, generation_config: Any) -> None:
        self._base.generation_config = generation_config

    @property
    def loss_function(self) -> Callable[..., torch.Tensor]:
        """The base's."""
        return self._base.loss_function

    @loss_function.setter
    def loss_function(self, loss_function: Callable[..., torch.Tensor]) -> None:
        self._base.loss_function = loss_function


def guard_view(view: PreTrainedModel, base: PreTrainedModel) -> None:
    """Makes `view`, and each model within it, a class that keeps inherited methods away from the weights of `base`."""
    for module in view.modules():
        if isinstance(module, PreTrainedModel):
            module.__class__ = shared_class(_SharedView if module is view else SharedTree, type(module))
            module.register_load_state_dict_pre_hook(check_is_adapter)
        elif isinstance(module, BaseTunerLayer):
            module.merge = partial(_merge_apart, module)  # pyright: ignore[reportArgumentType]: no module
    vars(view).pop("generation_config", None)
    vars(view)["_base"] = base  # not a module of the view


@cache
def shared_class(guard: type, kind: type[PreTrainedModel]) -> type:
    members = {"__module__": kind.__module__, "__doc__": kind.__doc__, "_plain_class": kind}
    return type(kind.__name__, (guard, kind), members)


def _new_shared(guard: type, kind: type[PreTrainedModel]) -> Any:
    return object.__new__(shared_class(guard, kind))


def check_is_adapter(tree: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    of_base = [name for name in state if name.startswith(prefix) and not is_adapter_name(name)]
    own = tree.state_dict(prefix=prefix) if of_base else {}
    for name in of_base:
        if name not in own or own[name].data_ptr() != state[name].data_ptr():
            raise ValueError(
                f"{name} is not a tensor of the adapter, and the base is not loaded by way of the multimodal view; "
                "nothing was changed. Give the adapter's tensors alone."
            )


def _merge_apart(layer: Any, *args: Any, **kwargs: Any) -> None:
    """`merge` of a PEFT layer into a weight of its own: the one that it has is the base's."""
    linear = layer.get_base_layer()
    for name, parameter in list(linear.named_parameters(recurse=False)):
        if type(parameter) is nn.Parameter:
            setattr(linear, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    type(layer).merge(layer, *args, **kwargs)
