"""`genieblue params`: how many parameters a structure of the paper trains."""

from typing import Annotated

import typer

from genieblue.cli.options import Json, PlacementOption, Structure
from genieblue.cli.terminal import print_json, print_table, quiet_transformers, stdout_for_json


def params(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="bluelm-3b or qwen2.5-3b.")],
    structure: Annotated[Structure, typer.Option(help="Structure of the paper.")] = "genieblue",
    placement: PlacementOption = "skip",
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    json_output: Json = False,
) -> None:
    """Count the parameters that a structure of the paper trains."""
    with stdout_for_json(json_output):
        quiet_transformers()
        from genieblue.lab.parameters import count_trainable

        counted = count_trainable(preset, structure, placement, rank)
    if json_output:
        print_json(counted)
        return
    parts = {**counted["parts"], "trainable": counted["trainable_parameters"]}
    rows = [(name, f"{number:,}") for name, number in parts.items()]
    print_table((f"{preset}, {structure}", "parameters"), rows)
