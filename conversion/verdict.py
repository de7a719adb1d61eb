"""The verdict on a quantized model: what it loses against the 16-bit one on held-out data, and if that is too much.

A quantized model can lose most of its answers while its files, its codes and its text view are all in order. Only its
answers show it.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from hub_cards.verdicts import FAILED, PASSED, UNDECIDED, UNKNOWN, answer_error, failures

logger = logging.getLogger(__name__)

VIEWS = {"text": "chat without images and no text", "multimodal": "chat with images"}  # what each is measured on
FEWEST_SAMPLES = 4  # that agree, below which no comparison passes: their spread may be small by luck
Finding = tuple[str, str]  # the result of one comparison, and a sentence that says why it did not pass
Losses = Sequence[tuple[float, int]]  # by sample: the negative log-likelihood of its tokens, in nats, and how many


@dataclass(frozen=True)
class Limits:
    """The largest loss that passes; `ValueError` for a limit that cannot be one.

    Attributes:
        answer_loss: points of the score (0 to 100) over all samples of a view.
        perplexity_ratio: perplexity of the quantized model over that of the 16-bit one.
    """

    answer_loss: float = 3.0
    perplexity_ratio: float = 1.15

    def __post_init__(self) -> None:
        if not 0 <= self.answer_loss <= 100:
            raise ValueError(
                f"The largest loss of answers is {self.answer_loss:g}: expected points from 0 to 100 "
                "(--max-answer-loss)."
            )
        if not 1 <= self.perplexity_ratio < math.inf:
            raise ValueError(
                f"The largest ratio of perplexities is {self.perplexity_ratio:g}: expected at least 1, for no change "
                "(--max-perplexity-ratio)."
            )


class HeldOut(Protocol):
    """What models are compared on."""

    def measure(self, model: Any) -> Any:
        """What `verdict` compares, of one model."""
        ...

    def logits(self, model: Any) -> dict[str, Any]:
        """By view, float32 logits (positions, vocabulary) at the same few places for each model."""
        ...

    def verdict(
        self, before: Any, after: Any, error_by_part: Mapping[str, Mapping[str, float]] | None = None
    ) -> dict[str, Any]:
        """The verdict on a quantized model measured as `after`, made from one measured as `before`."""
        ...


def judge(
    views: Mapping[str, Mapping[str, Any]],
    limits: Limits,
    accept_loss: bool,
    *,
    remarks: Sequence[str] = (),
    expected: Sequence[str] = tuple(VIEWS),
) -> dict[str, Any]:
    """The verdict as it is recorded.

    Args:
        views: by view `answers`, paired differences as in `genieblue.evaluation.evaluate.Difference`, the first over
            all samples; and `perplexity`, entries of `perplexity_change`.
        accept_loss: recorded if limits are exceeded.
        remarks: sentences about the data.
        expected: views that are named if they are missing.
    """
    found = decide([each for view in views for each in _findings(view, views[view], limits)], accept_loss)
    found["reasons"] += not_measured([view for view in expected if view not in views])
    return found | {"remarks": list(remarks), "limits": asdict(limits), "views": dict(views)}


def decide(findings: Sequence[Finding], accept_loss: bool) -> dict[str, Any]:
    """Result, acceptance and reasons of a verdict, and which of them failed: the worst of its findings decides."""
    results = [result for result, _ in findings]
    result = next((each for each in (FAILED, UNKNOWN, UNDECIDED, PASSED) if each in results), UNKNOWN)
    reasons = [reason for _, reason in findings if reason]
    failed = [reason for each, reason in findings if each == FAILED]
    return {"result": result, "accepted": result != FAILED or accept_loss, "reasons": reasons, "failures": failed}


def not_measured(views: Sequence[str], answers: bool = False) -> list[str]:
    """One sentence for each of the `views`, or only of their `answers`, that the data says nothing about."""
    what = "view's answers were" if answers else "view was"
    return [f"the {view} {what} not measured: the data has no {VIEWS[view]}" for view in views]


def nothing_measured() -> dict[str, Any]:
    """The verdict without held-out data."""
    return {
        "result": UNKNOWN,
        "accepted": True,
        "reasons": ["no held-out data was given (--eval-data), so nothing is known about its answers"],
    }


def with_problems(verdict: Mapping[str, Any], problems: Sequence[str], accept_loss: bool) -> dict[str, Any]:
    """The verdict, which also fails for `problems`, if any; accepted then if `accept_loss`, or as a failure before."""
    if not problems:
        return dict(verdict)
    accepted = accept_loss or (verdict["result"] == FAILED and verdict["accepted"])
    both = {kind: [*problems, *verdict.get(kind, ())] for kind in ("reasons", "failures")}
    return {**verdict, "result": FAILED, "accepted": accepted, **both}


def warn_of_loss(name: object, quantization: Mapping[str, Any] | None, then: str, tell_accepted: bool = False) -> None:
    """Warns that something quantized lost too much, by the verdict in its settings, unless that was accepted.

    Args:
        name: its folder, or Hub id.
        then: a sentence that says what follows and what to do.
        tell_accepted: says of an accepted loss that it is one.
    """
    verdict = (quantization or {}).get("verdict") or {}
    if verdict.get("result") != FAILED:
        return
    if not verdict["accepted"]:
        logger.warning("%s lost too much by its verdict: %s. %s", name, failures(verdict), then)
    elif tell_accepted:
        logger.warning("%s lost too much by its verdict, which was accepted: %s.", name, failures(verdict))


def of_text_view(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a verdict that is about the quantized base alone, which is the text view."""
    if "limits" not in verdict:
        return dict(verdict)
    views = {view: found for view, found in verdict["views"].items() if view == "text"}
    limits, remarks = Limits(**verdict["limits"]), verdict["remarks"]
    found = judge(views, limits, accept_loss=verdict["accepted"], remarks=remarks, expected=("text",))
    return found | {"data": verdict["data"]}


