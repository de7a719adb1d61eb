"""Mixtures: several sources with weights, a share of texts, and the order in which their samples are drawn."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from genieblue.data.chat_samples import ChatSample
from genieblue.data.chats import ChatDataset
from genieblue.data.sources import Location, exists, locate

NAME = re.compile(r"(?P<name>[\w.-]+)=(?P<rest>.+)", re.DOTALL)
NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf(inity)?)"
WEIGHT = re.compile(rf"(?P<rest>.+):(?P<weight>{NUMBER})", re.IGNORECASE | re.DOTALL)
LONGEST_EPOCH = 10**8  # samples, unless the data itself is larger
TEXT_SHARE = "The share of texts (`text_share`, --text-share)"


@dataclass(frozen=True)
class MixturePart:
    """A source in a mixture; the weight is relative to those of the other parts, and None if none has any."""

    name: str
    location: Location
    weight: Fraction | None


def read_parts(texts: Sequence[str]) -> list[MixturePart]:
    """The parts of a mixture from `[NAME=]SOURCE[:WEIGHT]`s; nothing is opened but the heads of files.

    A text that is an existing path is a path, whatever signs it contains. Raises `ValueError` or `OSError` for a part
    that is missing or not data, a weight that is not above 0 or that other parts lack, and a repeated name or
    file.
    """
    parts = [_read_part(text) for text in texts]
    if not parts:
        raise ValueError("There is no data: expected at least one file.")
    if len({part.weight is None for part in parts}) > 1:
        without = next(part.name for part in parts if part.weight is None)
        raise ValueError(f"{without!r} has no weight, but others have: give all a weight (FILE:WEIGHT), or none.")
    names: set[str] = set()
    owners: dict[Any, str] = {}
    for part in parts:
        if part.name in names:
            raise ValueError(
                f"{part.name!r} is given twice; give it once, with a higher weight, or under another name."
            )
        names.add(part.name)
        for content in [path.resolve() for path in part.location.paths] or [part.location.text]:
            if owner := owners.get(content):
                both = f"both in {owner!r} and in {part.name!r}" if owner != part.name else f"twice in {owner!r}"
                raise ValueError(f"{content} is {both}, so its samples would count twice; give it once.")
            owners[content] = part.name
    return parts


def open_mixture(texts: Sequence[str], *, text_share: float | None = None, **options: Any) -> ChatDataset:
    """The data of `[NAME=]SOURCE[:WEIGHT]`s: a `MixedChats`, or a plain `ChatDataset` if there is nothing to mix.

    `options` are those of `ChatDataset`. Raises as `read_parts` and `MixedChats`.
    """
    if text_share is not None and not 0 <= text_share <= 1:
        raise ValueError(f"{TEXT_SHARE} is {text_share}: expected a number from 0 to 1.")
    parts = read_parts(texts)
    opened = {part.name: ChatDataset(part.location, **options) for part in parts}
    if len(parts) == 1 and text_share is None:
        return opened[parts[0].name]
    return MixedChats(opened, {part.name: part.weight for part in parts}, text_share=text_share)


@dataclass(frozen=True)
class _Stream:
    """Samples of one part that are drawn in turn, `draws` times in an epoch."""

    part: str
    chats: ChatDataset
    draws: int


class MixedChats(ChatDataset):
    """Chats of several parts. The weight of a part is its share of the samples drawn, not of its own samples.

    Without weights, an epoch has every sample once. With weights or a share of texts, it is the shortest one in which
    the shares hold and every sample is drawn at least once: one part is drawn exactly once, the others repeat, evenly
    over their samples. Which sample has which index depends only on the data and the shares, and the parts alternate
    evenly, so that shuffling, sampling by several processes and resuming are exact as with a single file.
    """

    def __init__(
        self,
        parts: dict[str, ChatDataset],
        weights: dict[str, Fraction | None],
        *,
        text_share: float | None = None,
    ):
        """`text_share` of the samples drawn have no image; the weights then hold among these, and among the others.

        `ValueError` for an empty part, or if there are no samples of a kind that has a share.
        """
        self.skip_bad = next(iter(parts.values())).skip_bad
        self.num_skipped = sum(chats.num_skipped for chats in parts.values())
        self._parts, self._weights, self._text_share = parts, weights, text_share
        for name, chats in parts.items():
            if len(chats) == 0:
                bad = f": all of its {chats.num_skipped} samples are bad" if chats.num_skipped else ""
                raise ValueError(f"The part {name!r} is empty{bad}. Leave it out, or correct it.")
        shares = _shares(parts, weights) if text_share is None else _shares_by_kind(parts, weights, text_share)
        self._streams = [_Stream(*each) for each in _draws(shares)]
        self._order, self._turns = _interleaved([stream.draws for stream in self._streams])
        self._numbers = range(len(self._order))
        digest = [(name, chats.sha256, str(weights[name])) for name, chats in parts.items()]
        is_known = all(chats.sha256 is not None for chats in parts.values())
        self.sha256 = hashlib.sha256(json.dumps([digest, text_share]).encode()).hexdigest() if is_known else None

    @property
    def num_samples(self) -> int:
        """How many different samples there are."""
        return sum(len(stream.chats) for stream in self._streams)

    def shares(self) -> dict[str, float]:
        """The share of each part in the samples that are drawn."""
        draws = dict.fromkeys(self._parts, 0)
        for stream in self._streams:
            draws[stream.part] += stream.draws
        return {name: number / sum(draws.values()) for name, number in draws.items()}

    def with_images(self) -> ChatDataset:
        """The mixture without samples that have no image, with the same weights; `ValueError` if a part has none."""
        if self._text_share:
            raise ValueError(
                f"{TEXT_SHARE} is {self._text_share}, but only samples with images are of use here: leave it out, or "
                "train stage 2."
            )
        parts = {name: chats.with_images() for name, chats in self._parts.items()}
        for name, chats in parts.items():
            if len(chats) == 0:
                raise ValueError(
                    f"The part {name!r} has no sample with an image, and others are of no use here: leave it out."
                )
        return MixedChats(parts, self._weights)

    def sample_hashes(self) -> set[int]:
        """Hashes of the checked samples of all parts."""
        return set().union(*(chats.sample_hashes() for chats in self._parts.values()))

    def _at(self, number: int) -> ChatSample:
        chats, index = self._drawn(number)
        return chats[index]

    def _where(self, number: int) -> str:
        chats, index = self._drawn(number)
        return chats.where(index)

    def _drawn(self, number: int) -> tuple[ChatDataset, int]:
        chats = self._streams[self._order[number]].chats
        return chats, int(self._turns[number]) % len(chats)


def _read_part(text: str) -> MixturePart:
    """One part; where a text can be read in several ways, the first of which the source exists is meant."""
    whole = (None, text, None)
    weighted = (None, found["rest"], found["weight"]) if (found := WEIGHT.fullmatch(text)) else whole
    named, named_weighted = whole, weighted
    if found := NAME.fullmatch(text):
        named = named_weighted = (found["name"], found["rest"], None)
        if inner := WEIGHT.fullmatch(found["rest"]):
            named_weighted = (found["name"], inner["rest"], inner["weight"])
    ways = (whole, weighted, named, named_weighted)
    name, source, weight = next((way for way in ways if exists(way[1])), named_weighted)
    location = locate(source)
    if weight is None:
        return MixturePart(name or source, location, None)
    number = float(weight)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"The weight of {name or source!r} is {weight}: expected a number above 0.")
    return MixturePart(name or source, location, Fraction(weight))


def _shares(parts: dict[str, ChatDataset], weights: dict[str, Fraction | None]) -> list[tuple[str, Any, Fraction]]:
    """Each part with its share: by weight, otherwise by size."""
    own = {name: weights[name] or Fraction(len(chats)) for name, chats in parts.items()}
    total = sum(own.values())
    return [(name, chats, own[name] / total) for name, chats in parts.items()]


def _shares_by_kind(
    parts: dict[str, ChatDataset], weights: dict[str, Fraction | None], text_share: float
) -> list[tuple[str, Any, Fraction]]:
    """Each part's samples of each kind with their shares."""
    text = Fraction(str(text_share))
    pairs = {name: chats.by_kind() for name, chats in parts.items()}
    found = []
    for index, (share, lack) in enumerate([(1 - text, "no sample has an image"), (text, "every sample has an image")]):
        kind = {name: pair[index] for name, pair in pairs.items() if len(pair[index])}
        if share and not kind:
            raise ValueError(f"{TEXT_SHARE} is {text_share}, but {lack}.")
        if share:
            found += [(part, chats, share * own) for part, chats, own in _shares(kind, weights)]
    return found


