"""Metrics of a single answer: a score from 0 to 1 against one or several references."""

import math
import statistics
import unicodedata
from collections.abc import Callable, Sequence

CHOICE = "choice"  # by likelihood, so it is not computed from the answer's text
ANLS_THRESHOLD = 0.5  # below this similarity an answer counts as wrong
TOLERANCE = 0.05  # of `relaxed`


def exact(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is a reference, up to whitespace."""
    return float(_squeezed(answer) in map(_squeezed, references))


def contains(answer: str, references: Sequence[str]) -> float:
    """1 if a reference occurs in the answer as whole words, in any case."""
    padded = f" {_words(answer)} "
    return float(any(f" {_words(reference)} " in padded for reference in references))


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity in any case, best reference; 0 below 0.5 (arXiv 1907.00490)."""
    from rapidfuzz.distance import Levenshtein

    said = _squeezed(answer).casefold()
    best = max(Levenshtein.normalized_similarity(said, _squeezed(each).casefold()) for each in references)
    return best if best >= ANLS_THRESHOLD else 0.0


def relaxed(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is within 5 % of a number, or equals a reference that is none (ChartQA, arXiv 2203.10244)."""
    said = _number(answer)
    for reference in references:
        expected = _number(reference)
        if expected is None or said is None:
            if _squeezed(answer).casefold() == _squeezed(reference).casefold():
                return 1.0
        elif abs(said - expected) <= TOLERANCE * abs(expected):
            return 1.0
    return 0.0


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact, "contains": contains, "anls": anls, "relaxed": relaxed,
}  # fmt: skip
NAMES = (*METRICS, CHOICE)


def check_metric(name: str) -> None:
    """`ValueError` for a name that is no metric, `ModuleNotFoundError` for one whose package is missing."""
    if name not in NAMES:
        raise ValueError(f"The metric is {name!r}: expected one of {', '.join(NAMES)}.")
    if name == "anls":
        import rapidfuzz  # noqa: F401 - a missing package is noticed before the first answer


def standard_error(scores: Sequence[float]) -> float | None:
    """Standard error of the mean of independent scores; `None` for fewer than two."""
    return statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None


def _squeezed(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _words(text: str) -> str:
    """The words of a text, with punctuation as spaces, except within numbers (`3.5`, `1,000`)."""
    text = _squeezed(text).casefold()
    kept = [
        sign if sign.isalnum() or _is_within_number(text, place) else " " for place, sign in enumerate(text)
    ]  # fmt: skip
    return " ".join("".join(kept).split())


def _is_within_number(text: str, place: int) -> bool:
    return text[place] in ".,-" and text[place + 1 : place + 2].isdigit() and (
        text[place] == "-" or text[place - 1 : place].isdigit()
    )  # fmt: skip


def _number(text: str) -> float | None:
    """The number that a text is, in any usual form (`1,234`, `12 %`, `$5`); `None` if it is none."""
    text = text.strip().strip("$€£").replace(",", "").replace("−", "-").strip()
    share = text.endswith("%")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return number / 100 if share else number
