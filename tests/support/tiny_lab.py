"""A lab of a tiny base that runs in seconds, in this process."""

import json
from pathlib import Path

import yaml
from tiny_models import save_tiny_base, tiny_vision_tower

from genieblue.lab import run
from genieblue.lab.cells import Cell, run_cell

STRUCTURES = {"full": 1, "lora": 2, "genieblue-skip": 2}


def write_tiny_lab(folder: Path, **changes) -> Path:
    """Writes a base, a tower, texts and the lab file that names them; returns the latter."""
    if not (folder / "tiny-base").exists():
        save_tiny_base("llama", folder / "tiny-base")
        tiny_vision_tower().save_pretrained(folder / "tiny-tower")
    return write_lab_values(folder, **changes)


def write_lab_values(folder: Path, **changes) -> Path:
    """Writes the texts and the lab file only, which is all that reading it needs."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "texts.jsonl").exists():
        rows = [{"question": f"What is {number}?", "answer": f"It is <<{number}>>{number}."} for number in range(3)]
        (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "base": "tiny-base", "vision": "tiny-tower", "structures": STRUCTURES, "tasks": ["digits", "naming"],
        "texts": ["texts.jsonl"], "data": {"mixed": 0.3}, "projector_steps": 1, "lora_rank": 2, "max_tiles": 1,
        "held_out": 4, "max_new_tokens": 3, "training": {"steps": 2, "batch_size": 2, "logging_steps": 1},
        "text_tasks": {"facts": 0, "english": 0}, **changes,
    }  # fmt: skip
    path = folder / "lab.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def cells_in_this_process(monkeypatch, fail=lambda cell: None):
    """Makes a lab run its cells here, and not in processes of their own; `fail` may raise for one of them."""

    class Finished:
        returncode = 0

    def start(command, *, check, env):
        folder, data, structure, seed = command[3:]
        cell = Cell(data, structure, int(seed))
        fail(cell)
        run_cell(Path(folder), cell)
        return Finished

    monkeypatch.setattr(run.subprocess, "run", start)
