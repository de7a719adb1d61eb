"""WebDataset shards: an index of tar files, whose members are read when a sample is asked for."""

import hashlib
import os
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from genieblue.data.jsonl_files import SECONDS_WITHOUT_BAR, parse_json
from genieblue.data.sample_keys import is_missing, shortened

CHATS, CAPTIONS = ("json", "jsn"), ("txt", "text", "caption")
DESCRIBING = frozenset(("cls", "cls2", "id", "idx", "index", "key", "url", "license"))
MAGIC, MAGIC_AT = b"ustar", 257  # of a tar file
IMAGE_FIELDS = ("image", "path")  # of an image part, which may name a member


class TarShards:
    """The samples of tar files: consecutive members with the same name up to the first dot of the file name.

    `key.json` is a chat as in a line of JSONL; `key.txt` is the caption of the images, an answer to no question but
    them. Images that the chat does not name are taken in their order in the file. `datasets` reads such files too,
    but copies them, and takes the keys of the first five samples for those of all.

    `sha256` is the hash of the members' names, sizes and times.
    """

    def __init__(self, paths: Sequence[Path]):
        """Reads the headers of the members; `ValueError` for a broken file, a link or a repeated member."""
        self._paths = tuple(paths)
        self._starts: list[int] = []  # number of each file's first sample
        self._keys: list[str] = []
        self._first = array("q")  # member of each sample
        self._offsets, self._sizes, self._endings = array("q"), array("q"), array("L")
        self._ending_names: list[str] = []
        digest = hashlib.sha256()
        size = sum(path.stat().st_size for path in paths)
        with tqdm(desc="Reading the data", delay=SECONDS_WITHOUT_BAR, total=size, unit="B", unit_scale=True) as bar:
            for path in paths:
                self._starts.append(len(self._keys))
                try:
                    self._read_headers(path, digest, bar)
                except (tarfile.TarError, EOFError) as error:
                    raise ValueError(f"{path} is not a complete tar file ({error}).") from error
                if self._starts[-1] == len(self._keys):
                    raise ValueError(f"{path} has no samples: expected members such as 000.jpg and 000.json.")
        self._first.append(len(self._offsets))
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, number: int) -> Any:
        return self._sample(number, reads_images=True)

    def where(self, number: int) -> str:
        """`file:key` of a sample."""
        return f"{self._paths[self._file(number)]}:{self._keys[number]}"

    def folder(self, number: int) -> None:
        """None: images are in the file."""

    def outlines(self) -> Iterator[Callable[[], Any]]:
        """All samples in order, each as a function that parses it, with empty images."""
        yield from (partial(self._sample, number, reads_images=False) for number in range(len(self)))

    def _read_headers(self, path: Path, digest: Any, bar: tqdm) -> None:
        ids = {name: number for number, name in enumerate(self._ending_names)}
        size, read, key, found = path.stat().st_size, 0, None, set()
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # where it keeps every header
                bar.update(tar.offset - read)
                read = tar.offset
                name = PurePosixPath(member.name)
                stem, _, ending = name.name.partition(".")
                if member.isdir() or not stem or not ending:  # of a folder's own files, such as `._a.jpg` or `README`
                    continue
                if not member.isreg() or member.issparse():
                    raise ValueError(f"{path}: the member {shortened(member.name)} is a link: store the file itself.")
                if member.offset_data + member.size > size:
                    raise ValueError(f"{path} ends within {shortened(member.name)}: it is not complete.")
                if key != (key := str(name.parent / stem)):
                    self._keys.append(key)
                    self._first.append(len(self._offsets))
                    found = set()
                if ending in found:
                    raise ValueError(f"{path}: the member {shortened(member.name)} appears twice.")
                found.add(ending)
                if ending not in ids:
                    ids[ending] = len(ids)
                    self._ending_names.append(ending)
                self._offsets.append(member.offset_data)
                self._sizes.append(member.size)
                self._endings.append(ids[ending])
                digest.update(repr((member.name, member.size, member.mtime)).encode())
            end = tar.offset  # where `tarfile` stops, also at a header that it cannot read
        with path.open("rb") as file:
            file.seek(end)
            block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or any(block):
            raise ValueError(f"{path} has no end mark after {end} of {size} bytes: it is not complete, or broken.")

    def _file(self, number: int) -> int:
        return bisect_right(self._starts, number) - 1

    def _sample(self, number: int, *, reads_images: bool) -> Any:
        """A sample as in a line of JSONL, with bytes in place of the images' names."""
        members = range(self._first[number], self._first[number + 1])
        chat: Any = None
        caption: str | None = None
        images: dict[str, bytes] = {}
        with self._paths[self._file(number)].open("rb") as file:
            for index in members:
                ending = self._ending_names[self._endings[index]]
                kind = ending.rpartition(".")[2].lower()
                is_image = f".{kind}" in Image.registered_extensions()
                if kind in DESCRIBING:
                    continue
                if not is_image and ending.lower() not in (*CHATS, *CAPTIONS):
                    raise ValueError(
                        f"the member .{shortened(ending)} is not read, so its content would be lost. Expected "
                        "images, .json with a chat, or .txt with a caption."
                    )
                file.seek(self._offsets[index])
                content = file.read(self._sizes[index]) if reads_images or not is_image else b""
                if is_image:
                    images[ending] = content
                elif ending.lower() in CHATS:
                    chat = parse_json(content)
                else:
                    caption = content.decode("utf-8-sig")
        return _with_images(_as_chat(chat, caption, len(images)), images, PurePosixPath(self._keys[number]))


