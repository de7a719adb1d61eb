"""Which matrices have 8 bits instead of 4, by the damage that 4 bits do to each on calibration requests."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from conversion.qnn.graphs.chunked_decoder import DecoderShape
from conversion.qnn.graphs.decoder_graph import DecoderGraph
from conversion.qnn.graphs.names import is_lora
from conversion.qnn.graphs.rotation import Rotation
from conversion.qnn.qdq.block_rounding import States, input_hessians, run_block, walk_blocks
from conversion.qnn.qdq.encoding import WeightFormat
from conversion.qnn.qdq.matrix_rounding import output_error, round_matrix
from conversion.quantization.budget import spend

logger = logging.getLogger(__name__)
REQUESTS = 4  # of each view; more hardly change the order
EIGHT = WeightFormat(8)
HEAD = "head.weight"


@dataclass(frozen=True)
class Damage:
    """What 4 bits do to one matrix of the base."""

    index: int  # of its block, or the number of blocks for the head
    name: str  # in its block
    weights: int  # with those of its copy in a replicated block, which has the same format
    error: float  # squared, of the block's output relative to that output, by token; of the logits for the head


class PrecisionPlan:
    """The format of each matrix of the base: `four_bits`, or 8 bits for those named in `eight_bits`."""

    def __init__(self, four_bits: WeightFormat, eight_bits: Mapping[int, list[str]]):
        self.four_bits, self.eight_bits = four_bits, eight_bits

    def __call__(self, index: int, name: str) -> WeightFormat:
        return EIGHT if name in self.eight_bits.get(index, ()) else self.four_bits


def choose_eight_bits(damages: list[Damage], four_bits: WeightFormat, bits: float) -> dict[int, list[str]]:
    """Names by block of the matrices that get 8 bits: most damage per byte first, up to `bits` for all together.

    Raises `ValueError` for fewer than 4 bits of each weight take.
    """
    ordered = sorted(damages, key=lambda damage: (damage.index, damage.name))
    ladders = {
        (damage.index, damage.name): [
            (damage.weights * four_bits.bits_per_weight, damage.error),
            (damage.weights * EIGHT.bits_per_weight, 0.0),
        ]
        for damage in ordered
    }
    chosen: dict[int, list[str]] = {}
    for (index, name), place in spend(ladders, bits).items():
        if place:
            chosen.setdefault(index, []).append(name)
    return chosen


def measure_damage(
    views: Mapping[str, Any],
    shape: DecoderShape,
    streams: Mapping[str, list[np.ndarray]],
    rotation: Rotation,
    four_bits: WeightFormat,
    copied: Collection[int] = (),
) -> list[Damage]:
    """Rounds every matrix of the base alone to 4 bits and measures the worse of both views, block by block.

    `copied` are the replicated blocks.
    """
    damages: list[Damage] = []
    few = {view: streams[view][:REQUESTS] for view in views}

    def visit(index: int, graphs: Mapping[str, DecoderGraph], states: States) -> None:
        outputs = {view: [run_block(graph.blocks[0], x) for x in states[view]] for view, graph in graphs.items()}
        for name, weight in graphs["text"].named_buffers():
            if weight.ndim != 2 or is_lora(name):
                continue
            if name == HEAD:
                codes = round_matrix(weight, four_bits)
                error = max(output_error(weight, codes, input_hessians(graphs[v], states[v])[name]) for v in views)
                damages.append(Damage(shape.num_blocks, name, weight.numel(), error))
                continue
            error = max(_block_error(graphs[view], name, four_bits, states[view], outputs[view]) for view in views)
            count = weight.numel() * (1 + (index in copied))
            damages.append(Damage(index, name.removeprefix("blocks.0."), count, error))

    walk_blocks(views, shape, range(shape.num_blocks), few, rotation, visit)
    return damages


def _block_error(
    graph: DecoderGraph, name: str, form: WeightFormat, states: list[torch.Tensor], outputs: list[torch.Tensor]
) -> float:
    """Mean over tokens of the squared error of a block's output, relative to that output, with one matrix rounded."""
    weight = graph.get_buffer(name)
    exact = weight.clone()
    weight.copy_(torch.from_numpy(round_matrix(weight, form).decode()))
    errors = [
        (run_block(graph.blocks[0], x) - out).square().sum(-1) / out.square().sum(-1)
        for x, out in zip(states, outputs, strict=True)
    ]
    weight.copy_(exact)
    return float(torch.cat(errors, dim=1).mean())
