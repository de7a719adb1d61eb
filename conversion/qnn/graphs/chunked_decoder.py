"""Runs a request through static graphs: prompt in chunks, answer token by token, with a right-aligned cache.

NumPy only: this is the logic that an app on the phone has to repeat.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

# Added to the scores of hidden tokens, unless some score needs more: a larger number costs the scores some of their
# 16-bit resolution.
MASKED = -100.0

# (tokens per call, inputs by name) → outputs by name; caches have the dtype of the graph's inputs.
RunGraph = Callable[[int, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class DecoderShape:
    """What a caller of a decoder's graphs must know about it."""

    num_blocks: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rotary_frequencies: tuple[float, ...]  # radians per position, head_dim / 2 of them
    rotary_scaling: float  # factor on cosines and sines
    masked: float = MASKED  # added to the scores of tokens that must not be seen

    def cosines_and_sines(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both (1, 1, tokens, head_dim / 2) for whole-number positions (tokens,)."""
        angles = positions[:, None].astype(np.float32) * np.asarray(self.rotary_frequencies, np.float32)
        scaling = np.float32(self.rotary_scaling)
        return (np.cos(angles) * scaling)[None, None], (np.sin(angles) * scaling)[None, None]


def cache_names(blocks: Iterable[int], side: str) -> list[str]:
    """Names of the cache tensors of `blocks` at the `in` or `out` side of the graphs, keys and values in turn."""
    return [f"past_{kind}_{index}_{side}" for index in blocks for kind in ("key", "value")]


def boundary_names(shape: DecoderShape, blocks: range) -> tuple[str, str]:
    """Names of the first input and the first output of graphs over `blocks`."""
    return (
        "inputs_embeds" if blocks.start == 0 else "hidden_states_in",
        "logits" if blocks.stop == shape.num_blocks else "hidden_states_out",
    )


def causal_mask(tokens: int, cached: int, context_length: int, masked: float = MASKED) -> np.ndarray:
    """(1, 1, tokens, context_length): tokens see the last `cached` slots, earlier tokens, themselves."""
    mask = np.full((1, 1, tokens, context_length), masked, np.float32)
    past = context_length - tokens
    mask[..., past - cached : past] = 0.0
    mask[0, 0, :, past:][np.tril_indices(tokens)] = 0.0
    return mask


class ChunkedDecoder:
    """A conversation in one view: its cache, and how it reads more tokens.

    It calls two graphs with the same weights, one for `chunk_length` tokens and one for a single token. The newest
    tokens are at the right end of the cache; the empty slots on the left are masked.
    """

    def __init__(
        self,
        shape: DecoderShape,
        run: RunGraph,
        chunk_length: int,
        context_length: int,
        *,
        empty: Mapping[str, np.generic] | None = None,
        blocks: range | None = None,
    ):
        """Begins an empty conversation.

        Args:
            empty: the value of zero by cache name (`…_in`), in the dtype of the cache.
            blocks: those that `run` computes, by default all; see `boundary_names` for its input and output.
        """
        self.shape, self.run = shape, run
        self.blocks = range(shape.num_blocks) if blocks is None else blocks
        self._input_name, self._output_name = boundary_names(shape, self.blocks)
        self.chunk_length, self.context_length = chunk_length, context_length
        self.length = 0
        heads, size = shape.num_key_value_heads, shape.head_dim
        self._cache: dict[str, np.ndarray] = {}
        for name in cache_names(self.blocks, "in"):
            dims = (1, heads, size, context_length) if "_key_" in name else (1, heads, context_length, size)
            zero = (empty or {}).get(name, np.float32(0.0))
            self._cache[name] = np.full(dims, zero, zero.dtype)

    @property
    def cache(self) -> dict[str, np.ndarray]:
        """The cached keys (1, heads, head_dim, length) and values (1, heads, length, head_dim) by name."""
        start = self.context_length - self.length
        return {
            name: value[..., start:] if "_key_" in name else value[:, :, start:] for name, value in self._cache.items()
        }

    def read(self, embeddings: np.ndarray, *, only_chunks: bool = False, last_only: bool = False) -> np.ndarray:
        """Reads embeddings (tokens, hidden_size) after the cached ones; returns logits (tokens, vocabulary).

        Without the last block it returns hidden states. `only_chunks` never calls the graph for one token, `last_only`
        returns (and keeps) only the last row, (1, vocabulary). Raises `ValueError`, before anything is read, if they
        do not fit into the context.
        """
        if self.length + len(embeddings) > self.context_length:
            raise ValueError(
                f"The request has {self.length + len(embeddings)} tokens, the graphs were compiled for a context of "
                f"{self.context_length}: shorten it, or export with a longer context."
            )
        padded = -(-len(embeddings) // self.chunk_length) * self.chunk_length
        if only_chunks and self.length + padded > self.context_length:
            raise ValueError(
                f"{len(embeddings)} tokens after {self.length} cached ones take {padded} places in chunks of "
                f"{self.chunk_length}, the context has {self.context_length}: read fewer, or without `only_chunks`."
            )
        logits, start = [], 0
        while start < len(embeddings):
            # A chunk needs slots for its whole length, including its padding.
            fits = self.length + self.chunk_length <= self.context_length
            tokens = self.chunk_length if only_chunks or (fits and len(embeddings) - start > 1) else 1
            found = self._call(tokens, embeddings[start : start + tokens])
            logits = [found[-1:]] if last_only else [*logits, found]
            start += tokens
        return np.concatenate(logits)

    def _call(self, tokens: int, embeddings: np.ndarray) -> np.ndarray:
        count = len(embeddings)
        outputs = self.run(tokens, self.inputs(tokens, embeddings))
        for name in self._cache:
            axis = 3 if "_key_" in name else 2
            new = outputs[name.removesuffix("_in") + "_out"].take(range(count), axis)
            self._cache[name] = np.concatenate([self._cache[name], new], axis).take(
                range(count, self.context_length + count), axis
            )
        self.length += count
        return np.asarray(outputs[self._output_name])[0, :count]

    def inputs(self, tokens: int, embeddings: np.ndarray) -> dict[str, np.ndarray]:
        """The next inputs of the graph for `tokens` at a time; the last chunk is padded with zeros at its end."""
        padded = np.zeros((1, tokens, self.shape.hidden_size), np.float32)
        padded[0, : len(embeddings)] = embeddings
        cos, sin = self.shape.cosines_and_sines(np.arange(self.length, self.length + tokens))
        caches = {}
        for name, value in self._cache.items():
            caches[name] = value[..., tokens:] if "_key_" in name else value[:, :, tokens:]
        return {
            self._input_name: padded,
            "attention_mask": causal_mask(tokens, self.length, self.context_length, self.shape.masked),
            "position_ids_cos": cos,
            "position_ids_sin": sin,
            **{name: np.ascontiguousarray(value) for name, value in caches.items()},
        }
