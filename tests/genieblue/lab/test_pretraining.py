"""Pretraining of what a lab makes itself: a killed run goes on as if nothing had happened."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from genieblue.lab import pretraining
from genieblue.lab.pretraining import LAST_OF_CHECKPOINT, pretrain


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(3, 1)

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.line(inputs) - inputs.sum(dim=-1, keepdim=True)).square().mean()}


class Points(Dataset):
    """24 points; the machine fails at one of them."""

    def __init__(self, fails_at: int | None = None):
        self.fails_at, self.read = fails_at, []

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.fails_at:
            raise KeyboardInterrupt
        self.read.append(index)
        return {"inputs": torch.randn(3, generator=torch.Generator().manual_seed(index))}


@pytest.mark.parametrize("damage", ["none", "incomplete checkpoint"])
def test_a_killed_run_goes_on_from_its_last_complete_checkpoint(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(pretraining, "SAVE_STEPS", 2)
    options = {"batch_size": 2, "learning_rate": 1e-2}
    whole, resumed, rest = Line(), Line(), Points()
    pretrain(whole, Points(), **options)
    with pytest.raises(KeyboardInterrupt):
        pretrain(Line(), Points(fails_at=17), **options, checkpoints=tmp_path)
    if damage != "none":
        (tmp_path / "checkpoint-6" / LAST_OF_CHECKPOINT).unlink()
    pretrain(resumed, rest, **options, checkpoints=tmp_path)
    assert min(rest.read) == (12 if damage == "none" else 8)
    assert torch.equal(resumed.line.weight, whole.line.weight)
