"""A training run of one stage: check the input, prepare the run, train, save the model."""

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_accelerate_available

from conversion.chat_ids import NO_STOP_TOKEN, stop_token_ids
from conversion.cpu_threads import warn_of_threads
from genieblue.data.chats import ChatDataset
from genieblue.data.collation import ChatCollator, EncodedChats
from genieblue.data.packing import PackedChats, row_lengths
from genieblue.evaluation.samples import EvaluationDataset
from genieblue.training.checkpoints import exclusive_run, find_checkpoint, is_finished
from genieblue.training.feature_cache import cached_features, check_cacheable
from genieblue.training.frozen_weights import check_base_unchanged, tensor_digests
from genieblue.training.packed_attention import check_packing
from genieblue.training.plan import TrainingPlan, check_disk, format_plan, plan_training
from genieblue.training.precision import choose_autocast, naming_memory_settings, prepared_for_training
from genieblue.training.run_file import write_run_file
from genieblue.training.run_log import RunLog
from genieblue.training.settings import FREE_SETTINGS, TrainingSettings
from genieblue.training.sharding import sharded_parameters, wants_fsdp
from genieblue.training.structure import VISION_TOWER, GenieBlueStructure, StageRecipe
from genieblue.training.trainer import SAMPLES_PER_STEP, StageTrainer, TrainingProgress
from genieblue.training.validation import ValidationAnswers, best_record, warn_of_training_data
from genieblue.training.vlm_structure import structure_of
from genieblue.training.zero import engine_settings, plain_after_zero, zero_stage
from modeling_genieblue.saving_genieblue import check_replaceable

logger = logging.getLogger(__name__)

RUN_FILE = "run.yaml"
SHARE_BETWEEN_VALIDATIONS = 0.1  # of the run's steps


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run: output folder, length, last logged loss, the log history.

    `best` is the `step` whose weights were saved, with its `eval_loss`, if there was validation data.
    """

    output: Path
    steps: int
    loss: float | None
    num_samples: int
    log_history: list[dict[str, float]]
    best: dict[str, Any] | None = None


def train(
    model: Any,
    processor: Any,
    dataset: ChatDataset | Sequence[dict[str, Any]] | str | os.PathLike,
    output: str | os.PathLike,
    settings: TrainingSettings,
    *,
    validation: EvaluationDataset | None = None,
    resume: bool | str | os.PathLike = False,
    callbacks: Sequence[TrainerCallback] = (),
    run_values: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Trains one stage in place and writes the model to `output` once, at the end, as a complete folder.

    The run's folder, `<output>-run`, has its log, curves and checkpoints, which contain the trained weights in
    float32; it can be removed afterwards. The model is returned in eval mode and in its original dtype.

    Args:
        model: a GenieBlue, or another structure, see `GenieBlueStructure`.
        dataset: a `ChatDataset` or its source.
        validation: held-out samples. The weights that are saved are then those with the lowest validation loss.
        resume: `True` continues from the last checkpoint, or starts over (with a warning) if there is none; or the
            folder of a checkpoint.
        callbacks: additional `TrainerCallback`s.
        run_values: what is saved as `run.yaml` with the run, by default the settings.

    Raises `ValueError` for empty or bad data, a missing or failing chat template, a base whose generation never stops
    or that cannot be trained on packs (with `pack`), a loss that is not finite, a checkpoint from a different run, or
    a changed base.
    """
    output = Path(os.path.abspath(output))
    check_output(output)
    if not is_accelerate_available() or find_spec("matplotlib") is None:  # for the curves, after the first steps
        raise ValueError("Training needs the packages accelerate and matplotlib: pip install 'genieblue[train]'.")
    check_trackers(settings.report_to)
    run = _make_run(model, processor, dataset, settings, validation)
    structure, settings = run.structure, run.settings
    if settings.fsdp and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise ValueError(
            "`fsdp` (--fsdp) shares what is trained among several processes, but there is one: start `torchrun "
            "--nproc-per-node 2 -m genieblue train …` with as many as there are GPUs, or leave it out."
        )
    checkpoints = output.with_name(f"{output.name}-run")
    with exclusive_run(checkpoints):
        checkpoint = find_checkpoint(checkpoints, resume)
        plan = run.plan()
        for line in format_plan(plan):
            logger.info(line)
        check_disk(plan, checkpoints)
        if not torch.cuda.is_available():
            warn_of_threads()
        if int(os.environ.get("RANK", 0)) == 0:
            write_run_file(checkpoints / RUN_FILE, run_values or asdict(settings))
        trainer = run.train(checkpoints, checkpoint, plan, callbacks)
        result = _result(trainer, output, run.chats.num_samples)
        if trainer.is_world_process_zero():
            structure.save(output, processor, f"stage {settings.stage}", run.facts(result))
        trainer.accelerator.wait_for_everyone()  # with several processes, none returns before the model is saved
    return result


