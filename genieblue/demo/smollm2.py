"""The demo on a real LLM: SmolLM2-135M-Instruct, from PyPI, learns to read words and handwritten numbers."""

import math
import re
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from transformers import SiglipVisionModel, set_seed

from conversion.create import create_genieblue
from genieblue.demo.recipe import DemoRecipe
from genieblue.lab.drawings import Drawing, Mark, draw_numbers, draw_word
from genieblue.lab.readings import Reading
from genieblue.lab.scans import split_scans
from genieblue.lab.smollm2_base import find_gguf, make_smollm2
from genieblue.lab.tile_reader import read_tiles, tower_config
from genieblue.training.settings import TrainingSettings
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor

LETTERS = string.ascii_uppercase
CHARACTERS = LETTERS + string.digits
HELD_OUT_WORDS = 200
LONGEST_NUMBER, LONGEST_COMPARED, LONGEST_WORD = 4, 3, 7
NEVER_A_WORD = 0.25  # share of the tower's words that are random letters, lest it guesses
TOWER_STEPS, TOWER_TASKS = 6000, {"word": 0.6, "number": 0.25, "larger": 0.15}
ASKED = {"spelled": 160, "word": 60, "number": 120, "digits": 60, "larger": 60}  # held out
TASKS = {"word": 0.6, "number": 0.2, "larger": 0.2}  # trained on
QUESTIONS = {
    "spelled": "Spell the word.",
    "word": "Which word?",  # harder: the model's tokens for capitals are parts of words, which it hardly knows
    "number": "Which number?",
    "digits": "How many digits?",
    "larger": "Which number is larger?",
}
DRAWN = {"spelled": "word", "digits": "number"}  # what is drawn for a question, where that has another name
TURNS = 3
STAGES: dict[int, dict[str, Any]] = {
    1: {"steps": 20, "learning_rates": {"multi_modal_projector": 1e-3}},
    2: {
        "steps": 380,
        "learning_rates": {
            "vision_tower": 1e-4, "multi_modal_projector": 5e-4, "lora": 1.5e-3, "replicated_blocks": 4e-4
        },
    },
}  # fmt: skip
TEXT_QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain gravity to a child.",
    "What is 17 + 25?",
    "Name three fruits.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "What does a compiler do?",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "List the planets of the solar system.",
    "Write a Python function that reverses a string.",
    "What is the opposite of 'cold'?",
    "How many days are in a week?",
    "Summarize the story of Cinderella in one sentence.",
    "What is photosynthesis?",
    "Suggest a name for a cat.",
    "What is the boiling point of water?",
    "Write a polite email that declines an invitation.",
    "What is <image> in HTML?",
)


