"""Writes a GGUF file tensor by tensor, so that none but the one at hand is in memory."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

TYPES = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}


@torch.no_grad()
def write_gguf(
    path: Path,
    architecture: str,
    settings: Callable[[GGUFWriter], None],
    tensors: Mapping[str, tuple[torch.Size, torch.dtype]],
    read: Callable[[str], torch.Tensor],
) -> None:
    """Writes what `read` gives for each name in `tensors`, in order, with that shape and type.

    `settings` adds to the file's metadata. Raises `ValueError` for a tensor with NaN or infinity.
    """
    writer: Any = GGUFWriter(path, architecture)
    settings(writer)
    for name, (shape, dtype) in tensors.items():
        writer.add_tensor_info(
            name, tuple(shape), numpy.dtype(numpy.float32), shape.numel() * dtype.itemsize, raw_dtype=TYPES[dtype]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (_, dtype) in tensors.items():
        values = read(name).float().cpu().contiguous().numpy()
        if not numpy.isfinite(values).all():
            raise ValueError(f"{name} has NaN or infinity, so it is of no use: train the model again.")
        writer.write_tensor_data(quantize(values, TYPES[dtype]))
    writer.close()
