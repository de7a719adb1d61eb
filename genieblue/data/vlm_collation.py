"""Batches of chats with images for a GenieBlue with a VLM, as the VLM's own processor encodes them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from conversion.chat_ids import IGNORED, ChatRow
from conversion.vlm_chat_ids import VlmChatFormat
from genieblue.data.chat_samples import ChatSample
from genieblue.data.collation import ChatCollator, names_of
from modeling_genieblue.vlm_modeling_genieblue import IMAGE_INPUTS, ROW_INPUTS


class VlmChatCollator(ChatCollator):
    """A `ChatCollator` whose rows are those of the VLM's processor: its template, tiles, special tokens and inputs."""

    def __init__(self, processor: Any, **options: Any):
        """`processor` is that of a GenieBlue with a VLM; `options` are those of `ChatCollator` but for tiles."""
        super().__init__(processor.vlm_processor, **options)
        self._of_genieblue = processor

    def __call__(self, samples: Sequence[ChatSample | dict[str, Any] | list]) -> dict[str, Any]:
        """Samples → `input_ids`, `attention_mask`, `labels` (rows, length), and what shows images, of all rows."""
        rows = [row for sample in samples for row in (sample if isinstance(sample, list) else self.rows(sample))]
        length = max(len(row["input_ids"]) for row in rows)
        filling = {"input_ids": self._pad_id, "labels": IGNORED, "attention_mask": 0}
        by_row = {name: filling.get(name, 0) for name in (*filling, *ROW_INPUTS) if name in rows[0]}
        batch = {
            name: torch.stack([_padded(torch.as_tensor(row[name]), [length], value) for row in rows])
            for name, value in by_row.items()
        }
        images = {name: [row[name] for row in rows] for name in IMAGE_INPUTS if name in rows[0]}
        return batch | {name: _joined(values) for name, values in images.items()} | names_of(rows)

    def rows(self, sample: ChatSample | dict[str, Any]) -> list[dict[str, Any]]:
        """As `ChatCollator.rows`; none of a sample without images, which no VLM runs."""
        with self._read(sample) as sample:
            if not sample.images:
                return []
            chat = VlmChatFormat(self._of_genieblue, sample.images)
            rows = self._fitting(chat.rows(sample.messages, self.stop_ids))
            encoded = [self.row(row, chat.inputs_of(row.input_ids)) for row in rows]
            return [row for row in encoded if "pixel_values" in row]  # what was said before the first image is text

    def outlines(self, sample: ChatSample | dict[str, Any]) -> list[ChatRow]:
        """The ids and labels of `rows`."""
        return [ChatRow(row["input_ids"], row["labels"]) for row in self.rows(sample)]

    def _too_long(self, ids: list[int]) -> str:
        return (
            f"{len(ids)} tokens with its images, and even the first answer does not fit in {self.max_length}; raise "
            "`max_length`, or set the VLM's own image processor to smaller images."
        )

    @staticmethod
    def row(row: ChatRow, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """A row of a batch, with what shows images among its prompt's `inputs`."""
        length = len(row.input_ids)
        kinds = {name: _padded(inputs[name][0], [length], 0) for name in ROW_INPUTS if name in inputs}
        images = {name: inputs[name] for name in IMAGE_INPUTS if name in inputs}
        return {"input_ids": row.input_ids, "labels": row.labels, "attention_mask": [1] * length, **kinds, **images}


def _padded(values: torch.Tensor, shape: Sequence[int], filling: int) -> torch.Tensor:
    """Values with `filling` behind them in each dimension, up to `shape`."""
    missing = [size - own for size, own in zip(shape, values.shape, strict=True)]
    return pad(values, [more for each in reversed(missing) for more in (0, each)], value=filling)


def _joined(values: list[torch.Tensor]) -> torch.Tensor:
    """Images of rows along the first dimension; those of fewer tiles or pixels have zeros behind them, as a VLM's
    processor fills up a batch."""
    shape = [max(sizes) for sizes in zip(*(each.shape[1:] for each in values), strict=True)]
    return torch.cat([_padded(each, [len(each), *shape], 0) for each in values])
