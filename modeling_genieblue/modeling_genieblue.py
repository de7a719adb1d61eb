"""GenieBlue: a frozen base LLM with a second, multimodal view of its weights (arXiv 2503.06019).

A request without images runs the base LLM unchanged. A request with images runs the multimodal view: the same weights
with trained copies of a quarter of the blocks and LoRA on the others. There is no routing within a row.
"""

import copy
import os
from collections.abc import Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .arguments_genieblue import (
    PUSH_KEYWORDS,
    check_base_model,
    check_load_arguments,
    check_not_offloaded,
    check_save_arguments,
    check_vision_tower,
)
from .as_built_genieblue import AsBuilt
from .backbone_genieblue import GenieBlueBackbone
from .base_identity_genieblue import tensor_samples
from .base_loading_genieblue import check_identity, load_base, record_location, resolve_base
from .compat_genieblue import CACHE, adapt_to_cache_of_generate, cache_argument, cache_field, take_cache
from .configuration_genieblue import GenieBlueConfig, runtime_settings
from .frozen_base_genieblue import FrozenBaseModel
from .generation_genieblue import GenieBlueGenerationMixin
from .image_features_genieblue import ImageFeaturesMixin
from .language_adapter_genieblue import check_adapter_settings, initialize_adapter, load_adapter, make_lora_config
from .language_views_genieblue import TextEmbedder, build_multimodal_view
from .loading_genieblue import LoadRequest, Provenance
from .loss_genieblue import IGNORED, loss_of, run_with_loss
from .model_files_genieblue import OWN_MODULES, RECIPE_NAME
from .own_state_genieblue import keep_own_state
from .projector_genieblue import GenieBlueMultiModalProjector
from .saving_genieblue import push_model, save_model, write_trained_weights
from .view_routing_genieblue import (
    MULTIMODAL,
    TEXT,
    as_mixed_cache,
    cache_view,
    choose_views,
    mark_given_cache,
    mark_returned_cache,
    merge_rows,
    split_rows,
    take_rows,
)


