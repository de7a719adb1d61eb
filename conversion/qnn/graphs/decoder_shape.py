"""Derives the shape of the graphs from a loaded base, and refuses bases that they cannot reproduce."""

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from conversion.qnn.graphs.chunked_decoder import DecoderShape, causal_mask
from conversion.qnn.graphs.decoder_graph import Block, DecoderGraph
from conversion.qnn.graphs.supported_bases import check_structure, rotary_frequencies
from modeling_genieblue.language_adapter_genieblue import find_blocks

TOKENS = 24  # in each comparison of blocks
MARGIN = 20.0  # masked scores are at least this far below visible ones, so that softmax makes them zero
EMPTY_SLOTS = 8  # of the cache, which no token may see
# Relative to the largest number that a block adds (both in 32 bits), to the largest logit (by the bits of the base),
# and to the norm of all logits, in which the noise of 16 bits averages out.
BLOCK_TOLERANCE, LOGITS_TOLERANCE, SCALE_TOLERANCE = 1e-3, {32: 1e-3, 16: 5e-2}, 5e-3
ROTARY_TOLERANCE = 1e-2  # of cosines and sines in 16 bits


def make_decoder_shape(base: nn.Module, chunk_length: int, context_length: int) -> DecoderShape:
    """The shape of `base`'s graphs.

    Whatever the base's name, each block is compared with its graph. Raises `ValueError` that says what the graphs
    cannot reproduce, and for impossible lengths.
    """
    config = base.config.get_text_config(decoder=True)
    check_lengths(config, chunk_length, context_length)
    check_structure(base, context_length)
    frequencies, scaling = rotary_frequencies(base)
    shape = DecoderShape(
        num_blocks=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=2 * len(frequencies),
        vocab_size=base.get_output_embeddings().weight.shape[0],
        rotary_frequencies=tuple(frequencies.tolist()),
        rotary_scaling=scaling,
    )
    return compare_with_graphs(base, shape, context_length)


