"""Training of the demo's own base and vision towers, which other users get from the Hub, with plain `Trainer`."""

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from genieblue.training.trainer import TrainingProgress

SAVE_STEPS = 250
LAST_OF_CHECKPOINT = "trainer_state.json"  # Trainer writes it last


def pretrain(
    model: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 0.05,
    seed: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
    checkpoints: Path | None = None,
) -> None:
    """Trains all of a model in place for one pass over a dataset, in order.

    AdamW, 3 % warm-up, then cosine decay to 2 % of the peak. With a folder for checkpoints, a killed run goes on from
    the last complete one.
    """
    with tempfile.TemporaryDirectory() if checkpoints is None else nullcontext(checkpoints) as output:
        arguments = TrainingArguments(
            output_dir=str(output),
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.02},
            warmup_steps=0.03,  # below 1, a fraction of the run
            weight_decay=weight_decay,
            adam_beta2=0.98,
            adam_epsilon=1e-6,
            max_grad_norm=1.0,
            logging_steps=20,
            save_strategy="no" if checkpoints is None else "steps",
            save_steps=SAVE_STEPS,
            save_total_limit=2,  # the newer one may be incomplete
            report_to=[],
            disable_tqdm=True,  # replaced by the bar of our own training
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=dataset,
            callbacks=[TrainingProgress()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=_last_checkpoint(Path(output)))
    model.eval()


def _last_checkpoint(folder: Path) -> str | None:
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{LAST_OF_CHECKPOINT}")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None
