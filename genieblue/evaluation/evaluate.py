"""Evaluation of a model on a dataset: a score for each sample, means by task with standard errors, comparisons."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tqdm.auto import tqdm

from genieblue.data.chat_samples import BAD_SAMPLE
from genieblue.evaluation.answering import Answerer
from genieblue.evaluation.metrics import CHOICE, METRICS, standard_error
from genieblue.evaluation.samples import NO_TASK, EvaluationDataset, EvaluationSample

OTHER = "other"  # samples without a task, beside some that have one


@dataclass(frozen=True)
class ScoredAnswer:
    """A model's answer to one sample, with its score from 0 to 1."""

    where: str
    task: str
    metric: str
    view: str
    question: str
    references: tuple[str, ...]
    answer: str
    score: float


@dataclass(frozen=True)
class Score:
    """The mean score of a group of samples, with its standard error (`None` for a single sample)."""

    task: str
    metric: str
    mean: float
    standard_error: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """Paired difference of two models on the same samples: second minus first.

    `better` and `worse` count the samples on which the second scores higher and lower.
    """

    task: str
    metric: str
    first: float
    second: float
    difference: float
    standard_error: float | None
    better: int
    worse: int
    count: int


@dataclass(frozen=True)
class Evaluation:
    """Scored answers, in the order of the data."""

    answers: list[ScoredAnswer]

    def of_view(self, view: str) -> "Evaluation":
        """The answers that one view gave."""
        return Evaluation([answer for answer in self.answers if answer.view == view])

    def scores(self) -> list[Score]:
        """One score for each task and metric; with several, first one for everything."""
        return [
            Score(task, metric, fmean(values), standard_error(values), len(values))
            for (task, metric), values in _by_group((answer, answer.score) for answer in self.answers)
        ]

    @property
    def wrong(self) -> list[tuple[int, ScoredAnswer]]:
        """Answers that are not fully right, with their places in the data."""
        return [(place, answer) for place, answer in enumerate(self.answers) if answer.score < 1]


def evaluate(answerer: Answerer, dataset: EvaluationDataset, *, max_new_tokens: int = 64) -> Evaluation:
    """Answers all samples greedily, in batches of one view, and scores them.

    Raises `ValueError` naming the sample for one that cannot be answered, such as an unreadable image.
    """
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` is {max_new_tokens}: expected at least 1.")
    found: dict[int, ScoredAnswer] = {}
    with tqdm(desc="Evaluating", total=len(dataset), delay=1, leave=False) as bar:
        for places in _batches(dataset, answerer.batch_size):
            samples = [dataset[place] for place in places]
            for place, answer in zip(places, _scored(answerer, samples, max_new_tokens), strict=True):
                found[place] = answer
            bar.update(len(places))
    return Evaluation([found[place] for place in sorted(found)])


def compare(first: Evaluation, second: Evaluation) -> list[Difference]:
    """The difference of two evaluations of the same data, by task; `ValueError` if the samples differ."""
    pairs = list(zip(first.answers, second.answers, strict=False))
    same = len(first.answers) == len(second.answers) and all(
        (one.where, one.question, one.references, one.metric) == (other.where, other.question, other.references,
                                                                 other.metric)
        for one, other in pairs
    )  # fmt: skip
    if not same:
        raise ValueError("The two evaluations are of different samples or metrics: evaluate both on the same data.")
    found = []
    for (task, metric), values in _by_group((one, (one.score, other.score)) for one, other in pairs):
        differences = [other - one for one, other in values]
        found.append(
            Difference(
                task,
                metric,
                first=fmean(one for one, _ in values),
                second=fmean(other for _, other in values),
                difference=fmean(differences),
                standard_error=standard_error(differences),
                better=sum(value > 0 for value in differences),
                worse=sum(value < 0 for value in differences),
                count=len(values),
            )
        )
    return found


def _batches(dataset: EvaluationDataset, batch_size: int) -> Iterable[list[int]]:
    """Places of samples that are answered together: of one view, and of similar length to save padding."""
    kinds: dict[tuple[bool, bool], list[tuple[int, int]]] = {}
    for place in range(len(dataset)):
        sample = dataset[place]
        by_choice = sample.metric == CHOICE
        length = sum(len(str(message["content"])) for message in sample.prompt)
        kinds.setdefault((bool(sample.images), by_choice), []).append((length, place))
    for (_, by_choice), entries in sorted(kinds.items()):
        places = [place for _, place in sorted(entries)]
        size = 1 if by_choice else batch_size
        for start in range(0, len(places), size):
            yield places[start : start + size]


def _scored(answerer: Answerer, samples: Sequence[EvaluationSample], max_new_tokens: int) -> list[ScoredAnswer]:
    try:
        if samples[0].metric == CHOICE:
            texts = [_likeliest(answerer, sample) for sample in samples]
        else:
            texts = answerer.answers(samples, max_new_tokens)
    except BAD_SAMPLE as error:
        if len(samples) > 1:  # names the bad one
            return [_scored(answerer, [sample], max_new_tokens)[0] for sample in samples]
        raise ValueError(f"{samples[0].where}: {error}") from error
    return [
        ScoredAnswer(
            sample.where,
            sample.task,
            sample.metric,
            answerer.view(sample),
            sample.question,
            sample.references,
            text.strip(),
            _score(sample, text),
        )
        for sample, text in zip(samples, texts, strict=True)
    ]


def _likeliest(answerer: Answerer, sample: EvaluationSample) -> str:
    likelihoods = answerer.log_likelihoods(sample)
    if not all(map(math.isfinite, likelihoods)):
        raise ValueError("a likelihood is not a finite number: the model's weights or its precision are damaged.")
    return sample.choices[likelihoods.index(max(likelihoods))]


def _score(sample: EvaluationSample, answer: str) -> float:
    if sample.metric == CHOICE:
        return float(answer in sample.references)
    return METRICS[sample.metric](answer, sample.references)


def _by_group(entries: Iterable[tuple[ScoredAnswer, Any]]) -> list[tuple[tuple[str, str], list[Any]]]:
    """Values by task and metric; behind a first group of all, if there are several."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for answer, value in entries:
        groups.setdefault((answer.task, answer.metric), []).append(value)
    if len(groups) < 2:
        return list(groups.items())
    groups = {(OTHER if task == NO_TASK else task, metric): values for (task, metric), values in groups.items()}
    metrics = {metric for _, metric in groups}
    together = [value for values in groups.values() for value in values]
    return [((NO_TASK, metrics.pop() if len(metrics) == 1 else "mixed"), together), *sorted(groups.items())]
