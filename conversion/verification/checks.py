"""One check of a verification: what it found, or why it failed."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """The result of a check: whether it passed, what was found, and hints (`hints_genieblue`)."""

    name: str
    ok: bool
    detail: str
    hints: tuple[str, ...] = ()


class CheckFailed(Exception):
    """A check that failed; the message is its detail."""


def fail_on(problems: Iterable[str]) -> None:
    """`CheckFailed` with the first few problems, if any."""
    problems = list(problems)
    if problems:
        rest = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckFailed("; ".join(problems[:4]) + rest)


def run_check(name: str, function: Callable[[], str]) -> Check:
    """The result of a function that returns what was found; any exception is a failure."""
    try:
        return Check(name, True, function())
    except CheckFailed as failure:
        return Check(name, False, str(failure))
    except Exception as error:  # whatever is wrong is a result, and the next check is made
        logger.debug("Check %s failed with an exception", name, exc_info=error)
        said, hints = getattr(error, "what", str(error)), getattr(error, "hints", ())
        return Check(name, False, f"could not be checked: {' '.join(said.split()) or type(error).__name__}", hints)
