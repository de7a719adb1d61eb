"""`generate` of a GenieBlue: runs each row in its view, with that view's own `generate`."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

from .compat_genieblue import CACHE, take_cache
from .view_routing_genieblue import (
    MULTIMODAL,
    TEXT,
    as_mixed_cache,
    join_sequences,
    split_rows,
    take_rows,
)

# What of `generate` works from the prompt's ids, and the value with which it does nothing. Where embeddings are given,
# as for a row with images, transformers ignores these or answers from the ids alone.
WORKS_FROM_IDS = {
    "assistant_model": None, "assistant_early_exit": None, "prompt_lookup_num_tokens": None, "use_mtp": False,
    "is_assistant": False, "speculation_type": None, "penalty_alpha": 0, "dola_layers": None, "num_beam_groups": 1,
    "constraints": None, "force_words_ids": None, "guidance_scale": 1, "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0, "token_healing": False, "prefill_chunk_size": None, "custom_generate": None,
}  # fmt: skip
# What has no meaning for a batch that is generated in two parts.
NEEDS_ONE_VIEW = ("return_dict_in_generate", "streamer", "prefix_allowed_tokens_fn")


class GenieBlueGenerationMixin(GenerationMixin):
    """Routes generation to the two views; to be mixed into the model class."""

    config: Any
    language_model: Any
    multimodal_language_model: Any
    embed_request: Callable[[torch.Tensor, Any], torch.Tensor]
    _cache_argument: str
    _route: Callable[..., list[bool]]
    _check_inputs: Callable[..., None]
    _images_of_rows: Callable[..., Any]

    @property
    def generation_config(self) -> GenerationConfig:
        """The generation configuration of both views: the base's own object, once there is a base."""
        base = getattr(self, "language_model", None)
        return self._generation_config if base is None else base.generation_config

    @generation_config.setter
    def generation_config(self, generation_config: GenerationConfig) -> None:
        if getattr(self, "language_model", None) is None:
            self._generation_config = generation_config
        else:
            self.language_model.generation_config = generation_config

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        pixel_values: torch.FloatTensor | None = None,
        num_tiles: torch.LongTensor | None = None,
        view: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate` of the view that each row runs; text requests are the base's own `generate`.

        Args:
            inputs: prompt ids (batch, length), also as `input_ids`; image tokens in their places.
            generation_config, kwargs: everything that `generate` of the base takes.
            pixel_values, num_tiles, view: as in `forward`.

        Returns what `generate` returns: ids (batch * num_return_sequences, length) with the prompt, or an output
        object. A batch that mixes texts and images is generated in two parts, and gives ids only.

        Raises `ValueError`, before anything runs, for what cannot be right for rows with images (`WORKS_FROM_IDS`).
        """
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        kwargs.pop("mm_token_type_ids", None)  # where the images are, which the ids say already
        self._check_inputs(input_ids, pixel_values, num_tiles)
        if (cache := take_cache(kwargs)) is not None:
            kwargs[CACHE] = cache
        is_multimodal = self._route(input_ids, cache, view, pixel_values)
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        elif misplaced := self.config._get_generation_parameters():
            raise ValueError(f"`model.config` sets {misplaced}, which no view reads: set it on `generation_config`.")
        if any(is_multimodal):
            self._refuse_for_images(input_ids, kwargs)
        if all(is_multimodal):
            return self._multimodal_generate(input_ids, pixel_values, **kwargs)
        if any(is_multimodal):
            return self._mixed_generate(is_multimodal, input_ids, pixel_values, **kwargs)
        return self.language_model.generate(input_ids, **kwargs)

    def _setting(self, name: str, kwargs: dict[str, Any]) -> Any:
        """A setting as transformers finds it: in the call, in the configuration given there, in the model's."""
        if name in kwargs:
            return kwargs[name]
        given = getattr(kwargs.get("generation_config"), name, None)
        return getattr(self.generation_config, name, None) if given is None else given

    def _refuse_for_images(self, input_ids: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
        """`ValueError` for settings that would lose what images show."""
        has_images = input_ids is not None and bool((input_ids == self.config.image_token_id).any())
        if not has_images and kwargs.get("inputs_embeds") is None:
            return
        if has_images and kwargs.get("inputs_embeds") is not None:
            raise ValueError("`inputs_embeds` are given beside ids with image tokens: give the ids and the pixels.")
        for name, neutral in WORKS_FROM_IDS.items():
            value = self._setting(name, kwargs)
            if value is not None and value != neutral:
                raise ValueError(
                    f"`{name}` works from the ids of the prompt, which do not hold what an image shows: leave it out "
                    "(or set it to None) for rows with images. Rows of text take it in a call of their own."
                )
        if kwargs.get("cache_implementation") == "paged":
            raise ValueError("Continuous batching (a paged cache) takes no images: leave `cache_implementation` out.")

    def _multimodal_generate(self, input_ids: torch.Tensor | None, pixel_values: Any, **kwargs: Any) -> Any:
        if input_ids is None or not bool((input_ids == self.config.image_token_id).any()):
            return self.multimodal_language_model.generate(input_ids, **kwargs)
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = self._inferred_attention_mask(input_ids, kwargs)
        if kwargs.get(CACHE) is None:
            mask = kwargs["attention_mask"]
            input_ids, kwargs["attention_mask"] = padded_on_the_left(mask, input_ids, mask)
        prompt = self._ids_for_processors(input_ids)
        if kwargs.get("streamer") is not None:
            is_text = input_ids[0] != self.config.image_token_id  # a streamer takes one row
            kwargs["streamer"] = _StreamerOfText(kwargs["streamer"], input_ids[:, is_text])
        cache = kwargs.get(CACHE)
        cached_length = 0 if cache is None else int(cache.get_seq_length())
        inputs_embeds = self._embed_from(cached_length, input_ids, pixel_values)
        if cached_length:
            self._prefill_all_but_last(inputs_embeds, input_ids, cache, kwargs["attention_mask"])
        else:
            kwargs["inputs_embeds"] = inputs_embeds
        outputs = self.multimodal_language_model.generate(prompt, **kwargs)
        sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        per_row = len(sequences) // len(input_ids)
        sequences[:, : input_ids.shape[1]] = input_ids.repeat_interleave(per_row, dim=0)
        return outputs

    def _embed_from(self, cached_length: int, input_ids: torch.Tensor, pixel_values: Any) -> torch.Tensor:
        """Embeddings of what follows `cached_length` cached tokens, whose images need not be given again."""
        new_ids = input_ids[:, cached_length:]
        image_tokens = (new_ids == self.config.image_token_id).sum()
        given = 0 if pixel_values is None else len(pixel_values) * self.config.image_seq_length
        if image_tokens == given:
            return self.embed_request(new_ids, pixel_values)
        return self.embed_request(input_ids, pixel_values)[:, cached_length:]

    def _prefill_all_but_last(
        self, inputs_embeds: torch.Tensor, input_ids: torch.Tensor, cache: Any, attention_mask: torch.Tensor
    ) -> None:
        """Runs the new tokens of a cached conversation but the last, from which `generate` goes on by its id.

        Some remote-code bases look at ids only once there is a cache, so the new images cannot be left to them.
        """
        if inputs_embeds.shape[1] == 0 or bool((input_ids[:, -1] == self.config.image_token_id).any()):
            raise ValueError(
                "A conversation that goes on from a cache must bring new tokens and end in text: add the turn's text "
                "behind its images, or generate without `past_key_values`."
            )
        if inputs_embeds.shape[1] == 1:
            return
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] : -1]
        self.multimodal_language_model(
            inputs_embeds=inputs_embeds[:, :-1],
            attention_mask=attention_mask[:, :-1],
            position_ids=positions,
            use_cache=True,
            **{self._cache_argument: cache},
        )

    def _ids_for_processors(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids for the logits processors, which index the scores by them and must not meet an id past the vocabulary.

        Image tokens become the row's first text token, so that a repetition penalty sees no token that is not there.
        """
        is_image = input_ids == self.config.image_token_id
        first_text = (~is_image).int().argmax(dim=1, keepdim=True)
        stand_in = input_ids.gather(1, first_text).masked_fill(is_image.gather(1, first_text), 0)
        return torch.where(is_image, stand_in, input_ids)

    def _inferred_attention_mask(self, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The mask that transformers infers from padding for a prompt without one; image tokens are never padding."""
        pad, eos = self._setting("pad_token_id", kwargs), self._setting("eos_token_id", kwargs)
        eos = eos if isinstance(eos, list | tuple) else [eos]
        if pad is None or pad in eos or not bool((input_ids == pad).any()):
            return torch.ones_like(input_ids)
        return (input_ids != pad).to(input_ids.dtype)

    def _mixed_generate(
        self, is_multimodal: list[bool], input_ids: torch.Tensor, pixel_values: Any, **kwargs: Any
    ) -> torch.Tensor:
        for name in NEEDS_ONE_VIEW:
            if self._setting(name, kwargs):
                raise ValueError(
                    "A batch of texts and images is generated in two views, one after the other, which have no common "
                    f"scores, caches and rows: leave `{name}` out, or generate the two kinds of rows apart."
                )
        cache = as_mixed_cache(kwargs.pop(CACHE, None), is_multimodal)
        rows = split_rows(is_multimodal)

        def part(view: str) -> dict[str, Any]:
            taken = take_rows(kwargs, rows[view])
            return taken if cache[view] is None else {**taken, CACHE: cache[view]}

        text = self.language_model.generate(input_ids[rows[TEXT]], **part(TEXT))
        images = self._images_of_rows(pixel_values, rows[MULTIMODAL])
        multimodal = self._multimodal_generate(input_ids[rows[MULTIMODAL]], images, **part(MULTIMODAL))
        pad = self._setting("pad_token_id", kwargs)
        if pad is None:
            eos = self._setting("eos_token_id", kwargs)
            pad = eos[0] if isinstance(eos, list | tuple) else eos
        return join_sequences(text, multimodal, rows, 0 if pad is None else int(pad))


def padded_on_the_left(mask: torch.Tensor, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows (batch, length) whose padding, by `mask` of the same shape, is moved to the left, where generation needs
    it: pipelines pad as the tokenizer is set."""
    if mask.ndim != 2 or bool(mask[:, -1].all()):
        return rows
    order = mask.argsort(dim=1, stable=True)
    return tuple(each.gather(1, order.to(each.device)) for each in rows)


class _StreamerOfText:
    """A streamer that is given the prompt without its image tokens, which have no text; otherwise as it was."""

    def __init__(self, streamer: Any, prompt: torch.Tensor):
        self._streamer, self._prompt = streamer, prompt

    def put(self, value: torch.Tensor) -> None:
        if self._prompt is not None:
            value, self._prompt = self._prompt.cpu(), None
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()
