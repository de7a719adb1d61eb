"""DeepSpeed's ZeRO-1 and ZeRO-2: each device keeps a share of the optimizer states, and with 2 of the gradients.

The weights stay whole on each device, so that the base and text stay as they are, and checkpoints are those of any
other run. The engine takes the optimizer, its rates by part and its precision from the run. It takes a step within
`backward`: a loss that is not finite ends the run after that step, still before anything is written.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from genieblue.training.settings import TrainingSettings
from genieblue.training.sharding import snapshot

BUCKET = 50_000_000  # gradients that are exchanged at a time; by default DeepSpeed takes 2 GB for them
OFFLOADED = "leave it out, and use fewer samples"
# What accelerate's launcher may ask for, and what to do instead.
REFUSED = {
    "mixed_precision": "leave it out; training is in float32, or in bfloat16 autocast with --bf16",
    "deepspeed_config_file": "give --zero_stage 2 instead; the run sets everything else",
    "offload_optimizer_device": OFFLOADED,
    "offload_param_device": OFFLOADED,
}

Groups = Sequence[Sequence[nn.Parameter]]  # the optimizer's parameters before the engine replaced them by flat shares


def zero_stage() -> int:
    """The stage of ZeRO that `accelerate launch --use_deepspeed` asks for, or 0.

    Raises `ValueError` for what it asks for and training cannot do.
    """
    asked = {name: value.lower() for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    if asked.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return 0
    for option, instead in REFUSED.items():
        for name in (f"ACCELERATE_{option.upper()}", f"ACCELERATE_DEEPSPEED_{option.upper()}"):
            if asked.get(name, "no") not in ("no", "none"):
                raise ValueError(f"accelerate's --{option} is not supported with DeepSpeed: {instead}.")
    stage = asked.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("1", "2"):
        raise ValueError(
            f"ZeRO's stage {stage} is not supported: stage 3 splits up the base's weights, which requests for text "
            "need whole. Give accelerate --zero_stage 2, or start with --use_fsdp --fsdp_version 2, which shares all "
            "that is trained."
        )
    return int(stage)


def engine_settings(stage: int, settings: TrainingSettings, autocast_dtype: torch.dtype | None) -> dict[str, Any]:
    """DeepSpeed's settings for a run."""
    return {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET},
        "train_micro_batch_size_per_gpu": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "gradient_clipping": settings.max_grad_norm,
        # The engine turns off autocast that is not its own. Without modules, gradients are exchanged in float32.
        "torch_autocast": {
            "enabled": autocast_dtype is not None, "dtype": "bfloat16", "lower_precision_safe_modules": [],
        },
    }  # fmt: skip


@contextlib.contextmanager
def plain_after_zero(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts a model on its device; in the end, takes away what an engine, by then destroyed, added to it.

    After an error the engine's hooks stay: train with another object of the model.
    """
    model.to(device)
    before = [snapshot(module) for module in model.modules()]
    trained = {each: set(vars(each)) for each in model.parameters() if each.requires_grad}
    yield
    for restore in before:
        restore()
    for parameter, names in trained.items():
        parameter.data = parameter.data.clone()  # out of the engine's flat weights
        for name in vars(parameter).keys() - names:
            delattr(parameter, name)


def whole_state_dict(optimizer: Any, groups: Groups, keep: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    """An optimizer's `state_dict` as without an engine; all processes must call this to gather their shares.

    `keep` is called with each gathered state at once, and gives what stands for it.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_get_full_optimizer_state

    found: dict[str, Any] = {"state": {}, "param_groups": []}
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        share, first = group["params"][0], len(found["state"])
        # The engine does so after the step of the first group, when the others have no states yet.
        lazy_init_hp_params_optimizer_state(parameters, share, optimizer.state)
        for parameter in parameters:
            found["state"][len(found["state"])] = {
                name: keep(safe_get_full_optimizer_state(parameter, name) if value.dim() else value.clone())
                for name, value in optimizer.state[share].items()
            }
        found["param_groups"].append({**group, "params": list(range(first, len(found["state"])))})
    return found


def load_whole_state_dict(optimizer: Any, groups: Groups, state: dict[str, Any]) -> None:
    """Gives an engine's optimizer this process's shares of a `state_dict`."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

    for group, parameters, saved in zip(optimizer.param_groups, groups, state["param_groups"], strict=True):
        share = group["params"][0]
        states = [state["state"][index] for index in saved["params"]]
        optimizer.state[share] = {
            name: torch.zeros_like(share) if value.dim() else value.to(share.device)
            for name, value in states[0].items()
        }
        lazy_init_hp_params_optimizer_state(parameters, share, optimizer.state)
        for parameter, values in zip(parameters, states, strict=True):
            for name, value in values.items():
                if value.dim():
                    safe_set_full_optimizer_state(parameter, value.to(share.device), name)
        group.update({name: value for name, value in saved.items() if name != "params"})
