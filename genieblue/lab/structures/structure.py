"""What all structures of the lab share: the vision side of a GenieBlue, and how they are made, saved and loaded."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, SiglipVisionConfig, SiglipVisionModel

from genieblue.training.structure import VISION_TOWER, GenieBlueStructure, StageRecipe
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor
from modeling_genieblue.base_identity_genieblue import weight_file_hashes
from modeling_genieblue.language_adapter_genieblue import load_adapter, save_adapter_config
from modeling_genieblue.model_files_genieblue import (
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS_NAME,
    RECIPE_NAME,
    WEIGHTS_NAME,
    is_path,
    read_settings,
    write_json,
)
from modeling_genieblue.saving_genieblue import write_trained_weights
from modeling_genieblue.staging_genieblue import NewFolder

RECORD = "structure.json"
PROJECTOR = "multi_modal_projector"
TREE = "multimodal_language_model."  # of the names of what is trained in the language model


def stages_of(groups: tuple[str, ...]) -> dict[int, StageRecipe]:
    """The paper's two stages, of which the second trains `groups`."""
    first, second = GenieBlueStructure.stages[1], GenieBlueStructure.stages[2]
    return {1: first, 2: replace(second, groups=groups)}


class LabStructure(GenieBlueStructure):
    """A structure that the lab can compare: its parts, what of them is trained, and how it is saved.

    All have the vision tower, projector, requests and loss of a GenieBlue. `model_class` differs from it only in the
    tree that multimodal requests run, `multimodal_language_model`; `language_model` is the base, which stays as it is.

    Attributes:
        kind: the paper's name; with a placement behind it if `is_placed`.
        keeps_base: whether text requests can run the base; otherwise the trained weights are all there is.
    """

    kind: ClassVar[str]
    model_class: ClassVar[type[GenieBlueForConditionalGeneration]]
    is_placed: ClassVar[bool] = False
    keeps_base: ClassVar[bool] = True

    @classmethod
    def make(
        cls, base: PreTrainedModel, vision_tower: SiglipVisionModel, placement: str | None = None, **options: Any
    ) -> Self:
        """The structure before training, when it answers as `base` does; `options` are those of `from_base`."""
        return cls(cls.model_class.from_base(base, vision_tower, placement=placement or "skip", **options))

    @property
    def name(self) -> str:
        """The name that `structure_kind` reads."""
        return f"{self.kind}-{self.model.config.placement}" if self.is_placed else self.kind

    @staticmethod
    def group_of_language(name: str) -> str | None:
        """The group of a parameter of the tree that is trained, by its name in it."""
        raise NotImplementedError

    def group_of(self, name: str) -> str | None:
        if name.startswith(TREE):
            return self.group_of_language(name.removeprefix(TREE))
        return super().group_of(name)

    def save(self, output: Path, processor: Any, stage: str, facts: dict[str, Any]) -> None:
        """Writes a folder for `load_structure`: `RECORD`, the processor, the vision side and the language side."""
        config, base = self.model.config, self.model.config.base_model_name_or_path
        record = {
            "structure": self.name,
            "base": os.path.relpath(base, output) if base and os.path.isabs(base) else base,
            "base_revision": config.base_model_revision,
            "base_weights": weight_file_hashes(base, config.base_model_revision) if base else {},
            "lora_rank": config.lora_rank,
            "lora_alpha": config.lora_alpha,
            "vision_config": config.vision_config.to_dict(),
            RECIPE_NAME: {stage: facts},
        }
        with NewFolder(output, "saving") as new:
            self.save_language(new.staging, processor)
            processor.save_pretrained(new.staging)
            write_json(new.staging / RECORD, record)
            new.put_in_place()

    def save_language(self, folder: Path, processor: Any) -> None:
        """Writes all weights: vision side, and LoRA and copies as PEFT's adapters have them."""
        dtype = next(self.model.multi_modal_projector.parameters()).dtype
        write_trained_weights(self.model, folder, dtype, self.model.state_dict(), is_checkpoint=False)
        save_adapter_config(self.model._lora_config, folder / ADAPTER_FOLDER)

    @classmethod
    def load(cls, folder: Path, base: str | Path | None = None, dtype: torch.dtype | None = None) -> Self:
        """What `save` wrote, on the base that it names, or on another place of it."""
        record = read_settings(folder / RECORD)
        found = cls.base_of(folder, record, base)
        weights = load_file(folder / WEIGHTS_NAME)
        dtype = dtype or weights[f"{PROJECTOR}.linear_1.weight"].dtype
        options = {} if is_path(found) else {"revision": record["base_revision"]}
        if cls.keeps_base and weight_file_hashes(found, **options) != record["base_weights"]:
            raise ValueError(
                f"{found} is not the base that {folder} was trained on, or its files have changed: their sha256 are "
                f"not those in {RECORD}. Give the right one with `base`."
            )
        base_model = AutoModelForCausalLM.from_pretrained(found, dtype=dtype, **options)
        tower = SiglipVisionModel(SiglipVisionConfig(**record["vision_config"])).to(dtype)
        placement = record["structure"].partition("-")[2] or None
        settings = {name: record[name] for name in ("lora_rank", "lora_alpha")}
        structure = cls.make(base_model, tower, placement, base_model_name_or_path=found, **settings)
        for part in (VISION_TOWER, PROJECTOR):
            prefix = f"{part}."
            of_part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            structure.model.get_submodule(part).load_state_dict(of_part)
        structure.load_language(folder)
        structure.model.eval()
        return structure

    @classmethod
    def base_of(cls, folder: Path, record: Mapping[str, Any], base: str | Path | None) -> str:
        """Where the base of a saved structure is: as given, or as recorded, relative to its folder or as a Hub id."""
        if base is not None:
            return os.fspath(base)
        place = str(record["base"])
        return os.path.normpath(folder / place) if place.startswith(".") else place

    def load_language(self, folder: Path) -> None:
        """Fills the tree that is trained from a folder of `save_language`."""
        file = folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS_NAME
        load_adapter(self.model.multimodal_language_model, file, self.model.language_model.dtype)

    def processor(self, folder: Path) -> Any:
        """The processor that was saved with it."""
        return GenieBlueProcessor.from_pretrained(folder)


def adapter_group(name: str, copies: str | None) -> str | None:
    """The group of a parameter of an adapter: `lora`, or `copies` for a copy of what the base has."""
    if ".modules_to_save." in name:
        return copies
    return "lora" if ".lora_A." in name or ".lora_B." in name else None


def trained_count(structure: LabStructure) -> dict[str, int]:
    """Parameters by group that a stage-2 run of the structure trains."""
    counts = dict.fromkeys(structure.groups, 0)
    for name, parameter in structure.model.named_parameters():
        if (group := structure.group_of(name)) is not None:
            counts[group] += parameter.numel()
    return counts
