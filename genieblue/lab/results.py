"""The results of a lab: averages over tasks and seeds, and differences of structures with their standard errors.

A difference of two structures is taken on the same questions, so that how hard these are drops out; what remains is
how the questions vary, and how runs with other seeds do. With one seed, that of all structures together is used.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genieblue.evaluation.metrics import standard_error
from genieblue.lab.cells import BASE_TEXTS, IMAGES, LAB_FILE, RESULT, TEXTS, Cell, cells_of, check_cells, check_is_lab
from genieblue.lab.lab_file import LabFile, read_lab_file
from modeling_genieblue.model_files_genieblue import read_json

Values = Mapping[str, Sequence[float]]  # of each question, from 0 to 100, by task


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, which is `None` where it cannot be known."""

    value: float
    error: float | None

    def text(self, digits: int = 1, sign: str = "") -> str:
        """For a table; `sign` is that of a format, such as `+`."""
        return f"{self.value:{sign}.{digits}f}" + ("" if self.error is None else f" ± {self.error:.{digits}f}")

    def as_difference(self) -> str:
        """With its sign, and more digits if the error would be rounded to 0, so that what decides is seen."""
        return self.text(-math.floor(math.log10(self.error)) if self.error and self.error < 0.05 else 1, "+")


@dataclass(frozen=True)
class Runs:
    """What runs with other seeds scored on the same questions.

    Attributes:
        kind: `images`, `texts` (of the trained weights: a shared base), or `base`, which is run once, without a seed.
        values: by question, of each seed.
    """

    kind: str
    values: tuple[Values, ...]

    def __bool__(self) -> bool:
        return bool(self.values and self.values[0])

    def of_task(self, task: str) -> "Runs":
        """The same of one task alone."""
        return Runs(self.kind, tuple({task: each[task]} for each in self.values))


@dataclass(frozen=True)
class Group:
    """The finished runs of a structure on one kind of data, by seed; `results` are those in the files of its cells."""

    structure: str
    data: str
    seeds: tuple[int, ...]
    results: tuple[dict[str, Any], ...]
    images: Runs
    texts: Runs


class LabResults:
    """What a lab's folder has of finished cells."""

    def __init__(self, folder: Path):
        """Reads the folder; `OSError` if it is none of a lab, `ValueError` if it has cells of another lab."""
        check_is_lab(folder)
        self.lab: LabFile = read_lab_file(folder / LAB_FILE)
        check_cells(folder, self.lab)
        base = read_json(folder / BASE_TEXTS) if (folder / BASE_TEXTS).is_file() else {}
        self.base_texts = Runs("base", ({task: score["values"] for task, score in base.items()},))
        self.failed: dict[Cell, str] = {}
        self.missing: list[Cell] = []
        by_name: dict[tuple[str, str], list[tuple[int, dict, Values, Values]]] = {}
        for cell in cells_of(self.lab):
            place = cell.folder(folder)
            if not (place / RESULT).is_file():
                self.missing.append(cell)
            elif "failed" in (result := read_json(place / RESULT)):
                self.failed[cell] = result["failed"]
            else:
                images, texts = (
                    {task: score["values"] for task, score in read_json(place / name).items()}
                    for name in (IMAGES, TEXTS)
                )
                by_name.setdefault((cell.data, cell.structure), []).append((cell.seed, result, images, texts))
        self.groups: dict[tuple[str, str], Group] = {}
        for (data, name), found in by_name.items():
            seeds, results, images, texts = zip(*sorted(found, key=lambda each: each[0]), strict=True)
            self.groups[data, name] = Group(name, data, seeds, results, Runs("images", images), Runs("texts", texts))

    def get(self, structure: str, data: str | None = None) -> Group | None:
        """The runs of a structure on some data, by default the first."""
        return self.groups.get((data or next(iter(self.lab.data)), structure))

    def average(self, runs: Runs) -> Estimate:
        """Of all tasks, over seeds."""
        return average(runs.values, self._seed_error(runs))

    def difference(self, first: Runs, second: Runs) -> Estimate:
        """`second` minus `first`, of averages over tasks, on the same questions."""
        return difference(first.values, second.values, self._seed_error(first), self._seed_error(second))

    def retention(self, reference: Runs, runs: Runs) -> Estimate:
        """The average in percent of that of a reference, on the same questions."""
        return retention(reference.values, runs.values, self._seed_error(reference), self._seed_error(runs))

    def _seed_error(self, runs: Runs) -> float:
        """The standard error that runs with other seeds add to a mean of these."""
        if runs.kind == "base":
            return 0.0
        return self._spread_of_seeds(runs.kind, tuple(runs.values[0])) / math.sqrt(len(runs.values))

    def _spread_of_seeds(self, kind: str, tasks: Sequence[str]) -> float:
        """The standard deviation of an average of tasks between seeds, of all structures that have several; else 0."""
        squares, freedom = 0.0, 0
        for group in self.groups.values():
            runs: Runs = getattr(group, kind)
            if runs and len(runs.values) > 1:
                means = [_average({task: each[task] for task in tasks}) for each in runs.values]
                squares += statistics.variance(means) * (len(means) - 1)
                freedom += len(means) - 1
        return math.sqrt(squares / freedom) if freedom else 0.0

    @property
    def decisive(self) -> float | None:
        """How many standard errors a difference must have to decide at 95 %, by Student's t.

        The spread of seeds is known from as many degrees of freedom as there are runs beyond the first of each
        structure. `None` if there are none: then nothing decides.
        """
        from scipy.stats import t

        freedom = sum(len(group.seeds) - 1 for group in self.groups.values())
        return float(t.ppf(0.975, freedom)) if freedom else None


