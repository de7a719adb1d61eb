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

from genieblue.lab.cells import BASE_TEXTS, IMAGES, LAB_FILE, RESULT, TEXTS, Cell, cells_of, check_is_lab
from genieblue.lab.lab_file import LabFile, read_lab_file
from modeling_genieblue.model_files_genieblue import read_json

Values = Mapping[str, Sequence[float]]  # of each question, from 0 to 100, by task


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, which is `None` where it cannot be known."""

    value: float
    error: float | None

    def text(self, digits: int = 1) -> str:
        """For a table."""
        return f"{self.value:.{digits}f}" + ("" if self.error is None else f" ± {self.error:.{digits}f}")


@dataclass(frozen=True)
class Group:
    """The finished runs of a structure on one kind of data, by seed.

    Attributes:
        results: of the cells, as in their files.
        images, texts: values by question of each seed; texts are those of the trained weights (a shared base).
    """

    structure: str
    data: str
    seeds: tuple[int, ...]
    results: tuple[dict[str, Any], ...]
    images: tuple[Values, ...]
    texts: tuple[Values, ...]

    def score(self, kind: str, task: str) -> Estimate:
        """Of one task (`images` or `texts`), over all seeds."""
        found = [result[kind][task] for result in self.results]
        sampling = found[0]["standard_error"]
        means = [each["score"] for each in found]
        return Estimate(statistics.fmean(means), _total_error(sampling, means))


class LabResults:
    """What a lab's folder has of finished cells."""

    def __init__(self, folder: Path):
        """Reads the folder; `OSError` if it is none of a lab."""
        check_is_lab(folder)
        self.lab: LabFile = read_lab_file(folder / LAB_FILE)
        base = read_json(folder / BASE_TEXTS) if (folder / BASE_TEXTS).is_file() else {}
        self.base_scores: dict[str, dict[str, Any]] = base
        self.base_texts: Values = {task: score["values"] for task, score in base.items()}
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
        self.groups: dict[tuple[str, str], Group] = {
            (data, name): Group(name, data, *zip(*sorted(found, key=lambda each: each[0]), strict=True))
            for (data, name), found in by_name.items()
        }

    def get(self, structure: str, data: str | None = None) -> Group | None:
        """The runs of a structure on some data, by default the first."""
        return self.groups.get((data or next(iter(self.lab.data)), structure))

    def average(self, values: Sequence[Values]) -> Estimate:
        """Of all tasks, over seeds."""
        means = [_average(each) for each in values]
        sampling = math.hypot(*(_error(each) or 0.0 for each in _over_seeds(values).values())) / len(values[0])
        return Estimate(statistics.fmean(means), math.hypot(sampling, self._seed_error(values)))

    def difference(self, first: Sequence[Values], second: Sequence[Values]) -> Estimate:
        """`second` minus `first`, of averages over tasks, on the same questions."""
        one, other = _over_seeds(first), _over_seeds(second)
        paired = {task: [right - left for left, right in zip(one[task], other[task], strict=True)] for task in one}
        sampling = math.hypot(*(_error(each) or 0.0 for each in paired.values())) / len(paired)
        seeds = [self._seed_error(each) for each in (first, second)]
        return Estimate(_average(paired), math.hypot(sampling, *seeds))

    def retention(self, reference: Sequence[Values], values: Sequence[Values]) -> Estimate:
        """The average in percent of that of a reference, on the same questions."""
        of_reference, difference = self.average(reference).value, self.difference(reference, values)
        if of_reference == 0:
            return Estimate(math.nan, None)
        share = 100 / of_reference
        error = None if difference.error is None else share * difference.error
        return Estimate(100 + share * difference.value, error)

    def _seed_error(self, values: Sequence[Values]) -> float:
        """The standard error that runs with other seeds add to a mean of these; the base was run with none."""
        if values[0] is self.base_texts:
            return 0.0
        kind = "texts" if any(values is group.texts for group in self.groups.values()) else "images"
        return self._spread_of_seeds(kind) / math.sqrt(len(values))

    def _spread_of_seeds(self, kind: str) -> float:
        """The standard deviation of an average between seeds, of all structures that have several; else 0."""
        squares, freedom = 0.0, 0
        for group in self.groups.values():
            means = [_average(each) for each in getattr(group, kind) if each]
            if len(means) > 1:
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


def _average(values: Values) -> float:
    return statistics.fmean(statistics.fmean(each) for each in values.values())


def _over_seeds(values: Sequence[Values]) -> dict[str, list[float]]:
    """By task, the mean of each question over seeds."""
    return {
        task: [statistics.fmean(each) for each in zip(*(of_seed[task] for of_seed in values), strict=True)]
        for task in values[0]
    }


def _error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _total_error(sampling: float | None, means: Sequence[float]) -> float | None:
    """Of a mean over seeds, from that of one seed's questions, which are the same for all, and from the seeds."""
    between = _error(means) or 0.0
    return None if sampling is None else math.hypot(sampling, between)
