"""GenieBlue's commands under `optimum-cli`, which finds this file as `optimum.commands.register.register_genieblue`.

`setup.py` installs this folder into that namespace, to which no package may add an `__init__.py`. optimum-cli imports
it at every start, so nothing heavy is imported here.
"""

from argparse import ArgumentParser
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from genieblue.cli.app import app


class GenieBlueCommand(BaseOptimumCLICommand):
    """Runs a `genieblue` command under `optimum-cli`, with the same options."""

    NAME: str

    @classmethod
    def parse_args(cls, parser: ArgumentParser) -> None:
        """Adds the command's options to the parser."""
        command = _command(cls.NAME)
        hints = get_type_hints(command.callback)
        parser.description = command.help
        for parameter in command.params:
            text = (getattr(parameter, "help", None) or "").replace("%", "%%")
            if parameter.param_type_name == "argument":
                parser.add_argument(parameter.name, help=text)
            elif parameter.is_flag:
                parser.add_argument(*parameter.opts, dest=parameter.name, action="store_true", help=text)
            else:
                parser.add_argument(
                    *parameter.opts,
                    dest=parameter.name,
                    required=parameter.required,
                    choices=_choices(hints[parameter.name]),
                    action="append" if parameter.multiple else "store",
                    help=text if parameter.default is None else f"{text} (default: {parameter.default})",
                )

    def run(self) -> None:
        """Runs the command with the given options and exits with its exit code."""
        app(args=[*self.NAME.split(), *self._given()], prog_name="genieblue")

    def _given(self) -> list[str]:
        options, arguments = [], []
        for parameter in _command(self.NAME).params:
            value = getattr(self.args, parameter.name)
            if parameter.param_type_name == "argument":
                arguments.append(value)
            elif value is True:
                options.append(parameter.opts[0])
            elif value is not None and value is not False:  # an empty text is given, and refused by the command
                options += [f"{parameter.opts[0]}={item}" for item in (value if parameter.multiple else [value])]
        return [*options, "--", *arguments]


def _command(name: str) -> Any:
    """The `genieblue` command with this name, possibly in a group (`export qnn`)."""
    command = typer.main.get_command(app)
    for part in name.split():
        command = command.commands[part]
    return command


def _choices(hint: Any) -> list[str] | None:
    """The choices of an option with this annotation, if it has any."""
    return next((list(get_args(kind)) for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal), None)


class GenieBlueQuantizeCommand(GenieBlueCommand):
    """`optimum-cli genieblue-quantize`."""

    NAME = "quantize"
    COMMAND = CommandInfo(name="genieblue-quantize", help="Quantize a GenieBlue and its base with optimum-quanto.")


class GenieBlueQnnCommand(GenieBlueCommand):
    """`optimum-cli export genieblue-qnn`."""

    NAME = "export qnn"
    COMMAND = CommandInfo(name="genieblue-qnn", help="Export a GenieBlue to context binaries for a Snapdragon NPU.")


# Each entry is a command, or `(command, parent command)` for one under `export`.
REGISTER_COMMANDS = [GenieBlueQuantizeCommand, (GenieBlueQnnCommand, ExportCommand)]
