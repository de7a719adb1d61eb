"""Training in the paper's two stages (arXiv 2503.06019): the projector; then all that GenieBlue adds to its base."""

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import is_accelerate_available

from conversion.chat_template import refuse_processor_without_template
from genieblue.training.chats import ChatDataset
from genieblue.training.collation import ChatCollator, EncodedChats
from genieblue.training.trainer import (
    PARTS,
    GenieBlueTrainer,
    TrainingProgress,
    exclusive_run,
    find_checkpoint,
    is_finished,
    optimizer_groups,
    part_of,
)
from modeling_genieblue.model_files_genieblue import RECIPE_NAME
from modeling_genieblue.saving_genieblue import check_replaceable

logger = logging.getLogger(__name__)

PART_WORDS = {"projector": "projector", "vision": "vision tower", "copies": "replicated blocks", "lora": "LoRA"}
# Settings that may change when a run is resumed: what is learned does not depend on them.
FREE_SETTINGS = (
    "save_steps", "keep_checkpoints", "logging_steps", "num_workers", "gradient_checkpointing", "show_progress"
)  # fmt: skip


@dataclass(frozen=True)
class StageRecipe:
    """What the paper states of a stage. Its global batches were 720 (stage 1) and 6800 samples (stage 2)."""

    trained: tuple[str, ...]
    learning_rate: float  # peak, of a cosine to zero
    steps: int
    warmup_steps: int
    max_tiles: int | None  # by image; `None`: what the processor has, 16 in the paper


RECIPES = {
    1: StageRecipe(("projector",), learning_rate=1e-3, steps=3434, warmup_steps=34, max_tiles=1),
    2: StageRecipe(PARTS, learning_rate=1e-4, steps=53_000, warmup_steps=530, max_tiles=None),
}


