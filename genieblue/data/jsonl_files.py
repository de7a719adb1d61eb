"""JSONL files: an index of their lines, parsing, and detecting files in other formats."""

import codecs
import hashlib
import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

HEAD = 1 << 16  # bytes that are read to detect a file's format
FORMS = {
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"BZh": "compressed with bzip2; unpack it",
    b"\xfd7zXZ": "compressed with xz; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it",
    b"ARROW1": "an Arrow file; read it with `datasets`, and give the folder of its `save_to_disk`",
    codecs.BOM_UTF16_LE: "UTF-16 or UTF-32; write it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16 or UTF-32; write it as UTF-8",
}
SECONDS_WITHOUT_BAR = 2


class JsonlFiles:
    """The samples of JSONL files, one after the other; lines are read when they are asked for.

    `sha256` is the hash of all lines that are not empty.
    """

    def __init__(self, paths: Sequence[Path]):
        """Finds the lines, without parsing them; `ValueError` for a file in another format."""
        self._paths = tuple(paths)
        self._folders = [Path(os.path.realpath(path.parent)) for path in paths]
        self._starts: list[int] = []  # number of each file's first sample
        self._offsets, self._lines = array("q"), array("q")
        digest = hashlib.sha256()
        size = sum(path.stat().st_size for path in paths)
        with tqdm(desc="Reading the data", delay=SECONDS_WITHOUT_BAR, total=size, unit="B", unit_scale=True) as bar:
            for path in paths:
                self._starts.append(len(self._offsets))
                check_is_jsonl(path)
                offset = 0
                with path.open("rb") as file:
                    for number, line in enumerate(file, start=1):
                        if line.strip():
                            self._offsets.append(offset)
                            self._lines.append(number)
                            digest.update(line)
                        offset += len(line)
                        bar.update(len(line))
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int) -> Any:
        with self._paths[self._file(number)].open("rb") as file:
            file.seek(self._offsets[number])
            return parse_line(file.readline())

    def where(self, number: int) -> str:
        """`file:line` of a sample."""
        return f"{self._paths[self._file(number)]}:{self._lines[number]}"

    def folder(self, number: int) -> Path:
        """The folder of a sample's file, to which its image paths are relative."""
        return self._folders[self._file(number)]

    def outlines(self) -> Iterator[Callable[[], Any]]:
        """All samples in order, each as a function that parses it."""
        for path in self._paths:
            with path.open("rb") as file:
                yield from (partial(parse_line, line) for line in file if line.strip())

    def _file(self, number: int) -> int:
        return bisect_right(self._starts, number) - 1


def parse_line(line: bytes) -> Any:
    """The value in a line; `ValueError` if it is not JSON."""
    if line.lstrip().startswith(b"["):
        raise ValueError(
            "the line is a list: expected JSONL, one object per line (convert a list with `jq -c '.[]'`)."
        )
    return parse_json(line)


def parse_json(content: bytes) -> Any:
    """The value of a JSON document in UTF-8; `ValueError` if it is none, or has a key twice in an object."""
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error}).") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} appears twice, and one of its values would be lost")
        found[key] = value
    return found


def check_is_jsonl(path: Path) -> None:
    """`ValueError` for a file that is not JSONL, before any single line is blamed."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if form := _other_form(path, head):
        raise ValueError(f"{path} is not JSONL (one object per line): it is {form}.")


def _other_form(path: Path, head: bytes) -> str | None:
    """What a file is instead of JSONL, by its first bytes."""
    if form := next((form for magic, form in FORMS.items() if head.startswith(magic)), None):
        return form
    if b"\0" in head:
        return "binary, or UTF-16 or UTF-32; write it as UTF-8 text"
    lines = [line for line in head.removeprefix(codecs.BOM_UTF8).splitlines() if line.strip()]
    if not lines:
        return "empty"
    if lines[0].lstrip().startswith(b"["):
        return "a JSON list; write one item per line (`jq -c '.[]'`)"
    if not any(line.lstrip().startswith(b"{") for line in lines):
        return f"something else, which starts with {lines[0][:40].decode(errors='replace')!r}"
    if not _is_json(lines[0]) and _is_json(path.read_bytes()):
        return "a single JSON document; write one sample per line (`jq -c`)"
    return None


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True
