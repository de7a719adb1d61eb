"""Turns chats into batches: token ids, labels for the answers only, and image tiles."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError

from conversion.chat_ids import IGNORED, ChatRow, chat_rows
from conversion.chat_template import NO_TEMPLATE, UnusableTemplate
from genieblue.data.chat_samples import BAD_SAMPLE, ChatSample, parse_chat
from genieblue.data.chats import CORRECT_OR_SKIP, ChatDataset
from modeling_genieblue.image_reading_genieblue import image_size

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# A data loader includes the traceback of its worker process in the error message.
WORKER_ERROR = re.compile(r"Caught (\w+) in DataLoader worker process \d+\.\n.*\n(?:\w+\.)*\1: ", re.DOTALL)
SAMPLES = "samples"  # in batches of `EncodedChats`: where the samples are from, to name them in errors


class ChatCollator:
    """Makes batches of chats: ids, tiles, and labels that are `-100` outside the answers.

    Training rows match generation, see `chat_rows`. Rows are padded on the right.
    """

    def __init__(
        self,
        processor: Any,
        *,
        stop_ids: Sequence[int] | None = None,
        max_length: int = 4096,
        max_tiles: int | None = None,
        joins_packs: bool = False,
    ):
        """`max_length` is in tokens, including image tokens; `max_tiles` is per image, by default the processor's.

        `stop_ids` are the tokens that stop generation, by default the tokenizer's end-of-sequence token. With
        `joins_packs`, all packs of a batch become one row, in which flash attention knows the samples apart.
        """
        if max_length < 2:
            raise ValueError(
                f"`max_length` is {max_length}: expected at least 2, one token each for prompt and answer."
            )
        self.processor = processor
        self.max_length = max_length
        self._tile_options = {} if max_tiles is None else {"max_tiles": max_tiles}
        self.joins_packs = joins_packs
        tokenizer = processor.tokenizer
        own_stop = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.stop_ids = tuple(own_stop if stop_ids is None else stop_ids)
        pad_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad_id = next(token for token in pad_ids if token is not None)
        self._said: set[str] = set()

    def __call__(self, samples: Sequence[ChatSample | dict[str, Any] | list]) -> dict[str, Any]:
        """Samples, encoded or not → `input_ids`, `attention_mask`, `labels` (rows, length).

        With images also `pixel_values` (total_tiles, 3, tile_size, tile_size) and `num_tiles` (num_images,). Packs
        (see `joined`) have `position_ids` instead of `attention_mask`, with 0 for padding: every position 0 begins
        another sequence.
        """
        rows = [row for sample in samples for row in (sample if isinstance(sample, list) else self.rows(sample))]
        packed = "position_ids" in rows[0]
        if packed and self.joins_packs:
            rows = [joined(rows)]
        length = max(len(row["input_ids"]) for row in rows)
        padding = {"input_ids": self._pad_id, "labels": IGNORED, "position_ids" if packed else "attention_mask": 0}
        batch = {name: torch.full((len(rows), length), value) for name, value in padding.items()}
        for index, row in enumerate(rows):
            for name, values in batch.items():
                size = len(row["input_ids"])
                values[index, :size] = 1 if name == "attention_mask" else torch.tensor(row[name])
        return batch | tiles_of(rows) | names_of(rows)

    def encode(self, sample: ChatSample | dict[str, Any]) -> dict[str, Any]:
        """The row of a sample's last answer, which for most templates is the only one in `rows`."""
        return self.rows(sample)[-1]

    def rows(self, sample: ChatSample | dict[str, Any]) -> list[dict[str, Any]]:
        """One sample → rows, usually one: lists `input_ids` and `labels`, and the tensors of its images.

        Raises `ValueError` naming the sample for an unreadable image, an unsuitable template or a sample that is too
        long, and `UnusableTemplate` for a missing or broken template.
        """
        with self._read(sample) as sample:
            pixels = self._tiles(sample.images)
            rows = self._chat_rows(sample, pixels["num_tiles"].tolist() if pixels else [])
        return [{"input_ids": row.input_ids, "labels": row.labels, **self._shown(row, pixels)} for row in rows]

    def outlines(self, sample: ChatSample | dict[str, Any]) -> list[ChatRow]:
        """The ids and labels of `rows`, from the sizes of images, whose pixels are not read."""
        with self._read(sample) as sample:
            sizes = [image_size(image, index) for index, image in enumerate(sample.images)]
            count = self.processor.image_processor.get_number_of_image_patches
            return self._chat_rows(sample, [count(height, width, self._tile_options) for width, height in sizes])

    @contextlib.contextmanager
    def _read(self, sample: ChatSample | dict[str, Any]) -> Iterator[ChatSample]:
        """The parsed sample; errors inside are raised as `rows` promises."""
        if not isinstance(sample, ChatSample):
            sample = parse_chat(sample, "a sample", None)
        if self.processor.chat_template is None:
            raise UnusableTemplate(NO_TEMPLATE)
        try:
            yield sample
        except BAD_SAMPLE as error:
            raise ValueError(f"{sample.where}: {error}") from error
        except TemplateError as error:
            if type(error) is TemplateError:  # the template called `raise_exception`
                raise ValueError(f"{sample.where}: the chat template rejects this chat: {error}") from error
            raise UnusableTemplate(
                f"The model's chat template fails ({type(error).__name__}: {error}), for example for "
                f"{sample.where}: correct the template."
            ) from error

    def _chat_rows(self, sample: ChatSample, num_tiles: list[int]) -> list[ChatRow]:
        return self._fitting(chat_rows(self.processor, sample.messages, num_tiles, self.stop_ids))

    def _tiles(self, images: list[Any]) -> dict[str, torch.Tensor]:
        if not images:
            return {}
        return dict(self.processor.image_processor(images, return_tensors="pt", **self._tile_options))

    def _shown(self, row: ChatRow, pixels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The images of a sample that one of its rows contains: the first ones."""
        count = row.input_ids.count(self.processor.image_token_id) // self.processor.image_seq_length
        if count == 0:
            return {}
        num_tiles = pixels["num_tiles"]
        return {"pixel_values": pixels["pixel_values"][:count], "num_tiles": num_tiles[num_tiles.cumsum(0) <= count]}

    def _fitting(self, rows: list[ChatRow]) -> list[ChatRow]:
        """Rows of at most `max_length` tokens; longer ones are cut after the last answer that fits completely."""
        fitting = []
        for row in rows:
            ends = [end for end, label in enumerate(row.labels[: self.max_length], start=1) if label in self.stop_ids]
            if len(row.labels) <= self.max_length:
                fitting.append(row)
            elif ends:
                fitting.append(ChatRow(row.input_ids[: ends[-1]], row.labels[: ends[-1]]))
        if not fitting:
            raise ValueError(self._too_long(rows[0].input_ids))
        if len(fitting) < len(rows) or any(len(row.labels) > self.max_length for row in rows):
            self._log_once(f"Chats of more than {self.max_length} tokens lose their last answers.")
        return fitting

    def _too_long(self, ids: list[int]) -> str:
        return (
            f"{len(ids)} tokens, {ids.count(self.processor.image_token_id)} of them for images, and even the first "
            f"answer does not fit in {self.max_length}; raise `max_length` or lower `max_tiles`."
        )

    def _log_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)


class EncodedChats(torch.utils.data.Dataset):
    """The encoded samples of a `ChatDataset`; with `skip_bad`, the next good sample replaces a bad one.

    The replacement depends only on the data, so a resumed run sees the same samples.
    """

    def __init__(self, chats: ChatDataset, collator: ChatCollator, *, need_images: bool = False):
        """`need_images`: treat a sample without an image as bad."""
        self.chats = chats
        self.collator = collator
        self.need_images = need_images
        self._skipped: set[int] = set()

    def __len__(self) -> int:
        return len(self.chats)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        for step in range(len(self)):
            rows = self.rows((index + step) % len(self))
            if rows is not None:
                return rows
        raise ValueError(f"All {len(self)} samples are bad; see the log for the reasons.")

    def rows(self, index: int) -> list[dict[str, Any]] | None:
        """The rows of one sample; `None` for a bad one if those are skipped."""
        return self._unless_bad(index, self._encode)

    def outlines(self, index: int) -> list[ChatRow] | None:
        """The ids and labels of `rows`, without reading pixels; an image whose pixels are damaged passes."""
        return self._unless_bad(index, self._outline)

    def _unless_bad(self, index: int, encode: Callable[[int], list[Result]]) -> list[Result] | None:
        try:
            if rows := encode(index):
                return rows
            raise ValueError("no image, so the projector learns nothing from it.")
        except UnusableTemplate:
            raise
        except BAD_SAMPLE as error:
            where = self.chats.where(index)
            reason = str(error) if str(error).startswith(where) else f"{where}: {error}"
            if not self.chats.skip_bad:
                raise ValueError(f"{reason} {CORRECT_OR_SKIP}") from error
            if index not in self._skipped:
                self._skipped.add(index)
                logger.warning("Skipped %s (%d so far)", reason, len(self._skipped))
        return None

    def _encode(self, index: int) -> list[dict[str, Any]]:
        rows = [{**row, SAMPLES: [self.chats.where(index)]} for row in self.collator.rows(self.chats[index])]
        return [row for row in rows if not self.need_images or "pixel_values" in row]

    def _outline(self, index: int) -> list[ChatRow]:
        image = self.collator.processor.image_token_id
        rows = self.collator.outlines(self.chats[index])
        return [row for row in rows if not self.need_images or image in row.input_ids]


@contextlib.contextmanager
def plain_worker_errors() -> Iterator[None]:
    """Inside, a `ValueError` of a data loader's worker process keeps its original message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(WORKER_ERROR.sub("", str(error))) from error


def joined(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows as one row, a pack, with `position_ids` that begin at 0 for each of them; packs may be joined too."""
    pack: dict[str, Any] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        pack["input_ids"] += row["input_ids"]
        pack["labels"] += [IGNORED, *row["labels"][1:]]  # the first token does not follow the row before
        pack["position_ids"] += row.get("position_ids", range(len(row["input_ids"])))
    return pack | tiles_of(rows) | names_of(rows)


def names_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Where the samples of rows are from; empty if that is unknown."""
    names = [name for row in rows for name in row.get(SAMPLES, ())]
    return {SAMPLES: names} if names else {}


def tiles_of(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """`pixel_values` and `num_tiles` of rows in order; empty without images."""
    shown = [row for row in rows if "pixel_values" in row]
    return {name: torch.cat([row[name] for row in shown]) for name in ("pixel_values", "num_tiles") if shown}
