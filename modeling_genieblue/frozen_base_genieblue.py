"""What a GenieBlue inherits, kept away from the base: a method acts on what is ours, or is refused by name.

The base is another model's, shared by both views. So casting, freezing, initialising and the like reach the vision
tower, the projector and the adapter only; what would replace or rewrite the base, or put a second adapter over it,
is a `ValueError` that names the way to go, before anything has changed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

from .arguments_genieblue import OFFLOAD_ADVICE
from .language_adapter_genieblue import adapter_parameters
from .projector_genieblue import GenieBlueMultiModalProjector

LANGUAGE_TREES = ("language_model", "multimodal_language_model")
_ONE_ADAPTER = (
    "both views share the base's weights, and a GenieBlue has and saves one adapter, its own, which another one would "
    "switch off. Train its own; `lora_rank` of `from_base` gives it more room. Merge a LoRA for texts into the base "
    "before you make a GenieBlue from it."
)
_INITIALISED = "it would draw the base's weights anew. Make a new GenieBlue with `from_base`."
_EMBEDDINGS = (
    "the embeddings of a GenieBlue are the base's and stay as they are; image tokens need no row. Resize the base "
    "before making a GenieBlue from it, if it must have more tokens."
)
_OTHER_BASE = "it would replace the base. Load the GenieBlue onto it with `from_pretrained(..., base_model=)`."
_COMPILED = "A view is compiled where it is, by its own `compile()`."
_POSITIONS = "positions are the base's own, and nothing of them can be resized here."
_BATCHING = "it serves one model, and a GenieBlue is two views. Texts can use that of `model.language_model`."
# By name, why a method is refused and what to do instead.
REFUSALS = {
    "add_adapter": _ONE_ADAPTER,
    "load_adapter": f"{_ONE_ADAPTER} Other weights of it are loaded with their folder, by `from_pretrained`.",
    "set_adapter": _ONE_ADAPTER,
    "delete_adapter": "without it a GenieBlue cannot see. Use `model.language_model`, which is the plain base.",
    "enable_peft_hotswap": f"{_ONE_ADAPTER} Load another GenieBlue onto the same base with `base_model=`.",
    "disable_adapters": "texts run without the adapter already; `view='text'` says so for a request.",
    "enable_adapters": "the adapter is always on in the multimodal view; `view='multimodal'` runs it for texts too.",
    "active_adapters": "PEFT's own state is kept inside. It has one adapter, always on in the multimodal view.",
    "get_adapter_state_dict": "use `state_dict()`, or the folder `language_adapter` of a save, which PEFT loads.",
    "dequantize": "it would change the base's weights. Load the base without `quantization_config`.",
    "init_weights": _INITIALISED,
    "initialize_weights": _INITIALISED,
    "post_init": _INITIALISED,
    "smart_apply": _INITIALISED,
    "to_empty": "it would lose all weights, the base's too. Move with `to(device)`.",
    "set_use_kernels": "it would replace layers of the base. Load the base with `use_kernels=True`, and give it as "
    "`base_model=`.",
    "set_input_embeddings": _EMBEDDINGS,
    "set_output_embeddings": _EMBEDDINGS,
    "resize_token_embeddings": _EMBEDDINGS,
    "resize_position_embeddings": _POSITIONS,
    "get_position_embeddings": _POSITIONS,
    "set_decoder": _OTHER_BASE,
    "set_encoder": "another vision tower needs another adapter. Make a new GenieBlue with `from_base`.",
    "save_distributed_checkpoint": "use `save_pretrained`, which writes what is ours; the base is never written.",
    "generate_batch": _BATCHING,
    "init_continuous_batching": _BATCHING,
    "continuous_batching_context_manager": _BATCHING,
}
# transformers calls these itself while a GenieBlue has no base yet.
_USED_AT_LOAD = ("init_weights", "initialize_weights", "post_init", "smart_apply", "to_empty", "set_use_kernels")


class FrozenBaseModel(PreTrainedModel):
    """A model with a base that no inherited method changes; see the module's docstring."""

    vision_tower: PreTrainedModel
    multi_modal_projector: GenieBlueMultiModalProjector
    # Both are None until a base is attached.
    language_model: PreTrainedModel
    multimodal_language_model: PreTrainedModel

    def requires_grad_(self, requires_grad: bool = True) -> "FrozenBaseModel":
        """`nn.Module.requires_grad_` of what is ours; the base stays frozen, and a tower's head that is not used."""
        self.vision_tower.requires_grad_(requires_grad)
        self.multi_modal_projector.requires_grad_(requires_grad)
        if self.multimodal_language_model is not None:
            for _, _, parameter in adapter_parameters(self.multimodal_language_model):
                parameter.requires_grad_(requires_grad)
        if getattr(self.vision_tower, "head", None) is not None:  # a SigLIP's, which pools patches
            self.vision_tower.head.requires_grad_(False)
        return self

    def train(self, mode: bool = True) -> "FrozenBaseModel":
        """Training mode of all that trains; the base stays in the mode that it is in."""
        self.training = mode
        for name, child in self.named_children():
            if name != "language_model":
                child.train(mode)
        return self

    def apply(self, fn: Callable[[nn.Module], Any]) -> "FrozenBaseModel":
        """`nn.Module.apply` to modules that are ours; to the base's with `model.language_model.apply`."""
        for name, child in self.named_children():
            if name not in LANGUAGE_TREES:
                child.apply(fn)
        view = self.multimodal_language_model
        if view is not None:
            owners = dict.fromkeys(name.rpartition(".")[0] for name, _, _ in adapter_parameters(view))
            for owner in owners:
                fn(view.get_submodule(owner))
        fn(self)
        return self

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """Of all parts, or by `vision_config` and `text_config`, which is the base, in both views.

        Raises `ValueError` or `ImportError` for what one of them cannot run; nothing is changed then.
        """
        names = {"vision_config": ("vision_tower",), "text_config": LANGUAGE_TREES}
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
        # The model's own configuration says what the base runs; the tower's is part of it.
        language = self.language_model
        self.config._attn_implementation_internal = (
            wanted.get("", self.config._attn_implementation)
            if language is None
            else language.config._attn_implementation
        )

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        """Of the base, in both views; the tower has no experts."""
        for name in LANGUAGE_TREES:
            getattr(self, name).set_experts_implementation(experts_implementation)

    def get_experts_implementation(self) -> Any:
        """That of the base."""
        return self.language_model.get_experts_implementation()

    def warn_if_padding_and_no_attention_mask(self, input_ids: torch.Tensor, attention_mask: Any) -> None:
        """As the base does, whose padding token it is."""
        self.language_model.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do with a base: what it ties is tied in both views, which hold the same `Parameter` objects."""
        if self.language_model is None:
            super().tie_weights(*args, **kwargs)

    def set_submodule(self, target: str, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """`nn.Module.set_submodule`; `ValueError` for a module of the base or of the view over it."""
        if self.language_model is not None and target.split(".")[0] in LANGUAGE_TREES:
            raise ValueError(f"`set_submodule` of {target} is refused: {_OTHER_BASE}")
        super().set_submodule(target, module, *args, **kwargs)

    def enable_input_require_grads(self) -> None:
        """Nothing to do: `forward` sees to it in training, where transformers would hook the base's embedding."""

    def disable_input_require_grads(self) -> None:
        """The counterpart of `enable_input_require_grads`."""

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        # Not on `self`, whose modules include the base.
        for module in (self.vision_tower, self.multimodal_language_model):
            module._set_gradient_checkpointing(enable, *args, **kwargs)

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise ValueError(
            "`torch.nn.DataParallel` would copy the views apart, which share the base's weights: start a process for "
            "each device (`torchrun`, `accelerate launch`), or show one device (`CUDA_VISIBLE_DEVICES=0`)."
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "FrozenBaseModel":
        """All of `to`, `half`, `cuda`, …, also those of a module that holds this one.

        The base is moved and never cast: another precision is a `ValueError`, its own is given to the tower and the
        projector alone, because a cast would reach the base's rotary frequencies, which are in float32 on purpose.
        """
        base = self.language_model
        if base is None:
            return super()._apply(fn, recurse)
        kinds = dict.fromkeys((base.dtype, torch.float32, torch.bfloat16, torch.float16, torch.int64))
        results = {kind: fn(torch.empty(0, dtype=kind, device=base.device)) for kind in kinds}
        moved = results[base.dtype]
        if moved.dtype != base.dtype:
            raise ValueError(
                f"The base is in {base.dtype} and is not cast, so neither is what belongs to it: {moved.dtype} would "
                f"change its answers. Load the model again with `dtype={moved.dtype}`."
            )
        if moved.is_meta:
            raise ValueError("On the device 'meta' all weights are lost, the base's too: give one that has memory.")
        if all(result.dtype == kind for kind, result in results.items()):
            return super()._apply(fn, recurse)

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(moved.device)

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return fn(tensor) if tensor.is_floating_point() else move(tensor)  # `type` would cast indices too

        for name, child in self.named_children():
            child._apply(move if name in LANGUAGE_TREES else cast)
        return super()._apply(cast, recurse=False)

    def __setattr__(self, name: str, value: Any) -> None:
        # What accelerate does to a model that it spreads or offloads, before anything else.
        if name == "_old_forward" and self.language_model is not None:
            raise ValueError(f"accelerate cannot dispatch or offload a GenieBlue that is loaded: {OFFLOAD_ADVICE}")
        # What it does last, behind `load_checkpoint_and_dispatch` too, which passes over what a file does not hold.
        if name == "hf_device_map" and self.language_model is not None:
            raise ValueError(
                "accelerate cannot dispatch a GenieBlue that is loaded. If it was to load weights, some of them may "
                "be others by now: load the folder anew, with `from_pretrained(..., device_map=)`."
            )
        super().__setattr__(name, value)


def _refusal(name: str, reason: str) -> Callable:
    def refuse(self: FrozenBaseModel, *args: Any, **kwargs: Any) -> Any:
        if self.language_model is None and name in _USED_AT_LOAD:
            return getattr(super(FrozenBaseModel, self), name)(*args, **kwargs)
        raise ValueError(f"`{name}` is refused for a GenieBlue: {reason}")

    refuse.__name__, refuse.__doc__ = name, f"Always a `ValueError` once there is a base: {reason}"
    return refuse


for _name, _reason in REFUSALS.items():
    setattr(FrozenBaseModel, _name, _refusal(_name, _reason))


def _check_registration(container: nn.Module, name: str, module: Any) -> None:
    """Stops PEFT where it takes a model in, before it replaces any layer of the base, and what would replace a base.

    Called wherever a module becomes a part of another one: `self.name = module`, `add_module`.
    """
    if isinstance(container, FrozenBaseModel):
        attached = container._modules.get(name) if name in LANGUAGE_TREES else None
        if attached is not None and module is not attached:
            raise ValueError(f"`{name}` of a GenieBlue is not replaced: {_OTHER_BASE} {_COMPILED}")
    elif isinstance(module, nn.Module) and any(kind.__module__.partition(".")[0] == "peft"
                                               for kind in type(container).__mro__):  # fmt: skip
        held = (part for each in (module, getattr(module, "_genieblue", module)) for part in each.modules())
        if any(isinstance(part, FrozenBaseModel) or vars(part).get("is_multimodal_view", False) for part in held):
            raise ValueError(f"PEFT cannot put another adapter over a GenieBlue: {_ONE_ADAPTER}")


register_module_module_registration_hook(_check_registration)

__all__ = ["FrozenBaseModel"]
