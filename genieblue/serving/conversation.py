"""A conversation with a GenieBlue: images in any turn, and the KV cache is reused wherever possible."""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import CompileConfig, StaticCache, TextStreamer

from conversion.chat_ids import decoded_frame
from conversion.vlm_chat_ids import VlmChatFormat
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor
from modeling_genieblue.chat_messages_genieblue import image_sources
from modeling_genieblue.compat_genieblue import CACHE, takes_cache_of_generate
from modeling_genieblue.image_reading_genieblue import read_image
from modeling_genieblue.placeholders_genieblue import TextWithImages
from modeling_genieblue.view_routing_genieblue import MULTIMODAL, TEXT
from modeling_genieblue.vlm_modeling_genieblue import IMAGE_INPUTS, ROW_INPUTS

logger = logging.getLogger(__name__)


class Conversation(ABC):
    """Keeps the messages of a conversation; a subclass generates the answers.

    Until the first image, turns run the text view with the base's own cache. Then the whole conversation is prefilled
    once in the multimodal view and continues with that view's cache. A model without a chat template completes each
    prompt on its own.
    """

    tensors = "pt"  # the processor's `return_tensors`

    def __init__(self, processor: GenieBlueProcessor):
        self.processor = processor
        self.reset()

    @property
    def completes_only(self) -> bool:
        """Whether there is no chat template: each prompt is completed on its own, without history."""
        return self.processor.chat_template is None

    def reset(self) -> None:
        """Starts a new conversation."""
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
            images: anything the processor accepts: paths, URLs, PIL images, arrays. They stay in the conversation.
            view: `"multimodal"` to run a text-only conversation in that view; by default the images decide.
            on_text: called with each piece of the answer as soon as it is generated.
            drawing: sampling settings, see the subclass.

        A turn that fails or is interrupted does not change the conversation.
        """
        if not prompt.strip() and not images:
            raise ValueError("The prompt is empty: give a text or an image.")
        if max_new_tokens < 1:
            raise ValueError(f"Got max_new_tokens {max_new_tokens}: expected at least 1.")
        parts = [{"type": "image", "image": read_image(image, index)} for index, image in enumerate(images)]
        content = [*parts, {"type": "text", "text": prompt}] if parts else prompt
        messages = [*self.messages, {"role": "user", "content": content}]
        inputs = self._encode(messages)
        ids: list[int] = inputs["input_ids"][0].tolist()
        view = view or (MULTIMODAL if image_sources(messages) else TEXT)
        # The text view's answers are shown as the base generates them.
        is_framed = view == MULTIMODAL and not self.completes_only
        chat_format = self._format(messages)
        before, after = decoded_frame(chat_format, messages) if is_framed else ("", "")
        streamer = None if on_text is None else _TextPieces(chat_format.tokenizer, on_text, before, after)
        answer_ids = self._answer(
            ids, self._pixels(inputs), view=view, max_new_tokens=max_new_tokens, streamer=streamer, **drawing
        )
        text = chat_format.tokenizer.decode(answer_ids, skip_special_tokens=True)
        text = text.removeprefix(before).removesuffix(after)
        if self.completes_only:
            self._forget_cache()
        else:
            self.messages = [*messages, {"role": "assistant", "content": text}]
        return {
            "text": text,
            "view": view,
            "prompt_tokens": len(ids),
            "generated_tokens": len(answer_ids),
        }

    @abstractmethod
    def _answer(self, ids: list[int], pixel_values: Any, **settings: Any) -> list[int]:
        """Ids of the answer to `ids`; keeps the cache unless generation fails."""

    def _format(self, messages: list[dict[str, Any]]) -> Any:
        """What formats and decodes a chat, as `chat_ids` asks a processor."""
        return self.processor

    @staticmethod
    def _pixels(inputs: Any) -> Any:
        """What shows images among a request's inputs."""
        return inputs.get("pixel_values")

    def _forget_cache(self) -> None:
        self._cache: Any = None
        self._cached_ids: list[int] = []
        self._cached_view: str | None = None

    def _shared_with_cache(self, ids: list[int], view: str) -> int:
        """Number of cached tokens that are a prefix of `ids`; 0 if the cache cannot be used."""
        if self._cache is None or self._cached_view != view:
            return 0
        shared = 0
        for cached, wanted in zip(self._cached_ids, ids[:-1], strict=False):  # at least one token must be new
            if cached != wanted:
                break
            shared += 1
        return 0 if shared > 0 and self._is_in_image(ids[shared - 1 : shared + 1]) else shared

    def _is_in_image(self, ids: list[int]) -> bool:
        """Whether two tokens are of one image."""
        return ids[0] == self.processor.image_token_id == ids[1]

    def _new_pixels(self, pixel_values: Any, new_ids: list[int]) -> Any:
        """The tiles of images that are not in the cache, which are the last ones."""
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
            add_special_tokens=True,  # there is no template to add them
            return_tensors=self.tensors,
        )


