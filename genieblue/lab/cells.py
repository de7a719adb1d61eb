"""One cell of a lab: a structure, trained with a seed on one kind of data, and what it then answers.

Each step leaves files, and a cell goes on from those that are there. As a script it runs one cell: a process of its
own for each keeps their memory apart, and a lab alive when one dies.
"""

import hashlib
import json
import logging
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from conversion.staging import explained_full_disk, lock_output, write_json_whole
from genieblue.evaluation.answering import answerer_of
from genieblue.evaluation.evaluate import ScoredAnswer, evaluate
from genieblue.evaluation.metrics import standard_error
from genieblue.lab.data import LabChats, fitting, held_out, read_texts
from genieblue.lab.lab_file import RECORD, SMALL, LabFile, read_lab_file
from genieblue.lab.structures import LabStructure, load_structure, structure_kind
from genieblue.lab.structures.structure import trained_count
from genieblue.lab.text_tasks import run_text_tasks
from genieblue.training.run_log import read_log
from genieblue.training.stages import train
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor
from modeling_genieblue.base_identity_genieblue import weight_file_hashes
from modeling_genieblue.model_files_genieblue import read_json
from modeling_genieblue.view_routing_genieblue import MULTIMODAL

logger = logging.getLogger(__name__)

LAB_FILE = "lab.yaml"
CELL, RESULT, IMAGES, TEXTS, BASE_TEXTS = "cell.json", "result.json", "images.json", "texts.json", "base.json"
MODEL, BASE, VISION, HELD_OUT, TEXT_TASKS, START, CELLS = (
    "model", "base", "vision", "held-out", "text-tasks", "start", "cells"
)  # fmt: skip
SCORES = (IMAGES, TEXTS)
GOES_ON = "free some space, or use another disk. The lab goes on when it is run again."
TAKEN = 75  # exit code of a cell that another process is running


@dataclass(frozen=True, order=True)
class Cell:
    """A structure, by name, on one kind of `data`, with a `seed`."""

    data: str
    structure: str
    seed: int

    def folder(self, lab: Path) -> Path:
        """Where its files are."""
        return lab / CELLS / self.data / self.structure / f"seed-{self.seed}"

    def __str__(self) -> str:
        return f"{self.structure}, {self.data}, seed {self.seed}"


def cells_of(lab: LabFile) -> list[Cell]:
    """All cells of a lab; those of the first seed come first, so that there is a whole table early."""
    most = max(lab.structures.values())
    return [
        Cell(data, name, seed)
        for seed in range(most)
        for data in lab.data
        for name, seeds in lab.structures.items()
        if seed < seeds
    ]


def check_is_lab(folder: Path) -> None:
    """`OSError` for a folder of no lab."""
    if not (folder / LAB_FILE).is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a lab: it has no {LAB_FILE}.")


def is_done(place: Path) -> bool:
    """Whether the cell in a folder is finished and has not failed."""
    return (place / RESULT).is_file() and "failed" not in read_json(place / RESULT)


def state_of(folder: Path, cell: Cell) -> tuple[str, str]:
    """`done`, `failed`, `started` or `missing`, and a word on it."""
    place = cell.folder(folder)
    if (place / RESULT).is_file():
        result = read_json(place / RESULT)
        return ("failed", result["failed"]) if "failed" in result else ("done", f"average {result['average']:.1f}")
    if not (place / CELL).is_file():
        return "missing", ""
    if (place / MODEL).is_dir():
        return "started", "trained, to be evaluated"
    records = read_log(place / f"{MODEL}-run")
    return "started", f"at step {records[-1]['step']}" if records else "not yet at its first step"


def run_cell(folder: Path, cell: Cell) -> None:
    """Runs what is missing of a cell; a training that fails, by its loss or for lack of memory, marks it as failed.

    Raises `ValueError` for a cell of another configuration, and `OSError` if another process is running it.
    """
    lab = read_lab_file(folder / LAB_FILE)
    place = cell.folder(folder)
    place.mkdir(parents=True, exist_ok=True)
    with lock_output(place, "lab"):
        wanted = configurations(folder, lab, [cell])[cell]
        if (place / CELL).is_file():
            check_same(place / CELL, wanted)
        else:
            write_json_whole(place / CELL, wanted)
        if (place / RESULT).is_file():
            return
        try:
            if not (place / MODEL).is_dir():
                train_cell(folder, lab, cell, place / MODEL)
        except ValueError as error:
            logger.warning("%s failed: %s", cell, error)
            write_json_whole(place / RESULT, {"failed": str(error)})
        else:
            for checkpoint in place.glob(f"{MODEL}-run/checkpoint-*"):
                shutil.rmtree(checkpoint)
            write_json_whole(place / RESULT, _result(folder, lab, cell))


