"""What training needs to know about a GenieBlue: trained groups per stage, the frozen base, how to save."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from conversion.chat_ids import stop_token_ids
from conversion.chat_template import check_processor_template
from genieblue.data.collation import ChatCollator
from genieblue.training.packed_attention import uses_flash_attention
from genieblue.training.settings import TrainingSettings
from modeling_genieblue.model_files_genieblue import RECIPE_NAME

VISION_TOWER = "vision_tower"


@dataclass(frozen=True)
class StageRecipe:
    """The paper's settings for a stage. Its global batch sizes were 720 (stage 1) and 6800 (stage 2)."""

    groups: tuple[str, ...]  # trained parameter groups
    learning_rate: float  # peak of a cosine schedule to zero
    steps: int
    warmup_steps: int
    max_tiles: int | None  # per image; `None`: the processor's own, 16 in the paper
    needs_images: bool  # samples without an image are useless

    def learning_rates(self, common: float | None, single: Mapping[str, float]) -> dict[str, float]:
        """Peak per group: from `single`, else `common`, else the recipe; `ValueError` for an untrained group."""
        if unknown := sorted(set(single) - set(self.groups)):
            raise ValueError(f"Learning rates for {', '.join(unknown)}: this stage trains {', '.join(self.groups)}.")
        return {group: single.get(group, self.learning_rate if common is None else common) for group in self.groups}


class GenieBlueStructure:
    """A frozen base with a vision tower, a projector, copies of some blocks, and LoRA on all other blocks.

    Training accesses a model only through this; another structure needs the same attributes and methods.
    """

    trains_on_texts = True  # in a stage that needs no images
    groups = (VISION_TOWER, "multi_modal_projector", "replicated_blocks", "lora")
    stages = {
        1: StageRecipe(
            ("multi_modal_projector",), learning_rate=1e-3, steps=3434, warmup_steps=34, max_tiles=1, needs_images=True
        ),
        2: StageRecipe(
            groups, learning_rate=1e-4, steps=53_000, warmup_steps=530, max_tiles=None, needs_images=False
        ),
    }  # fmt: skip

    def __init__(self, model: Any, trained_on: Mapping[str, str] | None = None):
        """`ValueError` for a model that cannot be trained.

        `trained_on` names a quantized base whose values the model's own base has in memory.
        """
        if model.language_model is None:
            raise ValueError(
                "This GenieBlue has no base: create it with `from_base` or load it with `from_pretrained`."
            )
        if getattr(model.config, "quantization", None) is not None:
            raise ValueError(
                "Quantized weights cannot be trained: train the 16-bit GenieBlue, then quantize it again."
            )
        self.model = model
        self.trained_on = dict(trained_on or {})

    @property
    def frozen(self) -> nn.Module:
        """The module that must not change by a byte."""
        return self.model.language_model

    @property
    def generation_config(self) -> Any:
        """The settings with which requests with images are generated."""
        return self.model.generation_config

    def check(self, processor: Any, settings: TrainingSettings) -> None:
        """`ValueError` for a processor without a usable chat template."""
        check_processor_template(processor)

    def max_tiles(self, processor: Any, settings: TrainingSettings) -> int | None:
        """How many tiles an image has at most; `None` if that is not known here."""
        return settings.max_tiles or self.recipe(settings.stage).max_tiles or processor.image_processor.max_tiles

    def collator(self, processor: Any, settings: TrainingSettings) -> ChatCollator:
        """What makes batches of chats."""
        return ChatCollator(
            processor,
            stop_ids=stop_token_ids(self.generation_config),
            max_length=settings.max_length,
            max_tiles=self.max_tiles(processor, settings),
            joins_packs=settings.pack and uses_flash_attention(self.model),
        )

    def vision_activations(self, pixels: float) -> float:
        """Hidden values of all blocks of the vision tower for so many pixel values, roughly."""
        vision = self.model.config.vision_config
        return vision.num_hidden_layers * vision.hidden_size * pixels / (3 * vision.patch_size**2)

    def recipe(self, stage: int) -> StageRecipe:
        """The recipe for a stage; `ValueError` if there is none."""
        if stage not in self.stages:
            raise ValueError(f"The stage is {stage!r}: expected {' or '.join(map(str, self.stages))}.")
        return self.stages[stage]

    def group_of(self, name: str) -> str | None:
        """The group in `groups` of the parameter with this name; `None` if it is never trained."""
        module = name.partition(".")[0]
        if module == "multi_modal_projector":
            return module
        if module == VISION_TOWER:
            # Image tokens do not use the pooling head of a SigLIP.
            return None if name.startswith(f"{VISION_TOWER}.head.") else module
        if module == "multimodal_language_model":
            if ".modules_to_save." in name:
                return "replicated_blocks"
            if ".lora_A." in name or ".lora_B." in name:
                return "lora"
        return None

    def parameter_groups(
        self, learning_rates: Mapping[str, float], vision_layer_decay: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """AdamW groups of all parameters that require gradients, one per learning rate and weight decay.

        Vectors (biases, norms) are not decayed: our choice, as the paper does not specify it. Raises `ValueError` for
        a parameter in a group without a learning rate, such as the base's.
        """
        found: dict[tuple[str, float, float], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            group = self.group_of(name)
            if group not in learning_rates:
                raise ValueError(
                    f"{name} requires a gradient, but this stage trains only {', '.join(learning_rates)}: freeze it."
                )
            scale = self._layer_scale(name, vision_layer_decay) if group == VISION_TOWER else 1.0
            decay = weight_decay if parameter.ndim > 1 else 0.0
            found.setdefault((group, learning_rates[group] * scale, decay), []).append(parameter)
        order = sorted(found, key=lambda key: self.groups.index(key[0]))
        return [{"params": found[key], "group": key[0], "lr": key[1], "weight_decay": key[2]} for key in order]

    def _layer_scale(self, name: str, decay: float) -> float:
        """Learning rate factor of a vision parameter: `decay` to the power of its distance from the output.

        Blocks count from 0 at the input: block i of L gets `decay ** (L - i)`, the embeddings `decay ** (L + 1)`, the
        norm after the last block 1 (BEiT's rule, arXiv 2106.08254).
        """
        num_layers = self._num_vision_layers()
        words = name.split(".")
        if "embeddings" in words:
            return decay ** (num_layers + 1)
        if "layers" in words:
            return decay ** (num_layers - int(words[words.index("layers") + 1]))
        return 1.0

    def _num_vision_layers(self) -> int:
        return self.model.config.vision_config.num_hidden_layers

    def save(self, output: Path, processor: Any, stage: str, facts: dict[str, Any]) -> None:
        """Saves the model as a complete folder that records the `facts` of this stage and of earlier ones."""
        provenance = self.model.provenance
        if self.trained_on:
            stage, facts = f"{stage} on a quantized base", {**facts, **self.trained_on}
        stages = {**provenance.facts([RECIPE_NAME]).get(RECIPE_NAME, {}), stage: facts}
        self.model.save_pretrained(output, processor=processor, facts={RECIPE_NAME: stages})
        provenance.training_recipe = stages
