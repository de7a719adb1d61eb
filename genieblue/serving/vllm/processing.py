"""Requests with images: what the project's own processor makes of them, in vLLM's terms."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalInput
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdateDetails,
    TimingContext,
)
from vllm.multimodal.processing.processor import HFMultiModalInputs

from genieblue.serving.vllm.prompts import check_image_tokens, with_stand_ins

IMAGE_OPTIONS = ("max_tiles",)  # what a request may set of the image processor


class GenieBlueProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about a GenieBlue's images before any request."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Images, in any number that the server allows."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Tokens of an image with the largest grid."""
        images = self.get_hf_processor().image_processor
        most = images.max_tiles + 1 if images.max_tiles > 1 else 1
        return {"image": most * self.get_hf_config().image_seq_length}


class GenieBlueDummyInputs(BaseDummyInputsBuilder[GenieBlueProcessingInfo]):
    """Requests with the largest images, with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """No text: `get_dummy_inputs` of the processor gives the ids."""
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> dict:
        """Images whose best grid is the largest."""
        images = self.info.get_hf_processor().image_processor
        side = images.tile_size * math.isqrt(images.max_tiles)
        overrides = mm_options.get("image")
        count = mm_counts.get("image", 0)
        return {"image": self._get_dummy_images(width=side, height=side, num_images=count, overrides=overrides)}


class GenieBlueMultiModalProcessor(BaseMultiModalProcessor[GenieBlueProcessingInfo]):
    """Tiles and prompt of one request. Its prompt holds one image token for each image, as the renderer makes it."""

    def get_dummy_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> ProcessorInputs:
        """One image token for each of the largest images."""
        data = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options)
        prompt = [self.info.get_hf_config().image_token_id] * mm_counts.get("image", 0)
        return ProcessorInputs(prompt=prompt, mm_data_items=self.info.parse_mm_data(data, validate=False))

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """The request for the engine; `ValueError` for another number of image tokens than images."""
        image_token_id = self.info.get_hf_config().image_token_id
        check_image_tokens(inputs.prompt, image_token_id, inputs.mm_data_items.get_all_counts().get("image", 0))
        result = super().apply(inputs, timing_ctx)
        result["prompt_token_ids"] = with_stand_ins(result["prompt_token_ids"], image_token_id)
        return result

    def _get_hf_mm_inputs(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> HFMultiModalInputs:
        """Images as they were sent, where vLLM converted their colours in a way of its own."""
        if unknown := sorted(set(hf_kwargs) - set(IMAGE_OPTIONS)):
            raise ValueError(f"mm_processor_kwargs has {unknown}: a request may set {', '.join(IMAGE_OPTIONS)} alone.")
        images = [
            item.original_bytes if isinstance(item, MediaWithBytes) and item.io_config is not None else item
            for items in mm_items.values()
            for item in items.data
        ]
        images = [item.media if isinstance(item, MediaWithBytes) else item for item in images]
        for image in images:  # the image processor would open a path or an address, and those in lists
            if not isinstance(image, (Image.Image, np.ndarray, torch.Tensor, bytes)):
                raise ValueError(
                    f"An image is a {type(image).__name__}: send image_url parts, with data:image/...;base64,... URLs."
                )
        return HFMultiModalInputs({"images": images} if images else {}, hf_kwargs, {})

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Tiles of the images; `ValueError` for one that cannot be used, which a client is told."""
        images = self.info.get_hf_processor().image_processor
        asked = hf_kwargs.get("max_tiles")  # of what it may be otherwise the image processor tells
        if isinstance(asked, int) and asked > images.max_tiles:
            raise ValueError(f"max_tiles is {asked}: this server allows at most {images.max_tiles}.")
        try:
            return images(hf_data["images"], return_tensors="pt", **hf_kwargs)
        except OSError as error:  # vLLM takes it for a fault of its own
            raise ValueError(str(error)) from error

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        num_tiles = hf_inputs.get("num_tiles", torch.empty(0, dtype=torch.int64))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", num_tiles),
            "num_tiles": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptReplacement]:
        image_token_id = self.info.get_hf_config().image_token_id
        tile_ids = self.info.get_hf_processor().tile_ids()

        def replacement(index: int) -> PromptUpdateDetails:
            tiles = int(out_mm_kwargs["image"][index]["num_tiles"].data)
            return PromptUpdateDetails.select_token_id(tile_ids * tiles, image_token_id)

        return [PromptReplacement(modality="image", target=[image_token_id], replacement=replacement)]
