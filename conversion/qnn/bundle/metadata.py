"""The files of a bundle: the graphs described in `metadata.json`, and whether all files are unchanged."""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from conversion.qnn.graphs.chunked_decoder import DecoderShape
from conversion.qnn.graphs.names import LORA_MODES, ROUNDINGS, STAGES, VIEWS, is_lora
from conversion.qnn.qdq.encoding import Encoding

METADATA = "metadata.json"
ADAPTER = "adapter.npz"
FORMAT_VERSION = 2
OWN_DIGEST = "sha256"  # key in the metadata

# What the programs that open a bundle read of its metadata: a type, a choice, a list of the one thing, or keys.
NUMBER = (int, float)
CODES = {"dtype": frozenset({"uint16", "int16", "uint8", "int8"}), "scale": NUMBER, "offset": int}
TENSOR = {"name": str, "shape": [int], **CODES}
GRAPH = {"context": str, "qdq": str, "inputs": [TENSOR], "outputs": [TENSOR]}
LANGUAGE_GRAPH = {**GRAPH, "view": frozenset(VIEWS), "tokens": int}
PART = {
    "blocks": [int],
    "binary": str,
    "base_weight_codes": str,
    "graphs": {f"{view}_{stage}": LANGUAGE_GRAPH for view in VIEWS for stage in STAGES},
}
DECODER = {field.name: int for field in fields(DecoderShape)} | {
    "rotary_frequencies": [NUMBER],
    "rotary_scaling": NUMBER,
    "masked": NUMBER,
}
SCHEMA = {
    "soc": {"name": str},
    "compiler": str,
    "base": {"name_or_path": (str, type(None)), "revision": (str, type(None)), "fingerprint": (dict, type(None))},
    "adapter": {"copies_sha256": str, "vision_sha256": str, "lora_rank": int, "lora": frozenset(LORA_MODES)},
    "chunk_length": int,
    "context_length": int,
    "rounding": frozenset(ROUNDINGS),
    "decoder": DECODER,
    "image_token_id": int,
    "image_seq_length": int,
    "embeddings": {"file": str, "shape": [int], **CODES},
    "generation": {"eos_token_ids": [int]},
    "vision": {"binary": str, "tiles": int, "graph": GRAPH},
    "parts": [PART],
    "files": dict,
    OWN_DIGEST: str,
}


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 by relative path of everything in a bundle but its metadata."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in _names(folder)
    }


def _names(folder: Path) -> list[str]:
    """Files in the folder of a bundle but its metadata. Hidden ones are a download's own, and nothing reads them."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [
        path.as_posix()
        for path in paths
        if path.as_posix() != METADATA and not any(part.startswith(".") for part in path.parts)
    ]


def sha256_of(path: str | os.PathLike) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def signed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with a digest of themselves."""
    return {**metadata, OWN_DIGEST: _digest(metadata)}