class GenieBlueForConditionalGeneration(ImageFeaturesMixin, FrozenBaseModel, GenieBlueGenerationMixin):
    """A base LLM that also reads images; create it with `from_base` or load it with `from_pretrained`.

    Attributes:
        language_model: the base, the same object that was loaded or given; text requests run it.
        multimodal_language_model: a second tree over the same parameters, with the adapter in place.
        vision_tower, multi_modal_projector: image tiles → image features.
        provenance: where all of this came from.

    A model whose weights are stored in another form is a subclass with a configuration class of its own, and differs
    in the methods under "How weights are stored".
    """

    config_class = GenieBlueConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # pyright: ignore[reportAssignmentType]: as transformers' own models
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _build_view = staticmethod(build_multimodal_view)  # of the base and PEFT's configuration: what is trained
    # In a checkpoint of training, beside the regular adapter and of the same values: see `save_pretrained`.
    _keys_to_ignore_on_load_unexpected = [r"^multimodal_language_model\..*\.(lora_[AB]|modules_to_save)\."]
    _no_split_modules = ["SiglipVisionEmbeddings", "SiglipEncoderLayer", "SiglipMultiheadAttentionPoolingHead"]

    def __init__(self, config: GenieBlueConfig):
        super().__init__(config)
        if config.text_config is None:
            raise ValueError(
                "The configuration has no `text_config`. Use `GenieBlueForConditionalGeneration.from_base(base, "
                "vision_tower)` to make a GenieBlue, or `from_pretrained` to load one."
            )
        self._build_vision_side(config)
        # Attached after the weights above are in place: `from_pretrained` would initialise what its file lacks.
        self.language_model = self.multimodal_language_model = None  # pyright: ignore[reportAttributeAccessIssue]
        self.provenance = Provenance()
        keep_own_state(self)
        self.post_init()

    # Making and loading

    @classmethod
    def from_vlm(cls, vlm: PreTrainedModel, base_model: PreTrainedModel, **options: Any) -> Any:
        """A GenieBlue whose multimodal side is a whole VLM that was trained from `base_model`, with its own vision.

        Its class, and the options, are those of `vlm_modeling_genieblue`. Only a model's package makes one; the code
        in a repository loads what it was written for.
        """
        kind = cls._class_for({"vlm_config": {}})
        if kind is cls:
            raise ValueError("This code loads one kind of GenieBlue: make one of a VLM with the package `genieblue`.")
        return kind.from_vlm(vlm, base_model, **options)

    @classmethod
    def from_base(
        cls,
        base_model: PreTrainedModel,
        vision_tower: PreTrainedModel,
        *,
        placement: str = "skip",
        replicated_layers: list[int] | None = None,
        lora_rank: int = 8,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        rank_pattern: dict[str, int] | None = None,
        downsample_factor: int = 2,
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        hub_kwargs: dict[str, Any] | None = None,
    ) -> "GenieBlueForConditionalGeneration":
        """A new GenieBlue to train: LoRA B is zero and copies equal the originals, so both views agree at first.

        Args:
            base_model: any decoder that `AutoModelForCausalLM` loads. It becomes `language_model` as it is; only
                `requires_grad` of its parameters is turned off.
            vision_tower: a SigLIP (its vision half is taken) or SigLIP vision model; as it is, and to be trained.
            placement: which quarter of the blocks is copied: `skip`, `pre` or `post`; or `replicated_layers`, indices.
            rank_pattern: LoRA ranks by name in the base, where they are not `lora_rank`.
            base_model_name_or_path, base_model_revision: Hub id and commit (or folder) under which the base will be
                found again; by default what the base itself was loaded from.
            hub_kwargs: `token`, `cache_dir` and `local_files_only` that the base was loaded with, if any: its commit
                and, at a save, its files' hashes and tokenizer are looked up with them.
        """
        check_base_model(base_model)
        check_vision_tower(vision_tower)
        check_not_offloaded((*base_model.parameters(), *vision_tower.parameters()), "the base or the vision tower")
        name, revision = resolve_base(base_model, base_model_name_or_path, base_model_revision, hub_kwargs)
        if hasattr(vision_tower.config, "vision_config"):  # a whole SigLIP: its text half is not needed
            vision_tower = vision_tower.get_submodule("vision_model")  # pyright: ignore[reportAssignmentType]
        embedding: Any = base_model.get_input_embeddings()
        config = GenieBlueConfig(
            text_config=copy.deepcopy(base_model.config.get_text_config(decoder=True)),
            vision_config=vision_tower.config,
            base_model_name_or_path=name,
            base_model_revision=revision,
            base_model_runs_remote_code=base_model.is_remote_code(),
            placement=str(placement) if replicated_layers is None else None,
            replicated_layers=replicated_layers,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            rank_pattern=rank_pattern,
            image_token_id=embedding.weight.shape[0],
            downsample_factor=downsample_factor,
        )
        with torch.device("meta"):
            model = cls(config)
        model.vision_tower = vision_tower
        model.multi_modal_projector = GenieBlueMultiModalProjector(config).to(base_model.device, base_model.dtype)
        model.multi_modal_projector.apply(model._init_weights)
        model.provenance = Provenance(access=dict(hub_kwargs or {}), base_samples=tensor_samples(base_model))
        model._attach(base_model, make_lora_config(base_model, config))
        initialize_adapter(model.multimodal_language_model, base_model.dtype)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        base_model: PreTrainedModel | str | os.PathLike | None = None,
        check_base: bool = True,
        **kwargs: Any,
    ) -> "GenieBlueForConditionalGeneration":
        """Loads a GenieBlue and the base that it names, or puts it onto a base that is already there.

        Args:
            base_model: a loaded base, which stays the caller's own object (only `requires_grad` of its parameters is
                turned off) with generation settings of its own; or the id or folder of one. By default the base that
                the repository names, at the commit that it names. A base that is loaded here gets the generation
                settings of the repository.
            check_base: compare the base with the recorded fingerprint, and refuse another one.
            kwargs: as for every `from_pretrained`; `dtype`, `device_map`, `attn_implementation`, `token`,
                `cache_dir`, `local_files_only`, `trust_remote_code` and `quantization_config` reach the base too
                (quantization only the base). A subclass that the folder asks for may know more of them.

        Raises `OSError` for missing or damaged files, `ValueError` for files or a base that do not belong together.
        """
        check_load_arguments(pretrained_model_name_or_path, base_model, kwargs)
        output_loading_info = kwargs.pop("output_loading_info", False)
        request = LoadRequest.from_arguments(pretrained_model_name_or_path, kwargs)
        settings = request.check_layout()
        request.check_weight_files(settings)
        model_class = cls._class_for(settings)
        model, loading_info = model_class._load_own_weights(request, model_args, base_model)
        base = base_model if isinstance(base_model, nn.Module) else load_base(model.config, request, base_model)
        check_not_offloaded((*model.state_dict().values(), *base.parameters()), "the vision side or the base")
        samples = request.base_samples(required=check_base)
        model.provenance = Provenance(source=request, access=request.access(), base_samples=samples)
        model._check_base(base, request, samples if check_base else None)
        lora_config = make_lora_config(base, model.config)
        check_adapter_settings(lora_config, request.adapter_settings())
        own_settings = model.generation_config
        model._attach(base, lora_config)
        if base is not base_model and request.has_generation_settings():
            model.generation_config = own_settings
        model._load_adapter(request)
        record_location(model.config, request, base, base_model)
        model.eval()
        # As everywhere in transformers the type is that of the model alone.
        return (model, loading_info) if output_loading_info else model  # pyright: ignore[reportReturnType]

    @classmethod
    def _class_for(cls, settings: dict[str, Any]) -> type["GenieBlueForConditionalGeneration"]:
        """The class that a folder with these settings is of: this one, or a subclass for settings of its own."""
        config_class = GenieBlueConfig.kind_of(settings)
        kinds = [cls]
        for kind in kinds:
            kinds += kind.__subclasses__()
        return next((kind for kind in kinds if kind.config_class is config_class), cls)

    def _attach(self, base: PreTrainedModel, lora_config: Any) -> None:
        """Registers the base and builds the multimodal view over its parameters."""
        embedding: Any = base.get_input_embeddings()
        rows, hidden_size = embedding.weight.shape
        if hidden_size != self.config.text_config.hidden_size:
            raise ValueError(
                f"The base has hidden size {hidden_size}, this GenieBlue was made for "
                f"{self.config.text_config.hidden_size}: load it onto {self.config.base_model_name_or_path}."
            )
        self._check_image_token(rows)
        view = self._build_view(base, lora_config)
        adapt_to_cache_of_generate(view)
        view.register_forward_pre_hook(mark_given_cache, with_kwargs=True)
        view.register_forward_hook(mark_returned_cache)
        self.language_model, self.multimodal_language_model = base, view
        self.config._attn_implementation_internal = base.config._attn_implementation
        self._freeze_unused()
        self._lora_config = lora_config
        self._as_built = AsBuilt(self)
        self._cache_argument = cache_argument(base.forward)
        self._embed_text = TextEmbedder(view)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        variant: str | None = None,
        token: str | bool | None = None,
        *,
        processor: Any = None,
        dtype: str | torch.dtype | None = None,
        facts: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes what GenieBlue adds (never the base) as a complete folder: weights, adapter, code, processor, card.

        The folder is built beside `save_directory` and then takes its place, so that a save that fails leaves the old
        one whole. Files in it that are not ours (your README too) stay. In a folder with Trainer's name of a
        checkpoint (`checkpoint-100`), `model.safetensors` holds all of `state_dict()` as it is in memory, the adapter
        too, so that training resumes bit by bit; `from_pretrained` loads such a folder like any other.

        Args:
            is_main_process: whether this process writes; one of several does.
            state_dict: what to write instead of the weights in memory, as FSDP gathers it; all of `state_dict()`.
            push_to_hub: publish as well; `kwargs` are those of `push_to_hub`, with `repo_id`.
            max_shard_size: files are written whole; weights that are larger are refused.
            variant: a mark in the names of the weight files, which are loaded with the same `variant`.
            token: with which the base is looked up on the Hub, and the repository written.
            processor: written along; by default the one that came with the model or, for a new model, one made from
                the base's tokenizer.
            dtype: precision of the written weights; by default that of the projector. LoRA, which is in float32 in
                memory, is written in it too.
            facts: JSON files for the card, `training_recipe.json` and `measurements.json`, see `hub_cards`; or other
                files as bytes.
        """
        kwargs = check_save_arguments(kwargs, PUSH_KEYWORDS if push_to_hub else ())
        if push_to_hub and (state_dict is not None or variant is not None):
            raise ValueError(
                "`state_dict` and `variant` are for a folder: save without `push_to_hub`, then publish it."
            )
        if not is_main_process:
            return
        save_model(
            self, save_directory, processor=processor, dtype=dtype, facts=facts, state_dict=state_dict,
            variant=variant, max_shard_size=max_shard_size, token=token,
        )  # fmt: skip
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(repo_id, processor=processor, dtype=dtype, token=token, **kwargs)

    def push_to_hub(self, repo_id: str, *, processor: Any = None, **kwargs: Any) -> Any:
        """Publishes as one commit; the base must be on the Hub itself. Returns huggingface_hub's `CommitInfo`.

        Keywords: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`, `dtype`,
        `max_shard_size`. A README that the repository already has is left as it is.
        """
        return push_model(self, repo_id, processor=processor, **check_save_arguments(kwargs, PUSH_KEYWORDS))

    # How weights are stored

    own_modules = OWN_MODULES  # what `model.safetensors` holds

    _kept_facts = (RECIPE_NAME,)  # files of facts that hold for a save of a loaded model too

    @classmethod
    def _load_own_weights(cls, request: LoadRequest, model_args: tuple, base_model: Any) -> tuple[Any, dict]:
        """A model with vision tower and projector, still without a base, and what transformers reports of its load."""
        return request.load_own_weights(super().from_pretrained, model_args, base_model)

    def _check_base(self, base: PreTrainedModel, request: LoadRequest, samples: dict[str, dict] | None) -> None:
        """`ValueError` unless `base` fits, and is the one of which `samples` were taken; `None` allows any other."""
        if samples is not None:
            check_identity(base, self.config, samples, request)

    def _load_adapter(self, request: LoadRequest) -> None:
        load_adapter(self.multimodal_language_model, request.adapter_file(), self.language_model.dtype)

    def _check_save(self, dtype: torch.dtype | None) -> torch.dtype:
        """The precision that a save is to be written in; `ValueError` if what is in memory cannot be saved so."""
        return dtype or next(self.multi_modal_projector.parameters()).dtype

    def _write_weights(
        self, folder: Path, dtype: torch.dtype, state: Mapping[str, torch.Tensor], is_checkpoint: bool
    ) -> None:
        """Vision tower, projector and adapter as files of a folder that is being saved."""
        write_trained_weights(self, folder, dtype, state, is_checkpoint)

    # Requests

    def _route(self, input_ids: torch.Tensor | None, cache: Any, view: str | None, pixel_values: Any) -> list[bool]:
        """Which rows run the multimodal view."""
        if self.language_model is None:
            raise ValueError("This GenieBlue has no base: load it by `from_pretrained`, or make one by `from_base`.")
        if not torch.compiler.is_compiling():
            # One of each part: to look at all of them would be felt in a step of decoding.
            firsts = (islice(part.parameters(), 1) for part in self.children())
            check_not_offloaded(chain.from_iterable(firsts), "this GenieBlue")
            is_training = self.training and torch.is_grad_enabled()
            if is_training or cache_view(cache) is None:  # once a request, not with each token
                self._as_built.check_request(self.language_model, is_training)
        if input_ids is None and pixel_values is not None:
            raise ValueError("`pixel_values` need `input_ids` that say where the images are.")
        has_image = [False] if input_ids is None else self._rows_with_images(input_ids, cache, pixel_values)
        return choose_views(has_image, cache, view, self.training)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        num_tiles: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        view: str | None = None,
        cache: Any = None,
        keep_logits: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """One pass; rows with image tokens run the multimodal view, other rows the base.

        Args:
            input_ids: (batch, length), with `image_token_id` repeated for the tokens of each image.
            pixel_values: (num_tiles, 3, image_size, image_size), all tiles of all images in order.
            num_tiles: (num_images,) tiles by image, as the processor returns it; checked against `pixel_values`.
            past_key_values, cache: a cache of an earlier pass *in the same view*; two names, of which one is given.
            labels: (batch, length); -100 is ignored.
            view: `"text"` or `"multimodal"` for all rows, instead of by row. In training everything is multimodal.
            keep_logits: `False`, with `labels` and for rows that all run the multimodal view, computes logits only
                where there is a label, and returns none: the same loss and gradients in less time and memory.
            kwargs: passed on to the language model.

        Raises `ValueError` when images, image tokens, view and cache do not belong together.
        """
        self._check_inputs(input_ids, pixel_values, num_tiles)
        cache = take_cache({"past_key_values": past_key_values, "cache": cache})
        is_multimodal = self._route(input_ids, cache, view, pixel_values)
        kwargs.pop("mm_token_type_ids", None)  # where the images are, which the ids say already
        inputs = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            self._cache_argument: cache, "inputs_embeds": inputs_embeds, "labels": labels, **kwargs,
        }  # fmt: skip
        inputs = {name: value for name, value in inputs.items() if value is not None}
        # The base computes its loss itself, unless another was set, which its code may not know.
        if not any(is_multimodal) and (labels is None or not hasattr(self.language_model, "_loss_function")):
            return self.language_model(**{**runtime_settings(self.config), **inputs})
        asked = runtime_settings(self.language_model.config)
        if labels is not None and cache is None:
            asked["use_cache"] = False  # nothing goes on from it, and with a cache packed samples would mix
        inputs = {**asked, **runtime_settings(self.config), **inputs}
        as_tuple = inputs.pop("return_dict", True) is False
        if labels is not None:
            inputs["labels"] = labels.masked_fill(labels == self.config.image_token_id, IGNORED)
        if all(is_multimodal):
            outputs = self._multimodal_forward(pixel_values, inputs, keep_logits)
        elif not any(is_multimodal):
            outputs = run_with_loss(self.language_model, inputs)
        else:
            outputs = self._mixed_forward(is_multimodal, pixel_values, inputs)
        return outputs.to_tuple() if as_tuple else outputs

    def _multimodal_forward(
        self, pixel_values: torch.Tensor | None, inputs: dict[str, Any], keep_logits: bool = True
    ) -> CausalLMOutputWithPast:
        return run_with_loss(self.multimodal_language_model, self._embedded(pixel_values, inputs), keep_logits)

    def _mixed_forward(
        self, is_multimodal: list[bool], pixel_values: torch.Tensor | None, inputs: dict[str, Any]
    ) -> CausalLMOutputWithPast:
        """Each part of a mixed batch in its own view, put back in order."""
        inputs = dict(inputs)
        labels, num_items = inputs.pop("labels", None), inputs.pop("num_items_in_batch", None)
        cache, rows = as_mixed_cache(take_cache(inputs), is_multimodal), split_rows(is_multimodal)

        def part(view: str) -> dict[str, Any]:
            taken = take_rows(inputs, rows[view])
            return taken if cache[view] is None else {**taken, self._cache_argument: cache[view]}

        text = self.language_model(**part(TEXT), return_dict=True)
        images = self._images_of_rows(pixel_values, rows[MULTIMODAL])
        multimodal = self._multimodal_forward(images, part(MULTIMODAL))
        for view, outputs in ((TEXT, text), (MULTIMODAL, multimodal)):
            cache[view] = getattr(outputs, cache_field(outputs))
        merged = merge_rows(text, multimodal, rows)
        return CausalLMOutputWithPast(
            loss=None if labels is None else loss_of(self.language_model, merged["logits"], labels, num_items),
            **{CACHE: cache if cache[TEXT] is not None else None},
            **merged,
        )

    @property
    def base_model(self) -> GenieBlueBackbone:
        """All but the LM head: a module whose output has `last_hidden_state`."""
        return GenieBlueBackbone(self)


GenieBlueForConditionalGeneration.register_for_auto_class("AutoModel")
