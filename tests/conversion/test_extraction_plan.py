"""Which blocks an extraction copies, and the ranks of all others."""

import pytest
import torch

from conversion.extraction_plan import BlockChange, Choice, place_copies, plan_extraction, trade_off
from conversion.low_rank import Spectrum
from modeling_genieblue.configuration_genieblue import select_replicated_layers

WIDTH = 16


def blocks(*sizes: float) -> list[BlockChange]:
    """Blocks of one square matrix each, whose changes have these sizes and fall with the rank."""
    values = torch.logspace(0, -2, WIDTH)
    return [
        BlockChange(
            index, WIDTH * WIDTH * 2, {f"layers.{index}.linear": Spectrum((WIDTH, WIDTH), values * size, 10.0)}
        )
        for index, size in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("placement", "copies", "expected"),
    [
        ("skip", 2, [3, 7]),
        ("skip", 3, [1, 4, 7]),
        ("pre", 3, [0, 1, 2]),
        ("post", 1, [7]),
        ("skip", 8, list(range(8))),
        ("skip", 0, []),
    ],
)
def test_copies_are_placed_as_asked(placement, copies, expected):
    assert place_copies(placement, copies, 8) == expected


def test_auto_copies_the_blocks_that_lose_most():
    plan = plan_extraction(blocks(1, 5, 1, 4), Choice("auto", copies=2, rank=2))
    assert plan.copied == [1, 3]


@pytest.mark.parametrize(("num_blocks", "placement"), [(30, "skip"), (18, "skip"), (30, "pre"), (9, "post")])
def test_the_quarter_is_that_of_every_genieblue(num_blocks, placement):
    plan = plan_extraction(blocks(*[1] * num_blocks), Choice(placement))
    assert plan.copied == select_replicated_layers(num_blocks, placement)


def test_auto_weighs_blocks_at_the_rank_that_the_others_get():
    shapes = {0: torch.logspace(0, -9, 100), 1: torch.linspace(1, 0.9, 100) * 0.3}  # which is cut more depends on it
    uneven = [
        BlockChange(index, 20_000, {f"layers.{index}.linear": Spectrum((100, 100), values, 10.0)})
        for index, values in {**shapes, 2: shapes[0] * 0.1, 3: shapes[0] * 0.1}.items()
    ]
    assert plan_extraction(uneven, Choice("auto")) == plan_extraction(uneven, Choice("auto", rank=64))
    assert plan_extraction(uneven, Choice("auto")).copied == [1]


def test_auto_with_an_error_copies_the_blocks_whose_lora_would_be_dearest():
    plan = plan_extraction(blocks(1, 5, 1, 4), Choice("auto", copies=1, error=0.05))
    assert plan.copied == [1]


@pytest.mark.parametrize("budget", [500, 900, 1400, 2048])
def test_a_budget_is_kept_and_more_of_it_lowers_the_error(budget):
    less, more = (plan_extraction(blocks(1, 5, 1, 4), Choice("auto", max_bytes=size)) for size in (400, budget))
    assert more.bytes <= budget
    assert more.error <= less.error


def test_a_budget_for_everything_copies_everything_exactly():
    plan = plan_extraction(blocks(1, 5, 1, 4), Choice("auto", max_bytes=4 * WIDTH * WIDTH * 2))
    assert (plan.copied, plan.error) == ([0, 1, 2, 3], 0)


def test_with_an_error_auto_copies_blocks_whose_lora_would_be_dearer():
    plan = plan_extraction(blocks(0.1, 50), Choice("auto", error=0.01))
    assert plan.copied == [1]


def test_the_trade_off_falls_with_bytes():
    curve = trade_off(blocks(1, 5, 1, 4), Choice("auto"))
    errors = [plan.error for plan in curve]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placement": "middle"}, "choose one of"),
        ({"rank": 4, "error": 0.1}, "give only one of them"),
        ({"error": 2.0}, "between 0 and 1"),
        ({"rank": 0}, "expected at least 1"),
        ({"copies": -1}, "expected a number of blocks"),
        ({"max_bytes": 0}, "expected a positive number"),
    ],
)
def test_choices_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Choice(**settings)


def test_a_budget_below_rank_one_is_refused():
    with pytest.raises(ValueError, match="does not pay for rank 1"):
        plan_extraction(blocks(1, 1), Choice("auto", max_bytes=10))
