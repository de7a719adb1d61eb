"""Writes float graphs with AIMET `.encodings`, for Qualcomm's own converter (QAIRT).

`qairt-converter --input_network X.onnx --quantization_overrides X.encodings` turns them into the QDQ graphs'
equivalent; their matrices have the values of the codes. The layout is AIMET's version 1.0.0, in which
`value = (code + offset) * scale` for codes from zero upwards.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from conversion.qnn.qdq.encoding import Encoding, WeightCodes, constant_encoding
from conversion.qnn.qdq.stored_graphs import ConstantStore

VERSION = "1.0.0"


def save_with_encodings(
    model: onnx.ModelProto,
    encodings: Mapping[str, Encoding],
    codes: Mapping[str, WeightCodes],
    store: ConstantStore,
    path: Path,
) -> Path:
    """Writes a float graph as `path` and its encodings as `<name>.encodings`; its weights go to `store`.

    Args:
        model: is changed: its weights move to the store, and those with one scale become inputs of the graph.
        encodings, codes: as `quantize_graph` takes them.
    """
    parameters = []
    for tensor in model.graph.initializer:
        if tensor.name in codes:
            parameters.append(_weight_entry(tensor.name, codes[tensor.name]))
        elif tensor.data_type == onnx.TensorProto.FLOAT:
            parameters.append(_tensor_entry(tensor.name, constant_encoding(numpy_helper.to_array(tensor))))
    activations = [_tensor_entry(name, encoding) for name, encoding in encodings.items()]
    content = {
        "version": VERSION,
        "activation_encodings": activations,
        "param_encodings": parameters,
        "quantizer_args": {
            "activation_bitwidth": 16, "param_bitwidth": 4, "dtype": "int", "is_symmetric": True,
            "per_channel_quantization": True, "quant_scheme": "min_max",
        },
    }  # fmt: skip
    path.with_suffix(".encodings").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _pass_in_from_outside(model.graph, {name for name, weight in codes.items() if weight.axis is None})
    return store.save(model, path)


def _tensor_entry(name: str, encoding: Encoding) -> dict[str, Any]:
    """One encoding for a whole tensor; AIMET's signed codes are symmetric, with one code fewer."""
    limits = np.iinfo(encoding.dtype)
    offset = -limits.max if limits.min < 0 else -encoding.zero_point
    return _entry(name, "PER_TENSOR", limits.bits, limits.min < 0, [encoding.scale], int(offset))


def _weight_entry(name: str, weight: WeightCodes) -> dict[str, Any]:
    kind = "PER_TENSOR" if weight.axis is None else "PER_CHANNEL" if weight.multiples is None else "LPBQ"
    scales = [float(scale) for scale in np.atleast_1d(weight.scales)]
    if weight.multiples is None:
        return _entry(name, kind, weight.bits, True, scales, 1 - 2 ** (weight.bits - 1))
    return {
        **_entry(name, kind, 2 * weight.bits, True, scales, -(2 ** (2 * weight.bits - 1))),
        "compressed_bw": weight.bits,
        "block_size": weight.format.group_size,
        "per_block_int_scale": weight.multiples.T.ravel().tolist(),  # channel by channel
    }


def _entry(name: str, kind: str, bits: int, symmetric: bool, scales: list[float], offset: int) -> dict[str, Any]:
    return {
        "name": name, "enc_type": kind, "dtype": "INT", "bw": bits, "is_sym": symmetric, "scale": scales,
        "offset": [offset] * len(scales),
    }  # fmt: skip


def _pass_in_from_outside(graph: onnx.GraphProto, names: set[str]) -> None:
    """Makes inputs of the constants in `names`."""
    for tensor in [tensor for tensor in graph.initializer if tensor.name in names]:
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        graph.initializer.remove(tensor)
