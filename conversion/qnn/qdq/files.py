"""Reads information from QDQ files: their inputs and outputs, and the codes of their matrices."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from conversion.qnn.qdq.encoding import Encoding, WeightCodes


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
            "dtype": helper.tensor_dtype_to_np_dtype(kind.elem_type).name,
            "scale": scale,
            "offset": offset,
        }

    return {
        "inputs": [describe(value) for value in model.graph.input],
        "outputs": [describe(value) for value in model.graph.output],
    }


def read_codes(path: Path) -> dict[str, WeightCodes]:
    """Codes of the constant matrices of a QDQ graph, by name."""
    model = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        name = node.input[0] if node.op_type == "DequantizeLinear" else None
        if name not in tensors or name.endswith(("/codes", "/multiples")):
            continue
        codes = numpy_helper.to_array(tensors[name]).astype(np.int8)
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), None)
        bits = 4 if tensors[name].data_type == onnx.TensorProto.INT4 else 8
        multiples = None
        if f"{name}/multiples" in tensors:
            # The decoder of the codes has the axis of the inputs, along which they are grouped.
            multiples, axis = numpy_helper.to_array(tensors[f"{name}/multiples"]), 1
        found[name] = WeightCodes(codes, numpy_helper.to_array(tensors[f"{name}/scale"]), bits, axis, multiples)
    return found


def read_constants(path: Path) -> dict[str, np.ndarray]:
    """Values of the 16-bit constants of a QDQ graph (biases, norm weights, single numbers), by name."""
    tensors = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("/codes"):
            title = name.removesuffix("/codes")
            scale, zero_point = (numpy_helper.to_array(tensors[f"{title}/{kind}"]) for kind in ("scale", "zero_point"))
            found[title] = Encoding(scale.item(), zero_point.item()).decode(numpy_helper.to_array(tensor))
    return found
