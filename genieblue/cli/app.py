"""The command `genieblue`. Heavy libraries are imported by the commands that need them."""

from typing import Annotated

import typer

from genieblue.cli.chat import chat
from genieblue.cli.demo import demo
from genieblue.cli.info import info
from genieblue.cli.init import init
from genieblue.cli.params import params
from genieblue.cli.progress import use_lines_if_nobody_watches
from genieblue.cli.push import push
from genieblue.cli.qnn import export_app
from genieblue.cli.quantize import quantize
from genieblue.cli.terminal import ReportingGroup, speak_plainly
from genieblue.cli.train import train
from genieblue.cli.verify import verify

app = typer.Typer(
    cls=ReportingGroup,
    help="GenieBlue: eyes for a frozen language model, whose text answers do not change by one bit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and all log messages (or set GENIEBLUE_DEBUG=1).")
    ] = False,
) -> None:
    """Settings of all commands."""
    speak_plainly(debug)
    use_lines_if_nobody_watches()


for command in (init, train, chat, info, params, verify, quantize, push, demo):
    app.command()(command)
app.add_typer(export_app, name="export")
