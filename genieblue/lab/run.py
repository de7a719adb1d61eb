"""A lab: what all cells share is made once, then every cell that is missing is run, and results are put together."""

import fnmatch
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.chat_ids import NO_STOP_TOKEN, stop_token_ids
from conversion.create import create_genieblue
from conversion.staging import explained_full_disk, lock_output, write_json_whole
from genieblue.lab.cells import (
    BASE,
    BASE_TEXTS,
    CELL,
    CELLS,
    GOES_ON,
    HELD_OUT,
    LAB_FILE,
    MODEL,
    RESULT,
    SCORES,
    TAKEN,
    TEXT_TASKS,
    VISION,
    Cell,
    base_of,
    cells_of,
    check_cells,
    check_is_lab,
    check_same,
    configurations,
    is_done,
    start_folder,
    state_of,
)
from genieblue.lab.checks import check_lab
from genieblue.lab.data import LabChats, fitting, held_out, read_texts, write_held_out
from genieblue.lab.lab_file import BASES, RECORD, SMALL, LabFile, read_lab_file, write_lab_file
from genieblue.lab.text_tasks import run_text_tasks, write_text_tasks
from genieblue.training.settings import TrainingSettings
from genieblue.training.stages import train
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor
from modeling_genieblue.base_identity_genieblue import weight_file_hashes
from modeling_genieblue.configuration_genieblue import PLACEMENTS, select_replicated_layers
from modeling_genieblue.model_files_genieblue import read_json
from modeling_genieblue.staging_genieblue import NewFolder

logger = logging.getLogger(__name__)

UNTRAINED = "untrained"


def run_lab(lab: LabFile, folder: Path, only: Sequence[str] = (), jobs: int = 1) -> dict[Cell, tuple[str, str]]:
    """Runs every cell that is missing, each in a process of its own, and returns the state of all.

    `only` are patterns of names of structures, such as `genieblue-*`; `jobs` is how many cells run at a time, on equal
    shares of the cores. A cell that fails or dies does not end the lab. Raises `ValueError` for a folder of another
    lab, or of cells of another configuration, before anything is run.
    """
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file: give the folder of the lab with --out.")
    for pattern in only:
        if not fnmatch.filter(lab.structures, pattern):
            raise ValueError(f"No structure is named like {pattern}: the lab has {', '.join(lab.structures)}.")
    cells = [cell for cell in cells_of(lab) if not only or any(fnmatch.fnmatch(cell.structure, each) for each in only)]
    settings = lab.decisive()
    if not (folder / RECORD).is_file():
        check_lab(lab)
    decisive = {
        "lab": settings,
        "base": lab.base if lab.base in BASES else weight_file_hashes(lab.base),
        "vision": lab.vision if lab.vision == SMALL else weight_file_hashes(lab.vision),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with lock_output(folder / LAB_FILE, "lab"):  # of those who share a lab's folder, one makes what all need
        with explained_full_disk(folder, remedy=GOES_ON):
            _take_over(lab, decisive, folder)
            prepare(lab, folder)
    for cell, wanted in configurations(folder, lab, cells).items():
        if (cell.folder(folder) / CELL).is_file():
            check_same(cell.folder(folder) / CELL, wanted)
    missing = [cell for cell in cells if not (cell.folder(folder) / RESULT).is_file()]
    logger.info("%d of %d cells are to be run", len(missing), len(cells))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(partial(_run_cell, folder, jobs), missing))
    return {cell: state_of(folder, cell) for cell in cells}


def _run_cell(folder: Path, jobs: int, cell: Cell) -> None:
    """One cell, in a process that shares the cores with those of other `jobs`."""
    logger.info("Cell: %s", cell)
    command = [sys.executable, "-m", "genieblue.lab.cells", str(folder), cell.data, cell.structure, str(cell.seed)]
    shared = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))} if jobs > 1 else {}
    code = subprocess.run(command, check=False, env={**os.environ, **shared}).returncode
    if code == TAKEN:
        logger.info("%s is left to the process that is running it.", cell)
    elif code:
        logger.warning("%s ended with exit code %d: it goes on from there when the lab is run again.", cell, code)


