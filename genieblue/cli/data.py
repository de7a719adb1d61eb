"""`genieblue data`: look at training data before a run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from genieblue.cli.options import BaseCode, FollowLinks, ImageFolder, ImageRoots, Json, Revision, check_picture
from genieblue.cli.terminal import looking_for, note, print_json, print_table, quiet_transformers, stdout_for_json
from hub_cards.short_numbers import counted

data_app = typer.Typer(help="Look at training data.", no_args_is_help=True, rich_markup_mode=None)


@data_app.callback()
def _data() -> None:
    """Look at training data."""


@data_app.command()
def check(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Chats, as for `genieblue train --data`: [NAME=]FILE."),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a GenieBlue, to count tokens and tiles; default: characters."),
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="With --model: tokens of a sample in training.")] = 4096,
    image_folder: ImageFolder = None,
    image_root: ImageRoots = None,
    follow_links: FollowLinks = False,
    out: Annotated[Path | None, typer.Option(help="PNG file for histograms of lengths and tiles.")] = None,
    revision: Revision = None,
    trust_remote_code: BaseCode = False,
    json_output: Json = False,
) -> None:
    """Count samples, lengths and tiles, and find bad samples.

    Finds duplicates and images that cannot be opened, too. Reads everything once. Ends with exit code 1 if a sample
    is bad.
    """
    check_picture(out, "--out")
    with stdout_for_json(json_output):
        quiet_transformers()
        from genieblue.data.chats import ChatDataset
        from genieblue.data.image_folders import read_image_roots
        from genieblue.data.mixture import read_parts
        from genieblue.data.report import check_data, draw_histograms

        options = {
            "image_folder": image_folder, "image_roots": read_image_roots(image_root or ()),
            "follow_links": follow_links, "check": False,
        }  # fmt: skip
        parts = read_parts(files)
        processor, stop_ids = (None, ()) if model is None else _processor(model, revision, trust_remote_code)
        groups = {part.name: ChatDataset(part.location, **options) for part in parts}
        report = check_data(groups, processor, stop_ids=stop_ids)
        longer = sum(length > max_length for length in report.lengths) if model is not None else None
    if json_output:
        print_json({**report.as_dict(), **({} if longer is None else {f"longer_than_{max_length}": longer})})
    else:
        _print_report(report, longer, max_length)
    if out is not None:
        draw_histograms(report, out)
        note(f"Histograms: {out}")
    if report.num_bad:
        raise typer.Exit(1)


def _processor(model: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, tuple[int, ...]]:
    """A model's processor, whose chat template works, and the ids that stop its generation."""
    from transformers import GenerationConfig

    from conversion.chat_ids import NO_STOP_TOKEN, stop_token_ids
    from conversion.chat_template import check_processor_template
    from modeling_genieblue import GenieBlueProcessor

    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    with looking_for(model):
        processor = GenieBlueProcessor.from_pretrained(model, trust_remote_code=trust_remote_code, **options)
        check_processor_template(processor)
        stop_ids = stop_token_ids(GenerationConfig.from_pretrained(model, **options))
    if not stop_ids:
        raise ValueError(NO_STOP_TOKEN)
    return processor, stop_ids


def _print_report(report: Any, longer: int | None, max_length: int) -> None:
    from genieblue.data.report import summary

    rows = [
        (name, str(group.with_images + group.text_only), str(group.with_images), str(group.text_only),
         str(group.images), str(group.bad))
        for name, group in report.groups.items()
    ]  # fmt: skip
    print_table(("group", "good samples", "with images", "text only", "images", "bad"), rows)
    measured = {f"{report.unit} of a sample": summary(report.lengths), "tiles of an image": summary(report.tiles)}
    typer.echo()
    columns = ("min", "p50", "p90", "p99", "max", "mean")
    print_table(
        ("", *columns),
        [(name, *(f"{found[column]:,.0f}" for column in columns)) for name, found in measured.items() if found],
    )
    typer.echo()
    if longer is not None:
        typer.echo(f"Longer than {max_length} tokens, so that answers are cut off: {counted(longer, 'sample')}")
    typer.echo(f"Duplicates: {counted(report.num_duplicates, 'sample')}")
    for where, first in report.duplicates:
        typer.echo(f"  {where} is equal to {first}")
    unreadable = f", {report.unreadable} of them with an image that cannot be opened" if report.unreadable else ""
    typer.echo(f"Bad: {counted(report.num_bad, 'sample')}{unreadable}")
    for reason, number in report.reasons.most_common():
        typer.echo(f"  {number} × {reason}")
    for where, reason in report.bad:
        typer.echo(f"  {where}: {reason}")
