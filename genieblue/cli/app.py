"""The command `genieblue`. Each command imports the heavy libraries it needs itself."""

from typing import Annotated

import typer

from genieblue import __version__
from genieblue.cli.chat import chat
from genieblue.cli.compare import diff, stack
from genieblue.cli.data import data_app
from genieblue.cli.demo import demo
from genieblue.cli.eval import evaluate
from genieblue.cli.extract import extract, from_peft
from genieblue.cli.info import info
from genieblue.cli.init import init
from genieblue.cli.lab import lab_app
from genieblue.cli.language_exports import export_app
from genieblue.cli.params import params
from genieblue.cli.progress import log_progress_without_terminal
from genieblue.cli.push import push
from genieblue.cli.quantize import quantize
from genieblue.cli.serve import serve
from genieblue.cli.terminal import ReportingGroup, configure_logging
from genieblue.cli.train import train
from genieblue.cli.verify import verify

app = typer.Typer(
    cls=ReportingGroup,
    help="GenieBlue: add vision to a language model while keeping its text answers bit-exact.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"genieblue {__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and all log messages (or set GENIEBLUE_DEBUG=1).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Settings for all commands."""
    configure_logging(debug)
    log_progress_without_terminal()


for command in (init, extract):
    app.command()(command)
app.command("from-peft")(from_peft)
for command in (train, chat, serve):
    app.command()(command)
app.command("eval")(evaluate)
for command in (info, params, verify, diff, stack, quantize, push, demo):
    app.command()(command)
app.add_typer(data_app, name="data")
app.add_typer(lab_app, name="lab")
app.add_typer(export_app, name="export")
