"""Exports a torch module as static float ONNX, with the same names for every chunk length."""

import logging
import warnings
from collections.abc import Sequence

import onnx
import torch
from torch import nn

OPSET = 23  # the first with RMSNormalization
IR_VERSION = 10


@torch.no_grad()
def to_float_onnx(
    graph: nn.Module,
    example_inputs: Sequence[torch.Tensor],
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> onnx.ModelProto:
    """The ONNX of `graph` in the static shapes of `example_inputs`.

    Inner tensors are named by their position, so ranges measured on one graph fit another one of equal structure.
    """
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)  # warns at every export that torchvision is missing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph.eval(),
                tuple(example_inputs),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(input_names),
                output_names=list(output_names),
                verbose=False,
            )
            model = program.model_proto
    finally:
        noisy.setLevel(level)
    model.ir_version = IR_VERSION
    # The exporter's notes contain paths of this computer.
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    _rename_by_place(model.graph)
    return model


def _rename_by_place(graph: onnx.GraphProto) -> None:
    kept = {value.name for value in (*graph.input, *graph.output)}
    new_names = {}
    for place, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{place}"
        for number, name in enumerate(node.output):
            if name not in kept:
                new_names[name] = f"{node.name}_{number}"
    for node in graph.node:
        node.input[:] = [new_names.get(name, name) for name in node.input]
        node.output[:] = [new_names.get(name, name) for name in node.output]
    _give_each_its_constants(graph)


def _give_each_its_constants(graph: onnx.GraphProto) -> None:
    """Each node gets its own copy of the exporter's small constants, named after it.

    The exporter stores equal constants once, and which are equal depends on the lengths of a graph. Weights are named
    by the path of their module.
    """
    made = {tensor.name: tensor for tensor in graph.initializer if "." not in tensor.name}
    weights = [tensor for tensor in graph.initializer if "." in tensor.name]
    copies = []
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in made:
                copied = onnx.TensorProto()
                copied.CopyFrom(made[name])
                copied.name = f"{node.name}_input_{place}"
                copies.append(copied)
                node.input[place] = copied.name
    del graph.initializer[:]
    graph.initializer.extend([*weights, *copies])


def structure(model: onnx.ModelProto) -> list[tuple[str, ...]]:
    """Operators and their connections, without shapes: equal for graphs that may share ranges."""
    return [(node.op_type, *node.input, *node.output) for node in model.graph.node]
