"""Options that several commands have, and the values that they take."""

from enum import StrEnum
from typing import Annotated

import typer


class Placement(StrEnum):
    """Which quarter of the base's blocks is copied."""

    skip = "skip"
    pre = "pre"
    post = "post"


class Structure(StrEnum):
    """What a structure of the paper trains in the language model."""

    full = "full"
    lora = "lora"
    cogvlm = "cogvlm"
    genieblue = "genieblue"


class View(StrEnum):
    """One of the two ways in which a request can run."""

    text = "text"
    multimodal = "multimodal"


class Precision(StrEnum):
    """Number format of weights; `auto` is that of the files."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Weights(StrEnum):
    """Precision of a part's weights; activations stay in 16 bits."""

    w4a16 = "w4a16"
    w8a16 = "w8a16"
    w16a16 = "w16a16"


class EightBits(StrEnum):
    """Precision of a part that is not made for 4 bits."""

    w8a16 = "w8a16"
    w16a16 = "w16a16"


class Rounding(StrEnum):
    """How weights are rounded."""

    rtn = "rtn"
    hqq = "hqq"
    gptq = "gptq"


class Activations(StrEnum):
    """Number format of activations and of what is not quantized."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class QnnRounding(StrEnum):
    """How the decoder's matrices become codes of an NPU."""

    rtn = "rtn"
    seqmse = "seqmse"


class LoraMode(StrEnum):
    """How LoRA enters the graphs of an NPU."""

    constants = "constants"
    inputs = "inputs"


class NpuBackend(StrEnum):
    """What runs the graphs of a bundle on this computer."""

    cpu = "cpu"
    emulator = "emulator"


def _refuse_empty(name: str | None) -> str | None:
    """What an unset variable of the shell gives is not taken for an option that was left out."""
    if name is not None and not name.strip():
        raise typer.BadParameter("The name is empty: give a folder or a Hub id.")
    return name


Model = Annotated[str, typer.Argument(help="Folder or Hub id of a GenieBlue.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Base = Annotated[
    str | None,
    typer.Option(
        help="Folder or Hub id of the base, if it is not where the model says.",
        show_default=False,
        callback=_refuse_empty,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", show_default=False)]
Dtype = Annotated[Precision, typer.Option(help="Precision to load the weights in.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; a GPU if there is one.", show_default=False)]
BaseCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow Python code of the base's repository to run.")
]
PlacementOption = Annotated[Placement, typer.Option(help="Quarter of the blocks that is copied.")]
