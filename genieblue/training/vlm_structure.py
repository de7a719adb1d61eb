"""What training needs to know about a GenieBlue with a VLM: its groups, its batches, and what it cannot do."""

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from conversion.chat_ids import stop_token_ids
from conversion.chat_template import UnusableTemplate
from genieblue.data.collation import ChatCollator
from genieblue.data.vlm_collation import VlmChatCollator
from genieblue.training.settings import TrainingSettings
from genieblue.training.structure import VISION_TOWER, GenieBlueStructure, StageRecipe

CONNECTORS = frozenset(("multi_modal_projector", "connector", "merger", "deepstack_merger_list", "image_newline"))
BLOCK_LISTS = ("layers", "layer", "blocks")
ATTENDS_TO_ITS_PROMPT = ("paligemma",)  # with attention that depends on where the prompt ends
OWN_LANGUAGE = "own_language"


def structure_of(model: Any, trained_on: Mapping[str, str] | None = None) -> GenieBlueStructure:
    """What training accesses a GenieBlue through, by the kind of its multimodal side."""
    has_vlm = getattr(model.config, "vlm_config", None) is not None
    return (VlmStructure if has_vlm else GenieBlueStructure)(model, trained_on)


class VlmStructure(GenieBlueStructure):
    """A frozen base with the VLM that was trained from it: its vision side, copies, LoRA, and what else is its own.

    Its second stage heals what an extraction cut. Samples without images are left out, since no text runs the VLM.
    """

    trains_on_texts = False
    groups = (VISION_TOWER, "multi_modal_projector", OWN_LANGUAGE, "replicated_blocks", "lora")
    stages = {2: replace(GenieBlueStructure.stages[2], groups=groups, needs_images=True)}

    def __init__(self, model: Any, trained_on: Mapping[str, str] | None = None):
        """`ValueError` for a model that cannot be trained."""
        super().__init__(model, trained_on)
        own = {id(each) for each in model.own_language.parameters()}
        # Norms and biases are found in the view first, under the base's names.
        self._own_names = {name for name, each in model.named_parameters() if id(each) in own}

    @property
    def generation_config(self) -> Any:
        """The VLM's own."""
        return self.model.vlm.generation_config

    def recipe(self, stage: int) -> StageRecipe:
        """The recipe for the second stage; `ValueError` for the first."""
        if stage == 1:
            raise ValueError(
                "Stage 1 trains a new projector, and this GenieBlue's is its VLM's, trained already: train stage 2."
            )
        return super().recipe(stage)

    def check(self, processor: Any, settings: TrainingSettings) -> None:
        """`ValueError` for what a VLM has no place for, and for a VLM without a chat template."""
        family = self.model.config.vlm_config.model_type
        if family in ATTENDS_TO_ITS_PROMPT:
            raise ValueError(
                f"A VLM of type {family!r} attends to its whole prompt, which chats cannot be trained in."
            )
        if processor.vlm_processor.chat_template is None:
            raise UnusableTemplate(
                "The VLM has no chat template, so chats with images cannot be formatted: set "
                "`processor.vlm_processor.chat_template`."
            )
        refused = {
            "max_tiles": "the VLM's own processor cuts images, by its own settings",
            "pack": "the VLM's positions and attention do not keep samples of one row apart",
            "cache_image_features": "the VLM computes features by code of its own",
            "fsdp": "the VLM's modules hold the base's weights too",
        }
        for name, reason in refused.items():
            if getattr(settings, name):
                raise ValueError(f"`{name}` is set, but {reason}: leave it out.")
        if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
            raise ValueError(
                f"There are {processes} processes, and a VLM has parameters that not all requests use: train a "
                "GenieBlue with a VLM in one process."
            )

    def max_tiles(self, processor: Any, settings: TrainingSettings) -> int | None:
        """`None`: that is the VLM's."""
        return None

    def collator(self, processor: Any, settings: TrainingSettings) -> ChatCollator:
        """What makes batches of chats with images."""
        stop_ids = stop_token_ids(self.generation_config)
        return VlmChatCollator(processor, stop_ids=stop_ids, max_length=settings.max_length)

    def group_of(self, name: str) -> str | None:
        """The group in `groups` of the parameter with this name; `None` if it is never trained."""
        if name in self._own_names:
            return OWN_LANGUAGE
        if name.startswith("vlm."):
            return "multi_modal_projector" if CONNECTORS & set(name.split(".")) else VISION_TOWER
        return super().group_of(name)

    def vision_activations(self, pixels: float) -> float:
        """Hidden values of all blocks of the VLM's vision side for so many pixel values, roughly."""
        vision = self.model.config.vlm_config.vision_config
        patch = vision.patch_size
        side = math.prod(patch) if isinstance(patch, (list, tuple)) else patch**2
        hidden = getattr(vision, "embed_dim", vision.hidden_size)  # Qwen2-VL's `hidden_size` is the language model's
        return self._num_vision_layers() * hidden * pixels / (3 * side * getattr(vision, "temporal_patch_size", 1))

    def _num_vision_layers(self) -> int:
        vision = self.model.config.vlm_config.vision_config
        return getattr(vision, "num_hidden_layers", None) or vision.depth

    def _layer_scale(self, name: str, decay: float) -> float:
        words = name.split(".")
        if any("embed" in word for word in words):
            return decay ** (self._num_vision_layers() + 1)
        for place, word in enumerate(words[:-1]):
            if word in BLOCK_LISTS and words[place + 1].isdecimal():
                return decay ** (self._num_vision_layers() - int(words[place + 1]))
        return 1.0
