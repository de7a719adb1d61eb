"""The quick demo's base LLM: a small Llama trained on the English that ships with Python."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from genieblue.lab.pretraining import pretrain
from genieblue.lab.text import SEQUENCE_LENGTH, Document, split_documents, training_stream

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


def make_toy_base(out: Path, *, steps: int, seed: int = 0) -> None:
    """Trains the base and saves it as a plain transformers folder."""
    documents = split_documents().train
    tokenizer = train_tokenizer(documents)
    model = build_base(tokenizer, seed)
    batch_size = 8
    windows = TokenWindows(training_stream(tokenizer, documents), samples=steps * batch_size, seed=seed)
    pretrain(model, windows, batch_size=batch_size, learning_rate=3e-3, seed=seed)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
