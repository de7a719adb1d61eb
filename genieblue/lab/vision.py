"""A small SigLIP that a lab trains once, on images of its own, and that all of its structures share.

First it learns to tell the captions of tiles, as SigLIP does, then to read the tiles of the tasks' images.
"""

import math
import shutil
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import SiglipConfig, SiglipModel, SiglipVisionModel, set_seed

from genieblue.lab.drawings import Mark, draw_numbers, draw_word
from genieblue.lab.pretraining import pretrain
from genieblue.lab.tasks import TASKS
from genieblue.lab.tasks.materials import COLOURS, LABELS, SYMBOLS, any_font, pick, scans, words
from genieblue.lab.tasks.naming import draw_symbol
from genieblue.lab.tasks.shapes import any_shape, draw_shapes
from genieblue.lab.tile_reader import TILE_SIZE, read_tiles, tower_config
from modeling_genieblue.staging_genieblue import NewFolder

CAPTION_LENGTH = 32  # bytes
BATCH_SIZE = 64  # images, each of which is told from the captions of all others
PROJECTOR = "projector.safetensors"
KINDS = {"letters": 0.4, "number": 0.2, "symbol": 0.15, "shape": 0.15, "bar": 0.1}  # shares of tiles
# Shares of images that are read; those of some tasks have many tiles.
READ = {
    "letters": 0.12, "lines": 0.4, "digits": 0.18, "receipts": 0.14, "charts": 0.05, "counting": 0.02,
    "position": 0.02, "naming": 0.07,
}  # fmt: skip


def siglip_config() -> SiglipConfig:
    """The tower and a smaller text half that reads bytes."""
    return SiglipConfig(
        vision_config=tower_config().to_dict(),
        text_config={
            "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "vocab_size": 256, "max_position_embeddings": CAPTION_LENGTH, "projection_size": 128,
            "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
        },
    )  # fmt: skip


def draw_tile(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """What a tile of a task's image may show, and its caption; of the materials to train on."""
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    if kind == "letters":
        text = pick(rng, words(False), 1)[0] if rng.random() < 0.5 else _any_text(rng)
        start = int(rng.integers(max(1, len(text) - 3)))
        text = text[start : start + int(rng.integers(1, 5))]
        return draw_word(text, rng, any_font(rng, False, 16, 34)).image, f"text {text}"
    if kind == "number":
        drawing = draw_numbers(scans(False), (int(rng.integers(1, 3)),), rng, augment=True)
        return drawing.image, f"number {drawing.characters}"
    if kind == "symbol":
        symbol = list(SYMBOLS)[rng.integers(len(SYMBOLS))]
        return draw_symbol(symbol, rng), SYMBOLS[symbol]
    if kind == "shape":
        colour, form = any_shape(rng)
        return draw_shapes({(0, 0): (colour, form)}, rng, 1, 1), f"{colour} {form}"
    return _draw_bar(rng)


def _any_text(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list(string.ascii_letters + string.digits + "."), 4))


def _draw_bar(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """A coloured rectangle of a height in tenths of the tile."""
    tenths, colour = int(rng.integers(11)), str(rng.choice(list(COLOURS)))
    ink = Image.new("L", (TILE_SIZE, TILE_SIZE))
    ink.paste(255, (12, TILE_SIZE - round(tenths * TILE_SIZE / 10), 36, TILE_SIZE))
    image = Image.new("RGB", ink.size, tuple(rng.integers(215, 256, 3).tolist()))
    image.paste(Image.new("RGB", ink.size, COLOURS[colour]), mask=ink)
    return image, f"{colour} bar {tenths}"


class CaptionedTiles(Dataset):
    """Tiles with their captions; an index gives the same one in every process."""

    def __init__(self, samples: int, seed: int):
        self.samples, self.seed = samples, seed

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`pixel_values` (3, 48, 48) in -1..1 and `input_ids` (32,), the bytes of the caption."""
        image, caption = draw_tile(np.random.default_rng([self.seed, index]))
        scale = min(TILE_SIZE / side for side in image.size)
        image = image.resize(tuple(max(1, round(side * scale)) for side in image.size), Image.Resampling.BICUBIC)
        tile = Image.new("RGB", (TILE_SIZE, TILE_SIZE))
        tile.paste(image, tuple((TILE_SIZE - side) // 2 for side in image.size))
        pixels = torch.from_numpy(np.asarray(tile, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
        ids = list(caption.encode()[:CAPTION_LENGTH])
        return {"pixel_values": pixels, "input_ids": torch.tensor(ids + [0] * (CAPTION_LENGTH - len(ids)))}


class ImageTextContrast(nn.Module):
    """A SigLIP whose output has its loss: sigmoids over all pairs of images and captions of a batch."""

    def __init__(self, siglip: SiglipModel):
        super().__init__()
        self.siglip = siglip
        # As in the SigLIP paper (arXiv 2303.15343); from transformers' zeros the loss does not leave its plateau.
        siglip.logit_scale.data.fill_(math.log(10))
        siglip.logit_bias.data.fill_(-10)

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> dict[str, Any]:
        outputs = self.siglip(input_ids=input_ids, pixel_values=pixel_values, return_loss=True)
        return {"loss": outputs.loss, "logits": outputs.logits_per_image}


def make_small_siglip(out: Path, base: str | Path, *, contrast_steps: int, reading_steps: int, seed: int = 0) -> None:
    """Writes a trained tower as a SiglipVisionModel folder, with the projector that it got for a base.

    Called again, a killed run goes on.
    """
    set_seed(seed)
    siglip = SiglipModel(siglip_config())
    tiles = CaptionedTiles(contrast_steps * BATCH_SIZE, seed)
    checkpoints = out.with_name(f"{out.name}-checkpoints")
    contrast, reading = checkpoints / "contrast", checkpoints / "reading"
    pretrain(
        ImageTextContrast(siglip), tiles, batch_size=BATCH_SIZE, learning_rate=1e-3, seed=seed, checkpoints=contrast
    )
    tower = SiglipVisionModel(siglip.config.vision_config)
    tower.load_state_dict(siglip.vision_model.state_dict())
    projector = read_tiles(tower, base, draw_marked, LABELS, steps=reading_steps, seed=seed, checkpoints=reading)
    with NewFolder(out, "training") as new:
        tower.eval().save_pretrained(new.staging)
        save_file(projector.state_dict(), new.staging / PROJECTOR)
        new.put_in_place()
    shutil.rmtree(checkpoints)


def draw_marked(rng: np.random.Generator) -> tuple[Image.Image, tuple[Mark, ...]]:
    """An image of a task, or of random letters lest the tower guesses words, with what it shows."""
    kind = str(rng.choice(list(READ), p=list(READ.values())))
    if kind == "letters":
        text = "".join(rng.choice(list(string.ascii_letters), rng.integers(2, 9)))
        drawing = draw_word(text, rng, any_font(rng, False, 18, 34))
        return drawing.image, drawing.marks
    drawn = TASKS[kind](rng, False)
    return drawn.image, drawn.marks