def average(values: Sequence[Values], seed_error: float = 0.0) -> Estimate:
    """Of all tasks, over the runs that the values are of; `seed_error` is added to that of the questions."""
    means = [_average(each) for each in values]
    return Estimate(statistics.fmean(means), _with_seeds(_error_of_average(_over_seeds(values)), seed_error))


def difference(first: Sequence[Values], second: Sequence[Values], *seed_errors: float) -> Estimate:
    """`second` minus `first`, of averages over tasks, on the same questions; `seed_errors` are those of both."""
    return _paired(first, second, 1.0, *seed_errors)


def retention(reference: Sequence[Values], values: Sequence[Values], *seed_errors: float) -> Estimate:
    """The average in percent of that of a reference, on the same questions; not a number if that is 0."""
    of_reference = average(reference).value
    if of_reference == 0:
        return Estimate(math.nan, None)
    kept = average(values).value / of_reference
    # A ratio changes by what the values change beyond their share of the reference's (the delta method).
    of_reference_error, own_error = seed_errors or (0.0, 0.0)
    error = _paired(reference, values, kept, kept * of_reference_error, own_error).error
    return Estimate(100 * kept, None if error is None else 100 * error / of_reference)


def _paired(first: Sequence[Values], second: Sequence[Values], share: float, *seed_errors: float) -> Estimate:
    """`second` minus a share of `first`, of averages over tasks."""
    one, other = _over_seeds(first), _over_seeds(second)
    paired = {task: [right - share * left for left, right in zip(one[task], other[task], strict=True)] for task in one}
    return Estimate(_average(paired), _with_seeds(_error_of_average(paired), *seed_errors))


def _average(values: Values) -> float:
    return statistics.fmean(statistics.fmean(each) for each in values.values())


def _over_seeds(values: Sequence[Values]) -> dict[str, list[float]]:
    """By task, the mean of each question over seeds."""
    return {
        task: [statistics.fmean(each) for each in zip(*(of_seed[task] for of_seed in values), strict=True)]
        for task in values[0]
    }


def _error_of_average(values: Values) -> float | None:
    """Of the average of all tasks, by how the questions vary; `None` if a task has one question."""
    errors = [standard_error(each) for each in values.values()]
    known = [each for each in errors if each is not None]
    return math.hypot(*known) / len(errors) if len(known) == len(errors) else None


def _with_seeds(sampling: float | None, *seed_errors: float) -> float | None:
    return None if sampling is None else math.hypot(sampling, *seed_errors)
