"""The files of a bundle: the graphs described in `metadata.json`, and whether all files are unchanged."""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from conversion.qnn.graphs.chunked_decoder import DecoderShape
from conversion.qnn.graphs.names import is_lora
from conversion.qnn.qdq.encoding import Encoding

METADATA = "metadata.json"
README = "README.md"
ADAPTER, PROBE = "adapter.npz", "probe.npz"
FORMAT_VERSION = 3
OWN_DIGEST = "sha256"  # key in the metadata


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 by relative path of all files of a bundle except its metadata."""
    paths = {name: folder / name for name in _names(folder)}
    return {name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for name, path in paths.items()}


def _sha256(path: Path) -> str:
    """Hex digest of a file; not the one of `model_files_genieblue`, since a runner does without torch."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _names(folder: Path) -> list[str]:
    """Files of a bundle except its metadata. Hidden files come from a download, and nothing reads them."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [
        path.as_posix()
        for path in paths
        if path.as_posix() != METADATA and not any(part.startswith(".") for part in path.parts)
    ]


def signed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with their own digest; `ValueError` for NaN and infinity, which JSON does not have."""
    json.dumps(metadata, allow_nan=False)
    return {**metadata, OWN_DIGEST: _digest(metadata)}


def _digest(metadata: Mapping[str, Any]) -> str:
    """Hex digest of metadata without their own digest, as JSON with sorted keys."""
    others = {key: value for key, value in metadata.items() if key != OWN_DIGEST}
    return hashlib.sha256(json.dumps(others, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Bundle:
    """A bundle on disk."""

    def __init__(self, folder: str | os.PathLike):
        """Raises `OSError` for a folder that is not a bundle, `ValueError` for another format or damaged metadata."""
        self.folder = Path(folder)
        path = self.folder / METADATA
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not a QNN bundle: it has no {METADATA}.")
        try:
            self.metadata = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): export the bundle again.") from error
        version = self.metadata.get("format_version") if isinstance(self.metadata, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"{folder} has format {version!r}, this program reads {FORMAT_VERSION}: export it again.")
        if self.metadata.get(OWN_DIGEST) != _digest(self.metadata):
            raise ValueError(f"{path} has other contents than were exported: export the bundle again.")

    @cached_property
    def decoder(self) -> DecoderShape:
        """What a caller of the decoder's graphs must know; made once, since each token asks for it."""
        found = self.metadata["decoder"]
        return DecoderShape(**{**found, "rotary_frequencies": tuple(found["rotary_frequencies"])})

    def path(self, relative: str) -> Path:
        """The path of a file in the bundle; `ValueError` for one outside, which untrusted metadata may name."""
        if PurePosixPath(relative).is_absolute() or ".." in PurePosixPath(relative).parts or "\\" in relative:
            raise ValueError(f"{self.folder / METADATA} names the file {relative!r}, which is outside the bundle.")
        return self.folder / relative

    def changed_files(self) -> list[str]:
        """A sentence for each file that is missing, unknown, or has other contents than were exported.

        The README may have any contents: nothing runs it, and whoever publishes a bundle describes it there.
        """
        problems = []
        for name, facts in self.metadata["files"].items():
            path = self.path(name)
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif name == README:
                continue
            elif path.stat().st_size != facts["bytes"]:
                problems.append(f"{name} has {path.stat().st_size} bytes, {facts['bytes']} were exported")
            elif _sha256(path) != facts["sha256"]:
                problems.append(f"{name} has other contents than were exported")
        extra = [name for name in _names(self.folder) if name not in self.metadata["files"]]
        return problems + [f"{name} is not a file of the bundle (remove it)" for name in extra]

    def embeddings(self) -> np.ndarray:
        """The embedding table, (vocabulary, hidden_size) codes, mapped from its file."""
        facts = self.metadata["embeddings"]
        return np.memmap(self.path(facts["file"]), facts["dtype"], "r", shape=tuple(facts["shape"]))

    def lora_inputs(self, part: int, view: str) -> dict[str, dict[str, Any]]:
        """The LoRA inputs of a part's graphs by name, as in the metadata; none if LoRA are constants."""
        inputs = self.metadata["parts"][part]["graphs"][f"{view}_decode"]["inputs"]
        return {tensor["name"]: tensor for tensor in inputs if is_lora(tensor["name"])}


def scale_name(name: str) -> str:
    """Name of a matrix's scale in an adapter file."""
    return f"{name}/scale"


def read_adapter(
    path: str | os.PathLike, part: int, expected: Mapping[str, Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """The LoRA inputs of a part's graphs by name, int8; `expected` are their entries in the metadata.

    Raises `OSError` for a file that is not an adapter, `ValueError` for the names, shapes or scales of another bundle.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name.partition("/")[2]: file[name] for name in file if name.startswith(f"{part}/")}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:  # whatever NumPy raises
        if isinstance(error, OSError) and error.strerror:
            raise OSError(f"The adapter {path} cannot be read ({error.strerror}): give another file.") from error
        # NumPy's own words are about pickled data, and how to load it unsafely.
        raise OSError(
            f"{path} is not an adapter of a bundle, or is damaged: make one with `genieblue export adapter`."
        ) from error
    remedy = "make it again for this bundle, with `genieblue export adapter`."
    shapes = {name: array.shape for name, array in found.items() if array.dtype == np.int8}
    if shapes != {name: tuple(tensor["shape"]) for name, tensor in expected.items()}:
        raise ValueError(
            f"{path} does not fit part {part} of the bundle: the names or shapes of its {len(shapes)} matrices are "
            f"not those of the {len(expected)} inputs; {remedy}"
        )
    # Codes have a meaning only with their scales, and those of the graphs are compiled.
    other = [
        name
        for name, tensor in expected.items()
        if not np.array_equal(found.get(scale_name(name)), np.float32(tensor["scale"]))
    ]
    if other:
        raise ValueError(
            f"{path} was made for another bundle: the scales of {len(other)} of {len(expected)} matrices of part "
            f"{part} are not this one's ({other[0]} and others); {remedy}"
        )
    return {name: found[name] for name in expected}


def encoding_of(tensor: Mapping[str, Any]) -> Encoding:
    """The encoding that a tensor's entry in the metadata describes."""
    return Encoding(tensor["scale"], -tensor["offset"], tensor["dtype"])
