"""A GenieBlue whose multimodal side is a whole VLM of transformers, over the weights of the base that it came from."""

import copy
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .arguments_genieblue import check_base_model, check_not_offloaded, check_vlm
from .base_identity_genieblue import cached_snapshots, tensor_samples
from .base_loading_genieblue import resolve_base
from .compat_genieblue import take_cache
from .frozen_base_genieblue import OfTheWholeModel
from .generation_genieblue import padded_on_the_left
from .language_adapter_genieblue import make_lora_config
from .loading_genieblue import LoadRequest, Provenance, hub_commit
from .loss_genieblue import run_with_loss
from .model_files_genieblue import COMMIT_SHA, GENERATION_CONFIG_NAME, VLM_FOLDER, VLM_MODULES
from .modeling_genieblue import GenieBlueForConditionalGeneration
from .view_routing_genieblue import cache_view, check_inputs, mark_given_cache, mark_returned_cache
from .vlm_configuration_genieblue import VlmGenieBlueConfig
from .vlm_language_genieblue import Factors, LanguagePair, OwnLanguage, best_factors, fill_adapter, join_language
from .vlm_language_genieblue import decoder_path as path_of_decoder
from .vlm_loading_genieblue import load_vlm_parts
from .vlm_processing_genieblue import VlmGenieBlueProcessor
from .vlm_shell_genieblue import guard_vlm

logger = logging.getLogger(__name__)

# What a VLM's processor returns beside `input_ids` and `attention_mask`: of images, or of the rows that have any.
IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw", "batch_num_images")
ROW_INPUTS = ("mm_token_type_ids", "token_type_ids")
IMAGES_BY_ROW = ("idefics3", "smolvlm")  # families whose pixels are (batch, images of a row, …)
# What the pixels of a family cannot be read without.
SIZES_OF_IMAGES = {
    **dict.fromkeys(("llava_next", "llava_onevision"), "image_sizes"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "image_grid_thw"),
}
OTHER_MEDIA = ("pixel_values_videos", "video_grid_thw", "image_sizes_videos", "second_per_grid_ts")
_OWN_CODE = (
    "the images of this GenieBlue run the own code of its VLM (tiles, positions, attention among image tokens), which "
    "embeddings alone do not carry"
)


