"""A lab as a YAML file: the structures to compare, on which base and data, for how long, and what is asked."""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from conversion.staging import write_whole
from genieblue.lab.structures import KINDS, structure_kind
from genieblue.lab.tasks import TASKS
from genieblue.training.run_file import checked_values, read_yaml
from genieblue.training.settings import FREE_SETTINGS, TrainingSettings

BASES = ("toy", "smollm2")  # that `lab base` makes
SMALL = "small"  # vision tower that the lab makes
ENGLISH = "english"  # the text that ships with Python
# What a lab needs, as lines of its file.
EXAMPLES = {"base": "base: smollm2", "structures": "structures: [full, lora]", "training": "training: {steps: 1000}"}
RECORD = "lab.json"  # beside the file of a lab in its folder: what decides the results
OF_SMALL_TOWER = ("vision_steps", "reading_steps")
# Of text questions: what is asked of a file, which must be named.
OF_BENCHMARKS = {
    "gsm8k_questions": "gsm8k", "mt_bench_questions": "mt_bench", "mt_bench_tokens": "mt_bench"
}  # fmt: skip
NAME = re.compile(r"\w[\w.-]*")  # of a folder
PARTS = {group for kind in KINDS.values() for group in kind.groups}  # that structures train
# Of a run: a cell has its own, has nothing to validate on, and counts samples, not rows of packed ones.
NOT_OF_A_LAB = (
    "stage", "seed", "epochs", "show_progress", "fsdp", "max_tiles", "eval_steps", "eval_answers",
    "eval_max_new_tokens", "pack", "patience",
)  # fmt: skip
# Divisors of `--quick`.
QUICK = {"steps": 8, "vision_steps": 8, "reading_steps": 8, "projector_steps": 8, "held_out": 4}


@dataclass(frozen=True)
class TextQuestions:
    """How much text ability is tested on.

    Attributes:
        facts, english: multiple-choice questions, and held-out pieces of Python's documentation, 49 in all.
        gsm8k, mt_bench: JSONL files of the two benchmarks, without which they are left out.
        mt_bench_tokens: of an answer, to be compared with the base's.
    """

    facts: int = 600
    english: int = 49
    gsm8k: str | None = None
    gsm8k_questions: int = 200
    mt_bench: str | None = None
    mt_bench_questions: int = 80
    mt_bench_tokens: int = 48

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            least = int(name == "mt_bench_tokens")
            if isinstance(value, int) and value < least:
                raise ValueError(f"`{name}` is {value}: expected {least} or more.")

    def fewer(self, divisor: int) -> "TextQuestions":
        """A part of them, at least two of each kind that is asked."""
        counts = ("facts", "english", "gsm8k_questions", "mt_bench_questions")
        return dataclasses.replace(self, **{each: _divided(getattr(self, each), divisor, 2) for each in counts})


