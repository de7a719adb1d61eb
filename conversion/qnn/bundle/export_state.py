"""The folder `<out>.unfinished` of an export: its lock, its settings and its finished parts."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from conversion.qnn.bundle.metadata import ADAPTER, METADATA, PROBE
from conversion.qnn.graphs.names import VIEWS
from conversion.staging import UNFINISHED, write_json_whole

logger = logging.getLogger(__name__)
STATE, DONE, STREAMS = "export.json", "done.json", "streams.npz"
VERDICT = "verdict"
LONGEST_SHOWN = 40  # characters of a setting in a message; digests are longer


class UnfinishedExport:
    """The folder in which a bundle is made: `bundle` becomes `out`, the rest is for a run that continues it."""

    def __init__(self, out: Path):
        self.out, self.folder = out, out.with_name(out.name + UNFINISHED)
        self.bundle, self._steps, self._state = self.folder / "bundle", self.folder / "steps", self.folder / STATE

    def check_same_export(self, wanted: Mapping[str, Any]) -> None:
        """`FileExistsError` if the folder has anything but an export with the settings `wanted`."""
        if not self.folder.exists():
            return
        if not self._state.is_file():
            # An export that is killed at its very start leaves an empty folder.
            if not self.folder.is_dir() or {path.name for path in self.folder.iterdir()} - {STATE + UNFINISHED}:
                raise FileExistsError(
                    f"{self.folder} already exists and is not an unfinished export: move it, or give another output."
                )
            return
        try:
            there = dict(json.loads(self._state.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise FileExistsError(f"{self._state} is damaged ({error}): remove {self.folder}.") from error
        if different := list(_differences(there, wanted)):
            raise FileExistsError(
                f"{self.folder} has an unfinished export that differs in {', '.join(different)}: remove it, or use "
                "the same settings to continue it."
            )

    def begin_or_continue(self, wanted: Mapping[str, Any]) -> None:
        """Takes the folder for an export with the settings `wanted`; keeps the finished parts of an earlier run."""
        self.check_same_export(wanted)
        if not self.bundle.is_dir():  # a run killed after its last step leaves its notes, but no files
            shutil.rmtree(self._steps, ignore_errors=True)
        elif self._state.is_file():
            logger.info("Continuing the export in %s.", self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json_whole(self._state, wanted)
        self.bundle.mkdir(exist_ok=True)

    @property
    def remedy(self) -> str:
        """What helps when a disk is full."""
        return (
            f"free space in {self.out.parent} and in {tempfile.gettempdir()} (TMPDIR), where the compiler works, then "
            f"start again with the same settings. The finished parts are kept in {self.folder.name}."
        )

    @property
    def is_complete(self) -> bool:
        """Whether only the verdict and handing over are left."""
        return (self.bundle / METADATA).is_file()

    def is_judged_on(self, asked: Mapping[str, Any]) -> bool:
        """Whether the verdict in the metadata is the one on `asked`, so that only handing over is left."""
        return self.finished(VERDICT) == asked

    @contextmanager
    def judged_on(self, asked: dict[str, Any]) -> Iterator[None]:
        """In the block the verdict on `asked` is given; an error is followed by what is kept and how to go on."""
        self.finish(VERDICT, {})  # until the end of the block the metadata may have either verdict
        try:
            yield
        except Exception:
            logger.warning(
                "The bundle is finished, but for its verdict, and kept in %s: the same command goes on with the "
                "verdict, also with other held-out data.",
                self.folder,
            )
            raise
        self.finish(VERDICT, asked)

    def step(self, name: str) -> Path:
        """The folder for what the step `name` leaves for later steps."""
        folder = self._steps / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finished(self, name: str) -> dict[str, Any] | None:
        """The record of a step, if it is finished."""
        path = self._steps / name / DONE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def finish(self, name: str, record: dict[str, Any]) -> None:
        """Records that all files of a step are written."""
        write_json_whole(self.step(name) / DONE, record)

    def save_streams(self, name: str, streams: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Keeps what a step hands on: by view, an array for each request."""
        np.savez(self.step(name) / STREAMS, **flatten(streams))

    def streams(self, name: str) -> dict[str, list[np.ndarray]]:
        """What a finished step hands on, as it was saved."""
        streams: dict[str, list[np.ndarray]] = {view: [] for view in VIEWS}
        with np.load(self.step(name) / STREAMS) as file:
            for key in sorted(file, key=lambda key: int(key.rpartition("/")[2])):
                streams.setdefault(key.rpartition("/")[0], []).append(file[key])
        return streams

    def gather(self, parts: Sequence[str], requests: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Gathers the probes of all steps, with their `requests`, in one file, and their adapters in another."""
        values = {f"request/{view}": requests[view][0] for view in VIEWS}
        adapter: dict[str, np.ndarray] = {}
        for name in ("vision", *parts):
            with np.load(self.step(name) / PROBE) as file:
                values.update({f"{name}/{key}": file[key] for key in file})
            if (self.step(name) / ADAPTER).exists():
                with np.load(self.step(name) / ADAPTER) as file:
                    adapter.update(file)
        np.savez(self.bundle / PROBE, **values)
        if adapter:
            np.savez(self.bundle / ADAPTER, **adapter)

    def hand_over(self) -> None:
        """Moves the bundle to `out` and removes the rest; `FileExistsError` if something else is there by now."""
        try:
            os.rename(self.bundle, self.out)
        except OSError as error:
            if not os.path.lexists(self.out):
                raise
            raise FileExistsError(
                f"{self.out} appeared while the bundle was made: move it away, then give the same command again. The "
                f"finished bundle is kept in {self.folder}."
            ) from error
        shutil.rmtree(self.folder, ignore_errors=True)


def flatten(streams: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays by `<view>/<number of the request>`, as one file has them."""
    return {f"{view}/{number}": array for view, arrays in streams.items() for number, array in enumerate(arrays)}


def _differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Names of the settings that differ, with both values if they are short."""
    for name, value in json.loads(json.dumps(wanted)).items():
        if name not in there or there[name] != value:
            shown = [str(values.get(name, "nothing")) for values in (there, wanted)]
            is_short = max(map(len, shown)) <= LONGEST_SHOWN
            yield f"{name} ({shown[0]} there, {shown[1]} now)" if is_short else name
