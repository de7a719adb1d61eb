"""The state dict of a GenieBlue: everything it adds, each tensor under one name, without the base's weights.

It is kept so by hooks of `nn.Module`, and so it is within a wrapper too (`module.` of DDP). A state dict is loaded
whole or not at all: with LoRA of one training step and a projector of another, a model would answer in silence.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .frozen_base_genieblue import LANGUAGE_TREES
from .language_adapter_genieblue import is_adapter_name
from .model_files_genieblue import some

VIEW = f"{LANGUAGE_TREES[1]}."  # the tree that holds the adapter beside the base's weights


def shared_trees(model: Any) -> tuple[str, ...]:
    """Prefixes of the names of modules that hold the base's weights; the adapter is stored under those of the view."""
    return tuple(f"{name}." for name in (*LANGUAGE_TREES, *model._other_shared_trees))


def keep_own_state(model: nn.Module) -> None:
    """Makes `state_dict` and `load_state_dict` of `model`, also as part of another module, those of what is ours."""
    model.register_state_dict_post_hook(_drop_base)
    model.register_load_state_dict_pre_hook(_check_before_loading)
    model.register_load_state_dict_post_hook(_forget_base)


def check_own_state(model: nn.Module, state: Mapping[str, torch.Tensor], prefix: str = "") -> None:
    """`ValueError` unless `state` has all tensors of ours, in their shapes, and none of the base."""
    expected = model.state_dict(prefix=prefix)
    trees = tuple(prefix + tree for tree in shared_trees(model))
    missing = [name for name in expected if name not in state]
    foreign = [name for name in state if name.startswith(trees) and name not in expected]
    reshaped = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    kinds = {"missing": missing, "of the base or of another adapter": foreign, "of another shape": reshaped}
    problems = [f"{kind}: {some(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(
            f"This is not a complete state dict of this GenieBlue: {'; '.join(problems)}. Expected the "
            f"{len(expected)} tensors of `state_dict()`; nothing was changed. Load a saved GenieBlue with "
            "`from_pretrained`, and a part with its own method, such as `model.multi_modal_projector.load_state_dict`."
        )


def _drop_base(model: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    view = model.multimodal_language_model
    shared = set() if view is None else {f"{prefix}{VIEW}{name}" for name, _ in view.named_buffers()}
    trees = tuple(prefix + tree for tree in shared_trees(model))
    for name in [name for name in state if name.startswith(trees)]:
        # Buffers of a copied block are those of the original.
        is_adapter = name.startswith(prefix + VIEW) and is_adapter_name(name.removeprefix(prefix))
        if not is_adapter or name in shared:
            del state[name]


def _check_before_loading(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    # torch.distributed fills what it was given up with the model's own parameters, which would hide what is missing.
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if state.get(prefix + name) is tensor:
            del state[prefix + name]
    check_own_state(model, {name: value for name, value in state.items() if name.startswith(prefix)}, prefix)
    model._prefix_of_load = prefix  # which the hook after it is not told


def _forget_base(model: Any, incompatible: Any) -> None:
    prefix = model.__dict__.pop("_prefix_of_load")
    trees = tuple(prefix + tree for tree in shared_trees(model))
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.startswith(trees)]
