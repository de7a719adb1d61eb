"""`genieblue extract` and `genieblue from-peft`: a GenieBlue of what people have already, without training."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from genieblue.cli.info import print_info
from genieblue.cli.init import read_template
from genieblue.cli.language_exports import Calibration, Error, Samples, check_image_folder, print_result
from genieblue.cli.options import BaseCode, CalibrationImages, Dtype, Json, PlacementOption, Revision, read_bytes
from genieblue.cli.terminal import (
    check_name,
    ended_by_sigterm,
    note,
    print_table,
    progress_bar,
    quiet_transformers,
    stdout_for_json,
)
from hub_cards.short_numbers import short_bytes


def extract(
    mllm: Annotated[str, typer.Option(help="Folder or Hub id of a VLM that transformers loads.")],
    base: Annotated[str, typer.Option(help="Folder or Hub id of the language model that it was trained from.")],
    out: Annotated[Path, typer.Option(help="Folder for the new GenieBlue.")],
    placement: Annotated[
        Literal["skip", "pre", "post", "auto"],
        typer.Option(help="Which blocks are copied: spread, the first, the last, or where it lowers the error most."),
    ] = "skip",
    copies: Annotated[
        int | None, typer.Option(min=0, help="Number of copied blocks; default: a quarter, or what is best (auto).")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of all other blocks' LoRA; default: 64.")] = None,
    error: Error = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            parser=read_bytes, metavar="SIZE", help="Or what this size of all that is added pays for: 900MB."
        ),
    ] = None,
    calibration: Calibration = None,
    image_folder: CalibrationImages = None,
    samples: Samples = 32,
    dtype: Dtype = "auto",
    mllm_revision: Revision = None,
    base_revision: Revision = None,
    trust_remote_code: BaseCode = False,
    json_output: Json = False,
) -> None:
    """Make a GenieBlue of a VLM and its base.

    Nothing is trained: text runs the untouched base, and images run the VLM over the same weights.
    """
    check_name(mllm, "The VLM")
    check_name(base, "The base")
    check_image_folder(calibration, image_folder)
    with stdout_for_json(json_output), ended_by_sigterm():
        quiet_transformers()
        from conversion.extract import extract_genieblue
        from conversion.extraction_plan import Choice

        result = extract_genieblue(
            mllm,
            base,
            out.expanduser(),
            Choice(placement, copies, rank, error, max_bytes),
            calibration=None if calibration is None else _chats(calibration, samples, image_folder),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            mllm_revision=mllm_revision,
            base_revision=base_revision,
            progress=progress_bar,
        )
    if json_output:
        return print_result(result)
    print_info(str(result.output), base=None, revision=None)
    rows = [(name, f"{count or 0:,}") for name, count in result.own_rows.items()]
    rows += [("copied blocks", ", ".join(map(str, result.plan.copied)) or "none")]
    rows += [("copies and LoRA", short_bytes(result.plan.bytes))]
    rows += [("rows, norms and biases of the VLM's own", short_bytes(result.own_bytes))]
    rows += [("difference of the VLM's linear layers from the base's", f"{result.difference:.2g}")]
    print_table(("", ""), rows)
    for row in result.measurements:
        typer.echo(f"{row.name}: {row.value} ({row.how})")
    note(f"Next: genieblue verify {result.output}; genieblue push {result.output} you/model")


def _chats(path: Path, count: int, image_folder: Path | None) -> list[Any]:
    from genieblue.data.calibration_chats import chats_with_images

    return [(chat.messages, chat.images) for chat in chats_with_images(path, count, image_folder)]


def from_peft(
    adapter: Annotated[str, typer.Option(help="Folder or Hub id of a PEFT adapter: LoRA, whole blocks, or both.")],
    vision: Annotated[str, typer.Option(help="Folder or Hub id of a SigLIP.")],
    out: Annotated[Path, typer.Option(help="Folder for the new GenieBlue.")],
    base: Annotated[str | None, typer.Option(help="Folder or Hub id of the base, if not the adapter's.")] = None,
    placement: PlacementOption = "skip",
    max_tiles: Annotated[int, typer.Option(help="Maximum tiles per image: 1, 4, 9, 16, …")] = 16,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file, for a base that has no chat template.")
    ] = None,
    dtype: Dtype = "auto",
    adapter_revision: Revision = None,
    base_revision: Revision = None,
    vision_revision: Revision = None,
    trust_remote_code: BaseCode = False,
    json_output: Json = False,
) -> None:
    """Make a GenieBlue of a PEFT adapter and a SigLIP.

    Blocks that the adapter has whole are the replicated ones; if it has none, LoRA is merged into copies of some.
    """
    check_name(adapter, "The adapter")
    check_name(vision, "The vision model")
    template = None if chat_template is None else read_template(chat_template)
    with stdout_for_json(json_output), ended_by_sigterm():
        quiet_transformers()
        from conversion.from_peft import create_from_peft

        result = create_from_peft(
            adapter,
            vision,
            out.expanduser(),
            base=base,
            placement=placement,
            max_tiles=max_tiles,
            chat_template=template,
            dtype=dtype,
            adapter_revision=adapter_revision,
            base_revision=base_revision,
            vision_revision=vision_revision,
            trust_remote_code=trust_remote_code,
        )
    if json_output:
        return print_result(result)
    print_info(str(result.output), base=None, revision=None)
    typer.echo(f"Logits against the adapter's own: {result.error:.2g} relative L2")
    note(f"Next: genieblue train --stage 1 --model {result.output} --data captions.jsonl --out {result.output}-1")
