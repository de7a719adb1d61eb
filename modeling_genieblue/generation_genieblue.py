"""`generate` of a GenieBlue: each row in the view that it runs, by transformers' own `generate` of that view."""

from typing import Any

import torch
from transformers import GenerationMixin

from .view_routing_genieblue import MULTIMODAL, TEXT, as_mixed_cache, check_inputs, join_sequences, take_rows


class GenieBlueGenerationMixin(GenerationMixin):
    """Routes generation to the two views; to be mixed into the model class."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        *,
        pixel_values: torch.FloatTensor | None = None,
        num_tiles: torch.LongTensor | None = None,
        view: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate` of the view that each row runs; text requests are the base's own `generate`.

        Args:
            inputs: prompt ids (batch, length), also as `input_ids`; image tokens in their places.
            pixel_values, num_tiles, view: as in `forward`.
            kwargs: everything that `generate` of the base takes.

        Returns what `generate` returns: ids (batch * num_return_sequences, length) with the prompt, or an output
        object. A batch that mixes texts and images is generated in two parts, and gives ids only.
        """
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        check_inputs(input_ids, pixel_values, num_tiles)
        is_multimodal = self._route(input_ids, kwargs.get("past_key_values"), view, pixel_values)
        if not _same_generation_config(self.generation_config, self.language_model.generation_config):
            kwargs.setdefault("generation_config", self.generation_config)
        if is_multimodal.all():
            return self._multimodal_generate(input_ids, pixel_values, **kwargs)
        if is_multimodal.any():
            return self._mixed_generate(is_multimodal, input_ids, pixel_values, **kwargs)
        return self.language_model.generate(input_ids, **kwargs)

    def _multimodal_generate(self, input_ids: torch.Tensor | None, pixel_values: Any, **kwargs: Any) -> Any:
        if input_ids is None:
            return self.multimodal_language_model.generate(**kwargs)
        prompt = self._ids_for_processors(input_ids)
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = self._inferred_attention_mask(input_ids, kwargs)
        if kwargs.get("streamer") is not None:
            is_text = input_ids[0] != self.config.image_token_id  # a streamer takes one row
            kwargs["streamer"] = _StreamerOfText(kwargs["streamer"], input_ids[:, is_text])
        cache = kwargs.get("past_key_values")
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
            past_key_values=cache,
            use_cache=True,
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
        config = kwargs.get("generation_config") or self.generation_config
        pad = kwargs.get("pad_token_id", config.pad_token_id)
        eos = kwargs.get("eos_token_id", config.eos_token_id)
        eos = eos if isinstance(eos, list | tuple) else [eos]
        if pad is None or pad in eos or not bool((input_ids == pad).any()):
            return torch.ones_like(input_ids)
        return (input_ids != pad).to(input_ids.dtype)

    def _mixed_generate(
        self, is_multimodal: torch.Tensor, input_ids: torch.Tensor, pixel_values: Any, **kwargs: Any
    ) -> torch.Tensor:
        config = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("return_dict_in_generate", config.return_dict_in_generate):
            raise ValueError(
                "A batch of texts and images is generated in two views, which have no common scores and caches: leave "
                "`return_dict_in_generate` out, or generate the two kinds of rows one after the other."
            )

        cache = as_mixed_cache(kwargs.pop("past_key_values", None), is_multimodal)

        def part(view: str, rows: torch.Tensor) -> dict[str, Any]:
            taken = take_rows(kwargs, rows)
            return taken if cache[view] is None else {**taken, "past_key_values": cache[view]}

        rows = is_multimodal.to(input_ids.device)
        text = self.language_model.generate(input_ids[~rows], **part(TEXT, ~is_multimodal))
        multimodal = self._multimodal_generate(input_ids[rows], pixel_values, **part(MULTIMODAL, is_multimodal))
        pad = kwargs.get("pad_token_id", config.pad_token_id)
        if pad is None:
            eos = kwargs.get("eos_token_id", config.eos_token_id)
            pad = eos[0] if isinstance(eos, list | tuple) else eos
        return join_sequences(text, multimodal, is_multimodal, 0 if pad is None else int(pad))


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


def _same_generation_config(first: Any, second: Any) -> bool:
    ignored = ("transformers_version", "_from_model_config")
    one, other = ({k: v for k, v in config.to_dict().items() if k not in ignored} for config in (first, second))
    return one == other


__all__ = ["GenieBlueGenerationMixin"]
