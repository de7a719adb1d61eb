"""The quick demo's vision tower: a small SigLIP trained to classify digits, instead of a public one."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import SiglipConfig, SiglipForImageClassification, SiglipVisionConfig, SiglipVisionModel, set_seed

from genieblue.lab.pretraining import pretrain
from genieblue.lab.scans import TILE_SIZE, Scans, compose, digit_cells


def vision_config() -> SiglipVisionConfig:
    """A 4-layer SigLIP for tiles of 32 × 32 pixels: 16 patches, so 4 tokens after 2 × 2 concatenation."""
    return SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=TILE_SIZE,
        patch_size=8,
    )


class DigitTiles(Dataset):
    """Tiles with one complete digit and parts of its neighbours; an index gives the same tile in every process."""

    def __init__(self, scans: Scans, samples: int, seed: int = 0, augment: bool = True, reach: int = 6):
        """`reach`: maximum distance of the digit from the centre, in pixels."""
        self.scans, self.samples, self.seed, self.augment, self.reach = scans, samples, seed, augment, reach

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, index])
        picks = rng.integers(0, len(self.scans), 3)
        cells = digit_cells(self.scans.images[picks], rng, self.augment)
        shown = rng.random(3) < 0.6
        shown[1] = True
        ink, middles = compose(cells * shown[:, None, None], rng, noise=0.06 if self.augment else 0.0)
        middle = int(middles[1]) + int(rng.integers(-self.reach, self.reach + 1))
        ink = np.pad(ink, ((0, 0), (TILE_SIZE, TILE_SIZE)))
        tile = ink[:, middle + TILE_SIZE // 2 : middle + TILE_SIZE // 2 + TILE_SIZE]
        pixels = torch.from_numpy(tile.astype(np.float32))[None].expand(3, -1, -1) * 2 - 1  # mean and std 0.5
        return {"pixel_values": pixels, "labels": torch.tensor(int(self.scans.labels[picks[1]]))}


def make_digit_tower(out: Path, train: Scans, *, steps: int, seed: int = 0) -> None:
    """Trains the tower as a digit classifier and saves it, without the classifier, as a SiglipVisionModel folder."""
    set_seed(seed)
    config = vision_config()
    classifier = SiglipForImageClassification(SiglipConfig(vision_config=config.to_dict(), num_labels=10))
    # Small batches: here the number of steps matters more than the number of tiles.
    batch_size = 32
    tiles = DigitTiles(train, steps * batch_size, seed)
    pretrain(classifier, tiles, batch_size=batch_size, learning_rate=2e-3, seed=seed)
    # The classifier has no pooling head, but public checkpoints do, so add one to the tower.
    tower = SiglipVisionModel(config)
    trained = classifier.vision_model.state_dict()
    missing, unexpected = tower.load_state_dict(trained, strict=False)
    if unexpected or any("head" not in name for name in missing):
        raise ValueError(f"The trained tower does not fit SiglipVisionModel: missing {missing}, extra {unexpected}.")
    tower.eval().save_pretrained(out)
