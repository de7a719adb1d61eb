"""Rounds the matrices of both views, block by block, on the inputs that the rounded blocks before them give.

A matrix that both views have gets the same codes, calibrated on the inputs of both; replicated blocks and LoRA get
their own.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from conversion.qnn.graphs.chunked_decoder import DecoderShape, causal_mask
from conversion.qnn.graphs.decoder_graph import Block, DecoderGraph, Projection
from conversion.qnn.graphs.names import is_lora
from conversion.qnn.graphs.rotation import Rotation
from conversion.qnn.qdq.encoding import WeightCodes, WeightFormat, round_to_nearest
from conversion.qnn.qdq.matrix_rounding import round_matrix

LORA_BITS = 8
Hessians = dict[str, torch.Tensor]  # by the name of a matrix
States = dict[str, list[torch.Tensor]]  # by view, each (1, tokens, hidden_size)
# (index of the block or, for the head, the number of blocks; name of a matrix) → its format
FormatOf = Callable[[int, str], WeightFormat]
BaseCodes = Callable[[int, str], WeightCodes]  # of a matrix of the base, by the same
# (index, float graphs of one block by view, with the head after the last; their inputs)
Visit = Callable[[int, Mapping[str, DecoderGraph], States], None]


@torch.no_grad()
def walk_blocks(
    views: Mapping[str, Any],
    shape: DecoderShape,
    blocks: range,
    streams: Mapping[str, list[np.ndarray]],
    rotation: Rotation,
    visit: Visit,
) -> None:
    """Calls `visit` for each block of both views, and reads the requests on through what it leaves of them.

    Args:
        streams: by view, the inputs (tokens, hidden_size) of the first block, rotated.
        visit: may change the matrices.
    """
    states: States = {view: [torch.from_numpy(stream)[None] for stream in streams[view]] for view in views}
    for index in blocks:
        graphs = {view: DecoderGraph(module, shape, index, index + 1, rotation) for view, module in views.items()}
        visit(index, graphs, states)
        for view, graph in graphs.items():
            states[view] = [run_block(graph.blocks[0], x) for x in states[view]]


def run_block(block: Block, x: torch.Tensor) -> torch.Tensor:
    """A block's hidden states for a whole request, (1, tokens, hidden_size), at once."""
    shape, tokens = block.shape, x.shape[1]
    cos, sin = (torch.from_numpy(part) for part in shape.cosines_and_sines(np.arange(tokens)))
    mask = torch.from_numpy(causal_mask(tokens, 0, tokens, shape.masked))
    key = x.new_zeros(1, shape.num_key_value_heads, shape.head_dim, 0)
    return block(x, mask, cos, sin, key, key.transpose(2, 3))[0]


def input_hessians(graph: DecoderGraph, states: list[torch.Tensor]) -> Hessians:
    """`X^T X` per token of the inputs of each matrix of a block.

    What is added to hidden states counts relative to them, since a norm divides by them next: otherwise the few
    tokens with huge states would decide alone.
    """
    (block,) = graph.blocks
    sums: dict[str, torch.Tensor] = {}
    tokens = sum(x.shape[1] for x in states)
    for x in states:
        with _inputs(block) as seen:
            out = run_block(block, x)
        added = out[0].square().mean(-1, keepdim=True).rsqrt()
        if graph.head is not None:
            seen["head"] = graph.final_norm(out)[0]
        for name, rows in seen.items():
            rows = rows * added if name in ("o_proj", "down_proj") else rows
            product = rows.t() @ rows / tokens
            sums[name] = sums[name] + product if name in sums else product
    return {"head.weight" if name == "head" else f"blocks.0.{name}.weight": found for name, found in sums.items()}


@contextmanager
def _inputs(block: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The inputs (tokens, in) of a block's matrices by name, from its next run."""
    seen: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable:
        return lambda _module, inputs: seen.update({name: inputs[0][0]})

    handles = [
        child.register_forward_pre_hook(note(name))
        for name, child in block.named_children()
        if isinstance(child, Projection)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def round_blocks(
    views: Mapping[str, Any],
    shape: DecoderShape,
    blocks: range,
    streams: Mapping[str, list[np.ndarray]],
    rotation: Rotation,
    format_of: FormatOf,
    *,
    gptq: bool,
    lora_as_inputs: bool = False,
    base_codes: BaseCodes | None = None,
) -> dict[str, dict[str, WeightCodes]]:
    """Codes by view and by the names of a graph over `blocks`; arguments as for `walk_blocks`.

    Args:
        gptq: whether 4-bit codes make up for each other's errors; those of 8 bits are always the nearest.
        lora_as_inputs: gives each LoRA matrix a single scale, which the NPU needs of an input.
        base_codes: the base's matrices, rounded before; only those of replicated blocks are rounded then.
    """
    codes: dict[str, dict[str, WeightCodes]] = {view: {} for view in views}

    def visit(index: int, graphs: Mapping[str, DecoderGraph], states: States) -> None:
        def title_of(name: str) -> str:
            return name.replace("blocks.0.", f"blocks.{index - blocks.start}.", 1)

        hessians: dict[str, Hessians] = {}
        matrices = {view: {n: v for n, v in graph.named_buffers() if v.ndim == 2} for view, graph in graphs.items()}
        for view, own in matrices.items():
            for name, weight in own.items():
                title = title_of(name)
                if title in codes[view]:
                    continue
                if is_lora(name):
                    axis = None if lora_as_inputs else 1
                    codes[view][title] = round_to_nearest(weight.numpy(), LORA_BITS, axis)
                    continue
                users = [other for other in views if torch.equal(matrices[other][name], weight)]
                place = shape.num_blocks if name == "head.weight" else index, name.removeprefix("blocks.0.")
                if base_codes is not None and "text" in users:
                    rounded = base_codes(*place)
                else:
                    form, hessian = format_of(*place), None
                    if gptq and form.bits == 4:
                        hessians = hessians or {v: input_hessians(graph, states[v]) for v, graph in graphs.items()}
                        hessian = torch.stack([hessians[user][name] for user in users]).sum(0)
                    rounded = round_matrix(weight, form, hessian)
                for user in users:
                    codes[user][title] = rounded
        for view, own in matrices.items():
            for name, weight in own.items():
                weight.copy_(torch.from_numpy(np.asarray(codes[view][title_of(name)].decode(), np.float32)))

    walk_blocks(views, shape, blocks, streams, rotation, visit)
    return codes
