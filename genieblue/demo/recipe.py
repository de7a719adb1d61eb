"""What a demo is made of: its base, its vision tower, what it learns and what it is asked."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from genieblue.lab.readings import Reading
from genieblue.training.settings import TrainingSettings


class DemoRecipe(ABC):
    """A demo for `run_demo`.

    Attributes:
        base_title, tower_title: what is made, for the terminal.
        title: one line for the contact sheet.
        text_questions: asked of the base before and of the GenieBlue after training.
        max_new_tokens: of an answer about an image.
    """

    base_title: str
    tower_title: str
    title: str
    text_questions: Sequence[str]
    max_new_tokens: int

    def __init__(self, *, seed: int = 0, scale: float = 1.0):
        """`scale` shortens every run; `ValueError` unless it is above 0 and at most 1."""
        if not 0 < scale <= 1:
            raise ValueError(f"`scale` is {scale}: expected a fraction of the full demo, above 0 and at most 1.")
        self.seed, self.scale = seed, scale

    @abstractmethod
    def make_base(self, out: Path) -> None:
        """Writes the base LLM as a plain transformers folder."""

    @abstractmethod
    def make_model(self, base: Path, out: Path) -> None:
        """Writes an untrained GenieBlue on the base, with a vision tower made for it."""

    @abstractmethod
    def settings(self, stage: int) -> TrainingSettings:
        """Of a training stage."""

    @abstractmethod
    def training_data(self, stage: int) -> Dataset[dict[str, Any]]:
        """The chats of a training stage."""

    @abstractmethod
    def held_out(self) -> list[Reading]:
        """What the finished model is asked, the tasks in turn; nothing in it was trained on."""
