"""A conversation with a GenieBlue: images at any turn, and a cache that is kept for as long as it may be."""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import CompileConfig, StaticCache, TextStreamer

from conversion.chat_ids import answer_text
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor
from modeling_genieblue.compat_genieblue import cache_field
from modeling_genieblue.image_reading_genieblue import read_image
from modeling_genieblue.placeholders_genieblue import TextWithImages
from modeling_genieblue.view_routing_genieblue import MULTIMODAL, TEXT

logger = logging.getLogger(__name__)


class Conversation(ABC):
    """Keeps the messages of a conversation; what answers them is the subclass's.

    While there is no image, turns run the text view on the base's own cache. From the first image on the whole
    conversation runs the multimodal view: it is prefilled again once, and then goes on from a cache of that view.
    A model without a chat template only completes what it is given, each prompt on its own.
    """

    tensors = "pt"  # what the processor is to give

    def __init__(self, processor: GenieBlueProcessor):
        self.processor = processor
        self.reset()

    @property
    def completes_only(self) -> bool:
        """Whether there is no chat template: prompts are completed, and nothing is remembered between them."""
        return self.processor.chat_template is None

    def reset(self) -> None:
        """Begins a new conversation."""
        self.messages: list[dict[str, Any]] = []
        self._forget_cache()

    def ask(
        self,
        prompt: str,
        images: Sequence[Any] = (),
        *,
        view: str | None = None,
        max_new_tokens: int = 512,
        on_text: Callable[[str], None] | None = None,
        **drawing: Any,
    ) -> dict[str, Any]:
        """One turn; returns `{"text", "view", "prompt_tokens", "generated_tokens"}`.

        Args:
            images: what the processor takes: paths, addresses, PIL images, arrays. They stay in the conversation.
            view: `"multimodal"` to run a text-only conversation in that view too; chosen by the images by default.
            on_text: called with each piece of the answer as soon as it is there.
            drawing: how tokens are chosen, where there is a choice; see the subclass.

        A turn that fails or is interrupted leaves the conversation as it was.
        """
        if not prompt.strip() and not images:
            raise ValueError("The prompt is empty: ask something, or show an image.")
        if max_new_tokens < 1:
            raise ValueError(f"Got max_new_tokens {max_new_tokens}: expected at least 1.")
        parts = [{"type": "image", "image": read_image(image, index)} for index, image in enumerate(images)]
        content = [*parts, {"type": "text", "text": prompt}] if parts else prompt
        messages = [*self.messages, {"role": "user", "content": content}]
        inputs = self._encode(messages)
        ids: list[int] = inputs["input_ids"][0].tolist()
        streamer = None if on_text is None else _TextPieces(self.processor.tokenizer, on_text)
        answer_ids, running_view = self._answer(
            ids, inputs.get("pixel_values"), view=view, max_new_tokens=max_new_tokens, streamer=streamer, **drawing
        )
        if running_view == MULTIMODAL and not self.completes_only:
            text = answer_text(self.processor, messages, answer_ids)
        else:  # as the base writes it
            text = self.processor.tokenizer.decode(answer_ids, skip_special_tokens=True)
        if self.completes_only:
            self._forget_cache()
        else:
            self.messages = [*messages, {"role": "assistant", "content": text}]
        return {
            "text": text,
            "view": running_view,
            "prompt_tokens": len(ids),
            "generated_tokens": len(answer_ids),
        }

    @abstractmethod
    def _answer(self, ids: list[int], pixel_values: Any, **settings: Any) -> tuple[list[int], str]:
        """Ids of the answer to `ids`, and the view that gave it; keeps its cache, or forgets it if that fails."""

    def _forget_cache(self) -> None:
        self._cache: Any = None
        self._cached_ids: list[int] = []
        self._cached_view: str | None = None

    def _shared_with_cache(self, ids: list[int], view: str) -> int:
        """How many of the cached tokens begin `ids`; 0 if the cache is of no use for them."""
        if self._cache is None or self._cached_view != view:
            return 0
        shared = 0
        for cached, wanted in zip(self._cached_ids, ids[:-1], strict=False):  # one token at least must be new
            if cached != wanted:
                break
            shared += 1
        image_token = self.processor.image_token_id
        in_image = shared > 0 and ids[shared - 1] == image_token == ids[shared]
        return 0 if in_image else shared

    def _new_pixels(self, pixel_values: Any, new_ids: list[int]) -> Any:
        """The tiles of images that are not in the cache: they are the last ones."""
        count = new_ids.count(self.processor.image_token_id) // self.processor.image_seq_length
        return None if count == 0 else pixel_values[-count:]

    def _encode(self, messages: list[dict[str, Any]]) -> Any:
        if not self.completes_only:
            return self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors=self.tensors
            )
        content = messages[-1]["content"]
        if isinstance(content, str):
            return self.processor(content, return_tensors=self.tensors)
        *image_parts, text_part = content
        pieces = ["", *["\n"] * (len(image_parts) - 1), f"\n{text_part['text']}"]
        return self.processor(
            TextWithImages(pieces, self.processor.image_token),
            images=[part["image"] for part in image_parts],
            add_special_tokens=True,  # no template writes them
            return_tensors=self.tensors,
        )


