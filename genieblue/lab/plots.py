"""Plots of a lab: retention against trained parameters, loss curves, and scores by task."""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genieblue.lab.results import Group, LabResults
from genieblue.lab.structures import STRUCTURES

SHADES = ("black", "tab:orange", "#9ecae1", "#6baed6", "#2171b5", "#a1d99b", "#74c476", "#238b45")
ALIKE, STEP_ASIDE = 0.05, 1.04  # of parameters: a difference (of logarithms) that is not seen, and one that is
COLOURS = dict(zip(STRUCTURES, SHADES, strict=True))
FILES = {
    "Scores by task": "scores.png",
    "Loss in training": "loss.png",
    "Retained against trained parameters": "retained.png",
}  # by title


@dataclass(frozen=True)
class Plot:
    """A figure of matplotlib, and the name of its file."""

    title: str
    file: str
    figure: Any

    def png(self) -> bytes:
        """What its file holds."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, dpi=110, format="png")
        return buffer.getvalue()


def draw_plots(results: LabResults) -> list[Plot]:
    """Plots of each kind of data of which there are finished runs; those of the first have the plain names."""
    return [plot for place, data in enumerate(results.lab.data) for plot in _plots_of(results, data, place)]


def _plots_of(results: LabResults, data: str, place: int) -> list[Plot]:
    groups = [group for name in STRUCTURES if (group := results.get(name, data)) is not None]
    if not groups:
        return []
    drawn = {"Scores by task": _draw_tasks(results, groups), "Loss in training": _draw_losses(groups)}
    if (full := results.get("full", data)) is not None:
        drawn["Retained against trained parameters"] = _draw_retention(results, full, groups)
    of_data = f", data {data}" if len(results.lab.data) > 1 else ""
    found = []
    for title, figure in drawn.items():
        file = Path(FILES[title])
        found.append(Plot(title + of_data, f"{file.stem}-{data}{file.suffix}" if place else file.name, figure))
    return found


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axis: Any = figure.subplots()
    axis.grid(alpha=0.3)
    return figure, axis


def _draw_retention(results: LabResults, full: Group, groups: list[Group]) -> Any:
    figure, axis = _figure(7, 4.5)
    trained = [group.results[0]["trainable"] / 1e6 for group in groups]
    ticks = []
    for number, group in enumerate(groups):
        kept = results.retention(full.images, group.images)
        error = 0.0 if group is full or kept.error is None else kept.error
        alike = [other for other, size in enumerate(trained) if abs(math.log(size / trained[number])) < ALIKE]
        place = trained[number] * STEP_ASIDE ** (alike.index(number) - (len(alike) - 1) / 2)
        ticks += [trained[number]] if alike[0] == number else []
        axis.errorbar([place], [kept.value], yerr=[error], fmt="o", capsize=3, color=COLOURS[group.structure],
                      label=group.structure)  # fmt: skip
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter("")
    axis.set_xticks(ticks, [f"{size:.3g}" for size in ticks])
    axis.set_xlabel("trained parameters, millions; structures of one size side by side")
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
    for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        formatted("{x:g}")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend(fontsize="small")
    return figure


def _draw_tasks(results: LabResults, groups: list[Group]) -> Any:
    figure, axis = _figure(10, 4.5)
    tasks = list(results.lab.tasks)
    width = 0.8 / len(groups)
    for number, group in enumerate(groups):
        scores = [results.average(group.images.of_task(task)) for task in tasks]
        places = [place + (number - (len(groups) - 1) / 2) * width for place in range(len(tasks))]
        axis.bar(places, [score.value for score in scores], width, yerr=[score.error or 0 for score in scores],
                 color=COLOURS[group.structure], label=group.structure, error_kw={"linewidth": 0.7})  # fmt: skip
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("score, %")
    figure.legend(fontsize="small", ncols=4, loc="outside upper center")
    return figure
