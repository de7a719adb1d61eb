"""The verdict of a bundle's metadata in sentences. Plain Python."""

from collections.abc import Mapping
from typing import Any

from hub_cards.verdicts import summary

SMALLEST_GROUPS = 4.25  # bits a weight of 4 bits in groups of 32
MIXED_STEPS = (5.0, 6.0, 7.0)  # bits a weight


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
    return [*lines, f"verdict: {summary(verdict)}"]


def what_loses_less(metadata: Mapping[str, Any]) -> str:
    """The next larger formats after those of a bundle that lost too much, in order."""
    llm, bits = metadata["llm"], metadata["bits_per_weight"]
    ways = []
    if llm == "w4a16" and bits < SMALLEST_GROUPS:
        ways.append("--group-size 32")
    if llm != "w8a16":
        ways += [f"--llm mixed --bits-per-weight {more:g}" for more in MIXED_STEPS if more > bits + 0.1]
        ways.append("--llm w8a16")
    if metadata["cache_bits"] == 8:
        ways.append("--cache-bits 16")
    if metadata["embeddings"]["dtype"] == "uint8":
        ways.append("--embedding-bits 16")
    return ", then with ".join(ways) or "calibration chats that are more like those it was measured on"


def _in_view(score: Mapping[str, Any]) -> str:
    """Earlier bundles have scores over both views."""
    return f" of the {score['view']} view" if "view" in score else ""
