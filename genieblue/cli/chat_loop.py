"""A conversation in the terminal: each line is a turn; a line that starts with a slash is a command."""

import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from genieblue.cli.errors import message_for_user
from genieblue.cli.terminal import note
from genieblue.serving.conversation import Conversation
from modeling_genieblue.image_reading_genieblue import read_image

HELP = """/image PATH…  add images to your next message
/reset        start a new conversation
/help         show this list
/quit         quit (also Ctrl-D); Ctrl-C stops an answer"""


def converse(chat: Conversation, images: Sequence[Any], **settings: Any) -> None:
    """Reads lines until /quit or the end of input; `settings` are passed to `chat.ask`.

    A turn that fails is reported and discarded; the conversation continues. If nobody watches, because the lines come
    from a file or a pipe, the exit code is then 1. Raises `ValueError` if there is no line at all.
    """
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    if at_terminal:
        note(HELP)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives `input` editing and a history
    waiting, failed, line = list(images), False, None
    for line in _lines(at_terminal):
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            break
        if command == "/help":
            note(HELP)
        elif command == "/reset":
            chat.reset()
            waiting.clear()
            note("Started a new conversation.")
        elif command == "/image":
            opened = _open_images(rest)
            waiting, failed = [*waiting, *opened], failed or not opened
        elif command.startswith("/") and len(command) > 1 and command[1:].isalpha():
            note(f"Unknown command {command}; /help lists the commands.")
        elif line and _answer(chat, line, waiting, at_terminal, settings):
            waiting.clear()
        elif line:
            failed = True
    if at_terminal:
        return
    if line is None:
        raise ValueError("There is no question: stdin is empty. Ask with --prompt, or run this in a terminal.")
    if failed:
        raise typer.Exit(1)


def _lines(at_terminal: bool) -> Iterator[str]:
    while True:
        try:
            line = input("\nYou: " if at_terminal else "")
        except (EOFError, RuntimeError):  # RuntimeError: there is no stdin at all
            if at_terminal:
                typer.echo()
            return
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            note("\nCtrl-D or /quit ends the conversation.")
            continue
        yield line.strip()


def _answer(chat: Conversation, line: str, images: list[Any], at_terminal: bool, settings: dict[str, Any]) -> bool:
    """Streams the answer to one line; False if there was none."""
    if at_terminal:
        typer.secho("GenieBlue: ", bold=True, nl=False)
    try:
        result = chat.ask(line, images, on_text=show, **settings)
    except KeyboardInterrupt:
        typer.echo()
        note(f"Stopped. {_discarded(images)}")
        return False
    except Exception as error:
        message = message_for_user(error)
        if message is None:
            raise
        typer.echo(f"Error: {message}", err=True)
        note(_discarded(images))
        return False
    typer.echo()
    note(describe(result))
    return True


def _discarded(images: list[Any]) -> str:
    if images:  # if they caused the failure, the user must be able to drop them
        return "This turn is discarded, but its images stay for your next message; /reset drops them and starts over."
    return "This turn is discarded; /reset starts a new conversation."


def show(piece: str) -> None:
    """Writes a piece of an answer as soon as it is generated."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def describe(result: dict[str, Any]) -> str:
    """The view that answered, and the number of prompt and generated tokens."""
    return f"[{result['view']} view, {result['prompt_tokens']} prompt tokens, {result['generated_tokens']} generated]"


def _open_images(rest: str) -> list[Any]:
    """Opens the images named in a line; returns none if any of them cannot be opened."""
    rest = rest.strip()
    try:
        names = [rest] if Path(rest).is_file() else shlex.split(rest)
    except ValueError:  # a quote that is part of a name
        names = [rest]
    if not names:
        note("Name an image: /image photo.jpg")
        return []
    try:
        images = [read_image(str(Path(name).expanduser()) if "://" not in name else name) for name in names]
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        return []
    for name, image in zip(names, images, strict=True):
        note(f"{name}: {image.width}x{image.height}, added to your next message.")
    return images