@dataclass(frozen=True)
class TrainingSettings:
    """One run. What is left out is the paper's recipe of the stage; sizes are for your machine and data to choose.

    Attributes:
        stage: 1 trains the projector, 2 the vision tower, the projector, the replicated blocks and LoRA.
        steps, epochs: length of the run in optimizer steps or passes over the data; by default one pass.
        batch_size, gradient_accumulation: samples by device and pass; passes by optimizer step.
        learning_rate: peak of all parts; `learning_rates` of single ones (`projector`, `vision`, `copies`, `lora`).
        vision_layer_decay: factor on the learning rate from each block of the vision tower to the one before it.
        warmup_steps: linear warm-up; by default the recipe's share of the run, about 1 %.
        weight_decay: of matrices; vectors (biases, norms) are not decayed, which is a choice.
        max_grad_norm: gradients are clipped to it; a choice, as the paper does not say.
        bf16: bfloat16 autocast over float32 copies of what is trained; by default if the base is in bfloat16.
        max_length: tokens by sample, image tokens included.
        max_tiles: by image, a square number; by default the recipe's (stage 1: one, stage 2: the processor's own).
        save_steps: steps between checkpoints; 0 writes none.
    """

    stage: int
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    vision_layer_decay: float = 0.9
    warmup_steps: int | None = None
    weight_decay: float = 0.05
    adam_betas: tuple[float, float] = (0.9, 0.98)
    adam_epsilon: float = 1e-6
    max_grad_norm: float = 1.0
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    max_length: int = 4096
    max_tiles: int | None = None
    save_steps: int = 500
    keep_checkpoints: int = 2
    logging_steps: int = 10
    shuffle: bool = True
    seed: int = 42
    num_workers: int = 0
    show_progress: bool = True

    def __post_init__(self):
        if self.stage not in RECIPES:
            raise ValueError(f"The stage is {self.stage!r}: expected 1 (projector) or 2 (all that GenieBlue adds).")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"{self.steps} steps and {self.epochs} epochs were given: give one of them.")
        if unknown := sorted(set(self.learning_rates) - set(self.recipe.trained)):
            raise ValueError(
                f"Learning rates for {', '.join(unknown)}: stage {self.stage} trains {', '.join(self.recipe.trained)}."
            )
        sizes = ("steps", "epochs", "batch_size", "gradient_accumulation", "max_tiles", "logging_steps")
        for name in (*sizes, "learning_rate", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` is {value}: expected a number above 0.")
        for rate in (self.learning_rate or 0, *self.learning_rates.values()):
            if not 0 <= rate <= 1:
                raise ValueError(f"A learning rate is {rate}: expected one between 0 and 1 (the paper's: 1e-3, 1e-4).")
        if self.max_tiles is not None and math.isqrt(self.max_tiles) ** 2 != self.max_tiles:
            raise ValueError(f"`max_tiles` is {self.max_tiles}: expected a square number (1, 4, 9, 16, …).")
        for name in ("warmup_steps", "save_steps", "num_workers", "weight_decay", "vision_layer_decay"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}: expected 0 or more.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` is {self.seed}: expected 0 or more, and less than 2 to the power of 32.")

    @property
    def recipe(self) -> StageRecipe:
        """What the paper states of this stage."""
        return RECIPES[self.stage]

    def rates_by_part(self) -> dict[str, float]:
        """Peak learning rate of each part that this stage trains."""
        common = self.recipe.learning_rate if self.learning_rate is None else self.learning_rate
        return {part: self.learning_rates.get(part, common) for part in self.recipe.trained}


@dataclass(frozen=True)
class TrainingResult:
    """What a run did: where its model lies, its length, the last logged loss, and what was logged at which step."""

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
    """Trains one stage in place and writes the model to `output`, once, at the end and as a complete folder.

    Checkpoints hold what is trained in float32. They lie beside it in `<output>-checkpoints` and can be removed then.
    The model comes back in eval mode and in its own precision.

    Args:
        dataset: a `ChatDataset`, or what it reads.
        resume: `True` goes on from the last checkpoint, or from the beginning (with a warning) if there is none; or
            the folder of one checkpoint.
        callbacks: more of transformers' `TrainerCallback`.
        scheduler: makes another schedule of the optimizer than a warm-up and a cosine.

    Raises `ValueError` for data without samples or with a bad one, a chat template that is missing or fails, a loss
    that is not finite, a checkpoint of another run; and if a byte of the base changed.
    """
    output = Path(os.path.abspath(output))
    refuse_taken_output(output)
    if not is_accelerate_available():
        raise ValueError("Training needs the library accelerate: pip install 'genieblue[train]'.")
    if model.language_model is None:
        raise ValueError("This GenieBlue has no base: make it with `from_base` or load it with `from_pretrained`.")
    if getattr(model.config, "quantization", None) is not None:
        raise ValueError("Quantized weights are not trained: train the 16-bit GenieBlue, then quantize it again.")
    refuse_processor_without_template(processor)
    chats = dataset if isinstance(dataset, ChatDataset) else ChatDataset(dataset)
    if len(chats) == 0:
        found = f"None of its {chats.num_skipped} samples is a good one" if chats.num_skipped else "The data is empty"
        raise ValueError(f"{found}, so there is nothing to learn: expected chats.")
    if settings.stage == 1:
        num_samples, chats = len(chats), chats.with_images()
        if len(chats) == 0:
            raise ValueError(
                f"None of the {num_samples} samples has an image, so the projector has nothing to learn from: give "
                "chats with images, or train stage 2."
            )
    checkpoints = output.with_name(f"{output.name}-checkpoints")
    with exclusive_run(checkpoints):
        return _train(model, processor, chats, output, settings, checkpoints, resume, callbacks, scheduler)


def _train(
    model: Any,
    processor: Any,
    chats: ChatDataset,
    output: Path,
    settings: TrainingSettings,
    checkpoints: Path,
    resume: bool | str | os.PathLike,
    callbacks: Sequence[TrainerCallback],
    scheduler: Callable[[torch.optim.Optimizer], Any] | None,
) -> TrainingResult:
    checkpoint = find_checkpoint(checkpoints, resume)
    max_tiles = settings.max_tiles or settings.recipe.max_tiles or processor.image_processor.max_tiles
    collator = ChatCollator(processor, max_length=settings.max_length, max_tiles=max_tiles)
    autocast_dtype = choose_autocast(model.language_model, settings.bf16)

    base_before = tensor_digests(model.language_model, "Hashing the base before training")
    with prepared_for_training(model, settings.recipe.trained, settings.gradient_checkpointing):
        trainer = GenieBlueTrainer(
            model,
            _arguments(settings, checkpoints),
            data_collator=collator,
            train_dataset=EncodedChats(chats, collator, need_images=settings.stage == 1),
            callbacks=[*callbacks, *([TrainingProgress()] if settings.show_progress else [])],
            groups=optimizer_groups(
                model, settings.rates_by_part(), settings.vision_layer_decay, settings.weight_decay
            ),
            optimizer_options={"betas": settings.adam_betas, "eps": settings.adam_epsilon},
            autocast_dtype=autocast_dtype,
            settings_record=_record(settings, chats, max_tiles, autocast_dtype),
            keep_checkpoints=settings.keep_checkpoints,
            scheduler_factory=scheduler,
        )
        if checkpoint is not None and is_finished(checkpoint):
            logger.info("%s is the end of its run: nothing is left to train.", checkpoint)
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = trainer.state.load_from_json(str(checkpoint / "trainer_state.json"))
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    refuse_broken_weights(model, settings.recipe.trained)
    refuse_changed_base(base_before, tensor_digests(model.language_model, "Hashing the base after training"))

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = TrainingResult(
        output, trainer.state.global_step, losses[-1] if losses else None, len(chats), trainer.state.log_history
    )
    if trainer.is_world_process_zero():
        stages = {
            **model.provenance.facts([RECIPE_NAME]).get(RECIPE_NAME, {}),
            f"stage {settings.stage}": _recipe_facts(settings, result, max_tiles, model),
        }
        model.save_pretrained(output, processor=processor, facts={RECIPE_NAME: stages})
        model.provenance.training_recipe = stages
    trainer.accelerator.wait_for_everyone()  # with several processes, none returns before the model is there
    return result


def _arguments(settings: TrainingSettings, checkpoints: Path) -> TrainingArguments:
    epochs = 1.0 if settings.steps is None and settings.epochs is None else settings.epochs
    # Below 1, `warmup_steps` is a share of the run.
    share = settings.recipe.warmup_steps / settings.recipe.steps
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
        logging_nan_inf_filter=False,  # would replace such a loss by the mean, and train on
        report_to=[],
        disable_tqdm=True,  # a bar of ours takes its place
        seed=settings.seed,
        train_sampling_strategy="random" if settings.shuffle else "sequential",
        dataloader_num_workers=settings.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,  # a batch without images leaves the vision tower out
        use_cpu=not torch.cuda.is_available(),
    )
    # Several devices in one process would split `pixel_values` by rows; start one process for each with torchrun.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def choose_autocast(base: nn.Module, bf16: bool | None) -> torch.dtype | None:
    """bfloat16 if it is asked for or the base is in it, `None` for plain float32; `ValueError` for other precisions.

    Frozen blocks hand activations in the base's precision to trained blocks in float32: only autocast joins them.
    """
    if base.dtype not in (torch.float32, torch.bfloat16) or (bf16 is False and base.dtype != torch.float32):
        raise ValueError(
            f"The base is in {base.dtype}{' and bf16 is off' if bf16 is False else ''}: load it in bfloat16 "
            "(--dtype bfloat16) to train with bfloat16 autocast, or in float32."
        )
    wanted = base.dtype == torch.bfloat16 if bf16 is None else bf16
    return torch.bfloat16 if wanted else None


