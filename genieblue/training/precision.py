"""Precision and memory of a run: which weights are trained, in which dtype, and what to change if they do not fit."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from genieblue.training.settings import TrainingSettings
from genieblue.training.structure import GenieBlueStructure


def choose_autocast(base: nn.Module, bf16: bool | None) -> torch.dtype | None:
    """bfloat16 if requested or if the base uses it, `None` for plain float32; `ValueError` for other dtypes.

    The base's blocks pass activations in the base's dtype to trained blocks in float32, which requires autocast.
    """
    if bf16 is False and base.dtype != torch.float32:
        raise ValueError(
            f"The base is in {base.dtype} and bf16 is off (--no-bf16): load it in float32 (--dtype float32), or leave "
            "bf16 on."
        )
    if base.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"The base is in {base.dtype}: load it in bfloat16 (--dtype bfloat16) to train with bfloat16 autocast, or "
            "in float32."
        )
    wanted = base.dtype == torch.bfloat16 if bf16 is None else bf16
    return torch.bfloat16 if wanted else None


@contextlib.contextmanager
def prepared_for_training(
    structure: GenieBlueStructure, groups: Sequence[str], gradient_checkpointing: bool
) -> Iterator[None]:
    """Inside, only these `groups` require gradients, in float32; on exit everything is restored, in eval mode."""
    model, frozen = structure.model, {id(parameter) for parameter in structure.frozen.parameters()}
    parameters = dict(model.named_parameters())
    before = {name: (parameter.requires_grad, parameter.dtype) for name, parameter in parameters.items()}
    had_use_cache = "use_cache" in vars(model.config)
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(structure.group_of(name) in groups)
            if parameter.requires_grad:
                # In 16 bits, the steps of a small learning rate would be rounded away.
                parameter.data = parameter.data.float()
        if gradient_checkpointing:
            model.activation_checkpointing_enable()
        yield
    finally:
        if gradient_checkpointing:
            model.activation_checkpointing_disable()
        for name, parameter in parameters.items():
            requires_grad, dtype = before[name]
            parameter.requires_grad_(requires_grad and id(parameter) not in frozen)
            parameter.grad = None
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        if not had_use_cache and "use_cache" in vars(model.config):
            del model.config.use_cache  # set by Trainer
        model.eval()


@contextlib.contextmanager
def naming_memory_settings(settings: TrainingSettings, max_tiles: int | None) -> Iterator[None]:
    """Turns a GPU's lack of memory into a `ValueError` that names the settings to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        remedies = [f"lower `batch_size` ({settings.batch_size}) and raise `gradient_accumulation` by as much"]
        if not settings.gradient_checkpointing:
            remedies.append("turn on `gradient_checkpointing` (--gradient-checkpointing)")
        tiles = "" if max_tiles is None else f" or `max_tiles` ({max_tiles})"
        remedies.append(f"lower `max_length` ({settings.max_length}){tiles}")
        if not settings.fsdp:
            remedies.append("with several GPUs use `fsdp` (--fsdp)")
        raise ValueError(
            f"The GPU is out of memory ({str(error).partition(chr(10))[0].rstrip('.')}): {'; or '.join(remedies)}. "
            "The first two can be changed with `resume` (--resume); --plan says what takes how much."
        ) from error