def check_lengths(config: Any, chunk_length: int, context_length: int) -> None:
    """`ValueError` for impossible lengths in tokens, or for ones that exceed the limit of the base with `config`."""
    if chunk_length < 2:
        raise ValueError(f"The chunk length is {chunk_length}: expected 2 tokens or more (128 is usual).")
    if context_length <= chunk_length:
        raise ValueError(
            f"The context length is {context_length} and the chunk length {chunk_length}: the context must be longer "
            "than a chunk."
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and context_length > limit:
        raise ValueError(f"The context length is {context_length}, but the base supports at most {limit} tokens.")


def compare_with_graphs(
    view: nn.Module, shape: DecoderShape, context_length: int, title: str | None = None
) -> DecoderShape:
    """`ValueError` unless each block of a view, and the head after the last, computes what its graph computes.

    Compared at the first and the last positions of a context. The base itself is the text view; in the multimodal
    view, PEFT's layers are compared too. `title` names the view. Returns `shape` with a mask large enough for the
    scores of this view too.
    """
    title = title or type(view).__name__
    try:
        for first in (0, context_length - TOKENS):
            if first >= 0:
                shape = _compare_at(view, shape, first, title)
    except RuntimeError as error:  # matrices that do not fit together
        raise ValueError(
            f"{title} cannot be exported to QNN: its blocks have an unexpected form ({error})."
        ) from error
    return shape


@torch.no_grad()
def _compare_at(view: nn.Module, shape: DecoderShape, first: int, title: str) -> DecoderShape:
    ids = torch.arange(TOKENS, device=view.device)[None] * 7 % shape.vocab_size
    embeddings = view.get_input_embeddings()(ids)
    calls, logits = _watch_blocks(view, embeddings, first)
    _, blocks = find_blocks(view)
    arguments, options = calls[0]
    if not torch.equal(arguments[0] if arguments else options["hidden_states"], embeddings):
        raise ValueError(
            f"{title} cannot be exported to QNN: it changes the embeddings before its first block (it scales or "
            "normalizes them), which the graphs do not."
        )
    for index, (block, (arguments, options)) in enumerate(zip(blocks, calls, strict=True)):
        arguments, options = _in_float32((arguments, options))
        options = _with_exact_rotary(options, shape, first)
        x = arguments[0] if arguments else options["hidden_states"]
        own = copy.deepcopy(block).float()(*arguments, **options)
        own = own if isinstance(own, torch.Tensor) else own[0]
        graph = DecoderGraph(view, shape, index, index + 1).blocks[0].to(x.device)
        shape = replace(shape, masked=min(shape.masked, -math.ceil(2 * graph.largest_score(x) + MARGIN)))
        found = _run_block(graph, x, shape, first)
        error, size = (found - own).abs().max(), (own - x).abs().max()
        if not error <= BLOCK_TOLERANCE * size:
            raise ValueError(
                f"{title} cannot be exported to QNN: on {TOKENS} tokens from position {first} its block {index} "
                f"({type(block).__name__}) differs from a Llama-style block with its weights: it adds up to "
                f"{size:.3g}, and the difference is up to {error:.3g}."
            )
    end = DecoderGraph(view, shape, shape.num_blocks).to(found.device)
    found = end.head(end.final_norm(own))
    error, size = (found - logits).abs().max(), logits.abs().max()
    tolerance = LOGITS_TOLERANCE[32 if view.dtype == torch.float32 else 16]
    factor = (found * logits).sum() / logits.square().sum()
    if not (error <= tolerance * size and abs(factor - 1) <= SCALE_TOLERANCE):
        raise ValueError(
            f"{title} cannot be exported to QNN: after its blocks it computes something other than a norm and an LM "
            f"head: logits of up to {size:.3g} differ by up to {error:.3g}, overall by a factor of {factor:.3g}."
        )
    return shape


def _watch_blocks(
    view: nn.Module, embeddings: torch.Tensor, first: int
) -> tuple[list[tuple[tuple, dict]], torch.Tensor]:
    """The arguments of each block of `view` for embeddings from position `first` on, and the logits."""
    calls: list[tuple[tuple, dict]] = []
    _, blocks = find_blocks(view)

    def note(_block: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        calls.append((arguments, options))

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    positions = torch.arange(first, first + embeddings.shape[1], device=embeddings.device)[None]
    try:
        seen = torch.ones_like(positions)
        logits = view(inputs_embeds=embeddings, position_ids=positions, attention_mask=seen, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return calls, logits.float()


def _in_float32(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _in_float32(item) for key, item in value.items()}
    return type(value)(map(_in_float32, value)) if type(value) in (tuple, list) else value


def _rotary_embedding(shape: DecoderShape, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines from position `first` on, each (`TOKENS`, head_dim / 2), in 32 bits."""
    angles = torch.arange(first, first + TOKENS, dtype=torch.float32)[:, None] * torch.tensor(shape.rotary_frequencies)
    return angles.cos() * shape.rotary_scaling, angles.sin() * shape.rotary_scaling


def _with_exact_rotary(options: dict[str, Any], shape: DecoderShape, first: int) -> dict[str, Any]:
    """Arguments of a block, with cosines and sines as exact as in the graph.

    A 16-bit base rounds them before its blocks, which alone exceeds the tolerance for a block.
    """
    given = options.get("position_embeddings")
    if not isinstance(given, tuple) or len(given) != 2:
        return options
    exact = tuple(torch.cat([part, part], dim=1)[None].to(given[0].device) for part in _rotary_embedding(shape, first))
    for found, expected in zip(given, exact, strict=True):
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=ROTARY_TOLERANCE):
            return options
    return {**options, "position_embeddings": exact}


def _run_block(block: Block, x: torch.Tensor, shape: DecoderShape, first: int) -> torch.Tensor:
    """A graph's block on (1, `TOKENS`, hidden_size), after an empty cache."""
    groups, size = shape.num_key_value_heads, shape.head_dim
    mask = torch.from_numpy(causal_mask(TOKENS, 0, EMPTY_SLOTS + TOKENS, shape.masked))
    rotary = (part[None, None] for part in _rotary_embedding(shape, first))
    empty = x.new_zeros(1, groups, size, EMPTY_SLOTS), x.new_zeros(1, groups, EMPTY_SLOTS, size)
    return block(x, *(other.to(x.device) for other in (mask, *rotary)), *empty)[0]
