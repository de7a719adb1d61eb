"""Terminal output: one clear message per error, one JSON document on stdout, quiet libraries.

Nothing here imports torch, so that `genieblue --help` is instant.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import typer
from typer.core import TyperGroup

from conversion.stdout import stdout_to_stderr
from genieblue.cli.errors import (
    UNREACHABLE,
    YES,
    command_line_message,
    is_for_users,
    message_for_user,
    set_takes_base,
    text_of,
    without_secrets,
)

OUR_PACKAGES = ("genieblue", "conversion", "hub_cards", "modeling_genieblue")
# The launcher ends all processes once one fails, so an error that all have is printed once, by the main one.
SECONDS_TO_FAIL_FIRST = 5
FREE_TEXT = ("--prompt", "-p", "--message")  # options that may begin with `~` but name no file
_debug = False


class ReportingGroup(TyperGroup):
    """Turns errors that the user can fix into one message on stderr and exit code 1."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Expands `~` for all commands: shells leave it as it is in `--out=~/x`."""
        set_takes_base(False)  # until an option for it is read
        return super().parse_args(ctx, with_home(args))

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; `--debug` or GENIEBLUE_DEBUG=1 keeps tracebacks."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("Interrupted.", err=True)
            raise
        except Exception as error:
            message = None if _debug else message_for_user(error)
            if message is None:
                raise
            if not is_main_process():
                time.sleep(SECONDS_TO_FAIL_FIRST)
            typer.secho("Error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
            typer.echo(message, err=True)
            raise typer.Exit(1) from error


def with_home(arguments: Sequence[str]) -> list[str]:
    """Arguments of the command line with the home folder in place of `~`, but for free text."""
    found = []
    for before, argument in pairwise(["", *arguments]):
        option, sign, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        is_text = (option if sign else before) in FREE_TEXT
        found.append(argument if is_text else option + sign + os.path.expanduser(value))
    return found


def is_main_process() -> bool:
    """Whether this process is the one of several, started by `torchrun` or `accelerate launch`, that speaks."""
    return int(os.environ.get("RANK", 0)) == 0


def configure_logging(debug: bool = False) -> None:
    """Logs our warnings to stderr, one line each; with `debug` (or GENIEBLUE_DEBUG=1), logs everything.

    Of several processes only the main one logs.
    """
    global _debug
    _debug = debug or os.environ.get("GENIEBLUE_DEBUG", "").upper() in YES
    if _debug:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))
        logging.basicConfig(level=logging.DEBUG, handlers=[handler])
        return
    # Python warnings of libraries are meant for developers, not for users of a command.
    warnings.simplefilter("ignore")
    if not is_main_process():
        os.environ["TQDM_DISABLE"] = "1"
        logging.getLogger().addHandler(logging.NullHandler())  # without any handler, Python prints warnings
        return
    for package in OUR_PACKAGES:
        _log_to_stderr(package, logging.INFO if package == "genieblue" else logging.WARNING)
    logging.getLogger("conversion.create").setLevel(logging.INFO)  # where generation stops


def _log_to_stderr(package: str, level: int) -> None:
    logger = logging.getLogger(package)
    logger.setLevel(level)
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())


class _Formatter(logging.Formatter):
    """Removes secrets from the URLs that a client logs."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class _StderrHandler(logging.Handler):
    """Writes to the current `sys.stderr`; all retry reports of huggingface_hub become one line."""

    reported_retries = False

    def emit(self, record: logging.LogRecord) -> None:
        message = command_line_message(record.getMessage())
        if record.name.startswith("huggingface_hub") and ("Retrying in" in message or "thrown while" in message):
            if self.reported_retries:
                return
            self.reported_retries = True
            message = "The Hub does not respond; retrying …"
        prefix = "Warning: " if record.levelno >= logging.WARNING else ""
        typer.echo(prefix + message, err=True)


def _log_everything(package: str) -> None:
    """Routes the log of a library that has a handler of its own through ours, which removes secrets."""
    logger = logging.getLogger(package)
    logger.handlers.clear()
    logger.setLevel(logging.DEBUG)
    logger.propagate = True


def quiet_hub() -> None:
    """Routes huggingface_hub's log through our handler only; it adds a handler of its own when it is imported."""
    import huggingface_hub  # noqa: F401

    if _debug:
        _log_everything("huggingface_hub")
        return
    logger = logging.getLogger("huggingface_hub")
    for handler in [handler for handler in logger.handlers if not isinstance(handler, _StderrHandler)]:
        logger.removeHandler(handler)
    _log_to_stderr("huggingface_hub", logging.WARNING)


def quiet_transformers() -> None:
    """Hides transformers' warnings and loading bars, but for `--debug`; downloads still show a bar."""
    from transformers.utils import logging as transformers_logging

    quiet_hub()
    if _debug:
        _log_everything("transformers")
        return
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def looking_for(name: str) -> Iterator[None]:
    """Adds the name, and where it was looked up, to an error about a missing folder or repository.

    A name that can be neither a folder nor a repository is refused at once.
    """
    check_name(name)
    quiet_hub()
    try:
        yield
    except Exception as error:
        is_from_client = isinstance(error, OSError) or is_for_users(error)
        if os.path.isdir(name) or not is_from_client or f"{name} is not a folder" in str(error):
            raise
        message = command_line_message(text_of(error))
        if UNREACHABLE in message:
            raise OSError(f"{name} is not a local folder. {UNREACHABLE}") from error
        raise OSError(f"{name} is not a local folder, so it was looked up on the Hub: {message}") from error


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Treats SIGTERM like Ctrl-C, so that hidden folders are removed on exit."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signal handlers need the main thread
        return

    def end(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_name(name: str, what: str = "The model") -> None:
    """`ValueError` for an empty name (from an unset shell variable); `OSError` for a file."""
    if not name.strip():
        raise ValueError(f"{what}'s name is empty: give a folder or a Hub id.")
    if os.path.isfile(name):
        raise OSError(f"{name} is a file: give the folder that contains it, or a Hub id.")
    if ":/" in name:
        from modeling_genieblue.addresses_genieblue import refuse_address

        refuse_address(name, what)


def stdout_for_json(active: bool) -> contextlib.AbstractContextManager[None]:
    """If `active`, reserves stdout for one JSON document."""
    return stdout_to_stderr() if active else contextlib.nullcontext()


def progress_bar(steps: Iterable[Any], title: str) -> Iterable[Any]:
    """`steps` with a progress bar on stderr, shown after a second."""
    from tqdm.auto import tqdm

    return tqdm(steps, desc=title.capitalize(), delay=1, leave=False)


def print_json(document: Any) -> None:
    """Writes one JSON document to stdout."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints columns separated by two spaces, the first left-aligned, the others right-aligned."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for number, line in enumerate(lines):
        cells = [cell.rjust(width) if column else cell.ljust(width)
                 for column, (cell, width) in enumerate(zip(line, widths, strict=True))]  # fmt: skip
        typer.secho("  ".join(cells).rstrip(), bold=number == 0)


def note(text: str) -> None:
    """Prints a remark on stderr."""
    typer.secho(text, err=True, dim=True)


def choose_device(name: str | None) -> str:
    """The named device, or by default a GPU if available; `ValueError` if it cannot be used."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"Unknown device {name!r}: give cpu, cuda, cuda:1, mps, …") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"The device {name} does not exist: torch found {torch.cuda.device_count()} CUDA devices.")
    return name
