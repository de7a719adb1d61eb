"""FSDP2 over the trained parameters: each device keeps a share of them, of their gradients and optimizer states.

The frozen base stays whole on every device, the same `Parameter` objects in both views: FSDP never sees it. So text
stays exact without any gathering, and what is sharded is where most of the memory goes: 16 bytes by trained parameter,
against 2 by frozen one.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
)  # fmt: skip
TAKEN_OVER = "GENIEBLUE_FSDP"  # of this process, which may plan a run before it, and train both stages


def wants_fsdp(setting: bool) -> bool:
    """Whether to shard: the setting `fsdp`, or `accelerate launch --use_fsdp`, whose part is ours from here on.

    Raises `ValueError` for what the launcher asks for and training cannot do.
    """
    asked = {name: value.lower() for name, value in os.environ.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    if asked.get("ACCELERATE_USE_FSDP") != "true":
        return setting or TAKEN_OVER in os.environ
    if asked.get("FSDP_VERSION") != "2":
        raise ValueError("FSDP 1 is not supported: give accelerate --fsdp_version 2.")
    for name, instead in {
        "OFFLOAD_PARAMS": "fewer samples",
        "ACTIVATION_CHECKPOINTING": "--gradient-checkpointing",
    }.items():
        if asked.get(f"FSDP_{name}") == "true":
            raise ValueError(f"accelerate's --fsdp_{name.lower()} is not supported: leave it out, and use {instead}.")
    # accelerate itself would shard the base too, and replace the classes of its modules.
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    os.environ[TAKEN_OVER] = "true"
    return True


@contextlib.contextmanager
def sharded_parameters(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, all parameters that require gradients are sharded over the processes, and in the end whole again.

    After an error they stay as they are: to gather them takes all processes, of which one may be gone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.to(device)
    for parameter in model.parameters():
        if parameter.requires_grad:  # made with other random numbers in each process, perhaps
            torch.distributed.broadcast(parameter.data, src=0)
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    trained = [item for item in model.named_parameters(remove_duplicate=False) if item[1].requires_grad]
    before = [snapshot(module) for module in model.modules()]
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in trained_blocks(model, lambda parameter: parameter.requires_grad):
        fully_shard(block, mesh=mesh, ignored_params=frozen, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, ignored_params=frozen)
    for _, parameter in trained:
        parameter.data = parameter.data.new_empty(0)
    yield
    for module in _sharded_modules(model):
        module.reshard()
    shares = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in trained:
        owner, _, attribute = name.rpartition(".")
        if parameter.numel() == 0:
            parameter.data = whole(shares[name])
        model.get_submodule(owner)._parameters[attribute] = parameter
    for restore in before:
        restore()


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, each process has all parameters for passes without gradients, in which it need not wait for others."""
    modules = _sharded_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in modules:
        module.set_reshard_after_forward(module is not model, recurse=False)
        module.reshard()


def trained_blocks(module: nn.Module, is_trained: Callable[[nn.Parameter], bool]) -> Iterator[nn.Module]:
    """The blocks (members of a list of modules) with trained parameters, which are gathered one at a time."""
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            yield from trained_blocks(child, is_trained)
            continue
        yield from (block for block in child if any(map(is_trained, block.parameters())))


def whole(tensor: Any) -> Any:
    """A sharded tensor gathered from all processes, each of which must call this; anything else as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_like(tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """This process's share of a whole tensor, sharded like a parameter of its shape."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    local = tensor.to(parameter.device)
    return distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _sharded_modules(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def snapshot(module: nn.Module) -> Callable[[], None]:
    """Takes note of a module's class, attributes and hooks; the result takes away what FSDP or DeepSpeed will add.

    torch has no function that undoes `fully_shard`.
    """
    from torch.distributed._composable_state import _module_state_mapping

    kind, names = type(module), set(vars(module))
    hooks = {name: set(vars(module)[name]) for name in HOOKS}

    def restore() -> None:
        module.__class__ = kind
        _module_state_mapping.pop(module, None)
        for name, kept in hooks.items():
            for added in vars(module)[name].keys() - kept:
                del vars(module)[name][added]
        for name in vars(module).keys() - names:
            if name.startswith(("_is_fsdp", "_fsdp")) or "composable" in name:
                del vars(module)[name]

    return restore
