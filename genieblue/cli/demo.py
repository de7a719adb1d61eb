"""`genieblue demo`: a small GenieBlue, made here from parts that need no Hub."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from genieblue.cli.options import Json, Seed
from genieblue.cli.terminal import print_json, quiet_transformers, stdout_for_json


class DemoBase(StrEnum):
    """The base LLM of a demo."""

    TOY = "toy"
    SMOLLM2 = "smollm2"


def demo(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("demo-out"),
    base: Annotated[DemoBase, typer.Option(help="toy: trained here, under 10 minutes; smollm2: a real LLM.")] = (
        DemoBase.TOY
    ),
    seed: Seed = 0,
    json_output: Json = False,
) -> None:
    """Train a small GenieBlue and test it.

    The toy reads handwritten numbers after some 8 minutes on two cores. SmolLM2-135M-Instruct, from PyPI, also reads
    words, compares numbers and counts digits after some 30. The exit code is 1 if the base's text answers changed.
    """
    with stdout_for_json(json_output):
        quiet_transformers()
        from genieblue.demo.run import format_report, run_demo, text_is_unchanged

        if base == DemoBase.TOY:
            from genieblue.demo.toy import ToyDemo as Demo
        else:
            from genieblue.demo.smollm2 import SmolLM2Demo as Demo
        report = run_demo(Demo(seed=seed), out)
    if json_output:
        print_json(report)
    else:
        typer.echo(format_report(report, out))
    if not text_is_unchanged(report):
        raise typer.Exit(1)
