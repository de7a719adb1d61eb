"""Calibration samples for `gptq`, from the user's own text or chats."""

from pathlib import Path
from typing import Any

import torch

from conversion.calibration import read_paragraphs, text_batches
from conversion.quantize import CalibrationSamples
from genieblue.collation import ChatCollator
from genieblue.data import ChatDataset


def read_calibration(
    paths: list[Path], processor: Any, *, count: int, length: int, image_folder: Path | None = None
) -> CalibrationSamples:
    """Samples from text files (paragraphs) and JSONL files of chats, as training reads them.

    Texts, those of the chats too, are packed into at most `count` rows of `length` tokens; the first `count` chats
    with an image become requests with images. Raises `ValueError` or `OSError` for data that is missing, empty, or
    does not fill one row.
    """
    texts: list[str] = []
    chats: list[Any] = []
    for path in paths:
        if path.suffix == ".jsonl":
            dataset = ChatDataset(path, image_folder=image_folder)
            samples = [dataset[index] for index in range(min(len(dataset), 4 * count))]
            chats += [sample for sample in samples if sample.images]
            texts += ["\n".join(_texts(sample)) for sample in samples]
        else:
            texts += read_paragraphs(path)
    collator = ChatCollator(processor)
    return CalibrationSamples(
        text=_rows(processor.tokenizer, texts, length, count),
        multimodal=[_request(collator.encode(chat)) for chat in chats[:count]],
    )


def _texts(sample: Any) -> list[str]:
    parts = [part for message in sample.messages for part in message["content"]]
    return [part["text"] for part in parts if part["type"] == "text"]


def _rows(tokenizer: Any, texts: list[str], length: int, count: int) -> list[torch.Tensor]:
    """As many rows as the texts fill; `ValueError` if that is not even one."""
    for rows in (count, count // 2, count // 4, count // 8, count // 16):
        if rows > 1:
            try:
                return text_batches(tokenizer, texts, length, rows)
            except ValueError:
                continue
    return text_batches(tokenizer, texts, length, 1)


def _request(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([row["input_ids"]]), "pixel_values": row["pixel_values"]}


__all__ = ["read_calibration"]
