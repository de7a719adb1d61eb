"""How the command line speaks: one clear message for an error, one JSON document on stdout, libraries kept quiet.

Nothing here imports torch, so that `genieblue --help` is there at once.
"""

import contextlib
import errno
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperGroup

OUR_PACKAGES = ("genieblue", "conversion", "hub_cards", "modeling_genieblue")
# Errors of these libraries say what is wrong with a file, a network or a template: they are for the user.
LIBRARIES_WITH_ERRORS_FOR_USERS = ("huggingface_hub", "httpx", "httpx2", "safetensors", "jinja2")
EXTRAS = {
    "datasets": "train",
    "accelerate": "train",
    "sklearn": "demo",
    "scipy": "demo",
    "sentencepiece": "sentencepiece",
    "optimum": "quantization",
    "onnxruntime": "onnxruntime",
    "onnx": "onnxruntime",
}
UNREACHABLE = "The Hub cannot be reached: check the network, or HF_ENDPOINT."
OFFLINE = "It is not in the cache, and HF_HUB_OFFLINE keeps the Hub from being asked."
# What the Hub's clients say when nothing answers, and what comes before it.
NO_ANSWER = re.compile(
    r"[:.]?\s*(We couldn't connect to '.*?offline-mode'\.|"
    r"(Got: Connect.*\s)?An error happened while trying to locate the files? on the Hub.*?(connection is on|again)\.|"
    r"Cannot find an appropriate cached snapshot folder.*?variable\.)",
    re.DOTALL,
)
# transformers' list of all that it knows.
ALL_KINDS = re.compile(r"\s*Model type should be one of [\w, ]*\.?")
# What Python programs are advised, and what the command line has for it.
COMMAND_WORDS = (
    ("pass `base_model=` (a loaded model, a folder or a Hub id)", "give its folder or Hub id as --base"),
    ("A base that is already in memory can be given as `base_model=`.", "Another copy of it can be given as --base."),
    ("Load that base, or pass `check_base=False` to run on this one all the same.", "Give that base as --base."),
    (" Pass `check_base=False` and `base_model=` to use it.", ""),
    (", or pass `check_base=False`", ""),
    ("`base_model=` will be needed to load it", "--base will be needed to load it"),
)
_debug = False


class ReportingGroup(TyperGroup):
    """Turns errors that a user can do something about into one message on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; with `--debug` or GENIEBLUE_DEBUG=1 errors keep their traceback."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            message = None if _debug else message_for_user(error)
            if message is None:
                raise
            typer.secho("Error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
            typer.echo(message, err=True)
            raise typer.Exit(1) from error


def message_for_user(error: Exception) -> str | None:
    """What to tell the user; None for an error that is no user's but a mistake of the program."""
    if isinstance(error, BrokenPipeError):
        return None  # `genieblue … | head`: handled by the caller
    if isinstance(error, ModuleNotFoundError):
        if "genieblue[" in str(error):  # whoever raised it knows best which extra brings the library
            return str(error)
        package = (error.name or "").split(".")[0]
        extra = EXTRAS.get(package)
        return extra and f"This needs the library {package}, which is not installed: pip install 'genieblue[{extra}]'."
    if type(error).__name__ == "OutOfMemoryError":
        return f"The GPU's memory is full: {_first_line(error)} Use a smaller batch, fewer tiles or another dtype."
    if not isinstance(error, (ValueError, OSError)) and not _is_for_users(error):
        return None
    if _fills_the_cache(error):
        from huggingface_hub.constants import HF_HUB_CACHE

        return f"The disk of the Hub's cache, {HF_HUB_CACHE}, is full: make room, or set HF_HOME to another folder."
    message = in_command_words(str(error).strip() or type(error).__name__)
    if message.startswith("[Errno") and getattr(error, "filename", None):
        message = f"{error.filename} cannot be used ({error.strerror}): give a place that you may read and write."
    if type(error).__name__.startswith("Connect") and _is_for_users(error):
        return UNREACHABLE
    if "401 Unauthorized" in message:
        message += "\nLog in with `hf auth login`, set HF_TOKEN, or give --token where there is that option."
    if "trust_remote_code" in message and "--trust-remote-code" not in message:
        message += "\nOn the command line the option is --trust-remote-code."
    return message


def in_command_words(message: str) -> str:
    """An error of the libraries with the command line's options in it, and without what is long about the network."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    message = NO_ANSWER.sub(". " + (OFFLINE if offline else UNREACHABLE), message).removeprefix(". ")
    message = ALL_KINDS.sub("", message)
    for words, ours in COMMAND_WORDS:
        message = message.replace(words, ours)
    return message


def _fills_the_cache(error: BaseException | None) -> bool:
    """Whether a disk was full while the Hub's client wrote to it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
            return any(module.startswith("huggingface_hub") for module in modules)
        error = error.__cause__ or error.__context__
    return False


