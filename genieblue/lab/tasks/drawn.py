"""An image with questions and answers, as a chat to train on and as a line of an evaluation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from genieblue.evaluation.metrics import CHOICE
from genieblue.lab.drawings import Mark

TURNS = 3  # of a training chat: one image teaches more than one answer


@dataclass(frozen=True)
class Drawn:
    """An image, and what is `asked` about it: questions with their answers, of which an evaluation asks the first.

    Others ask for what is there, piece by piece: from copying what image tokens say, a language model learns to look.

    `choices` are the answers that the first question has to choose from, by likelihood. `marks` are what a vision
    tower can learn to read in it.
    """

    image: Image.Image
    asked: tuple[tuple[str, str], ...]
    metric: str = "exact"
    choices: tuple[str, ...] = ()
    marks: tuple[Mark, ...] = ()

    def chat(self, rng: np.random.Generator) -> dict[str, Any]:
        """A training sample: some of the questions, in any order."""
        messages: list[dict[str, Any]] = []
        for place in rng.permutation(len(self.asked))[:TURNS]:
            question, answer = self.asked[place]
            content: list[dict[str, Any]] = [] if messages else [{"type": "image", "image": self.image}]
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": answer})
        return {"messages": messages}

    def question(self, image: str, task: str) -> dict[str, Any]:
        """A line of the data of `genieblue eval`, with the name of the image's file."""
        question, answer = self.asked[0]
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        line = {"messages": [{"role": "user", "content": content}], "answers": [answer], "task": task}
        line["metric"] = CHOICE if self.choices else self.metric
        return line | ({"choices": list(self.choices)} if self.choices else {})
