"""Recorded verdicts on what quantization costs: their words, what cards say of them, and which forbid publishing."""

from collections.abc import Mapping
from typing import Any

PASSED, FAILED, UNDECIDED, UNKNOWN = "passed", "failed", "too few samples to tell", "not measured"


def summary(verdict: Mapping[str, Any]) -> str:
    """A verdict in one line."""
    accepted = ", accepted" if verdict["result"] == FAILED and verdict["accepted"] else ""
    return "; ".join([f"{verdict['result']}{accepted}", *verdict["reasons"], *verdict.get("remarks", ())])


def verdict_problems(quantization: Mapping[str, Any] | None) -> list[str]:
    """The verdict in the settings of something quantized, if it failed and that was not accepted."""
    verdict = (quantization or {}).get("verdict") or {}
    if verdict.get("accepted", True):
        return []
    return [
        f"Quantization costs too much: {'; '.join(verdict['reasons'])}. Quantize it less, or accept the loss "
        "(--accept-loss)."
    ]


def measurement_rows(verdict: Mapping[str, Any]) -> list[dict[str, str]]:
    """What a verdict measured, as rows of `measurements.json`."""
    names = " and ".join(each["name"] for each in verdict.get("data", ()))
    rows = []
    for view, found in verdict.get("views", {}).items():
        for each in found["answers"]:
            task = "" if each["task"] == "all" else f", {each['task']}"
            error = "" if each["standard_error"] is None else f" ± {100 * each['standard_error']:.1f}"
            rows.append(
                {
                    "name": f"Answers of the {view} view{task}: {each['metric']}",
                    "value": f"{100 * each['second']:.1f} %, in 16 bits {100 * each['first']:.1f} % "
                    f"({100 * each['difference']:+.1f}{error} points)",
                    "how": f"{each['count']} samples of {names}, greedy; ± one standard error of the difference",
                }
            )
        for each in found["perplexity"]:
            rows.append(
                {
                    "name": f"Perplexity of the {each['of']}, {view} view",
                    "value": f"{each['after']:.3f}, in 16 bits {each['before']:.3f} ({each['ratio']:.3f} times)",
                    "how": f"{each['tokens']} tokens in {each['samples']} samples of {names}",
                }
            )
    return rows
