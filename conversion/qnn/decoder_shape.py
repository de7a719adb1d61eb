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


def make_decoder_shape(base: nn.Module, chunk_length: int, context_length: int) -> DecoderShape:
    """The shape of `base`'s graphs.

    Whether they compute what the base computes is tried block by block, whatever the base calls itself. Raises
    `ValueError` with what they cannot reproduce, and for lengths that cannot be.
    """
    _check_lengths(chunk_length, context_length)
    refuse_unsupported_structure(base, context_length)
    config = base.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and context_length > limit:
        raise ValueError(f"The context length is {context_length}, but the base was made for at most {limit} tokens.")
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
    _refuse_other_arithmetic(base, shape)
    return shape


def _check_lengths(chunk_length: int, context_length: int) -> None:
    if chunk_length < 2:
        raise ValueError(f"The chunk length is {chunk_length}: expected 2 tokens or more (128 is usual).")
    if context_length <= chunk_length:
        raise ValueError(
            f"The context length is {context_length} and the chunk length {chunk_length}: the context must be longer "
            "than a chunk."
        )


@torch.no_grad()
def _refuse_other_arithmetic(base: nn.Module, shape: DecoderShape) -> None:
    """`ValueError` unless each block, and what comes behind the last one, says what its graph says."""
    ids = torch.arange(TOKENS, device=base.device)[None] * 7 % shape.vocab_size
    embeddings = base.get_input_embeddings()(ids)
    calls, logits = _watch_blocks(base, embeddings)
    _, blocks = find_blocks(base)
    arguments, options = calls[0]
    if not torch.equal(arguments[0] if arguments else options["hidden_states"], embeddings):
        raise ValueError(
            f"{type(base).__name__} cannot be exported to QNN: it changes the embeddings that it is given before its "
            "first block (it scales or normalizes them), which the graphs do not."
        )
    for index, (block, (arguments, options)) in enumerate(zip(blocks, calls, strict=True)):
        arguments, options = _in_float32((arguments, options))
        x = arguments[0] if arguments else options["hidden_states"]
        own = copy.deepcopy(block).float()(*arguments, **options)
        own = own if isinstance(own, torch.Tensor) else own[0]
        found = _run_block(Block(block, shape).to(x.device), x, shape)
        error, size = (found - own).abs().max(), (own - x).abs().max()
        if not error <= BLOCK_TOLERANCE * size:
            raise ValueError(
                f"{type(base).__name__} cannot be exported to QNN: on {TOKENS} tokens its block {index} "
                f"({type(block).__name__}) computes something else than a Llama-style block with its weights does: "
                f"it adds up to {size:.3g}, and they differ by up to {error:.3g}."
            )
    end = DecoderGraph(base, shape, shape.num_blocks).to(found.device)
    error, size = (end.head(end.final_norm(own)) - logits).abs().max(), logits.abs().max()
    if not error <= LOGITS_TOLERANCE * size:
        raise ValueError(
            f"{type(base).__name__} cannot be exported to QNN: behind its blocks it computes something else than a "
            f"norm and an LM head: logits of up to {size:.3g} differ by up to {error:.3g}."
        )


def _watch_blocks(base: nn.Module, embeddings: torch.Tensor) -> tuple[list[tuple[tuple, dict]], torch.Tensor]:
    """What each block of `base` is called with for some embeddings, and the logits, (1, tokens, vocabulary)."""
    calls: list[tuple[tuple, dict]] = []
    _, blocks = find_blocks(base)

    def note(_block: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        calls.append((arguments, options))

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        logits = base(inputs_embeds=embeddings, use_cache=False).logits.float()
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


def _run_block(block: Block, x: torch.Tensor, shape: DecoderShape) -> torch.Tensor:
    """A graph's block on (1, tokens, hidden_size), with nothing cached."""
    tokens, groups, size = x.shape[1], shape.num_key_value_heads, shape.head_dim
    angles = torch.arange(tokens, dtype=torch.float32)[:, None] * torch.tensor(shape.rotary_frequencies)
    turns = ((angles.cos() * shape.rotary_scaling)[None, None], (angles.sin() * shape.rotary_scaling)[None, None])
    others = torch.from_numpy(causal_mask(tokens, 0, tokens)), *turns
    empty = x.new_zeros(1, groups, size, 0), x.new_zeros(1, groups, 0, size)
    return block(x, *(other.to(x.device) for other in others), *empty)[0]


__all__ = ["make_decoder_shape"]
