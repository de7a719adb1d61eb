"""Training data of a lab, drawn when it is asked for, and held-out questions as files for an evaluation."""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from genieblue.data.chat_samples import IMAGE_KEYS, parse_chat, texts_of
from genieblue.data.chats import ChatDataset
from genieblue.data.jsonl_files import JsonlFiles
from genieblue.data.sample_keys import shortened
from genieblue.evaluation.samples import EvaluationDataset
from genieblue.lab.lab_file import ENGLISH
from genieblue.lab.tasks import TASKS
from genieblue.lab.text import split_documents
from modeling_genieblue.image_reading_genieblue import read_image
from modeling_genieblue.staging_genieblue import NewFolder

logger = logging.getLogger(__name__)

TRAINED, HELD_OUT = 0, 1  # first numbers of the seeds of images, which so never meet
QUESTIONS = "questions.jsonl"
IMAGE_PARTS = ("image", "image_url")
CALCULATOR = re.compile(r"<<.*?>>")  # notes in the answers of GSM8K, which no reader sees


class LabChats(Dataset):
    """Chats of all tasks in turn and a share of texts; an index gives the same one on any machine.

    All structures of a seed see the same chats in the same order.
    """

    def __init__(
        self,
        tasks: Mapping[str, Mapping[str, str] | None],
        texts: Sequence[dict[str, Any]],
        text_share: float,
        samples: int,
        seed: int,
    ):
        self._draw = TASKS
        self._files = {name: ChatDataset(files["train"], skip_bad=None) for name, files in tasks.items() if files}
        self._names, self._texts, self._text_share = tuple(tasks), texts, text_share
        self._samples, self._seed = samples, seed

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._samples:
            raise IndexError(f"Sample {index} of {self._samples} does not exist.")
        rng = np.random.default_rng([TRAINED, self._seed, index])
        if rng.random() < self._text_share:
            return self._texts[rng.integers(len(self._texts))]
        name = self._names[rng.integers(len(self._names))]
        if name not in self._files:
            return self._draw[name](rng, False).chat(rng)
        sample = self._files[name][int(rng.integers(len(self._files[name])))]
        # Opened here: paths of samples in memory have no folder that they may not leave, and are refused.
        return {"messages": sample.messages, "images": [read_image(image) for image in sample.images]}


def read_texts(sources: Sequence[str]) -> list[dict[str, Any]]:
    """Chats without images, from files of chats or of `question` and `answer`, or from Python's own English.

    Raises `ValueError` that names the line for one that is neither, or has an image.
    """
    found: list[dict[str, Any]] = []
    for source in sources:
        if source == ENGLISH:
            documents = split_documents().train
            found += [_chat(f"Explain: {each.title}", text) for each in documents for text in each.paragraphs]
        else:
            found += [_read(line, where) for where, line in numbered_lines(source)]
    return found


def fitting(texts: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, Any]]:
    """The texts of at most so many tokens; others, of which training would refuse each, are counted in the log.

    Raises `ValueError` if none is left.
    """
    kept = []
    for text in texts:
        whole: Any = tokenizer.apply_chat_template(text["messages"], tokenize=False)
        if len(tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]) < length:
            kept.append(text)
    if not kept:
        raise ValueError(f"All {len(texts)} texts have more than {length} tokens: raise `max_length` of `training`.")
    if len(kept) < len(texts):
        logger.info("Left out %d of %d texts of more than %d tokens.", len(texts) - len(kept), len(texts), length)
    return kept


def numbered_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The lines of a JSONL file, each after its `file:line`; `ValueError` that names one that is no JSON."""
    lines = JsonlFiles((Path(path),))
    for place in range(len(lines)):
        where = lines.where(place)
        try:
            line = lines[place]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        yield where, line


def _read(line: Any, where: str) -> dict[str, Any]:
    if isinstance(line, dict) and {"question", "answer"} <= set(line):
        question, answer = (_text(line[name], name, where) for name in ("question", "answer"))
        return _chat(question, CALCULATOR.sub("", answer))
    if not isinstance(line, dict) or not {"messages", "conversations"} & set(line):
        path, _, number = where.rpartition(":")
        raise ValueError(
            f"{path}: {shortened(line)} in line {number} is no text to train on: expected `messages`, or `question`, "
            "`answer`."
        )
    if _has_image(line):
        raise ValueError(f"{where}: the chat has an image: leave it out of `texts`, and make it a task of your own.")
    messages = parse_chat(line, where, None).messages
    return {"messages": [{**each, "content": "".join(texts_of([each]))} for each in messages]}


def _has_image(line: Mapping[str, Any]) -> bool:
    turns = line.get("messages") or line.get("conversations")
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return any(line.get(key) for key in IMAGE_KEYS) or any(part.get("type") in IMAGE_PARTS for part in parts)


def _text(value: Any, name: str, where: str) -> str:
    is_text = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if not is_text or not str(value).strip():
        raise ValueError(f"{where}: `{name}` is {shortened(value)}, expected a text.")
    return str(value)


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_held_out(folder: Path, tasks: Mapping[str, Any], count: int) -> None:
    """Writes the questions of each task that the lab draws into a folder of its own; what is there stays."""
    for name, files in tasks.items():
        if files or (folder / name / QUESTIONS).is_file():
            continue
        with NewFolder(folder / name, "drawing") as new:
            lines = []
            for index in range(count):
                drawn = TASKS[name](np.random.default_rng([HELD_OUT, index]), True)
                image = f"{index:04d}.png"
                drawn.image.save(new.staging / image)
                lines.append(json.dumps(drawn.question(image, name), ensure_ascii=False) + "\n")
            (new.staging / QUESTIONS).write_text("".join(lines), encoding="utf-8")
            new.put_in_place()


def held_out(folder: Path, name: str, files: Mapping[str, str] | None, count: int) -> EvaluationDataset:
    """The questions of a task; `ValueError` if there are fewer than `count`."""
    return read_questions(files["eval"] if files else folder / name / QUESTIONS, name, count)


def read_questions(path: str | Path, name: str, count: int) -> EvaluationDataset:
    """The first questions of a task in a file; `ValueError` if there are fewer than `count`."""
    dataset = EvaluationDataset(path, skip_bad=None)
    if len(dataset) < count:
        raise ValueError(
            f"The task {name!r} has {len(dataset)} questions, and `held_out` is {count}: add questions, lower it, or "
            "remove the lab's folder `held-out` if they were drawn for another number."
        )
    return dataset.first(count)
