"""Spends a budget where it saves most damage: which matrices get more bits, for a CPU as for a phone's NPU."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def spend(ladders: Mapping[Key, Sequence[tuple[float, float]]], budget: float) -> dict[Key, int]:
    """The place reached on each ladder: the steps that save most damage for their cost are taken first.

    Args:
        ladders: by matrix, `(cost, damage)` of each way to store it, the cheapest first.
        budget: for all costs together. A step that no longer fits is left out, and cheaper ones may still follow.

    Ties go to the matrix that comes first. Raises `ValueError` if not even the cheapest ways fit.
    """
    left = budget - sum(ladder[0][0] for ladder in ladders.values())
    if left < -1e-6 * abs(budget):  # not an error of the sum
        raise ValueError(f"The cheapest formats take {budget - left:g}, more than the budget of {budget:g}.")
    places = dict.fromkeys(ladders, 0)
    steps = [step for key, ladder in ladders.items() for step in _steps(key, ladder)]
    for _, key, start, end in sorted(steps, key=lambda step: -step[0]):
        cost = ladders[key][end][0] - ladders[key][start][0]
        if places[key] == start and cost <= left:
            places[key], left = end, left - cost
    return places


def _steps(key: Key, ladder: Sequence[tuple[float, float]]) -> list[tuple[float, Key, int, int]]:
    """`(damage saved per cost, key, from, to)` of the ladder's steps: each saves less for its cost than the last.

    Places between them that save less for their cost than a longer step would are passed over.
    """
    steps, start = [], 0
    while start < len(ladder) - 1:
        cost, damage = ladder[start]
        saved = {end: (damage - ladder[end][1]) / (ladder[end][0] - cost) for end in range(start + 1, len(ladder))}
        end = max(saved, key=lambda place: saved[place])
        if saved[end] <= 0:
            break
        steps.append((saved[end], key, start, end))
        start = end
    return steps
