"""Seconds and peak memory of a training step of every structure of a lab, on what `genieblue lab run` has prepared.

    python -m benchmarks.lab_steps LAB [--threads 2] [--steps 8] [--json]

LAB is a lab's folder in which the first projector is there (`start`). Each structure is trained for a few steps as its
cell would be, in a process of its own, one after the other; a cell's seconds are the medians of its steps but the
first, by the clock, so nothing else may run.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.report import measured_apart, print_table
from genieblue.lab.cells import LAB_FILE, Cell, train_cell, training_figures
from genieblue.lab.lab_file import read_lab_file
from genieblue.lab.structures import STRUCTURES


def measure(folder: Path, structure: str, steps: int) -> dict[str, float]:
    """Figures of the steps of one structure."""
    lab = read_lab_file(folder / LAB_FILE)
    brief = {"steps": steps, "warmup_steps": 0, "logging_steps": 1, "save_steps": 0, "show_progress": False}
    lab = dataclasses.replace(lab, training=lab.training | brief)
    with TemporaryDirectory() as temporary:
        output = Path(temporary, "model")
        train_cell(folder, lab, Cell(next(iter(lab.data)), structure, 0), output)
        figures = training_figures(output.with_name("model-run"), lab)
    return {"seconds": figures["seconds_per_step"], "peak memory, GB": figures["peak_memory_gb"]}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--structure", choices=STRUCTURES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.structure:
        print(json.dumps(measure(options.lab, options.structure, options.steps)))
        return
    shared = (str(options.lab), "--steps", str(options.steps))
    rows = {
        name: measured_apart("benchmarks.lab_steps", *shared, "--structure", name, threads=options.threads)
        for name in STRUCTURES
    }
    for row in rows.values():
        row["to genieblue-skip"] = row["seconds"] / rows["genieblue-skip"]["seconds"]
    if options.json:
        print(json.dumps(rows))
    else:
        print_table("one step", rows)


if __name__ == "__main__":
    main()
