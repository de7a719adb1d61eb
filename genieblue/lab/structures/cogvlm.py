"""CogVLM's visual experts (arXiv 2311.03079) in a quarter of the blocks, as the paper has them; LoRA on the others.

Image tokens run copies of a block's linear layers, text tokens the originals; the norms are shared. This is routing
by token, which NPUs of phones do not run: it is here to be compared with, and not to be exported.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from genieblue.lab.structures.structure import LabStructure, adapter_group, stages_of
from genieblue.training.structure import VISION_TOWER
from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.language_adapter_genieblue import ADAPTER, find_blocks
from modeling_genieblue.language_views_genieblue import build_multimodal_view


class ImageTokens:
    """Where a pass has image tokens: `mask` (batch, length), or `None` for a pass of text alone.

    It stays until the next pass, because gradient checkpointing runs blocks again in the backward pass.
    """

    mask: torch.Tensor | None = None


class VisualExpertLinear(nn.Module):
    """A linear layer of the base for text tokens, and a trained copy of it for image tokens.

    The names of its parts are those of PEFT's `ModulesToSaveWrapper`, so that a GenieBlue's own code fills, saves and
    loads the copy.
    """

    def __init__(self, original: nn.Linear, image_tokens: ImageTokens):
        super().__init__()
        has_bias = original.bias is not None
        with torch.device("meta"):  # filled by `initialize_adapter` or `load_adapter`
            expert = nn.Linear(original.in_features, original.out_features, has_bias, dtype=original.weight.dtype)
        self.original_module = original
        self.modules_to_save = nn.ModuleDict({ADAPTER: expert})
        self._image_tokens = image_tokens

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, length, in) → (batch, length, out); `ValueError` for a pass that is not the one of the mask."""
        mask = self._image_tokens.mask
        if mask is None:
            return self.original_module(hidden_states)
        if hidden_states.shape[:-1] != mask.shape:
            raise ValueError(
                f"Visual experts were told of {tuple(mask.shape)} tokens (rows, length) and met "
                f"{tuple(hidden_states.shape[:-1])}: beams, several answers to a prompt, and images in a cached "
                "conversation are not supported; generate one answer to a whole prompt."
            )
        of_text = self.original_module(hidden_states[~mask])
        of_images = self.modules_to_save[ADAPTER](hidden_states[mask])
        outputs = of_text.new_empty(*mask.shape, of_text.shape[-1])
        outputs[~mask], outputs[mask] = of_text, of_images.to(of_text.dtype)
        return outputs


class CogVLMModel(GenieBlueForConditionalGeneration):
    """A base whose replicated blocks have visual experts in the tree that multimodal requests run."""

    @staticmethod
    def _build_view(base: PreTrainedModel, lora_config: Any) -> PreTrainedModel:
        replicated = [int(name.rsplit(".", 1)[-1]) for name in lora_config.modules_to_save]
        lora_config.modules_to_save = None
        view = build_multimodal_view(base, lora_config)
        view.image_tokens = ImageTokens()
        _, blocks = find_blocks(view)
        experts = []
        for index in replicated:
            for name, module in list(blocks[index].named_modules()):
                if name.rsplit(".", 1)[-1] in lora_config.target_modules:
                    blocks[index].set_submodule(name, VisualExpertLinear(module, view.image_tokens))
                    experts.append(f"{lora_config.layers_pattern}.{index}.{name}")
        lora_config.modules_to_save = experts
        view.register_forward_pre_hook(_forget_images, with_kwargs=True)
        return view

    def embed_request(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        embeddings = super().embed_request(input_ids, pixel_values)
        self.multimodal_language_model.image_tokens.mask = input_ids == self.config.image_token_id
        return embeddings


def _forget_images(view: Any, _args: tuple, kwargs: dict[str, Any]) -> None:
    """A pass over ids has no image tokens: these come as embeddings."""
    if kwargs.get("inputs_embeds") is None:
        view.image_tokens.mask = None


class CogVLMStructure(LabStructure):
    """The base is frozen; visual experts in a quarter of the blocks and LoRA on the others are trained."""

    kind = "cogvlm"
    model_class = CogVLMModel
    is_placed = True
    groups = (VISION_TOWER, "multi_modal_projector", "visual_experts", "lora")
    stages = stages_of(groups)

    @staticmethod
    def group_of_language(name: str) -> str | None:
        return adapter_group(name, "visual_experts")
