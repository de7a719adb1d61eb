"""transformers' Trainer for GenieBlue: which parameters learn how fast, and checkpoints that are whole or absent."""

import contextlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

logger = logging.getLogger(__name__)

PARTS = ("projector", "vision", "copies", "lora")
TRAINED = "trained_parameters.safetensors"
SETTINGS = "training_settings.json"
# The last one is the one that Trainer writes last.
CHECKPOINT_FILES = (TRAINED, SETTINGS, "optimizer.pt", "scheduler.pt", "trainer_state.json")
UNFINISHED = "unfinished"
LOCK = ".lock"
# Of `torch.save` on a full disk, which is a RuntimeError.
TORCH_WRITE_ERRORS = ("PytorchStreamWriter failed", "unexpected pos", "inline_container")
# A data loader puts the traceback of its worker process into the message of the error that it raises again.
WORKER_ERROR = re.compile(r"Caught (\w+) in DataLoader worker process \d+\.\n.*\n(?:\w+\.)*\1: ", re.DOTALL)


def part_of(name: str) -> str | None:
    """The part that a parameter of a GenieBlue belongs to, one of `PARTS`; `None` for the base's."""
    if name.startswith("multi_modal_projector."):
        return "projector"
    if name.startswith("vision_tower."):
        # The pooling head of a SigLIP is no part of the way from pixels to image tokens.
        return None if name.startswith("vision_tower.head.") else "vision"
    if name.startswith("multimodal_language_model."):
        if ".modules_to_save." in name:
            return "copies"
        if ".lora_A." in name or ".lora_B." in name:
            return "lora"
    return None


def vision_layer_scale(name: str, num_layers: int, decay: float) -> float:
    """Factor on the learning rate of a vision parameter: `decay` to the power of its distance from the output.

    Blocks count from 0 at the input: block i of L gets `decay ** (L - i)`, the embeddings `decay ** (L + 1)`, the norm
    behind the last block 1 (BEiT's rule, arXiv 2106.08254).
    """
    words = name.split(".")
    if "embeddings" in words:
        return decay ** (num_layers + 1)
    if "layers" in words:
        return decay ** (num_layers - int(words[words.index("layers") + 1]))
    return 1.0


