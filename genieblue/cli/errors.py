"""Error messages of the command line: one clear message, which names the command line's own options.

Nothing here imports torch, so that `genieblue --help` is instant.
"""

import errno
import os
import re
import traceback
from collections.abc import Iterable

# Errors of these libraries describe a problem with a file, the network or a template, so they are shown to the user.
LIBRARIES_WITH_ERRORS_FOR_USERS = ("huggingface_hub", "httpx", "httpx2", "safetensors", "jinja2")
EXTRAS = {
    "datasets": "train",
    "accelerate": "train",
    "rapidfuzz": "eval",
    "matplotlib": "train",
    "sklearn": "demo",
    "scipy": "demo",
    "sentencepiece": "sentencepiece",
    "optimum": "quantization",
    "onnxruntime": "qnn",
    "onnx": "qnn",
    "gradio": "web",
}
UNREACHABLE = "The Hub cannot be reached: check the network, or HF_ENDPOINT."
OFFLINE = "It is not in the cache, and HF_HUB_OFFLINE forbids asking the Hub."
# The messages of the Hub's clients when the Hub does not answer.
NO_ANSWER = re.compile(
    r"[:.]?\s*(We couldn't connect to '.*?offline-mode'\.|"
    r"(Got: Connect.*\s)?An error happened while trying to locate the files? on the Hub.*?(connection is on|again)\.|"
    r"Cannot find an appropriate cached snapshot folder.*?variable\.)",
    re.DOTALL,
)
YES = ("1", "ON", "YES", "TRUE")  # of a variable of the environment, as the Hub's client reads them
ERROR_NUMBER = re.compile(r"^\[Errno \d+\] ")
MAY_HOLD_SECRETS = re.compile(r":/|data:|\bhf_|bearer", re.IGNORECASE)
# transformers' list of all the model types it knows.
ALL_KINDS = re.compile(r"\s*Model type should be one of [\w, ]*\.?")
# What transformers adds to a refusal of code: an address on the Hub, even where the code is in a folder.
PLACE_OF_FOLDER = re.compile(r"You can inspect the repository content at https://hf\.co/[/.]\S*[.\s]*")
# The command line's wording for the hints of our errors (`modeling_genieblue.hints_genieblue`).
GIVE_BASE = "give_base"
BASE_WORDS = {
    True: "Give the folder or Hub id of the right base with --base.",
    False: "This command takes no base but the recorded one.",
}
_takes_base = False


def message_for_user(error: Exception) -> str | None:
    """The message to show the user; `None` for an error that is a bug, which needs a traceback."""
    if isinstance(error, BrokenPipeError):
        return None  # `genieblue … | head`: handled by the caller
    if isinstance(error, ModuleNotFoundError):
        if "genieblue[" in str(error):  # the message already names the extra
            return str(error)
        package = (error.name or "").split(".")[0]
        extra = EXTRAS.get(package)
        return extra and f"This needs the package {package}, which is not installed: pip install 'genieblue[{extra}]'."
    if isinstance(error, ImportError) and error.path is None:  # of a check for a library, not of an import statement
        return command_line_message(str(error).strip()) or None
    if type(error).__name__ == "OutOfMemoryError":
        return f"The GPU is out of memory: {_first_line(error)} Use a smaller batch, fewer tiles or another dtype."
    if not isinstance(error, (ValueError, OSError)) and not is_for_users(error):
        return None
    if _fills_the_cache(error):
        from huggingface_hub.constants import HF_HUB_CACHE

        return f"The disk with the Hub cache, {HF_HUB_CACHE}, is full: free some space, or set HF_HOME elsewhere."
    message = command_line_message(text_of(error)) or type(error).__name__
    if message.startswith("[Errno") and getattr(error, "filename", None):
        message = f"{error.filename} cannot be used ({error.strerror}): give a path that you can read and write."
    message = ERROR_NUMBER.sub("", message)
    if type(error).__name__.startswith("Connect") and is_for_users(error):
        return UNREACHABLE
    if "401 Unauthorized" in message:
        message += "\nLog in with `hf auth login`, set HF_TOKEN, or use --token where the command has it."
    if "trust_remote_code" in message and "--trust-remote-code" not in message:
        message += "\nOn the command line the option is --trust-remote-code."
    return message


def set_takes_base(takes_base: bool) -> None:
    """Notes whether the command that runs has an option for another base than the recorded one, which hints name."""
    global _takes_base
    _takes_base = takes_base


def text_of(error: BaseException) -> str:
    """The message of an error, with its hints in the command line's wording."""
    hints = with_hints(getattr(error, "what", ""), getattr(error, "hints", ()))
    return hints or str(error).strip()


def with_hints(what: str, hints: Iterable[str]) -> str:
    """A text with its hints in the command line's wording; what only Python can do is left out."""
    return " ".join([what, *(BASE_WORDS[_takes_base] for hint in hints if hint == GIVE_BASE)])


def command_line_message(message: str) -> str:
    """A library's message, with long network errors shortened and secrets removed."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in YES
    message = NO_ANSWER.sub(". " + (OFFLINE if offline else UNREACHABLE), message).removeprefix(". ")
    message = PLACE_OF_FOLDER.sub("", ALL_KINDS.sub("", message))
    return without_secrets(message)


def without_secrets(message: str) -> str:
    """A message with its URLs redacted, since a library's message may contain passwords and tokens."""
    if not MAY_HOLD_SECRETS.search(message):
        return message
    from modeling_genieblue.addresses_genieblue import redacted  # imports torch, so only if needed

    return redacted(message)


def _fills_the_cache(error: BaseException | None) -> bool:
    """Whether the disk was full when huggingface_hub wrote to it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
            return any(module.startswith("huggingface_hub") for module in modules)
        error = error.__cause__ or error.__context__
    return False


def is_for_users(error: Exception) -> bool:
    """Whether an error, or a class that it inherits from, is of a library whose errors are shown to the user."""
    libraries = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    return bool(libraries & set(LIBRARIES_WITH_ERRORS_FOR_USERS))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
