"""How the command line speaks: one clear message for an error, one JSON document on stdout, libraries kept quiet.

Nothing here imports torch, so that `genieblue --help` is there at once.
"""

import contextlib
import json
import logging
import os
import sys
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
    message = str(error).strip() or type(error).__name__
    if type(error).__name__.startswith("Connect") and _is_for_users(error):
        return f"The Hub cannot be reached ({message}): check the network, or HF_ENDPOINT."
    if "401 Unauthorized" in message:
        message += "\nLog in with `hf auth login`, set HF_TOKEN, or give --token where there is that option."
    if "trust_remote_code" in message and "--trust-remote-code" not in message:
        message += "\nOn the command line the option is --trust-remote-code."
    return message


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
    for package in (*OUR_PACKAGES, "huggingface_hub"):
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO if package == "genieblue" else logging.WARNING)
        if package == "huggingface_hub":
            logger.handlers.clear()
        if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
            logger.addHandler(_StderrHandler())


class _StderrHandler(logging.Handler):
    """Writes to what `sys.stderr` is at that moment; the Hub client's report of each retry becomes one line."""

    told_of_retries = False

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.name.startswith("huggingface_hub") and ("Retrying in" in message or "thrown while" in message):
            if self.told_of_retries:
                return
            self.told_of_retries = True
            message = "The Hub does not answer; trying again …"
        prefix = "Warning: " if record.levelno >= logging.WARNING else ""
        typer.echo(prefix + message, err=True)


def quiet_transformers() -> None:
    """Keeps transformers' own warnings and loading bars off the terminal; downloads still show a bar."""
    from transformers.utils import logging as transformers_logging

    if not _debug:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def looking_for(name: str) -> Iterator[None]:
    """Names what was looked for, and where, in the error of a client that found neither a folder nor a repository."""
    try:
        yield
    except Exception as error:
        is_from_client = isinstance(error, OSError) or _is_for_users(error)
        if os.path.isdir(name) or not is_from_client or f"{name} is no folder" in str(error):
            raise
        raise OSError(f"{name} is no folder here, so it was looked up on the Hub: {error}") from error


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
