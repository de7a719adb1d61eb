"""Validation in training: the loss, scores of generated answers, and the best weights so far."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from genieblue.data.chats import ChatDataset
from genieblue.evaluation.answering import answerer_of
from genieblue.evaluation.evaluate import evaluate
from genieblue.evaluation.samples import EvaluationDataset
from modeling_genieblue.staging_genieblue import NewFolder
from modeling_genieblue.view_routing_genieblue import MULTIMODAL

logger = logging.getLogger(__name__)

BEST = "best"  # folder in the run's folder
BEST_RECORD = "best.json"


def warn_of_training_data(validation: ChatDataset, chats: ChatDataset) -> None:
    """Logs a warning if validation samples are also in the training data: their loss says nothing about new ones."""
    if both := validation.sample_hashes() & chats.sample_hashes():
        logger.warning(
            "%d of %d validation samples are also in the training data: the validation loss will be too low.",
            len(both),
            len(validation),
        )


class ValidationAnswers(TrainerCallback):
    """At each validation, answers some of the samples and logs their scores as `eval_answers_<task>_<metric>`.

    Texts run the multimodal view, which is the one that is trained.
    """

    def __init__(self, trainer: Any, processor: Any, data: EvaluationDataset, max_new_tokens: int):
        """`data` are the samples to answer; `trainer` logs the scores and knows the precision."""
        self._trainer, self._processor = trainer, processor
        self._data, self._max_new_tokens = data, max_new_tokens

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Generates with the weights as they are in training."""
        was_training = model.training
        model.eval()
        try:
            with self._trainer.compute_loss_context_manager():
                answerer = answerer_of(
                    model, self._processor, batch_size=args.per_device_eval_batch_size, view=MULTIMODAL
                )
                scores = evaluate(answerer, self._data, max_new_tokens=self._max_new_tokens).scores()
        finally:
            model.train(was_training)
        self._trainer.log({f"eval_answers_{score.task}_{score.metric}": score.mean for score in scores})


def best_record(folder: Path) -> dict[str, Any] | None:
    """The record of the best weights in a run's folder: `step` and `eval_loss`; `None` if there are none."""
    path = folder / BEST / BEST_RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@contextlib.contextmanager
def replaced_best(folder: Path, record: dict[str, Any]) -> Iterator[Path]:
    """A new folder for the best weights, which takes the place of the old one at the end, or not at all."""
    with NewFolder(folder / BEST, "validation") as new:
        yield new.staging
        (new.staging / BEST_RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
        new.put_in_place()
