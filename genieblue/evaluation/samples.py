"""Evaluation data: chats as in training, with references for the last answer."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from genieblue.data.chat_samples import ChatSample, parse_chat, texts_of
from genieblue.data.chats import ChatDataset
from genieblue.data.image_folders import ImageFolders
from genieblue.data.sample_keys import is_missing, shortened
from genieblue.data.sources import Location
from genieblue.evaluation.metrics import CHOICE, check_metric

KEYS = ("answers", "choices", "metric", "task")
NO_TASK = "all"


@dataclass(frozen=True)
class EvaluationSample(ChatSample):
    """A chat whose last answer is a reference, and how the model's own is scored.

    Attributes:
        references: all accepted answers; the chat's own is the first.
        choices: the answers to choose from, for the metric `choice`.
        metric: one of `metrics.NAMES`.
        task: the group that the sample belongs to.
    """

    references: tuple[str, ...]
    choices: tuple[str, ...]
    metric: str
    task: str

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The messages up to the last question."""
        return self.messages[:-1]

    @property
    def question(self) -> str:
        """The text of the last question."""
        return " ".join(filter(None, texts_of(self.messages[-2:-1]))).strip()


class EvaluationDataset(ChatDataset):
    """A `ChatDataset` whose samples may also have `answers`, `choices`, `metric` and `task`.

    A chat may end with the question if `answers` (one, or a list of accepted ones) are given. `metric`, the argument,
    applies to samples that name none; by default it is `choice` for those with choices, else `exact`.
    """

    def __init__(
        self,
        source: str | os.PathLike | Location | Sequence[dict[str, Any]],
        *,
        metric: str | None = None,
        **options: Any,
    ):
        """`options` are those of `ChatDataset`; `ValueError` for a metric that is unknown or does not fit a sample."""
        if metric is not None:
            check_metric(metric)
        self.metric = metric
        super().__init__(source, **options)
        if len(self) == 0:
            raise ValueError("There is nothing to evaluate: the data has no good samples.")

    def __getitem__(self, index: int) -> EvaluationSample:
        sample = super().__getitem__(index)
        assert isinstance(sample, EvaluationSample)
        return sample

    def _sample(self, raw: Any, where: str, image_folders: ImageFolders) -> EvaluationSample:
        return parse_sample(raw, where, image_folders, self.metric)


def parse_sample(
    raw: Any, where: str, image_folders: ImageFolders | None, metric: str | None = None
) -> EvaluationSample:
    """A sample for evaluation from its dictionary; `ValueError` for a bad one."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: the sample is {shortened(raw)}, expected an object with messages.")
    rest = {key: value for key, value in raw.items() if key not in KEYS}
    answers = _strings(raw.get("answers"), "answers", where)
    choices = _strings(raw.get("choices"), "choices", where)
    if answers:
        rest = _with_answer(rest, answers[0])
    elif _turns(rest)[2] in ("user", "human"):
        raise ValueError(f"{where}: there is no reference: give `answers`, or end the chat with the right answer.")
    chat = parse_chat(rest, where, image_folders)
    references = answers or ("".join(texts_of(chat.messages[-1:])),)
    chosen = _metric(raw.get("metric"), metric, choices, where)
    if chosen == CHOICE:
        _check_choices(choices, references, where)
    task = raw.get("task")
    task = NO_TASK if is_missing(task) else str(task)
    return EvaluationSample(chat.messages, chat.images, where, references, choices, chosen, task)


def _metric(own: Any, common: str | None, choices: Sequence[str], where: str) -> str:
    if is_missing(own):
        return common or (CHOICE if choices else "exact")
    try:
        check_metric(own)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return own


def _check_choices(choices: Sequence[str], references: Sequence[str], where: str) -> None:
    if len(set(choices)) < 2:
        raise ValueError(
            f"{where}: the metric {CHOICE!r} needs at least two different `choices`, found {len(set(choices))}. Add "
            "them, or use another metric."
        )
    if not set(choices) & set(references):
        raise ValueError(
            f"{where}: the reference {shortened(references[0])} is not among the choices {shortened(list(choices))}."
        )


def _strings(value: Any, key: str, where: str) -> tuple[str, ...]:
    """The strings of a value that is one or a list; numbers count as text."""
    if is_missing(value):
        return ()
    values = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(each, (str, int, float)) and str(each).strip() for each in values):
        raise ValueError(f"{where}: {key!r} is {shortened(value)}, expected a text or a list of texts.")
    return tuple(str(each) for each in values)


def _with_answer(raw: dict[str, Any], answer: str) -> dict[str, Any]:
    """A sample whose chat ends with `answer`, in place of the answer that it may end with."""
    key, turns, role = _turns(raw)
    if not turns:
        return raw  # named as a bad sample by `parse_chat`
    kept = turns[:-1] if role in ("assistant", "gpt") else turns
    return {**raw, key: [*kept, {"role": "assistant", "content": answer}]}


def _turns(raw: dict[str, Any]) -> tuple[str, list[Any], Any]:
    """The key of a chat's turns, the turns, and the role of the last one."""
    key = next((key for key in ("messages", "conversations") if not is_missing(raw.get(key))), "messages")
    turns = raw.get(key)
    if not isinstance(turns, (list, tuple)) or not turns:
        return key, [], None
    last = turns[-1]
    return key, list(turns), (last.get("role") or last.get("from")) if isinstance(last, dict) else None
