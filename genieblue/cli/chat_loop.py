"""The conversation at a terminal: a line is a turn, a line that begins with a slash is a command."""

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

HELP = """/image PATH…  show images with your next line
/reset        begin a new conversation
/help         this list
/quit         end (also Ctrl-D); Ctrl-C stops an answer"""


def converse(chat: Conversation, images: Sequence[Any], **settings: Any) -> None:
    """Reads lines until /quit or the end of input; `settings` are those of its `ask`.

    A turn that fails is told and forgotten; the conversation goes on.
    """
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        note(HELP)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives `input` editing and a history
    waiting = list(images)
    for line in _lines(at_terminal):
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/help":
            note(HELP)
        elif command == "/reset":
            chat.reset()
            waiting.clear()
            note("A new conversation.")
        elif command == "/image":
            waiting += _open_images(rest)
        elif command.startswith("/") and len(command) > 1 and command[1:].isalpha():
            note(f"There is no command {command}; /help lists them.")
        elif line and _answer(chat, line, waiting, at_terminal, settings):
            waiting.clear()


def _lines(at_terminal: bool) -> Iterator[str]:
    while True:
        try:
            line = input("\nYou: " if at_terminal else "")
        except EOFError:
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
        note(f"Stopped. {_forgotten(images)}")
        return False
    except Exception as error:
        message = message_for_user(error)
        if message is None:
            raise
        typer.echo(f"Error: {message}", err=True)
        note(_forgotten(images))
        return False
    typer.echo()
    note(describe(result))
    return True


def _forgotten(images: list[Any]) -> str:
    if images:  # perhaps they are what was wrong, and then every later line would fail with them
        return "This turn is forgotten, but its images go with your next line; /reset drops them and begins anew."
    return "This turn is forgotten; /reset begins a new conversation."


def show(piece: str) -> None:
    """Writes a piece of an answer as soon as it is there."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def describe(result: dict[str, Any]) -> str:
    """Which view answered, and how many tokens it read and wrote."""
    return f"[{result['view']} view, {result['prompt_tokens']} tokens read, {result['generated_tokens']} written]"


def _open_images(rest: str) -> list[Any]:
    """The images that a line names, opened; none if one of them cannot be."""
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
        note(f"{name}: {image.width}x{image.height}; goes with your next line.")
    return images