@dataclass(frozen=True)
class LabFile:
    """The settings of a lab.

    Attributes:
        base: folder or Hub id of the LLM, or one of `BASES`.
        vision: folder or Hub id of a SigLIP, or `small`: one that the lab trains on its own images.
        structures: names, and how many seeds each is trained with; in a file also a list, with `seeds` for all.
        tasks: names of `TASKS`; or, from a name of your own, `{train: FILE, eval: FILE}` of chats.
        texts: pure text to train on: JSONL of chats or of `question` and `answer`, or `english`.
        data: kinds of training data by name, with the share of texts in each.
        vision_steps, reading_steps: of the small tower: with captions, and of reading what the tasks' images show,
            which its projector learns to put in the base's own embeddings.
        projector_steps: of the paper's first stage, which is run once a seed: all structures are equal before the
            second.
        training: `TrainingSettings` of the second stage; learning rates by the names of all parts, of which each
            structure takes its own.
        held_out: questions of each task; `standard_error` is the largest allowed for the score of one, in points.
        text_tasks: what text ability is tested on.
        dtype: of the base in memory; with `bfloat16`, trained weights are float32 under autocast.
    """

    base: str
    structures: dict[str, int]
    vision: str = SMALL
    tasks: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(TASKS))
    texts: tuple[str, ...] = ()
    data: dict[str, float] = field(default_factory=lambda: {"images": 0.0})
    vision_steps: int = 1000
    reading_steps: int = 4000
    projector_steps: int = 100
    training: dict[str, Any] = field(default_factory=dict)
    lora_rank: int = 8
    max_tiles: int = 16
    held_out: int = 100
    standard_error: float | None = None
    max_new_tokens: int = 16
    batch_size: int = 16
    text_tasks: TextQuestions = TextQuestions()
    dtype: str = "float32"

    def __post_init__(self):
        for name, seeds in self.structures.items():
            structure_kind(name)
            if seeds < 1:
                raise ValueError(f"The structure {name!r} has {seeds} seeds: expected at least 1, or leave it out.")
        for name in (*self.data, *self.tasks):
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} cannot be the name of a folder: name data and tasks with letters, digits, - and _."
                )
        for name in (
            "vision_steps",
            "reading_steps",
            "lora_rank",
            "max_tiles",
            "held_out",
            "max_new_tokens",
            "batch_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}: expected at least 1.")
        for name in ("base", "vision"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is empty: expected a name, a folder or a Hub id.")
        if self.projector_steps < 0:
            raise ValueError(f"`projector_steps` is {self.projector_steps}: expected 0 or more.")
        for name, share in self.data.items():
            if not 0 <= share < 1:
                raise ValueError(f"The share of texts in {name!r} is {share}: expected at least 0 and below 1.")
            if share and not self.texts:
                raise ValueError(f"The data {name!r} has a share of {share} texts, but `texts` names none.")
        if not self.data or not self.structures or not self.tasks:
            raise ValueError("A lab needs at least one of each: structures, tasks and data.")
        for name, files in self.tasks.items():
            _check_task(name, files)
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"`dtype` is {self.dtype!r}: expected float32 or bfloat16.")
        if self.standard_error is not None:
            if not 0 < self.standard_error < math.inf:
                raise ValueError(f"`standard_error` is {self.standard_error}: expected points above 0.")
            needed = math.ceil((50 / self.standard_error) ** 2)  # of a score that is right or wrong, at its worst
            if self.held_out < needed:
                raise ValueError(
                    f"With {self.held_out} held-out questions, the score of a task has a standard error of up to "
                    f"{50 / math.sqrt(self.held_out):.1f} points; for {self.standard_error:g} (`standard_error`) it "
                    f"takes {needed}: raise `held_out`."
                )
        settings = self.settings(0, self.training.get("learning_rates", {}))
        if unknown := sorted(set(settings.learning_rates) - PARTS):
            raise ValueError(f"`learning_rates` has {unknown[0]!r}: expected parts, {', '.join(sorted(PARTS))}.")

    def settings(self, seed: int, learning_rates: dict[str, float]) -> TrainingSettings:
        """Of the second stage of a cell."""
        own = {"seed": seed, "learning_rates": learning_rates, "max_tiles": self.max_tiles}
        return TrainingSettings(2, **{**self.training, **own})

    @property
    def steps(self) -> int:
        """Of the second stage."""
        return int(self.training["steps"])

    def quick(self) -> "LabFile":
        """A small version, to see whether all of it works: one seed, and a fraction of the steps and questions."""
        steps = (*OF_SMALL_TOWER, "projector_steps")
        shorter = {name: _divided(getattr(self, name), QUICK[name], 1) for name in steps}
        return dataclasses.replace(
            self,
            structures=dict.fromkeys(self.structures, 1),
            training={**self.training, "steps": _divided(self.steps, QUICK["steps"], 1)},
            held_out=_divided(self.held_out, QUICK["held_out"], 2),
            text_tasks=self.text_tasks.fewer(QUICK["held_out"]),
            standard_error=None,
            **shorter,
        )

    def decisive(self) -> dict[str, Any]:
        """What decides the result of a cell, without where files are, and with what is in them."""
        values = dataclasses.asdict(self)
        for name in ("base", "vision", "structures", "data"):  # compared by their weights, or by cell
            del values[name]
        free = set(FREE_SETTINGS) - {"batch_size", "gradient_accumulation"}
        values["training"] = {name: value for name, value in self.training.items() if name not in free}
        of_tasks = [path for files in self.tasks.values() if files for path in files.values()]
        files = [*self.texts, self.text_tasks.gsm8k, self.text_tasks.mt_bench, *of_tasks]
        hashes = {path: _sha256(path) for path in files if path and path != ENGLISH}
        return json.loads(json.dumps(_replaced(values, hashes)))


