"""Full fine-tuning: a copy of the base is trained as a whole, and is an ordinary model of its own afterwards."""

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from genieblue.lab.structures.structure import LabStructure, save_vision_side, stages_of
from genieblue.training.structure import VISION_TOWER
from modeling_genieblue import GenieBlueForConditionalGeneration

LANGUAGE_MODEL = "language_model"  # folder of the trained language model


class FullModel(GenieBlueForConditionalGeneration):
    """A copy of the base, with weights of its own, is the tree that multimodal requests run.

    The base itself is not trained; that it is beside the copy lets training prove that its bytes did not change.
    """

    @staticmethod
    def _build_view(base: PreTrainedModel, lora_config: Any) -> PreTrainedModel:
        lora_config.layers_to_transform = lora_config.modules_to_save = None
        base.requires_grad_(False)
        return copy.deepcopy(base)


class FullStructure(LabStructure):
    """All of the language model is trained; text requests have no other weights to run."""

    kind = "full"
    model_class = FullModel
    keeps_base = False
    groups = (VISION_TOWER, "multi_modal_projector", LANGUAGE_MODEL)
    stages = stages_of(groups)

    @staticmethod
    def group_of_language(name: str) -> str | None:
        return LANGUAGE_MODEL

    def save_language(self, folder: Path, processor: Any) -> None:
        """Writes the trained language model as a plain transformers folder, and the vision side beside it."""
        self.model.multimodal_language_model.save_pretrained(folder / LANGUAGE_MODEL)
        processor.tokenizer.save_pretrained(folder / LANGUAGE_MODEL)
        save_vision_side(self.model, folder)

    @classmethod
    def base_of(cls, folder: Path, record: Any, base: Any) -> str:
        return str(folder / LANGUAGE_MODEL)

    def load_language(self, folder: Path) -> None:
        """Does nothing: what is trained was loaded as the base, and copied."""
