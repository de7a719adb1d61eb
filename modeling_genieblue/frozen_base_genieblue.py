"""Keeps inherited methods away from the base: they act only on the parts that GenieBlue adds, or are refused by name.

The base is a separate model, shared by both views. So casting, freezing, initialising and the like affect only the
vision tower, the projector and the adapter. A method that would replace or rewrite the base, or add a second adapter,
is a `ValueError` that names the alternative, before anything has changed. The multimodal view, whose weights are the
base's own, does the same by itself: see `frozen_view_genieblue`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

from .arguments_genieblue import OFFLOAD_ADVICE
from .projector_genieblue import GenieBlueMultiModalProjector

LANGUAGE_TREES = ("language_model", "multimodal_language_model")
_ONE_ADAPTER = (
    "both views share the base's weights, and a GenieBlue has and saves only its own adapter, which another one would "
    "switch off. Train its own adapter; a higher `lora_rank` in `from_base` gives it more capacity. Merge a LoRA for "
    "text into the base before you make a GenieBlue from it."
)
_INITIALISED = "it would reinitialise the base's weights. Make a new GenieBlue with `from_base`."
_EMBEDDINGS = (
    "the embeddings of a GenieBlue belong to the base, and image tokens need no row in them. If you need more tokens, "
    "resize the base before making a GenieBlue from it."
)
_OTHER_BASE = (
    "it would replace the base. Load the GenieBlue onto another base with `from_pretrained(..., base_model=)`."
)
_COMPILED = "Compile a view in place, with its own `compile()`."
_POSITIONS = "positions belong to the base and cannot be resized here."
_BATCHING = "it serves one model, but a GenieBlue has two views. For text, use that of `model.language_model`."
# Refused methods, with the reason and the alternative.
REFUSALS = {
    "add_adapter": _ONE_ADAPTER,
    "load_adapter": f"{_ONE_ADAPTER} Other weights for it are loaded from their folder with `from_pretrained`.",
    "set_adapter": _ONE_ADAPTER,
    "delete_adapter": "a GenieBlue cannot see without it. Use `model.language_model`, which is the plain base.",
    "enable_peft_hotswap": f"{_ONE_ADAPTER} Load another GenieBlue onto the same base with `base_model=`.",
    "disable_adapters": "text already runs without the adapter; `view='text'` enforces that for a request.",
    "enable_adapters": "the adapter is always on in the multimodal view; `view='multimodal'` uses it for text too.",
    "active_adapters": "a GenieBlue has one adapter, which is always on in the multimodal view.",
    "get_adapter_state_dict": "use `state_dict()`, or PEFT with the folder `language_adapter` of a saved model.",
    "dequantize": "it would change the base's weights. Load the base without `quantization_config`.",
    "init_weights": _INITIALISED,
    "initialize_weights": _INITIALISED,
    "post_init": _INITIALISED,
    "smart_apply": _INITIALISED,
    "to_empty": "it would lose all weights, including the base's. Use `to(device)`.",
    "set_use_kernels": "it would replace layers of the base. Load the base with `use_kernels=True`, and give it as "
    "`base_model=`.",
    "set_input_embeddings": _EMBEDDINGS,
    "set_output_embeddings": _EMBEDDINGS,
    "resize_token_embeddings": _EMBEDDINGS,
    "resize_position_embeddings": _POSITIONS,
    "get_position_embeddings": _POSITIONS,
    "set_decoder": _OTHER_BASE,
    "set_encoder": "another vision tower needs another adapter. Make a new GenieBlue with `from_base`.",
    "save_distributed_checkpoint": "use `save_pretrained`, which never writes the base.",
    "generate_batch": _BATCHING,
    "init_continuous_batching": _BATCHING,
    "continuous_batching_context_manager": _BATCHING,
}
# Functions of other libraries that change tensors one by one, past every method of a model, by the attribute that they
# alone look for before they change anything.
LOOKED_FOR = {
    "hqq_quantized": "`prepare_model_for_kbit_training` is refused for a GenieBlue: it would cast the base, which "
    "changes its answers. Leave it out: nothing of the base trains, and LoRA is in float32 already.",
    "_tie_weights": "accelerate's `load_checkpoint_in_model`, `load_checkpoint_and_dispatch` and "
    "`infer_auto_device_map` are refused for a loaded GenieBlue: they would restore a part of it, or split its views. "
    "Load a saved folder with `from_pretrained`, which takes a `device_map`, and a whole `state_dict()` with "
    "`load_state_dict`.",
}
# transformers calls these itself before a GenieBlue has a base.
_USED_AT_LOAD = ("init_weights", "initialize_weights", "post_init", "smart_apply", "to_empty", "set_use_kernels")


class OfTheWholeModel:
    """Marks a function that `_apply` carries through all of a GenieBlue, not through one view of it."""

    def __init__(self, fn: Callable[[torch.Tensor], torch.Tensor]):
        self.fn = fn

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.fn(tensor)


class TensorGuard(PreTrainedModel if TYPE_CHECKING else object):
    """Refuses the functions of `LOOKED_FOR` by the attributes that they look for."""

    def _is_loading(self) -> bool:
        return False

    def __dir__(self) -> list[str]:
        # What reads all attributes that there are, such as `torch.jit.trace`, looks for none of these.
        return [name for name in super().__dir__() if name not in LOOKED_FOR]

    def __setattr__(self, name: str, value: Any) -> None:
        # accelerate does this first to a model that it dispatches or offloads.
        if name == "_old_forward" and not self._is_loading():
            raise ValueError(f"accelerate cannot dispatch or offload a loaded GenieBlue: {OFFLOAD_ADVICE}")
        super().__setattr__(name, value)


def _looked_for(name: str, reason: str) -> property:
    def refuse(self: TensorGuard) -> None:
        raise AttributeError(name) if self._is_loading() else ValueError(reason)

    return property(refuse, doc=f"Always a `ValueError` once there is a base: {reason}")


for _name, _reason in LOOKED_FOR.items():
    setattr(TensorGuard, _name, _looked_for(_name, _reason))


class FrozenBaseModel(TensorGuard, PreTrainedModel):
    """A model whose base no inherited method changes; see the module's docstring."""

    _other_shared_trees: tuple[str, ...] = ()  # paths of modules beside `LANGUAGE_TREES` that hold the base's weights
    _vision_trees: tuple[str, ...] = ("vision_tower",)  # models that see images
    vision_tower: PreTrainedModel
    multi_modal_projector: GenieBlueMultiModalProjector
    # Both are None until a base is attached.
    language_model: PreTrainedModel
    multimodal_language_model: PreTrainedModel

    def requires_grad_(self, requires_grad: bool = True) -> "FrozenBaseModel":
        """`nn.Module.requires_grad_` without the base and the tower's unused head, which stay frozen."""
        for name, child in self.named_children():
            if name != "language_model":
                child.requires_grad_(requires_grad)
        self._freeze_unused()
        return self

    def _freeze_unused(self) -> None:
        """Freezes what no image token is made of: a SigLIP's head, which pools patches into one vector."""
        if (head := getattr(self.vision_tower, "head", None)) is not None:
            head.requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenBaseModel":
        """Sets the training mode of everything except the base."""
        self.training = mode
        for name, child in self.named_children():
            if name != "language_model":
                child.train(mode)
        return self

    def apply(self, fn: Callable[[nn.Module], Any]) -> "FrozenBaseModel":
        """`nn.Module.apply` without the base's modules; for these, use `model.language_model.apply`."""
        for name, child in self.named_children():
            if name != "language_model":
                child.apply(fn)
        fn(self)
        return self

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """Sets it for all parts, or separately for `vision_config` and `text_config` (the base, in both views).

        Raises `ValueError` or `ImportError` for what one of them does not support, before anything changes.
        """
        names = {"vision_config": self._vision_trees, "text_config": LANGUAGE_TREES}
        wanted = attn_implementation if isinstance(attn_implementation, dict) else {"": attn_implementation}
        if unknown := sorted(set(wanted) - {"", *names}):
            raise ValueError(
                f"`attn_implementation` names {unknown[0]!r}: expected {', '.join(names)}, or '' for all."
            )
        parts = {getattr(self, name): wanted.get(key, wanted.get("")) for key in names for name in names[key]}
        parts = {part: choice for part, choice in parts.items() if part is not None and choice is not None}
        for part, choice in parts.items():
            part.get_correct_attn_implementation(choice)
        for part, choice in parts.items():
            part.set_attn_implementation(choice, *args, **kwargs)
        # The model's own configuration records the base's implementation and contains the tower's configuration.
        language = self.language_model
        self.config._attn_implementation_internal = (
            wanted.get("", self.config._attn_implementation)
            if language is None
            else language.config._attn_implementation
        )

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        """Sets it for the base, in both views; the tower has no experts."""
        for name in LANGUAGE_TREES:
            getattr(self, name).set_experts_implementation(experts_implementation)

    def get_experts_implementation(self) -> Any:
        """The base's implementation."""
        return self.language_model.get_experts_implementation()

    def get_decoder(self) -> nn.Module | None:
        """The base's blocks; `None` while no base is attached."""
        return None if self.language_model is None else self.language_model.get_decoder()

    def get_input_embeddings(self) -> nn.Module | None:
        """The base's embedding; `None` while no base is attached."""
        return None if self.language_model is None else self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The base's LM head; `None` while no base is attached."""
        return None if self.language_model is None else self.language_model.get_output_embeddings()

    def warn_if_padding_and_no_attention_mask(self, input_ids: torch.Tensor, attention_mask: Any) -> None:
        """Warns like the base, which owns the padding token."""
        self.language_model.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing once there is a base: both views share the same, already tied `Parameter` objects."""
        if self.language_model is None:
            super().tie_weights(*args, **kwargs)

    def set_submodule(self, target: str, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """`nn.Module.set_submodule`; `ValueError` for a module of the base or of the view over it."""
        if self.language_model is not None and target.split(".")[0] in LANGUAGE_TREES:
            raise ValueError(f"`set_submodule` of {target} is refused: {_OTHER_BASE}")
        super().set_submodule(target, module, *args, **kwargs)

    def enable_input_require_grads(self) -> None:
        """Does nothing: `forward` handles this in training, while transformers would hook the base's embedding."""

    def disable_input_require_grads(self) -> None:
        """The counterpart of `enable_input_require_grads`."""

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        # Not on `self`, whose modules include the base.
        for name in (*self._vision_trees, "multimodal_language_model"):
            getattr(self, name)._set_gradient_checkpointing(enable, *args, **kwargs)

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise ValueError(
            "`torch.nn.DataParallel` would copy the two views separately, although they share weights: start one "
            "process per device (`torchrun`, `accelerate launch`), or use one device (`CUDA_VISIBLE_DEVICES=0`)."
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "FrozenBaseModel":
        """Implements `to`, `half`, `cuda`, …, also when called on a module that contains this one.

        The base is moved but never cast: another dtype is a `ValueError`. A cast to the base's own dtype applies only
        to the tower and the projector, because it would also cast the base's rotary frequencies, which must stay in
        float32.
        """
        base = self.language_model
        if base is None:
            return super()._apply(fn, recurse)
        kinds = dict.fromkeys((base.dtype, torch.float32, torch.bfloat16, torch.float16, torch.int64))
        results = {kind: fn(torch.empty(0, dtype=kind, device=base.device)) for kind in kinds}
        moved = results[base.dtype]
        if moved.dtype != base.dtype:
            raise ValueError(
                f"The base is in {base.dtype}, and casting the model to {moved.dtype} would change its text answers. "
                f"Load the model again with `dtype={moved.dtype}`."
            )
        if moved.is_meta:
            raise ValueError(
                "Moving to the device 'meta' would lose all weights, including the base's: give another device."
            )

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(moved.device)

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return fn(tensor) if tensor.is_floating_point() else move(tensor)  # `type` would cast indices too

        of_language, of_others = (move, cast)
        if all(result.dtype == kind for kind, result in results.items()):
            of_language = of_others = fn
        for name, child in self.named_children():
            child._apply(OfTheWholeModel(of_language if name in LANGUAGE_TREES else of_others))
        return super()._apply(of_others, recurse=False)

    @property
    def loss_function(self) -> Callable[..., torch.Tensor]:
        """The loss of both views: the base's own, or what was set here or there, once there is a base."""
        return super().loss_function if self.language_model is None else self.language_model.loss_function

    @loss_function.setter
    def loss_function(self, loss_function: Callable[..., torch.Tensor]) -> None:
        if self.language_model is None:
            raise ValueError("This GenieBlue has no base, whose loss it is: set it once the model is loaded.")
        self.language_model.loss_function = loss_function

    def _is_loading(self) -> bool:
        return self.language_model is None


def refusal(kind: type, name: str, reason: str) -> Callable:
    """A method that refuses `name` for a class `kind`."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name in _USED_AT_LOAD and self._is_loading():
            return getattr(super(kind, self), name)(*args, **kwargs)
        raise ValueError(f"`{name}` is refused for a GenieBlue: {reason}")

    refuse.__name__, refuse.__doc__ = name, f"Always a `ValueError` once there is a base: {reason}"
    return refuse


for _name, _reason in REFUSALS.items():
    setattr(FrozenBaseModel, _name, refusal(FrozenBaseModel, _name, _reason))


def _check_registration(container: nn.Module, name: str, module: Any) -> None:
    """Stops PEFT when it wraps the model, before it replaces any layer of the base, and whatever would replace a base.

    Called wherever a module becomes a part of another one: `self.name = module`, `add_module`.
    """
    if isinstance(container, FrozenBaseModel):
        attached = container._modules.get(name) if name in LANGUAGE_TREES else None
        if attached is not None and module is not attached:
            raise ValueError(f"`{name}` of a GenieBlue is not replaced: {_OTHER_BASE} {_COMPILED}")
    elif isinstance(module, nn.Module) and any(kind.__module__.partition(".")[0] == "peft"
                                               for kind in type(container).__mro__):  # fmt: skip
        held = (part for each in (module, getattr(module, "_genieblue", module)) for part in each.modules())
        # A layer of our adapter has a `merge` of its own: see `guard_view`.
        if any(isinstance(part, TensorGuard) or "merge" in vars(part) for part in held):
            raise ValueError(f"PEFT cannot add another adapter to a GenieBlue: {_ONE_ADAPTER}")


register_module_module_registration_hook(_check_registration)
