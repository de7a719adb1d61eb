"""Writes folders atomically: filled next to their target, then swapped in."""

import contextlib
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on every system: there, what a killed run left is not told from what is in use
    fcntl = None

logger = logging.getLogger(__name__)

SHORT_NAME = 200  # of a name, so that it can be part of another one


class StagingFolder:
    """A new folder `.<name of target>.<purpose>-*` beside `target`; as a context, it is removed at the end.

    It is locked, by a lock that the system lifts if the process dies: so the leftovers of killed runs are told from
    what is in use, and removed first. One that holds a folder of the user's (`*.old`) is named and stays. Raises
    `OSError` that names `target`, and not the hidden folder, if there can be none.
    """

    def __init__(self, target: Path, purpose: str):
        self.target = target
        prefix = _prefix(target, purpose)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.lstat(target)  # refuses a name that is too long, which only the last rename would otherwise
            _remove_leftovers(target, [path for path in target.parent.iterdir() if path.name.startswith(prefix)])
            while True:
                self.folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
                with contextlib.suppress(BlockingIOError):  # another run took it, not yet locked, for a leftover
                    self._lock = lock(self.folder)
                    break
        except OSError as error:
            raise OSError(
                f"{target} cannot be written ({error.strerror or error}): give a folder in which you may create files."
            ) from error

    def remove(self) -> None:
        """Removes the folder and all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Any:
        return self.folder

    def __exit__(self, *_error: Any) -> None:
        self.remove()


class NewFolder(StagingFolder):
    """A folder to fill, `staging`, which takes the place of `target` when `put_in_place` is called.

    A context: what fails within it, before or after that call, leaves `target` as it was, unless `keep` was called.
    The old folder lies beside it until then. Raises `OSError` that says where it lies if it cannot be moved back.

    Args:
        replace: whether `target` may be there, and not empty; it is looked at when the new one is put in its place.
    """

    def __init__(self, target: Path, purpose: str = "writing", *, replace: bool = True):
        super().__init__(target, purpose)
        self._may_replace = replace
        self.staging, self._old = self.folder / target.name, self.folder / f"{target.name[:SHORT_NAME]}.old"
        self.staging.mkdir()
        self._moved: list[Path] = []  # from the old folder, as paths in it
        self._is_kept = False

    def __enter__(self) -> "NewFolder":
        return self

    def put_in_place(self, foreign: Callable[[Path], list[Path]] | None = None) -> None:
        """Swaps the filled folder in; what `foreign` finds in the old one, as paths in it, moves over.

        A process that is killed between the two renames leaves the old folder, whole, as `*.old` in a hidden one.
        Raises `FileExistsError` if there is one that may not be replaced.
        """
        if not self._may_replace and self.target.exists() and any(self.target.iterdir()):
            raise FileExistsError(
                f"{self.target} was made by something else in the meantime, and is not replaced: give a new folder."
            )
        mode = self.staging.stat().st_mode  # what new folders get
        for path in self.staging.rglob("*"):
            path.chmod(mode if path.is_dir() else mode & 0o666)  # safetensors writes files for their owner alone
        if self.target.exists():
            self.staging.chmod(self.target.stat().st_mode)
            try:
                os.rename(self.target, self._old)
            except OSError as error:
                raise OSError(
                    f"{self.target} cannot be replaced ({error}): give a folder inside it instead."
                ) from error
        os.rename(self.staging, self.target)
        for path in foreign(self._old) if foreign is not None and self._old.exists() else ():
            if not (self.target / path).exists():
                (self.target / path).parent.mkdir(exist_ok=True)
                os.rename(self._old / path, self.target / path)
                self._moved.append(path)

    def keep(self) -> None:
        """What is in place stays, whatever fails later."""
        if self._old.exists():
            # A process that is killed while it removes the old folder must not leave half of it as `*.old`.
            os.rename(self._old, self.folder / "replaced")
        self._is_kept = True

    def __exit__(self, kind: type[BaseException] | None, *_error: Any) -> None:
        if kind is None:
            self.keep()
        elif not self._is_kept:
            self._put_back()
        self.remove()

    def _put_back(self) -> None:
        try:
            for path in self._moved:
                os.rename(self.target / path, self._old / path)
            if not self.staging.exists():  # it is in place: an interrupt may have come right behind the rename
                os.rename(self.target, self.staging)
            if self._old.exists():
                os.rename(self._old, self.target)
        except OSError as error:
            # Nothing is removed: the old folder is in there.
            where = f"move {self._old} there" if self._old.exists() else "remove it"
            raise OSError(f"{self.target} cannot be put back as it was ({error}): {where} by hand.") from error


def replaced_folders(target: Path, purpose: str = "writing") -> list[Path]:
    """What `NewFolder`s of runs that were ended had moved out of the place of `target`, if they left it."""
    found = []
    for folder in sorted(target.parent.glob(f"{glob.escape(_prefix(target, purpose))}*")):
        with contextlib.suppress(BlockingIOError):  # of a run that goes on
            if (held := lock(folder)) is not None:
                os.close(held)
            found += sorted(folder.glob("*.old"))
    return found


def _prefix(target: Path, purpose: str) -> str:
    return f".{target.name[:SHORT_NAME]}.{purpose}-"


def lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a file or folder until it is closed; `None` where there are no locks.

    Raises `BlockingIOError` if the lock is held elsewhere, or `path` is gone.
    """
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
        raise FileNotFoundError(f"{path} is another one now")
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        if isinstance(error, BlockingIOError | FileNotFoundError):
            raise BlockingIOError(f"{path} is in use, or gone ({error})") from error
        logger.debug("No lock of %s: %s", path, error)  # a file system without locks
        return None


def _remove_leftovers(target: Path, folders: list[Path]) -> None:
    for folder in folders:
        try:
            held = lock(folder)
        except BlockingIOError:
            continue
        if held is None:
            continue
        if kept := sorted(folder.glob("*.old")):
            # Moved back to where another is by now, it might not fit what stands beside that one.
            remedy = "remove it, if what is there now is as it should be" if target.exists() else "move it back there"
            logger.warning("%s was %s before a run that was ended: %s.", kept[0], target, remedy)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(held)
