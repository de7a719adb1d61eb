"""`genieblue export lora`, `export gguf` and `export merged`: a GenieBlue for other engines."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from genieblue.cli.options import (
    Base,
    BaseCode,
    CalibrationImages,
    Dtype,
    Json,
    Revision,
    UnquantizedModel,
    load_processor,
    read_bytes,
)
from genieblue.cli.options import loading_options as hub_options
from genieblue.cli.qnn import export_app
from genieblue.cli.terminal import (
    ended_by_sigterm,
    looking_for,
    note,
    print_json,
    print_table,
    progress_bar,
    quiet_transformers,
    stdout_for_json,
)
from hub_cards.short_numbers import short_bytes

Calibration = Annotated[
    Path | None, typer.Option(metavar="FILE", help="JSONL of chats, some with images, on which errors are measured.")
]
Samples = Annotated[int, typer.Option(min=1, help="Number of calibration chats.")]
Rank = Annotated[int | None, typer.Option(min=1, help="Rank of the copied blocks' matrices; default: full.")]
Error = Annotated[
    float | None, typer.Option(help="Or the least rank with this relative error of each matrix, such as 0.02.")
]
MaxBytes = Annotated[
    int | None, typer.Option(parser=read_bytes, metavar="SIZE", help="Or what this file size pays for: 12MB.")
]


@export_app.command()
def lora(
    model: UnquantizedModel,
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    rank: Rank = None,
    error: Error = None,
    max_bytes: MaxBytes = None,
    calibration: Calibration = None,
    image_folder: CalibrationImages = None,
    samples: Samples = 32,
    dtype: Dtype = "auto",
    base: Base = None,
    revision: Revision = None,
    trust_remote_code: BaseCode = False,
    json_output: Json = False,
) -> None:
    """Write the multimodal language side as one LoRA.

    Copied blocks become LoRA of a higher rank on the untouched base, so that every engine that knows PEFT's LoRA can
    run the multimodal view. At full rank the logits are the same.
    """
    options = hub_options(revision, trust_remote_code) | {"base_model": base, "dtype": dtype}
    with stdout_for_json(json_output), looking_for(model), ended_by_sigterm():
        quiet_transformers()
        from conversion.lora_form import export_lora

        form = export_lora(
            model,
            out.expanduser(),
            rank=rank,
            error=error,
            max_bytes=max_bytes,
            calibration=_requests(model, calibration, image_folder, samples, options),
            progress=progress_bar,
            **options,
        )
    if json_output:
        return print_result(form)
    _print_matrices(form)
    _print_measurements(form)
    note(f"Next: PeftModel.from_pretrained(base, {str(form.output)!r}); genieblue push {form.output} you/adapter")


@export_app.command()
def gguf(
    model: UnquantizedModel,
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    language_only: Annotated[
        bool, typer.Option("--language-only", help="Leave the vision side out, where llama.cpp cannot run it.")
    ] = False,
    base_gguf: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The base's GGUF, to check that the adapter fits it.")
    ] = None,
    rank: Rank = None,
    error: Error = None,
    max_bytes: MaxBytes = None,
    calibration: Calibration = None,
    image_folder: CalibrationImages = None,
    samples: Samples = 32,
    dtype: Dtype = "auto",
    base: Base = None,
    revision: Revision = None,
    trust_remote_code: BaseCode = False,
    json_output: Json = False,
) -> None:
    """Write an adapter and a file for images for llama.cpp.

    The adapter is the LoRA form (see `export lora`), for any GGUF of the untouched base. An unmodified `llama-server`
    answers text with the base and images with the adapter, as each request says.
    """
    options = hub_options(revision, trust_remote_code) | {"base_model": base, "dtype": dtype}
    with stdout_for_json(json_output), looking_for(model), ended_by_sigterm():
        quiet_transformers()
        from conversion.llamacpp.export import export_llamacpp

        result = export_llamacpp(
            model,
            out.expanduser(),
            language_only=language_only,
            base_gguf=base_gguf,
            rank=rank,
            error=error,
            max_bytes=max_bytes,
            calibration=_requests(model, calibration, image_folder, samples, options),
            progress=progress_bar,
            **options,
        )
    if json_output:
        return print_result(result)
    _print_matrices(result)
    _print_measurements(result)
    images, command = result.image_tokens, f"llama-server -m base.gguf --lora-scaled {result.output}/lora.gguf:0"
    command += " --cache-ram 0 --no-cache-prompt"  # caches do not know which adapter has filled them
    if images is not None:
        command += f" --mmproj {result.output}/mmproj.gguf --image-min-tokens {images} --image-max-tokens {images}"
    note(f"Next: {command}")


@export_app.command()
def merged(
    model: UnquantizedModel,
    out: Annotated[Path, typer.Option(help="Folder for the language model.")],
    calibration: Calibration = None,
    image_folder: CalibrationImages = None,
    samples: Samples = 32,
    dtype: Dtype = "auto",
    base: Base = None,
    revision: Revision = None,
    trust_remote_code: BaseCode = False,
    json_output: Json = False,
) -> None:
    """Write the multimodal language side as one dense language model.

    It has the architecture and tokenizer of the base, or of the VLM; copied blocks are in place and LoRA is merged.
    """
    options = hub_options(revision, trust_remote_code) | {"base_model": base, "dtype": dtype}
    with stdout_for_json(json_output), looking_for(model), ended_by_sigterm():
        quiet_transformers()
        from conversion.merge import export_merged

        requests = _requests(model, calibration, image_folder, samples, options)
        result = export_merged(model, out.expanduser(), calibration=requests, **options)
    if json_output:
        return print_result(result)
    _print_measurements(result)
    note(
        f"Next: AutoModelForCausalLM.from_pretrained({str(result.output)!r}); genieblue push {result.output} you/model"
    )


def print_result(result: Any) -> None:
    """Prints the fields of a result that is a dataclass as the one JSON document of a command."""
    print_json(asdict(result) | {"output": str(result.output)})


def check_image_folder(calibration: Path | None, image_folder: Path | None) -> None:
    """`BadParameter` for an --image-folder that nothing would be read from."""
    if calibration is None and image_folder is not None:
        raise typer.BadParameter("--image-folder is for images of --calibration: give both.")


def _requests(
    model: str, calibration: Path | None, image_folder: Path | None, samples: int, options: dict[str, Any]
) -> Iterator[dict[str, Any]] | None:
    check_image_folder(calibration, image_folder)
    if calibration is None:
        return None
    from genieblue.data.calibration_chats import read_requests

    given = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    return read_requests(calibration, load_processor(model, given), count=samples, image_folder=image_folder)


def _print_matrices(form: Any) -> None:
    rows = [
        (
            f"{each.block}.{each.name}",
            "×".join(map(str, each.shape)),
            f"{each.rank} of {each.full_rank}",
            short_bytes(each.bytes),
            f"{each.error:.2g}",
            f"{each.lost:.1%}",
        )
        for each in form.matrices
    ]
    if rows:  # none without copied blocks
        print_table(("matrix", "shape", "rank", "size", "error", "lost of its change"), rows)
    for name, difference in form.left_behind.items():
        note(f"{name}: no LoRA carries it; the base's is used, from which it differs by {difference:.1%}")


def _print_measurements(result: Any) -> None:
    for row in result.measurements:
        typer.echo(f"{row.name}: {row.value} ({row.how})")
    typer.echo(f"{result.output}: {short_bytes(result.bytes)}")