def configurations(folder: Path, lab: LabFile, cells: Iterable[Cell]) -> dict[Cell, dict[str, Any]]:
    """What decides the result of each cell: settings, and the sha256 of all that the cells of a lab share."""
    shared = {
        "lab": lab.decisive(),
        "base": weight_file_hashes(base_of(folder, lab)),
        "vision": weight_file_hashes(folder / VISION if lab.vision == SMALL else lab.vision),
        **{name: _folder_sha256(folder / name) for name in (HELD_OUT, TEXT_TASKS)},
    }
    cells = list(cells)
    starts = {seed: weight_file_hashes(start_folder(folder, seed)) for seed in {cell.seed for cell in cells}}
    found = {
        cell: {**asdict(cell), "text_share": lab.data[cell.data], START: starts[cell.seed], **shared} for cell in cells
    }
    return {cell: json.loads(json.dumps(each)) for cell, each in found.items()}


def _folder_sha256(folder: Path) -> str:
    """Of the names and bytes of all files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_same(recorded: Path, wanted: Mapping[str, Any]) -> None:
    """`ValueError` if the configuration in the file of a cell, or of a lab, is another one."""
    if differing := _differences(read_json(recorded), wanted):
        raise ValueError(
            f"{recorded.parent} is of another configuration: {'; '.join(differing[:3])}. Run the lab in another "
            "folder (--out), or remove this one."
        )


def check_cells(folder: Path, lab: LabFile) -> None:
    """`ValueError` for a cell in a lab's folder that is of another lab, as far as its files alone can tell.

    `configurations` tells all of it, but needs the files that the lab names.
    """
    records = {cell: cell.folder(folder) / CELL for cell in cells_of(lab)}
    records = {cell: path for cell, path in records.items() if path.is_file()}
    known = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    shared = {"lab": known["lab"]} if "lab" in known else {}
    starts: dict[int, Any] = {}
    for cell, path in records.items():
        record = read_json(path)
        of_cell = {**asdict(cell), "text_share": lab.data[cell.data]}
        # What all cells of a folder stand on is that of its first.
        shared = {name: value for name, value in record.items() if name not in (*of_cell, START)} | shared
        wanted = {**shared, **of_cell, START: starts.setdefault(cell.seed, record.get(START))}
        check_same(path, wanted)


def _differences(was: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted(was.keys() | now.keys())
        return [each for key in keys for each in _differences(was.get(key), now.get(key), f"{name}.{key}".strip("."))]
    return [] if was == now else [f"{name} was {was!r} and is {now!r}"]


def base_of(folder: Path, lab: LabFile) -> Path | str:
    """The base of a lab: made in its folder, or the one that is named."""
    return folder / BASE if (folder / BASE).is_dir() else lab.base


def rates_for(structure: LabStructure, lab: LabFile) -> dict[str, float]:
    """The learning rates of a lab that are those of a structure's parts."""
    rates = lab.training.get("learning_rates", {})
    return {group: rates[group] for group in structure.groups if group in rates}


def _result(folder: Path, lab: LabFile, cell: Cell) -> dict[str, Any]:
    place = cell.folder(folder)
    structure = load_structure(place / MODEL, base_of(folder, lab))
    processor = structure.processor(place / MODEL)
    structure.model.to("cuda" if torch.cuda.is_available() else "cpu")
    if not (place / IMAGES).is_file():
        write_json_whole(place / IMAGES, image_scores(structure.model, processor, folder, lab))
    if not (place / TEXTS).is_file():
        base = read_json(folder / BASE_TEXTS)
        view = structure.model.multimodal_language_model
        write_json_whole(place / TEXTS, run_text_tasks(view, processor.tokenizer, folder / TEXT_TASKS, base=base))
    images, texts = read_json(place / IMAGES), read_json(place / TEXTS)
    return {
        "trainable": sum(trained_count(structure).values()),
        "parts": trained_count(structure),
        "copied_blocks": structure.model.config.replicated_layers if structure.is_placed else [],
        "images": {name: _without_values(score) for name, score in images.items()},
        "average": statistics.fmean(score["score"] for score in images.values()),
        "texts": {name: _without_values(score) for name, score in texts.items()},
        **training_figures(place / f"{MODEL}-run", lab),
    }


