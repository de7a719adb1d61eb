"""Plans an extraction: which blocks of a VLM's language model are copied, and with which rank all others are kept."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conversion.low_rank import Spectrum, check_rank_choice, choose_ranks
from modeling_genieblue.configuration_genieblue import select_replicated_layers

PLACEMENTS = ("skip", "pre", "post", "auto")
DEFAULT_RANK = 64
POINTS_OF_CURVE = 12


@dataclass(frozen=True)
class BlockChange:
    """A block of a VLM beside the base's: a copy's size in bytes, and the spectra of its linear layers' changes."""

    index: int
    bytes: int
    spectra: Mapping[str, Spectrum]

    def loss(self, rank: int) -> float:
        """Sum of the squared relative errors of its matrices at this rank."""
        return sum(float(each.errors()[min(rank, each.full_rank)]) ** 2 for each in self.spectra.values())


@dataclass(frozen=True)
class Plan:
    """What is kept of a language model.

    Attributes:
        copied: indices of the blocks that are copied.
        ranks: of the linear layers of all other blocks, by name in the base.
        bytes: of copies and LoRA.
        error: root of the mean squared relative error of all linear layers.
    """

    copied: list[int]
    ranks: dict[str, int]
    bytes: int
    error: float


@dataclass(frozen=True)
class Choice:
    """What a user asks for; `ValueError` for settings that contradict each other or are out of range.

    Attributes:
        placement: `skip`, `pre`, `post` or `auto`.
        copies: number of copied blocks; by default a quarter and, with `auto`, what `error` or `max_bytes` make best.
        rank, error, max_bytes: LoRA of a fixed rank (by default 64), of the least rank with this relative error of
            each matrix, or of what this many bytes pay for: a plan spends them on copies and LoRA alone, an extraction
            first on what it stores whole (rows, norms, biases).
    """

    placement: str = "skip"
    copies: int | None = None
    rank: int | None = None
    error: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ValueError(f"Unknown placement {self.placement!r}: choose one of {', '.join(PLACEMENTS)}.")
        check_rank_choice(self.rank, self.error, self.max_bytes)
        if self.copies is not None and self.copies < 0:
            raise ValueError(f"`copies` is {self.copies}: expected a number of blocks.")


def place_copies(placement: str, copies: int, num_blocks: int) -> list[int]:
    """Indices of copied blocks: the first (`pre`), the last (`post`), or evenly spread (`skip`)."""
    if copies > num_blocks:
        raise ValueError(f"`copies` is {copies}, but the base has {num_blocks} blocks.")
    if placement == "pre":
        return list(range(copies))
    if placement == "post":
        return list(range(num_blocks - copies, num_blocks))
    return [(number + 1) * num_blocks // copies - 1 for number in range(copies)]


def plan_extraction(blocks: Sequence[BlockChange], choice: Choice, bytes_per_number: int = 2) -> Plan:
    """The plan for a choice; with `auto`, the best of those that it leaves open.

    Raises `ValueError` for more copies than blocks, and for a budget that does not pay for rank 1.
    """
    quarter = len(blocks) // 4
    if choice.placement != "auto":
        if choice.copies is None:  # as everywhere else
            copied = select_replicated_layers(len(blocks), choice.placement) if quarter else []
        else:
            copied = place_copies(choice.placement, choice.copies, len(blocks))
        return _plan(blocks, copied, choice, bytes_per_number)
    if choice.copies is not None and choice.copies > len(blocks):
        raise ValueError(f"`copies` is {choice.copies}, but the base has {len(blocks)} blocks.")

    def gain(block: BlockChange) -> float:
        """What a copy of the block saves: bytes if the error is given, otherwise error."""
        if choice.error is not None:
            return _bytes_at(block, choice.error, bytes_per_number) - block.bytes
        return block.loss(1 if choice.max_bytes is not None else choice.rank or DEFAULT_RANK)

    by_gain = [block.index for block in sorted(blocks, key=gain, reverse=True)]
    if choice.copies is not None:
        return _plan(blocks, by_gain[: choice.copies], choice, bytes_per_number)
    if choice.error is not None:
        dear = [block.index for block in blocks if _bytes_at(block, choice.error, bytes_per_number) >= block.bytes]
        return _plan(blocks, dear, choice, bytes_per_number)
    if choice.max_bytes is None:
        return _plan(blocks, by_gain[:quarter], choice, bytes_per_number)
    plans = []
    for copies in range(len(blocks) + 1):
        try:
            plans.append(_plan(blocks, by_gain[:copies], choice, bytes_per_number))
        except ValueError:  # too dear
            if not plans:
                raise
    return min(plans, key=lambda plan: (plan.error, plan.bytes))


def _bytes_at(block: BlockChange, error: float, bytes_per_number: int) -> int:
    return sum(each.numbers(each.rank_for(error)) * bytes_per_number for each in block.spectra.values())


def _plan(blocks: Sequence[BlockChange], copied: Sequence[int], choice: Choice, bytes_per_number: int) -> Plan:
    spectra = {name: each for block in blocks if block.index not in copied for name, each in block.spectra.items()}
    of_copies = sum(block.bytes for block in blocks if block.index in copied)
    budget = None if choice.max_bytes is None else choice.max_bytes - of_copies
    if budget is not None and budget < 0:
        raise ValueError(f"A budget of {choice.max_bytes:,} bytes does not pay for {len(copied)} copied blocks.")
    rank = choice.rank if choice.error is not None or budget is not None else choice.rank or DEFAULT_RANK
    ranks = choose_ranks(
        spectra, rank=rank, error=choice.error, max_bytes=budget, bytes_per_number=bytes_per_number
    ) if spectra else {}  # fmt: skip
    of_lora = sum(spectra[name].numbers(kept) * bytes_per_number for name, kept in ranks.items())
    lost = sum(float(spectra[name].errors()[kept]) ** 2 for name, kept in ranks.items())
    count = sum(len(block.spectra) for block in blocks)
    return Plan(sorted(copied), ranks, of_copies + of_lora, math.sqrt(lost / max(count, 1)))


def trade_off(blocks: Sequence[BlockChange], choice: Choice, bytes_per_number: int = 2) -> list[Plan]:
    """The best plans at a dozen budgets, from the least to copies of all blocks, with this placement and copies."""
    full = sum(block.bytes for block in blocks)
    plans = []
    for step in range(1, POINTS_OF_CURVE + 1):
        budget = Choice(choice.placement, choice.copies, max_bytes=full * step // POINTS_OF_CURVE)
        try:
            plans.append(plan_extraction(blocks, budget, bytes_per_number))
        except ValueError:  # too little for rank 1 beside the copies
            continue
    return plans
