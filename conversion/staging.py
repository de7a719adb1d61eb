"""Safe writing: folders and files are complete or absent, one run per output, and a clear error for a full disk."""

import errno
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from modeling_genieblue.staging_genieblue import lock

CONVERSION = "conversion"  # the purpose of all that write a new model's folder at their end: one at a time for each
UNFINISHED = ".unfinished"  # suffix of files and folders until they are complete
NOTHING_STAYS = "free some space, or use another disk. No incomplete files are left."


def check_can_be_made(folder: Path) -> None:
    """`OSError` for a folder that is there as a file, is inside one, or is where nothing may be written."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        inside = "" if there == folder else f", so {folder} cannot be made"
        raise NotADirectoryError(f"{there} is a file{inside}: give another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"Nothing may be written in {there}, so {folder} cannot be made: give another folder.")


@contextmanager
def lock_output(out: Path, purpose: str) -> Iterator[None]:
    """Locks `out` against a second run; the system releases the lock if the process dies.

    `purpose` names the activity (`export`, `training`). Raises `OSError` at once if another run holds the lock.
    """
    path = out.with_name(f".{out.name}.{purpose}")
    missing = list(takewhile(lambda folder: not folder.exists(), (out.parent, *out.parent.parents)))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise OSError(f"Cannot write to {out.parent} ({error.strerror}): give another output.") from error
    try:
        descriptor = lock(path)  # not of a file that a run which has just ended removed: it would keep nobody away
    except BlockingIOError as error:
        raise BlockingIOError(
            f"Another {purpose} is writing to {out}: wait for it, stop it, or give another output."
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)
        for folder in missing:
            with suppress(OSError):  # it holds what was written
                folder.rmdir()


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file as a whole or not at all: a run that is killed leaves the one that was there."""
    staged = path.with_name(path.name + UNFINISHED)
    try:
        staged.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def write_json_whole(path: Path, value: Any) -> None:
    """Writes a JSON file as `write_whole` does."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts off Ctrl-C and SIGTERM to the end of the block, so that what belongs together is done together."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    came: list[int] = []
    numbers = signal.SIGINT, signal.SIGTERM
    before = {number: signal.signal(number, lambda number, _frame: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in came[:1]:
        signal.raise_signal(number)


@contextmanager
def explained_full_disk(*folders: Path | None, remedy: str = NOTHING_STAYS) -> Iterator[None]:
    """Turns a full disk into an `OSError` that names the output folders and the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors raises a type of its own, which has the system's words but no number.
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not is_full:
            raise
        places = " and ".join(str(folder) for folder in folders if folder is not None)
        raise OSError(errno.ENOSPC, f"No space left on device while writing {places}: {remedy}") from error
