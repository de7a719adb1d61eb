"""The folder `<out>.unfinished` of an export: its lock, its settings and its finished parts."""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conversion.qnn.bundle.metadata import METADATA
from conversion.qnn.graphs.names import UNFINISHED

logger = logging.getLogger(__name__)
STATE, DONE = "export.json", "done.json"
LONGEST_SHOWN = 40  # characters of a setting in a message; digests are longer


class UnfinishedExport:
    """Where the bundle `out` is made: `bundle` becomes `out`, the rest is what a run that goes on has to know."""

    def __init__(self, out: Path):
        self.out, self.folder = out, out.with_name(out.name + UNFINISHED)
        self.bundle, self._steps, self._state = self.folder / "bundle", self.folder / "steps", self.folder / STATE

    def check_same_export(self, wanted: Mapping[str, Any]) -> None:
        """`FileExistsError` if something else lies here than an export with the settings `wanted`, by name."""
        if not self.folder.exists():
            return
        if not self._state.is_file():
            # An export that was killed when it had just begun leaves an empty folder.
            if not self.folder.is_dir() or {path.name for path in self.folder.iterdir()} - {STATE + UNFINISHED}:
                raise FileExistsError(
                    f"{self.folder} is in the way, and no export of this program: move it, or give another output."
                )
            return
        try:
            there = dict(json.loads(self._state.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise FileExistsError(f"{self._state} is damaged ({error}): remove {self.folder}.") from error
        if different := list(_differences(there, wanted)):
            raise FileExistsError(
                f"{self.folder} holds an unfinished export that differs in {', '.join(different)}: remove it, or use "
                "the same settings to go on with it."
            )

    def begin_or_go_on(self, wanted: Mapping[str, Any]) -> None:
        """Claims the folder for an export with the settings `wanted`; keeps what an earlier run of it has finished."""
        self.check_same_export(wanted)
        if not self.bundle.is_dir():  # a run that was killed behind its last step left its notes, but no files
            shutil.rmtree(self._steps, ignore_errors=True)
        elif self._state.is_file():
            logger.info("Going on with the export in %s.", self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._state, wanted)
        self.bundle.mkdir(exist_ok=True)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do but to hand the bundle over."""
        return (self.bundle / METADATA).is_file()

    def step(self, name: str) -> Path:
        """The folder for what the step `name` leaves to later ones."""
        folder = self._steps / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finished(self, name: str) -> dict[str, Any] | None:
        """The record of a step that is finished."""
        path = self._steps / name / DONE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def finish(self, name: str, record: dict[str, Any]) -> None:
        """Notes that all files of a step are written."""
        write_json(self.step(name) / DONE, record)

    def hand_over(self) -> None:
        """The bundle becomes `out`; what only served to go on is removed behind that."""
        os.rename(self.bundle, self.out)
        shutil.rmtree(self.folder, ignore_errors=True)


def _differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """The settings `wanted` that are others there: with both values, where they are short."""
    for name, value in json.loads(json.dumps(wanted)).items():
        if name not in there or there[name] != value:
            shown = [str(values.get(name, "nothing")) for values in (there, wanted)]
            is_short = max(map(len, shown)) <= LONGEST_SHOWN
            yield f"{name} ({shown[0]} there, {shown[1]} now)" if is_short else name


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file as a whole or not at all."""
    staged = path.with_name(path.name + UNFINISHED)
    staged.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(staged, path)