def _draws(shares: list[tuple[str, Any, Fraction]]) -> list[tuple[str, Any, int]]:
    """How often each part is drawn in the shortest epoch that has every sample; `ValueError` if that is too long."""
    sizes = [len(chats) for _, chats, _ in shares]
    epoch = max(math.ceil(size / share) for size, (_, _, share) in zip(sizes, shares, strict=True))
    if epoch > max(LONGEST_EPOCH, sum(sizes)):
        part, chats, share = min(shares, key=lambda each: each[2] / len(each[1]))
        raise ValueError(
            f"An epoch would have {epoch:,} samples until all {len(chats):,} of {part!r} are drawn, which have a "
            f"share of {float(share):.2g}; expected at most {LONGEST_EPOCH:,}. Give it a higher weight."
        )
    exact = [epoch * share for _, _, share in shares]
    draws = [math.floor(number) for number in exact]
    by_rest = sorted(range(len(shares)), key=lambda index: draws[index] - exact[index])
    for index in by_rest[: epoch - sum(draws)]:  # largest remainders
        draws[index] += 1
    return [(part, chats, number) for (part, chats, _), number in zip(shares, draws, strict=True)]


def _interleaved(draws: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Evenly alternating: for each index the stream (epoch,), and how often it was drawn before (epoch,)."""
    positions = np.concatenate([(np.arange(number) + 0.5) / number for number in draws])
    order = np.argsort(positions, kind="stable")
    streams = np.repeat(np.arange(len(draws), dtype=np.uint16), draws)[order]
    turns = np.concatenate([np.arange(number, dtype=np.uint32) for number in draws])[order]
    return streams, turns
