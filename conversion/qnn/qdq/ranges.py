"""Measures the range of every tensor in a float graph on real requests."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from conversion.qnn.npu.sessions import cpu_options
from conversion.qnn.qdq.encoding import Range
from conversion.qnn.qdq.stored_graphs import ConstantStore


def union(*ranges: Range) -> Range:
    """The smallest range that includes all of them."""
    return min(low for low, _ in ranges), max(high for _, high in ranges)


class RangeMeter:
    """Runs a float graph and records the minimum and maximum of each tensor.

    The reductions are part of the graph, so the tensors themselves are never outputs.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path):
        """`folder` gets the graph with reductions, which ONNX Runtime reads from disk."""
        self.output_names = [value.name for value in model.graph.output]
        self.ranges: dict[str, Range] = {}
        path = folder / "watched.onnx"
        with ConstantStore(path.with_suffix(".data")) as store:
            watched = store.copy(model)
        graph = watched.graph
        self._watched = [value.name for value in graph.input]
        nodes = [reduction for name in self._watched for reduction in _reductions(name)]
        for node in model.graph.node:
            nodes.append(node)
            for name in node.output:
                self._watched.append(name)
                nodes += _reductions(name)
        del graph.node[:]
        graph.node.extend(nodes)
        for name in self._watched:
            for reduction in _reductions(name):
                graph.output.append(helper.make_tensor_value_info(reduction.output[0], TensorProto.FLOAT, []))
        path.write_bytes(watched.SerializeToString())
        options = cpu_options()
        # Keep the order of the nodes above: otherwise reductions run last, and every tensor stays in memory.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.enable_mem_pattern = False
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; updates `ranges`."""
        values = self._session.run(None, dict(feeds))
        count = len(self.output_names)
        for place, name in enumerate(self._watched):
            low, high = (float(value) for value in values[count + 2 * place : count + 2 * place + 2])
            if not np.isfinite(low) or not np.isfinite(high):
                raise ValueError(
                    f"The calibration found NaN or infinity in {name}: the model is damaged; fetch it again."
                )
            found = (low, high)
            self.ranges[name] = union(self.ranges[name], found) if name in self.ranges else found
        return dict(zip(self.output_names, values[:count], strict=True))


def _reductions(name: str) -> list[onnx.NodeProto]:
    """The nodes that compute the minimum and maximum of a tensor."""
    return [
        helper.make_node(operator, [name], [f"{name}/{operator}"], keepdims=0)
        for operator in ("ReduceMin", "ReduceMax")
    ]


def measure_ranges(
    model: onnx.ModelProto, feeds: Iterable[Mapping[str, np.ndarray]], folder: Path
) -> dict[str, Range]:
    """Ranges by tensor name over all `feeds`; `ValueError` if there are none."""
    meter = RangeMeter(model, folder)
    for inputs in feeds:
        meter.run(inputs)
    if not meter.ranges:
        raise ValueError("The calibration has no samples: give at least one request.")
    return meter.ranges
