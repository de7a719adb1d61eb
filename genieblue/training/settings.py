"""Settings of a training run."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

# Settings that may change when a run is resumed, because the result does not depend on them.
FREE_SETTINGS = (
    "save_steps", "keep_checkpoints", "logging_steps", "eval_steps", "eval_answers", "eval_max_new_tokens", "patience",
    "num_workers", "gradient_checkpointing", "cache_image_features", "fsdp", "show_progress", "report_to",
    "price_per_hour", "batch_size", "gradient_accumulation",  # but for the samples per step
)  # fmt: skip

SCHEDULES = (
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "inverse_sqrt", "polynomial"
)  # fmt: skip


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of one run. Defaults follow the paper's recipe for the stage, except batch size and length.

    Attributes:
        stage: 1 trains the projector, 2 everything that GenieBlue adds to the base.
        steps, epochs: length of the run in optimizer steps or passes over the data; by default one pass.
        batch_size, gradient_accumulation: samples per device and batch; batches per optimizer step.
        learning_rate: peak for all groups; `learning_rates` overrides single groups (`vision_tower`,
            `multi_modal_projector`, `replicated_blocks`, `lora`), of which those with a rate of 0 stay frozen.
        vision_layer_decay: learning rate factor from each block of the vision tower to the one before it.
        warmup_steps: linear warm-up; by default the recipe's share of the run, about 1 %.
        weight_decay: for matrices; vectors (biases, norms) are not decayed, which is our choice.
        max_grad_norm: gradient clipping; our choice, as the paper does not specify it.
        bf16: bfloat16 autocast over float32 copies of the trained weights; by default if the base is in bfloat16.
        cache_image_features: keep the features of a frozen vision tower on disk, to compute each tile once in several
            epochs. Off by default: the tower rounds by how many tiles a batch has, so that a run is the same bit for
            bit only if all batches have equally many.
        fsdp: several processes share the trained parameters, gradients and optimizer states instead of each having all
            of them (FSDP2); the frozen base is whole in each.
        max_length: tokens per sample, including image tokens.
        pack: several samples in a row of at most `max_length` tokens, each with attention and positions of its own;
            `batch_size` then counts rows. The paper's stage 2 packs. Off by default, because the number of samples in
            a step then depends on their lengths.
        group_by_length: batches of samples of similar length, which have less padding.
        max_tiles: per image, a square number; by default the recipe's (stage 1: one, stage 2: the processor's own).
        save_steps: steps between checkpoints; 0 writes none.
        eval_steps: steps between validations, if there is validation data; by default a tenth of the run.
        eval_answers, eval_max_new_tokens: how many validation samples are also answered and scored, and how long
            these answers are at most; 0 answers computes the loss alone.
        patience: validations without a lower loss after which training stops; by default never.
        schedule: of the learning rate, one of `SCHEDULES` (transformers' names); the paper's is `cosine`.
        report_to: trackers of transformers that also get the logs: `tensorboard`, `trackio`, `wandb` …
        price_per_hour: of the machine, to estimate what the rest of the run costs.
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
    cache_image_features: bool = False
    fsdp: bool = False
    max_length: int = 4096
    pack: bool = False
    group_by_length: bool = False
    max_tiles: int | None = None
    save_steps: int = 500
    keep_checkpoints: int = 2
    logging_steps: int = 10
    eval_steps: int | None = None
    eval_answers: int = 32
    eval_max_new_tokens: int = 32
    patience: int | None = None
    schedule: str = "cosine"
    report_to: tuple[str, ...] = ()
    price_per_hour: float | None = None
    shuffle: bool = True
    seed: int = 42
    num_workers: int = 0
    show_progress: bool = True

    def __post_init__(self):
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"Got {self.steps} steps and {self.epochs} epochs: give only one of them.")
        if self.group_by_length and (self.pack or not self.shuffle):
            reason = (
                "packed samples have no padding" if self.pack else "it sets the order, which `shuffle=False` keeps"
            )
            raise ValueError(f"`group_by_length` is on, but {reason}: leave out one of them.")
        above_0 = (
            "steps", "epochs", "batch_size", "gradient_accumulation", "max_tiles", "logging_steps", "eval_steps",
            "eval_max_new_tokens", "patience", "price_per_hour", "learning_rate", "max_grad_norm", "keep_checkpoints",
        )  # fmt: skip
        at_least_0 = (
            "warmup_steps", "save_steps", "eval_answers", "num_workers", "weight_decay", "vision_layer_decay"
        )  # fmt: skip
        for name in (*above_0, *at_least_0):
            value = getattr(self, name)
            if value is None or math.isfinite(value) and (value > 0 or value == 0 and name in at_least_0):
                continue
            expected = "a number above 0" if name in above_0 else "0 or more"
            raise ValueError(f"`{name}` is {value}: expected {expected}.")
        for rate in (self.learning_rate or 0, *self.learning_rates.values()):
            if not 0 <= rate <= 1:
                raise ValueError(
                    f"The learning rate is {rate}: expected a value between 0 and 1 (in the paper: 1e-3, 1e-4)."
                )
        if self.max_tiles is not None and math.isqrt(self.max_tiles) ** 2 != self.max_tiles:
            raise ValueError(f"`max_tiles` is {self.max_tiles}: expected a square number (1, 4, 9, 16, …).")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"`schedule` is {self.schedule!r}: expected one of {', '.join(SCHEDULES)}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` is {self.seed}: expected at least 0 and less than 2**32.")

    @property
    def samples_per_step(self) -> int:
        """Of all processes together; rows, with `pack`."""
        return self.batch_size * self.gradient_accumulation * int(os.environ.get("WORLD_SIZE", 1))
