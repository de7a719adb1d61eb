"""The vision tower of the demo on a real LLM: a small SigLIP that learns to read the characters in a tile."""

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
FACTOR = 2  # patches a side of an image token
BLANK_WEIGHTS = {"columns": 0.25, "tokens": 0.5}  # in the losses: many columns and tokens have no character
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
    """The tiles of a drawing, and which characters they show: 0 is none.

    `columns` (tiles, 4) tells which character has its centre in each column of patches. `tokens` (tiles, 4) has the
    characters of a tile in reading order, one for each of its image tokens.
    """

    def __init__(self, draw: Callable[[np.random.Generator], Drawing], samples: int, seed: int = 0):
        self.draw, self.samples, self.seed = draw, samples, seed
        self.image_processor = GenieBlueImageProcessor(tile_size=TILE_SIZE)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`pixel_values` (tiles, 3, 48, 48), without the thumbnail, `columns` and `tokens`."""
        drawing = self.draw(np.random.default_rng([self.seed, index]))
        pixels = self.image_processor.preprocess(drawing.image)["pixel_values"]
        columns, rows = self.image_processor.select_grid(*drawing.image.size)
        shown = np.zeros((rows, columns * SIDE), dtype=np.int64)
        width, height = drawing.image.size
        scale = min(columns * TILE_SIZE / width, rows * TILE_SIZE / height)
        # The image is centred on the canvas of tiles.
        corner = np.array([columns * TILE_SIZE - width * scale, rows * TILE_SIZE - height * scale]) / 2
        places = (drawing.centres * scale + corner) // (PATCH_SIZE, TILE_SIZE)
        for character, (column, row) in zip(drawing.characters, places.astype(int), strict=True):
            shown[row.clip(0, rows - 1), column.clip(0, columns * SIDE - 1)] = 1 + CHARACTERS.index(character)
        by_column = torch.from_numpy(shown.reshape(rows * columns, SIDE))
        # The characters move to the left, past the empty columns.
        by_token = by_column.gather(1, (by_column == 0).int().argsort(dim=1, stable=True))
        return {
            "pixel_values": torch.from_numpy(pixels[-rows * columns :]), "columns": by_column, "tokens": by_token
        }  # fmt: skip


def join_tiles(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of the tiles of several drawings."""
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


class CharacterReader(nn.Module):
    """A tower with classifiers, for its training: first find the characters, then put them in order.

    Its middle block learns the character in each column, in all patches of the column. Its last block learns the
    n-th character of the tile in the patches of the n-th image token. So a language model finds a word's letters in
    the order of the image tokens.
    """

    def __init__(self, tower: SiglipVisionModel):
        super().__init__()
        self.tower = tower
        hidden, classes = tower.config.hidden_size, 1 + len(CHARACTERS)
        self.column_classifier = nn.Linear(hidden, classes)
        self.token_classifier = nn.Linear(hidden * FACTOR**2, classes)
        for name, blank in BLANK_WEIGHTS.items():
            self.register_buffer(f"{name}_weights", torch.tensor([blank] + [1.0] * len(CHARACTERS)))

    def forward(self, pixel_values: torch.Tensor, columns: torch.Tensor, tokens: torch.Tensor) -> dict[str, Any]:
        """`loss`, and `logits` (tiles, 4 tokens, characters)."""
        outputs = self.tower(pixel_values=pixel_values, output_hidden_states=True)
        by_patch = self.column_classifier(outputs.hidden_states[self.tower.config.num_hidden_layers // 2])
        # An image token is a square of patches: (tiles, row, inner row, column, inner column, hidden).
        squares = outputs.last_hidden_state.unflatten(1, (SIDE // FACTOR, FACTOR, SIDE // FACTOR, FACTOR))
        by_token = self.token_classifier(squares.transpose(2, 3).flatten(3).flatten(1, 2))
        column_loss = nn.functional.cross_entropy(
            by_patch.flatten(0, 1), columns.repeat(1, SIDE).flatten(), self.columns_weights
        )
        token_loss = nn.functional.cross_entropy(by_token.flatten(0, 1), tokens.flatten(), self.tokens_weights)
        return {"loss": token_loss + column_loss, "logits": by_token}


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
