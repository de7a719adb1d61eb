"""The report of a lab: the paper's tables for it, beside the paper's own numbers, plots, and what the numbers say."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from conversion.staging import explained_full_disk, write_whole
from genieblue.lab import paper
from genieblue.lab.lab_file import SMALL
from genieblue.lab.observations import FAILS, HOLDS, UNDECIDED, judge
from genieblue.lab.plots import draw_plots
from genieblue.lab.results import Estimate, Group, LabResults, Runs
from genieblue.lab.structures import STRUCTURES
from genieblue.lab.text_tasks import ENGLISH, FACTS, GSM8K, MT_BENCH

REPORT = "report.md"
TITLE = "# Full fine-tuning, LoRA, visual experts and GenieBlue compared"
TEXT_TITLES = {
    ENGLISH: "English, p/byte", FACTS: "facts", GSM8K: "GSM8K, p/byte", MT_BENCH: "MT-bench, as base"
}  # fmt: skip


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Writes `report.md` and its plots into a folder, by default `report` of the lab's; returns the report's path.

    Raises `OSError` for a folder of no lab, and `ValueError` if no cell of it is finished, or another report is there.
    """
    results = LabResults(folder)
    if not results.groups:
        failed = f" ({len(results.failed)} failed: see `genieblue lab status`)" if results.failed else ""
        raise ValueError(f"No cell of {folder} is done{failed}: `genieblue lab run` first.")
    out = out or folder / "report"
    path, plots = out / REPORT, draw_plots(results)
    if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(TITLE):
        raise ValueError(f"{path} is not a report of a lab: give another folder with --out.")
    if not path.is_file() and (others := [plot.file for plot in plots if (out / plot.file).exists()]):
        raise ValueError(f"{out / others[0]} is there, but no report of a lab: remove it, or give another --out.")
    with explained_full_disk(out):
        out.mkdir(parents=True, exist_ok=True)
        # First the report, by which plots that a killed run leaves are known as its own.
        write_whole(path, format_report(results, {plot.title: plot.file for plot in plots}))
        for plot in plots:
            write_whole(out / plot.file, plot.png())
    return path


def format_report(results: LabResults, plots: Mapping[str, str]) -> str:
    """The report as Markdown; `plots` are files by title."""
    kinds = list(results.lab.data)
    suffixes = {data: f", data `{data}`" if len(kinds) > 1 else "" for data in kinds}
    parts = [TITLE, *_setting(results)]
    for data, suffix in suffixes.items():
        parts += [f"## What the numbers say{suffix}", *_verdicts(results, data)]
    parts += ["## With and without texts in the data (table 3)", *_data_part(results)]
    for data, suffix in suffixes.items():
        parts += [f"## Images (the paper's tables 4 and 5){suffix}", _image_table(results, data)]
    parts += ["## Text with a shared base (table 6)", *_text_part(results)]
    parts += ["## Cost", _cost_table(results)]
    parts += ["## Plots", *(f"![{title}]({file})" for title, file in plots.items())]
    return "\n\n".join(parts) + "\n"


def _setting(results: LabResults) -> list[str]:
    lab = results.lab
    per_step = lab.settings(0, {}).samples_per_step
    data = ", ".join(f"`{name}` with {share:.0%} texts" for name, share in lab.data.items())
    tower = f"vision tower `{Path(lab.vision).name}`"
    if lab.vision == SMALL:
        tower += f" (trained for {lab.vision_steps} steps on captions and {lab.reading_steps} on reading)"
    lines = [
        f"Base `{Path(lab.base).name}`, {tower}, {lab.steps} steps of {per_step} "
        f"samples after {lab.projector_steps} of the projector alone; data: {data}; {lab.held_out} held-out questions "
        "a task. Scores are in percent; ± is one standard error, of the questions and of the seeds."
    ]
    if results.decisive is None:
        lines.append(
            "No structure has been run with several seeds, so ± says nothing of how much the seed matters, and no "
            "difference decides anything."
        )
    copied = {name: group.results[0]["copied_blocks"] for (_, name), group in results.groups.items()}
    copied = {name.partition("-")[2]: blocks for name, blocks in copied.items() if blocks}
    if copied:
        named = "; ".join(f"{name} {blocks}" for name, blocks in sorted(copied.items()))
        lines.append(f"Copied blocks: {named}.")
    if results.failed:
        lines += ["Failed:", "\n".join(f"- {cell}: {reason}" for cell, reason in results.failed.items())]
    if results.missing:
        named = "; ".join([*map(str, results.missing[:8]), *["…"] * (len(results.missing) > 8)])
        lines.append(f"Not finished: {len(results.missing)} cells ({named}).")
    return lines


def _verdicts(results: LabResults, data: str) -> list[str]:
    verdicts = judge(results, data)
    counts = {name: sum(each.verdict == name for each in verdicts) for name in (HOLDS, FAILS, UNDECIDED)}
    rows = [
        (str(number), each.statement, f"**{each.verdict}**",
         "; ".join(f"{name}: {value.as_difference()}" for name, value in each.evidence.items()))
        for number, each in enumerate(verdicts, start=1)
    ]  # fmt: skip
    summary = (
        f"Of the paper's {len(verdicts)} observations, {counts[HOLDS]} hold here, {counts[FAILS]} do not, and "
        f"{counts[UNDECIDED]} are undecided at this error"
    )
    rest = len(verdicts) - sum(counts.values())
    summary += f"; {rest} lack a structure that has not been run, or text tasks." if rest else "."
    if results.decisive is not None:
        summary += f" A difference decides at 95 %, here from {results.decisive:.1f} standard errors on."
    summary += " Percentages in brackets are the paper's."
    return [summary, markdown_table(("", "observation", "here", "differences of averages, in points"), rows)]


