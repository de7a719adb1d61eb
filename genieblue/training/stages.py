"""A training run of one stage: check the input, prepare the run, train, save the model."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import is_accelerate_available

from conversion.chat_ids import NO_STOP_TOKEN, stop_token_ids
from conversion.chat_template import check_processor_template
from genieblue.data.chats import ChatDataset
from genieblue.data.collation import ChatCollator, EncodedChats
from genieblue.training.frozen_weights import check_base_unchanged, tensor_digests
from genieblue.training.settings import FREE_SETTINGS, TrainingSettings
from genieblue.training.structure import GenieBlueStructure, StageRecipe
from genieblue.training.trainer import StageTrainer, TrainingProgress, exclusive_run, find_checkpoint, is_finished
from modeling_genieblue.saving_genieblue import check_replaceable


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run: output folder, length, last logged loss and the log history."""

    output: Path
    steps: int
    loss: float | None
    num_samples: int
    log_history: list[dict[str, float]]


def train(
    model: Any,
    processor: Any,
    dataset: ChatDataset | Sequence[dict[str, Any]] | str | os.PathLike,
    output: str | os.PathLike,
    settings: TrainingSettings,
    *,
    resume: bool | str | os.PathLike = False,
    callbacks: Sequence[TrainerCallback] = (),
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> TrainingResult:
    """Trains one stage in place and writes the model to `output` once, at the end, as a complete folder.

    Checkpoints contain the trained weights in float32. They are in `<output>-checkpoints` and can be removed
    afterwards. The model is returned in eval mode and in its original dtype.

    Args:
        model: a GenieBlue, or another structure, see `GenieBlueStructure`.
        dataset: a `ChatDataset` or its source.
        resume: `True` continues from the last checkpoint, or starts over (with a warning) if there is none; or the
            folder of a checkpoint.
        callbacks: additional `TrainerCallback`s.
        scheduler: makes the learning rate schedule, by default warm-up and cosine.

    Raises `ValueError` for empty or bad data, a missing or failing chat template, a base whose generation never stops,
    a loss that is not finite, a checkpoint from a different run, or a changed base.
    """
    output = Path(os.path.abspath(output))
    check_output(output)
    if not is_accelerate_available():
        raise ValueError("Training needs the package accelerate: pip install 'genieblue[train]'.")
    structure = model if hasattr(model, "parameter_groups") else GenieBlueStructure(model)
    check_processor_template(processor)
    if not stop_token_ids(structure.model.generation_config):
        raise ValueError(NO_STOP_TOKEN)
    recipe = structure.recipe(settings.stage)
    run = _Run(structure, recipe, processor, _chats_to_learn_from(dataset, recipe), settings)
    checkpoints = output.with_name(f"{output.name}-checkpoints")
    with exclusive_run(checkpoints):
        checkpoint = find_checkpoint(checkpoints, resume)
        trainer = run.train(checkpoints, checkpoint, callbacks, scheduler)
        result = _result(trainer, output, len(run.chats))
        if trainer.is_world_process_zero():
            structure.save(output, processor, f"stage {settings.stage}", run.facts(result))
        trainer.accelerator.wait_for_everyone()  # with several processes, none returns before the model is saved
    return result


def _chats_to_learn_from(dataset: Any, recipe: StageRecipe) -> ChatDataset:
    """The samples of a dataset that are useful in a stage; `ValueError` if there are none."""
    chats = dataset if isinstance(dataset, ChatDataset) else ChatDataset(dataset)
    if len(chats) == 0:
        found = f"All {chats.num_skipped} samples are bad" if chats.num_skipped else "The data is empty"
        raise ValueError(f"{found}, so there is nothing to train on: expected chats.")
    if not recipe.needs_images:
        return chats
    with_images = chats.with_images()
    if len(with_images) == 0:
        raise ValueError(
            f"None of the {len(chats)} samples has an image, so the projector cannot be trained: give chats with "
            "images, or train stage 2."
        )
    return with_images


@dataclass
class _Run:
    """One stage on one model and dataset, with everything derived from them."""

    structure: GenieBlueStructure
    recipe: StageRecipe
    processor: Any
    chats: ChatDataset
    settings: TrainingSettings

    def __post_init__(self):
        self.learning_rates = self.recipe.learning_rates(self.settings.learning_rate, self.settings.learning_rates)
        own_tiles = self.processor.image_processor.max_tiles
        self.max_tiles = self.settings.max_tiles or self.recipe.max_tiles or own_tiles
        self.autocast_dtype = choose_autocast(self.structure.frozen, self.settings.bf16)

    @cached_property
    def data(self) -> EncodedChats:
        """The trainer's dataset."""
        collator = ChatCollator(
            self.processor,
            stop_ids=stop_token_ids(self.structure.model.generation_config),
            max_length=self.settings.max_length,
            max_tiles=self.max_tiles,
        )
        return EncodedChats(self.chats, collator, need_images=self.recipe.needs_images)

    def train(
        self,
        checkpoints: Path,
        checkpoint: Path | None,
        callbacks: Sequence[TrainerCallback],
        scheduler: Callable[[torch.optim.Optimizer], Any] | None,
    ) -> StageTrainer:
        """Trains, or loads the weights if `checkpoint` is the end of its run; `ValueError` if the base changed."""
        structure, settings = self.structure, self.settings
        before = tensor_digests(structure.frozen, "Hashing the base before training")
        with prepared_for_training(structure, self.recipe.groups, settings.gradient_checkpointing):
            groups = structure.parameter_groups(
                self.learning_rates, settings.vision_layer_decay, settings.weight_decay
            )
            optimizer = torch.optim.AdamW(groups, betas=settings.adam_betas, eps=settings.adam_epsilon)
            trainer = StageTrainer(
                structure.model,
                training_arguments(settings, self.recipe, checkpoints),
                data_collator=self.data.collator,
                train_dataset=self.data,
                callbacks=[*callbacks, *([TrainingProgress()] if settings.show_progress else [])],
                optimizers=(optimizer, None if scheduler is None else scheduler(optimizer)),
                autocast_dtype=self.autocast_dtype,
                settings_record=self.record(),
                keep_checkpoints=settings.keep_checkpoints,
            )
            if checkpoint is not None and is_finished(checkpoint):
                trainer.take_from(checkpoint)
            else:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        check_finite_weights(structure, self.recipe.groups)
        check_base_unchanged(before, tensor_digests(structure.frozen, "Hashing the base after training"))
        return trainer

    def record(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run that wrote its checkpoint."""
        record = {key: value for key, value in asdict(self.settings).items() if key not in FREE_SETTINGS}
        record |= {"max_tiles": self.max_tiles, "bf16": self.autocast_dtype is not None}
        record |= {"num_samples": len(self.chats), "sha256 of the data": self.chats.sha256}
        return json.loads(json.dumps(record))

    def facts(self, result: TrainingResult) -> dict[str, Any]:
        """Facts about the stage for the model card."""
        settings, rates = self.settings, self.learning_rates
        warmup = settings.warmup_steps
        facts = {
            "trained": ", ".join(rates),
            "steps": result.steps,
            "batch size": settings.batch_size * settings.gradient_accumulation * int(os.environ.get("WORLD_SIZE", 1)),
            "samples in the data": result.num_samples,
            "sequence length": settings.max_length,
            "tiles per image": 1 if self.max_tiles == 1 else f"up to {self.max_tiles}",
            "peak learning rate": next(iter(rates.values()))
            if len(set(rates.values())) == 1
            else ", ".join(f"{group} {rate}" for group, rate in rates.items()),
            "warm-up": "about 1 % of the steps" if warmup is None else f"{warmup} steps",
            "optimizer": f"AdamW, betas {settings.adam_betas}, epsilon {settings.adam_epsilon}, weight decay "
            f"{settings.weight_decay} on matrices",
            "precision": "float32" if self.autocast_dtype is None else "bfloat16 autocast over float32 weights",
            "seed": settings.seed,
        }
        if "vision_tower" in rates:
            facts["layer-wise decay of the vision tower"] = settings.vision_layer_decay
        if result.loss is not None:
            facts["last loss"] = round(result.loss, 4)
        return facts


def _result(trainer: StageTrainer, output: Path, num_samples: int) -> TrainingResult:
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return TrainingResult(output, trainer.state.global_step, losses[-1] if losses else None, num_samples, history)


def training_arguments(settings: TrainingSettings, recipe: StageRecipe, checkpoints: Path) -> TrainingArguments:
    """The `TrainingArguments` of a stage."""
    epochs = 1.0 if settings.steps is None and settings.epochs is None else settings.epochs
    # Below 1, `warmup_steps` is a fraction of the run.
    share = recipe.warmup_steps / recipe.steps
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_steps=-1 if settings.steps is None else settings.steps,
        num_train_epochs=epochs or 1.0,
        lr_scheduler_type="cosine",
        warmup_steps=share if settings.warmup_steps is None else settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 1,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # would replace such a loss by the mean and continue training
        report_to=[],
        disable_tqdm=True,  # replaced by our own bar
        seed=settings.seed,
        train_sampling_strategy="random" if settings.shuffle else "sequential",
        dataloader_num_workers=settings.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,  # a batch without images leaves the vision tower out
        use_cpu=not torch.cuda.is_available(),
    )
    # Several devices in one process would split `pixel_values` by rows; torchrun starts one process per device.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def choose_autocast(base: nn.Module, bf16: bool | None) -> torch.dtype | None:
    """bfloat16 if requested or if the base uses it, `None` for plain float32; `ValueError` for other dtypes.

    The base's blocks pass activations in the base's dtype to trained blocks in float32, which requires autocast.
    """
    if base.dtype not in (torch.float32, torch.bfloat16) or (bf16 is False and base.dtype != torch.float32):
        raise ValueError(
            f"The base is in {base.dtype}{' and bf16 is off' if bf16 is False else ''}: load it in bfloat16 "
            "(--dtype bfloat16) to train with bfloat16 autocast, or in float32."
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


def check_output(output: Path) -> None:
    """`OSError` or `ValueError` if the model cannot be saved there, or would replace something else."""
    if not output.name:
        raise ValueError(f"{output} cannot be replaced: give a folder inside it.")
    if any(parent.is_file() for parent in (output, *output.parents)):
        raise OSError(f"{output} is a file or inside one: give a folder to save into.")
    check_replaceable(output)
    if output.is_dir() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise ValueError(f"{output} contains something other than a GenieBlue: give another folder, or empty it.")


def check_finite_weights(structure: GenieBlueStructure, groups: Sequence[str]) -> None:
    """`ValueError` if the last step, after which no loss is computed, left a weight that is not finite."""
    for name, parameter in structure.model.named_parameters():
        if structure.group_of(name) in groups and not bool(parameter.isfinite().all()):
            raise ValueError(
                f"{name} contains NaN or infinity after the last step, so nothing is saved. Lower the learning rate "
                "or resume from an earlier checkpoint."
            )


__all__ = ["TrainingResult", "TrainingSettings", "train"]
