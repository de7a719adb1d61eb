"""Options shared by several commands, and their values."""

from enum import StrEnum
from typing import Annotated

import typer


class Placement(StrEnum):
    """Which quarter of the base's blocks is replicated."""

    skip = "skip"
    pre = "pre"
    post = "post"


class Structure(StrEnum):
    """Which parameters of the language model are trained, by the paper's structures."""

    full = "full"
    lora = "lora"
    cogvlm = "cogvlm"
    genieblue = "genieblue"


class View(StrEnum):
    """The view that a request runs."""

    text = "text"
    multimodal = "multimodal"


class Precision(StrEnum):
    """Dtype of the weights; `auto` is the dtype of the files."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Weights(StrEnum):
    """Precision of a part's weights; activations stay at 16 bits."""

    w4a16 = "w4a16"
    w8a16 = "w8a16"
    w16a16 = "w16a16"


class EightBits(StrEnum):
    """Precision of a part that does not support 4 bits."""

    w8a16 = "w8a16"
    w16a16 = "w16a16"


class Rounding(StrEnum):
    """How weights are rounded."""

    rtn = "rtn"
    hqq = "hqq"
    gptq = "gptq"


class Activations(StrEnum):
    """Dtype of activations and of unquantized weights."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class QnnRounding(StrEnum):
    """How the decoder's weights are rounded for an NPU."""

    rtn = "rtn"
    seqmse = "seqmse"


class LoraMode(StrEnum):
    """How LoRA enters an NPU's graphs."""

    constants = "constants"
    inputs = "inputs"


class NpuBackend(StrEnum):
    """Where to run the graphs of a bundle."""

    cpu = "cpu"
    emulator = "emulator"


def _check_not_empty(name: str | None) -> str | None:
    """`BadParameter` for an empty name: it comes from an unset shell variable and must not mean "not given"."""
    if name is not None and not name.strip():
        raise typer.BadParameter("The name is empty: give a folder or a Hub id.")
    return name


Model = Annotated[str, typer.Argument(help="Folder or Hub id of a GenieBlue.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print a single JSON document.")]
Base = Annotated[
    str | None,
    typer.Option(
        help="Folder or Hub id of the base, if not the recorded one.",
        show_default=False,
        callback=_check_not_empty,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", show_default=False)]
Dtype = Annotated[Precision, typer.Option(help="Dtype to load the weights in.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: a GPU if available.", show_default=False)
]
BaseCode = Annotated[bool, typer.Option("--trust-remote-code", help="Allow code from the base's repository to run.")]
PlacementOption = Annotated[Placement, typer.Option(help="Which quarter of the blocks to replicate.")]
