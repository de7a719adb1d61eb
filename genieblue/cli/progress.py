"""Progress in log files: one line every few seconds instead of a bar that is redrawn constantly."""

import sys
import time
from typing import Any

SECONDS = 5  # between two lines of a bar


def log_progress_without_terminal() -> None:
    """If stderr is not a terminal, makes every `tqdm` bar of this process write lines: ours, Trainer's, downloads.

    They all inherit from one class, which is patched here.
    """
    if sys.stderr is None or sys.stderr.isatty():
        return
    from tqdm.std import tqdm

    if getattr(tqdm, "writes_lines", False):
        return
    make = tqdm.__init__

    def __init__(bar: Any, *args: Any, **options: Any) -> None:
        bar._written_at = time.monotonic()
        if options.get("disable", False) is None:  # which disables a bar without a terminal
            del options["disable"]  # False, unless TQDM_DISABLE is set
        make(bar, *args, **options)

    tqdm.writes_lines, tqdm.__init__ = True, __init__
    tqdm.display, tqdm.clear, tqdm.moveto, tqdm.close = _display, _do_nothing, _do_nothing, _close


def _display(bar: Any, msg: str | None = None, pos: int | None = None) -> None:
    if time.monotonic() - bar._written_at >= SECONDS:
        _write_line(bar)


def _write_line(bar: Any) -> None:
    bar._written_at = time.monotonic()
    bar.fp.write(f"{bar}\n")
    bar.fp.flush()


def _close(bar: Any) -> None:
    """Writes the final state, unless the bar was meant to vanish or never became visible."""
    if bar.disable:
        return
    bar.disable = True
    bar._decr_instances(bar)
    if bar.leave is not False and time.time() - bar.start_t >= bar.delay:
        _write_line(bar)


def _do_nothing(bar: Any, *args: Any, **options: Any) -> None:
    """Lines are not redrawn."""