def _ordered(results: LabResults, data: str) -> list[Group]:
    return [group for name in STRUCTURES if (group := results.get(name, data)) is not None]


def _image_table(results: LabResults, data: str) -> str:
    tasks = list(results.lab.tasks)
    full = results.get("full", data)
    rows = []
    for group in _ordered(results, data):
        kept = "" if full is None or group is full else results.retention(full.images, group.images).text()
        rows.append(
            (group.structure, f"{group.results[0]['trainable'] / 1e6:.2f}",
             *_scores(results, group.images, tasks), _average(results, group.images), kept,
             str(len(group.seeds)), *_of_paper(group.structure))
        )  # fmt: skip
    of_paper = (f"paper, {base}: retained %" for base in paper.IMAGES)
    titles = ("structure", "trainable M", *tasks, "average", "retained %", "seeds", *of_paper)
    return markdown_table(titles, rows)


def _of_paper(structure: str) -> Iterable[str]:
    for of_base in paper.IMAGES.values():
        trainable, average, kept = of_base[structure]
        yield f"{kept or 100:.2f} ({average:.2f}; {trainable:.2f} M)"


def _data_part(results: LabResults) -> list[str]:
    kinds = results.lab.data
    if len(kinds) == 1:
        return [
            "The lab has one kind of data, so that what a share of texts changes was not measured: that takes two, "
            "such as `data: {mixed: 0.2, images: 0}`."
        ]
    tasks, base = list(results.base_texts.values[0]), results.base_texts
    rows = [("base", "", *_scores(results, base, tasks), _average(results, base), "", "", "")] if tasks else []
    for name in STRUCTURES:
        for data, share in kinds.items():
            if (group := results.get(name, data)) is not None:
                texts = [*_scores(results, group.texts, tasks), _average(results, group.texts),
                         results.retention(base, group.texts).text()] if tasks else []  # fmt: skip
                rows.append((name, f"{share:.0%}", *texts, _average(results, group.images), str(len(group.seeds))))
    of_texts = (*(TEXT_TITLES[task] for task in tasks), "average, texts", "retained %, shared") if tasks else ()
    titles = ("structure", "texts in the data", *of_texts, "average, images", "seeds")
    return [markdown_table(titles, rows)]


def _scores(results: LabResults, runs: Runs, tasks: Sequence[str]) -> list[str]:
    return [_average(results, runs.of_task(task)) for task in tasks]


def _average(results: LabResults, runs: Runs) -> str:
    return results.average(runs).text()


def _text_part(results: LabResults) -> list[str]:
    base = results.base_texts
    tasks = list(base.values[0])
    if not tasks:
        return ["The lab asks no text tasks."]
    of_paper = f"{paper.TEXTS['base'][0]:.2f}"
    asks_chats = MT_BENCH in tasks
    equal = ["100.0"] if asks_chats else []
    rows = [("base", *_scores(results, base, tasks), *equal, _average(results, base), "", "", "", of_paper)]
    for data in results.lab.data:
        for group in _ordered(results, data):
            average, kept = paper.TEXTS.get(group.structure, (None, None))
            printed = "" if kept is None else f"{kept:.2f} ({average:.2f})"
            rows.append(
                (_named(results, group), *_scores(results, group.texts, tasks),
                 *([_equal_answers(group).text()] if asks_chats else []), _average(results, group.texts),
                 results.retention(base, group.texts).text(), "–" if group.structure == "full" else "100.00",
                 str(len(group.seeds)), printed)
            )  # fmt: skip
    titles = (
        "weights", *(TEXT_TITLES[task] for task in tasks), *(["MT-bench, equal"] if asks_chats else []), "average",
        "retained %, shared", "retained %, not shared", "seeds", "paper, BlueLM-3B: shared",
    )  # fmt: skip
    notes = (
        "A base that is not shared is what text requests run; its bytes were compared after every run, so that it "
        "retains all by construction. Full fine-tuning leaves no such base. p/byte is the geometric mean of the "
        "probabilities that bytes of the text got; MT-bench compares greedy answers with the base's own, by the share "
        "of tokens up to the first difference, so that the base has 100 by definition."
    )
    if asks_chats:
        notes += " Equal are answers without a difference; this is not in the average."
    return [markdown_table(titles, rows), notes]


def _equal_answers(group: Group) -> Estimate:
    """Percent of answers that are the base's own, to the last token."""
    found = [result["texts"][MT_BENCH] for result in group.results]
    share, count = fmean(each["equal_answers"] for each in found), found[0]["count"]
    error = 100 * math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
    return Estimate(100 * share, error)


def _named(results: LabResults, group: Group) -> str:
    return group.structure if len(results.lab.data) == 1 else f"{group.structure}, `{group.data}`"


def _cost_table(results: LabResults) -> str:
    rows = []
    for data in results.lab.data:
        for group in _ordered(results, data):
            first = group.results[0]
            seconds, memory = first["seconds_per_step"], first["peak_memory_gb"]
            rows.append(
                (_named(results, group), str(first["steps"]), "" if seconds is None else f"{seconds:.2f}",
                 "" if not memory else f"{memory:.2f}", _flatness(group))
            )  # fmt: skip
    return markdown_table(("structure", "steps", "s/step", "peak memory, GB", "loss, third to last quarter"), rows)


def _flatness(group: Group) -> str:
    """Mean losses of the third and last quarter of the logged steps: whether a curve is flat."""
    losses = [loss for _, loss in group.results[0]["losses"]]
    quarter = len(losses) // 4
    if not quarter:
        return ""
    third, last = (sum(part) / quarter for part in (losses[-2 * quarter : -quarter], losses[-quarter:]))
    return f"{third:.3f} → {last:.3f}"


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows below titles, in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
