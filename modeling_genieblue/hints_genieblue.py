"""Errors with hints: the problem is stated once, the remedy in the terms of whatever shows the error."""

# For Python; the command line has options instead.
GIVE_BASE, ACCEPT_BASE = "give_base", "accept_base"
PYTHON_WORDS = {
    GIVE_BASE: "Pass `base_model=` (a loaded model, a folder or a Hub id).",
    ACCEPT_BASE: "Pass `check_base=False` to use this one anyway.",
}


class HintedError(Exception):
    """An error with the problem in `what`, followed by hints; `str` gives the hints for Python."""

    def __init__(self, what: str, *hints: str):
        super().__init__(" ".join([what, *(PYTHON_WORDS[hint] for hint in hints)]))
        self.what, self.hints = what, hints


class BaseNotFoundError(HintedError, OSError):
    """The base cannot be found or read at its location."""


class WrongBaseError(HintedError, ValueError):
    """No base is recorded, or the base is not the recorded one."""
