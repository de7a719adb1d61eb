"""Where samples come from: files in several formats, folders and globs of them, and data sets on the Hub."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from genieblue.data.jsonl_files import JsonlFiles, check_is_jsonl
from genieblue.data.tables import (
    HUB,
    HUB_NAME,
    SAVED,
    SAVED_SPLITS,
    Table,
    check_hub_name,
    open_hub,
    open_parquet,
    open_saved,
)
from genieblue.data.tar_shards import MAGIC, MAGIC_AT, TarShards
from modeling_genieblue.addresses_genieblue import shown

PARQUET = b"PAR1"
ENDINGS = (".jsonl", ".parquet", ".tar")
EXPECTED = "expected JSONL, Parquet or WebDataset files (.tar), a folder or glob of them, or hf:OWNER/NAME"


class Source(Protocol):
    """Raw samples by number. `sha256` identifies their content, unless it is None."""

    sha256: str | None

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...

    def where(self, number: int) -> str:
        """A sample's name for messages."""
        ...

    def folder(self, number: int) -> Path | None:
        """The folder that a sample's image paths are relative to, if nothing else is said."""
        ...

    def outlines(self) -> Iterator[Callable[[], Any]] | None:
        """All samples in order, each as a function that makes it without reading images.

        None if a sample is made only when it is asked for.
        """
        ...


class Samples:
    """The samples of any sequence. Only a list or tuple is read before its samples are asked for."""

    def __init__(self, samples: Sequence[Any]):
        self._samples = samples
        self.sha256: str | None = getattr(samples, "_fingerprint", None)  # of a table that makes its samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> Any:
        return self._samples[number]

    def where(self, number: int) -> str:
        """The number of a sample."""
        return f"sample {number}"

    def folder(self, number: int) -> None:
        """None: samples in memory are nowhere."""

    def outlines(self) -> Iterator[Callable[[], Any]] | None:
        """All samples, unless they may be generated."""
        if not isinstance(self._samples, (list, tuple)):
            return None
        return (partial(self._samples.__getitem__, number) for number in range(len(self)))


@dataclass(frozen=True)
class Location:
    """Where samples are, found but not read yet.

    Attributes:
        text: as it was given.
        form: of the files: `saved` is a folder written by `datasets`, `hub` a data set on the Hub.
        paths: of the files, without duplicates; none on the Hub.
    """

    text: str
    form: Literal["jsonl", "parquet", "tar", "saved", "hub"]
    paths: tuple[Path, ...] = ()

    def open(self) -> Source:
        """Opens the data; `ValueError` or `OSError` if that fails."""
        opened = {"jsonl": JsonlFiles, "parquet": open_parquet, "tar": TarShards}
        if self.form in opened:
            return opened[self.form](self.paths)
        return open_saved(self.paths[0]) if self.form == "saved" else open_hub(self.text)


def exists(text: str) -> bool:
    """Whether a text is a path, a glob that matches something, or the name of a data set on the Hub."""
    is_hub = HUB_NAME.fullmatch(text) is not None
    return is_hub or os.path.exists(os.path.expanduser(text)) or bool(_matches(text))


def locate(text: str | os.PathLike) -> Location:
    """Finds the data that a text means, and its format; `FileNotFoundError` or `ValueError` if it is none."""
    text = os.fspath(text)
    if not text.strip():  # an unset variable of the shell, which must not mean the current folder
        raise ValueError(f"The name of the data is empty: {EXPECTED}.")
    path = Path(text).expanduser()
    if not path.exists() and text.startswith(HUB):
        check_hub_name(text)
        return Location(text, "hub")
    if path.is_dir() and any((path / name).is_file() for name in (SAVED, SAVED_SPLITS)):
        return Location(text, "saved", (path,))
    if path.is_dir():
        paths = sorted(each for each in path.iterdir() if each.suffix.lower() in ENDINGS and each.is_file())
        if not paths:
            raise ValueError(f"{path} was not saved by `datasets` and contains no data: {EXPECTED}.")
    else:
        paths = [path] if path.exists() else _matches(text)
    if not paths or not all(each.is_file() for each in paths):
        raise FileNotFoundError(f"{shown(text)} is not a file: {EXPECTED}.")
    forms = {each: _form(each) for each in paths}
    if len(set(forms.values())) > 1:
        found = ", ".join(sorted(set(forms.values())))
        raise ValueError(f"{shown(text)} means files of several formats ({found}): give those of one, as by a glob.")
    return Location(text, forms[paths[0]], tuple(paths))


def open_source(source: Any) -> Source:
    """The samples of a path, glob, Hub name, `datasets.Dataset` or sequence of dictionaries."""
    if isinstance(source, Location):
        return source.open()
    if isinstance(source, (str, os.PathLike)):
        return locate(source).open()
    if isinstance(source, dict) or not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        raise ValueError(
            f"The data has type {type(source).__name__}: expected a path or a sequence of dictionaries with a length; "
            "for a `DatasetDict`, give one split."
        )
    # With a transform, a `datasets.Dataset` generates its samples.
    is_table = getattr(source, "format", {}).get("type", "custom") != "custom"
    return Table(source) if is_table else Samples(source)


def _matches(text: str) -> list[Path]:
    return [Path(found) for found in sorted(glob.glob(os.path.expanduser(text), recursive=True))]


def _form(path: Path) -> Literal["jsonl", "parquet", "tar"]:
    """A file's format, by its content; `ValueError` if it is none of ours."""
    with path.open("rb") as file:
        head = file.read(MAGIC_AT + len(MAGIC))
    if head.startswith(PARQUET):
        return "parquet"
    if head[MAGIC_AT:] == MAGIC:
        return "tar"
    check_is_jsonl(path)
    return "jsonl"
