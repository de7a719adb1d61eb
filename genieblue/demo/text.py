"""The demo's base LLM: a small Llama trained on the English that ships with Python."""

import builtins
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics as pydoc_topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from genieblue.demo.budget import TrainingBudget, run_training

logger = logging.getLogger(__name__)

SEQUENCE_LENGTH = 128
HELD_OUT_EVERY = 10

# Always single tokens, so the tokens of a prompt are a prefix of the tokens of prompt + answer.
ROLE_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


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


def train_tokenizer(documents: list[Document], vocabulary_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one token per digit, a special token per role and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<pad>", "<bos>", "<eos>", *ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{d.title}\n{d.body}" for d in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=ROLE_TOKENS,
        padding_side="left",
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def training_stream(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> torch.Tensor:
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


def held_out_stream(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> torch.Tensor:
    """The plain texts as one row of ids, (tokens,), each ending with <eos>."""
    text = "".join(document.body + tokenizer.eos_token for document in documents)
    return torch.tensor(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])


class TokenWindows(Dataset):
    """Windows of `length` ids from a stream; an index gives the same window in every run."""

    def __init__(self, ids: torch.Tensor, length: int = SEQUENCE_LENGTH, samples: int = 100_000, seed: int = 0):
        if len(ids) <= length:
            raise ValueError(
                f"The text has {len(ids)} tokens, fewer than one window of {length}: give more text or a smaller "
                "window."
            )
        self.ids, self.length = ids, length
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(0, len(ids) - length, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = int(self.starts[index])
        window = self.ids[start : start + self.length]
        return {"input_ids": window, "labels": window}


@torch.no_grad()
def perplexity(
    model: torch.nn.Module, ids: torch.Tensor, length: int = SEQUENCE_LENGTH, batch_size: int = 16, **options
) -> float:
    """Perplexity of a causal LM over a stream of ids, (tokens,), in windows that do not overlap.

    Each window of `length` tokens is predicted from its own tokens only, so the result does not depend on the batch
    size, except for rounding. An incomplete last window is ignored. `options` are passed to the model.
    """
    windows = len(ids) // length
    if windows == 0:
        raise ValueError(
            f"The text has {len(ids)} tokens, fewer than one window of {length}: give more text or a smaller window."
        )
    rows = ids[: windows * length].view(windows, length)
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
    return math.exp(total / (windows * (length - 1)))


def build_base(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """An untrained Llama with 8 blocks and 1.6 million parameters for the tokenizer's vocabulary."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def make_base(out: str | Path, *, max_steps: int = 1200, max_seconds: float = 90.0, seed: int = 0) -> dict[str, float]:
    """Trains the base, saves it as a plain transformers folder in `out` and returns its measurements.

    Returns `parameters`, `train_tokens`, `held_out_tokens`, `steps`, `seconds` and `perplexity` (held-out).
    """
    out = Path(out)
    split = split_documents()
    tokenizer = train_tokenizer(split.train)
    ids = training_stream(tokenizer, split.train)
    held_out = held_out_stream(tokenizer, split.held_out)
    model = build_base(tokenizer, seed)
    batch_size = 8
    budget = TrainingBudget("Base LLM", max_steps, max_seconds, samples_per_step=batch_size)
    dataset = TokenWindows(ids, samples=max_steps * batch_size, seed=seed)
    run_training(model, dataset, budget, output_dir=str(out), batch_size=batch_size, learning_rate=3e-3, seed=seed)
    seconds = budget.elapsed()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_tokens": len(ids),
        "held_out_tokens": len(held_out),
        "steps": budget.steps_done,
        "seconds": seconds,
        "perplexity": perplexity(model, held_out),
    }
    logger.info(
        "%s parameters, %d of %d steps, perplexity %.1f on held-out text.",
        f"{result['parameters']:,}", result["steps"], max_steps, result["perplexity"],
    )  # fmt: skip
    return result
