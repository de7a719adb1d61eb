"""Float graph + ranges → QDQ graph: 16-bit activations, symmetric int4 or int8 weights, scales by channel or group.

Inputs and outputs of the graph, including caches, are quantized too, so nothing is converted between calls.
"""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from ml_dtypes import int4  # which onnx needs too
from onnx import TensorProto, helper, numpy_helper

from conversion.qnn.qdq.encoding import (
    LEVELS,
    Encoding,
    Range,
    WeightCodes,
    constant_encoding,
    round_to_nearest,
)
from conversion.qnn.qdq.ranges import union

# These move values without changing them. Both sides share an encoding, so the NPU moves codes and never rescales.
MOVES = ("Reshape", "Transpose", "Split", "Concat", "Slice", "Unsqueeze", "Squeeze", "Pad")
# The NPU prescribes the encoding of these outputs.
FIXED_RANGES = {"Sigmoid": (0.0, LEVELS / 65536), "Softmax": (0.0, 1.0)}
CACHE_DTYPES = {16: "int16", 8: "uint8"}
WEIGHT_OPERATORS = {"MatMul": 1, "Conv": 0}  # and the axis of their output channels


def tensor_groups(model: onnx.ModelProto, tied: Mapping[str, str]) -> dict[str, str]:
    """For each tensor, a representative of all tensors with the same encoding: moved values and `tied` pairs."""
    parents: dict[str, str] = {}

    def find(name: str) -> str:
        while parents.setdefault(name, name) != name:
            name = parents[name]
        return name

    weights = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        find(value.name)
    for node in model.graph.node:
        for name in node.output:
            find(name)
        if node.op_type in MOVES:
            data = node.input if node.op_type == "Concat" else node.input[:1]
            for name in (*data, *node.output):
                if name not in weights:
                    parents[find(name)] = find(node.output[0])
    for first, second in tied.items():
        parents[find(first)] = find(second)
    return {name: find(name) for name in parents}


def encodings_of(
    model: onnx.ModelProto,
    ranges: Mapping[str, Range],
    tied: Mapping[str, str] | None = None,
    *,
    cache_bits: int = 16,
) -> dict[str, Encoding]:
    """The encoding of every activation; `ValueError` if one was never measured.

    Args:
        tied: additional pairs that must share an encoding: caches that go in and come out.
        cache_bits: 16, or 8 for half the cache: for keys and values, the second factors of attention's products.
    """
    groups = tensor_groups(model, tied or {})
    if missing := [name for name in groups if name not in ranges]:
        raise ValueError(
            f"The calibration has no range for {len(missing)} tensors ({', '.join(sorted(missing)[:3])} …): it was "
            "measured on a different graph; calibrate again."
        )
    fixed = {
        groups[name]: FIXED_RANGES[node.op_type]
        for node in model.graph.node
        if node.op_type in FIXED_RANGES
        for name in node.output
    }
    shared_ranges: dict[str, Range] = {}
    for name, root in groups.items():
        shared_ranges[root] = union(shared_ranges[root], ranges[name]) if root in shared_ranges else ranges[name]
    shared_ranges.update(fixed)
    factors = _second_factors(model)
    dtype = CACHE_DTYPES[cache_bits]
    return {
        name: Encoding.of(shared_ranges[root], dtype if name in factors else "uint16") for name, root in groups.items()
    }


def _second_factors(model: onnx.ModelProto) -> set[str]:
    """Second factors of products of two activations, and the tensors they are joined from: keys, values, the cache.

    The compiler silently rounds unsigned 16-bit codes there to 8 bits. It uses signed symmetric 16-bit codes and
    unsigned 8-bit codes as they are.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    waiting = [node.input[1] for node in model.graph.node if node.op_type == "MatMul" and node.input[1] not in weights]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        found.add(name)
        if name in producers and producers[name].op_type == "Concat":
            waiting += producers[name].input
    return found


def round_weights(
    model: onnx.ModelProto,
    bits_of: Callable[[str], int],
    *,
    as_inputs: Callable[[str], bool] = lambda _name: False,
) -> dict[str, WeightCodes]:
    """Codes of every matrix and kernel in a float graph, rounded to nearest, by name.

    Args:
        bits_of: 4 or 8 for the name of a weight.
        as_inputs: which weights will be inputs of the graph instead of constants. They get a single scale, because the
            NPU supports a scale per channel only for constants.
    """
    return {
        name: round_to_nearest(weight, bits_of(name), None if as_inputs(name) else axis)
        for name, (weight, axis) in weights_of(model).items()
    }


def weights_of(model: onnx.ModelProto) -> dict[str, tuple[np.ndarray, int]]:
    """Every matrix and kernel of a float graph and the axis of its output channels, by name."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        node.input[1]: (numpy_helper.to_array(constants[node.input[1]]), WEIGHT_OPERATORS[node.op_type])
        for node in model.graph.node
        if node.op_type in WEIGHT_OPERATORS and node.input[1] in constants
    }


