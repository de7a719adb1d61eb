"""The files of a bundle: what `metadata.json` says about each graph, and whether they are all what they were."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conversion.qnn.chunked_decoder import DecoderShape
from conversion.qnn.encoding import Encoding

METADATA = "metadata.json"
ADAPTER = "adapter.npz"
FORMAT_VERSION = 1


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 by relative path of everything in a bundle but its metadata."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / METADATA)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in paths
    }


def sha256_of(path: str | os.PathLike) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Bundle:
    """A bundle on disk."""

    def __init__(self, folder: str | os.PathLike):
        """Raises `OSError` for a folder that is no bundle, `ValueError` for one of another format."""
        self.folder = Path(folder)
        path = self.folder / METADATA
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no QNN bundle: it has no {METADATA}.")
        try:
            self.metadata = json.loads(path.read_text(encoding="utf-8"))
            version = self.metadata["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): export the bundle again.") from error
        if version != FORMAT_VERSION:
            raise ValueError(f"{folder} has format {version!r}, this program reads {FORMAT_VERSION}: export it again.")

    @property
    def decoder(self) -> DecoderShape:
        fields = self.metadata["decoder"]
        return DecoderShape(**{**fields, "rotary_frequencies": tuple(fields["rotary_frequencies"])})

    def path(self, relative: str) -> Path:
        """Where a file of the bundle lies."""
        return self.folder / relative

    def changed_files(self) -> list[str]:
        """A sentence for each file that is missing, not listed, or has other bytes than were exported."""
        problems = []
        for name, facts in self.metadata["files"].items():
            path = self.folder / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != facts["bytes"]:
                problems.append(f"{name} has {path.stat().st_size} bytes, {facts['bytes']} were exported")
            elif sha256_of(path) != facts["sha256"]:
                problems.append(f"{name} has other contents than were exported")
        return problems

    def embeddings(self) -> np.ndarray:
        """The raw table, (vocabulary, hidden_size) codes, read where it is looked at."""
        facts = self.metadata["embeddings"]
        return np.memmap(self.path(facts["file"]), facts["dtype"], "r", shape=tuple(facts["shape"]))


def read_adapter(path: str | os.PathLike, part: int, expected: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The LoRA inputs of a part's graphs by name; `ValueError` unless they have the shapes of `expected`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name.partition("/")[2]: file[name] for name in file if name.startswith(f"{part}/")}
    except (OSError, ValueError) as error:
        raise OSError(f"{path} is no adapter of a bundle ({error}): `genieblue export adapter` makes one.") from error
    shapes = {name: array.shape for name, array in found.items() if array.dtype == np.int8}
    if shapes != dict(expected):
        raise ValueError(
            f"{path} does not fit part {part} of the bundle: it has {len(shapes)} matrices of other names or shapes "
            f"than the {len(expected)} that the graphs take. Make it again from a GenieBlue of this bundle's base."
        )
    return found


def encoding_of(tensor: Mapping[str, Any]) -> Encoding:
    """The encoding that a tensor's entry in the metadata describes."""
    return Encoding(tensor["scale"], -tensor["offset"], tensor["dtype"])


__all__ = ["ADAPTER", "Bundle", "encoding_of", "list_files", "read_adapter", "sha256_of"]
