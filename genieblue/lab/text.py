"""The English that ships with Python, and the perplexity of a model on it."""

import builtins
import math
import re
from dataclasses import dataclass
from pydoc_data.topics import topics as pydoc_topics
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

SEQUENCE_LENGTH = 128
HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Document:
    """A text and its heading."""

    title: str
    body: str

    @property
    def paragraphs(self) -> list[str]:
        return [part for part in re.split(r"\n\s*\n", self.body) if part.strip()]


@dataclass(frozen=True)
class TextSplit:
    """Documents for training and for evaluation, without shared paragraphs."""

    train: list[Document]
    held_out: list[Document]


def read_documents() -> tuple[list[Document], list[Document]]:
    """Python's help topics and, if installed, its licence."""
    by_heading: dict[str, Document] = {}
    for name in sorted(pydoc_topics):
        heading, _, body = pydoc_topics[name].strip().partition("\n")
        # Some topics repeat the heading and text of another topic: `split_documents` filters the paragraphs, and the
        # name keeps titles distinct.
        title = heading.strip() or name
        body = re.sub(r"\A[*=\-~^\s]+", "", body)
        by_heading[name] = Document(title, body)
    licence = []
    if hasattr(builtins, "license"):
        builtins.license._Printer__setup()
        text = "\n".join(builtins.license._Printer__lines)
        if len(text) > 1000:  # otherwise it is only a line with a URL
            licence = [Document("The licence of Python", text)]
    return list(by_heading.values()), licence


def split_documents() -> TextSplit:
    """Holds out every tenth help topic and removes its paragraphs from all others."""
    topics, licences = read_documents()
    held_out = topics[::HELD_OUT_EVERY]
    seen = {_normalized(paragraph) for document in held_out for paragraph in document.paragraphs}
    train, train_seen = [], set()
    for document in [d for i, d in enumerate(topics) if i % HELD_OUT_EVERY] + licences:
        kept = []
        for paragraph in document.paragraphs:
            key = _normalized(paragraph)
            if key in seen or (len(key) > 80 and key in train_seen):
                continue
            train_seen.add(key)
            kept.append(paragraph)
        if kept:
            train.append(Document(document.title, "\n\n".join(kept)))
    return TextSplit(train, held_out)


def _normalized(paragraph: str) -> str:
    return " ".join(paragraph.split())


def training_stream(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> torch.Tensor:
    """All documents as one row of ids, (tokens,): each a chat whose question is the title and answer is the text."""
    ids: list[int] = []
    for document in documents:
        chat = [
            {"role": "user", "content": f"Explain: {document.title}"},
            {"role": "assistant", "content": document.body},
        ]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        ids += tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return torch.tensor(ids)


def held_out_stream(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> torch.Tensor:
    """The plain texts as one row of ids, (tokens,), each ending with <eos>."""
    text = "".join(document.body + tokenizer.eos_token for document in documents)
    return torch.tensor(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    ids: torch.Tensor,
    length: int = SEQUENCE_LENGTH,
    batch_size: int = 16,
    windows: int | None = None,
    **options: Any,
) -> float:
    """Perplexity of a causal LM over a stream of ids, (tokens,), in windows that do not overlap, or the first of them.

    Each window of `length` tokens is predicted from its own tokens only, so the result does not depend on the batch
    size, except for rounding. An incomplete last window is ignored. `options` are passed to the model.
    """
    complete = len(ids) // length
    if complete == 0:
        raise ValueError(
            f"The text has {len(ids)} tokens, fewer than one window of {length}: give more text or a smaller window."
        )
    rows = ids[: complete * length].view(complete, length)[:windows]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    for batch in rows.split(batch_size):
        batch = batch.to(device)
        logits = model(input_ids=batch, **options).logits[:, :-1].float()  # (rows, length - 1, vocabulary)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        total += losses.double().sum().item()
    model.train(was_training)
    return math.exp(total / (len(rows) * (length - 1)))
