"""The log of a run in its folder: every record as a line of JSON, and the curves as PNG."""

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

LOG, CURVES = "log.jsonl", "curves.png"
SECONDS_BETWEEN_DRAWINGS = 30  # at least
SHARE_FOR_DRAWING = 0.01  # of a run's time at most: long curves take seconds to draw, in which nothing is trained


class RunLog(TrainerCallback):
    """Appends each record of Trainer to `log.jsonl`, and draws `curves.png` now and then and at the end.

    A resumed run goes on in the same file: records after its checkpoint, which are trained again, are dropped.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._draw_after = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keeps what the log has up to the step where training starts."""
        if not state.is_world_process_zero:
            return
        kept = [record for record in read_log(self.folder) if record["step"] <= state.global_step]
        (self.folder / LOG).write_text("".join(_line(record) for record in kept), encoding="utf-8")

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Appends a record."""
        if not state.is_world_process_zero or not logs:
            return
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(_line({"step": state.global_step, **logs}))
        if time.monotonic() >= self._draw_after:
            self._draw()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draws the curves of the whole run."""
        if state.is_world_process_zero:
            self._draw()

    def _draw(self) -> None:
        started = time.monotonic()
        draw_curves(read_log(self.folder), self.folder / CURVES)
        now = time.monotonic()
        self._draw_after = now + max(SECONDS_BETWEEN_DRAWINGS, (now - started) / SHARE_FOR_DRAWING)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a run; a last line that a killed run left unfinished is left out."""
    path = folder / LOG
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict) and "step" in record]


def draw_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Writes a PNG: training and validation loss, metrics of validation answers, learning rates, gradient norm."""
    from matplotlib.figure import Figure

    names = dict.fromkeys(name for record in records for name in record)
    panels = {
        "loss": [name for name in ("loss", "eval_loss") if name in names],
        "validation answers": [name for name in names if name.startswith("eval_answers_")],
        "learning rate": [name for name in names if name.startswith("learning_rate/")],
        "gradient norm": [name for name in ("grad_norm",) if name in names],
    }
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return
    figure = Figure(figsize=(8, 2.6 * len(panels)), layout="constrained")
    axes: Any = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    for axis, (title, lines) in zip(axes[:, 0], panels.items(), strict=True):
        for name in lines:
            points = [(record["step"], record[name]) for record in records if name in record]
            steps, values = zip(*points, strict=True)
            label = name.removeprefix("learning_rate/").removeprefix("eval_answers_")
            axis.plot(steps, values, label=label, marker="." if len(points) < 30 else None)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        if len(lines) > 1 or title == "validation answers":
            axis.legend()
    axes[-1, 0].set_xlabel("step")
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, dpi=110, format="png")
    unfinished.replace(path)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
