"""Training data: chats with images, read lazily from JSONL or any sequence, and checked before use."""

import hashlib
import json
import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from genieblue.data.jsonl_files import check_is_jsonl, parse_line
from genieblue.data.sample_keys import check_unread_keys, is_missing, shortened
from modeling_genieblue.addresses_genieblue import shown
from modeling_genieblue.chat_messages_genieblue import IMAGE_SOURCES, image_sources

logger = logging.getLogger(__name__)

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
IMAGE_KEYS = ("images", "image")
SAMPLE_KEYS = frozenset(("messages", "conversations", "system", "system_prompt", *IMAGE_KEYS))
IN_A_COLUMN = object()  # images that exist but are not decoded yet
BATCH = 1000  # table rows checked at a time
TURN_KEYS = frozenset(("role", "from", "content", "value"))
IMAGE_PART_KEYS = ("type", "image_url", "index", *IMAGE_SOURCES)
# Other names for keys of images that are read already.
IMAGE_NAMES = frozenset(("image_url", "image_urls", "image_path", "image_name", "image_file", "file_name"))
PLACEHOLDER = "<image>"  # in data files, whatever the processor's placeholder is
SECONDS_WITHOUT_BAR = 2
BAD_SAMPLE = (ValueError, OSError)
CORRECT_OR_SKIP = "Correct it, or skip bad samples with `skip_bad` (--skip-bad)."


