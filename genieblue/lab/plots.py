"""Plots of a lab: retention against trained parameters, loss curves, and scores by task."""

from pathlib import Path
from typing import Any

from genieblue.lab.results import Group, LabResults
from genieblue.lab.structures import STRUCTURES

SHADES = ("black", "tab:orange", "#9ecae1", "#6baed6", "#2171b5", "#a1d99b", "#74c476", "#238b45")
COLOURS = dict(zip(STRUCTURES, SHADES, strict=True))


def draw_plots(results: LabResults, folder: Path) -> dict[str, str]:
    """Writes PNGs of the first kind of data into a folder; returns their names by title."""
    data = next(iter(results.lab.data))
    groups = [group for name in STRUCTURES if (group := results.get(name, data)) is not None]
    drawn = {"Scores by task": _draw_tasks(results, groups), "Loss in training": _draw_losses(groups)}
    if (full := results.get("full", data)) is not None:
        drawn["Retained against trained parameters"] = _draw_retention(results, full, groups)
    names = {title: f"{title.split()[0].lower()}.png" for title in drawn}
    for title, figure in drawn.items():
        figure.savefig(folder / names[title], dpi=110, format="png")
    return names


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axis: Any = figure.subplots()
    axis.grid(alpha=0.3)
    return figure, axis


def _draw_retention(results: LabResults, full: Group, groups: list[Group]) -> Any:
    figure, axis = _figure(7, 4.5)
    for group in groups:
        kept = results.retention(full.images, group.images)
        trained = group.results[0]["trainable"] / 1e6
        error = 0.0 if group is full or kept.error is None else kept.error
        axis.errorbar([trained], [kept.value], yerr=[error], fmt="o", capsize=3, color=COLOURS[group.structure],
                      label=group.structure)  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlabel("trained parameters, millions")
    axis.set_ylabel("average on images, % of full fine-tuning")
    axis.legend(fontsize="small")
    return figure


def _draw_losses(groups: list[Group]) -> Any:
    figure, axis = _figure(7, 4.5)
    for group in groups:
        for number, result in enumerate(group.results):
            if result["losses"]:
                steps, losses = zip(*result["losses"], strict=True)
                axis.plot(steps, losses, color=COLOURS[group.structure], alpha=0.7, linewidth=1,
                          label=None if number else group.structure)  # fmt: skip
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend(fontsize="small")
    return figure


def _draw_tasks(results: LabResults, groups: list[Group]) -> Any:
    figure, axis = _figure(10, 4.5)
    tasks = list(results.lab.tasks)
    width = 0.8 / len(groups)
    for number, group in enumerate(groups):
        scores = [group.score("images", task) for task in tasks]
        places = [place + (number - (len(groups) - 1) / 2) * width for place in range(len(tasks))]
        axis.bar(places, [score.value for score in scores], width, yerr=[score.error or 0 for score in scores],
                 color=COLOURS[group.structure], label=group.structure, error_kw={"linewidth": 0.7})  # fmt: skip
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set_ylabel("score, %")
    axis.legend(fontsize="small", ncols=4)
    return figure
