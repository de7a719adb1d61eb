"""`genieblue init`: make a GenieBlue from a base and a SigLIP."""

from pathlib import Path
from typing import Annotated

import typer

from genieblue.cli.info import print_info
from genieblue.cli.options import BaseCode, Dtype, PlacementOption, Revision
from genieblue.cli.terminal import check_name, note, quiet_transformers


def init(
    base: Annotated[str, typer.Option(help="Folder or Hub id of the base language model.")],
    vision: Annotated[str, typer.Option(help="Folder or Hub id of a SigLIP.")],
    out: Annotated[Path, typer.Option(help="Folder for the new GenieBlue.")],
    placement: PlacementOption = "skip",
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = 8,
    alpha: Annotated[int, typer.Option(min=1, help="LoRA alpha.")] = 16,
    max_tiles: Annotated[int, typer.Option(help="Maximum tiles per image: 1, 4, 9, 16, …")] = 16,
    image_prefix: Annotated[str, typer.Option(help="Text before each tile, such as <|image_start|>.")] = "",
    image_suffix: Annotated[str, typer.Option(help="Text behind each tile, such as <|image_end|>.")] = "",
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file, for a base that has no chat template.")
    ] = None,
    dtype: Dtype = "auto",
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

    folder = create_genieblue(
        base,
        vision,
        out,
        placement=placement,
        lora_rank=rank,
        lora_alpha=alpha,
        max_tiles=max_tiles,
        image_prefix=image_prefix,
        image_suffix=image_suffix,
        chat_template=template,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        base_revision=base_revision,
        vision_revision=vision_revision,
        overwrite=overwrite,
    )
    print_info(str(folder), base=None, revision=None)
    note(f"\nNext: genieblue train --stage 1 --model {folder} --data captions.jsonl --out {folder}-1")


def read_template(path: Path) -> str:
    """Text of the file given as --chat-template; `OSError` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise OSError(f"--chat-template {path} cannot be read ({reason}): expected a Jinja text file.") from error