class Chat(Conversation):
    """A conversation with a PyTorch model.

    With `compile`, decoding steps run through `torch.compile` with a fixed-size cache, which doubles when a
    conversation outgrows it. The first answers are slower, longer ones are faster.
    """

    def __init__(
        self, model: GenieBlueForConditionalGeneration, processor: GenieBlueProcessor, *, compile: bool = False
    ):
        self.model = model
        self._compiling = _compiling() if compile else {}
        self._room = SMALLEST_CACHE
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
        """A chat with a saved GenieBlue (folder or Hub id), run by the installed package, not by the repo's code.

        Args:
            base_model: a loaded base, or its folder or Hub id; by default the recorded base.
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
        has_vlm = getattr(loaded.config, "vlm_config", None) is not None
        kind = VlmChat if has_vlm else cls
        return kind(loaded, loaded.processor_class.from_pretrained(model, **hub_kwargs), compile=compile)

    def _answer(
        self,
        ids: list[int],
        pixel_values: Any,
        *,
        view: str,
        max_new_tokens: int,
        streamer: Any,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> list[int]:
        """`temperature` 0 decodes greedily; above 0 it samples from the `top_p` nucleus."""
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"Got temperature {temperature} and top_p {top_p}: expected temperature >= 0 and 0 < top_p <= 1."
            )
        length = len(ids) + max_new_tokens
        self._warn_of_length(length)
        if self._compiling and length > self._room:
            self._room = 1 << (length - 1).bit_length()
            self._forget_cache()
        cached = self._crop_cache(ids, view)
        cache = self._cache
        if self._compiling and cache is None:
            cache = StaticCache(config=self.model.language_model.config, max_cache_len=self._room)
        self._forget_cache()  # if anything fails from here on, the cache is invalid
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
        module = self.model.multimodal_language_model if view == MULTIMODAL else self.model.language_model
        if takes_cache_of_generate(module):  # else each turn is prefilled anew, as by the base alone
            self._cache, self._cached_view = getattr(outputs, CACHE), view
        self._cached_ids = sequence[: int(self._cache.get_seq_length())] if self._cache is not None else []
        return sequence[len(ids) :]

    def _crop_cache(self, ids: list[int], view: str) -> int:
        """Crops the cache to the prefix it shares with `ids`; returns the length of that prefix."""
        shared = self._shared_with_cache(ids, view)
        if shared == 0:
            self._forget_cache()
        elif shared < len(
            self._cached_ids
        ):  # a template may render an earlier answer differently from how it was generated
            try:
                self._cache.crop(shared - len(self._cached_ids))
            except (RuntimeError, AttributeError, ValueError) as error:  # sliding windows cannot be cropped
                logger.debug("The conversation is prefilled again: %s", error)
                self._forget_cache()
                return 0
        return shared

    def _generate(self, ids: list[int], pixel_values: torch.Tensor | None, **kwargs: Any) -> Any:
        input_ids = torch.tensor([ids], device=self.model.language_model.device)
        if self.model.generation_config.pad_token_id is None:
            kwargs["pad_token_id"] = 0  # a single row is never padded; this only silences a warning
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name in GREEDY}
        return self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            pixel_values=pixel_values,
            return_dict_in_generate=True,
            num_beams=1,  # overrides the base's generation config: beams cannot be streamed
            **kwargs,
        )

    def _warn_of_length(self, length: int) -> None:
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            logger.warning("The conversation may reach %d tokens, but the base supports only %d.", length, limit)


class VlmChat(Chat):
    """A conversation with a GenieBlue whose images run a VLM, by the VLM's own processor.

    Text is the base's, with its cache. From the first image on, each turn is prefilled anew: some VLMs keep the
    positions of images beside the cache.
    """

    def __init__(self, model: Any, processor: Any, *, compile: bool = False):
        if compile:
            raise ValueError("Decoding of a GenieBlue with a VLM cannot be compiled here: leave out `compile`.")
        super().__init__(model, processor)

    def _encode(self, messages: list[dict[str, Any]]) -> Any:
        if image_sources(messages) and self.processor.vlm_processor.chat_template is None:
            raise ValueError(
                "The VLM has no chat template, so a chat with images cannot be formatted: set "
                "`processor.vlm_processor.chat_template`."
            )
        if image_sources(messages) and self.completes_only:
            raise ValueError("The base has no chat template, so there are no chats with images.")
        return super()._encode(messages)

    def _format(self, messages: list[dict[str, Any]]) -> Any:
        return VlmChatFormat(self.processor, image_sources(messages))

    @staticmethod
    def _pixels(inputs: Any) -> Any:
        shown = {name: value for name, value in inputs.items() if name in (*IMAGE_INPUTS, *ROW_INPUTS)}
        return shown if "pixel_values" in shown else None

    def _answer(self, ids: list[int], pixel_values: Any, *, view: str, **settings: Any) -> list[int]:
        if view == MULTIMODAL and pixel_values is None:
            raise ValueError("Text runs the base of this GenieBlue: its VLM is asked with an image only.")
        if pixel_values is not None:
            device = self.model.language_model.device
            pixel_values = {name: value.to(device) for name, value in pixel_values.items()}
        return super()._answer(ids, pixel_values, view=view, **settings)

    def _new_pixels(self, pixel_values: Any, new_ids: list[int]) -> Any:
        return pixel_values

    def _crop_cache(self, ids: list[int], view: str) -> int:
        if view == MULTIMODAL:
            self._forget_cache()
        return super()._crop_cache(ids, view)

    def _is_in_image(self, ids: list[int]) -> bool:
        return False  # a base may have the VLM's image token as a word


# Without these, a base with sampling settings would warn that they have no effect.
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


SMALLEST_CACHE = 1024  # tokens; every other size needs recompilation


def _compiling() -> dict[str, Any]:
    config = CompileConfig()
    config._compile_all_devices = True  # otherwise transformers compiles on accelerators only
    return {"compile_config": config}


class _TextPieces(TextStreamer):
    """Passes on whole words as they are generated, without the template's text `before` and `after` the answer."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], before: str, after: str):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text, self._before, self._after = on_text, before, after
        self._held = ""  # may be the beginning of `before` or `after`

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._held += text
        if not stream_end and self._before and self._before.startswith(self._held):
            return
        self._held, self._before = self._held.removeprefix(self._before), ""
        if stream_end:
            ready = self._held.removesuffix(self._after)
        else:
            starts = range(max(0, len(self._held) - len(self._after)), len(self._held) + 1)
            ready = self._held[: next(start for start in starts if self._after.startswith(self._held[start:]))]
        self._held = self._held[len(ready) :]
        if ready:
            self._on_text(ready)