@contextlib.contextmanager
def prepared_for_training(model: nn.Module, trained: Sequence[str], gradient_checkpointing: bool) -> Iterator[None]:
    """Within, only the `trained` parts require a gradient, in float32; afterwards all is as before, in eval mode."""
    parameters = dict(model.named_parameters())
    before = {name: (parameter.requires_grad, parameter.dtype) for name, parameter in parameters.items()}
    had_use_cache = "use_cache" in vars(model.config)
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(part_of(name) in trained)
            if parameter.requires_grad:
                # Steps of a small learning rate are lost when they are added to a number in 16 bits.
                parameter.data = parameter.data.float()
        if gradient_checkpointing:
            model.activation_checkpointing_enable()
        yield
    finally:
        if gradient_checkpointing:
            model.activation_checkpointing_disable()
        for name, parameter in parameters.items():
            requires_grad, dtype = before[name]
            parameter.requires_grad_(requires_grad and not name.startswith("language_model."))
            parameter.grad = None
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        if not had_use_cache and "use_cache" in vars(model.config):
            del model.config.use_cache  # put there by Trainer
        model.eval()


def refuse_taken_output(output: Path) -> None:
    """`OSError` or `ValueError` if the model could not be saved there, or would push something else aside."""
    if not output.name:
        raise ValueError(f"{output} cannot be replaced: give a folder inside of it.")
    if any(parent.is_file() for parent in (output, *output.parents)):
        raise OSError(f"{output} is, or lies in, a file: give a folder to save into.")
    check_replaceable(output)
    if output.is_dir() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise ValueError(f"{output} holds something else than a GenieBlue: give another folder, or empty it.")


