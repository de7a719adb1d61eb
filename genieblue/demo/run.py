"""The demo: makes a base and a vision tower, trains both stages, then asks fresh processes."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from genieblue.demo.recipe import DemoRecipe
from genieblue.demo.text_answers import text_answers
from genieblue.evaluation.answer_sheet import SheetEntry, draw_answer_sheet
from genieblue.evaluation.report import add_measurements
from genieblue.lab.readings import write_readings
from genieblue.training.stages import train
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor

LEFT_BEHIND = (
    "base",
    "genieblue",
    "genieblue-run",
    "held-out",
    "evaluation",
    "text-answers.json",
    "contact-sheet.png",
)
SHOWN = 24  # on the contact sheet
BATCH_SIZE = 25
TRAINED = {1: "the projector", 2: "vision tower, projector, replicated blocks and LoRA"}


def run_demo(recipe: DemoRecipe, out: str | Path = "demo-out") -> dict[str, Any]:
    """Makes a GenieBlue in `out`, asks it and its base, and returns the measurements.

    Leaves `LEFT_BEHIND`. Raises `OSError` if `out` contains other files.
    """
    out = Path(out)
    _make_room(out)
    seconds: dict[str, float] = {}

    @contextmanager
    def step(number: int, name: str, what: str) -> Iterator[None]:
        # On stderr, like the progress bars: with --json, stdout is only for the report.
        print(f"\n{number}/5  {what}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - started, 1)

    transformers_logging.disable_progress_bar()
    set_seed(recipe.seed)
    base, model = out / "base", out / "genieblue"
    with step(1, "base", recipe.base_title):
        recipe.make_base(base)
        before = text_answers(base, recipe.text_questions)
    with step(2, "vision tower", recipe.tower_title):
        recipe.make_model(base, model)
    # On a CPU without AMX, bfloat16 is slower.
    trained = GenieBlueForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    processor = GenieBlueProcessor.from_pretrained(model)
    for stage, parts in TRAINED.items():
        with step(2 + stage, f"stage {stage}", f"Stage {stage}: {parts}"):
            train(trained, processor, recipe.training_data(stage), model, recipe.settings(stage))
    # In the base's own precision, so that both are loaded in it.
    trained.save_pretrained(model, processor=processor, dtype=trained.config.text_config.dtype)
    del trained
    with step(5, "evaluation", "Fresh processes load the GenieBlue and answer held-out questions"):
        data = write_readings(out / "held-out", recipe.held_out())
        scores = _evaluate(model, data, out / "evaluation", recipe.max_new_tokens)
        after = text_answers(model, recipe.text_questions)
    _draw_contact_sheet(out, recipe.title)
    report = {
        "scores": scores,
        "text": _compare_texts(recipe.text_questions, before, after, out / "text-answers.json"),
        "seconds": round(sum(seconds.values()), 1),
        "seconds_by_part": seconds,
        "sizes": {name: _weight_bytes(out / name) for name in ("base", "genieblue")},
    }
    add_measurements(model, [_text_row(report["text"])])
    return report


def _make_room(out: Path) -> None:
    """Removes an earlier demo from `out`; `OSError` if anything else is there."""
    if out.is_file():
        raise OSError(f"{out} is a file: give a folder with --out.")
    foreign = {entry.name for entry in out.iterdir()} - {*LEFT_BEHIND} if out.is_dir() else set()
    if {name for name in foreign if not name.startswith(".")}:
        raise OSError(
            f"{out} contains {', '.join(sorted(foreign)[:3])}, which is not from a demo: give another folder."
        )
    for name in LEFT_BEHIND:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


def _evaluate(model: Path, data: Path, report: Path, max_new_tokens: int) -> list[dict[str, Any]]:
    """The scores of `genieblue eval`, which are also recorded in the model's card."""
    options = {"--data": data, "--out": report, "--batch-size": BATCH_SIZE, "--max-new-tokens": max_new_tokens}
    command = [sys.executable, "-m", "genieblue", "eval", str(model), "--record", "--json"]
    command += [str(word) for option in options.items() for word in option]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        raise ValueError(f"`genieblue eval` failed with exit code {finished.returncode}: see its message above.")
    return json.loads(finished.stdout)["scores"]


