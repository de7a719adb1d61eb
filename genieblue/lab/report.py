"""The report of a lab: the paper's tables for it, beside the paper's own numbers, plots, and what the numbers say."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conversion.staging import write_whole
from genieblue.lab import paper
from genieblue.lab.lab_file import SMALL
from genieblue.lab.observations import FAILS, HOLDS, UNDECIDED, judge
from genieblue.lab.plots import PLOTS, draw_plots
from genieblue.lab.results import Estimate, Group, LabResults
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
    path = out / REPORT
    if path.is_file() and not path.read_text(encoding="utf-8").startswith(TITLE):
        raise ValueError(f"{path} is not a report of a lab: give another folder with --out.")
    if not path.is_file() and (others := [name for name in PLOTS.values() if (out / name).exists()]):
        raise ValueError(f"{out / others[0]} is there, but no report of a lab: remove it, or give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, format_report(results, draw_plots(results, out)))
    return path


def format_report(results: LabResults, plots: Mapping[str, str]) -> str:
    """The report as Markdown; `plots` are files by title."""
    parts = [TITLE, *_setting(results)]
    parts += ["## What the numbers say", *_verdicts(results)]
    for data in results.lab.data:
        suffix = f", data `{data}`" if len(results.lab.data) > 1 else ""
        parts += [f"## Images (the paper's tables 4 and 5){suffix}", _image_table(results, data)]
    if len(results.lab.data) > 1:
        parts += ["## With and without texts in the data (table 3)", _data_table(results)]
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
        lines.append(f"Not finished: {len(results.missing)} cells ({'; '.join(map(str, results.missing[:8]))}).")
    return lines


def _verdicts(results: LabResults) -> list[str]:
    verdicts = judge(results)
    counts = {name: sum(each.verdict == name for each in verdicts) for name in (HOLDS, FAILS, UNDECIDED)}
    rows = [
        (str(number), each.statement, f"**{each.verdict}**",
         "; ".join(f"{name}: {value.value:+.1f}" + ("" if value.error is None else f" ± {value.error:.1f}")
                   for name, value in each.evidence.items()))
        for number, each in enumerate(verdicts, start=1)
    ]  # fmt: skip
    summary = (
        f"Of the paper's {len(verdicts)} observations, {counts[HOLDS]} hold here, {counts[FAILS]} do not, and "
        f"{counts[UNDECIDED]} are undecided at this error"
    )
    rest = len(verdicts) - sum(counts.values())
    summary += f"; {rest} lack a structure that has not been run." if rest else "."
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
             *(group.score("images", task).text() for task in tasks), results.average(group.images).text(), kept,
             str(len(group.seeds)), *_of_paper(group.structure))
        )  # fmt: skip
    of_paper = (f"paper, {base}: retained %" for base in paper.IMAGES)
    titles = ("structure", "trainable M", *tasks, "average", "retained %", "seeds", *of_paper)
    return markdown_table(titles, rows)


def _of_paper(structure: str) -> Iterable[str]:
    for of_base in paper.IMAGES.values():
        trainable, average, kept = of_base[structure]
        yield f"{kept or 100:.2f} ({average:.2f}; {trainable:.2f} M)"


def _data_table(results: LabResults) -> str:
    kinds = list(results.lab.data)
    rows = []
    for name in STRUCTURES:
        groups = [results.get(name, data) for data in kinds]
        if any(groups):
            images = ["" if group is None else results.average(group.images).text() for group in groups]
            texts = ["" if group is None or not group.texts[0] else results.average(group.texts).text()
                     for group in groups]  # fmt: skip
            rows.append((name, *images, *texts))
    titles = ("structure", *(f"images, `{data}`" for data in kinds), *(f"texts, `{data}`" for data in kinds))
    return markdown_table(titles, rows)


def _text_part(results: LabResults) -> list[str]:
    tasks = list(results.base_texts)
    if not tasks:
        return ["The lab asks no text tasks."]
    base = (results.base_texts,)

    def scores(values: Sequence[Estimate]) -> list[str]:
        return [value.text() for value in values]

    of_base = [Estimate(each["score"], each["standard_error"]) for each in results.base_scores.values()]
    rows = [("base", *scores(of_base), results.average(base).text(), "", "", f"{paper.TEXTS['base'][0]:.2f}")]
    for data in results.lab.data:
        for group in _ordered(results, data):
            name = group.structure if len(results.lab.data) == 1 else f"{group.structure}, `{data}`"
            average, kept = paper.TEXTS.get(group.structure, (None, None))
            printed = "" if kept is None else f"{kept:.2f} ({average:.2f})"
            rows.append(
                (name, *scores([group.score("texts", task) for task in tasks]), results.average(group.texts).text(),
                 results.retention(base, group.texts).text(), "–" if group.structure == "full" else "100.00", printed)
            )  # fmt: skip
    titles = (
        "weights", *(TEXT_TITLES[task] for task in tasks), "average", "retained %, shared", "retained %, not shared",
        "paper, BlueLM-3B: shared",
    )  # fmt: skip
    notes = (
        "A base that is not shared is what text requests run; its bytes were compared after every run, so that it "
        "retains all by construction. Full fine-tuning leaves no such base. p/byte is the geometric mean of the "
        "probabilities that bytes of the text got; MT-bench compares greedy answers with the base's own, by the share "
        "of tokens up to the first difference, so that the base has 100 by definition."
    )
    return [markdown_table(titles, rows), notes]


def _cost_table(results: LabResults) -> str:
    rows = []
    for data in results.lab.data:
        for group in _ordered(results, data):
            first = group.results[0]
            seconds, memory = first["seconds_per_step"], first["peak_memory_gb"]
            rows.append(
                (group.structure, str(first["steps"]), "" if seconds is None else f"{seconds:.2f}",
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
