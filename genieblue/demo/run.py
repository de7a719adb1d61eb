"""The demo: trains a base LLM, a vision tower and both stages, then reads held-out scans in a fresh process."""

import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.utils import logging as transformers_logging

from conversion.create import create_genieblue
from genieblue.demo.budget import TrainingBudget, warmup_cosine
from genieblue.demo.scans import LONGEST_NUMBER, QUESTION, NumberScans, Scans, split_scans, write_held_out
from genieblue.demo.text import make_base
from genieblue.demo.vision import make_vision_tower
from genieblue.evaluation.answer_sheet import SheetEntry, draw_answer_sheet
from genieblue.evaluation.report import add_measurements
from genieblue.training.stages import TrainingSettings, train
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor

STAGE_1 = {"steps": 60, "batch_size": 32, "learning_rates": {"multi_modal_projector": 2e-3}}
STAGE_2 = {
    "steps": 3000,
    "batch_size": 16,
    "learning_rates": {"vision_tower": 5e-4, "multi_modal_projector": 2e-3, "lora": 2e-3, "replicated_blocks": 1e-3},
}
STAGE_SECONDS = 330.0  # a slow machine stops here, with its schedule complete; a fast one finishes its steps earlier
NUMBERS_PER_LENGTH = 125
SHOWN = 24


