"""Full fine-tuning: a copy of the base is trained as a whole, and is an ordinary model of its own afterwards."""

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from genieblue.lab.structures.structure import LabStructure, stages_of
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
        """Writes the trained language model as a plain one, and around it a GenieBlue whose adapter changes nothing.

        So the folder needs no other base, and everything that loads a GenieBlue loads it.
        """
        trained, tower = self.model.multimodal_language_model, self.model.vision_tower
        trained.save_pretrained(folder / LANGUAGE_MODEL)
        processor.tokenizer.save_pretrained(folder / LANGUAGE_MODEL)
        model = GenieBlueForConditionalGeneration.from_base(
            trained, tower, replicated_layers=[0], lora_rank=1, base_model_name_or_path=str(folder / LANGUAGE_MODEL)
        )
        model.multi_modal_projector.load_state_dict(self.model.multi_modal_projector.state_dict())
        model.save_pretrained(folder, processor=processor)

    @classmethod
    def base_of(cls, folder: Path, record: Any, base: Any) -> str:
        return str(folder / LANGUAGE_MODEL)

    def load_language(self, folder: Path) -> None:
        """Does nothing: what is trained was loaded as the base, and copied."""