def read_lab_file(path: Path) -> LabFile:
    """The lab of a YAML file; `OSError` for no file, `ValueError` for what is unknown, missing or out of range.

    A setting that would have no effect is refused, too, unless the file is the record in a lab's folder. Paths in it
    are relative to its folder.
    """
    values = read_yaml(path, "a lab", EXAMPLES["base"])
    if missing := [name for name in EXAMPLES if values.get(name) is None]:
        raise ValueError(f"{path}: a lab needs `{missing[0]}`: add it, such as `{EXAMPLES[missing[0]]}`.")
    seeds = checked_values({"seeds": values.pop("seeds", None)}, {"seeds": int}, path, "a lab").get("seeds")
    if seeds is not None and isinstance(values["structures"], dict):
        raise ValueError(f"{path}: `seeds` is for a list of structures, and here each has its own: leave it out.")
    for name, default in (("structures", 1 if seeds is None else seeds), ("tasks", None)):
        if isinstance(given := values.get(name), list):
            if len(set(map(str, given))) < len(given):
                raise ValueError(f"{path}: `{name}` has a name twice: {', '.join(map(str, given))}.")
            values[name] = dict.fromkeys(map(str, given), default)
    for name in ("structures", "data"):
        if values.get(name) is not None:
            _a_mapping(values[name], name, path)
    training, tasks, questions = (values.pop(name, None) for name in ("training", "tasks", "text_tasks"))
    values = checked_values(values, get_type_hints(LabFile), path, "a lab")
    if _a_mapping(training, "training", path).get("steps") is None:
        raise ValueError(f"{path}: `training` needs `steps`, such as `training: {{steps: 1000}}`.")
    allowed = {name: kind for name, kind in get_type_hints(TrainingSettings).items() if name not in NOT_OF_A_LAB}
    values["training"] = checked_values({str(name): value for name, value in training.items()}, allowed, path, "a lab")
    if tasks is not None:
        values["tasks"] = {str(name): _beside(path, files) for name, files in _a_mapping(tasks, "tasks", path).items()}
    for name in ("base", "vision"):
        if name in values:
            values[name] = _beside(path, values[name])
    if questions is not None:
        found = checked_values(_a_mapping(questions, "text_tasks", path), get_type_hints(TextQuestions), path, "a lab")
        values["text_tasks"] = TextQuestions(**_beside(path, found))
    values["texts"] = tuple(_beside(path, text) for text in values.get("texts", ()))
    lab = LabFile(**values)
    if not is_record(path) and (idle := _without_effect(lab, values, questions or {})):
        raise ValueError(f"{path}: {idle}")
    return lab


def is_record(path: Path) -> bool:
    """Whether a lab file is the one that a lab has written into its folder."""
    return path.with_name(RECORD).is_file()


def _without_effect(lab: LabFile, given: Mapping[str, Any], questions: Mapping[str, Any]) -> str | None:
    """What is wrong with settings that are given and have no effect."""
    if lab.vision != SMALL and (of_small := [name for name in OF_SMALL_TOWER if name in given]):
        return (
            f"`{of_small[0]}` is of the tower that the lab trains (`vision: {SMALL}`), and {lab.vision} is there "
            "already: leave it out. Its projector is trained for `projector_steps`."
        )
    if lab.texts and not any(lab.data.values()):
        return "`texts` are named, but no data has a share of them: give one, such as `data: {mixed: 0.1}`."
    for name, file in OF_BENCHMARKS.items():
        if questions.get(name) is not None and getattr(lab.text_tasks, file) is None:
            return f"`{name}` is {questions[name]}, but `{file}` names no file: give it, or leave this out."
    return None


def write_lab_file(path: Path, lab: LabFile) -> None:
    """Writes a lab that `read_lab_file` reads back, without defaults that have no effect."""
    values = json.loads(json.dumps(dataclasses.asdict(lab)))  # lists for tuples
    idle = [(LabFile, values, name) for name in OF_SMALL_TOWER if lab.vision != SMALL]
    questions = values["text_tasks"]
    idle += [(TextQuestions, questions, name) for name, file in OF_BENCHMARKS.items() if questions[file] is None]
    for kind, settings, name in idle:
        if settings[name] == getattr(kind, name):
            del settings[name]
    write_whole(path, yaml.safe_dump(values, sort_keys=False))


def _a_mapping(value: Any, name: str, path: Path) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: `{name}` is {value!r}, expected lines like `name: value` below it.")
    return value


def _divided(count: int, divisor: int, least: int) -> int:
    """A part of a count that is not 0."""
    return max(min(least, count), count // divisor)


def _beside(path: Path, value: Any) -> Any:
    """Paths that exist in the lab file's folder, as absolute ones; everything else as it is."""
    if isinstance(value, dict):
        return {str(name): _beside(path, item) for name, item in value.items()}
    place = path.absolute().parent / Path(str(value)).expanduser()
    is_name = value in (*BASES, SMALL, ENGLISH)
    return str(place) if isinstance(value, str) and value and not is_name and place.exists() else value


def _check_task(name: str, files: Any) -> None:
    if files is None:
        if name not in TASKS:
            raise ValueError(
                f"Unknown task {name!r}: choose from {', '.join(TASKS)}, or give files of your own: {name}: {{train: "
                "FILE, eval: FILE}."
            )
    elif (
        not isinstance(files, dict)
        or set(files) != {"train", "eval"}
        or {type(each) for each in files.values()} != {str}
    ):
        raise ValueError(f"The task {name!r} is {files!r}: expected {{train: FILE, eval: FILE}}.")


def _sha256(path: str) -> str:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not a file: expected the JSONL file that the lab names.")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _replaced(value: Any, new: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _replaced(item, new) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replaced(item, new) for item in value]
    return new.get(value, value) if isinstance(value, str) else value