def quantize_graph(
    model: onnx.ModelProto, encodings: Mapping[str, Encoding], codes: Mapping[str, WeightCodes], *, name: str
) -> onnx.ModelProto:
    """The QDQ graph of a float graph.

    Args:
        encodings: of every activation, from `encodings_of`.
        codes: of every matrix, from `round_weights`; those with a single scale become inputs of the graph.
        name: the graph's name.
    """
    return _Quantizer(model, encodings, codes, name).run()


class _Quantizer:
    """Puts a DequantizeLinear before each input and a QuantizeLinear after each output of an operator.

    ONNX Runtime's QNN provider turns each such unit (decoded inputs, operator, encoded output) into one integer
    operator; an operator without them would not be quantized.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        encodings: Mapping[str, Encoding],
        codes: Mapping[str, WeightCodes],
        name: str,
    ):
        self.source, self.encodings, self.codes = model.graph, dict(encodings), codes
        self.model = onnx.ModelProto(ir_version=model.ir_version, producer_name="genieblue")
        self.model.opset_import.extend(model.opset_import)
        self.graph = self.model.graph
        self.graph.name = name
        self.constants = {tensor.name: tensor for tensor in self.source.initializer}
        self.decoded: dict[str, str] = {}  # float tensor → name of the DequantizeLinear output that replaces it
        self.scales: dict[str, list[str]] = {}  # activation → names of its scale and zero point

    def run(self) -> onnx.ModelProto:
        outputs = {value.name for value in self.source.output}
        for value in self.source.input:
            self.graph.input.append(self._coded(value))
            self._decode_activation(value.name, value.name)
        for node in self.source.node:
            inputs = [self._input(node, place) for place in range(len(node.input))]
            copied = self.graph.node.add()
            copied.CopyFrom(node)
            copied.input[:] = inputs
            copied.output[:] = [self._float(name) for name in node.output]
            for name in node.output:
                self._encode_result(node, name, name if name in outputs else f"{name}/codes")
        self.graph.output.extend(self._coded(value) for value in self.source.output)
        self._drop_unused_decoders()
        onnx.checker.check_model(self.model)
        return self.model

    def _float(self, name: str) -> str:
        return f"{self.graph.name}/{name}"

    def _coded(self, value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.encodings[value.name].dtype))
        return helper.make_tensor_value_info(value.name, kind, dims)

    def _append(self, operator: str, inputs: list[str], output: str, **attributes: int) -> None:
        self.graph.node.append(helper.make_node(operator, inputs, [output], name=f"{output}/{operator}", **attributes))

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _scale(self, name: str, scale: np.ndarray | np.generic, zero_point: np.ndarray | np.generic) -> list[str]:
        return [self._constant(f"{name}/scale", scale), self._constant(f"{name}/zero_point", zero_point)]

    def _encoding_of(self, name: str) -> list[str]:
        """Names of the scale and zero point of an activation, which all of its conversions share."""
        if name not in self.scales:
            encoding = self.encodings[name]
            self.scales[name] = self._scale(name, np.float32(encoding.scale), encoding.zero)
        return self.scales[name]

    def _decode(self, name: str, inputs: list[str], **attributes: int) -> None:
        self.decoded[name] = f"{name}/decoded"
        self._append("DequantizeLinear", inputs, f"{name}/decoded", **attributes)

    def _decode_activation(self, name: str, codes: str) -> None:
        self._decode(name, [codes, *self._encoding_of(name)])

    def _encode_result(self, node: onnx.NodeProto, name: str, codes: str) -> None:
        encoding = self.encodings[name]
        # A cache and its new entries share an encoding (`MOVES`), so their codes can be joined as they are.
        joins = node.op_type == "Concat" and all(self.encodings[part].dtype == encoding.dtype for part in node.input)
        value = self._float(name)
        if encoding.dtype != "uint16" and not joins:
            # Operators have unsigned 16-bit outputs; any other type needs a conversion of its own, from an encoding of
            # the same range.
            wide = f"{name}/wide"
            limits = np.iinfo(encoding.dtype)
            ends = [(limit - encoding.zero_point) * encoding.scale for limit in (limits.min, limits.max)]
            self.encodings[wide] = Encoding.of((ends[0], ends[1]))
            self._append("QuantizeLinear", [value, *self._encoding_of(wide)], f"{wide}/codes")
            self._decode_activation(wide, f"{wide}/codes")
            value = self.decoded[wide]
        self._append("QuantizeLinear", [value, *self._encoding_of(name)], codes)
        self._decode_activation(name, codes)

    def _input(self, node: onnx.NodeProto, place: int) -> str:
        name = node.input[place]
        if name in self.decoded or name == "":
            return self.decoded.get(name, name)
        tensor = self.constants[name]
        if tensor.data_type != TensorProto.FLOAT:
            if name not in {constant.name for constant in self.graph.initializer}:
                self.graph.initializer.append(tensor)
            return name
        if name in self.codes:
            self._decode_weight(name, self.codes[name])
        else:
            self._decode_constant(name, numpy_helper.to_array(tensor))
        return self.decoded[name]

    def _decode_weight(self, name: str, weight: WeightCodes) -> None:
        """A matrix with symmetric codes: a constant, or an input of the graph if it has a single scale."""
        dtype = np.dtype(int4 if weight.bits == 4 else np.int8)
        if weight.axis is None:
            kind = helper.np_dtype_to_tensor_dtype(dtype)
            self.graph.input.append(helper.make_tensor_value_info(name, kind, weight.codes.shape))
        else:
            self._constant(name, weight.codes.astype(dtype))
        if weight.multiples is not None:
            self._decode_groups(name, weight, dtype)
            return
        attributes = {} if weight.axis is None else {"axis": weight.axis}
        scale = self._scale(name, weight.scales, np.zeros(weight.scales.shape, dtype))
        self._decode(name, [name, *scale], **attributes)

    def _decode_groups(self, name: str, weight: WeightCodes, dtype: np.dtype) -> None:
        """A matrix with a scale per group: the compiler knows this pair of decoders, and only before a MatMul.

        Before a Gemm without transposition it compiles them to something wrong (QAIRT 2.51).
        """
        multiples = self._constant(f"{name}/multiples", weight.multiples)
        scale = self._scale(name, weight.scales, np.zeros(weight.scales.shape, np.uint8))
        steps = f"{name}/steps"
        self._append("DequantizeLinear", [multiples, *scale], steps, axis=weight.axis)
        zeros = self._constant(f"{steps}/zero_point", np.zeros(weight.multiples.shape, dtype))
        self._decode(name, [name, steps, zeros], axis=0, block_size=weight.format.group_size)

    def _decode_constant(self, name: str, values: np.ndarray) -> None:
        """Biases, norm weights and single numbers: 16 bits."""
        encoding = constant_encoding(values)
        codes = self._constant(f"{name}/codes", encoding.encode(values))
        self._decode(name, [codes, *self._scale(name, np.float32(encoding.scale), encoding.zero)])

    def _drop_unused_decoders(self) -> None:
        """Drops the decoders of outputs that no operator reads."""
        used = {name for node in self.graph.node for name in node.input}
        kept = [node for node in self.graph.node if node.op_type != "DequantizeLinear" or node.output[0] in used]
        del self.graph.node[:]
        self.graph.node.extend(kept)


def apply_codes(model: onnx.ModelProto, codes: Mapping[str, WeightCodes]) -> None:
    """Replaces the matrices of a float graph by their rounded values, so that only activations differ from QDQ."""
    for tensor in model.graph.initializer:
        if tensor.name in codes:
            tensor.CopyFrom(numpy_helper.from_array(codes[tensor.name].decode().astype(np.float32), tensor.name))