def _without_values(score: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in score.items() if name not in ("values", "answers")}


def training_figures(run: Path, lab: LabFile) -> dict[str, Any]:
    """Seconds by step and peak memory of a run, from its log, and its losses by step."""
    records = [record for record in read_log(run) if "loss" in record]
    per_step = lab.settings(0, {}).samples_per_step
    # The first record is of a single, slow step.
    seconds = [per_step / record["samples_per_second"] for record in records[1:] if "samples_per_second" in record]
    return {
        "steps": records[-1]["step"] if records else 0,
        "seconds_per_step": statistics.median(seconds) if seconds else None,
        "peak_memory_gb": max((record.get("peak_memory_gb", 0.0) for record in records), default=None),
        "losses": [(record["step"], record["loss"]) for record in records],
    }  # fmt: skip


def start_folder(folder: Path, seed: int) -> Path:
    """The GenieBlue with a trained projector from which all structures of a seed start."""
    return folder / START / f"seed-{seed}" / MODEL


def train_cell(folder: Path, lab: LabFile, cell: Cell, output: Path) -> None:
    """Trains the structure of a cell into a folder, from the last checkpoint of a run that was killed."""
    structure, processor = make_structure(folder, lab, cell)
    settings = lab.settings(cell.seed, rates_for(structure, lab))
    share = lab.data[cell.data]
    texts = fitting(read_texts(lab.texts), processor.tokenizer, settings.max_length) if share else []
    chats = LabChats(lab.tasks, texts, share, settings.steps * settings.samples_per_step, cell.seed)
    run = output.with_name(f"{output.name}-run")
    resume = run.is_dir() and get_last_checkpoint(str(run)) is not None
    train(structure, processor, chats, output, settings, resume=resume)


def make_structure(folder: Path, lab: LabFile, cell: Cell) -> tuple[LabStructure, Any]:
    """A structure before its training, on the tower and projector that all of a seed start from; and a processor."""
    start = start_folder(folder, cell.seed)
    model = GenieBlueForConditionalGeneration.from_pretrained(
        start, base_model=str(base_of(folder, lab)), dtype=getattr(torch, lab.dtype)
    )
    kind, placement = structure_kind(cell.structure)
    set_seed(cell.seed)
    structure = kind.make(
        model.language_model, model.vision_tower, placement, lora_rank=lab.lora_rank,
        base_model_name_or_path=str(base_of(folder, lab)),
    )  # fmt: skip
    structure.model.multi_modal_projector.load_state_dict(model.multi_modal_projector.state_dict())
    return structure, GenieBlueProcessor.from_pretrained(start)


def image_scores(model: Any, processor: Any, folder: Path, lab: LabFile) -> dict[str, dict[str, Any]]:
    """The score of each task, from 0 to 100, with its standard error, and by question its value and the answer."""
    answerer = answerer_of(model, processor, batch_size=lab.batch_size, view=MULTIMODAL)
    scores = {}
    for name, files in lab.tasks.items():
        dataset = held_out(folder / HELD_OUT, name, files, lab.held_out)
        answers: list[ScoredAnswer] = evaluate(answerer, dataset, max_new_tokens=lab.max_new_tokens).answers
        values = [100 * answer.score for answer in answers]
        scores[name] = {
            "score": statistics.fmean(values),
            "standard_error": standard_error(values),
            "count": len(values),
            "values": values,
            "answers": [answer.answer for answer in answers],
        }
    return scores


def main() -> None:
    """Runs the cell that the command line names: the lab's folder, data, structure and seed."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder, data, structure, seed = sys.argv[1:]
    try:
        with explained_full_disk(Path(folder), remedy=GOES_ON):
            run_cell(Path(folder), Cell(data, structure, int(seed)))
    except BlockingIOError:
        sys.exit(TAKEN)
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