def _as_chat(chat: Any, caption: str | None, num_images: int) -> dict[str, Any]:
    """One sample from its chat and caption; `ValueError` if it has neither."""
    if chat is not None and not isinstance(chat, dict):
        raise ValueError(f"the .json is {shortened(chat)}, expected an object.")
    if any(not is_missing((chat or {}).get(key)) for key in ("messages", "conversations")):
        return {**chat, **({} if caption is None else {"caption": caption})}
    if caption is None:
        raise ValueError("neither a chat in a .json nor a caption in a .txt belongs to this sample.")
    question = {"role": "user", "content": [{"type": "image"}] * num_images}
    return {**(chat or {}), "messages": [question, {"role": "assistant", "content": caption.strip()}]}


def _with_images(sample: dict[str, Any], images: dict[str, bytes], key: PurePosixPath) -> dict[str, Any]:
    """The sample with its images: those that it names, or all in order; `ValueError` for a name without a member."""
    unused = dict(images)

    def member(name: Any) -> Any:
        """The image that a name means, otherwise the name."""
        wanted = PurePosixPath(name).name if isinstance(name, (str, os.PathLike)) else None
        ending = next((ending for ending in images if wanted == f"{key.name}.{ending}"), None)
        if ending is None:
            return name
        unused.pop(ending, None)
        return images[ending]

    for turns in ("messages", "conversations"):
        if isinstance(sample.get(turns), list):
            sample[turns] = [_turn_with_images(turn, member) for turn in sample[turns]]
    name = next((name for name in ("images", "image") if not is_missing(sample.get(name))), None)
    if name is None:
        return {**sample, "images": list(unused.values())}
    given = sample[name] if isinstance(sample[name], list) else [sample[name]]
    found = [member(each) for each in given]
    lost = [each for each in found if isinstance(each, str)]
    if lost or unused:
        names = [f"{key.name}.{ending}" for ending in images]
        raise ValueError(f"{name!r} is {shortened(given)}, but the images are {shortened(names)}.")
    return {**sample, name: found}


def _turn_with_images(turn: Any, member: Callable[[Any], Any]) -> Any:
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), list):
        return turn
    parts = [
        {**part, **{field: member(part[field]) for field in IMAGE_FIELDS if field in part}}
        if isinstance(part, dict) and part.get("type") == "image" else part
        for part in turn["content"]
    ]  # fmt: skip
    return {**turn, "content": parts}
