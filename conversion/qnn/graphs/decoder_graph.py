"""Decoder graphs in an NPU-friendly form, built from one view of a loaded GenieBlue.

The arithmetic of a Llama-style decoder, written so that every operator runs on the NPU and stays exact there:
normalisation is one operator, half-size cosines and sines and the additive mask are inputs, keys are cached
transposed, the queries of a group of heads are folded into the token axis, and only new keys and values are outputs.
"""

import torch
from torch import nn
from torch.nn import functional

from conversion.qnn.graphs.chunked_decoder import DecoderShape, boundary_names, cache_names
from conversion.qnn.graphs.rotation import Rotation
from conversion.qnn.graphs.supported_bases import norm_epsilon
from modeling_genieblue.language_adapter_genieblue import find_blocks


class Projection(nn.Module):
    """`x @ weight + bias + low_rank @ lora_b`; matrices are (in, out), so that nothing is transposed."""

    def __init__(self, linear: nn.Module, lora_b: torch.Tensor | None = None):
        super().__init__()
        base_layer = getattr(linear, "base_layer", linear)
        self.register_buffer("weight", base_layer.weight.detach().float().t().contiguous())
        bias = base_layer.bias
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.register_buffer("lora_b", lora_b)

    def forward(self, x: torch.Tensor, low_rank: torch.Tensor | None = None) -> torch.Tensor:
        y = x @ self.weight
        if self.bias is not None:
            y = y + self.bias
        return y if self.lora_b is None else y + low_rank @ self.lora_b

    def rotate_output(self, rotation: Rotation) -> None:
        """Folds a rotation of the output into the matrices."""
        for name in ("weight", "bias", "lora_b"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, rotation.states(value))


class SharedLora(nn.Module):
    """`x @ lora_a` for linears that read the same `x`: the first factors of their LoRA side by side.

    The NPU pads each matrix to 32 channels, so one product of rank 3·8 takes a third of the space of three of rank 8.
    The second factors are zero in the ranks of the other linears.
    """

    def __init__(self, linears: list[nn.Module]):
        super().__init__()
        pairs = [_lora_pair(linear) for linear in linears]
        found = [pair for pair in pairs if pair is not None]
        self.register_buffer("lora_a", torch.cat([first for first, _ in found], dim=1) if found else None)
        self.second: list[torch.Tensor | None] = []
        start = 0
        for pair in pairs:
            if pair is not None:
                second = pair[1].new_zeros(self.lora_a.shape[1], pair[1].shape[1])
                second[start : start + len(pair[1])] = pair[1]
                start += len(pair[1])
            self.second.append(None if pair is None else second)

    def forward(self, x: torch.Tensor) -> torch.Tensor | None:
        return None if self.lora_a is None else x @ self.lora_a


