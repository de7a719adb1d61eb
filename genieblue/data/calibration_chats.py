"""Calibration samples from the user's text or chats, for `gptq` and for NPU graphs."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from conversion.quantization.quantize import CalibrationSamples
from conversion.quantization.sensitivity import REQUESTS
from genieblue.data.chat_samples import ChatSample, texts_of
from genieblue.data.chats import ChatDataset
from genieblue.data.collation import ChatCollator
from genieblue.data.plain_texts import is_plain_text, read_paragraphs, text_batches
from genieblue.data.vlm_collation import VlmChatCollator
from modeling_genieblue import VlmGenieBlueProcessor

logger = logging.getLogger(__name__)


def read_chats(path: Path, count: int, *, image_folder: Path | None = None) -> list[ChatSample]:
    """Up to `count` chats from a JSONL file in order, half of them with images, however the file is sorted.

    Takes the first chats of each kind; if there are too few of one kind, the other fills up. Raises `ValueError` or
    `OSError` for missing, empty or bad data.
    """
    dataset = ChatDataset(path, image_folder=image_folder, skip_bad=None)
    half = count // 2
    found: dict[bool, list[tuple[int, ChatSample]]] = {True: [], False: []}  # key: has images
    for index in range(len(dataset)):
        sample = dataset[index]
        kind = found[bool(sample.images)]
        if len(kind) < count:
            kind.append((index, sample))
        if len(found[True]) >= count - half and len(found[False]) >= half:
            break
    images = found[True][: max(count - half, count - len(found[False]))]
    return [sample for _, sample in sorted(images + found[False][: count - len(images)], key=lambda item: item[0])]


def chats_with_images(path: Path, count: int, image_folder: Path | None = None) -> list[ChatSample]:
    """Up to `count` chats with images of a JSONL file, which are all that a VLM runs; errors as of `read_chats`."""
    return [chat for chat in read_chats(path, 2 * count, image_folder=image_folder) if chat.images][:count]


def read_calibration(
    paths: list[Path], processor: Any, *, count: int, length: int, image_folder: Path | None = None
) -> CalibrationSamples:
    """Samples from plain texts (`.txt`, `.md`) and chats, read as in training.

    All texts, including those of chats, are packed into up to `count` rows of `length` tokens; the first `count` chats
    with an image become multimodal requests. Raises `ValueError` or `OSError` for data that is missing, empty, or too
    short to fill one row.
    """
    texts: list[str] = []
    chats: list[Any] = []
    for path in paths:
        if is_plain_text(path):
            texts += read_paragraphs(path)
            continue
        samples = read_chats(path, 4 * count, image_folder=image_folder)
        chats += [sample for sample in samples if sample.images]
        texts += ["\n".join(texts_of(sample.messages)) for sample in samples]
    if 0 < len(chats) < min(REQUESTS, count):
        logger.warning(
            "Only %d of the calibration chats have images, which says little about the replicated blocks and vision "
            "side: give at least %d, better 64.",
            len(chats),
            REQUESTS,
        )
    return CalibrationSamples(
        text=text_batches(processor.tokenizer, texts, length, count),
        multimodal=list(_requests(processor, chats[:count])),
    )


def read_requests(
    path: Path, processor: Any, *, count: int, image_folder: Path | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Up to `count` chats of a JSONL file as requests of the multimodal view; images are read when they are needed.

    Of a VLM they are chats with images. Raises `ValueError` or `OSError` for missing, empty or bad data.
    """
    read = chats_with_images if isinstance(processor, VlmGenieBlueProcessor) else read_chats
    return _requests(processor, read(path, count, image_folder=image_folder))


def _requests(processor: Any, chats: Sequence[ChatSample]) -> Iterator[dict[str, torch.Tensor]]:
    """Each chat as it is trained on; of a VLM, with all inputs that its own processor returns."""
    if isinstance(processor, VlmGenieBlueProcessor):
        of_vlm = VlmChatCollator(processor)
        batches = (of_vlm([[of_vlm.encode(chat)]]) for chat in chats)
        yield from ({name: batch[name] for name in batch if isinstance(batch[name], torch.Tensor) and name != "labels"}
                    for batch in batches)  # fmt: skip
        return
    collator = ChatCollator(processor)
    for row in map(collator.encode, chats):
        images = {name: row[name] for name in ("pixel_values",) if name in row}
        yield {"input_ids": torch.tensor([row["input_ids"]]), **images}
