"""`genieblue diff` and `genieblue stack`: compare two GenieBlues, and put one on a newer revision of its base."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from genieblue.cli.language_exports import print_result
from genieblue.cli.options import BaseCode, Json, Revision, UnquantizedModel
from genieblue.cli.terminal import (
    ended_by_sigterm,
    looking_for,
    note,
    print_json,
    print_table,
    quiet_transformers,
    stdout_for_json,
)

SHOWN_LENGTH = 60  # of a value in a file: a chat template may be one
SHOWN = 10  # tensors with the largest differences; --json has all


def diff(
    first: Annotated[str, typer.Argument(metavar="FIRST", help="Folder or Hub id of a GenieBlue.")],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="Folder or Hub id of another one.")],
    first_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of FIRST on the Hub.")] = None,
    second_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of SECOND on the Hub.")] = None,
    json_output: Json = False,
) -> None:
    """Compare two GenieBlues: settings, processors and tensors.

    Templates, tokenizers and code are compared too.
    """
    with stdout_for_json(json_output), looking_for(first), looking_for(second):
        from conversion.compare import compare_models

        found = compare_models(first, second, revisions=(first_revision, second_revision))
    if json_output:
        print_json({"equal": found.is_equal, **asdict(found)})
        return
    rows = []
    for part, count in found.counts.items():
        of_part = [each for each in found.tensors if each.part == part]
        largest = max((each.difference for each in of_part if each.difference is not None), default=None)
        rows.append((part, str(count), str(len(of_part)), "" if largest is None else f"{largest:.2g}"))
    print_table(("part", "tensors", "differ", "largest relative difference"), rows)
    for name, (one, other) in found.settings.items():
        typer.echo(f"config.json, {name}: {one!r} and {other!r}")
    for file in found.files:
        for name, (one, other) in file.settings.items():
            typer.echo(f"{file.name}, {name}: {_short(one)} and {_short(other)}")
        if not file.settings:
            typer.echo(f"{file.name}: {file.how}")
    # Those that are no mere change of values first.
    ranked = sorted(
        found.tensors, key=lambda each: -(each.difference if each.difference is not None else float("inf"))
    )
    for each in ranked[:SHOWN]:
        typer.echo(f"{each.name}: {each.how}{_by(each)}")
    if len(ranked) > SHOWN:
        note(f"and {len(ranked) - SHOWN} more: --json lists all.")
    if found.is_equal:
        typer.echo("They are equal.")


def _by(tensor: Any) -> str:
    if tensor.difference is None:
        return ""
    if tensor.how == "changed":
        return f" by {tensor.difference:.2g}"
    return f", values changed by {tensor.difference:.2g}" if tensor.difference else ", the same values"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}…"


def stack(
    model: UnquantizedModel,
    base: Annotated[str, typer.Option(help="Folder or Hub id of the new base.")],
    out: Annotated[Path, typer.Option(help="Folder for the GenieBlue on it.")],
    base_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the new base.")] = None,
    revision: Revision = None,
    trust_remote_code: BaseCode = False,
    json_output: Json = False,
) -> None:
    """Put a GenieBlue on a newer revision of its base.

    Only blocks that the GenieBlue has copies of may differ; everything else its multimodal view shares with the base.
    """
    with stdout_for_json(json_output), looking_for(model), ended_by_sigterm():
        quiet_transformers()
        from conversion.stack import stack_on

        options = {} if revision is None else {"revision": revision}
        stacked = stack_on(
            model,
            base,
            out.expanduser(),
            base_revision=base_revision,
            trust_remote_code=trust_remote_code,
            **options,
        )
    if json_output:
        return print_result(stacked)
    at = f" at {stacked.revision}" if stacked.revision else ""
    typer.echo(f"{stacked.output}, on {stacked.base}{at}: {len(stacked.changed)} of the base's tensors are new.")
    note(f"Next: genieblue verify {stacked.output}")
