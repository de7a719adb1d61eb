"""A real base for figures of 4-bit rounding, and the perplexity that each rounding leaves it.

    python -m benchmarks.quantization_base make --base smollm2 --texts gsm8k_train.jsonl --out quantization-base
    python -m benchmarks.quantization_base measure --base quantization-base --calibration gsm8k_train.jsonl \
        --texts gsm8k_test.jsonl --cases mse:64 gptq:64 mixed:4.5

Texts are JSONL files with `question` and `answer`, such as GSM8K's.

make: weights that were dequantized from 4 bits lie on a grid, on which groups of the same size and kind look perfect.
Random factors of some 10 % between the channels of one layer and of the next move them off it and leave the function
of a Llama-like model as it is; then `--steps` of full fine-tuning in float32 follow. Prints the error of groups of 32
codes after each, on grids with a minimum like llama.cpp's Q4_1, and on ours, with integer zero points. `--genieblue`
is a GenieBlue on the base, which is written to `OUT-genieblue` with the same factors: with `--steps 0` it answers as
before.

measure: perplexity of the questions and answers in `--texts` and of Python's held-out documentation, in windows of 512
tokens, for the base in bfloat16 and with its blocks rounded as each of `--cases` says: method and size of the groups;
`mixed` and the bits per weight; `eight` for 8 bits to nearest. Of the `--rows` of calibration text the first 4 are for
gradients. Unlike `quantize`, gptq has its Hessians from the unrounded base, the same for all cases.
"""

import argparse
import itertools
import json
import sys
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
from conversion.quantization.hessians import linear_hessians
from conversion.quantization.mixed import Budget, MixedPrecision
from conversion.quantization.precision import FORMATS
from conversion.quantization.rounding import round_weight
from conversion.quantization.sensitivity import REQUESTS, balanced_hessian, damage_inputs
from conversion.quantization.stored_size import stored_bytes
from genieblue.data.plain_texts import text_batches
from genieblue.lab.text import held_out_stream, perplexity, split_documents
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor
from modeling_genieblue.language_adapter_genieblue import ADAPTER, adapter_parameters, find_blocks
from modeling_genieblue.quantized_linears_genieblue import group_size_of

Factors = dict[str, tuple[torch.Tensor, torch.Tensor | None]]
LENGTH = 512
TEXT_WINDOWS, ENGLISH_WINDOWS = 12, 6


