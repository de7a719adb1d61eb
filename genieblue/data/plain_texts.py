"""Plain text: files of paragraphs, and rows of token ids that are packed with them."""

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".md")


def text_batches(tokenizer: Any, texts: Iterable[str], length: int, count: int) -> list[torch.Tensor]:
    """Up to `count` rows of token ids (1, length): the texts in order, separated by empty lines and packed.

    Each row starts with the tokenizer's start token, if any (`<s>`). Texts are read lazily. Raises `ValueError` if the
    text does not fill one row, and warns if it fills fewer rows than requested.
    """
    start = _leading_tokens(tokenizer)
    if count < 1 or length <= len(start):
        raise ValueError(
            f"Got a request for {count} calibration samples of {length} tokens: expected at least 1, of more than "
            f"{len(start)} tokens."
        )
    own = length - len(start)
    tokens, used = [], 0
    for text in texts:
        if len(tokens) >= count * own:
            break
        if text.strip():
            tokens += tokenizer(text.strip() + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
            used += 1
    filled = min(count, len(tokens) // own)
    if filled == 0:
        raise ValueError(
            f"The calibration data has {len(tokens)} tokens in {used} texts; a sample of {length} tokens needs {own}: "
            "give more text, or use shorter samples (--sample-length)."
        )
    if filled < count:
        logger.warning("The calibration texts fill only %d of %d samples of %d tokens.", filled, count, length)
    rows = torch.tensor(tokens[: filled * own]).view(filled, -1)
    return list(torch.cat([torch.tensor(start, dtype=rows.dtype).expand(filled, -1), rows], dim=1).split(1))


def is_plain_text(path: str | os.PathLike) -> bool:
    """Whether a file is read as plain text, by its ending; all others hold samples, such as JSONL of chats."""
    return Path(path).suffix.lower() in SUFFIXES


def read_paragraphs(path: str | os.PathLike, wanted: str = "calibration samples") -> list[str]:
    """The paragraphs of a UTF-8 text file, separated by empty lines.

    `OSError` or `ValueError` if there are none; it says what is `wanted` of the file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it, or give another file.") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error}): give a file with {wanted}.") from error
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    if not paragraphs:
        raise ValueError(f"{path} contains no text: give a file with {wanted}, such as plain prose.")
    return paragraphs


def _leading_tokens(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer adds before a text."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for position in range(len(whole) - len(plain) + 1):
        if whole[position : position + len(plain)] == plain:
            return whole[:position]
    return []
