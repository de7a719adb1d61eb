"""QDQ graphs on disk: small files over one store of constants, in which what graphs have in common lies once."""

import hashlib
import os
from pathlib import Path

import onnx
from onnx import TensorProto

SMALLEST = 1024  # bytes of a constant that is worth a place in the store
ALIGNMENT = 64


class ConstantStore:
    """A file of constants, each distinct one written once; several graphs point into it."""

    def __init__(self, path: Path):
        """Begins an empty store at `path`, replacing what is there."""
        self.path = path
        self._places: dict[bytes, tuple[int, int]] = {}
        self._file = path.open("wb")

    def __enter__(self) -> "ConstantStore":
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def save(self, model: onnx.ModelProto, path: Path) -> Path:
        """Writes `model`, whose large constants it moves to the store, to `path` in the folder of the store."""
        for tensor in model.graph.initializer:
            if tensor.HasField("raw_data") and len(tensor.raw_data) >= SMALLEST:
                offset, length = self._place(tensor.raw_data)
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (("location", self.path.name), ("offset", offset), ("length", length)):
                    tensor.external_data.add(key=key, value=str(value))
        self._file.flush()
        path.write_bytes(model.SerializeToString(deterministic=True))
        return path

    def _place(self, data: bytes) -> tuple[int, int]:
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            self._file.write(bytes(-self._file.tell() % ALIGNMENT))
            self._places[key] = (self._file.tell(), len(data))
            self._file.write(data)
        return self._places[key]


def sha256_of(path: str | os.PathLike) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


__all__ = ["ConstantStore", "sha256_of"]
