"""The report on data before a run: counts, lengths, tiles, bad samples, duplicates; every image is opened."""

import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from conversion.chat_ids import chat_rows
from genieblue.data.chat_samples import BAD_SAMPLE, ChatSample, texts_of
from genieblue.data.chats import ChatDataset, without_prefix
from genieblue.data.image_folders import check_exists
from genieblue.data.jsonl_files import SECONDS_WITHOUT_BAR
from modeling_genieblue.image_reading_genieblue import read_image

EXAMPLES = 10  # of bad samples and of duplicates
BATCH = 256  # samples whose images are opened before the next ones are asked for
THREADS = 8
DETAILS = re.compile(r"'[^']*'|\"[^\"]*\"|\S*/\S*|\d[\d.,]*")  # in a reason, what differs between samples


@dataclass
class GroupCounts:
    """Numbers of samples in a group; bad ones are in no other number than `bad`."""

    with_images: int = 0
    text_only: int = 0
    images: int = 0
    bad: int = 0


@dataclass
class DataReport:
    """What was found in data.

    Attributes:
        groups: counts by name.
        unit: of the lengths: tokens, images included, if there was a processor, otherwise characters.
        lengths: of the good samples. tiles: of their images, if there was a processor.
        bad: the first bad samples, with reasons; `reasons` counts all, without what differs between samples.
        unreadable: samples with an image that is missing or cannot be opened.
        duplicates: the first samples that are equal to an earlier one in texts and images, with that one.
    """

    unit: str
    groups: dict[str, GroupCounts] = field(default_factory=dict)
    lengths: array = field(default_factory=lambda: array("L"))
    tiles: array = field(default_factory=lambda: array("L"))
    bad: list[tuple[str, str]] = field(default_factory=list)
    reasons: Counter = field(default_factory=Counter)
    unreadable: int = 0
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    num_duplicates: int = 0

    @property
    def num_bad(self) -> int:
        """Bad samples of all groups."""
        return sum(self.reasons.values())

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: lengths and tiles are summarized."""
        return {
            "groups": {name: asdict(counts) for name, counts in self.groups.items()},
            self.unit: summary(self.lengths),
            "tiles_per_image": summary(self.tiles),
            "bad": {"count": self.num_bad, "reasons": dict(self.reasons.most_common()), "first": self.bad},
            "unreadable_images": self.unreadable,
            "duplicates": {"count": self.num_duplicates, "first": self.duplicates},
        }


@dataclass(frozen=True)
class _Looked:
    """A sample whose images were opened: their sizes, and the hash of texts and images; or what is wrong with it."""

    where: str
    sample: ChatSample | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    key: bytes = b""
    error: Exception | None = None
    is_unreadable: bool = False


def check_data(
    groups: Mapping[str, ChatDataset], processor: Any = None, *, stop_ids: Sequence[int] = ()
) -> DataReport:
    """Looks at every sample and opens every image, in several threads.

    Args:
        groups: data that was opened with `check=False`, by name.
        processor: of the model that is to be trained, to count tokens and tiles.
        stop_ids: the tokens that stop the model's generation.
    """
    report = DataReport("characters" if processor is None else "tokens")
    seen: dict[bytes, str] = {}
    total = sum(len(chats) for chats in groups.values())
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(desc="Checking the data", total=total, delay=SECONDS_WITHOUT_BAR) as bar,
    ):
        for name, chats in groups.items():
            counts = report.groups[name] = GroupCounts()
            for looked in _looked_at(chats, pool):
                _count(report, counts, looked, seen, processor, stop_ids)
                bar.update()
    return report


def _looked_at(chats: ChatDataset, pool: ThreadPoolExecutor) -> Iterator[_Looked]:
    for start in range(0, len(chats), BATCH):
        yield from pool.map(partial(_look, chats), range(start, min(start + BATCH, len(chats))))


def _look(chats: ChatDataset, number: int) -> _Looked:
    where = chats.where(number)
    try:
        sample = chats[number]
    except BAD_SAMPLE as error:
        return _Looked(where, error=error)
    try:
        for image in sample.images:
            check_exists(image)
        images = [read_image(image) for image in sample.images]
    except BAD_SAMPLE as error:
        return _Looked(where, error=error, is_unreadable=True)
    digest = hashlib.sha256(json.dumps(sample.messages).encode())
    for given, image in zip(sample.images, images, strict=True):
        digest.update(os.fsencode(given) if isinstance(given, (str, os.PathLike)) else image.tobytes())
    return _Looked(where, sample, tuple(image.size for image in images), digest.digest()[:16])


def _count(
    report: DataReport, counts: GroupCounts, looked: _Looked, seen: dict[bytes, str], processor: Any,
    stop_ids: Sequence[int],
) -> None:  # fmt: skip
    error, length, tiles = looked.error, 0, []
    if looked.sample is not None:
        try:
            length, tiles = _measured(looked.sample, looked.sizes, processor, stop_ids)
        except BAD_SAMPLE as found:
            error = found
    if error is not None or looked.sample is None:
        reason = without_prefix(error, looked.where) if error is not None else ""
        counts.bad += 1
        report.unreadable += looked.is_unreadable
        report.reasons[" ".join(DETAILS.sub("…", reason).split())] += 1
        if len(report.bad) < EXAMPLES:
            report.bad.append((looked.where, reason))
        return
    counts.images += len(looked.sizes)
    counts.with_images += bool(looked.sizes)
    counts.text_only += not looked.sizes
    report.lengths.append(length)
    report.tiles.extend(tiles)
    if (first := seen.setdefault(looked.key, looked.where)) != looked.where:
        report.num_duplicates += 1
        if len(report.duplicates) < EXAMPLES:
            report.duplicates.append((looked.where, first))


def _measured(
    sample: ChatSample, sizes: Sequence[tuple[int, int]], processor: Any, stop_ids: Sequence[int]
) -> tuple[int, list[int]]:
    """The length of a sample's longest training row, and the tiles of each image."""
    if processor is None:
        return sum(map(len, texts_of(sample.messages))), []
    tiles = [processor.image_processor.count_tiles(*size) for size in sizes]
    rows = chat_rows(processor, sample.messages, tiles, stop_ids)
    return max(len(row.input_ids) for row in rows), tiles


def summary(values: Sequence[int]) -> dict[str, float] | None:
    """Mean, extremes and percentiles; None if there are no values."""
    if not values:
        return None
    found = np.asarray(values)
    percentiles = {f"p{percent}": float(np.percentile(found, percent)) for percent in (50, 90, 99)}
    return {"min": int(found.min()), **percentiles, "max": int(found.max()), "mean": float(found.mean())}


def draw_histograms(report: DataReport, path: Path) -> None:
    """Writes a PNG: how long the samples are, and how many tiles their images have."""
    from matplotlib.figure import Figure

    panels = {f"{report.unit} of a sample": report.lengths, "tiles of an image": report.tiles}
    panels = {title: values for title, values in panels.items() if values}
    figure = Figure(figsize=(8, 3 * max(1, len(panels))), layout="constrained")
    axes: Any = figure.subplots(max(1, len(panels)), 1, squeeze=False)
    for axis, (title, values) in zip(axes[:, 0], panels.items(), strict=False):
        is_count = values is report.tiles
        axis.hist(values, bins=np.arange(0.5, max(values) + 1.5) if is_count else 60)
        axis.set_xlabel(title)
        axis.set_ylabel("images" if is_count else "samples")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110, format="png")
