"""Options shared by several commands, and their values."""

import os
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from genieblue.cli.errors import set_takes_base

Placement = Literal["skip", "pre", "post"]  # which quarter of the base's blocks is copied
Structure = Literal["full", "lora", "cogvlm", "genieblue"]  # of the paper: what is trained in the language model
View = Literal["text", "multimodal"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]  # of weights in memory; `auto` is that of the files
Weights = Literal["w4a16", "w8a16", "w16a16"]  # of a part; activations stay in 16 bits
EightBits = Literal["w8a16", "w16a16"]  # of a part that is not made for 4 bits
Rounding = Literal["rtn", "mse", "gptq"]
GroupSize = Literal["32", "64", "128"]
Activations = Literal["bfloat16", "float16", "float32"]  # and what is not quantized
QnnRounding = Literal["rtn", "gptq"]  # of the decoder's matrices
QnnPrecision = Literal["w8a16", "w4a16", "mixed"]  # of the decoder's matrices
LoraMode = Literal["constants", "inputs"]  # of an NPU's graphs
Metric = Literal["exact", "contains", "anls", "relaxed", "choice"]  # of one answer
NpuBackend = Literal["cpu", "emulator"]  # what runs a bundle's graphs on this computer


def check_not_empty(name: str | None) -> str | None:
    """`BadParameter` for an empty name: it comes from an unset shell variable and must not mean "not given"."""
    if name is not None and not name.strip():
        raise typer.BadParameter("The name is empty: give a folder or a Hub id.")
    return name


def _other_base(name: str | None) -> str | None:
    """As `check_not_empty`; errors about the base name the option from here on."""
    set_takes_base(True)
    return check_not_empty(name)


def read_bytes(size: str) -> int:
    """A number of bytes, such as `1.9GB` (powers of 1000) or `1.8GiB`; `BadParameter` for anything else."""
    found = re.fullmatch(r"([0-9]+|[0-9]*\.[0-9]+) ?(?:([kMG])(i?))?B?", size.strip(), re.IGNORECASE)
    if found is None:
        raise typer.BadParameter(f"{size!r} is not a size: give one such as 1.9GB or 800MB.")
    number, prefix, binary = found.groups()
    return int(Fraction(number) * (1024 if binary else 1000) ** " KMG".index((prefix or " ").upper()))


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a GenieBlue.")]
UnquantizedModel = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a 16-bit GenieBlue.")]
CalibrationImages = Annotated[
    Path | None, typer.Option("--image-folder", help="Folder that image paths in the JSONL are relative to.")
]
ImageRoots = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=FOLDER", help="Folder of image paths that start with NAME/; may be repeated."),
]
FollowLinks = Annotated[
    bool, typer.Option("--follow-links", help="Allow symbolic links that lead out of the image folders.")
]
Json = Annotated[bool, typer.Option("--json", help="Print a single JSON document.")]
Base = Annotated[
    str | None, typer.Option(help="Folder or Hub id of the base, if not the recorded one.", callback=_other_base)
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Dtype = Annotated[Precision, typer.Option(help="Dtype to load the weights in.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: a GPU if available.")]
BaseCode = Annotated[bool, typer.Option("--trust-remote-code", help="Allow code from the base's repository to run.")]
PlacementOption = Annotated[Placement, typer.Option(help="Which quarter of the blocks to replicate.")]
ImageFolder = Annotated[
    Path | None, typer.Option(help="Folder that image paths are relative to; default: the data file's folder.")
]


def check_picture(path: Path | None, option: str) -> None:
    """`BadParameter` unless a picture can be drawn into the file `path`: before what takes long, and not after it."""
    if path is None:
        return
    folder = path.absolute().parent
    if path.suffix.lower() != ".png" or path.is_dir() or not folder.is_dir():
        raise typer.BadParameter(f"{path} is not a PNG file in an existing folder.", param_hint=option)
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written: give another file.", param_hint=option)
    import matplotlib  # noqa: F401 - a missing package is noticed too


def was_given(ctx: typer.Context, name: str) -> bool:
    """Whether a parameter is on the command line, and not at its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def check_unused_options(ctx: typer.Context, names: Sequence[str], subject: str) -> None:
    """`BadParameter` if an option in `names` was given although it does not apply to `subject`."""
    for option in ctx.command.params:
        if option.name in names and was_given(ctx, option.name):
            raise typer.BadParameter(f"It does not apply to {subject}: leave it out.", param_hint=option.opts[0])


def loading_options(revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Arguments of `from_pretrained`; without a revision it chooses one itself."""
    return {"trust_remote_code": trust_remote_code} | ({} if revision is None else {"revision": revision})


def load_processor(model: str, options: dict[str, Any]) -> Any:
    """The processor of a saved GenieBlue, by the kind of its multimodal side; `options` as of `loading_options`."""
    from modeling_genieblue import GenieBlueConfig, GenieBlueProcessor, VlmGenieBlueConfig, VlmGenieBlueProcessor

    has_vlm = isinstance(GenieBlueConfig.from_pretrained(model, **options), VlmGenieBlueConfig)
    return (VlmGenieBlueProcessor if has_vlm else GenieBlueProcessor).from_pretrained(model, **options)
