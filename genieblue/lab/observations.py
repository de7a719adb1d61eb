"""The paper's observations, put to a lab's numbers: each holds, does not hold, or is undecided at this error.

Each is a difference of two averages that the paper finds above zero. It decides if it is clear at 95 %; how clear a
difference can be depends on how often structures were trained with other seeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from genieblue.lab.results import Estimate, LabResults, Runs

BASE = "base"
HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "undecided", "not run"


@dataclass(frozen=True)
class Verdict:
    """What a lab says of an observation; `evidence` are its differences, by name, in points of the averages."""

    statement: str
    verdict: str
    evidence: dict[str, Estimate]


Find = Callable[[LabResults, str | None], dict[str, Estimate] | None]


def _images(second: str, *firsts: str) -> Find:
    """Differences on images: `second` minus each of `firsts`."""
    return _differences("images", second, *firsts)


def _texts(second: str, *firsts: str) -> Find:
    """Differences on texts: `second` minus each of `firsts`, of the trained weights, or of the base itself."""
    return _differences("texts", second, *firsts)


def _differences(kind: str, second: str, *firsts: str) -> Find:
    def find(results: LabResults, data: str | None) -> dict[str, Estimate] | None:
        runs = {name: _runs(results, kind, name, data) for name in (second, *firsts)}
        if not all(runs.values()):
            return None
        return {f"{second} − {name}": results.difference(runs[name], runs[second]) for name in firsts}

    return find


def _runs(results: LabResults, kind: str, name: str, data: str | None) -> Runs:
    group = results.get(name, data)
    if name == BASE:
        return results.base_texts
    return Runs(kind, ()) if group is None else getattr(group, kind)


# The statement, and the differences that are above zero if it holds.
OBSERVATIONS: tuple[tuple[str, Find], ...] = (
    ("Full fine-tuning costs text ability (78.18 % are left in the paper).", _texts(BASE, "full")),
    ("Weights with LoRA keep more text ability than full fine-tuning (93.63 %).", _texts("lora", "full")),
    ("LoRA alone falls behind full fine-tuning on images (91.82 %).", _images("full", "lora")),
    ("Visual experts in a quarter of the blocks do better on images than LoRA alone (96.60 %).",
     _images("cogvlm-skip", "lora")),
    ("Every fourth block is a better place than the first or last quarter.",
     lambda results, data: _merged(_images("genieblue-skip", "genieblue-pre", "genieblue-post")(results, data),
                                   _images("cogvlm-skip", "cogvlm-pre", "cogvlm-post")(results, data))),
    ("GenieBlue does better on images than visual experts, without routing tokens (98.99 % against 96.60 %).",
     _images("genieblue-skip", "cogvlm-skip")),
    ("On a shared base, GenieBlue costs text ability (90.42 %), which on one that is not shared stays whole.",
     _texts(BASE, "genieblue-skip")),
)  # fmt: skip


def _merged(*found: dict[str, Estimate] | None) -> dict[str, Estimate] | None:
    merged = {name: each for some in found if some for name, each in some.items()}
    return merged or None


def judge(results: LabResults, data: str | None = None) -> list[Verdict]:
    """A verdict on each observation, of the runs on some data, by default the first."""
    verdicts = []
    for statement, find in OBSERVATIONS:
        evidence = find(results, data)
        found = NOT_RUN if evidence is None else verdict_on(list(evidence.values()), results.decisive)
        verdicts.append(Verdict(statement, found, evidence or {}))
    return verdicts


def verdict_on(differences: Sequence[Estimate], decisive: float | None) -> str:
    """`HOLDS` if all are clearly above zero, `FAILS` if one is clearly below, otherwise `UNDECIDED`.

    A difference is clear from `decisive` standard errors on; without these, or without that number, nothing is.
    """
    signs = []
    for each in differences:
        limit = None if each.error is None or decisive is None else decisive * each.error
        decided = limit is not None and abs(each.value) > limit
        signs.append((1 if each.value > 0 else -1) if decided else 0)
    if -1 in signs:
        return FAILS
    return HOLDS if all(sign == 1 for sign in signs) else UNDECIDED
