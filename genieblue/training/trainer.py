"""transformers' Trainer with atomic checkpoints, which stops before a bad loss can damage the weights."""

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_pt_utils import DistributedLengthGroupedSampler
from transformers.trainer_utils import rotate_checkpoints

from genieblue.data.collation import SAMPLES, plain_worker_errors
from genieblue.training.checkpoints import SETTINGS, TRAINED, UNFINISHED
from genieblue.training.memory import peak_memory
from genieblue.training.plan import remaining
from genieblue.training.sharding import gathered, share_like, whole
from genieblue.training.validation import BEST, best_record, replaced_best
from genieblue.training.zero import load_whole_state_dict, whole_state_dict
from modeling_genieblue.model_files_genieblue import some
from modeling_genieblue.view_routing_genieblue import MULTIMODAL

logger = logging.getLogger(__name__)

SAMPLES_PER_STEP = "samples per step"  # in the settings record
NAMED_SAMPLES = 8  # in an error message
STEPS_TO_TIME = 5  # after which a run says how long it will take
# Raised by `torch.save` on a full disk, as a RuntimeError.
TORCH_WRITE_ERRORS = ("PytorchStreamWriter failed", "unexpected pos", "inline_container")


class LastLoss(TrainerCallback):
    """Logs the last step too, so that the final loss is not from an earlier step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class PartRates(TrainerCallback):
    """The learning rate of each part in the last step; when the step is logged, the schedule is already ahead."""

    def __init__(self):
        self.rates: dict[str, float] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Takes the highest rate of each part, whose layers may have lower ones."""
        self.rates = {}
        for group in optimizer.param_groups:
            self.rates[group["group"]] = max(self.rates.get(group["group"], 0.0), group["lr"])


class TrainingProgress(ProgressCallback):
    """Trainer's progress bar with loss and speed, and once a note of the time and cost of what is left."""

    def __init__(self, price_per_hour: float | None = None):
        super().__init__()
        self._price_per_hour = price_per_hour
        self._started: tuple[float, int] | None = None  # when, and at which step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar at the step where training starts, so that its time is right after a resume."""
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                desc="Training", total=state.max_steps, initial=state.global_step, dynamic_ncols=True
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar; after the first steps, logs how long the rest will take."""
        super().on_step_end(args, state, control, **kwargs)
        if self._started is None:  # the first step is slower than the others
            self._started = time.perf_counter(), state.global_step
        begin, first = self._started
        left = state.max_steps - state.global_step
        if state.is_world_process_zero and state.global_step - first == STEPS_TO_TIME and left > 0:
            seconds = (time.perf_counter() - begin) / STEPS_TO_TIME
            logger.info(remaining(left, seconds, self._price_per_hour))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Shows loss and speed in the bar instead of printing dictionaries."""
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            speed = f", {logs['samples_per_second']:.3g} samples/s" if "samples_per_second" in logs else ""
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4g}{speed}")
        shown = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_answers")}
        shown |= {"loss": logs["eval_loss"]} if "eval_loss" in logs else {}
        if shown:
            values = ", ".join(f"{name.removeprefix('answers_')} {value:.4g}" for name, value in shown.items())
            logger.info("Validation after step %d: %s", state.global_step, values)


