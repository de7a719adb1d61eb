"""JSONL files: parsing lines, and detecting files in other formats."""

import codecs
import json
from pathlib import Path
from typing import Any

HEAD = 1 << 16  # bytes that are read to detect a file's format
FORMS = {
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"BZh": "compressed with bzip2; unpack it",
    b"\xfd7zXZ": "compressed with xz; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it",
    b"PAR1": "a Parquet file; read it with `datasets`, and give the folder of its `save_to_disk`",
    b"ARROW1": "an Arrow file; read it with `datasets`, and give the folder of its `save_to_disk`",
    codecs.BOM_UTF16_LE: "UTF-16 or UTF-32; write it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16 or UTF-32; write it as UTF-8",
}


def parse_line(line: bytes) -> Any:
    """The value in a line; `ValueError` if it is not JSON."""
    if line.lstrip().startswith(b"["):
        raise ValueError(
            "the line is a list: expected JSONL, one object per line (convert a list with `jq -c '.[]'`)."
        )
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error}).") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice, and one of its values would be lost")
        found[key] = value
    return found


def check_is_jsonl(path: Path) -> None:
    """`ValueError` for a file that is not JSONL, before any single line is blamed."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    form = next((form for magic, form in FORMS.items() if head.startswith(magic)), None)
    if form is None and b"\0" in head:
        form = "binary, or UTF-16 or UTF-32; write it as UTF-8 text"
    lines = [line for line in head.removeprefix(codecs.BOM_UTF8).splitlines() if line.strip()]
    if form is None and not lines:
        form = "empty"
    if form is None and lines[0].lstrip().startswith(b"["):
        form = "a JSON list; write one item per line (`jq -c '.[]'`)"
    if form is None and not any(line.lstrip().startswith(b"{") for line in lines):
        form = f"something else, which starts with {lines[0][:40].decode(errors='replace')!r}"
    if form is None and not _is_json(lines[0]) and _is_json(path.read_bytes()):
        form = "a single JSON document; write one sample per line (`jq -c`)"
    if form is not None:
        raise ValueError(f"{path} is not JSONL (one object per line): it is {form}.")


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True
