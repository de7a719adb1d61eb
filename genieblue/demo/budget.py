"""A budget of steps or seconds, whichever runs out first, for the demo's training runs."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments


class TrainingBudget(TrainerCallback):
    """Ends a `Trainer` run after `max_steps` optimizer steps or `max_seconds`, and shows a progress bar.

    `fraction(step)` is the used part of the budget. A schedule based on it also completes on a slow machine, where
    time runs out before the steps do.
    """

    def __init__(self, title: str, max_steps: int, max_seconds: float = math.inf, samples_per_step: int = 1):
        if max_steps < 1 or not max_seconds > 0:
            raise ValueError(
                f"A training budget needs at least one step and some time, got {max_steps} steps and "
                f"{max_seconds} seconds. Give positive numbers."
            )
        self.title, self.max_steps, self.max_seconds = title, max_steps, max_seconds
        self.samples_per_step = samples_per_step
        self.last_loss = math.nan
        self.steps_done = 0
        self._started: float | None = None
        self._bar: tqdm | None = None

    def elapsed(self) -> float:
        """Seconds since the first step started; 0 before."""
        return 0.0 if self._started is None else time.perf_counter() - self._started

    def fraction(self, step: int) -> float:
        """Used part of the budget at an optimizer step, from 0 to 1."""
        return min(1.0, max(step / self.max_steps, self.elapsed() / self.max_seconds))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()
        self._bar = tqdm(total=self.max_steps, desc=self.title, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps_done = state.global_step
        self._bar.update(1)
        if self.elapsed() >= self.max_seconds:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.last_loss = float(logs["loss"])
            rate = self.steps_done * self.samples_per_step / max(self.elapsed(), 1e-9)
            self._bar.set_postfix_str(f"loss {self.last_loss:.3f}, {rate:.0f} samples/s")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()


def warmup_cosine(
    optimizer: torch.optim.Optimizer, budget: TrainingBudget, warmup: float = 0.03, floor: float = 0.02
) -> LambdaLR:
    """Linear warm-up over the first `warmup` of the steps, then cosine decay to `floor` × peak at the budget's end."""

    def factor(step: int) -> float:
        ramp = min(1.0, (step + 1) / max(1.0, warmup * budget.max_steps))
        return ramp * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * budget.fraction(step))))

    return LambdaLR(optimizer, factor)


def run_training(
    model: torch.nn.Module,
    dataset: torch.utils.data.Dataset,
    budget: TrainingBudget,
    *,
    output_dir: str,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 0.05,
    seed: int = 0,
    collate: Callable | None = None,
) -> None:
    """Trains all of a model in place with `transformers.Trainer`, AdamW and `warmup_cosine`, without checkpoints."""
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=batch_size,
        max_steps=budget.max_steps,
        max_grad_norm=1.0,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=weight_decay
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        optimizers=(optimizer, warmup_cosine(optimizer, budget)),
        callbacks=[budget],
    )
    # The budget's bar already shows what this callback would print.
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()
