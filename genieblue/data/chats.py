"""Training data: chats with images from any source, read when they are asked for and checked before use."""

import hashlib
import json
import logging
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from tqdm.auto import tqdm

from genieblue.data.chat_samples import BAD_SAMPLE, ChatSample, parse_chat, written_alike
from genieblue.data.image_folders import ImageFolders, check_exists
from genieblue.data.jsonl_files import SECONDS_WITHOUT_BAR
from genieblue.data.sources import Location, open_source

logger = logging.getLogger(__name__)

CHECKED_WHEN_OPENED = 1_000_000  # samples; larger data is checked sample by sample on use
CORRECT_OR_SKIP = "Correct it, or skip bad samples with `skip_bad` (--skip-bad)."


class ChatDataset(torch.utils.data.Dataset):
    """Chats from files, a `datasets.Dataset` or any sequence of dictionaries; items are `ChatSample`s.

    The source is the path of a JSONL, Parquet or WebDataset file (`.tar`), a folder or glob of these, a folder that
    `datasets` saved, a data set on the Hub (`hf:you/set[train]`), or samples in memory.

    Two formats are read. In `{"messages": [{"role", "content"}], "images": [...]}`, the content is either a string,
    where `<image>` in a user's turn stands for the next of `images`, or a list of parts, where an image part may have
    its own image (`image` or `path`) and text is always literal. The other is LLaVA's
    `{"image": ..., "conversations": [{"from", "value"}]}`.

    Up to `CHECKED_WHEN_OPENED` samples are checked completely when they are opened, except images that are in a table
    or tar file. More, and sequences that may generate their samples, are checked sample by sample on use. With
    `skip_bad`, a bad sample is skipped and logged; otherwise it is a `ValueError` with file and line. `skip_bad=None`
    is the same, but the message does not suggest skipping, for data that must be complete.

    `sha256` identifies the data: the hash of all lines, of the headers of tar files, or of a list's texts and paths,
    and the fingerprint of a `datasets.Dataset`; for other sequences it is `None`.
    """

    def __init__(
        self,
        source: str | os.PathLike | Location | Sequence[dict[str, Any]],
        *,
        image_folder: str | os.PathLike | None = None,
        image_roots: Mapping[str, Path] | None = None,
        follow_links: bool = False,
        skip_bad: bool | None = False,
        check: bool = True,
    ):
        """Opens `source`.

        Args:
            image_folder: what image paths are relative to, by default the folder of the sample's file.
            image_roots, follow_links: see `ImageFolders`.
            check: False leaves all checks to the time of use.
        """
        self.skip_bad = skip_bad
        self.num_skipped = 0
        folder = None if image_folder is None else Path(image_folder)
        self._roots = ImageFolders(folder, image_roots or {}, follow_links)
        self._folders: dict[Path | None, ImageFolders] = {}
        self._image_counts: array | None = None  # per sample, after all are checked
        self._hashes, self._prompts = array("Q"), array("Q")  # per sample that was checked, 0 if there is none
        self._source = open_source(source)
        self.sha256 = self._source.sha256
        self._numbers: Any = range(len(self._source))
        if check and len(self._source) <= CHECKED_WHEN_OPENED:
            self._check()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> ChatSample:
        return self._at(self._numbers[index])

    def where(self, index: int) -> str:
        """A sample's name for messages: `file:line`, or its number."""
        return self._where(self._numbers[index])

    @property
    def num_samples(self) -> int:
        """How many different samples there are."""
        return len(self)

    def shares(self) -> dict[str, float]:
        """The shares of the groups in the samples that are drawn; none without groups."""
        return {}

    def with_images(self) -> Self:
        """This data without samples that have no image; `self` if it is unknown which those are."""
        chosen = self._of_kind(with_images=True)
        if len(chosen) < len(self):
            logger.info("Skipping %d of %d samples without an image.", len(self) - len(chosen), len(self))
        return chosen

    def by_kind(self) -> tuple[Self, Self]:
        """The samples with images, and those without; `ValueError` if it is unknown which they are."""
        found = self._of_kind(with_images=True), self._of_kind(with_images=False)
        if self._image_counts is None:
            raise ValueError(
                "Which of these samples have images is unknown, as they are made on use: give a list or files, or "
                "leave out `text_share` (--text-share)."
            )
        return found

    def sample_hashes(self) -> set[int]:
        """Hashes of the samples that were checked, to find the same ones in other data.

        They are of the texts, however they are written, and image paths; samples whose images are in memory are left
        out.
        """
        return {self._hashes[number] for number in self._numbers if number < len(self._hashes)} - {0}

    def prompt_hashes(self) -> Iterator[tuple[int, int]]:
        """Of the samples that were checked, the index and a hash of all texts but the last answer."""
        for index, number in enumerate(self._numbers):
            if number < len(self._prompts):
                yield index, self._prompts[number]

    def first(self, count: int | None) -> Self:
        """The first `count` samples; `self` for `None`."""
        return self if count is None else self._subset(self._numbers[:count])

    def _of_kind(self, *, with_images: bool) -> Self:
        if self._image_counts is None:
            numbers = self._numbers
            self._check()  # of data that was too large to check it when it was opened
            good = set(self._numbers) if self.num_skipped else None
            self._numbers = numbers if good is None else array("q", (each for each in numbers if each in good))
        counts = self._image_counts
        if counts is None:
            return self
        return self._subset(array("q", (each for each in self._numbers if bool(counts[each]) == with_images)))

    def _subset(self, numbers: Any) -> Self:
        subset = object.__new__(type(self))
        subset.__dict__.update(self.__dict__)
        subset._numbers = numbers
        return subset

    def _at(self, number: int) -> ChatSample:
        return self._sample(self._source[number], self._where(number), self._image_folders(number))

    def _where(self, number: int) -> str:
        return self._source.where(number)

    def _image_folders(self, number: int) -> ImageFolders:
        """The image folders of a sample, which depend on its file only."""
        folder = self._roots.folder or self._source.folder(number)
        if folder not in self._folders:
            self._folders[folder] = ImageFolders(folder, self._roots.roots, self._roots.follow_links)
        return self._folders[folder]

    def _sample(self, raw: Any, where: str, image_folders: ImageFolders) -> ChatSample:
        return parse_chat(raw, where, image_folders)

    def _check(self) -> None:
        """Checks every sample once and keeps the numbers of the good ones, if the source allows it."""
        outlines = self._source.outlines()
        if outlines is None:
            return
        good, digest = array("q"), hashlib.sha256()
        self._image_counts, self._hashes, self._prompts = array("I"), array("Q"), array("Q")
        bar = tqdm(outlines, "Checking the data", len(self._source), delay=SECONDS_WITHOUT_BAR)
        for number, outline in enumerate(bar):
            where = self._where(number)
            try:
                sample = self._sample(outline(), where, self._image_folders(number))
                for image in sample.images:
                    check_exists(image)
            except BAD_SAMPLE as error:
                message = f"{where}: {without_prefix(error, where)}"
                if not self.skip_bad:
                    offered = " Correct it." if self.skip_bad is None else f" {CORRECT_OR_SKIP}"
                    raise ValueError(f"{message}{offered}") from error
                logger.warning("Left out %s", message)
                self._image_counts.append(0)
                self._hashes.append(0)
                self._prompts.append(0)
            else:
                good.append(number)
                paths = [os.fspath(image) for image in sample.images if isinstance(image, (str, os.PathLike))]
                digest.update(json.dumps([sample.messages, paths]).encode())
                texts = written_alike(sample.messages)
                self._hashes.append(short_hash([texts, paths]) if len(paths) == len(sample.images) else 0)
                self._prompts.append(short_hash(texts[:-1]))
                self._image_counts.append(len(sample.images))
        self._numbers = good
        self.sha256 = self.sha256 or digest.hexdigest()
        self.num_skipped = len(self._image_counts) - len(good)
        if self.num_skipped:
            logger.warning("Skipping %d of %d samples, which are bad.", self.num_skipped, len(self._image_counts))


def short_hash(value: Any) -> int:
    """64 bits, not all 0, of the hash of what JSON can write."""
    return int.from_bytes(hashlib.sha256(json.dumps(value).encode()).digest()[:8]) or 1


def without_prefix(error: Exception, where: str) -> str:
    """A message about a sample without the sample's name."""
    return str(error).removeprefix(where).removeprefix(": ").removeprefix(", ")