def _take_over(lab: LabFile, decisive: dict[str, Any], folder: Path) -> None:
    """Records the lab in its folder; `ValueError` if another one is there, or cells of another one.

    What decides is recorded apart: on another machine, the files that `LAB_FILE` names may lie elsewhere.
    """
    if (folder / RECORD).is_file():
        check_same(folder / RECORD, decisive)
    elif any(path for path in folder.iterdir() if not path.name.startswith((".", RECORD))):
        raise ValueError(
            f"{folder} holds something other than a lab, or one that does not record what it stands on: give a new "
            "folder with --out."
        )
    write_json_whole(folder / RECORD, decisive)
    check_cells(folder, lab)
    write_lab_file(folder / LAB_FILE, lab)


def prepare(lab: LabFile, folder: Path) -> None:
    """Makes what all cells share and is not there yet: base, questions, the base's texts, tower and projectors.

    Raises `ValueError` for questions or texts that do not do, before anything is trained.
    """
    write_held_out(folder / HELD_OUT, lab.tasks, lab.held_out)
    for name, files in lab.tasks.items():
        held_out(folder / HELD_OUT, name, files, lab.held_out)
    texts = read_texts(lab.texts)
    if not (folder / TEXT_TASKS).is_dir():
        write_text_tasks(folder / TEXT_TASKS, lab.text_tasks)
    if lab.base in BASES and not (folder / BASE).is_dir():
        make_base(lab.base, folder / BASE)
    if texts:
        fitting(texts, AutoTokenizer.from_pretrained(base_of(folder, lab)), lab.settings(0, {}).max_length)
    if not (folder / BASE_TEXTS).is_file():
        logger.info("Text tasks of the base")
        write_json_whole(folder / BASE_TEXTS, base_texts(lab, folder))
    if not (folder / VISION).is_dir() and lab.vision == SMALL:
        from genieblue.lab.vision import make_small_siglip

        logger.info("Vision tower: a small SigLIP learns to read the lab's own images")
        make_small_siglip(
            folder / VISION, base_of(folder, lab), contrast_steps=lab.vision_steps, reading_steps=lab.reading_steps
        )
    for seed in range(max(lab.structures.values())):
        if not start_folder(folder, seed).is_dir():
            _train_projector(lab, folder, seed)
    _log_blocks(lab, folder)


def make_base(name: str, out: Path) -> None:
    """Writes a base of `BASES` as a plain transformers folder; `ValueError` for another name."""
    if name not in BASES:
        raise ValueError(f"Unknown base {name!r}: choose one of {', '.join(BASES)}, or give a folder or Hub id.")
    if out.exists():
        raise OSError(f"{out} is there already: give a new folder.")
    with NewFolder(out, "base", replace=False) as new:
        if name == "smollm2":
            from genieblue.lab.smollm2_base import make_smollm2

            make_smollm2(new.staging)
        else:
            from genieblue.lab.toy_base import make_toy_base

            make_toy_base(new.staging, steps=700)
        new.put_in_place()


def base_texts(lab: LabFile, folder: Path) -> dict[str, dict]:
    """Text tasks of the base itself, which is what requests without images run with a base that is not shared."""
    place = base_of(folder, lab)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, lab.dtype)).eval()
    if not stop_token_ids(model.generation_config):
        raise ValueError(NO_STOP_TOKEN)  # which training would find only after the tower's
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return run_text_tasks(model, AutoTokenizer.from_pretrained(place), folder / TEXT_TASKS)