class SmolLM2Demo(DemoRecipe):
    """135 million parameters, under 30 minutes on two cores."""

    base_title = "Base LLM: SmolLM2-135M-Instruct from PyPI"
    tower_title = "Vision tower: a small SigLIP learns letters and digits, instead of a public one"
    title = "Held-out words and handwriting, as GenieBlue sees and reads them"
    text_questions = TEXT_QUESTIONS
    max_new_tokens = 2 * LONGEST_WORD

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._gguf = find_gguf()
        self._train_scans, self._held_out_scans = split_scans(self.seed)

    def make_base(self, out: Path) -> None:
        tokenizer = make_smollm2(out, self._gguf)
        self._train_words, self._held_out_words = split_words(tokenizer.get_vocab(), self.seed)

    def make_model(self, base: Path, out: Path) -> None:
        def draw(rng: np.random.Generator) -> tuple[Image.Image, tuple[Mark, ...]]:
            if rng.random() < TOWER_TASKS["word"] * NEVER_A_WORD:
                drawing = draw_word("".join(rng.choice(list(LETTERS), rng.integers(2, LONGEST_WORD + 1))), rng)
            else:
                drawing, _ = self._draw(str(rng.choice(list(TOWER_TASKS), p=list(TOWER_TASKS.values()))), rng)
            return drawing.image, drawing.marks

        set_seed(self.seed)
        tower = SiglipVisionModel(tower_config())
        steps = math.ceil(TOWER_STEPS * self.scale)
        projector = read_tiles(tower, base, draw, CHARACTERS, steps=steps, seed=self.seed)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".vision-") as vision:
            tower.eval().save_pretrained(vision)
            create_genieblue(base, vision, out)
        model = GenieBlueForConditionalGeneration.from_pretrained(out)
        model.multi_modal_projector.load_state_dict(projector.state_dict())
        model.save_pretrained(out, processor=GenieBlueProcessor.from_pretrained(out))

    def settings(self, stage: int) -> TrainingSettings:
        options = {**STAGES[stage], "steps": math.ceil(STAGES[stage]["steps"] * self.scale)}
        return TrainingSettings(
            stage, **options, batch_size=8, warmup_steps=math.ceil(0.03 * options["steps"]), vision_layer_decay=1.0,
            max_tiles=16,  # a word in one tile is too small to read
            max_length=256, save_steps=0, shuffle=False, seed=self.seed,
        )  # fmt: skip

    def training_data(self, stage: int) -> "DrawnChats":
        settings = self.settings(stage)
        return DrawnChats(self._chat, settings.steps * settings.batch_size, self.seed + stage)

    def held_out(self) -> list[Reading]:
        rng = np.random.default_rng(self.seed)
        left = {task: math.ceil(count * self.scale) for task, count in ASKED.items()}
        readings = []
        while any(left.values()):
            for task in [task for task, count in left.items() if count]:
                drawing, answers = self._ask(DRAWN.get(task, task), rng, held_out=True)
                question = QUESTIONS[task]
                readings.append(Reading(drawing.image, question, answers[question], task))
                left[task] -= 1
        return readings

    def _chat(self, rng: np.random.Generator) -> dict[str, Any]:
        """A chat with several questions about one drawing, in any order: one image teaches more than one answer."""
        drawing, answers = self._ask(str(rng.choice(list(TASKS), p=list(TASKS.values()))), rng)
        asked = rng.permutation(list(answers)).tolist()[:TURNS]
        messages: list[dict[str, Any]] = []
        for question in asked:
            content = [{"type": "text", "text": question}]
            if not messages:
                content.insert(0, {"type": "image", "image": drawing.image})
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answers[question]}]
        return {"messages": messages}

    def _draw(self, task: str, rng: np.random.Generator, held_out: bool = False) -> tuple[Drawing, tuple[int, ...]]:
        """A drawing for a task, with the lengths of its numbers."""
        if task == "word":
            words = self._held_out_words if held_out else self._train_words
            return draw_word(words[rng.integers(len(words))], rng), ()
        scans = self._held_out_scans if held_out else self._train_scans
        count, longest = (2, LONGEST_COMPARED) if task == "larger" else (1, LONGEST_NUMBER)
        lengths = tuple(rng.integers(1, longest + 1, count).tolist())
        return draw_numbers(scans, lengths, rng, augment=not held_out), lengths

    def _ask(self, task: str, rng: np.random.Generator, held_out: bool = False) -> tuple[Drawing, dict[str, str]]:
        """A drawing for a task, with the answers to all questions about it."""
        while True:
            drawing, lengths = self._draw(task, rng, held_out)
            shown = drawing.characters
            if task == "word":
                return drawing, {
                    QUESTIONS["spelled"]: " ".join(shown), QUESTIONS["word"]: shown,
                    "How many letters?": str(len(shown)),
                }  # fmt: skip
            if task == "number":
                return drawing, {
                    QUESTIONS["number"]: shown, "Which digits?": " ".join(shown), QUESTIONS["digits"]: str(len(shown))
                }  # fmt: skip
            first, second = shown[: lengths[0]], shown[lengths[0] :]
            if int(first) != int(second):
                return drawing, {
                    QUESTIONS["larger"]: max(first, second, key=int),
                    "Which number is smaller?": min(first, second, key=int),
                    "Which numbers?": f"{first} and {second}",
                }


class DrawnChats(Dataset):
    """Chats drawn on access; an index gives the same one in every process."""

    def __init__(self, draw: Callable[[np.random.Generator], dict[str, Any]], samples: int, seed: int):
        self.draw, self.samples, self.seed = draw, samples, seed

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.draw(np.random.default_rng([self.seed, index]))


def split_words(vocabulary: dict[str, int], seed: int) -> tuple[list[str], list[str]]:
    """Capitalized words of 3 to 7 letters: those of a tokenizer's vocabulary to train on, and held-out ones.

    The latter are from Python's help topics, so they are real words; some tokens are parts of words.
    """
    tokens = {token[1:] for token in vocabulary if re.fullmatch(f"Ġ[a-z]{{3,{LONGEST_WORD}}}", token)}
    help_words = set(re.findall(rf"(?<![\w.`*])[a-z]{{3,{LONGEST_WORD}}}(?![\w`*])", " ".join(topics.values())))
    chosen = np.random.default_rng(seed).choice(sorted(help_words & tokens), HELD_OUT_WORDS, replace=False)
    held_out = sorted(map(str, chosen))
    return [word.upper() for word in sorted(tokens - set(held_out))], [word.upper() for word in held_out]
