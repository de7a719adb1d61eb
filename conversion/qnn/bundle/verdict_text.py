"""The verdict of a bundle's metadata in sentences. Plain Python."""

from collections.abc import Mapping
from typing import Any

from hub_cards.verdicts import summary


def describe(verdict: Mapping[str, Any]) -> list[str]:
    """The verdict in sentences, for README, terminal and checks."""
    lines = []
    for view, found in verdict["logits"].items():
        ratio = "" if found["perplexity_ratio"] is None else f"{found['perplexity_ratio']:.3f} times the perplexity, "
        lines.append(
            f"{view} view, logits of {found['tokens']} tokens in {found['requests']} held-out requests: cosine "
            f"{found['cosine']:.4f}, largest error {found['largest_error']:.1%} of their range, {ratio}the model's "
            f"most likely token for {found['same_token']:.1%}"
        )
    lines += [
        f"answers{_in_view(score)}, {score['task']}: {score['first']:.1%} by the model, {score['second']:.1%} by the "
        f"bundle, of {score['count']}"
        for score in verdict["answers"] or []
    ]
    if verdict["answers"] is None:
        lines.append("answers were not measured")
    return [*lines, f"verdict: {summary(verdict)}"]


def _in_view(score: Mapping[str, Any]) -> str:
    """Earlier bundles have scores over both views."""
    return f" of the {score['view']} view" if "view" in score else ""
