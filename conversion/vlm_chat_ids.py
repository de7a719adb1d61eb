"""Token ids of a chat with images as a VLM's own processor makes them, identical in training and inference."""

from collections.abc import Sequence
from typing import Any

import torch

from conversion.chat_ids import ChatRow, answer_ids, chat_rows
from modeling_genieblue.chat_messages_genieblue import image_sources


class VlmChatFormat:
    """A chat's images and its VLM's processor, in the place of the processor that `chat_ids` asks.

    Prompts are exactly what the processor's `apply_chat_template` makes of them for `generate`. Without images, the
    chat is the base's.
    """

    def __init__(self, processor: Any, images: Sequence[Any] = ()):
        """`processor` is that of a GenieBlue with a VLM; `images` are those of the image parts, in order."""
        self._processor, self._images = processor, list(images)
        self.tokenizer = processor.vlm_processor.tokenizer if self._images else processor.tokenizer
        self._prompt, self._prompt_ids = "", []
        self._prompts: list[tuple[list[int], dict[str, torch.Tensor]]] = []  # ids, and all inputs as a batch of one

    def rows(self, messages: list[dict[str, Any]], stop_ids: Sequence[int]) -> list[ChatRow]:
        """`chat_rows` of the chat; `inputs_of` gives the images of each."""
        return chat_rows(self, messages, (), stop_ids)

    def answer(self, messages: list[dict[str, Any]], stop_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """`answer_ids` of the chat."""
        return answer_ids(self, messages, (), stop_ids)

    def inputs_of(self, ids: list[int]) -> dict[str, torch.Tensor]:
        """What the processor returned, as a batch of one, for the last prompt that `ids` begin with."""
        return next(inputs for prompt, inputs in reversed(self._prompts) if ids[: len(prompt)] == prompt)

    def apply_chat_template(self, chat: list[Any], *, add_generation_prompt: bool, tokenize: bool) -> Any:
        """The chat as text; or ids of the only prompt of a batch."""
        messages = chat[0] if tokenize else chat
        text = self._processor.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        if not tokenize:
            return text
        inputs = self._processor.apply_chat_template(
            [messages], images=[self._images[: len(image_sources(messages))]],
            add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        self._prompt, self._prompt_ids = text, inputs["input_ids"][0].tolist()
        self._prompts.append((self._prompt_ids, dict(inputs)))
        return [self._prompt_ids]

    def encode_with_images(self, text: str, _num_tiles: Sequence[int], *, add_special_tokens: bool) -> list[int]:
        """Ids of a text that goes on from the last prompt, whose images are not encoded again; none if it is unknown
        how the two are joined.

        What is behind the last special token is encoded independently of what is before it.
        """
        places = [self._prompt.rfind(token) + len(token) for token in self.tokenizer.all_special_tokens
                  if token in self._prompt]  # fmt: skip
        start = max(places, default=0)
        tail = self.tokenizer(self._prompt[start:], add_special_tokens=False)["input_ids"]
        kept = len(self._prompt_ids) - len(tail)
        if not tail or self._prompt_ids[kept:] != tail:
            return []
        return (
            self._prompt_ids[:kept] + self.tokenizer(text[start:], add_special_tokens=add_special_tokens)["input_ids"]
        )
