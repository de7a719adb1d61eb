"""Recorded verdicts on what quantization costs: their words, what cards say of them, and which forbid publishing."""

from collections.abc import Mapping
from typing import Any

PASSED, FAILED, UNDECIDED, UNKNOWN = "passed", "failed", "too few samples to tell", "not measured"
REFERENCES, PLAIN_TEXT = "reference answers", "plain text"  # what perplexities are of


def summary(verdict: Mapping[str, Any]) -> str:
    """A verdict in one line."""
    accepted = ", accepted" if verdict["result"] == FAILED and verdict["accepted"] else ""
    return "; ".join([f"{verdict['result']}{accepted}", *verdict["reasons"], *verdict.get("remarks", ())])


def answer_error(total: Mapping[str, Any]) -> float:
    """The standard error of a paired difference in points, at least the weight of one sample.

    That all of a few samples agree proves little: their spread is 0 then, and of one sample there is none.
    """
    return 100 * max(total["standard_error"] or 0.0, 1 / total["count"])


def verdict_problems(quantization: Mapping[str, Any] | None) -> list[str]:
    """The verdict in the settings of something quantized, if it failed and that was not accepted."""
    verdict = (quantization or {}).get("verdict") or {}
    if verdict.get("accepted", True):
        return []
    return [f"Quantization costs too much: {failures(verdict)}. Quantize it less, or accept the loss (--accept-loss)."]


def failures(verdict: Mapping[str, Any]) -> str:
    """What failed in a verdict, without what is undecided; earlier verdicts do not tell the two apart."""
    return "; ".join(verdict.get("failures") or verdict["reasons"])


def with_accepted_loss(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of something quantized, whose verdict is accepted if it failed."""
    if not verdict_problems(quantization):
        return dict(quantization)
    return {**quantization, "verdict": {**quantization["verdict"], "accepted": True}}


def measurement_rows(verdict: Mapping[str, Any]) -> list[dict[str, str]]:
    """What a verdict measured, as rows of `measurements.json`."""
    names = {of: " and ".join(each["name"] for each in verdict.get("data", ()) if each["of"] == of)
             for of in (REFERENCES, PLAIN_TEXT)}  # fmt: skip
    rows = []
    for view, found in verdict.get("views", {}).items():
        for each in found["answers"]:
            task = "" if each["task"] == "all" else f", {each['task']}"
            rows.append(
                {
                    "name": f"Answers of the {view} view{task}: {each['metric']}",
                    "value": f"{100 * each['second']:.1f} %, in 16 bits {100 * each['first']:.1f} % "
                    f"({100 * each['difference']:+.1f} ± {answer_error(each):.1f} points)",
                    "how": f"{each['count']} samples of {names[REFERENCES]}, greedy; ± one standard error of the "
                    "difference, at least the weight of one sample",
                }
            )
        for each in found["perplexity"]:
            rows.append(
                {
                    "name": f"Perplexity of the {each['of']}, {view} view",
                    "value": f"{each['after']:.3f}, in 16 bits {each['before']:.3f} ({each['ratio']:.3f} times)",
                    "how": f"{each['tokens']} tokens in {each['samples']} samples of {names[each['of']]}",
                }
            )
    for part, errors in (verdict.get("error_by_part") or {}).items():
        value = ", ".join(f"{view} {error:.3f}" for view, error in sorted(errors.items(), reverse=True))
        rows.append(
            {
                "name": f"Error of each view's logits with only `{part}` rounded",
                "value": value,
                "how": f"relative L2, at the first tokens of references of {names[REFERENCES]}",
            }
        )
    return rows
