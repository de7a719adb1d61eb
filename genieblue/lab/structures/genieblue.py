"""GenieBlue, the paper's structure: copies of a quarter of the blocks, LoRA on the others, a base that stays."""

from pathlib import Path
from typing import Any, Self

import torch

from genieblue.lab.structures.structure import LabStructure, adapter_group
from genieblue.training.structure import GenieBlueStructure
from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.model_files_genieblue import CONFIG_NAME, read_settings


class PlacedGenieBlueStructure(LabStructure):
    """A GenieBlue as it is shipped, saved and loaded as one."""

    kind = "genieblue"
    model_class = GenieBlueForConditionalGeneration
    is_placed = True
    groups = GenieBlueStructure.groups
    stages = GenieBlueStructure.stages

    @staticmethod
    def group_of_language(name: str) -> str | None:
        return adapter_group(name, "replicated_blocks")

    def save(self, output: Path, processor: Any, stage: str, facts: dict[str, Any]) -> None:
        GenieBlueStructure.save(self, output, processor, stage, facts)

    @classmethod
    def load(cls, folder: Path, base: str | Path | None = None, dtype: torch.dtype | None = None) -> Self:
        options = {"dtype": dtype or read_settings(folder / CONFIG_NAME)["dtype"]}  # for the base, too
        return cls(cls.model_class.from_pretrained(folder, base_model=base, **options))
