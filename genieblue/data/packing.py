"""Packing: several samples in one row of at most `max_length` tokens, which the model keeps apart."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from genieblue.data.collation import EncodedChats, joined, plain_worker_errors
from genieblue.data.jsonl_files import SECONDS_WITHOUT_BAR

WINDOW = 1024  # rows that are packed together: more leave less room, fewer mix long and short ones better


class PackedChats(torch.utils.data.Dataset):
    """The samples of an `EncodedChats` in packs; an item is a list of one row, see `joined`.

    The packs depend only on the data, the collator and the seed, so a resumed run sees the same ones. A sample that
    turns out to be bad when its pixels are read is left out of its pack, with `skip_bad`.

    Attributes: `lengths`, the tokens of each row of each sample (no rows: a bad one).
    """

    def __init__(self, chats: EncodedChats, *, shuffle: bool = True, seed: int = 0, num_workers: int = 0):
        """Measures all samples; without `shuffle`, only neighbours in the data share a pack."""
        self.chats = chats
        self.lengths = row_lengths(chats, num_workers)
        rows = [(index, number) for index, lengths in enumerate(self.lengths) for number in range(len(lengths))]
        if not rows:
            raise ValueError(f"All {len(chats)} samples are bad; see the log for the reasons.")
        if shuffle:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
            rows = [rows[place] for place in order.tolist()]
        self._packs: list[list[tuple[int, int]]] = []
        for start in range(0, len(rows), WINDOW):
            window = rows[start : start + WINDOW]
            packs = best_fit([self.lengths[index][number] for index, number in window], chats.collator.max_length)
            self._packs += [[window[place] for place in pack] for pack in packs]

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        for step in range(len(self)):
            if rows := self._rows((index + step) % len(self)):
                return [joined(rows)]
        raise ValueError(f"All {len(self.chats)} samples are bad; see the log for the reasons.")

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, without padding."""
        return sum(map(sum, self.lengths))

    def _rows(self, index: int) -> list[dict[str, Any]]:
        pack = self._packs[index]
        encoded = {sample: self.chats.rows(sample) or [] for sample in dict.fromkeys(sample for sample, _ in pack)}
        return [row for sample, number in pack for row in encoded[sample][number : number + 1]]


def row_lengths(chats: EncodedChats, num_workers: int = 0) -> list[list[int]]:
    """Tokens of each row of each sample, image tokens included, without reading pixels; none for a bad sample."""
    loader = torch.utils.data.DataLoader(
        _Lengths(chats), batch_size=None, collate_fn=list, num_workers=num_workers, generator=torch.Generator()
    )
    with plain_worker_errors():
        return list(tqdm(loader, desc="Measuring the data", total=len(chats), delay=SECONDS_WITHOUT_BAR))


class _Lengths(torch.utils.data.Dataset):
    def __init__(self, chats: EncodedChats):
        self._chats = chats

    def __len__(self) -> int:
        return len(self._chats)

    def __getitem__(self, index: int) -> list[int]:
        return [len(row.input_ids) for row in self._chats.outlines(index) or ()]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places in `lengths` by pack, each at most `capacity` long in all: best-fit decreasing.

    Packs, and the places in each, are in the order of the data.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens and number of each pack, sorted
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fitting = bisect_left(room, (lengths[place], 0))
        free, pack = room.pop(fitting) if fitting < len(room) else (capacity, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(place)
        insort(room, (free - lengths[place], pack))
    return sorted(sorted(pack) for pack in packs)