class Chat(Conversation):
    """A conversation with a model in PyTorch.

    With `compile` each step of decoding is compiled by `torch.compile`, over a cache of a fixed size, whose room is
    doubled when a conversation outgrows it. The first answers take longer then, and longer ones are faster.
    """

    def __init__(
        self, model: GenieBlueForConditionalGeneration, processor: GenieBlueProcessor, *, compile: bool = False
    ):
        self.model = model
        self._compiling = _compiling() if compile else {}
        self._room = SMALLEST_ROOM
        super().__init__(processor)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike,
        *,
        base_model: Any = None,
        trust_remote_code: bool = False,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        compile: bool = False,
        **hub_kwargs: Any,
    ) -> "Chat":
        """A chat with a saved GenieBlue (folder or Hub id), run by the installed package and not by the repo's code.

        Args:
            base_model: a loaded base, or the folder or Hub id of it; by default the one that the model names.
            trust_remote_code: allows code of the base's repository to run.
            compile: compiles decoding, see the class.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.
        """
        hub_kwargs = {key: value for key, value in hub_kwargs.items() if value is not None}
        hub_kwargs["trust_remote_code"] = trust_remote_code
        loaded = GenieBlueForConditionalGeneration.from_pretrained(
            model, base_model=base_model, dtype=dtype, **hub_kwargs
        )
        if device is not None:
            loaded.to(device)
        return cls(loaded, GenieBlueProcessor.from_pretrained(model, **hub_kwargs), compile=compile)

    def _answer(
        self,
        ids: list[int],
        pixel_values: Any,
        *,
        view: str | None,
        max_new_tokens: int,
        streamer: Any,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> tuple[list[int], str]:
        """`temperature` 0 takes the likeliest token each time, more than 0 draws from the likelier `top_p`."""
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"Got temperature {temperature} and top_p {top_p}: expected at least 0, and above 0 to 1."
            )
        length = len(ids) + max_new_tokens
        self._warn_of_length(length)
        if self._compiling and length > self._room:
            self._room = 1 << (length - 1).bit_length()
            self._forget_cache()
        running_view = view or (MULTIMODAL if self.processor.image_token_id in ids else TEXT)
        cached = self._crop_cache(ids, running_view)
        cache = self._cache
        if self._compiling and cache is None:
            cache = StaticCache(config=self.model.language_model.config, max_cache_len=self._room)
        self._forget_cache()  # whatever goes wrong from here on, it is not to be used again
        outputs = self._generate(
            ids,
            self._new_pixels(pixel_values, ids[cached:]),
            past_key_values=cache,
            view=view,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            **self._compiling,
            **({"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else GREEDY),
        )
        sequence = outputs.sequences[0].tolist()
        self._cache, self._cached_view = getattr(outputs, cache_field(outputs)), running_view
        self._cached_ids = sequence[: int(self._cache.get_seq_length())] if self._cache is not None else []
        return sequence[len(ids) :], running_view

    def _crop_cache(self, ids: list[int], view: str) -> int:
        """Cuts the cache down to what it has in common with `ids`; returns how many tokens that are."""
        shared = self._shared_with_cache(ids, view)
        if shared == 0:
            self._forget_cache()
        elif shared < len(self._cached_ids):  # a template may write an old answer in another way than it was generated
            try:
                self._cache.crop(shared - len(self._cached_ids))
            except (RuntimeError, AttributeError, ValueError) as error:  # sliding windows forget what they would need
                logger.debug("The conversation is prefilled again: %s", error)
                self._forget_cache()
                return 0
        return shared

    def _generate(self, ids: list[int], pixel_values: torch.Tensor | None, **kwargs: Any) -> Any:
        input_ids = torch.tensor([ids], device=self.model.language_model.device)
        if self.model.generation_config.pad_token_id is None:
            kwargs["pad_token_id"] = 0  # a single row is never padded; this only keeps `generate` from saying so
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name in GREEDY}
        return self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            pixel_values=pixel_values,
            return_dict_in_generate=True,
            num_beams=1,  # whatever the base's generation config says: beams cannot be streamed
            **kwargs,
        )

    def _warn_of_length(self, length: int) -> None:
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            logger.warning("The conversation may grow to %d tokens, the base was made for %d.", length, limit)


# Without these a base whose own settings are for sampling would warn that they have no effect.
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


SMALLEST_ROOM = 1024  # tokens; each other room is compiled for anew


def _compiling() -> dict[str, Any]:
    config = CompileConfig()
    config._compile_all_devices = True  # transformers compiles on accelerators alone otherwise
    return {"compile_config": config}


class _TextPieces(TextStreamer):
    """Hands over pieces of whole words as they are generated."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


__all__ = ["Chat", "Conversation"]
