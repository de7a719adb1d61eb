"""Samples a second of stage 2 with the same samples per step: one process against two (DDP over gloo).

    python -m benchmarks.training processes [--batch 4] [--length 97] [--rounds 2] [--steps 4]

The model and the samples are those of `step`, the engine is that of `genieblue train`. One process has as many threads
as there are processes in the other case, and once a single one. Each case runs in processes of its own, in turn; times
are the clock's, medians of the steps, so nothing else may run.
"""

import argparse
import json
import os
import statistics
import time
from collections import defaultdict

from benchmarks.report import measured_apart, print_table
from benchmarks.training_step import OURS, add_shape_options, make_contender, shape_arguments, train_steps


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the sub-command `processes`."""
    add_shape_options(parser)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=processes)


def processes(options: argparse.Namespace) -> None:
    """Prints the table, or as one of the processes the seconds of its steps."""
    if options.worker:
        batch = options.batch // int(os.environ.get("WORLD_SIZE", 1))
        times = train_steps(OURS, *make_contender(OURS, options), options, batch, time.perf_counter)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(times))
        return
    number = options.processes
    if options.batch % number:
        raise ValueError(f"The batch of {options.batch} cannot be shared by {number} processes: give a multiple.")
    cases = {
        "one process, one thread": (1, 1),
        f"one process, {number} threads": (1, number),
        f"{number} processes, one thread each": (number, 1),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for name, case in cases.items():
            seconds[name] += _run(options, *case)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    rows = {
        name: {"step, s": value, "samples/s": options.batch / value, "speed-up": first / value}
        for name, value in medians.items()
    }
    print_table(f"stage 2, {options.shape}, {options.batch} × {options.length} a step", rows)


def _run(options: argparse.Namespace, number: int, threads: int) -> list[float]:
    """Seconds of the steps of a run in processes of its own."""
    command = ["benchmarks.training", "processes", *shape_arguments(options), "--worker"]
    if number > 1:
        command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(number), "-m", *command]
    return measured_apart(*command, threads=threads)