@dataclass(frozen=True)
class ChatSample:
    """One conversation that ends with an answer.

    Attributes:
        messages: `{"role", "content"}`; the content is a string, or a list of `{"type": "text", "text"}` and
            `{"type": "image"}`, as in the sample.
        images: one per image part, in order: a path, a PIL image, an array or the bytes of a file.
        where: `file:line` or the sample's number, for error messages.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    where: str


class ChatDataset(torch.utils.data.Dataset):
    """Chats from a JSONL file, a `datasets.Dataset` or any sequence of dictionaries; items are `ChatSample`s.

    Two formats are read. In `{"messages": [{"role", "content"}], "images": [...]}`, the content is either a string,
    where `<image>` in a user's turn stands for the next of `images`, or a list of parts, where an image part may have
    its own image (`image` or `path`) and text is always literal. The other is LLaVA's
    `{"image": ..., "conversations": [{"from", "value"}]}`.

    JSONL files and lists are checked completely when they are opened, and a `datasets.Dataset` in all columns except
    images. Other sequences, which may generate their samples, are checked sample by sample on use. With `skip_bad`, a
    bad sample is skipped and logged; otherwise it is a `ValueError` with file and line. `skip_bad=None` is the same,
    but the message does not suggest skipping, for data that must be complete.

    `sha256` is the hash of the good lines, or of a list's texts and paths; for a `datasets.Dataset` it is the
    dataset's fingerprint, and for other sequences `None`.
    """

    def __init__(
        self,
        source: str | os.PathLike | Sequence[dict[str, Any]],
        *,
        image_folder: str | os.PathLike | None = None,
        skip_bad: bool | None = False,
    ):
        """Opens `source`; image paths are relative to `image_folder`, by default the JSONL file's folder."""
        self.skip_bad = skip_bad
        self.num_skipped = 0
        self.sha256: str | None = getattr(source, "_fingerprint", None)
        self._file: Path | None = None
        self._sequence: Sequence[dict[str, Any]] | None = None
        self._image_counts: array | None = None  # per sample, after all are checked
        self._hashes = array("Q")  # per sample that was checked
        if image_folder is not None and not os.path.isdir(image_folder):
            raise OSError(f"The image folder {shown(image_folder)} is not a folder: give an existing one.")
        if isinstance(source, (str, os.PathLike)):
            self._file = Path(source)
            if not self._file.is_file():
                raise FileNotFoundError(f"{shown(source)} is not a file: expected a JSONL file of chats.")
            self._folder = Path(os.path.realpath(image_folder or self._file.parent))
            check_is_jsonl(self._file)
            self._check_lines()
            return
        if isinstance(source, dict) or not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
            raise ValueError(
                f"The data has type {type(source).__name__}: expected a JSONL file or a sequence of dictionaries "
                "with a length; for a `DatasetDict`, give one split."
            )
        self._sequence = source
        self._folder = None if image_folder is None else Path(os.path.realpath(image_folder))
        self._numbers = range(len(source))
        if isinstance(source, (list, tuple)):
            self._check_sequence()
        elif getattr(source, "format", {}).get("type", "custom") != "custom":  # a transform generates its samples
            self._check_columns()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> ChatSample:
        number = self._numbers[index]
        if self._file is None:
            return self._sample(self._sequence[number], self._where(number))
        with self._file.open("rb") as file:
            file.seek(self._offsets[number])
            return self._sample(parse_line(file.readline()), self._where(number))

    def where(self, index: int) -> str:
        """A sample's name for messages: `file:line`, or its number."""
        return self._where(self._numbers[index])

    def with_images(self) -> Self:
        """This data without samples that have no image; `self` if it is unknown which those are."""
        if self._image_counts is None:
            return self
        chosen = [number for number in self._numbers if self._image_counts[number]]
        if len(chosen) < len(self):
            logger.info("Skipping %d of %d samples without an image.", len(self) - len(chosen), len(self))
        return self._subset(array("q", chosen))

    def sample_hashes(self) -> set[int]:
        """Hashes of the samples that were checked when the data was opened, to find the same ones in other data.

        They are of the texts and image paths; samples whose images are in memory are left out.
        """
        return {self._hashes[number] for number in self._numbers if number < len(self._hashes)} - {0}

    def first(self, count: int | None) -> Self:
        """The first `count` samples; `self` for `None`."""
        return self if count is None else self._subset(self._numbers[:count])

    def _subset(self, numbers: Any) -> Self:
        subset = object.__new__(type(self))
        subset.__dict__.update(self.__dict__)
        subset._numbers = numbers
        return subset

    def _where(self, number: int) -> str:
        return f"{self._file}:{self._lines[number]}" if self._file is not None else f"sample {number}"

    def _sample(self, raw: Any, where: str) -> ChatSample:
        return parse_chat(raw, where, self._folder)

    def _check_lines(self) -> None:
        self._offsets, self._lines = array("q"), array("q")

        def lines() -> Iterator[tuple[int, Any]]:
            offset = 0
            with self._file.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        self._offsets.append(offset)
                        self._lines.append(number)
                        yield len(line), line
                    offset += len(line)

        size = self._file.stat().st_size
        digest = self._check(lines(), parse_line, total=size, unit="B", unit_scale=True)
        self.sha256 = digest.hexdigest()

    def _check_sequence(self) -> None:
        entries = ((1, raw) for raw in self._sequence)
        self.sha256 = self._check(entries, lambda raw: raw, total=len(self._sequence)).hexdigest()

    def _check_columns(self) -> None:
        """Checks all columns of a `datasets.Dataset` except images, which are decoded on use."""
        names = [name for name in self._sequence.column_names if name not in IMAGE_KEYS]
        found = {"images": IN_A_COLUMN} if len(names) < len(self._sequence.column_names) else {}
        batches = self._sequence.select_columns(names).with_format("arrow").iter(BATCH)
        entries = ((1, raw) for batch in batches for raw in batch.to_pylist())
        self._check(entries, lambda raw: raw | found, total=len(self._sequence))

    def _check(self, entries: Iterator[tuple[int, Any]], parse: Any, **bar_options: Any) -> Any:
        """Checks every sample once and keeps the numbers of the good ones; returns their digest."""
        good = array("q")
        digest = hashlib.sha256()
        self._image_counts = array("I")
        with tqdm(desc="Checking the data", delay=SECONDS_WITHOUT_BAR, **bar_options) as bar:
            for number, (size, entry) in enumerate(entries):
                try:
                    sample = self._sample(parse(entry), self._where(number))
                    for image in sample.images:
                        _check_exists(image)
                except BAD_SAMPLE as error:
                    message = f"{self._where(number)}: {_without_prefix(error, self._where(number))}"
                    if not self.skip_bad:
                        offered = " Correct it." if self.skip_bad is None else f" {CORRECT_OR_SKIP}"
                        raise ValueError(f"{message}{offered}") from error
                    logger.warning("Left out %s", message)
                    self._image_counts.append(0)
                    self._hashes.append(0)
                else:
                    good.append(number)
                    content = _texts_and_paths(sample)
                    digest.update(entry if isinstance(entry, bytes) else content)
                    is_known = all(isinstance(image, (str, os.PathLike)) for image in sample.images)
                    self._hashes.append(int.from_bytes(hashlib.sha256(content).digest()[:8]) if is_known else 0)
                    self._image_counts.append(len(sample.images))
                bar.update(size)
        self._numbers = good
        self.num_skipped = len(self._image_counts) - len(good)
        if self.num_skipped:
            logger.warning("Skipping %d of %d samples, which are bad.", self.num_skipped, len(self._image_counts))
        return digest