def _is_for_users(error: Exception) -> bool:
    libraries = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    return bool(libraries & set(LIBRARIES_WITH_ERRORS_FOR_USERS))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def speak_plainly(debug: bool = False) -> None:
    """Our warnings go to stderr as one line each; with `debug` (or GENIEBLUE_DEBUG=1) all that is logged does."""
    global _debug
    _debug = debug or bool(os.environ.get("GENIEBLUE_DEBUG"))
    if _debug:
        logging.basicConfig(level=logging.DEBUG, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
        return
    # Libraries warn about themselves, which helps their developers, and not the user of a command.
    warnings.simplefilter("ignore")
    for package in OUR_PACKAGES:
        _speak_for(package, logging.INFO if package == "genieblue" else logging.WARNING)


def _speak_for(package: str, level: int) -> None:
    logger = logging.getLogger(package)
    logger.setLevel(level)
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())


class _StderrHandler(logging.Handler):
    """Writes to what `sys.stderr` is at that moment; the Hub client's report of each retry becomes one line."""

    told_of_retries = False

    def emit(self, record: logging.LogRecord) -> None:
        message = in_command_words(record.getMessage())
        if record.name.startswith("huggingface_hub") and ("Retrying in" in message or "thrown while" in message):
            if self.told_of_retries:
                return
            self.told_of_retries = True
            message = "The Hub does not answer; trying again …"
        prefix = "Warning: " if record.levelno >= logging.WARNING else ""
        typer.echo(prefix + message, err=True)


def quiet_hub() -> None:
    """Lets the Hub's client speak through us alone; it takes a handler of its own when it is imported."""
    import huggingface_hub  # noqa: F401

    if not _debug:
        logger = logging.getLogger("huggingface_hub")
        for handler in [handler for handler in logger.handlers if not isinstance(handler, _StderrHandler)]:
            logger.removeHandler(handler)
        _speak_for("huggingface_hub", logging.WARNING)


def quiet_transformers() -> None:
    """Keeps transformers' own warnings and loading bars off the terminal; downloads still show a bar."""
    from transformers.utils import logging as transformers_logging

    quiet_hub()
    if not _debug:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def looking_for(name: str) -> Iterator[None]:
    """Names what was looked for, and where, in the error of a client that found neither a folder nor a repository.

    What is neither a folder nor the name of a repository is refused at once.
    """
    check_name(name)
    quiet_hub()
    try:
        yield
    except Exception as error:
        is_from_client = isinstance(error, OSError) or _is_for_users(error)
        if os.path.isdir(name) or not is_from_client or f"{name} is no folder" in str(error):
            raise
        message = in_command_words(str(error))
        if UNREACHABLE in message:
            raise OSError(f"{name} is no folder here. {UNREACHABLE}") from error
        raise OSError(f"{name} is no folder here, so it was looked up on the Hub: {message}") from error


def check_name(name: str, what: str = "The model") -> None:
    """`ValueError` for an empty name, which an unset variable of the shell is; `OSError` for that of a file."""
    if not name.strip():
        raise ValueError(f"{what}'s name is empty: give a folder or a Hub id.")
    if os.path.isfile(name):
        raise OSError(f"{name} is a file: give the folder that it belongs to, or a Hub id.")


@contextlib.contextmanager
def stdout_for_json(active: bool) -> Iterator[None]:
    """While it lasts, whatever prints goes to stderr: stdout is to carry one JSON document and nothing else."""
    if not active:
        yield
        return
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


def progress_bar(steps: Iterable[Any], title: str) -> Iterable[Any]:
    """`steps` with a bar on stderr, for work that takes longer than a moment."""
    from tqdm.auto import tqdm

    return tqdm(steps, desc=title.capitalize(), delay=1, leave=False)


def print_json(document: Any) -> None:
    """Writes one JSON document to stdout."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns with two spaces between them, the first one left-aligned, the others right-aligned."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for number, line in enumerate(lines):
        cells = [cell.rjust(width) if column else cell.ljust(width)
                 for column, (cell, width) in enumerate(zip(line, widths, strict=True))]  # fmt: skip
        typer.secho("  ".join(cells).rstrip(), bold=number == 0)


def note(text: str) -> None:
    """A remark beside the result, on stderr."""
    typer.secho(text, err=True, dim=True)


def choose_device(name: str | None) -> str:
    """The device to run on: a named one, or the GPU if there is one; `ValueError` if it cannot be used here."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"Unknown device {name!r}: give cpu, cuda, cuda:1, mps, …") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"The device {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices.")
    return name


def short_bytes(number: int) -> str:
    """A size in bytes, kB, MB or GB (powers of 1000)."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number} bytes"
