"""QDQ graphs on disk: small files over one store of constants, so that shared constants are stored once."""

import hashlib
from pathlib import Path

import onnx
from onnx import TensorProto

SMALLEST = 1024  # bytes; smaller constants stay in the graph
ALIGNMENT = 64


class ConstantStore:
    """A file of constants for several graphs; equal ones are written once."""

    def __init__(self, path: Path):
        """Starts an empty store at `path`, replacing an existing file."""
        self.path = path
        self._places: dict[bytes, tuple[int, int]] = {}
        self._file = path.open("wb")

    def __enter__(self) -> "ConstantStore":
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def save(self, model: onnx.ModelProto, path: Path) -> Path:
        """Moves the large constants of `model` to the store and writes the rest to `path`, in the same folder."""
        for tensor in model.graph.initializer:
            if _is_large(tensor):
                self._point(tensor, tensor.raw_data)
                tensor.ClearField("raw_data")
        self._file.flush()
        path.write_bytes(model.SerializeToString(deterministic=True))
        return path

    def copy(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A copy of `model` with its large constants in the store instead of in memory; `model` keeps its own."""
        copied = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
        graph, source = copied.graph, model.graph
        graph.name = source.name
        for field in ("node", "input", "output"):
            getattr(graph, field).extend(getattr(source, field))
        for tensor in source.initializer:
            if _is_large(tensor):
                placed = graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
                self._point(placed, tensor.raw_data)
            else:
                graph.initializer.append(tensor)
        self._file.flush()
        return copied

    def _point(self, tensor: TensorProto, data: bytes) -> None:
        """Makes `data` in the store the contents of `tensor`."""
        offset, length = self._place(data)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))

    def _place(self, data: bytes) -> tuple[int, int]:
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            self._file.write(bytes(-self._file.tell() % ALIGNMENT))
            self._places[key] = (self._file.tell(), len(data))
            self._file.write(data)
        return self._places[key]


def save_copy(model: onnx.ModelProto, path: Path) -> Path:
    """Writes `model` to `path` and its large constants beside it, without a second copy in memory."""
    with ConstantStore(path.with_suffix(".data")) as store:
        path.write_bytes(store.copy(model).SerializeToString(deterministic=True))
    return path


def _is_large(tensor: TensorProto) -> bool:
    return tensor.HasField("raw_data") and len(tensor.raw_data) >= SMALLEST
