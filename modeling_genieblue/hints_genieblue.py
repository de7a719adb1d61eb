"""Errors with hints: what is wrong is said once, what to do about it in the words of whoever shows the error."""

# In the words of Python; the command line has options instead.
GIVE_BASE, ACCEPT_BASE = "give_base", "accept_base"
PYTHON_WORDS = {
    GIVE_BASE: "Pass `base_model=` (a loaded model, a folder or a Hub id).",
    ACCEPT_BASE: "Pass `check_base=False` to run on this one all the same.",
}


class HintedError(Exception):
    """An error whose `what` is followed by hints; `str` of it words them for Python."""

    def __init__(self, what: str, *hints: str):
        super().__init__(" ".join([what, *(PYTHON_WORDS[hint] for hint in hints)]))
        self.what, self.hints = what, hints


class BaseNotFoundError(HintedError, OSError):
    """The base cannot be found or read where it should be."""


class WrongBaseError(HintedError, ValueError):
    """No base is named, or the one that was found is not the recorded one."""


__all__ = ["BaseNotFoundError", "HintedError", "WrongBaseError"]
