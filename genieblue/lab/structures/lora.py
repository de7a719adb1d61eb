"""LoRA alone: on the linear layers of all blocks, and nothing copied."""

from typing import Any

from transformers import PreTrainedModel

from genieblue.lab.structures.structure import LabStructure, adapter_group, stages_of
from genieblue.training.structure import VISION_TOWER
from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.language_adapter_genieblue import find_blocks
from modeling_genieblue.language_views_genieblue import build_multimodal_view


class LoraModel(GenieBlueForConditionalGeneration):
    """A base with LoRA on all of its blocks in the tree that multimodal requests run."""

    @staticmethod
    def _build_view(base: PreTrainedModel, lora_config: Any) -> PreTrainedModel:
        _, blocks = find_blocks(base)
        lora_config.layers_to_transform, lora_config.modules_to_save = list(range(len(blocks))), None
        return build_multimodal_view(base, lora_config)


class LoraStructure(LabStructure):
    """The base is frozen, LoRA on all blocks is trained."""

    kind = "lora"
    model_class = LoraModel
    groups = (VISION_TOWER, "multi_modal_projector", "lora")
    stages = stages_of(groups)

    @staticmethod
    def group_of_language(name: str) -> str | None:
        return adapter_group(name, None)
