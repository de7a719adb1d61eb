"""`genieblue demo`: a small GenieBlue from scratch."""

from pathlib import Path
from typing import Annotated

import typer

from genieblue.cli.options import Json, Seed
from genieblue.cli.terminal import print_json, quiet_transformers, stdout_for_json


def demo(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("demo-out"),
    seed: Seed = 0,
    json_output: Json = False,
) -> None:
    """Train a small GenieBlue that reads handwritten numbers.

    Takes under 10 minutes on two cores, without a network. The exit code is 1 if the base's text answers changed.
    """
    with stdout_for_json(json_output):
        quiet_transformers()
        from genieblue.demo.run import format_report, run_demo, text_is_unchanged

        report = run_demo(out, seed=seed)
    if json_output:
        print_json(report)
    else:
        typer.echo(format_report(report, out))
    if not text_is_unchanged(report):
        raise typer.Exit(1)