def _digest(metadata: Mapping[str, Any]) -> str:
    """Hex digest of metadata as JSON with sorted keys, their own digest left out."""
    others = {key: value for key, value in metadata.items() if key != OWN_DIGEST}
    return hashlib.sha256(json.dumps(others, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Bundle:
    """A bundle on disk."""

    def __init__(self, folder: str | os.PathLike):
        """Raises `OSError` for a folder that is no bundle, `ValueError` for one of another format or damaged."""
        self.folder = Path(folder)
        path = self.folder / METADATA
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no QNN bundle: it has no {METADATA}.")
        try:
            self.metadata = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): export the bundle again.") from error
        version = self.metadata.get("format_version") if isinstance(self.metadata, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"{folder} has format {version!r}, this program reads {FORMAT_VERSION}: export it again.")
        problem = _misfit(self.metadata, SCHEMA, "") or self._strange_files() or self._strange_numbers()
        if problem:
            raise ValueError(f"{path} is damaged: {problem}. Export the bundle again.")

    def _strange_files(self) -> str | None:
        """What is wrong with the names of files in the metadata."""
        facts = self.metadata
        for name, file in facts["files"].items():
            if PurePosixPath(name).is_absolute() or ".." in name.split("/") or "\\" in name or ":" in name:
                return f"the file {name!r} would lie outside of the bundle"
            if problem := _misfit(file, {"bytes": int, "sha256": str}, f"files.{name}"):
                return problem
        graphs = [facts["vision"]["graph"], *(graph for part in facts["parts"] for graph in part["graphs"].values())]
        needed = [facts["embeddings"]["file"], *(graph[kind] for graph in graphs for kind in ("context", "qdq"))]
        needed += [owner["binary"] for owner in (facts["vision"], *facts["parts"])]
        needed += [ADAPTER] if facts["adapter"]["lora"] == "inputs" else []
        missing = sorted(set(needed) - set(facts["files"]))
        return f"{', '.join(map(repr, missing))} is not among its files" if missing else None

    def _strange_numbers(self) -> str | None:
        """What is wrong with the blocks of the parts, and with sizes."""
        facts, decoder = self.metadata, self.metadata["decoder"]
        ends = [end for part in facts["parts"] for end in part["blocks"]]
        if any(len(part["blocks"]) != 2 or part["blocks"][0] >= part["blocks"][1] for part in facts["parts"]) or (
            [0, *ends[1::2]] != [*ends[::2], decoder["num_blocks"]]
        ):
            held = [part["blocks"] for part in facts["parts"]]
            return f"its parts hold the blocks {held} of {decoder['num_blocks']}"
        shape = facts["embeddings"]["shape"]
        if len(shape) != 2 or shape[1] != decoder["hidden_size"]:
            return f"its embeddings have the shape {shape}, its decoder the hidden size {decoder['hidden_size']}"
        if facts["vision"]["tiles"] < 1 or not 0 < facts["chunk_length"] < facts["context_length"]:
            return "`vision.tiles`, `chunk_length` or `context_length` cannot be"
        return None

    @property
    def decoder(self) -> DecoderShape:
        found = {name: self.metadata["decoder"][name] for name in DECODER}
        return DecoderShape(**{**found, "rotary_frequencies": tuple(found["rotary_frequencies"])})

    def path(self, relative: str) -> Path:
        """Where a file of the bundle lies."""
        return self.folder / relative

    def changed_files(self) -> list[str]:
        """A sentence for each file that is missing, not listed, or has other bytes than were exported."""
        problems = []
        if self.metadata[OWN_DIGEST] != _digest(self.metadata):
            problems.append(f"{METADATA} has other contents than were exported")
        for name, facts in self.metadata["files"].items():
            path = self.path(name)
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != facts["bytes"]:
                problems.append(f"{name} has {path.stat().st_size} bytes, {facts['bytes']} were exported")
            elif sha256_of(path) != facts["sha256"]:
                problems.append(f"{name} has other contents than were exported")
        extra = [name for name in _names(self.folder) if name not in self.metadata["files"]]
        return problems + [f"{name} is no file of the bundle (remove it)" for name in extra]

    def embeddings(self) -> np.ndarray:
        """The raw table, (vocabulary, hidden_size) codes, read where it is looked at."""
        facts = self.metadata["embeddings"]
        return np.memmap(self.path(facts["file"]), facts["dtype"], "r", shape=tuple(facts["shape"]))

    def lora_inputs(self, part: int, view: str) -> dict[str, dict[str, Any]]:
        """By name the LoRA inputs of a part's graphs as the metadata describe them; none if LoRA are constants."""
        inputs = self.metadata["parts"][part]["graphs"][f"{view}_decode"]["inputs"]
        return {tensor["name"]: tensor for tensor in inputs if is_lora(tensor["name"])}


def _misfit(value: Any, expected: Any, where: str) -> str | None:
    """What in a document is not as expected, or None."""
    if isinstance(expected, dict):
        if not isinstance(value, dict):
            return f"`{where}` is {value!r:.40}, expected an object"
        for key, inner in expected.items():
            place = f"{where}.{key}".removeprefix(".")
            if key not in value:
                return f"`{place}` is missing"
            if problem := _misfit(value[key], inner, place):
                return problem
        return None
    if isinstance(expected, list):
        if not isinstance(value, list):
            return f"`{where}` is {value!r:.40}, expected a list"
        return next(filter(None, (_misfit(item, expected[0], f"{where}[{n}]") for n, item in enumerate(value))), None)
    if isinstance(expected, frozenset):
        fits, wanted = isinstance(value, str) and value in expected, " or ".join(sorted(expected))
    else:
        fits = isinstance(value, expected) and not isinstance(value, bool)
        wanted = " or ".join(kind.__name__ for kind in (expected if isinstance(expected, tuple) else (expected,)))
    return None if fits else f"`{where}` is {value!r:.40}, expected {wanted}"


def scale_name(name: str) -> str:
    """Under which name an adapter file holds the scale of a matrix."""
    return f"{name}/scale"


def read_adapter(
    path: str | os.PathLike, part: int, expected: Mapping[str, Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """The LoRA inputs of a part's graphs by name, int8.

    `expected` describes them as the metadata do. Raises `OSError` for a file that is no adapter, `ValueError` for one
    with other names, shapes or scales, which was made for another bundle.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name.partition("/")[2]: file[name] for name in file if name.startswith(f"{part}/")}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:  # all that NumPy raises
        raise OSError(f"{path} is no adapter of a bundle ({error}): `genieblue export adapter` makes one.") from error
    remedy = "make it again for this bundle, with `genieblue export adapter`."
    shapes = {name: array.shape for name, array in found.items() if array.dtype == np.int8}
    if shapes != {name: tuple(tensor["shape"]) for name, tensor in expected.items()}:
        raise ValueError(
            f"{path} does not fit part {part} of the bundle: it has {len(shapes)} matrices of other names or shapes "
            f"than the {len(expected)} that the graphs take; {remedy}"
        )
    # The codes mean something with these scales only, and those of the graphs are compiled.
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
