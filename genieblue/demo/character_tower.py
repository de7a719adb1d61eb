"""The vision tower of the demo on a real LLM: a small SigLIP that learns which character stands where."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import SiglipVisionConfig, SiglipVisionModel, set_seed

from genieblue.demo.drawings import Drawing
from genieblue.demo.pretraining import pretrain
from modeling_genieblue import GenieBlueImageProcessor

CHARACTERS = string.ascii_uppercase + string.digits
TILE_SIZE, PATCH_SIZE = 48, 12  # pixels
SIDE = TILE_SIZE // PATCH_SIZE
BLANK_WEIGHT = 0.25  # in the loss: most columns hold the centre of no character
BATCH_SIZE = 32  # images


def tower_config() -> SiglipVisionConfig:
    """A 4-layer SigLIP for tiles of 48 × 48 pixels: 16 patches, so 4 tokens after 2 × 2 concatenation."""
    return SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=TILE_SIZE,
        patch_size=PATCH_SIZE,
    )


class CharacterTiles(Dataset):
    """The tiles of a drawing, and which character has its centre in each column of patches: 0 is none."""

    def __init__(self, draw: Callable[[np.random.Generator], Drawing], samples: int, seed: int = 0):
        self.draw, self.samples, self.seed = draw, samples, seed
        self.image_processor = GenieBlueImageProcessor(tile_size=TILE_SIZE)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`pixel_values` (tiles, 3, 48, 48), the thumbnail left out, and `labels` (tiles, 4)."""
        drawing = self.draw(np.random.default_rng([self.seed, index]))
        pixels = self.image_processor.preprocess(drawing.image)["pixel_values"]
        columns, rows = self.image_processor.select_grid(*drawing.image.size)
        labels = np.zeros((rows, columns * SIDE), dtype=np.int64)
        width, height = drawing.image.size
        scale = min(columns * TILE_SIZE / width, rows * TILE_SIZE / height)
        # The image is centred on the canvas of tiles.
        corner = np.array([columns * TILE_SIZE - width * scale, rows * TILE_SIZE - height * scale]) / 2
        places = (drawing.centres * scale + corner) // (PATCH_SIZE, TILE_SIZE)
        for character, (column, row) in zip(drawing.characters, places.astype(int), strict=True):
            labels[row.clip(0, rows - 1), column.clip(0, columns * SIDE - 1)] = 1 + CHARACTERS.index(character)
        tiles = torch.from_numpy(pixels[-rows * columns :])
        return {"pixel_values": tiles, "labels": torch.from_numpy(labels.reshape(rows * columns, SIDE))}


def join_tiles(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of the tiles of several drawings."""
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


class CharacterReader(nn.Module):
    """A tower with a classifier on each patch, for its training."""

    def __init__(self, tower: SiglipVisionModel):
        super().__init__()
        self.tower = tower
        self.classifier = nn.Linear(tower.config.hidden_size, 1 + len(CHARACTERS))
        self.register_buffer("weights", torch.tensor([BLANK_WEIGHT] + [1.0] * len(CHARACTERS)))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """`loss`, and `logits` (tiles, 4 rows, 4 columns, characters); each row has the labels of its columns."""
        features = self.tower(pixel_values=pixel_values).last_hidden_state
        logits = self.classifier(features).unflatten(1, (SIDE, SIDE))
        expected = labels[:, None].expand(-1, SIDE, -1)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 2), expected.flatten(), self.weights),
                "logits": logits}  # fmt: skip


def make_character_tower(
    out: Path, draw: Callable[[np.random.Generator], Drawing], *, steps: int, seed: int = 0
) -> None:
    """Trains the tower on drawings and saves it as a SiglipVisionModel folder."""
    set_seed(seed)
    tower = SiglipVisionModel(tower_config())
    reader = CharacterReader(tower)
    tiles = CharacterTiles(draw, steps * BATCH_SIZE, seed)
    pretrain(reader, tiles, batch_size=BATCH_SIZE, learning_rate=2e-3, seed=seed, collate=join_tiles)
    tower.eval().save_pretrained(out)
