"""From chats to batches: token ids, labels on the answers alone, tiles of the images."""

import logging
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from jinja2 import TemplateError

from conversion.chat_template import NO_TEMPLATE, UnusableTemplate
from genieblue.training.chats import BAD_SAMPLE, CORRECT_OR_SKIP, ChatDataset, ChatSample, parse_chat
from modeling_genieblue.chat_messages_genieblue import with_string_contents

logger = logging.getLogger(__name__)

IGNORED = -100


class ChatCollator:
    """Makes batches of chats: ids, labels that are `-100` outside of the answers, tiles.

    What is trained is what is generated at inference: an answer begins where the prompt of its turn ends, and ends
    with the token that ends a turn. Rows are padded on the right.
    """

    def __init__(self, processor: Any, *, max_length: int = 4096, max_tiles: int | None = None):
        """`max_length` is in tokens, image tokens included; `max_tiles` by image, by default the processor's own."""
        if max_length < 2:
            raise ValueError(f"`max_length` is {max_length}: expected at least 2 tokens, a prompt and an answer.")
        self.processor = processor
        self.max_length = max_length
        self.max_tiles = max_tiles
        tokenizer = processor.tokenizer
        added = tokenizer.added_tokens_decoder
        self._special_ids = set(tokenizer.all_special_ids) | {token for token in added if added[token].special}
        pad_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad_id = next(token for token in pad_ids if token is not None)
        self._said: set[str] = set()

    def __call__(self, samples: Sequence[ChatSample | dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Samples, encoded or not → `input_ids`, `attention_mask`, `labels` (batch, length).

        With images also `pixel_values` (total_tiles, 3, tile_size, tile_size) and `num_tiles` (num_images,).
        """
        rows = [sample if is_encoded(sample) else self.encode(sample) for sample in samples]
        length = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), length)
        batch = {
            "input_ids": torch.full(shape, self._pad_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
        }
        for index, row in enumerate(rows):
            size = len(row["input_ids"])
            batch["input_ids"][index, :size] = torch.tensor(row["input_ids"])
            batch["attention_mask"][index, :size] = 1
            batch["labels"][index, :size] = torch.tensor(row["labels"])
        with_images = [row for row in rows if "pixel_values" in row]
        for name in ("pixel_values", "num_tiles") if with_images else ():
            batch[name] = torch.cat([row[name] for row in with_images])
        return batch

    def encode(self, sample: ChatSample | dict[str, Any]) -> dict[str, Any]:
        """One sample → lists `input_ids` and `labels`, and the tensors of its images.

        Raises `ValueError` that names the sample: an image that cannot be read, a template that does not fit, a
        sample that is too long to cut. A template that is missing or broken is an `UnusableTemplate`.
        """
        if not isinstance(sample, ChatSample):
            sample = parse_chat(sample, "a sample", None)
        if self.processor.chat_template is None:
            raise UnusableTemplate(NO_TEMPLATE)
        try:
            pixels = self._tiles(sample.images)
            input_ids, labels = self._tokens(sample.messages, pixels.get("num_tiles", torch.tensor([])).tolist())
            input_ids, labels = self._cut(input_ids, labels)
        except BAD_SAMPLE as error:
            raise ValueError(f"{sample.where}: {error}") from error
        except TemplateError as error:
            if type(error) is TemplateError:  # `raise_exception`: what the template itself says of this chat
                raise ValueError(f"{sample.where}: the chat template refuses it: {error}") from error
            raise UnusableTemplate(
                f"The model's chat template fails ({type(error).__name__}: {error}), at {sample.where} for one: "
                "correct the template."
            ) from error
        return {"input_ids": input_ids, "labels": labels, **pixels}

    def _tiles(self, images: list[Any]) -> dict[str, torch.Tensor]:
        if not images:
            return {}
        options = {} if self.max_tiles is None else {"max_tiles": self.max_tiles}
        return dict(self.processor.image_processor(images, return_tensors="pt", **options))

    def _tokens(self, messages: list[dict[str, Any]], num_tiles: list[int]) -> tuple[list[int], list[int]]:
        """Ids of a conversation, and its labels."""
        strings = with_string_contents(messages, repeat(self.processor.image_token))
        images_before = [sum(part["type"] == "image" for part in message["content"]) for message in messages]
        # Texts as strings, so that a chat reads the same before and after its first image.
        chat = [
            message if count else text for message, text, count in zip(messages, strings, images_before, strict=True)
        ]

        def render(count: int, prompt: bool) -> str:
            return self.processor.apply_chat_template(chat[:count], add_generation_prompt=prompt, tokenize=False)

        def encode(text: str, count: int) -> list[int]:
            tiles = num_tiles[: sum(images_before[:count])]
            return self.processor.encode_with_images(text, tiles, add_special_tokens=False)

        text = render(len(chat), prompt=False)
        input_ids = encode(text, len(chat))
        labels = [IGNORED] * len(input_ids)
        for index, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            prompt = render(index, prompt=True)
            if not text.startswith(prompt):
                raise ValueError(
                    "the chat template is not prefix-stable: the prompt of an answer (`add_generation_prompt=True`), "
                    f"which ends in {prompt[-60:]!r}, is not how the conversation with that answer begins, so what "
                    "would be trained is not what is generated. Use another `chat_template`."
                )
            end = answer_end(text, len(prompt), message["content"], render(index + 1, prompt=False))
            first = common_length(encode(prompt, index), input_ids)
            last = common_length(encode(text[:end], index + 1), input_ids)
            last = self._end_of_turn(input_ids, first, last)
            labels[first:last] = input_ids[first:last]
        return input_ids, labels

    def _end_of_turn(self, input_ids: list[int], first: int, last: int) -> int:
        """Where the answer `input_ids[first:last]` ends: behind the token after which generation stops.

        Templates go on with a newline there, which is never generated.
        """
        ends = [index for index in range(first, last) if input_ids[index] in self._special_ids]
        if not ends:
            self._say_once(
                "The chat template ends an answer without a special token: the model will not learn where to stop."
            )
        elif not self.processor.tokenizer.decode(input_ids[ends[-1] + 1 : last]).strip():
            return ends[-1] + 1
        return last

    def _cut(self, input_ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """At most `max_length` tokens: the rest is cut off, unless that takes image tokens or all of the answers."""
        if len(input_ids) > self.max_length:
            image_token = self.processor.image_token_id
            num_image_tokens = input_ids.count(image_token)
            if image_token in input_ids[self.max_length :] or set(labels[1 : self.max_length]) <= {IGNORED}:
                raise ValueError(
                    f"{len(input_ids)} tokens, {num_image_tokens} of them for images, and cutting them to "
                    f"{self.max_length} would take an image or all answers away; raise `max_length` or lower "
                    "`max_tiles`."
                )
            self._say_once(f"Samples of more than {self.max_length} tokens are cut at the end.")
            input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
        if set(labels[1:]) <= {IGNORED}:
            raise ValueError("the template shows no answer, so there is nothing to learn; expected one.")
        return input_ids, labels

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)


class EncodedChats(torch.utils.data.Dataset):
    """The encoded samples of a `ChatDataset`; of one that turns out to be bad, with `skip_bad`, the next good one.

    Which sample stands in depends on the data alone, so that a run which is resumed sees the same ones.
    """

    def __init__(self, chats: ChatDataset, collator: ChatCollator, *, need_images: bool = False):
        """`need_images`: take a sample without an image for a bad one."""
        self.chats = chats
        self.collator = collator
        self.need_images = need_images
        self._skipped: set[int] = set()

    def __len__(self) -> int:
        return len(self.chats)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            try:
                return self._encode(candidate)
            except UnusableTemplate:
                raise
            except BAD_SAMPLE as error:
                if not self.chats.skip_bad:
                    raise ValueError(f"{error} {CORRECT_OR_SKIP}") from error
                if candidate not in self._skipped:
                    self._skipped.add(candidate)
                    logger.warning("Left out %s (%d so far)", error, len(self._skipped))
        raise ValueError(f"All {len(self)} samples are bad; see the log for the reasons.")

    def _encode(self, index: int) -> dict[str, Any]:
        try:
            encoded = self.collator.encode(self.chats[index])
        except UnusableTemplate:
            raise
        except BAD_SAMPLE as error:
            where = self.chats.where(index)
            raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
        if self.need_images and "pixel_values" not in encoded:
            raise ValueError(f"{self.chats.where(index)}: no image, so there is nothing to learn for the projector.")
        return encoded


def is_encoded(sample: Any) -> bool:
    """Whether a sample has been through `ChatCollator.encode`."""
    return isinstance(sample, dict) and "input_ids" in sample


def answer_end(text: str, start: int, answer: str, up_to_answer: str) -> int:
    """Where in a rendered conversation the turn ends whose answer begins at `start`.

    `up_to_answer` is the conversation rendered up to that turn. It is how `text` begins, but for templates that write
    the last turn differently from earlier ones (Qwen3: an empty thought; others: an end token).
    """
    answer = answer.strip()
    shared = common_length(up_to_answer, text)
    if answer in text[start:shared]:
        return max(start, shared)
    position = text.find(answer, start)
    after = up_to_answer[up_to_answer.rfind(answer) + len(answer) :]
    if position < 0 or not text.startswith(after, position + len(answer)):
        raise ValueError(
            "the chat template is not prefix-stable: an answer reads otherwise once the conversation goes on. Use "
            "another `chat_template`."
        )
    return position + len(answer) + len(after)


def common_length(first: Sequence, second: Sequence) -> int:
    """Length of the longest common beginning."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(index for index in range(shorter) if first[index] != second[index])


__all__ = ["ChatCollator", "EncodedChats"]