def plan(
    model: Any, processor: Any, dataset: ChatDataset, settings: TrainingSettings,
    validation: EvaluationDataset | None = None,
) -> TrainingPlan:  # fmt: skip
    """What `train` with these arguments will take; nothing is trained or written."""
    return _make_run(model, processor, dataset, settings, validation).plan()


def _make_run(
    model: Any, processor: Any, dataset: Any, settings: TrainingSettings, validation: EvaluationDataset | None
) -> "_Run":
    """A run after the checks of its model, processor and data; `ValueError` if one fails."""
    check_validates(settings, validation is not None)
    settings = replace(settings, fsdp=wants_fsdp(settings.fsdp))
    if settings.fsdp and zero_stage():
        raise ValueError("Both `fsdp` (--fsdp) and accelerate's --use_deepspeed are on: leave out one of them.")
    structure = model if hasattr(model, "parameter_groups") else structure_of(model)
    recipe = structure.recipe(settings.stage)
    structure.check(processor, settings)
    if not stop_token_ids(structure.generation_config):
        raise ValueError(NO_STOP_TOKEN)
    if validation is not None and not structure.trains_on_texts:
        validation = validation.with_images()
        if len(validation) == 0:
            raise ValueError("None of the validation samples has an image: give some that have, or leave them out.")
    return _Run(structure, recipe, processor, _chats_to_learn_from(dataset, recipe, structure), settings, validation)


