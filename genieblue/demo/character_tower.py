"""The vision tower of the demo on a real LLM: a small SigLIP that learns to read the characters in a tile."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    SiglipVisionConfig,
    SiglipVisionModel,
    set_seed,
)

from genieblue.lab.drawings import Drawing
from genieblue.lab.pretraining import pretrain
from modeling_genieblue import GenieBlueConfig, GenieBlueImageProcessor, GenieBlueMultiModalProjector

CHARACTERS = string.ascii_uppercase + string.digits
TILE_SIZE, PATCH_SIZE = 48, 12  # pixels
SIDE = TILE_SIZE // PATCH_SIZE
SHARPNESS = 8.0  # of the nearest embedding, in squared median distances between embeddings
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
    """A tower and a projector in training: first find the characters, then put them in order, as a language model's.

    The tower's middle block learns the character in each column, in all patches of the column. The projector learns
    to turn the n-th image token of a tile into the language model's own embedding of the tile's n-th character, so
    that an image of a word is a spelled word. Public towers are trained with texts too, on far more images.
    """

    def __init__(self, tower: SiglipVisionModel, projector: GenieBlueMultiModalProjector, embeddings: torch.Tensor):
        """`embeddings` (1 + characters, hidden size), the first one for none."""
        super().__init__()
        self.tower, self.projector = tower, projector
        self.column_classifier = nn.Linear(tower.config.hidden_size, len(embeddings))
        self.register_buffer("embeddings", embeddings.float())
        distances = torch.cdist(self.embeddings, self.embeddings).square()
        self.sharpness = SHARPNESS / distances[distances > 0].median().item()
        for name, blank in BLANK_WEIGHTS.items():
            self.register_buffer(f"{name}_weights", torch.tensor([blank] + [1.0] * len(CHARACTERS)))

    def forward(self, pixel_values: torch.Tensor, columns: torch.Tensor, tokens: torch.Tensor) -> dict[str, Any]:
        """`loss`, and `logits` (tiles, 4 tokens, characters), which are negative squared distances."""
        outputs = self.tower(pixel_values=pixel_values, output_hidden_states=True)
        by_patch = self.column_classifier(outputs.hidden_states[self.tower.config.num_hidden_layers // 2])
        projected = self.projector(outputs.last_hidden_state)  # (tiles, tokens, hidden size)
        logits = -self.sharpness * torch.cdist(projected, self.embeddings.expand(len(projected), -1, -1)).square()
        loss = nn.functional.cross_entropy(
            by_patch.flatten(0, 1), columns.repeat(1, SIDE).flatten(), self.columns_weights
        )
        loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), self.tokens_weights)
        # Near its embedding, and not only nearer than to the others.
        error = (projected - self.embeddings[tokens]).square().mean() / self.embeddings.square().mean()
        return {"loss": loss + error, "logits": logits}


def character_embeddings(base: Path) -> torch.Tensor:
    """A language model's embeddings of a line break, which stands for no character, and of `CHARACTERS`.

    Letters have a space before them, as in a spelled word. `ValueError` if one is not a single token.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = ["\n", *(f" {letter}" for letter in string.ascii_uppercase), *string.digits]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if long := [text for text, tokens in zip(texts, ids, strict=True) if len(tokens) != 1]:
        raise ValueError(f"The tokenizer of {base} has no single token for {long[0]!r}: use another base.")
    model = AutoModelForCausalLM.from_pretrained(base)
    return model.get_input_embeddings().weight.detach()[[token for (token,) in ids]]


def make_character_tower(
    base: Path, out: Path, draw: Callable[[np.random.Generator], Drawing], *, steps: int, seed: int = 0
) -> GenieBlueMultiModalProjector:
    """Trains a tower on drawings, saves it as a SiglipVisionModel folder, and returns its projector for a base."""
    set_seed(seed)
    tower = SiglipVisionModel(tower_config())
    text_config = AutoConfig.from_pretrained(base).to_dict()
    projector = GenieBlueMultiModalProjector(
        GenieBlueConfig(text_config=text_config, vision_config=tower_config().to_dict())
    )
    reader = CharacterReader(tower, projector, character_embeddings(base))
    tiles = CharacterTiles(draw, steps * BATCH_SIZE, seed)
    pretrain(reader, tiles, batch_size=BATCH_SIZE, learning_rate=2e-3, seed=seed, collate=join_tiles)
    tower.eval().save_pretrained(out)
    return projector