def _train_projector(lab: LabFile, folder: Path, seed: int) -> None:
    """The paper's first stage. All structures equal the base before the second, so that one does for all."""
    from genieblue.lab.vision import PROJECTOR

    logger.info("Projector of seed %d, for all structures", seed)
    place = start_folder(folder, seed).parent
    tower = folder / VISION if lab.vision == SMALL else lab.vision
    torch.manual_seed(seed)
    create_genieblue(
        base_of(folder, lab), tower, place / UNTRAINED, max_tiles=lab.max_tiles, lora_rank=lab.lora_rank,
        dtype=lab.dtype, overwrite=True,
    )  # fmt: skip
    processor = GenieBlueProcessor.from_pretrained(place / UNTRAINED)
    model = GenieBlueForConditionalGeneration.from_pretrained(place / UNTRAINED, dtype=getattr(torch, lab.dtype))
    if lab.vision == SMALL:
        model.multi_modal_projector.load_state_dict(load_file(Path(tower, PROJECTOR)))
    output = start_folder(folder, seed)
    if lab.projector_steps:
        settings = _first_stage(lab, seed)
        samples = settings.samples_per_step * lab.projector_steps
        train(model, processor, LabChats(lab.tasks, [], 0.0, samples, seed), output, settings)
    else:
        model.save_pretrained(output, processor=processor)
    shutil.rmtree(place / UNTRAINED)


def _first_stage(lab: LabFile, seed: int) -> TrainingSettings:
    """The settings of the second stage, as far as they suit a projector that is trained alone."""
    shared = {name: value for name, value in lab.training.items() if name not in ("steps", "learning_rates")}
    rates = lab.training.get("learning_rates", {})
    own = {name: rates[name] for name in ("multi_modal_projector",) if name in rates}
    return TrainingSettings(
        1, **{**shared, "steps": lab.projector_steps, "learning_rates": own, "max_tiles": lab.max_tiles, "seed": seed,
              "save_steps": 0},
    )  # fmt: skip


def _log_blocks(lab: LabFile, folder: Path) -> None:
    """Says which blocks each placement copies, above all of a base whose blocks do not divide by four."""
    start = start_folder(folder, 0)
    count = read_json(start / "config.json")["text_config"]["num_hidden_layers"]
    placed = {name.partition("-")[2] for name in lab.structures} - {""}
    if count % 4 and placed:
        blocks = (f"{name} {select_replicated_layers(count, name)}" for name in PLACEMENTS if name in placed)
        logger.info("%d blocks do not divide by four; copied are: %s", count, "; ".join(blocks))


def gather(folder: Path, others: Sequence[Path]) -> list[Cell]:
    """Copies finished cells of the same lab, run elsewhere, into a lab's folder, and returns them.

    A failed cell gives way to one that is done. Raises `OSError` for a folder of no lab, and `ValueError` for cells of
    another configuration and for two results of one cell, before anything is copied.
    """
    check_is_lab(folder)
    lab, found = read_lab_file(folder / LAB_FILE), {}
    wanted = configurations(folder, lab, cells_of(lab))
    for other in others:
        check_is_lab(other)
        for file in sorted(other.glob(f"{CELLS}/*/*/seed-*/{RESULT}")):
            source, record = file.parent, read_json(file.with_name(CELL))
            cell = Cell(record["data"], record["structure"], record["seed"])
            if cell not in wanted:
                raise ValueError(f"{source} is a cell ({cell}) that {folder / LAB_FILE} lacks: add it there.")
            check_same(source / CELL, wanted[cell])
            if is_done(source) and (lacking := [each for each in SCORES if not (source / each).is_file()]):
                raise FileNotFoundError(f"{source} lacks {lacking[0]}: copy the whole folder of the cell.")
            there = found.get(cell, cell.folder(folder))
            if not is_done(there):
                if is_done(source) or not (there / RESULT).is_file():
                    found[cell] = source
            elif is_done(source) and any(read_json(source / each) != read_json(there / each) for each in SCORES):
                raise ValueError(
                    f"{source} and {there} are results of one cell and differ: remove one, or move it elsewhere."
                )
    for cell, source in found.items():
        with lock_output(cell.folder(folder), "lab"), NewFolder(cell.folder(folder), "gathering") as new:
            shutil.copytree(source, new.staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MODEL))
            new.put_in_place()
    return list(found)


def lab_states(folder: Path) -> dict[Cell, tuple[str, str]]:
    """The state of each cell of a lab's folder; `OSError` if it is none, `ValueError` if it has cells of another."""
    check_is_lab(folder)
    lab = read_lab_file(folder / LAB_FILE)
    check_cells(folder, lab)
    return {cell: state_of(folder, cell) for cell in cells_of(lab)}
