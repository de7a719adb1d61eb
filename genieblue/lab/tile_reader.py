"""A tower and a projector that learn to read tiles: the projector's tokens become a language model's own words.

A projector that starts at random needs far more images than a small experiment has before a language model follows it.
This one starts where image tokens already are embeddings that the model knows, of the letters and words for what a
tile shows. Public towers are trained with texts too, on far more images.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from genieblue.lab.drawings import Mark
from genieblue.lab.pretraining import pretrain
from modeling_genieblue import GenieBlueConfig, GenieBlueImageProcessor, GenieBlueMultiModalProjector

TILE_SIZE, PATCH_SIZE = 48, 12  # pixels: 16 patches, so 4 tokens after 2 × 2 concatenation
SIDE = TILE_SIZE // PATCH_SIZE
TOKENS = SIDE * SIDE // 4
NOTHING = "\n"  # what image tokens without a mark become
SHARPNESS = 8.0  # of the nearest embedding, in squared median distances between embeddings
BLANK_WEIGHTS = {"columns": 0.25, "tokens": 0.5}  # in the losses: many columns and tokens have no mark
BATCH_SIZE = 32  # images

Draw = Callable[[np.random.Generator], tuple[Image.Image, Sequence[Mark]]]


def tower_config() -> SiglipVisionConfig:
    """A 4-layer SigLIP for tiles of 48 × 48 pixels."""
    return SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=TILE_SIZE,
        patch_size=PATCH_SIZE,
    )


class Spelling:
    """How a language model writes the labels of marks: `tokens`, of which the first is `NOTHING`'s, and places in it.

    Letters and words have a space before them, as inside a text; digits and signs have none.
    """

    def __init__(self, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase):
        texts = {label: f" {label}" if label[0].isalpha() else label for label in labels}
        ids = {label: tokenizer(text, add_special_tokens=False)["input_ids"] for label, text in texts.items()}
        nothing = tokenizer(NOTHING, add_special_tokens=False)["input_ids"][:1]
        self.tokens: list[int] = list(dict.fromkeys([*nothing, *(token for each in ids.values() for token in each)]))
        self._places = {label: [self.tokens.index(token) for token in each] for label, each in ids.items()}

    def __getitem__(self, label: str) -> list[int]:
        """Places in `tokens` of the tokens of a label."""
        return self._places[label]


class MarkedTiles(Dataset):
    """The tiles of drawings, and what they show: 0 is nothing, other numbers are places in a spelling's tokens.

    `columns` (tiles, 4) tells what has its centre in each column of patches. `tokens` (tiles, 4) has the spelled marks
    of a tile from left to right, one for each of its image tokens.
    """

    def __init__(self, draw: Draw, spelling: Spelling, samples: int, seed: int = 0):
        self.draw, self.spelling, self.samples, self.seed = draw, spelling, samples, seed
        self.image_processor = GenieBlueImageProcessor(tile_size=TILE_SIZE)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`pixel_values` (tiles, 3, 48, 48), without the thumbnail, `columns` and `tokens`."""
        image, marks = self.draw(np.random.default_rng([self.seed, index]))
        pixels = self.image_processor.preprocess(image)["pixel_values"]
        columns, rows = self.image_processor.select_grid(*image.size)
        scale = min(columns * TILE_SIZE / image.width, rows * TILE_SIZE / image.height)
        # The image is centred on the canvas of tiles.
        corner = np.array([columns * TILE_SIZE - image.width * scale, rows * TILE_SIZE - image.height * scale]) / 2
        by_column = np.zeros((rows, columns * SIDE), dtype=np.int64)
        by_token: list[list[int]] = [[] for _ in range(rows * columns)]
        for mark in sorted(marks, key=lambda mark: mark.x):
            column, row = ((np.array([mark.x, mark.y]) * scale + corner) // (PATCH_SIZE, TILE_SIZE)).astype(int)
            column, row = column.clip(0, columns * SIDE - 1), row.clip(0, rows - 1)
            spelled = self.spelling[mark.label]
            by_column[row, column] = spelled[0]
            by_token[row * columns + column // SIDE] += spelled
        return {
            "pixel_values": torch.from_numpy(pixels[-rows * columns :]),
            "columns": torch.from_numpy(by_column.reshape(rows * columns, SIDE)),
            "tokens": torch.tensor([(spelled + [0] * TOKENS)[:TOKENS] for spelled in by_token]),
        }


def join_tiles(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of the tiles of several drawings."""
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


class TileReader(nn.Module):
    """A tower and a projector in training: first find what a tile shows, then put it in order, as a language model's.

    The tower's middle block learns what is in each column, in all patches of the column. The projector learns to turn
    the n-th image token of a tile into the language model's own embedding of the n-th token that its marks are spelled
    with, so that an image of a word is a spelled word.
    """

    def __init__(self, tower: SiglipVisionModel, projector: GenieBlueMultiModalProjector, embeddings: torch.Tensor):
        """`embeddings` (tokens of a spelling, hidden size)."""
        super().__init__()
        self.tower, self.projector = tower, projector
        self.column_classifier = nn.Linear(tower.config.hidden_size, len(embeddings))
        self.register_buffer("embeddings", embeddings.float())
        distances = torch.cdist(self.embeddings, self.embeddings).square()
        self.sharpness = SHARPNESS / distances[distances > 0].median().item()
        for name, blank in BLANK_WEIGHTS.items():
            self.register_buffer(f"{name}_weights", torch.tensor([blank] + [1.0] * (len(embeddings) - 1)))

    def forward(self, pixel_values: torch.Tensor, columns: torch.Tensor, tokens: torch.Tensor) -> dict[str, Any]:
        """`loss`, and `logits` (tiles, 4 tokens, tokens of the spelling), which are negative squared distances."""
        outputs = self.tower(pixel_values=pixel_values, output_hidden_states=True)
        by_patch = self.column_classifier(outputs.hidden_states[self.tower.config.num_hidden_layers // 2])
        projected = self.projector(outputs.last_hidden_state)  # (tiles, tokens, hidden size)
        # Squared distances by products: `torch.cdist` takes several times as long to train through.
        squares = projected.square().sum(-1, keepdim=True) + self.embeddings.square().sum(-1)
        logits = -self.sharpness * (squares - 2 * projected @ self.embeddings.T)
        loss = nn.functional.cross_entropy(
            by_patch.flatten(0, 1), columns.repeat(1, SIDE).flatten(), self.columns_weights
        )
        loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), self.tokens_weights)
        # Near its embedding, and not only nearer than to the others.
        error = (projected - self.embeddings[tokens]).square().mean() / self.embeddings.square().mean()
        return {"loss": loss + error, "logits": logits}


def read_tiles(
    tower: SiglipVisionModel,
    base: str | Path,
    draw: Draw,
    labels: Sequence[str],
    *,
    steps: int,
    seed: int = 0,
    checkpoints: Path | None = None,
) -> GenieBlueMultiModalProjector:
    """Trains a tower in place on drawings with marks of `labels`, and returns its projector for a base.

    With a folder for checkpoints, a killed run goes on from the last complete one.
    """
    spelling = Spelling(labels, AutoTokenizer.from_pretrained(base))
    embeddings = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight.detach()[spelling.tokens]
    text_config = AutoConfig.from_pretrained(base).to_dict()
    projector = GenieBlueMultiModalProjector(
        GenieBlueConfig(text_config=text_config, vision_config=tower.config.to_dict())
    )
    tiles = MarkedTiles(draw, spelling, steps * BATCH_SIZE, seed)
    pretrain(
        TileReader(tower, projector, embeddings), tiles, batch_size=BATCH_SIZE, learning_rate=2e-3, seed=seed,
        collate=join_tiles, checkpoints=checkpoints,
    )  # fmt: skip
    return projector
