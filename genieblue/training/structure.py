"""What training has to know of a GenieBlue: what is trained in which stage, what is frozen, how it is saved."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from modeling_genieblue.model_files_genieblue import RECIPE_NAME

VISION_TOWER = "vision_tower"


@dataclass(frozen=True)
class StageRecipe:
    """What the paper states of a stage. Its global batches were 720 (stage 1) and 6800 samples (stage 2)."""

    groups: tuple[str, ...]  # the groups of parameters that are trained
    learning_rate: float  # peak, of a cosine to zero
    steps: int
    warmup_steps: int
    max_tiles: int | None  # by image; `None`: what the processor has, 16 in the paper
    needs_images: bool  # a sample without an image teaches nothing

    def learning_rates(self, common: float | None, single: Mapping[str, float]) -> dict[str, float]:
        """Peak by group: that of `single`, or the `common` one; `ValueError` for a group that is not trained."""
        if unknown := sorted(set(single) - set(self.groups)):
            raise ValueError(f"Learning rates for {', '.join(unknown)}: this stage trains {', '.join(self.groups)}.")
        return {group: single.get(group, self.learning_rate if common is None else common) for group in self.groups}


class GenieBlueStructure:
    """A base that stays as it is, a vision tower, a projector, copies of some blocks, and LoRA on all other blocks.

    Training knows a model by this alone; another structure has the same attributes and methods.
    """

    groups = (VISION_TOWER, "multi_modal_projector", "replicated_blocks", "lora")
    stages = {
        1: StageRecipe(
            ("multi_modal_projector",), learning_rate=1e-3, steps=3434, warmup_steps=34, max_tiles=1, needs_images=True
        ),
        2: StageRecipe(
            groups, learning_rate=1e-4, steps=53_000, warmup_steps=530, max_tiles=None, needs_images=False
        ),
    }  # fmt: skip

    def __init__(self, model: Any):
        """`ValueError` for a model that cannot be trained."""
        if model.language_model is None:
            raise ValueError("This GenieBlue has no base: make it with `from_base` or load it with `from_pretrained`.")
        if getattr(model.config, "quantization", None) is not None:
            raise ValueError("Quantized weights are not trained: train the 16-bit GenieBlue, then quantize it again.")
        self.model = model

    @property
    def frozen(self) -> nn.Module:
        """The module of which no byte may change."""
        return self.model.language_model

    def recipe(self, stage: int) -> StageRecipe:
        """The recipe of a stage; `ValueError` if there is none."""
        if stage not in self.stages:
            raise ValueError(f"The stage is {stage!r}: expected {' or '.join(map(str, self.stages))}.")
        return self.stages[stage]

    def group_of(self, name: str) -> str | None:
        """The group, one of `groups`, that the parameter of this name belongs to; `None` for what is never trained."""
        module = name.partition(".")[0]
        if module == "multi_modal_projector":
            return module
        if module == VISION_TOWER:
            # The pooling head of a SigLIP is no part of the way from pixels to image tokens.
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
        """AdamW groups of all parameters that require a gradient, one by learning rate and weight decay.

        Vectors (biases, norms) are not decayed: a choice, as the paper does not say. Raises `ValueError` for a
        parameter of another group than those with a learning rate, such as the base's.
        """
        found: dict[tuple[str, float, float], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            group = self.group_of(name)
            if group not in learning_rates:
                raise ValueError(
                    f"{name} requires a gradient, but only {', '.join(learning_rates)} are to be trained."
                )
            scale = self._layer_scale(name, vision_layer_decay) if group == VISION_TOWER else 1.0
            decay = weight_decay if parameter.ndim > 1 else 0.0
            found.setdefault((group, learning_rates[group] * scale, decay), []).append(parameter)
        order = sorted(found, key=lambda key: self.groups.index(key[0]))
        return [{"params": found[key], "group": key[0], "lr": key[1], "weight_decay": key[2]} for key in order]

    def _layer_scale(self, name: str, decay: float) -> float:
        """Factor on the learning rate of a vision parameter: `decay` to the power of its distance from the output.

        Blocks count from 0 at the input: block i of L gets `decay ** (L - i)`, the embeddings `decay ** (L + 1)`, the
        norm behind the last block 1 (BEiT's rule, arXiv 2106.08254).
        """
        num_layers = self.model.config.vision_config.num_hidden_layers
        words = name.split(".")
        if "embeddings" in words:
            return decay ** (num_layers + 1)
        if "layers" in words:
            return decay ** (num_layers - int(words[words.index("layers") + 1]))
        return 1.0

    def save(self, output: Path, processor: Any, stage: str, facts: dict[str, Any]) -> None:
        """Writes the model as a complete folder that tells the `facts` of this stage beside those of earlier ones."""
        provenance = self.model.provenance
        stages = {**provenance.facts([RECIPE_NAME]).get(RECIPE_NAME, {}), stage: facts}
        self.model.save_pretrained(output, processor=processor, facts={RECIPE_NAME: stages})
        provenance.training_recipe = stages


__all__ = ["GenieBlueStructure", "StageRecipe"]
