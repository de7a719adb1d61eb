"""Image features of a GenieBlue: from pixels through the vision tower and projector into the embeddings."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .language_views_genieblue import TextEmbedder
from .processing_genieblue import GenieBlueProcessor
from .projector_genieblue import GenieBlueMultiModalProjector
from .saving_genieblue import processor_for
from .view_routing_genieblue import check_inputs, check_tiles


class ImageFeaturesMixin:
    """The vision side, its processor, and what embeds a request with images; to be mixed into the model class."""

    vision_tower: PreTrainedModel
    multi_modal_projector: GenieBlueMultiModalProjector
    config: Any
    training: bool
    _embed_text: TextEmbedder
    get_input_embeddings: Callable[[], Any]

    processor_class = GenieBlueProcessor
    processor_map = {
        "AutoImageProcessor": "image_processing_genieblue.GenieBlueImageProcessor",
        "AutoProcessor": "processing_genieblue.GenieBlueProcessor",
    }

    def make_processor(self, tokenizer: Any) -> Any:
        """A processor for this model, of its base's tokenizer."""
        return processor_for(self.config, tokenizer)

    def _build_vision_side(self, config: Any) -> None:
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = GenieBlueMultiModalProjector(config)

    def get_image_features(
        self, pixel_values: torch.Tensor, return_dict: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple:
        """Tiles (num_tiles, 3, image_size, image_size) → features (num_tiles, image_seq_length, hidden_size).

        As in all of transformers they are the `pooler_output` of what the vision tower gives (`last_hidden_state` are
        its own features of the patches), or the second of a tuple with `return_dict=False`; `kwargs` are the tower's.
        """
        tower = self.vision_tower
        outputs = tower(pixel_values.to(tower.device, tower.dtype), return_dict=True, **kwargs)
        weight = self.multi_modal_projector.linear_1.weight
        patch_features = outputs.last_hidden_state.to(weight.device, weight.dtype)
        outputs.pooler_output = self.multi_modal_projector(patch_features)
        if return_dict is None:
            return_dict = self.config.return_dict
        return outputs.to_tuple() if return_dict is False else outputs

    def get_placeholder_mask(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Where image features go among the embeddings, (batch, length, 1); `ValueError` if they do not fit."""
        is_image = input_ids == self.config.image_token_id
        num_tokens, num_features = int(is_image.sum()), image_features.numel() // image_features.shape[-1]
        if num_tokens != num_features:
            raise ValueError(
                f"Image tokens and image features do not match: tokens: {num_tokens}, features: {num_features}."
            )
        return is_image.unsqueeze(-1).to(inputs_embeds.device)

    def embed_request(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings (batch, length, hidden_size), with image features in place; `ValueError` if tiles do not fit."""
        is_image = input_ids == self.config.image_token_id
        # The id of an image token has no row in the base's embedding: look any other one up in its place.
        inputs_embeds = self._embed_text(input_ids.masked_fill(is_image, 0))
        check_tiles(pixel_values, int(is_image.sum()), self.config.vision_config, self.config.image_seq_length)
        if pixel_values is None:
            return inputs_embeds
        features: Any = self.get_image_features(pixel_values, return_dict=True)
        image_features = features.pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
        # Counted above; `get_placeholder_mask` would count again, and end a compiled graph by it.
        return inputs_embeds.masked_scatter(is_image.unsqueeze(-1).to(inputs_embeds.device), image_features)

    def _check_image_token(self, rows: int) -> None:
        """`ValueError` if a text of the base, which has `rows` embeddings, can hold the image token."""
        if self.config.image_token_id < rows:
            raise ValueError(
                f"`image_token_id` is {self.config.image_token_id}, which is a token of the base ({rows} embeddings): "
                "a text with it would be taken for an image. Expected the first id past them, as saved."
            )

    _check_inputs = staticmethod(check_inputs)

    def _rows_with_images(self, input_ids: torch.Tensor, cache: Any, pixel_values: Any) -> list[bool]:
        """Which rows have image tokens; `ValueError` for pixels without any."""
        has_image = (input_ids == self.config.image_token_id).any(dim=1).tolist()
        if pixel_values is not None and not any(has_image):
            raise ValueError(
                f"The request has no image tokens, but `pixel_values` of {len(pixel_values)} tiles: put one "
                "placeholder per image into the text, and let the processor expand it."
            )
        return has_image

    def _images_of_rows(self, pixel_values: Any, rows: list[int]) -> Any:
        """The images of the rows of a batch that have any: tiles belong to no row."""
        return pixel_values

    def _embedded(self, pixel_values: torch.Tensor | None, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of the multimodal view, ids and pixels as embeddings."""
        inputs = dict(inputs)
        if "inputs_embeds" not in inputs:
            inputs["inputs_embeds"] = self.embed_request(inputs.pop("input_ids"), pixel_values)
        if self.training and torch.is_grad_enabled():
            if pixel_values is None and torch.distributed.is_available() and torch.distributed.is_initialized():
                inputs["inputs_embeds"] = inputs["inputs_embeds"] + self._nothing_of_the_image_path()
            if inputs["inputs_embeds"].is_leaf:  # reentrant checkpointing gives no gradients otherwise
                inputs["inputs_embeds"].requires_grad_(True)
        return inputs

    def _nothing_of_the_image_path(self) -> torch.Tensor:
        """Zero, with a gradient of zero for each parameter that a batch without images leaves out.

        `DistributedDataParallel` waits for a gradient of every parameter, whatever the other processes have seen. FSDP
        gathers parameters as they are used, and DeepSpeed's ZeRO adds up gradients in the order in which they come:
        that must be the same in all processes, which is why there a black tile takes the way of an image.
        """
        trained = (*self.vision_tower.parameters(), *self.multi_modal_projector.parameters())
        if any(hasattr(each, "full_tensor") or hasattr(each, "get_full_hp_param") for each in trained):
            vision = self.config.vision_config
            tile = torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size, device=trained[0].device)
            features: Any = self.get_image_features(tile, return_dict=True)
            return features.pooler_output.sum().to(self.get_input_embeddings().weight.dtype) * 0
        weight = self.get_input_embeddings().weight
        firsts = [each.flatten()[0].to(weight.device, weight.dtype) for each in trained if each.requires_grad]
        return sum(firsts, weight.new_zeros(())) * 0
