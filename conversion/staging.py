"""Hidden folders in which results are made: taken away at the end, and by the next run where one was killed."""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # not on every system: there, what a killed run left is not told from what is in use
    fcntl = None

logger = logging.getLogger(__name__)


class StagingFolder:
    """A new folder `.<name of target>.<purpose>-*` beside `target`; as a context, it is removed at the end.

    It is locked, by a lock that the system lifts if the process dies: so the leftovers of killed runs are told from
    what is in use, and removed first. One that holds a folder of the user's (`*.old`) is named and stays.
    """

    def __init__(self, target: Path, purpose: str):
        prefix = f".{target.name}.{purpose}-"
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers([path for path in target.parent.iterdir() if path.name.startswith(prefix)])
        while True:
            self.folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
            self._lock = _lock(self.folder)
            if self._lock is not None or self.folder.exists():
                break  # else another run, which looked before the lock was there, took it for a leftover

    def remove(self) -> None:
        """Removes the folder and all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *_error: Any) -> None:
        self.remove()


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock of a folder; `None` if it cannot be had: it is in use, or gone."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    except OSError as error:  # also on a file system without locks
        logger.debug("No lock of %s: %s", folder, error)
    os.close(descriptor)
    return None


def _remove_leftovers(folders: list[Path]) -> None:
    for folder in folders:
        lock = _lock(folder)
        if lock is None:
            continue
        if kept := sorted(folder.glob("*.old")):
            logger.warning("%s was there before a run that was ended: move it back, or remove it.", kept[0])
        else:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextmanager
def explained_full_disk(*folders: Path | None) -> Iterator[None]:
    """A full disk as an `OSError` that names the folders which are written to, and says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors raises a type of its own, which has the system's words but no number.
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not is_full:
            raise
        places = " and ".join(str(folder) for folder in folders if folder is not None)
        raise OSError(
            errno.ENOSPC,
            f"No space left on device while {places} was written: free some, or give folders on another disk. Nothing "
            "half-written stays",
        ) from error


__all__ = ["StagingFolder", "explained_full_disk"]
