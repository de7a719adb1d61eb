"""Options that several commands have, and the values that they take."""

from typing import Annotated, Literal

import typer

Placement = Literal["skip", "pre", "post"]  # which quarter of the base's blocks is copied
Structure = Literal["full", "lora", "cogvlm", "genieblue"]  # of the paper: what is trained in the language model
View = Literal["text", "multimodal"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]  # of weights in memory; `auto` is that of the files
Weights = Literal["w4a16", "w8a16", "w16a16"]  # of a part; activations stay in 16 bits
EightBits = Literal["w8a16", "w16a16"]  # of a part that is not made for 4 bits
Rounding = Literal["rtn", "hqq", "gptq"]
Activations = Literal["bfloat16", "float16", "float32"]  # and what is not quantized
QnnRounding = Literal["rtn", "seqmse"]  # of the decoder's matrices
LoraMode = Literal["constants", "inputs"]  # of an NPU's graphs
NpuBackend = Literal["cpu", "emulator"]  # what runs a bundle's graphs on this computer


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