class StageTrainer(Trainer):
    """Trains the parameters that require gradients, in float32.

    Checkpoints contain the trained weights, optimizer, schedule, random states and position in the data. They are
    written under a temporary name and renamed when complete.
    """

    def __init__(
        self,
        *args: Any,
        autocast_dtype: torch.dtype | None,
        settings_record: dict[str, Any],
        keep_checkpoints: int,
        lengths: list[int] | None = None,
        is_sharded: bool = False,
        **kwargs: Any,
    ):
        """`settings_record` is stored in checkpoints and compared with that of a resumed run.

        With the `lengths` of all samples, those of similar length share a batch.
        `is_sharded`: the model is under `sharded_parameters`, which reduces its gradients.
        """
        super().__init__(*args, **kwargs)
        self.is_distributed_loading_by_transformers = is_sharded  # keeps accelerate from wrapping it in DDP
        # With DeepSpeed, of which accelerate makes the engine: Trainer itself would replace the optimizer, and write
        # and resume checkpoints of DeepSpeed alone.
        groups = [group["params"] for group in self.optimizer.param_groups]
        self._zero_groups = groups if self.is_deepspeed_enabled else None
        self.is_deepspeed_enabled = False
        self.remove_callback(PrinterCallback)
        self.add_callback(LastLoss)
        self._part_rates = PartRates()
        self.add_callback(self._part_rates)
        self._autocast_dtype = autocast_dtype
        self._settings_record = settings_record
        self._keep_checkpoints = keep_checkpoints
        self._lengths = lengths
        self._writing_checkpoint = False
        self._samples_since_log = self._tokens_since_log = 0
        self._last_log_time: float | None = None
        self._step_samples: list[str] = []

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The batches of the next step; an error in a worker process keeps its original message."""
        with plain_worker_errors():
            return super().get_batch_samples(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """With lengths, the sampler of transformers whose order is a function of the epoch, so that a run resumes."""
        if self._lengths is None:
            return super()._get_train_sampler(train_dataset)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        # One replica: accelerate gives each process its batches.
        return DistributedLengthGroupedSampler(
            step, num_replicas=1, rank=0, seed=self.args.seed, lengths=self._lengths
        )

    def compute_loss_context_manager(self) -> Any:
        """Autocast. Trainer would patch the model's `forward`, which would have to be undone."""
        if self._autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, dtype=self._autocast_dtype)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one batch; `ValueError` for a loss that is not finite."""
        self._last_log_time = self._last_log_time or time.perf_counter()
        samples, tokens = _samples_and_tokens(inputs)
        self._samples_since_log += samples * self.args.world_size
        self._tokens_since_log += tokens * self.args.world_size
        inputs = {**inputs, "keep_logits": False}
        names = inputs.pop(SAMPLES, [])
        self._step_samples += names
        loss = super().training_step(model, inputs, *args, **kwargs)
        is_finite = torch.isfinite(loss)
        # All processes stop together, with the names of the samples of those whose loss it is.
        if not bool(self.accelerator.gather(is_finite.reshape(1)).all()):
            self._stop_at("loss", loss, [] if is_finite else names)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = whole(super()._clip_grad_norm(model))
        if norm is not None and not math.isfinite(float(norm)):
            self._stop_at("norm of the gradients", norm, self._step_samples)
        self._step_samples = []
        return norm

    def _stop_at(self, what: str, value: Any, samples: list[str]) -> None:
        from accelerate.utils import gather_object

        values = gather_object([(float(value), samples)])
        names = [name for _, found in values for name in found]
        worst = next(value for value, _ in values if not math.isfinite(value))
        where = f" (samples: {some(names, NAMED_SAMPLES)})" if names else ""
        raise ValueError(
            f"The {what} is {worst} at step {self.state.global_step + 1}{where}: training stops before it damages the "
            "weights. Lower the learning rate, lengthen the warm-up, or look at these samples; an earlier checkpoint "
            "can be resumed."
        )

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Reduces the gradients of each batch at once: whole ones until the step's end would take memory again."""
        yield

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds speed since the last log, the learning rate of each part and the memory in use."""
        if "loss" in logs and self._last_log_time is not None:
            now = time.perf_counter()
            seconds = max(now - self._last_log_time, 1e-9)
            logs["samples_per_second"] = self._samples_since_log / seconds
            logs["tokens_per_second"] = self._tokens_since_log / seconds
            self._last_log_time, self._samples_since_log, self._tokens_since_log = now, 0, 0
            logs.update({f"learning_rate/{part}": rate for part, rate in self._part_rates.rates.items()})
            if (peak := peak_memory(self.args.device)) is not None:
                logs["peak_memory_gb"] = peak / 1e9
        # Trainer's own figures take the rate of the first group, a layer of some part, for that of all, packs for
        # samples, and after a resume earlier steps for those of this time.
        for name in ("learning_rate", "train_samples_per_second", "train_steps_per_second"):
            logs.pop(name, None)
        super().log(logs, *args, **kwargs)

    # Validation

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """A batch's validation loss, in the view that is trained."""
        inputs = {name: value for name, value in inputs.items() if name != SAMPLES}
        return super().prediction_step(model, {**inputs, "view": MULTIMODAL, "keep_logits": False}, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's validation; the time it takes is not training time."""
        started = time.perf_counter()
        with gathered(self.model):
            metrics = super().evaluate(*args, **kwargs)
        if self._last_log_time is not None:
            self._last_log_time += time.perf_counter() - started
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            tensors = self._whole_parameters()
            record = {"step": self.state.global_step, "eval_loss": metrics["eval_loss"]}
            if self.is_world_process_zero():
                with replaced_best(Path(self.args.output_dir), record) as folder:
                    self._save(str(folder), tensors)
        self.accelerator.wait_for_everyone()
        return is_best

    def take_best(self) -> None:
        """Loads the weights with the lowest validation loss, unless they are the ones in memory."""
        folder = Path(self.args.output_dir)
        best = best_record(folder)
        if best is not None and best["step"] < self.state.global_step:
            logger.info(
                "The validation loss was lowest after step %d (%.4g): its weights are saved.",
                best["step"], best["eval_loss"],
            )  # fmt: skip
            self._load_from_checkpoint(str(folder / BEST))

    # Checkpoints

    def take_from(self, checkpoint: Path) -> None:
        """Loads the weights and history of a finished run."""
        logger.info("%s is from a finished run: there is nothing left to train.", checkpoint)
        self._load_from_checkpoint(str(checkpoint))
        self.state = self.state.load_from_json(str(checkpoint / "trainer_state.json"))

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        restored = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # Trainer would keep the checkpoint's intervals
        folder = Path(self.args.output_dir)
        best = best_record(folder)
        if best is None or best["step"] > self.state.global_step:  # of an earlier run, or later than this checkpoint
            if self.is_world_process_zero():
                shutil.rmtree(folder / BEST, ignore_errors=True)
            self.state.best_metric = None
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
                f"{name} could not be written to {folder} ({str(error).splitlines()[0]}): free some space. The last "
                "complete checkpoint is kept, and `resume` (--resume) continues from it."
            ) from error
        finally:
            self._writing_checkpoint = False
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            if (folder / name).exists():  # left by a run that was then resumed from an earlier checkpoint
                shutil.rmtree(folder / name)
            os.rename(folder / UNFINISHED / name, folder / name)
            os.rmdir(folder / UNFINISHED)
            rotate_checkpoints(str(folder), self._keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained weights, which all processes gather."""
        tensors = self._whole_parameters()
        if self.args.should_save:
            self._save(output_dir, tensors)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder, tensors = Path(str(output_dir)), dict(state_dict or {})
        folder.mkdir(parents=True, exist_ok=True)
        if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
            raise ValueError(
                f"{broken[0]} contains NaN or infinity after step {self.state.global_step}: no checkpoint is written. "
                "Lower the learning rate and resume from the last one."
            )
        save_file(tensors, folder / TRAINED)
        (folder / SETTINGS).write_text(json.dumps(self._settings_record, indent=2) + "\n", encoding="utf-8")

    def _whole_parameters(self) -> dict[str, torch.Tensor]:
        """The trained parameters, in the process that saves; one sharded over the processes is gathered by all."""
        tensors = ((name, whole(parameter.detach())) for name, parameter in self._trained_parameters())
        # Cloned, because stacked LoRA matrices share memory, which safetensors refuses.
        return {name: tensor.cpu().clone().contiguous() for name, tensor in tensors if self.args.should_save}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Writes whole states, which any number of processes can resume from."""
        if self._zero_groups is None:
            state = self.optimizer.state_dict()
            state["state"] = {
                index: {name: self._kept(whole(value)) for name, value in values.items()}
                for index, values in state["state"].items()
            }
        else:
            state = whole_state_dict(self.optimizer, self._zero_groups, self._kept)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, "optimizer.pt"))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _kept(self, value: Any) -> Any:
        """A gathered state, in the process that saves."""
        return (value.cpu() if isinstance(value, torch.Tensor) else value) if self.args.should_save else None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        if self._zero_groups is None:
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            for index, values in state["state"].items():
                state["state"][index] = {name: share_like(value, parameters[index]) for name, value in values.items()}
            self.optimizer.load_state_dict(state)
        else:
            load_whole_state_dict(self.optimizer, self._zero_groups, state)
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        count = len(list(Path(str(checkpoint)).glob("rng_state*.pth")))
        if count != self.args.world_size:
            set_seed(self.args.seed + self.state.global_step + self.args.process_index)
            logger.info(
                "The checkpoint was written by a run with %d processes, this one has %d: the data continues where it "
                "stopped, dropout gets new random numbers.",
                count, self.args.world_size,
            )  # fmt: skip

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint)
        recorded = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
        now = self._settings_record
        every = (recorded.keys() | now.keys()) - {SAMPLES_PER_STEP}
        if other := sorted(key for key in every if recorded.get(key) != now.get(key)):
            changes = "; ".join(f"{key} was {recorded.get(key)!r}, now {now.get(key)!r}" for key in other)
            raise ValueError(
                f"{path} belongs to a run with other settings: {changes}. Resume with the original settings."
            )
        self._check_samples_per_step(recorded)
        try:
            saved = load_file(path / TRAINED)
        except SafetensorError as error:
            raise OSError(f"{path / TRAINED} cannot be read ({error}): resume from another checkpoint.") from error
        trained = dict(self._trained_parameters())
        shapes = {name: value.shape for name, value in trained.items()}
        if {name: value.shape for name, value in saved.items()} != shapes:
            raise ValueError(
                f"{path} has {len(saved)} tensors, which do not match the {len(trained)} trained ones: it belongs to "
                "another model or stage; resume from another checkpoint."
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(share_like(saved[name], parameter))

    def _check_samples_per_step(self, recorded: Mapping[str, Any]) -> None:
        """`ValueError` unless a step has as many samples as in the run that wrote the checkpoint."""
        was, now = recorded.get(SAMPLES_PER_STEP), self._settings_record[SAMPLES_PER_STEP]
        if was == now:
            return
        batch = self.args.per_device_train_batch_size * self.args.world_size
        fits = isinstance(was, int) and was % batch == 0
        remedy = f"Set `gradient_accumulation` (--gradient-accumulation) to {was // batch}" if fits else "Set these"
        raise ValueError(
            f"The checkpoint is of a run with {was} samples per step, this one has {now}: `batch_size` "
            f"{self.args.per_device_train_batch_size} × `gradient_accumulation` "
            f"{self.args.gradient_accumulation_steps} × {self.args.world_size} (processes). {remedy} so that they "
            f"make {was} again."
        )

    def _trained_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)


def _samples_and_tokens(inputs: dict[str, torch.Tensor]) -> tuple[int, int]:
    """How many samples and tokens a batch has, without padding."""
    if "attention_mask" in inputs:
        return len(inputs["input_ids"]), int(inputs["attention_mask"].sum())
    # A sample has two tokens at least, and padding is all at position 0.
    positions = inputs["position_ids"]
    samples = int((positions == 1).sum())
    return samples, samples + int((positions > 0).sum())
