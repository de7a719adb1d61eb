"""Questions about drawn images, as chats to train on and as a folder to evaluate on."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Reading:
    """A question about an image, the right answer, and the task that it belongs to in an evaluation."""

    image: Image.Image
    question: str
    answer: str
    task: str

    def chat(self) -> dict[str, Any]:
        """As a training sample."""
        return {"messages": [_question(self.image, self.question), {"role": "assistant", "content": self.answer}]}


def write_readings(folder: Path, readings: Iterable[Reading]) -> Path:
    """Writes `0000.png`, … and `answers.jsonl`, the data of `genieblue eval`, into a new folder; returns the latter.

    The names of the images do not reveal the answers.
    """
    folder.mkdir(parents=True)
    lines = []
    for index, reading in enumerate(readings):
        name = f"{index:04d}.png"
        reading.image.save(folder / name)
        line = {"messages": [_question(name, reading.question)], "answers": [reading.answer], "task": reading.task}
        lines.append(json.dumps(line) + "\n")
    path = folder / "answers.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _question(image: Any, question: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