class VlmGenieBlueForConditionalGeneration(GenieBlueForConditionalGeneration):
    """A base LLM, and a VLM that was trained from it, over one set of weights; made by `from_vlm`.

    Attributes:
        vlm: the VLM, whose language model consists of the modules and parameters of `multimodal_language_model`.
        own_language: norms, biases and rows of embedding and head in which the VLM differs from the base.
    """

    config_class = VlmGenieBlueConfig
    processor_class = VlmGenieBlueProcessor
    processor_map = {"AutoProcessor": "vlm_processing_genieblue.VlmGenieBlueProcessor"}
    own_modules = VLM_MODULES
    _no_split_modules = None
    _vision_trees = ("vlm",)
    vlm: Any

    def _build_vision_side(self, config: Any) -> None:
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config, dtype=torch.get_default_dtype())
        self.own_language = OwnLanguage({}, None, None)
        self._other_shared_trees = (f"vlm.{path_of_decoder(self.vlm)}", "vlm.lm_head")

    @classmethod
    def from_vlm(
        cls,
        vlm: PreTrainedModel,
        base_model: PreTrainedModel,
        *,
        placement: str = "skip",
        replicated_layers: list[int] | None = None,
        lora_rank: int = 8,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        rank_pattern: dict[str, int] | None = None,
        factors: Factors = best_factors,
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        vlm_revision: str | None = None,
        hub_kwargs: dict[str, Any] | None = None,
    ) -> "VlmGenieBlueForConditionalGeneration":
        """A GenieBlue of a VLM and the base that it was trained from, without training.

        The chosen blocks are the VLM's own; in all others LoRA is the nearest to the VLM's change at its rank. With
        all blocks chosen, requests with images give exactly what the VLM gives. Text runs the base.

        Args:
            vlm: becomes a part of the model: its language model takes the base's weights.
            base_model: as for `from_base`, in the dtype of the VLM.
            placement: which quarter of the blocks is the VLM's own: `skip`, `pre` or `post`.
            replicated_layers: block indices, any number of them, instead of `placement`.
            rank_pattern: LoRA ranks by name in the base, where they are not `lora_rank`.
            factors: what makes LoRA of a change, such as one that has the SVD already.
            base_model_name_or_path, base_model_revision, hub_kwargs: as for `from_base`.
            vlm_revision: what a VLM from the Hub was loaded at; its commit is recorded. By default the only one in the
                cache.

        Raises `ValueError` for a VLM of an unknown family, and for two models that do not belong together.
        """
        check_base_model(base_model)
        check_vlm(vlm)
        check_not_offloaded((*base_model.parameters(), *vlm.parameters()), "the base or the VLM")
        pair = LanguagePair(vlm, base_model)
        pair.check()
        name, revision = resolve_base(base_model, base_model_name_or_path, base_model_revision, hub_kwargs)
        config = VlmGenieBlueConfig(
            text_config=copy.deepcopy(base_model.config.get_text_config(decoder=True)),
            vlm_config=copy.deepcopy(vlm.config),
            vlm_revision=_commit_of(vlm, vlm_revision, hub_kwargs or {}),
            base_model_name_or_path=name,
            base_model_revision=revision,
            base_model_runs_remote_code=base_model.is_remote_code(),
            placement=str(placement) if replicated_layers is None else None,
            replicated_layers=replicated_layers,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            rank_pattern=rank_pattern,
            image_token_id=vlm.config.image_token_id,
        )
        with torch.device("meta"):
            model = cls(config)
        model.vlm = vlm
        model.own_language = OwnLanguage.of(pair, config.replicated_layers or [])
        for setting, value in model.own_language.settings(pair.is_tied()).items():
            setattr(config, setting, value)
        model.provenance = Provenance(access=dict(hub_kwargs or {}), base_samples=tensor_samples(base_model))
        model._attach(base_model, make_lora_config(base_model, config))
        fill_adapter(model.multimodal_language_model, pair, factors)
        model._join()
        return model.eval()

    @classmethod
    def _load_own_weights(cls, request: LoadRequest, model_args: tuple, base_model: Any) -> tuple[Any, dict]:
        return load_vlm_parts(cls, request, base_model)

    def _load_adapter(self, request: LoadRequest) -> None:
        super()._load_adapter(request)
        self._join()

    def _join(self) -> None:
        """Makes the VLM's language model of the multimodal view, whose adapter is filled now."""
        join_language(self.vlm, self.multimodal_language_model, self.own_language, self.config.own_head_rows is None)
        guard_vlm(self.vlm)
        self.vlm.register_forward_pre_hook(mark_given_cache, with_kwargs=True)
        self.vlm.register_forward_hook(mark_returned_cache)
        # The names that shared parameters are found under first are those of the base, then those of the adapter.
        for name in VLM_MODULES:
            self._modules[name] = self._modules.pop(name)
        device = self.language_model.device
        if any(each.device != device for each in self.state_dict().values()):
            self.vlm._apply(OfTheWholeModel(lambda tensor: tensor.to(device)))
            self.own_language.to(device)

    def _check_image_token(self, rows: int) -> None:
        """Nothing: a base may have the VLM's image token (Qwen's do), and a text with it has no pixels."""

    def _freeze_unused(self) -> None:
        """Nothing: all of a VLM's parts are its own."""

    # Requests

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        view: str | None = None,
        keep_logits: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """One pass; rows with image tokens in a request with pixels run the VLM, other rows the base.

        Args: as the VLM's own (`kwargs`: `image_sizes`, `image_grid_thw`, … as its processor returns them) and, of
        `GenieBlueForConditionalGeneration.forward`, `view`, `cache` and `keep_logits`.
        """
        return super().forward(
            input_ids=input_ids, pixel_values=self._take_images(pixel_values, kwargs), attention_mask=attention_mask,
            position_ids=position_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels,
            view=view, keep_logits=keep_logits, **kwargs,
        )  # fmt: skip

    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]: by name, the images are more than pixels
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        pixel_values: Any = None,
        view: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate` of the base for rows of text, and of the VLM, with its own settings, for others."""
        images = self._take_images(pixel_values, kwargs)
        return super().generate(inputs, generation_config, pixel_values=images, view=view, **kwargs)

    def _take_images(self, pixel_values: Any, kwargs: dict[str, Any]) -> Any:
        """What shows images, taken out of the arguments of a request; `None` in a request without pixels."""
        if isinstance(pixel_values, Mapping):
            return pixel_values  # taken before
        if given := [name for name in OTHER_MEDIA if kwargs.get(name) is not None]:
            raise ValueError(f"`{given[0]}` is given, but a GenieBlue sees images only: leave the video out.")
        kwargs.pop("num_tiles", None)
        of_images = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS if name != "pixel_values"}
        if pixel_values is None:
            if left := [name for name, value in of_images.items() if value is not None]:
                raise ValueError(f"`{left[0]}` is given without `pixel_values`: pass all that the processor returned.")
            return None
        if not isinstance(pixel_values, torch.Tensor):
            raise ValueError(
                f"`pixel_values` is a {type(pixel_values).__name__}: expected a tensor, as the processor returns it "
                "with `return_tensors='pt'`."
            )
        if needed := SIZES_OF_IMAGES.get(self.config.vlm_config.model_type):
            if (sizes := of_images[needed]) is None:
                raise ValueError(f"`pixel_values` are given without `{needed}`: pass all that the processor returned.")
            count = int(sizes.prod(dim=1).sum()) if needed == "image_grid_thw" else len(sizes)
            if len(pixel_values) != count:  # what is too many would not be seen, without a word
                raise ValueError(
                    f"`pixel_values` has {len(pixel_values)} rows, but `{needed}` means {count}: pass what one call "
                    "of the processor returned."
                )
        of_images |= {name: kwargs.pop(name, None) for name in ROW_INPUTS}
        return {"pixel_values": pixel_values} | {name: each for name, each in of_images.items() if each is not None}

    @staticmethod
    def _check_inputs(input_ids: Any, _images: Any, _num_tiles: Any) -> None:
        check_inputs(input_ids, None, None)

    def _rows_with_images(self, input_ids: torch.Tensor, cache: Any, pixel_values: Any) -> list[bool]:
        has_image = (input_ids == self.config.image_token_id).any(dim=1).tolist()
        if pixel_values is not None:
            if not any(has_image):
                raise ValueError(
                    f"The request has `pixel_values`, but no image token ({self.config.image_token_id}): pass the ids "
                    "and the pixels of one call of the processor."
                )
            if (grid := pixel_values.get("image_grid_thw")) is not None:  # else Qwen's `generate` runs out of grids
                merged = self.config.vlm_config.vision_config.spatial_merge_size**2
                tokens, features = int((input_ids == self.config.image_token_id).sum()), int(grid.prod(dim=1).sum())
                if tokens != features // merged:
                    raise ValueError(
                        f"The request has {tokens} image tokens, but `image_grid_thw` means {features // merged}: "
                        "pass the ids and the pixels of one call of the processor."
                    )
            return has_image
        rows = self.language_model.get_input_embeddings().weight.shape[0]  # pyright: ignore
        if any(has_image) and self.config.image_token_id >= rows and cache_view(cache) is None:
            raise ValueError(
                "The request has image tokens but no `pixel_values`: pass all that the processor returned "
                "(`model.generate(**inputs)`)."
            )
        return [False] * len(has_image)  # to the base it is a token like others

    def _images_of_rows(self, pixel_values: Any, rows: list[int]) -> Any:
        if pixel_values is None:  # a cache has them
            return None
        by_row = (*ROW_INPUTS, *(IMAGE_INPUTS if self.config.vlm_config.model_type in IMAGES_BY_ROW else ()))
        return {name: each[rows] if name in by_row else each for name, each in pixel_values.items()}

    def _multimodal_forward(
        self, pixel_values: Any, inputs: dict[str, Any], keep_logits: bool = True
    ) -> CausalLMOutputWithPast:
        self._check_continuation(inputs.get(self._cache_argument))
        return run_with_loss(self.vlm, {**inputs, **(pixel_values or {})}, keep_logits)

    def _multimodal_generate(self, input_ids: torch.Tensor | None, pixel_values: Any, **kwargs: Any) -> Any:
        cache = take_cache(dict(kwargs))
        self._check_continuation(cache)
        kwargs |= pixel_values or {}
        mask = kwargs.get("attention_mask")
        if input_ids is not None and mask is not None and mask.ndim == 2 and not bool(mask[:, -1].all()):
            if cache is not None or kwargs.get("position_ids") is not None:
                raise ValueError(
                    "Rows are padded on the right, behind which nothing can be generated: pad them on the left "
                    "(`processor(…, padding_side='left')`)."
                )
            by_token = [name for name in ("attention_mask", *ROW_INPUTS) if kwargs.get(name) is not None]
            input_ids, *moved = padded_on_the_left(mask, input_ids, *(kwargs[name] for name in by_token))
            kwargs |= dict(zip(by_token, moved, strict=True))
        return self.vlm.generate(input_ids, **kwargs)

    def _check_continuation(self, cache: Any) -> None:
        if cache_view(cache) is not None and hasattr(self.vlm.model, "rope_deltas"):
            raise ValueError(
                f"{type(self.vlm).__name__} keeps the positions of the last images beside the cache, so a cache "
                "given to it might be continued at the wrong place: prefill the whole conversation again, without "
                "`past_key_values`."
            )

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """The VLM's own features of its processor's pixels."""
        return self.vlm.get_image_features(*args, **kwargs)

    def embed_request(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Always a `ValueError`."""
        raise ValueError(f"`embed_request` is refused: {_OWN_CODE}. Run the model itself.")

    get_placeholder_mask = embed_request  # pyright: ignore[reportAssignmentType]

    @property
    def base_model(self) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The model itself: the part before the LM head is another one in each view."""
        return self

    # The processor, and how weights are stored

    def make_processor(self, tokenizer: Any) -> VlmGenieBlueProcessor:
        """A processor of the base's tokenizer and the VLM's own processor, at the commit that was loaded."""
        name = self.vlm.config._name_or_path
        if not name:
            raise ValueError("the VLM was made from a configuration, so it has no processor")
        where = {**self.provenance.access, "revision": self.config.vlm_revision}
        where = {key: value for key, value in where.items() if value is not None}
        return VlmGenieBlueProcessor(tokenizer, AutoProcessor.from_pretrained(name, trust_remote_code=False, **where))

    def _check_save(self, dtype: torch.dtype | None) -> torch.dtype:
        return dtype or self.language_model.dtype

    def _write_weights(
        self, folder: Path, dtype: torch.dtype, state: Mapping[str, torch.Tensor], is_checkpoint: bool
    ) -> None:
        super()._write_weights(folder, dtype, state, is_checkpoint)
        os.makedirs(folder / VLM_FOLDER, exist_ok=True)
        self.vlm.generation_config.to_json_file(folder / VLM_FOLDER / GENERATION_CONFIG_NAME)


def _commit_of(vlm: PreTrainedModel, revision: str | None, hub_kwargs: dict[str, Any]) -> str | None:
    """The commit of a VLM from the Hub, which a loaded model does not remember: that of `revision`, or else the only
    one with weights in the cache."""
    name = vlm.config._name_or_path
    if not name or os.path.isdir(name):
        return None
    if revision is not None:
        return revision if COMMIT_SHA.fullmatch(revision) else hub_commit(name, revision, **hub_kwargs)
    commits = [folder.name for folder in cached_snapshots(name, hub_kwargs.get("cache_dir"))]
    if len(commits) == 1:
        return commits[0]
    logger.warning("The commit of the VLM %s is unknown: pass it as `vlm_revision`.", name)
    return None


VlmGenieBlueForConditionalGeneration.register_for_auto_class("AutoModel")
