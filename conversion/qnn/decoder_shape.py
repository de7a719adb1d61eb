"""From a loaded base to the shape of its graphs, after everything that they could not reproduce has been refused."""

import copy
from typing import Any

import torch
from torch import nn

from conversion.qnn.chunked_decoder import DecoderShape, causal_mask
from conversion.qnn.decoder_graph import Block, DecoderGraph
from conversion.qnn.supported_bases import refuse_unsupported_structure, rotary_frequencies
from modeling_genieblue.language_views_genieblue import find_blocks

TOKENS = 24  # that blocks are compared on
# Of the largest number that a block adds, both in 32 bits; and of the largest logit, where the base has 16 bits.
BLOCK_TOLERANCE, LOGITS_TOLERANCE = 1e-3, 5e-2
TURNS_TOLERANCE = 1e-2  # of cosines and sines in 16 bits


def make_decoder_shape(base: nn.Module, chunk_length: int, context_length: int) -> DecoderShape:
    """The shape of `base`'s graphs.

    Whether they compute what the base computes is tried block by block, whatever the base calls itself. Raises
    `ValueError` with what they cannot reproduce, and for lengths that cannot be.
    """
    config = base.config.get_text_config(decoder=True)
    check_lengths(config, chunk_length, context_length)
    refuse_unsupported_structure(base, context_length)
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
    refuse_other_arithmetic(base, shape)
    return shape


def check_lengths(config: Any, chunk_length: int, context_length: int) -> None:
    """`ValueError` for lengths in tokens that cannot be, or that are beyond what a base with `config` was made for."""
    if chunk_length < 2:
        raise ValueError(f"The chunk length is {chunk_length}: expected 2 tokens or more (128 is usual).")
    if context_length <= chunk_length:
        raise ValueError(
            f"The context length is {context_length} and the chunk length {chunk_length}: the context must be longer "
            "than a chunk."
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and context_length > limit:
        raise ValueError(f"The context length is {context_length}, but the base was made for at most {limit} tokens.")


@torch.no_grad()
def refuse_other_arithmetic(view: nn.Module, shape: DecoderShape, title: str | None = None) -> None:
    """`ValueError` unless each block of a view, and what comes behind the last one, says what its graph says.

    The base itself is the text view; what PEFT has put into the multimodal one counts as well. `title` names it.
    """
    title = title or type(view).__name__
    ids = torch.arange(TOKENS, device=view.device)[None] * 7 % shape.vocab_size
    embeddings = view.get_input_embeddings()(ids)
    calls, logits = _watch_blocks(view, embeddings)
    _, blocks = find_blocks(view)
    arguments, options = calls[0]
    if not torch.equal(arguments[0] if arguments else options["hidden_states"], embeddings):
        raise ValueError(
            f"{title} cannot be exported to QNN: it changes the embeddings that it is given before its "
            "first block (it scales or normalizes them), which the graphs do not."
        )
    for index, (block, (arguments, options)) in enumerate(zip(blocks, calls, strict=True)):
        arguments, options = _in_float32((arguments, options))
        options = _with_exact_turns(options, shape)
        x = arguments[0] if arguments else options["hidden_states"]
        own = copy.deepcopy(block).float()(*arguments, **options)
        own = own if isinstance(own, torch.Tensor) else own[0]
        graph = DecoderGraph(view, shape, index, index + 1).blocks[0]
        found = _run_block(graph.to(x.device), x, shape)
        error, size = (found - own).abs().max(), (own - x).abs().max()
        if not error <= BLOCK_TOLERANCE * size:
            raise ValueError(
                f"{title} cannot be exported to QNN: on {TOKENS} tokens its block {index} "
                f"({type(block).__name__}) computes something else than a Llama-style block with its weights does: "
                f"it adds up to {size:.3g}, and they differ by up to {error:.3g}."
            )
    end = DecoderGraph(view, shape, shape.num_blocks).to(found.device)
    error, size = (end.head(end.final_norm(own)) - logits).abs().max(), logits.abs().max()
    if not error <= LOGITS_TOLERANCE * size:
        raise ValueError(
            f"{title} cannot be exported to QNN: behind its blocks it computes something else than a "
            f"norm and an LM head: logits of up to {size:.3g} differ by up to {error:.3g}."
        )


def _watch_blocks(view: nn.Module, embeddings: torch.Tensor) -> tuple[list[tuple[tuple, dict]], torch.Tensor]:
    """What each block of `view` is called with for some embeddings, and the logits, (1, tokens, vocabulary)."""
    calls: list[tuple[tuple, dict]] = []
    _, blocks = find_blocks(view)

    def note(_block: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        calls.append((arguments, options))

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        logits = view(inputs_embeds=embeddings, use_cache=False).logits.float()
    finally:
        for handle in handles:
            handle.remove()
    return calls, logits


def _in_float32(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _in_float32(item) for key, item in value.items()}
    return type(value)(map(_in_float32, value)) if type(value) in (tuple, list) else value


def _turns(shape: DecoderShape, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the first positions, each (tokens, head_dim / 2), in 32 bits."""
    angles = torch.arange(tokens, dtype=torch.float32)[:, None] * torch.tensor(shape.rotary_frequencies)
    return angles.cos() * shape.rotary_scaling, angles.sin() * shape.rotary_scaling


def _with_exact_turns(options: dict[str, Any], shape: DecoderShape) -> dict[str, Any]:
    """What a block is called with, cosines and sines of the same angles as exact as the graph has them.

    A base in 16 bits rounds them before its blocks, which is more than a block may differ by.
    """
    given = options.get("position_embeddings")
    if not isinstance(given, tuple) or len(given) != 2:
        return options
    exact = tuple(torch.cat([turn, turn], dim=1)[None].to(given[0].device) for turn in _turns(shape, TOKENS))
    for found, expected in zip(given, exact, strict=True):
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=TURNS_TOLERANCE):
            return options
    return {**options, "position_embeddings": exact}


def _run_block(block: Block, x: torch.Tensor, shape: DecoderShape) -> torch.Tensor:
    """A graph's block on (1, tokens, hidden_size), with nothing cached."""
    tokens, groups, size = x.shape[1], shape.num_key_value_heads, shape.head_dim
    turns = (turn[None, None] for turn in _turns(shape, tokens))
    others = torch.from_numpy(causal_mask(tokens, 0, tokens)), *turns
    empty = x.new_zeros(1, groups, size, 0), x.new_zeros(1, groups, 0, size)
    return block(x, *(other.to(x.device) for other in others), *empty)[0]


__all__ = ["check_lengths", "make_decoder_shape", "refuse_other_arithmetic"]