def _lora_pair(linear: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(in, rank) and (rank, out) of a linear's LoRA, the scaling in the second."""
    if not hasattr(linear, "base_layer"):
        return None
    (adapter,) = linear.active_adapters
    second = linear.lora_B[adapter].weight.detach().float() * linear.scaling[adapter]
    return linear.lora_A[adapter].weight.detach().float().t().contiguous(), second.t().contiguous()


class Norm(nn.Module):
    """RMSNorm as the NPU's single operator; split into several, its reciprocal would saturate there."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.eps = norm_epsilon(norm)
        self.register_buffer("weight", norm.weight.detach().float().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of heads (1, heads, tokens, head_dim) by cosines and sines (1, 1, tokens, head_dim / 2)."""
    first, second = x.split(x.shape[-1] // 2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Block(nn.Module):
    """One decoder block of a view."""

    def __init__(self, block: nn.Module, shape: DecoderShape):
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        self.shape = shape
        self.scale = shape.head_dim**-0.5
        self.input_norm, self.mlp_norm = Norm(block.input_layernorm), Norm(block.post_attention_layernorm)
        self.q_norm = Norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.k_norm = Norm(attention.k_norm) if hasattr(attention, "k_norm") else None
        for title, parent, names in (
            ("qkv", attention, ("q_proj", "k_proj", "v_proj")),
            ("o", attention, ("o_proj",)),
            ("gate_up", mlp, ("gate_proj", "up_proj")),
            ("down", mlp, ("down_proj",)),
        ):
            linears = [getattr(parent, name) for name in names]
            lora = SharedLora(linears)
            setattr(self, f"{title}_lora", lora)
            for name, linear, second in zip(names, linears, lora.second, strict=True):
                setattr(self, name, Projection(linear, second))

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states (1, tokens, hidden_size), and this block's new keys and values in the layout of its cache.

        Mask, cosines, sines and caches have the shapes of `DecoderGraph.forward`. New keys are (1, key-value heads,
        head_dim, tokens), new values (1, key-value heads, tokens, head_dim).
        """
        heads, groups, size = self.shape.num_heads, self.shape.num_key_value_heads, self.shape.head_dim
        tokens = x.shape[1]
        query, key, value = self.queries_keys_values(x)
        query = rotate(query, cos, sin) * self.scale
        key = rotate(key, cos, sin).transpose(2, 3)  # (1, groups, head_dim, tokens)
        all_keys = torch.cat([past_key, key], dim=3)  # (1, groups, head_dim, context)
        all_values = torch.cat([past_value, value], dim=2)  # (1, groups, context, head_dim)
        # Heads that share keys become more rows of one product: nothing is repeated.
        query = query.reshape(1, groups, heads // groups * tokens, size)
        scores = (query @ all_keys).reshape(1, heads, tokens, -1) + mask
        weights = scores.softmax(dim=-1).reshape(1, groups, heads // groups * tokens, -1)
        attended = (weights @ all_values).reshape(1, heads, tokens, size)
        attended = attended.transpose(1, 2).reshape(1, tokens, heads * size)
        x = x + self.o_proj(attended, self.o_lora(attended))
        h = self.mlp_norm(x)
        low_rank = self.gate_up_lora(h)
        h = functional.silu(self.gate_proj(h, low_rank)) * self.up_proj(h, low_rank)
        return x + self.down_proj(h, self.down_lora(h)), key, value

    def rotate(self, rotation: Rotation) -> None:
        """Folds the norms and a rotation of the hidden states into the matrices."""
        for norm, lora, projections in (
            (self.input_norm, self.qkv_lora, (self.q_proj, self.k_proj, self.v_proj)),
            (self.mlp_norm, self.gate_up_lora, (self.gate_proj, self.up_proj)),
        ):
            for projection in projections:
                projection.weight = rotation.readers(projection.weight, norm.weight)
            if lora.lora_a is not None:
                lora.lora_a = rotation.readers(lora.lora_a, norm.weight)
            norm.weight = torch.ones_like(norm.weight)
        for projection in (self.o_proj, self.down_proj):
            projection.rotate_output(rotation)

    def largest_score(self, x: torch.Tensor) -> float:
        """An upper bound of all attention scores of (1, tokens, hidden_size), whatever the positions of the tokens."""
        query, key, _ = self.queries_keys_values(x)
        largest = query.norm(dim=-1).max() * key.norm(dim=-1).max() * self.scale
        return float(largest) * self.shape.rotary_scaling**2

    def queries_keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each (1, its heads, tokens, head_dim) from hidden states (1, tokens, hidden_size), not rotated yet."""
        h = self.input_norm(x)
        low_rank = self.qkv_lora(h)
        groups = self.shape.num_key_value_heads
        query = self.split_heads(self.q_proj(h, low_rank), self.shape.num_heads, self.q_norm)
        key = self.split_heads(self.k_proj(h, low_rank), groups, self.k_norm)
        return query, key, self.split_heads(self.v_proj(h, low_rank), groups, None)

    def split_heads(self, x: torch.Tensor, heads: int, norm: Norm | None) -> torch.Tensor:
        """(1, tokens, heads * head_dim) → (1, heads, tokens, head_dim)."""
        x = x.reshape(1, x.shape[1], heads, self.shape.head_dim)
        return (x if norm is None else norm(x)).transpose(1, 2)


class DecoderGraph(nn.Module):
    """Blocks `first` to `last - 1` of one view, then the final norm and the LM head if the last is included."""

    def __init__(
        self,
        view: nn.Module,
        shape: DecoderShape,
        first: int = 0,
        last: int | None = None,
        rotation: Rotation | None = None,
    ):
        """With a `rotation`, its hidden states, embeddings included, are the view's own after that rotation."""
        super().__init__()
        path, blocks = find_blocks(view)
        last = len(blocks) if last is None else last
        self.shape, self.first, self.last = shape, first, last
        self.blocks = nn.ModuleList(Block(_active_block(blocks[index]), shape) for index in range(first, last))
        self.final_norm = self.head = None
        if last == len(blocks):
            self.final_norm = Norm(view.get_submodule(path.rpartition(".")[0]).norm)
            self.head = Projection(view.get_output_embeddings())
        if rotation is not None:
            self._rotate(rotation)

    def _rotate(self, rotation: Rotation) -> None:
        for block in self.blocks:
            block.rotate(rotation)
        if self.head is not None:
            self.head.weight = rotation.readers(self.head.weight, self.final_norm.weight)
            self.final_norm.weight = torch.ones_like(self.final_norm.weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """One chunk.

        Args:
            hidden_states: (1, tokens, hidden_size), embeddings or the output of the part before this one.
            attention_mask: (1, 1, tokens, context_length), 0 or `shape.masked`.
            cos, sin: (1, 1, tokens, head_dim / 2).
            past: for each block the cached keys (1, key-value heads, head_dim, context_length - tokens) and values (1,
                key-value heads, context_length - tokens, head_dim), the latest at the right end.

        Returns logits (1, tokens, vocabulary), or hidden states, and for each block the new keys and values.
        """
        new = []
        for index, block in enumerate(self.blocks):
            past_key, past_value = past[2 * index], past[2 * index + 1]
            hidden_states, key, value = block(hidden_states, attention_mask, cos, sin, past_key, past_value)
            new += [key, value]
        if self.head is not None:
            hidden_states = self.head(self.final_norm(hidden_states))
        return hidden_states, *new

    @property
    def range(self) -> range:
        """The blocks of this graph."""
        return range(self.first, self.last)

    @property
    def input_names(self) -> list[str]:
        first, _ = boundary_names(self.shape, self.range)
        return [first, "attention_mask", "position_ids_cos", "position_ids_sin", *cache_names(self.range, "in")]

    @property
    def output_names(self) -> list[str]:
        _, first = boundary_names(self.shape, self.range)
        return [first, *cache_names(self.range, "out")]

    def example_inputs(self, tokens: int, context_length: int) -> tuple[torch.Tensor, ...]:
        """Zeros in the static shapes of a graph for `tokens` at a time."""
        shape, past = self.shape, context_length - tokens
        half = torch.zeros(1, 1, tokens, shape.head_dim // 2)
        hidden_states = torch.zeros(1, tokens, shape.hidden_size)
        mask = torch.zeros(1, 1, tokens, context_length)
        caches = []  # separate tensors: the exporter would merge inputs that are the same object
        for _ in self.blocks:
            caches.append(torch.zeros(1, shape.num_key_value_heads, shape.head_dim, past))
            caches.append(torch.zeros(1, shape.num_key_value_heads, past, shape.head_dim))
        return hidden_states, mask, half, half.clone(), *caches


def _active_block(block: nn.Module) -> nn.Module:
    """The block itself, or its trained copy in the multimodal view."""
    copies = getattr(block, "modules_to_save", None)
    return block if copies is None else copies[block.active_adapters[0]]