def _chats_to_learn_from(dataset: Any, recipe: StageRecipe, structure: GenieBlueStructure) -> ChatDataset:
    """The samples of a dataset that are useful in a stage; `ValueError` if there are none."""
    chats = dataset if isinstance(dataset, ChatDataset) else ChatDataset(dataset)
    if len(chats) == 0:
        found = f"All {chats.num_skipped} samples are bad" if chats.num_skipped else "The data is empty"
        raise ValueError(f"{found}, so there is nothing to train on: expected chats.")
    if not recipe.needs_images:
        return chats
    with_images = chats.with_images()
    if len(with_images) == 0:
        other = ", or train stage 2" if structure.trains_on_texts else ""
        raise ValueError(
            f"None of the {len(chats)} samples has an image, so {recipe.groups[0]} cannot be trained: give chats with "
            f"images{other}."
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
    validation: EvaluationDataset | None = None

    def __post_init__(self):
        if self.validation is not None:
            warn_of_training_data(self.validation, self.chats)
        rates = self.recipe.learning_rates(self.settings.learning_rate, self.settings.learning_rates)
        self.learning_rates = {group: rate for group, rate in rates.items() if rate > 0}  # the others stay frozen
        if not self.learning_rates:
            raise ValueError(f"All learning rates are 0 ({', '.join(rates)}), so nothing is trained: raise one.")
        if self.settings.cache_image_features:
            check_cacheable(self.structure.model.vision_tower, VISION_TOWER in self.learning_rates)
        self.max_tiles = self.structure.max_tiles(self.processor, self.settings)
        self.autocast_dtype = choose_autocast(self.structure.frozen, self.settings.bf16)

    @cached_property
    def data(self) -> EncodedChats | PackedChats:
        """The trainer's dataset; `ValueError` for packs of a base that cannot be trained on them."""
        chats = EncodedChats(self.chats, self._collator, need_images=self.recipe.needs_images)
        if not self.settings.pack:
            return chats
        if not self._checks_packing_late:
            check_packing(self.structure.model, self._collator)
        settings = self.settings
        return PackedChats(chats, shuffle=settings.shuffle, seed=settings.seed, num_workers=settings.num_workers)

    @cached_property
    def _checks_packing_late(self) -> bool:
        """Flash attention runs on a GPU alone, where Trainer puts the model."""
        return self._collator.joins_packs and self.structure.model.device.type == "cpu"

    @cached_property
    def _collator(self) -> ChatCollator:
        return self.structure.collator(self.processor, self.settings)

    def plan(self) -> TrainingPlan:
        """What the run will take."""
        held_out = 0 if self.validation is None else len(self.validation)
        return plan_training(self.structure, tuple(self.learning_rates), self.data, self.settings, held_out=held_out)

    def train(
        self,
        checkpoints: Path,
        checkpoint: Path | None,
        plan: TrainingPlan,
        callbacks: Sequence[TrainerCallback],
    ) -> StageTrainer:
        """Trains, or loads the weights if `checkpoint` is the end of its run; `ValueError` if the base changed."""
        structure, settings = self.structure, self.settings
        before = tensor_digests(structure.frozen, "Hashing the base before training")
        validated = None if self.validation is None else EncodedChats(self.validation, self._collator)
        stage = zero_stage()
        engine = engine_settings(stage, settings, self.autocast_dtype) if stage else None
        validates = validated is not None
        arguments = training_arguments(settings, self.recipe, checkpoints, validates=validates, deepspeed=engine)
        shared = sharded_parameters if settings.fsdp else plain_after_zero if stage else None
        with (
            prepared_for_training(structure, tuple(self.learning_rates), settings.gradient_checkpointing),
            naming_memory_settings(settings, self.max_tiles),
            shared(structure.model, arguments.device) if shared else contextlib.nullcontext(),
            self._feature_cache(checkpoints, plan),
        ):
            groups = structure.parameter_groups(
                self.learning_rates, settings.vision_layer_decay, settings.weight_decay
            )
            optimizer = torch.optim.AdamW(groups, betas=settings.adam_betas, eps=settings.adam_epsilon, fused=True)
            trainer = StageTrainer(
                structure.model,
                arguments,
                data_collator=self._collator,
                train_dataset=self.data,
                eval_dataset=validated,
                callbacks=[*callbacks, RunLog(checkpoints), *self._callbacks()],
                optimizers=(optimizer, None),
                autocast_dtype=self.autocast_dtype,
                settings_record=self.record(),
                keep_checkpoints=settings.keep_checkpoints,
                lengths=self._lengths_to_group_by(),
                is_sharded=settings.fsdp,
            )
            if self._checks_packing_late:
                with trainer.compute_loss_context_manager():
                    check_packing(structure.model, self._collator)
            if self.validation is not None and settings.eval_answers:
                answered = self.validation.first(settings.eval_answers)
                trainer.add_callback(
                    ValidationAnswers(trainer, self.processor, answered, settings.eval_max_new_tokens)
                )
            if checkpoint is not None and is_finished(checkpoint):
                trainer.take_from(checkpoint)
            else:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if self.validation is not None:
                trainer.take_best()
            trainer.accelerator.free_memory()
        check_finite_weights(structure, tuple(self.learning_rates))
        check_base_unchanged(before, tensor_digests(structure.frozen, "Hashing the base after training"))
        return trainer

    def _feature_cache(self, folder: Path, plan: TrainingPlan) -> contextlib.AbstractContextManager[None]:
        if not self.settings.cache_image_features:
            return contextlib.nullcontext()
        return cached_features(self.structure.model.vision_tower, folder, plan.kept - plan.image_features)

    def _lengths_to_group_by(self) -> list[int] | None:
        if not self.settings.group_by_length:
            return None
        return [max(lengths, default=0) for lengths in row_lengths(self.data, self.settings.num_workers)]

    def _callbacks(self) -> list[TrainerCallback]:
        settings = self.settings
        found: list[TrainerCallback] = [TrainingProgress(settings.price_per_hour)] if settings.show_progress else []
        if self.validation is not None and settings.patience is not None:
            found.append(EarlyStoppingCallback(settings.patience))
        return found

    def record(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run that wrote its checkpoint."""
        record = {key: value for key, value in asdict(self.settings).items() if key not in FREE_SETTINGS}
        record[SAMPLES_PER_STEP] = self.settings.samples_per_step
        record |= {"max_tiles": self.max_tiles, "bf16": self.autocast_dtype is not None}
        record |= {"num_samples": len(self.chats), "sha256 of the data": self.chats.sha256}
        record |= self.structure.trained_on
        return json.loads(json.dumps(record))

    def facts(self, result: TrainingResult) -> dict[str, Any]:
        """Facts about the stage for the model card."""
        settings, rates = self.settings, self.learning_rates
        warmup = settings.warmup_steps
        rows = settings.samples_per_step
        facts = {
            "trained": ", ".join(rates),
            "steps": result.steps,
            "batch size": f"{rows} × {settings.max_length} tokens, packed" if settings.pack else rows,
            "samples in the data": result.num_samples,
            "sequence length": settings.max_length,
            "tiles per image": {1: 1, None: "the VLM's own"}.get(self.max_tiles, f"up to {self.max_tiles}"),
            "peak learning rate": next(iter(rates.values()))
            if len(set(rates.values())) == 1
            else ", ".join(f"{group} {rate}" for group, rate in rates.items()),
            "warm-up": "about 1 % of the steps" if warmup is None else f"{warmup} steps",
            "optimizer": f"AdamW, betas {settings.adam_betas}, epsilon {settings.adam_epsilon}, weight decay "
            f"{settings.weight_decay} on matrices",
            "precision": "float32" if self.autocast_dtype is None else "bfloat16 autocast over float32 weights",
            "seed": settings.seed,
        }
        if VISION_TOWER in rates:
            facts["layer-wise decay of the vision tower"] = settings.vision_layer_decay
        if result.loss is not None:
            facts["last loss"] = round(result.loss, 4)
        if result.best is not None:
            facts["lowest validation loss"] = f"{result.best['eval_loss']:.4f}, after step {result.best['step']}"
        return facts


def _result(trainer: StageTrainer, output: Path, num_samples: int) -> TrainingResult:
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    best = best_record(Path(trainer.args.output_dir)) if trainer.eval_dataset is not None else None
    last = losses[-1] if losses else None
    return TrainingResult(output, trainer.state.global_step, last, num_samples, history, best)


def training_arguments(
    settings: TrainingSettings,
    recipe: StageRecipe,
    checkpoints: Path,
    *,
    validates: bool = False,
    deepspeed: dict[str, Any] | None = None,
) -> TrainingArguments:
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
        lr_scheduler_type=settings.schedule,
        warmup_steps=share if settings.warmup_steps is None else settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 1,
        per_device_eval_batch_size=settings.batch_size,
        eval_strategy="steps" if validates else "no",
        eval_steps=settings.eval_steps or SHARE_BETWEEN_VALIDATIONS,
        metric_for_best_model="eval_loss" if validates else None,
        greater_is_better=False,
        prediction_loss_only=True,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # would replace such a loss by the mean and continue training
        report_to=list(settings.report_to),
        disable_tqdm=True,  # replaced by our own bar
        seed=settings.seed,
        train_sampling_strategy="random" if settings.shuffle else "sequential",
        dataloader_num_workers=settings.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # the model gives a gradient to all, also without images
        ddp_broadcast_buffers=False,  # the same in all processes
        use_cpu=not torch.cuda.is_available(),
        deepspeed=deepspeed,
    )
    # Several devices in one process would split `pixel_values` by rows; torchrun starts one process per device.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def check_validates(settings: TrainingSettings, validates: bool) -> None:
    """`ValueError` for settings of a validation that a run lacks."""
    if not validates and (unused := [name for name in ("eval_steps", "patience") if getattr(settings, name)]):
        raise ValueError(f"`{unused[0]}` is set, but nothing is validated: give `validation` (--eval-data).")


def check_trackers(names: Sequence[str]) -> None:
    """`ValueError` for a tracker that transformers does not know, or whose package is not installed."""
    available = get_available_reporting_integrations()
    if missing := [name for name in names if name not in available]:
        raise ValueError(
            f"`report_to` names {missing[0]!r}, which is not installed, or unknown to transformers. Available here: "
            f"{', '.join(available) or 'none'}. The log in the run's folder is always written."
        )


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
