"""Which chats ask the same, however they are written: to find data that is not new to a model, or is there twice."""

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from genieblue.data.chat_samples import ChatSample, written_alike
from genieblue.data.chats import ChatDataset, short_hash

DATA_URI = "data:"
Prompt = tuple[int, tuple[bytes, ...]]


def prompt_of(sample: ChatSample) -> Prompt:
    """What a sample asks: everything before its last answer, and the contents of its images, whose files are read."""
    return short_hash(written_alike(sample.messages)[:-1]), _digests(sample.images)


def shared_prompts(held_out: Iterable[ChatDataset], others: Iterable[ChatDataset]) -> int:
    """How many samples of `held_out` ask what a sample of `others` asks, whatever the answers.

    Images are the same if their files have the same bytes. Files are read only where the texts and the sizes agree,
    since `others` may be all of the training data. Samples that were not checked are left out.
    """
    wanted: dict[int, list[tuple[ChatDataset, int]]] = {}
    for chats in held_out:
        for index, prompt in chats.prompt_hashes():
            wanted.setdefault(prompt, []).append((chats, index))
    by_images: dict[int, dict[tuple[int, ...], Counter[tuple[bytes, ...]]]] = {}
    shared = 0
    for chats in others:
        for index, prompt in chats.prompt_hashes():
            if prompt not in wanted:
                continue
            if prompt not in by_images:
                by_images[prompt] = found = {}
                for own, place in wanted[prompt]:
                    images = own[place].images
                    found.setdefault(_sizes(images), Counter())[_digests(images)] += 1
            images = chats[index].images
            if same_size := by_images[prompt].get(_sizes(images)):
                shared += same_size.pop(_digests(images), 0)
    return shared


def _sizes(images: Iterable[Any]) -> tuple[int, ...]:
    """Bytes of each image as it is stored."""
    return tuple(os.path.getsize(image) if _is_path(image) else len(_bytes(image)) for image in images)


def _digests(images: Iterable[Any]) -> tuple[bytes, ...]:
    found = []
    for image in images:
        if _is_path(image):
            with open(image, "rb") as file:
                found.append(hashlib.file_digest(file, "sha256").digest())
        else:
            found.append(hashlib.sha256(_bytes(image)).digest())
    return tuple(found)


def _is_path(image: Any) -> bool:
    return isinstance(image, (str, os.PathLike)) and os.fspath(image)[: len(DATA_URI)].lower() != DATA_URI


def _bytes(image: Any) -> bytes:
    """Those of an image file in memory or in a data URI, or of the pixels of an image or array."""
    if isinstance(image, str):
        try:
            return base64.b64decode(image.partition(",")[2], validate=True)
        except ValueError:  # whoever opens it says so
            return image.encode()
    return image if isinstance(image, bytes) else np.asarray(image).tobytes()
