"""Standard output kept for one thing: what libraries print, those in C too, goes to stderr meanwhile."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """While it lasts, whatever the process prints goes to stderr."""
    # Libraries in C print to the descriptor itself.
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


__all__ = ["stdout_to_stderr"]
