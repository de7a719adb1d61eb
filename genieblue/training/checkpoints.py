"""The checkpoints of a run: one run at a time writes them, and the one to resume from is complete."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from conversion.staging import lock_output

logger = logging.getLogger(__name__)

TRAINED = "trained_parameters.safetensors"
SETTINGS = "training_settings.json"
# In the order in which Trainer writes them: the last one proves completeness.
CHECKPOINT_FILES = (TRAINED, SETTINGS, "optimizer.pt", "scheduler.pt", "trainer_state.json")
UNFINISHED = "unfinished"


@contextlib.contextmanager
def exclusive_run(folder: Path) -> Iterator[None]:
    """Locks the checkpoint folder against a second run; the system releases the lock if the process dies.

    Raises `OSError` at once if another run holds the lock. An empty folder is removed at the end.
    """
    if int(os.environ.get("RANK", 0)) > 0:  # the first process locks for all processes of a run
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with lock_output(folder, "training"):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # not empty: it has checkpoints
                folder.rmdir()


def find_checkpoint(folder: Path, resume: bool | str | os.PathLike) -> Path | None:
    """The checkpoint to resume from: a given one, or the last one in `folder`; `None` to start from the beginning.

    Raises `ValueError` for an invalid checkpoint, and if a new run would start where an earlier one left checkpoints,
    so that two runs never mix.
    """
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # left by a run that was killed while writing
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if resume is False or resume is None:
        if last is not None:
            raise ValueError(
                f"An earlier run left checkpoints in {folder}: continue with `resume` (--resume), remove the folder, "
                "or give another output."
            )
        return None
    if resume is True:
        if last is None:
            logger.warning("No checkpoint in %s to resume from: training starts from the beginning.", folder)
            return None
        resume = last
    path = Path(resume)
    missing = [name for name in CHECKPOINT_FILES if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path} is not a complete checkpoint: it has no {', '.join(missing)}. Give another one.")
    return path


def is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint was written after the last step of its run."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"] >= state["max_steps"]
