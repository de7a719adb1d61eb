"""`genieblue init`: make a GenieBlue from a base and a SigLIP."""

from pathlib import Path
from typing import Annotated

import typer

from genieblue.cli.info import print_info
from genieblue.cli.input_files import read_template
from genieblue.cli.options import BaseCode, Dtype, Placement, PlacementOption, Precision, Revision
from genieblue.cli.terminal import check_name, note, quiet_transformers


def init(
    base: Annotated[str, typer.Option(help="Folder or Hub id of the base language model.", show_default=False)],
    vision: Annotated[str, typer.Option(help="Folder or Hub id of a SigLIP.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the new GenieBlue.", show_default=False)],
    placement: PlacementOption = Placement.skip,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = 8,
    alpha: Annotated[int, typer.Option(min=1, help="LoRA alpha.")] = 16,
    max_tiles: Annotated[int, typer.Option(help="Maximum tiles per image: 1, 4, 9, 16, …")] = 16,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file, for a base that has no chat template.", show_default=False)
    ] = None,
    dtype: Dtype = Precision.auto,
    base_revision: Revision = None,
    vision_revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing GenieBlue in --out.")] = False,
    trust_remote_code: BaseCode = False,
) -> None:
    """Make a new GenieBlue from a base and a SigLIP."""
    check_name(base, "The base")
    check_name(vision, "The vision model")
    template = None if chat_template is None else read_template(chat_template)
    quiet_transformers()
    from conversion.create import create_genieblue

    out = out.expanduser()
    folder = create_genieblue(
        base,
        vision,
        out,
        placement=placement.value,
        lora_rank=rank,
        lora_alpha=alpha,
        max_tiles=max_tiles,
        chat_template=template,
        dtype=dtype.value,
        trust_remote_code=trust_remote_code,
        base_revision=base_revision,
        vision_revision=vision_revision,
        overwrite=overwrite,
    )
    print_info(str(folder), base=None, revision=None)
    note(f"\nNext: genieblue train --stage 1 --model {folder} --data captions.jsonl --out {folder}-stage1")


__all__ = ["init"]