def question_rows(path: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[torch.Tensor]:
    """Up to `count` rows (1, 512) of ids: questions and answers of a JSONL file, packed."""
    with path.open(encoding="utf-8") as file:
        pairs = map(json.loads, itertools.islice(file, count * LENGTH // 64))  # a pair has more than 64 tokens
        texts = [f"{pair['question']}\n{pair['answer']}" for pair in pairs]
    return text_batches(tokenizer, texts, LENGTH, count)


def block_linears(model: Any) -> dict[str, torch.nn.Linear]:
    """The linears in the blocks, by name."""
    path, blocks = find_blocks(model)
    return {f"{path}.{name}": module for name, module in blocks.named_modules() if isinstance(module, torch.nn.Linear)}


@torch.no_grad()
def grid_errors(model: Any) -> dict[str, float]:
    """Relative L2 error of the blocks' linears in groups of 32 codes: on a grid with a minimum, and on ours."""
    lost, total = torch.zeros(2, dtype=torch.float64), 0.0
    for linear in block_linears(model).values():
        weight = linear.weight.float()
        grouped = weight.unflatten(1, (-1, 32))
        low, high = grouped.aminmax(dim=-1, keepdim=True)
        step = ((high - low) / 15).clamp(min=1e-12)
        with_minimum = (((grouped - low) / step).round() * step + low).flatten(1)
        ours = round_weight(weight, 4, 32).dequantize()
        lost += torch.stack([(found - weight).square().sum() for found in (with_minimum, ours)])
        total += float(weight.square().sum())
    return dict(zip(("with a minimum", "integer zero point"), (lost / total).sqrt().tolist(), strict=True))


def draw_factors(block: Any, heads: int, spread: float) -> Factors:
    """Random factors of the channels between the layers of a block: `(of inputs, of outputs)` by linear.

    Norms make the inputs of q, k, v and of gate, up; v those of o, each of its heads for several query heads; up those
    of down.
    """
    attention, mlp = block.self_attn, block.mlp

    def draw(count: int) -> torch.Tensor:
        return torch.exp(spread * torch.randn(count))

    attended, values = draw(len(block.input_layernorm.weight)), draw(attention.v_proj.out_features)
    passed, gated = draw(len(block.post_attention_layernorm.weight)), draw(mlp.up_proj.out_features)
    queries = attention.o_proj.in_features // attention.v_proj.out_features
    of_heads = values.view(heads, 1, -1).expand(-1, queries, -1).flatten()
    return {
        "self_attn.q_proj": (attended, None), "self_attn.k_proj": (attended, None),
        "self_attn.v_proj": (attended, values), "self_attn.o_proj": (of_heads, None),
        "mlp.gate_proj": (passed, None), "mlp.up_proj": (passed, gated), "mlp.down_proj": (gated, None),
    }  # fmt: skip


@torch.no_grad()
def rescale_block(block: Any, factors: Factors) -> None:
    """Multiplies the inputs of a block's linears by factors, and divides by them what makes these inputs."""
    block.input_layernorm.weight /= factors["self_attn.q_proj"][0]
    block.post_attention_layernorm.weight /= factors["mlp.gate_proj"][0]
    for name, (inputs, outputs) in factors.items():
        weight = block.get_submodule(name).weight
        weight *= inputs
        if outputs is not None:
            weight /= outputs[:, None]


@torch.no_grad()
def rescale_lora(block: Any, factors: Factors) -> None:
    """The same for the LoRA of a block whose own weights are rescaled already."""
    for name, (inputs, outputs) in factors.items():
        linear = block.get_submodule(name)
        linear.lora_A[ADAPTER].weight *= inputs
        if outputs is not None:
            linear.lora_B[ADAPTER].weight /= outputs[:, None]


def rescale_channels(model: Any, spread: float) -> list[Factors]:
    """Rescales the blocks of a base; returns the factors by block."""
    blocks: Any = find_blocks(model)[1]
    factors = [draw_factors(block, model.config.num_key_value_heads, spread) for block in blocks]
    for block, own in zip(blocks, factors, strict=True):
        rescale_block(block, own)
    return factors


def move_adapter(source: Path, base: Path, factors: list[Factors], out: Path) -> None:
    """Writes the GenieBlue `source` (folder) for its rescaled `base`; but for rounding it computes the same as before.

    Its replicated blocks are rescaled as the base's are.
    """
    model = GenieBlueForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    blocks: Any = find_blocks(model.multimodal_language_model)[1]
    for index, (block, own) in enumerate(zip(blocks, factors, strict=True)):
        if index in model.config.replicated_layers:
            rescale_block(block.modules_to_save[ADAPTER], own)
        else:
            rescale_lora(block, own)
    moved = GenieBlueForConditionalGeneration.from_base(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), model.vision_tower.to(torch.bfloat16),
        replicated_layers=model.config.replicated_layers, lora_rank=model.config.lora_rank,
        downsample_factor=model.config.downsample_factor,
    )  # fmt: skip
    moved.multi_modal_projector.load_state_dict(model.multi_modal_projector.state_dict())
    rescaled = {name: parameter for name, _, parameter in adapter_parameters(model.multimodal_language_model)}
    with torch.no_grad():
        for name, _, parameter in adapter_parameters(moved.multimodal_language_model):
            parameter.copy_(rescaled[name])
    moved.save_pretrained(out, processor=GenieBlueProcessor.from_pretrained(source))


def fine_tune(model: Any, rows: list[torch.Tensor], learning_rate: float) -> None:
    """Trains all weights, which are in float32, on one row a step."""
    examples: Any = [{"input_ids": row[0], "labels": row[0]} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=1, learning_rate=learning_rate, warmup_steps=10,
            lr_scheduler_type="cosine", bf16=True, use_cpu=True, logging_steps=10, save_strategy="no",
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model, settings, train_dataset=examples).train()


def make_base(
    source: Path, texts: Path, out: Path, steps: int, learning_rate: float, genieblue: Path | None
) -> dict[str, dict[str, float]]:
    """Writes the base in bfloat16, and for it a GenieBlue on `source`, if any; returns the errors of its grids."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    errors = {"as it came": grid_errors(model)}
    factors = rescale_channels(model, spread=0.1)
    errors["rescaled"] = grid_errors(model)
    if steps:
        fine_tune(model, question_rows(texts, tokenizer, steps), learning_rate)
        errors["fine-tuned"] = grid_errors(model)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    if genieblue is not None:
        move_adapter(genieblue, out, factors, out.with_name(f"{out.name}-genieblue"))
    return errors


def calibrate(model: Any, rows: list[torch.Tensor]) -> tuple[dict[str, torch.Tensor], MixedPrecision]:
    """Hessians by linear of the blocks, as `quantize` weighs tokens, and the damage of each format."""
    weights = {name: linear.weight for name, linear in block_linears(model).items()}
    requests = [{"input_ids": ids} for ids in rows]
    inputs = damage_inputs(model, requests[:REQUESTS], list(weights))
    plain = linear_hessians(model, lambda: [model(**request) for request in requests[REQUESTS:]], list(weights))
    precision = MixedPrecision(weights, torch.bfloat16)
    for linear in precision.linears:
        name = linear.name
        linear.measure(weights[name], plain[name], inputs[name], torch.bfloat16)
        plain[name] = balanced_hessian(plain[name], inputs.pop(name))
    return plain, precision


@torch.no_grad()
def round_blocks(model: Any, method: str, formats: dict[str, str], hessians: dict[str, torch.Tensor]) -> float:
    """Gives the blocks' linears rounded values; returns the bits per weight, scales and zero points included."""
    stored = count = 0
    for name, linear in block_linears(model).items():
        largest = FORMATS[formats[name]]
        size = None if largest is None else group_size_of(linear.in_features, largest)
        rounded = round_weight(
            linear.weight, 8 if size is None else 4, size or linear.in_features,
            method="rtn" if size is None else method, hessian=hessians.get(name),
        )  # fmt: skip
        linear.weight.copy_(rounded.dequantize())
        stored += stored_bytes(linear.weight.shape, size, torch.bfloat16)
        count += linear.weight.numel()
    return 8 * stored / count


def measure(base: Path, calibration: Path, texts: Path, cases: list[str], rows: int) -> dict[str, dict[str, float]]:
    """Bits per weight and both perplexities, by case."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    questions = torch.cat(question_rows(texts, tokenizer, TEXT_WINDOWS), dim=1)[0]
    english = held_out_stream(tokenizer, split_documents().held_out)
    calibration_rows = question_rows(calibration, tokenizer, rows)
    hessians: dict[str, torch.Tensor] = {}
    precision: MixedPrecision | None = None
    found = {}
    for case in ("bfloat16", *cases):
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        method, _, number = case.partition(":")
        if method in ("gptq", "mixed") and precision is None:
            hessians, precision = calibrate(model, calibration_rows)
        bits = 16.0
        if method == "mixed":
            assert precision is not None
            available = Budget(bits_per_weight=float(number)).bytes_for(precision.linears)
            bits = round_blocks(model, "gptq", precision.spend(available), hessians)
        elif case != "bfloat16":
            one = "w8" if method == "eight" else f"w4g{number}"
            bits = round_blocks(model, method, dict.fromkeys(block_linears(model), one), hessians)
        found[case] = {
            "bits per weight": bits,
            "texts": perplexity(model, questions, LENGTH, batch_size=2),
            "English": perplexity(model, english, LENGTH, batch_size=2, windows=ENGLISH_WINDOWS),
        }
        print(case, found[case], file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Prints the table of the sub-command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("make", "measure"))
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--genieblue", type=Path, help="a GenieBlue on --base, to be moved to the new base")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--cases", nargs="+", default=["rtn:64", "mse:64", "gptq:64", "mixed:4.5"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "make":
        errors = make_base(
            arguments.base, arguments.texts, arguments.out, arguments.steps, arguments.learning_rate,
            arguments.genieblue,
        )  # fmt: skip
        print_table("Relative L2 error, groups of 32", errors)
        return
    calibration = arguments.calibration or arguments.texts
    print_table("Perplexity", measure(arguments.base, calibration, arguments.texts, arguments.cases, arguments.rows))


if __name__ == "__main__":
    main()
