"""The training structures that the paper compares, by name."""

from pathlib import Path

import torch

from genieblue.lab.structures.cogvlm import CogVLMStructure
from genieblue.lab.structures.full import FullStructure
from genieblue.lab.structures.genieblue import PlacedGenieBlueStructure
from genieblue.lab.structures.lora import LoraStructure
from genieblue.lab.structures.structure import RECORD, LabStructure
from modeling_genieblue.configuration_genieblue import PLACEMENTS
from modeling_genieblue.model_files_genieblue import CONFIG_NAME, read_settings

KINDS: dict[str, type[LabStructure]] = {
    kind.kind: kind for kind in (FullStructure, LoraStructure, CogVLMStructure, PlacedGenieBlueStructure)
}
# In the order of the paper's tables.
STRUCTURES = tuple(
    f"{kind}-{placement}" if KINDS[kind].is_placed else kind
    for kind in KINDS
    for placement in (reversed(PLACEMENTS) if KINDS[kind].is_placed else [""])
)


def structure_kind(name: str) -> tuple[type[LabStructure], str | None]:
    """The class of a structure (`full`, `cogvlm-skip` …) and its placement; `ValueError` for an unknown name."""
    if name not in STRUCTURES:
        raise ValueError(f"Unknown structure {name!r}: choose from {', '.join(STRUCTURES)}.")
    kind, _, placement = name.partition("-")
    return KINDS[kind], placement or None


def load_structure(
    folder: str | Path, base: str | Path | None = None, dtype: torch.dtype | None = None
) -> LabStructure:
    """A structure as `save` left it in a folder, in evaluation mode, by default in the dtype that it was saved in.

    `base` is needed if it is no longer where it was. Raises `OSError` or `ValueError` for a folder that holds none.
    """
    folder = Path(folder)
    record = folder / RECORD
    if record.is_file():
        return structure_kind(read_settings(record)["structure"])[0].load(folder, base, dtype)
    if (folder / CONFIG_NAME).is_file():
        return PlacedGenieBlueStructure.load(folder, base, dtype)
    raise OSError(f"{folder} holds no structure of a lab: expected {RECORD}, or a GenieBlue's {CONFIG_NAME}.")
