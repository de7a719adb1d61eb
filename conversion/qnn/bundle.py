"""The files of a bundle: what `metadata.json` says about each graph, and whether they are all what they were."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from conversion.qnn.chunked_decoder import DecoderShape
from conversion.qnn.quantize import Encoding, WeightCodes
from conversion.qnn.stored_graphs import sha256_of

METADATA = "metadata.json"
FORMAT_VERSION = 1
DTYPES = {
    TensorProto.UINT16: "uint16",
    TensorProto.INT16: "int16",
    TensorProto.UINT8: "uint8",
    TensorProto.INT8: "int8",
}


def describe_boundary(
    graph: Path, encodings: Mapping[str, Encoding], codes: Mapping[str, WeightCodes] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """`inputs` and `outputs` of a QDQ graph: name, shape, dtype, and `value = (code + offset) * scale`."""
    model = onnx.load(graph, load_external_data=False)

    def describe(value: onnx.ValueInfoProto) -> dict[str, Any]:
        kind = value.type.tensor_type
        if value.name in encodings:
            encoding = encodings[value.name]
            scale, offset = encoding.scale, -encoding.zero_point
        else:  # a LoRA matrix
            scale, offset = float(codes[value.name].scales), 0
        return {
            "name": value.name,
            "shape": [dim.dim_value for dim in kind.shape.dim],
            "dtype": DTYPES[kind.elem_type],
            "scale": scale,
            "offset": offset,
        }

    return {
        "inputs": [describe(value) for value in model.graph.input],
        "outputs": [describe(value) for value in model.graph.output],
    }


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 by relative path of everything in a bundle but its metadata."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / METADATA)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in paths
    }


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


def encoding_of(tensor: Mapping[str, Any]) -> Encoding:
    """The encoding that a tensor's entry in the metadata describes."""
    return Encoding(tensor["scale"], -tensor["offset"], tensor["dtype"])


def read_codes(path: Path) -> dict[str, WeightCodes]:
    """Codes by name of the matrices of a QDQ graph that are constants."""
    model = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        name = node.input[0] if node.op_type == "DequantizeLinear" else None
        if name not in tensors or name.endswith("/codes"):
            continue
        codes = numpy_helper.to_array(tensors[name]).astype(np.int8)
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), None)
        bits = 4 if tensors[name].data_type == onnx.TensorProto.INT4 else 8
        found[name] = WeightCodes(codes, numpy_helper.to_array(tensors[node.input[1]]), bits, axis)
    return found


__all__ = ["Bundle", "describe_boundary", "encoding_of", "list_files", "read_codes"]
