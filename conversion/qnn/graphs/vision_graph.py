"""The vision tower and projector as one graph over a fixed number of tiles."""

import torch
from torch import nn
from torch.nn import functional

from conversion.qnn.graphs.decoder_graph import Projection
from conversion.qnn.graphs.rotation import Rotation

ACTIVATIONS = {"gelu_pytorch_tanh": "tanh", "gelu": "none"}


class LayerNorm(nn.Module):
    """A LayerNorm with plain buffers."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.register_buffer("weight", norm.weight.detach().float().clone())
        self.register_buffer("bias", norm.bias.detach().float().clone())
        self.eps = norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # In four dimensions: with exactly 16 tokens in three, the compiler gives the following product the wrong rows
        # (QAIRT 2.51).
        return functional.layer_norm(x[:, None], (x.shape[-1],), self.weight, self.bias, self.eps)[:, 0]


class PatchEmbedding(nn.Module):
    """Pixels → patches + positions; the bias of the convolution is part of the positions."""

    def __init__(self, embeddings: nn.Module):
        super().__init__()
        patches = embeddings.patch_embedding
        self.register_buffer("weight", patches.weight.detach().float().clone())
        positions = embeddings.position_embedding.weight.detach().float()[None]
        bias = patches.bias
        self.register_buffer("positions", positions if bias is None else positions + bias.detach().float())
        self.patch_size = patches.kernel_size[0]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(num_tiles, 3, image_size, image_size) → (num_tiles, num_patches, vision_hidden_size)."""
        patches = functional.conv2d(pixel_values, self.weight, stride=self.patch_size)
        count, channels, side, _ = patches.shape
        return patches.reshape(count, channels, side * side).transpose(1, 2) + self.positions


class EncoderBlock(nn.Module):
    """One block of a SigLIP."""

    def __init__(self, layer: nn.Module, heads: int, approximation: str):
        super().__init__()
        self.heads, self.approximation = heads, approximation
        self.norm_1, self.norm_2 = LayerNorm(layer.layer_norm1), LayerNorm(layer.layer_norm2)
        attention, mlp = layer.self_attn, layer.mlp
        self.q_proj, self.k_proj = Projection(attention.q_proj), Projection(attention.k_proj)
        self.v_proj, self.out_proj = Projection(attention.v_proj), Projection(attention.out_proj)
        self.fc1, self.fc2 = Projection(mlp.fc1), Projection(mlp.fc2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.norm_1(x))
        return x + self.fc2(functional.gelu(self.fc1(self.norm_2(x)), approximate=self.approximation))

    def attend(self, h: torch.Tensor) -> torch.Tensor:
        """What attention adds to normalized patches (num_tiles, num_patches, vision_hidden_size)."""
        count, patches, channels = h.shape
        size = channels // self.heads
        query, key, value = (
            projection(h).reshape(count, patches, self.heads, size)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = (query.transpose(1, 2) * size**-0.5) @ key.permute(0, 2, 3, 1)
        attended = scores.softmax(dim=-1) @ value.transpose(1, 2)
        return self.out_proj(attended.transpose(1, 2).reshape(count, patches, channels))


class VisionGraph(nn.Module):
    """Tiles → embeddings in the language model's space; SigLIP's pooling head, which GenieBlue skips, is left out."""

    input_names = ("pixel_values",)
    output_names = ("image_features",)

    def __init__(self, model: nn.Module, rotation: Rotation | None = None):
        """With a `rotation`, the image features are rotated; `ValueError` for another activation than SigLIP's."""
        super().__init__()
        config, tower = model.config.vision_config, model.vision_tower
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"The vision tower has the activation {config.hidden_act!r}, expected {' or '.join(ACTIVATIONS)}."
            )
        tower = getattr(tower, "vision_model", tower)
        self.image_size, self.factor = config.image_size, model.multi_modal_projector.downsample_factor
        self.embeddings = PatchEmbedding(tower.embeddings)
        approximation = ACTIVATIONS[config.hidden_act]
        self.blocks = nn.ModuleList(
            EncoderBlock(layer, config.num_attention_heads, approximation) for layer in tower.encoder.layers
        )
        self.post_norm = LayerNorm(tower.post_layernorm)
        projector = model.multi_modal_projector
        self.projector_norm = LayerNorm(projector.norm)
        self.linear_1, self.linear_2 = Projection(projector.linear_1), Projection(projector.linear_2)
        if rotation is not None:
            self.linear_2.rotate_output(rotation)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(num_tiles, 3, image_size, image_size) → (num_tiles, image_seq_length, hidden_size)."""
        x = self.embeddings(pixel_values)
        for block in self.blocks:
            x = block(x)
        h = self.projector_norm(self.join_neighbours(self.post_norm(x)))
        return self.linear_2(functional.gelu(self.linear_1(h)))

    def join_neighbours(self, x: torch.Tensor) -> torch.Tensor:
        """(num_tiles, side², channels) → (num_tiles, (side / factor)², factor² · channels), in four dimensions."""
        count, patches, channels = x.shape
        side, factor = int(patches**0.5), self.factor
        padding = -side % factor
        if padding:
            x = functional.pad(x.reshape(count, side, side, channels), (0, 0, 0, padding, 0, padding))
            side += padding
        rows = side // factor
        # `factor` neighbours in a row of patches are side by side already: only the rows must be joined.
        x = x.reshape(count * rows, factor, rows, factor * channels).transpose(1, 2)
        return x.reshape(count, rows * rows, factor * factor * channels)

    def example_inputs(self, tiles: int) -> tuple[torch.Tensor]:
        """Zeros in the static shape for `tiles` at a time."""
        return (torch.zeros(tiles, 3, self.image_size, self.image_size),)