def run_demo(out: str | Path = "demo-out", *, seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    """Creates `base/`, `genieblue/`, `held-out/` and `contact-sheet.png` in `out`; returns the measurements.

    `scale` shortens every training run, for a quick check whose answers are useless. Raises `ValueError` if the base
    changed, `OSError` if `out` contains other files.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"`scale` is {scale}: expected a fraction of the full demo, above 0 and at most 1.")
    out = Path(out)
    _make_room(out)
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    transformers_logging.disable_progress_bar()
    set_seed(seed)
    train_scans, held_out_scans = split_scans(seed)

    _log("1/5  Base LLM: a small Llama learns English from Python's own documentation")
    base_facts = make_base(out / "base", max_steps=math.ceil(700 * scale), max_seconds=90, seed=seed)
    seconds["base"] = base_facts["seconds"]
    with tempfile.TemporaryDirectory(dir=out, prefix=".vision-") as vision:
        _log("2/5  Vision tower: a small SigLIP learns digits, instead of a public one")
        vision_facts = make_vision_tower(
            vision, train_scans, held_out_scans, max_steps=math.ceil(700 * scale), max_seconds=40, seed=seed
        )
        seconds["vision tower"] = vision_facts["seconds"]
        create_genieblue(out / "base", vision, out / "genieblue")

    steps_done = {}
    for stage in (1, 2):
        words = {1: "the projector", 2: "vision tower, projector, replicated blocks and LoRA"}[stage]
        _log(f"{stage + 2}/5  Stage {stage}: {words}")
        budget = _train_stage(out / "genieblue", stage, train_scans, seed, scale)
        seconds[f"stage {stage}"] = budget.elapsed()
        steps_done[f"stage {stage}"] = [budget.steps_done, budget.max_steps]

    _log("5/5  A fresh process loads both repositories and reads held-out scans")
    write_held_out(out / "held-out", held_out_scans, math.ceil(NUMBERS_PER_LENGTH * scale))
    report = _ask_fresh_process(out)
    report |= {
        "perplexity_before": base_facts["perplexity"],
        "vision_tower_accuracy": vision_facts["accuracy"],
        "seconds_by_part": {name: round(value, 1) for name, value in seconds.items()},
        "steps_done_and_planned": steps_done,
        "seconds": round(time.perf_counter() - started, 1),
        "sizes": {name: _weight_bytes(out / name) for name in ("base", "genieblue")},
    }
    _record_measurements(out / "genieblue", report)
    _draw_contact_sheet(out, report["answers"][:SHOWN])
    return report


def _make_room(out: Path) -> None:
    """Removes an earlier demo from `out`; `OSError` if anything else is there."""
    ours = {"base", "genieblue", "genieblue-run", "held-out", "contact-sheet.png"}
    if out.is_file():
        raise OSError(f"{out} is a file: give a folder with --out.")
    foreign = {entry.name for entry in out.iterdir()} - ours if out.is_dir() else set()
    if {name for name in foreign if not name.startswith(".")}:
        raise OSError(
            f"{out} contains {', '.join(sorted(foreign)[:3])}, which is not from a demo: give another folder."
        )
    for name in ours:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


def _train_stage(folder: Path, stage: int, scans: Scans, seed: int, scale: float) -> TrainingBudget:
    model = GenieBlueForConditionalGeneration.from_pretrained(folder)
    processor = GenieBlueProcessor.from_pretrained(folder)
    options = {1: STAGE_1, 2: STAGE_2}[stage]
    steps = math.ceil(options["steps"] * scale)
    samples = steps * options["batch_size"]
    # Single digits first: starting with four digits, there is too little time to learn.
    numbers = NumberScans(scans, samples, seed=seed + stage, curriculum=0.37 if stage == 2 else 1.0)
    budget = TrainingBudget(f"Stage {stage}", steps, STAGE_SECONDS, samples_per_step=options["batch_size"])
    settings = TrainingSettings(
        stage, **{**options, "steps": steps}, vision_layer_decay=1.0, max_length=1024, save_steps=0, shuffle=False,
        show_progress=False, seed=seed,
    )  # fmt: skip
    train(
        model, processor, numbers, folder, settings, callbacks=[budget],
        scheduler=lambda optimizer: warmup_cosine(optimizer, budget),
    )  # fmt: skip
    return budget


def _ask_fresh_process(out: Path) -> dict[str, Any]:
    """Runs `genieblue.demo.answers` in a new interpreter and returns its report."""
    command = [sys.executable, "-m", "genieblue.demo.answers", str(out.resolve())]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        raise ValueError(f"The fresh process failed with exit code {finished.returncode}: see its message above.")
    return json.loads(finished.stdout.splitlines()[-1])


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _record_measurements(folder: Path, report: dict[str, Any]) -> None:
    """Adds the measurements to the model's folder and renders its card again."""
    how = f"{report['count']} held-out scans of scikit-learn's digits, 1 to {LONGEST_NUMBER} digits, greedy"
    rows = [
        {"name": "exact match, numbers", "value": f"{100 * report['exact_match']:.1f} %", "how": how},
        {
            "name": "text perplexity, base and text view",
            "value": f"{report['perplexity_after']:.2f}",
            "how": "held-out topics of Python's documentation, windows of 128 tokens; equal bit for bit",
        },
    ]
    add_measurements(folder, rows)


def _draw_contact_sheet(out: Path, answers: list[dict[str, str]]) -> None:
    entries = [
        SheetEntry(
            [out / "held-out" / line["image"]], line["question"], line["said"], line["answer"],
            right=line["said"] == line["answer"],
        )
        for line in answers
    ]  # fmt: skip
    note = f"blue: tiles · {sum(entry.right for entry in entries)} of {len(entries)} are correct"
    title = "Held-out scans, as GenieBlue sees and reads them"
    image_processor = GenieBlueProcessor.from_pretrained(out / "genieblue").image_processor
    draw_answer_sheet(out / "contact-sheet.png", title, note, entries, image_processor)


def text_is_unchanged(report: dict[str, Any]) -> bool:
    """Whether all the demo's measurements of the base's text answers are unchanged."""
    same_perplexity = report["perplexity_before"] == report["perplexity_after"]
    return report["text_bit_exact"] and report["text_generation_exact"] and same_perplexity


def format_report(report: dict[str, Any], out: str | Path) -> str:
    """The demo's results, formatted for a terminal."""
    by_length = report["exact_match_by_length"]
    lengths = ", ".join(f"{length} {'digit' if int(length) == 1 else 'digits'} {100 * value:.1f} %"
                        for length, value in by_length.items())  # fmt: skip
    sizes = {name: f"{value / 1e6:.1f} MB" for name, value in report["sizes"].items()}
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds_by_part"].items())
    yes = {True: "yes", False: "NO"}
    done, planned = report["steps_done_and_planned"]["stage 2"]
    steps = f"{done} of {planned}" if done == planned else f"{done} of {planned} in the {STAGE_SECONDS:.0f} s allowed"
    slow = ["This computer was too slow or too busy for useful answers: run the demo again when it is idle.", ""]
    shown = max(report["answers"][:LONGEST_NUMBER], key=lambda line: len(line["answer"]))["image"]
    return "\n".join(
        [
            f"Numbers read exactly      {100 * report['exact_match']:.1f} % of {report['count']} ({lengths})",
            f"Text perplexity           {report['perplexity_before']:.4f} before, "
            f"{report['perplexity_after']:.4f} after",
            f"Text logits bit-exact     {yes[report['text_bit_exact']]}, generated text too: "
            f"{yes[report['text_generation_exact']]}",
            f"Text in multimodal view   {report['perplexity_multimodal_view']:.0f} (perplexity of the shared base)",
            f"Sizes on disk             base {sizes['base']} (unchanged), GenieBlue {sizes['genieblue']}",
            f"Steps of stage 2          {steps}",
            f"Time                      {report['seconds']:.0f} s ({parts})",
            "",
            *(slow if done < planned / 2 else ()),
            f"See {Path(out) / 'contact-sheet.png'}, or try it yourself:",
            f"  genieblue chat {Path(out) / 'genieblue'} --image {Path(out) / 'held-out' / shown} "
            f'--prompt "{QUESTION}"',
        ]
    )


def _log(line: str) -> None:
    # On stderr, like the progress bars: with --json, stdout is only for the report.
    print(f"\n{line}", file=sys.stderr, flush=True)
