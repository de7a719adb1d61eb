"""A real base for figures of 4-bit rounding: a Llama-like LLM that came from 4-bit codes, moved off their grid.

    python -m benchmarks.quantization_base --base smollm2 --texts gsm8k_train.jsonl --out quantization-base

Weights that were dequantized lie on a grid, on which groups of the same size look perfect. Two things move them off it:
random factors of some 10 % between the channels of one layer and of the next, which leave the function as it is, and a
short full fine-tuning in float32. The second alone would need a learning rate that ruins the model: a step of the grid
is a quarter of the weights' standard deviation. `--texts` is a JSONL file with `question` and `answer`, such as
GSM8K's. It prints the error of rounding groups of 32 to nearest; ordinary weights have 0.08 to 0.09.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.report import print_table
from conversion.quantization.hessians import text_batches
from conversion.quantization.rounding import round_weight
from modeling_genieblue.language_adapter_genieblue import find_blocks


def question_rows(path: Path, tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[torch.Tensor]:
    """Up to `count` rows (1, length) of ids: questions and answers of a JSONL file, packed."""
    with path.open(encoding="utf-8") as file:
        pairs = map(json.loads, itertools.islice(file, count * length // 64))  # a pair has more than 64 tokens
        return text_batches(tokenizer, [f"{pair['question']}\n{pair['answer']}" for pair in pairs], length, count)


@torch.no_grad()
def rounding_error(model: Any, group_size: int = 32) -> float:
    """Relative L2 error of all linears in the blocks, rounded to the nearest of 4 bits in groups of `group_size`."""
    lost = total = 0.0
    for linear in find_blocks(model)[1].modules():
        if isinstance(linear, torch.nn.Linear):
            weight = linear.weight.float()
            lost += float((round_weight(weight, 4, group_size).dequantize() - weight).square().sum())
            total += float(weight.square().sum())
    return (lost / total) ** 0.5


@torch.no_grad()
def rescale_channels(model: Any, spread: float) -> None:
    """Multiplies each input channel of a block's linears by a random factor, and divides what makes it by the same.

    Norms make the inputs of q, k, v and of gate, up; v those of o, each of its heads for several query heads; up those
    of down.
    """
    heads = model.config.num_key_value_heads
    for block in find_blocks(model)[1]:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            factors = torch.exp(spread * torch.randn_like(norm.weight))
            norm.weight /= factors
            for linear in readers:
                linear.weight *= factors
        factors = torch.exp(spread * torch.randn(attention.v_proj.out_features))
        attention.v_proj.weight /= factors[:, None]
        queries = attention.o_proj.in_features // attention.v_proj.out_features
        attention.o_proj.weight *= factors.view(heads, 1, -1).expand(-1, queries, -1).flatten()
        factors = torch.exp(spread * torch.randn(mlp.up_proj.out_features))
        mlp.up_proj.weight /= factors[:, None]
        mlp.down_proj.weight *= factors


def fine_tune(model: Any, rows: list[torch.Tensor], learning_rate: float, steps: int) -> None:
    """Trains all weights, which are in float32, on one row a step."""
    examples: Any = [{"input_ids": row[0], "labels": row[0]} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=1, learning_rate=learning_rate, warmup_steps=10,
            lr_scheduler_type="cosine", weight_decay=0.0, adam_beta2=0.95, bf16=True, use_cpu=True, logging_steps=10,
            save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model, settings, train_dataset=examples).train()


def main() -> None:
    """Writes the base in bfloat16 and prints the errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--spread", type=float, default=0.1)
    arguments = parser.parse_args()
    set_seed(0)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
    errors = {"before": rounding_error(model)}
    rescale_channels(model, arguments.spread)
    errors["rescaled"] = rounding_error(model)
    rows = question_rows(arguments.texts, tokenizer, arguments.steps, 512)
    fine_tune(model, rows, arguments.learning_rate, arguments.steps)
    model = model.to(torch.bfloat16)
    errors["fine-tuned"] = rounding_error(model)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print_table("Groups of 32, rounded to nearest", {"relative L2 error": errors})


if __name__ == "__main__":
    main()