def perplexity_change(of: str, before: Losses, after: Losses) -> dict[str, Any]:
    """How the perplexity of the same tokens changed; `of` says what they are.

    `error` is the standard error of the ratio's logarithm, paired by sample (a ratio estimator); none for one sample.
    """
    tokens = sum(count for _, count in before)
    losses = [sum(loss for loss, _ in each) / tokens for each in (before, after)]
    change = losses[1] - losses[0]
    rest = [(later - former) - change * count
            for (former, count), (later, _) in zip(before, after, strict=True)]  # fmt: skip
    size = len(rest)
    error = None if size < 2 else math.sqrt(size / (size - 1) * sum(each**2 for each in rest)) / tokens
    if error is not None and not math.isfinite(error):  # so is the ratio, which then fails
        error = 0.0
    return {
        "of": of, "before": _exp(losses[0]), "after": _exp(losses[1]), "ratio": _exp(change), "error": error,
        "samples": size, "tokens": tokens,
    }  # fmt: skip


def _exp(value: float) -> float:
    """A large number in place of NaN and infinity, which JSON does not have and no limit allows."""
    return math.exp(max(value, -30.0) if value < 30 else 30.0)


def _findings(view: str, found: Mapping[str, Any], limits: Limits) -> Iterator[Finding]:
    if found["answers"]:
        yield answers_finding(f"the {view} view's answers", found["answers"][0], limits.answer_loss)
    for change in found["perplexity"]:
        yield perplexity_finding(view, change, limits.perplexity_ratio)


def answers_finding(what: str, total: Mapping[str, Any], limit: float) -> Finding:
    """A loss fails if it exceeds its limit by more than its standard error, and passes if it is below it by as much.

    Between the two there are too few samples to tell.

    Args:
        what: names the answers in the sentence.
        total: the paired difference over all samples, as in `genieblue.evaluation.evaluate.Difference`.
        limit: in points.
    """
    # Subtracted: a negated zero would be printed as -0.0.
    loss, error, most = 0.0 - 100 * total["difference"], answer_error(total), 100 * total["first"]
    said = f"{what} lose {loss:.1f} ± {error:.1f} points"
    if loss - error > limit:
        return FAILED, f"{said}, more than {limit:g}"
    if most <= limit:
        return UNDECIDED, (
            f"{what} score only {most:.1f} % in 16 bits, so they cannot lose more than {limit:g} points: use other "
            "samples or another metric"
        )
    if total["count"] < FEWEST_SAMPLES:  # with a limit that the weight of a sample does not reach
        return UNDECIDED, f"{said}, {_from_few(total['count'])}"
    if loss + error > limit:
        return UNDECIDED, f"{said}, too near to {limit:g} for {total['count']} samples: give more"
    return PASSED, ""


def _from_few(samples: int) -> str:
    return f"from {samples} {'sample' if samples == 1 else 'samples'}: at least {FEWEST_SAMPLES} are needed"


def perplexity_finding(view: str, change: Mapping[str, Any], limit: float, of: str = "16-bit model") -> Finding:
    """The same for an entry of `perplexity_change`; `of` is what it was before."""
    ratio, error = change["ratio"], change["error"]
    said = f"the perplexity of the {change['of']} in the {view} view is {ratio:.3f} times the {of}'s"
    loss, most = math.log(ratio), math.log(limit)  # a power of a large error would overflow
    if error is not None and loss - error > most:
        return FAILED, f"{said}, more than {limit:g}"
    if error is None or change["samples"] < FEWEST_SAMPLES:
        return UNDECIDED, f"{said}, {_from_few(change['samples'])}"
    if loss + error > most:
        return UNDECIDED, f"{said}, too near to {limit:g} for {change['samples']} samples: give more"
    return PASSED, ""