def refuse_broken_weights(model: nn.Module, trained: Sequence[str]) -> None:
    """`ValueError` if the last step, behind which no loss is computed, left a weight that is not finite."""
    for name, parameter in model.named_parameters():
        if part_of(name) in trained and not bool(parameter.isfinite().all()):
            raise ValueError(
                f"{name} holds NaN or infinity after the last step, so nothing is saved. Lower the learning rate, or "
                "resume from an earlier checkpoint."
            )


def tensor_digests(module: nn.Module, title: str) -> dict[str, str]:
    """sha256 of the bytes, type and shape of every parameter and buffer."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    total = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
    digests = {}
    with tqdm(desc=title, total=total, unit="B", unit_scale=True, delay=2) as bar:
        for name, tensor in tensors:
            digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            for plain in _plain_tensors(tensor.detach()):
                digest.update(plain.cpu().contiguous().flatten().view(torch.uint8).numpy())
            digests[name] = digest.hexdigest()
            bar.update(tensor.numel() * tensor.element_size())
    return digests


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a quantized one is made of, or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(getattr(tensor, name))


def refuse_changed_base(before: dict[str, str], after: dict[str, str]) -> None:
    """`ValueError` if the digests of the base differ."""
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise ValueError(
            f"The base was changed by training: {', '.join(changed[:3])} ({len(changed)} of {len(before)} tensors). "
            "Nothing was saved; a callback or a hook must have written to it. Load the base again."
        )


def _record(
    settings: TrainingSettings, chats: ChatDataset, max_tiles: int, autocast_dtype: torch.dtype | None
) -> dict[str, Any]:
    """What a resumed run must have in common with the run that wrote its checkpoint."""
    record = {key: value for key, value in asdict(settings).items() if key not in FREE_SETTINGS}
    record |= {"max_tiles": max_tiles, "bf16": autocast_dtype is not None, "num_samples": len(chats)}
    record["sha256 of the data"] = chats.sha256
    return json.loads(json.dumps(record))


def _recipe_facts(settings: TrainingSettings, result: TrainingResult, max_tiles: int, model: Any) -> dict[str, Any]:
    rates = settings.rates_by_part()
    same = len(set(rates.values())) == 1
    warmup = settings.warmup_steps
    facts = {
        "trained": ", ".join(PART_WORDS[part] for part in rates),
        "steps": result.steps,
        "batch size": settings.batch_size * settings.gradient_accumulation * int(os.environ.get("WORLD_SIZE", 1)),
        "samples in the data": result.num_samples,
        "sequence length": settings.max_length,
        "tiles by image": 1 if max_tiles == 1 else f"up to {max_tiles}",
        "peak learning rate": rates["projector"] if same else ", ".join(f"{PART_WORDS[p]} {rates[p]}" for p in rates),
        "warm-up": "about 1 % of the steps" if warmup is None else f"{warmup} steps",
        "optimizer": f"AdamW, betas {settings.adam_betas}, epsilon {settings.adam_epsilon}, weight decay "
        f"{settings.weight_decay} on matrices",
        "precision": "bfloat16 autocast over float32 weights"
        if choose_autocast(model.language_model, settings.bf16)
        else "float32",
        "seed": settings.seed,
    }
    if "vision" in rates:
        facts["layer-wise decay of the vision tower"] = settings.vision_layer_decay
    if result.loss is not None:
        facts["last loss"] = round(result.loss, 4)
    return facts


__all__ = ["RECIPES", "TrainingResult", "TrainingSettings", "train"]