def _compare_texts(
    questions: Sequence[str], before: dict[str, Any], after: dict[str, Any], path: Path
) -> dict[str, Any]:
    """What remained of the base's text, with both answers to each question in a file."""
    pairs = zip(questions, before["answers"], after["answers"], strict=True)
    rows = [{"question": question, "before": first, "after": second} for question, first, second in pairs]
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return {
        "questions": len(rows),
        "equal_answers": sum(first == second for first, second in zip(before["ids"], after["ids"], strict=True)),
        "logits_bit_exact": before["sha256_of_logits"] == after["sha256_of_logits"],
        "perplexity_before": before["perplexity"],
        "perplexity_after": after["perplexity"],
        "perplexity_multimodal_view": after["perplexity_multimodal_view"],
    }


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _text_row(text: dict[str, Any]) -> dict[str, str]:
    """A row for the model's card."""
    return {
        "name": "text perplexity, base and text view",
        "value": f"{text['perplexity_after']:.2f}",
        "how": "held-out topics of Python's documentation, windows of 128 tokens; "
        + ("equal bit for bit" if text_is_unchanged({"text": text}) else "NOT equal"),
    }


def _draw_contact_sheet(out: Path, title: str) -> None:
    lines = (out / "evaluation" / "answers.jsonl").read_text(encoding="utf-8").splitlines()[:SHOWN]
    entries = [
        SheetEntry([out / "held-out" / f"{place:04d}.png"], line["question"], line["answer"],
                   " | ".join(line["references"]), right=line["score"] == 1)
        for place, line in enumerate(map(json.loads, lines))
    ]  # fmt: skip
    note = f"blue: tiles · {sum(entry.right for entry in entries)} of {len(entries)} are correct"
    image_processor = GenieBlueProcessor.from_pretrained(out / "genieblue").image_processor
    draw_answer_sheet(out / "contact-sheet.png", title, note, entries, image_processor)


def text_is_unchanged(report: dict[str, Any]) -> bool:
    """Whether all the demo's measurements of the base's text answers are unchanged."""
    text = report["text"]
    same_perplexity = text["perplexity_before"] == text["perplexity_after"]
    return text["logits_bit_exact"] and text["equal_answers"] == text["questions"] and same_perplexity


def format_report(report: dict[str, Any], out: str | Path) -> str:
    """The demo's results, formatted for a terminal."""
    out, text = Path(out), report["text"]
    by_task = [(score["task"], f"{100 * score['mean']:.1f} % of {score['count']}") for score in report["scores"]]
    sizes = {name: f"{value / 1e6:.1f} MB" for name, value in report["sizes"].items()}
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds_by_part"].items())
    yes = {True: "yes", False: "NO"}
    asked = json.loads((out / "held-out" / "answers.jsonl").read_text(encoding="utf-8").splitlines()[0])
    image, question = (part[part["type"]] for part in asked["messages"][0]["content"])
    rows = [
        *((f"Right answers, {task}", value) for task, value in by_task),
        ("Text answers unchanged", f"{text['equal_answers']} of {text['questions']}, "
         f"logits bit-exact: {yes[text['logits_bit_exact']]}"),
        ("Text perplexity", f"{text['perplexity_before']:.4f} before, {text['perplexity_after']:.4f} after"),
        ("Text in multimodal view", f"{text['perplexity_multimodal_view']:.0f} (perplexity of the shared base)"),
        ("Sizes on disk", f"base {sizes['base']} (unchanged), GenieBlue {sizes['genieblue']}"),
        ("Time", f"{report['seconds']:.0f} s ({parts})"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        [
            *(f"{name:<{width}}  {value}" for name, value in rows),
            "",
            f"See {out / 'contact-sheet.png'}, or try it yourself:",
            f'  genieblue chat {out / "genieblue"} --image {out / "held-out" / image} --prompt "{question}"',
        ]
    )