def _texts_and_paths(sample: ChatSample) -> bytes:
    paths = [os.fspath(image) for image in sample.images if isinstance(image, (str, os.PathLike))]
    return json.dumps([sample.messages, paths]).encode()


def parse_chat(raw: Any, where: str, image_folder: Path | None) -> ChatSample:
    """Parses a sample in either format without opening its images; `ValueError` for a bad one.

    `image_folder` is a real path (without links), which must contain all images.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: the sample is {shortened(raw)}, expected an object with messages.")
    turns = _either(raw, ("messages", "conversations"), where)
    if not isinstance(turns, (list, tuple)) or not turns:
        raise ValueError(
            f"{where}: expected a list of turns as `messages` or `conversations`, found the keys {sorted(raw)}."
        )
    given = _either(raw, IMAGE_KEYS, where)
    is_list = isinstance(given, (list, tuple))
    has_placeholders = is_missing(raw.get("messages")) or not is_missing(given) or is_list and len(given) > 0
    messages = [
        _parse_turn(turn, has_placeholders, f"{where}, turn {index}") for index, turn in enumerate(turns, start=1)
    ]
    messages = _with_system(messages, _either(raw, ("system", "system_prompt"), where), where)
    _check_turns(messages, where)
    missing = sum(source is None for source in image_sources(messages))
    if given is IN_A_COLUMN:
        given = [b""] * missing
    elif is_missing(given) and not (is_list and missing):  # a list with nothing in it lacks what a placeholder shows
        given = []
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    images = _images_of_parts(messages, given, where)
    read = SAMPLE_KEYS | (IMAGE_NAMES if images else frozenset())
    check_unread_keys(raw, read, where, texts=texts_of(messages))
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [part if part["type"] == "text" else {"type": "image"} for part in message["content"]]
    return ChatSample(messages, [_resolve_image(image, image_folder, where) for image in images], where)


def _either(found: dict[str, Any], keys: tuple[str, str], where: str) -> Any:
    """The value of whichever of two keys is set; `ValueError` if both are set and differ."""
    given = [found[key] for key in keys if not is_missing(found.get(key))]
    if len(given) > 1 and given[0] != given[1] and [given[1]] != given[0]:
        raise ValueError(f"{where}: {keys[0]!r} and {keys[1]!r} are both given and differ; expected one of them.")
    return given[0] if given else next((found[key] for key in keys if found.get(key) is not None), None)


def _with_system(messages: list[dict[str, Any]], system: Any, where: str) -> list[dict[str, Any]]:
    """The messages, preceded by the system message that ShareGPT stores separately."""
    if is_missing(system):
        return messages
    if not isinstance(system, str):
        raise ValueError(f"{where}: `system` is {shortened(system)}, expected a string.")
    if messages[0]["role"] == "system":
        if "".join(texts_of(messages[:1])).strip() != system.strip():
            raise ValueError(f"{where}: `system` differs from the system message; expected one of them.")
        return messages
    return [{"role": "system", "content": _encodable(system, where)}, *messages]


def _images_of_parts(messages: list[dict[str, Any]], given: list[Any], where: str) -> list[Any]:
    """The image of each image part in order; parts without their own image take the next `given` one."""
    for message in messages:
        if message["role"] != "user" and image_sources([message]):
            raise ValueError(
                f"{where}: an image in a turn of the {message['role']}; expected images only in user turns."
            )
    sources = image_sources(messages)
    missing = sum(source is None for source in sources)
    if missing != len(given):
        raise ValueError(
            f"{where}: {missing} placeholders ({PLACEHOLDER}, or an image part without an image) for {len(given)} "
            f"images; expected one for each. To use {PLACEHOLDER} as literal text, write the text as a part: "
            '{"type": "text", "text": ...}.'
        )
    remaining = iter(given)
    return [next(remaining) if source is None else source for source in sources]


def texts_of(messages: list[dict[str, Any]]) -> list[str]:
    """The texts of messages: string contents and text parts."""
    contents = [[message["content"]] if isinstance(message["content"], str) else message["content"]
                for message in messages]  # fmt: skip
    return [part if isinstance(part, str) else part["text"] for content in contents for part in content
            if isinstance(part, str) or part["type"] == "text"]  # fmt: skip


def _parse_turn(turn: Any, has_placeholders: bool, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is {shortened(turn)}, expected an object.")
    role, content = _either(turn, ("role", "from"), where), _either(turn, ("content", "value"), where)
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{where}: the role is {shortened(role)}, expected one of {', '.join(ROLES)}.")
    if isinstance(content, str):
        text = _encodable(content, where)
        parsed = _split_placeholders(text) if has_placeholders and ROLES[role] == "user" else text
    elif isinstance(content, (list, tuple)):
        parsed = [_parse_part(part, where) for part in content]
    else:
        raise ValueError(f"{where}: the content is {shortened(content)}, expected a string or a list of parts.")
    message = {"role": ROLES[role], "content": parsed}
    check_unread_keys(turn, TURN_KEYS, where, texts=texts_of([message]), strict=True)
    return message


def _parse_part(part: Any, where: str) -> dict[str, Any]:
    part = {"type": "text", "text": part} if isinstance(part, str) else part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        check_unread_keys(part, ("type", "text"), where, strict=True)
        return {"type": "text", "text": _encodable(part["text"], where)}
    if kind not in ("image", "image_url"):
        raise ValueError(
            f'{where}: a part is {shortened(part)}, expected {{"type": "text", "text": ...}} or '
            '{"type": "image", "image": ...}.'
        )
    check_unread_keys(part, IMAGE_PART_KEYS, where, strict=True)
    if isinstance(part.get("image_url"), dict):
        check_unread_keys(part["image_url"], ("url",), where, strict=True)
    return {"type": kind} | {key: part[key] for key in IMAGE_PART_KEYS if not is_missing(part.get(key))}


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the text contains an unpaired surrogate ({error}); write it as UTF-8.") from error
    return text


def _split_placeholders(text: str) -> str | list[dict[str, Any]]:
    """`"<image>\\nWhat is it?"` → an image part and a text part; the processor puts the newline between them."""
    if PLACEHOLDER not in text:
        return text
    pieces = text.split(PLACEHOLDER)
    parts: list[dict[str, Any]] = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
    for piece in pieces[1:]:
        parts.append({"type": "image"})
        piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _check_turns(messages: list[dict[str, Any]], where: str) -> None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user" if index % 2 == 0 else "assistant" for index in range(len(turns))]
    if turns != expected or not turns or turns[-1] != "assistant":
        raise ValueError(
            f"{where}: the roles are {', '.join(roles)}; expected user and assistant in turn, ending with the "
            "assistant, after at most one system message."
        )
    if not any(text.strip() for text in texts_of([message for message in messages if message["role"] == "assistant"])):
        raise ValueError(f"{where}: all answers are empty; expected text to learn.")


def _resolve_image(image: Any, folder: Path | None, where: str) -> Any:
    """An image in a form that can be opened; a path becomes absolute and must be inside `folder`."""
    if isinstance(image, dict):  # an image that `datasets` did not decode
        check_unread_keys(image, ("bytes", "path"), where, strict=True)
        # Only real bytes: a string would be opened as a path, bypassing the checks below.
        image = image["bytes"] if isinstance(image.get("bytes"), bytes) else image.get("path")
    if isinstance(image, (Image.Image, np.ndarray, torch.Tensor, bytes)):
        return image
    if not isinstance(image, (str, os.PathLike)) or not os.fspath(image):
        raise ValueError(f"{where}: the image is {shortened(image)}, expected a path, a PIL image or bytes.")
    name = os.fspath(image)
    if "\0" in name:
        raise ValueError(f"{where}: the image {shown(name)!r} is not a path: it contains a null byte.")
    if name[:11].lower() == "data:image/":
        return name
    name_shown = shown(name)
    if name.lower().startswith(("http://", "https://")):
        raise ValueError(f"{where}: the image {name_shown} is a URL; download it and give its path.")
    if folder is None:
        raise ValueError(
            f"{where}: the image {name_shown} is a path; set `image_folder` to the folder it is relative to."
        )
    path = os.path.realpath(folder / name)
    if not Path(path).is_relative_to(folder):
        raise ValueError(
            f"{where}: the image {name_shown} is outside {folder} (at {shown(path)}); move it inside, or give another "
            "`image_folder`."
        )
    return path


def _check_exists(image: Any) -> None:
    if isinstance(image, str) and image[:5].lower() != "data:" and not os.path.isfile(image):
        raise FileNotFoundError(f"the image file {shown(image)} does not exist.")


def _without_prefix(error: Exception, where: str) -> str:
    return str(error).removeprefix(where).removeprefix(": ").removeprefix(", ")
