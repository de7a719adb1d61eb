"""Progress bars where nobody watches: a line every few seconds instead of a bar that is drawn over and over."""

import sys
import time
from typing import Any

SECONDS = 5  # between two lines of a bar


def use_lines_if_nobody_watches() -> None:
    """Makes every `tqdm` of this process write lines if stderr is no terminal: ours, Trainer's, those of downloads.

    All these libraries inherit from one class, which is changed here.
    """
    if sys.stderr is None or sys.stderr.isatty():
        return
    from tqdm.std import tqdm

    if getattr(tqdm, "writes_lines", False):
        return
    make = tqdm.__init__

    def __init__(bar: Any, *args: Any, disable: bool | None = False, **options: Any) -> None:
        bar._told_at = time.monotonic()
        make(bar, *args, disable=bool(disable), **options)  # None: not without a terminal

    tqdm.writes_lines, tqdm.__init__ = True, __init__
    tqdm.display, tqdm.clear, tqdm.moveto, tqdm.close = _display, _do_nothing, _do_nothing, _close


def _display(bar: Any, msg: str | None = None, pos: int | None = None) -> None:
    if time.monotonic() - bar._told_at >= SECONDS:
        _tell(bar)


def _tell(bar: Any) -> None:
    bar._told_at = time.monotonic()
    bar.fp.write(f"{bar}\n")
    bar.fp.flush()


def _close(bar: Any) -> None:
    """Tells how it ended, unless the bar was to vanish or never to be seen."""
    if bar.disable:
        return
    bar.disable = True
    bar._decr_instances(bar)
    if bar.leave is not False and time.time() - bar.start_t >= bar.delay:
        _tell(bar)


def _do_nothing(bar: Any, *args: Any, **options: Any) -> None:
    """Lines are not drawn over."""


__all__ = ["use_lines_if_nobody_watches"]