def optimizer_groups(
    model: nn.Module, learning_rates: dict[str, float], vision_layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW groups of all parameters that require a gradient, one by learning rate and weight decay.

    Vectors (biases, norms) are not decayed: a choice, as the paper does not say. Raises `ValueError` for a parameter
    of the base.
    """
    num_layers = model.config.vision_config.num_hidden_layers
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        if part not in learning_rates:
            raise ValueError(f"{name} requires a gradient, but only {', '.join(learning_rates)} are to be trained.")
        scale = vision_layer_scale(name, num_layers, vision_layer_decay) if part == "vision" else 1.0
        decay = weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((part, learning_rates[part] * scale, decay), []).append(parameter)
    order = sorted(groups, key=lambda group: PARTS.index(group[0]))
    return [{"params": groups[key], "part": key[0], "lr": key[1], "weight_decay": key[2]} for key in order]


class LastLoss(TrainerCallback):
    """Logs the end of a run too, whose loss would else be that of some steps before."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class TrainingProgress(ProgressCallback):
    """Trainer's progress bar, with loss and samples per second beside it instead of dictionaries below it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(
                f"loss {logs['loss']:.4g}, {logs.get('samples_per_second', math.nan):.3g} samples/s"
            )


class GenieBlueTrainer(Trainer):
    """Trains the parameters that require a gradient, kept in float32; the base is not among them.

    Checkpoints hold what is trained, the optimizer, the schedule, random states and the place in the data. They are
    written under another name and renamed when they are complete.
    """

    def __init__(
        self,
        *args: Any,
        groups: list[dict[str, Any]],
        optimizer_options: dict[str, Any],
        autocast_dtype: torch.dtype | None,
        settings_record: dict[str, Any],
        keep_checkpoints: int,
        scheduler_factory: Callable[[torch.optim.Optimizer], Any] | None = None,
        **kwargs: Any,
    ):
        """`groups` and `optimizer_options` are for AdamW; `settings_record` goes into checkpoints, to be compared."""
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.add_callback(LastLoss)
        self._groups = groups
        self._optimizer_options = optimizer_options
        self._autocast_dtype = autocast_dtype
        self._settings_record = settings_record
        self._keep_checkpoints = keep_checkpoints
        self._scheduler_factory = scheduler_factory
        self._writing_checkpoint = False
        self._samples_since_log = 0
        self._last_log_time: float | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the groups; `ValueError` if a parameter or buffer of the base is among them."""
        if self.optimizer is None:
            base = {id(tensor) for tensor in self.model.language_model.parameters()}
            if any(id(parameter) in base for group in self._groups for parameter in group["params"]):
                raise ValueError("A parameter of the base is among those to train; the base must stay frozen.")
            self.optimizer = torch.optim.AdamW(self._groups, **self._optimizer_options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Trainer's schedule, or the caller's own."""
        if self._scheduler_factory is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = self._scheduler_factory(optimizer or self.optimizer)
        return self.lr_scheduler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The batches of the next step; the error of a worker process has the message that it had there."""
        try:
            return super().get_batch_samples(*args, **kwargs)
        except ValueError as error:
            raise ValueError(WORKER_ERROR.sub("", str(error))) from error

    def compute_loss_context_manager(self) -> Any:
        """Autocast. Trainer's own way patches `forward` of the model, which would have to be undone."""
        if self._autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, dtype=self._autocast_dtype)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loss of one batch, without a cache."""
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one batch; `ValueError` for a loss that is not finite."""
        self._last_log_time = self._last_log_time or time.perf_counter()
        self._samples_since_log += len(inputs["input_ids"]) * self.args.world_size
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            self._stop_at("loss", loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if norm is not None and not math.isfinite(float(norm)):
            self._stop_at("norm of the gradients", norm)
        return norm

    def _stop_at(self, what: str, value: Any) -> None:
        raise ValueError(
            f"The {what} is {float(value)} at step {self.state.global_step + 1}: training stops before the weights "
            "are spoiled. Lower the learning rate or lengthen the warm-up; an earlier checkpoint can be resumed."
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: Trainer's estimate knows neither tiles nor frozen weights."""
        return 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds samples per second since the last log."""
        if "loss" in logs and self._last_log_time is not None:
            now = time.perf_counter()
            logs["samples_per_second"] = self._samples_since_log / max(now - self._last_log_time, 1e-9)
            self._last_log_time, self._samples_since_log = now, 0
        super().log(logs, *args, **kwargs)

    # Checkpoints

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        restored = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # Trainer would go on with the intervals of the checkpoint
        return restored

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._writing_checkpoint else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self._writing_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and not any(words in str(error) for words in TORCH_WRITE_ERRORS):
                raise
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            raise OSError(
                f"{name} could not be written to {folder} ({str(error).splitlines()[0]}): make room there. The last "
                "whole checkpoint stays, and `resume` (--resume) goes on from it."
            ) from error
        finally:
            self._writing_checkpoint = False
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            if (folder / name).exists():  # of a later part of a run that was resumed from an earlier checkpoint
                shutil.rmtree(folder / name)
            os.rename(folder / UNFINISHED / name, folder / name)
            os.rmdir(folder / UNFINISHED)
            rotate_checkpoints(str(folder), self._keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # Cloned, because stacked LoRA matrices share memory, which safetensors refuses.
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in self._trained_parameters()}
        save_file(tensors, folder / TRAINED)
        (folder / SETTINGS).write_text(json.dumps(self._settings_record, indent=2) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint)
        recorded = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
        if other := sorted(key for key in self._settings_record if recorded.get(key) != self._settings_record[key]):
            told = "; ".join(f"{key} was {recorded.get(key)!r}, is {self._settings_record[key]!r}" for key in other)
            raise ValueError(f"{path} belongs to a run with other settings: {told}. Resume with those of then.")
        try:
            saved = load_file(path / TRAINED)
        except SafetensorError as error:
            raise OSError(f"{path / TRAINED} cannot be read ({error}): resume from another checkpoint.") from error
        trained = dict(self._trained_parameters())
        shapes = {name: value.shape for name, value in trained.items()}
        if {name: value.shape for name, value in saved.items()} != shapes:
            raise ValueError(
                f"{path} holds {len(saved)} tensors that are not the {len(trained)} to be trained: it belongs to "
                "another model or stage."
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])

    def _trained_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)


@contextlib.contextmanager
def exclusive_run(folder: Path) -> Iterator[None]:
    """Keeps a second run away from the folder of checkpoints, by a lock that the system lifts if the process dies.

    Raises `OSError` at once if another run holds it. An empty folder is removed at the end.
    """
    if int(os.environ.get("RANK", 0)) > 0:  # processes of one run: the first one locks for all
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OSError(
            f"Another training writes to {folder} at this moment: wait for it, end it, or give another output."
        ) from error
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # it holds checkpoints
            folder.rmdir()


def find_checkpoint(folder: Path, resume: bool | str | os.PathLike) -> Path | None:
    """The checkpoint to go on from: a given one, or the last one in `folder`; `None` to start from the beginning.

    Raises `ValueError` for a given checkpoint that is none, and, so that two runs never mix, if a new run is to start
    where an earlier one left checkpoints.
    """
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # of a run that was killed while it wrote
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if resume is False or resume is None:
        if last is not None:
            raise ValueError(
                f"An earlier run left checkpoints in {folder}: go on with `resume` (--resume), remove the folder, or "
                "give another output."
            )
        return None
    if resume is True:
        if last is None:
            logger.warning("No checkpoint in %s to resume from: training starts from the beginning.", folder)
            return None
        resume = last
    path = Path(resume)
    missing = [name for name in CHECKPOINT_FILES if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path} is no complete checkpoint: it has no {', '.join(missing)}. Give another one.")
    return path


def is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint was written by the last step of its run."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"] >= state["max_steps"]


__all__ = ["GenieBlueTrainer", "TrainingProgress", "exclusive_run", "find_checkpoint", "optimizer_groups", "part_of"]
