"""The projector: patch features of the vision tower → image tokens for the language model."""

from typing import Any

import torch
from torch import nn

from .configuration_genieblue import GenieBlueConfig


class GenieBlueMultiModalProjector(nn.Module):
    """Patch features → language embeddings: 2×2 neighbours concatenated, LayerNorm → Linear → GELU → Linear."""

    def __init__(self, config: GenieBlueConfig):
        super().__init__()
        vision: Any = config.vision_config
        language: Any = config.text_config
        self.downsample_factor = config.downsample_factor
        concatenated_size = vision.hidden_size * config.downsample_factor**2
        hidden_size = language.hidden_size
        self.norm = nn.LayerNorm(concatenated_size)
        self.linear_1 = nn.Linear(concatenated_size, hidden_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, patch_features: torch.Tensor) -> torch.Tensor:
        """(num_tiles, side², vision_hidden_size) → (num_tiles, image_seq_length, hidden_size)."""
        num_tiles, num_patches, channels = patch_features.shape
        side = int(num_patches**0.5)
        factor = self.downsample_factor
        grid = patch_features.view(num_tiles, side, side, channels)
        padding = -side % factor  # an odd grid (27) gets a row and a column of zeros (28)
        grid = nn.functional.pad(grid, (0, 0, 0, padding, 0, padding))
        side = (side + padding) // factor
        grid = grid.view(num_tiles, side, factor, side, factor, channels).transpose(2, 3)
        concatenated = grid.reshape(num_tiles, side * side, factor * factor * channels)
        return self.linear_2(self.act(self.linear_1(self.norm(concatenated))))
