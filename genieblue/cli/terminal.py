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

from conversion.stdout import stdout_to_stderr
from genieblue.cli.errors import (
    UNREACHABLE,
    in_command_words,
    is_for_users,
    message_for_user,
    text_of,
    without_secrets,
)

OUR_PACKAGES = ("genieblue", "conversion", "hub_cards", "modeling_genieblue")
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


def speak_plainly(debug: bool = False) -> None:
    """Our warnings go to stderr as one line each; with `debug` (or GENIEBLUE_DEBUG=1) all that is logged does."""
    global _debug
    _debug = debug or bool(os.environ.get("GENIEBLUE_DEBUG"))
    if _debug:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))
        logging.basicConfig(level=logging.DEBUG, handlers=[handler])
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


class _Formatter(logging.Formatter):
    """Leaves out what is secret in the addresses that a client logs."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


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
        is_from_client = isinstance(error, OSError) or is_for_users(error)
        if os.path.isdir(name) or not is_from_client or f"{name} is no folder" in str(error):
            raise
        message = in_command_words(text_of(error))
        if UNREACHABLE in message:
            raise OSError(f"{name} is no folder here. {UNREACHABLE}") from error
        raise OSError(f"{name} is no folder here, so it was looked up on the Hub: {message}") from error


def check_name(name: str, what: str = "The model") -> None:
    """`ValueError` for an empty name, which an unset variable of the shell is; `OSError` for that of a file."""
    if not name.strip():
        raise ValueError(f"{what}'s name is empty: give a folder or a Hub id.")
    if os.path.isfile(name):
        raise OSError(f"{name} is a file: give the folder that it belongs to, or a Hub id.")
    if ":/" in name:
        from modeling_genieblue.addresses_genieblue import refuse_address

        refuse_address(name, what)


def stdout_for_json(active: bool) -> contextlib.AbstractContextManager[None]:
    """While it lasts and is `active`, stdout is kept for one JSON document and nothing else."""
    return stdout_to_stderr() if active else contextlib.nullcontext()


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
