"""Quantized GenieBlues compared with 16 bits: size, load time, decode speed and accuracy.

    python -m benchmarks.quantization [--demo demo-out] [--full-size full-size] [--pairs 9] [--runs 3]

Decode speed is that of a random-weight model of 278 M parameters in linears (16 blocks, hidden size 1280), bf16, batch
1, in interleaved pairs. Accuracy is that of the model which `make demo` left in `--demo`, on its held-out scans and
texts. Bytes and load are those of the BlueLM-3B-shaped model which `benchmarks/full_size.py` made in `--full-size`,
each load in a process of its own and in turn. The last two are left out where the folder is not there.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.report import measured_apart, print_table
from benchmarks.views import compare, decode_seconds, make_model
from conversion.quantization.precision import QuantizationRecipe
from conversion.quantization.quantize import CalibrationSamples, quantize_genieblue
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor

PRECISIONS = {"W8A16": "w8a16", "W4A16": "w4a16"}
CALIBRATION_ROWS, CALIBRATION_LENGTH = 64, 512


def measure_speed(pairs: int, tokens: int) -> dict[str, dict[str, float]]:
    """Decode of each view in each precision against bf16 in the same pairs; the ratio is bf16's time over its own."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = make_model("cpu", hidden_size=1280, intermediate_size=3456)
        model.language_model.save_pretrained(folder / "base")
        model.config.base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / "bf16")
        ids = torch.randint(3, 32000, (1, 64))
        for name, precision in PRECISIONS.items():
            output = folder / precision
            quantize_genieblue(folder / "bf16", output, QuantizationRecipe(llm=precision, rounding="rtn"))
            quantized = GenieBlueForConditionalGeneration.from_pretrained(output)
            for view in ("text", "multimodal"):
                row = compare(
                    decode_seconds,
                    lambda view=view, **inputs: model(view=view, **inputs),
                    lambda view=view, quantized=quantized, **inputs: quantized(view=view, **inputs),
                    ids, tokens, pairs,
                )  # fmt: skip
                names = {"ms": "bf16 ms", "against_ms": "quantized ms", "ratio": "speed-up"}
                rows[f"{name}, {view} view"] = {names.get(key, key): value for key, value in row.items()}
    return rows


def measure_accuracy(demo: Path) -> dict[str, dict[str, float]]:
    """Exact match on the demo's held-out scans and perplexity of its held-out text, by precision and rounding."""
    from genieblue.data.collation import ChatCollator
    from genieblue.evaluation.answering import ModelAnswerer
    from genieblue.evaluation.evaluate import evaluate
    from genieblue.evaluation.samples import EvaluationDataset
    from genieblue.lab.scans import NumberScans, split_scans
    from genieblue.lab.text import held_out_stream, perplexity, split_documents, training_stream

    processor = GenieBlueProcessor.from_pretrained(demo / "genieblue")
    documents = split_documents()
    stream = training_stream(processor.tokenizer, documents.train)
    encode = ChatCollator(processor).encode
    numbers = NumberScans(split_scans()[0], CALIBRATION_ROWS * 4, seed=99, curriculum=0)
    samples = CalibrationSamples(
        text=list(stream[: CALIBRATION_ROWS * CALIBRATION_LENGTH].view(-1, 1, CALIBRATION_LENGTH)),
        multimodal=[
            {"input_ids": torch.tensor([row["input_ids"]]), "pixel_values": row["pixel_values"]}
            for row in map(encode, numbers)
        ],
    )
    questions = EvaluationDataset(demo / "held-out" / "answers.jsonl")
    held_out = held_out_stream(processor.tokenizer, documents.held_out)

    def score(folder: Path, **options: Any) -> dict[str, float]:
        model = GenieBlueForConditionalGeneration.from_pretrained(folder, **options)
        answers = evaluate(ModelAnswerer(model, processor, batch_size=25), questions, max_new_tokens=8)
        return {"exact_match": answers.scores()[0].mean, "perplexity": perplexity(model, held_out)}

    rows = {"16 bits (bf16)": score(demo / "genieblue", dtype=torch.bfloat16)}
    with tempfile.TemporaryDirectory() as folder:
        for precision, rounding in (("w8a16", "rtn"), ("w4a16", "rtn"), ("w4a16", "mse"), ("w4a16", "gptq")):
            recipe = QuantizationRecipe(llm=precision, rounding=rounding)
            output, base = Path(folder, f"{precision}-{rounding}"), Path(folder, f"base-{precision}-{rounding}")
            quantize_genieblue(demo / "genieblue", output, recipe, base_output=base, samples=samples)
            rows[f"{precision.upper()} {rounding}"] = score(output)
    return rows


def stored_sizes(folder: Path) -> dict[str, dict[str, float]]:
    """Bytes by part, against parameters × bits / 8; what the scales and the rest at 16 bits add is the difference."""
    from hub_cards.model_parts import model_info

    found = model_info(folder)
    precision = found.config["quantization"]
    bits = {"w4a16": 4, "w8a16": 8, "w16a16": 16}
    rows = {}
    for part, size in found.parts.items():
        if part != "language_model":
            rows[part] = {"bytes": size.bytes, "ratio": 8 * size.bytes / size.parameters / bits[precision[part]]}
    base = (folder / found.config["base_model_name_or_path"]).resolve()
    return rows | _base_sizes(base, bits[precision["llm"]])


def _base_sizes(base: Path, bits: int) -> dict[str, dict[str, float]]:
    """The base's blocks at `bits`, apart from its embedding, LM head and norms at 16."""
    from hub_cards.model_folder import parameter_sizes
    from modeling_genieblue.model_files_genieblue import QUANTIZED_WEIGHTS_NAME

    totals = {"llm blocks": [0, 0, 0], "embedding, head, norms": [0, 0, 0]}
    for name, size in parameter_sizes(base / QUANTIZED_WEIGHTS_NAME).items():
        part = "llm blocks" if ".weight._" in name or "put_scale" in name else "embedding, head, norms"
        totals[part][0] += size.parameters
        totals[part][1] += size.bytes
        totals[part][2] += size.bytes if size.parameters == 0 else 0
    rows = {}
    for part, (parameters, stored, overhead) in totals.items():
        ideal = parameters * (bits if part == "llm blocks" else 16) / 8
        rows[part] = {"bytes": stored, "ratio": stored / ideal, "scales": overhead}
    return rows


def compare_loads(folder: Path, runs: int) -> dict[str, dict[str, float]]:
    """Load of the full-size model at 16, 8 and 4 bits, in turn; medians."""
    folders = {"bf16": folder / "genieblue", **{name: folder / value for name, value in PRECISIONS.items()}}
    for name, precision in PRECISIONS.items():
        if not folders[name].exists():
            recipe = QuantizationRecipe(llm=precision, rounding="rtn")
            quantize_genieblue(folders["bf16"], folders[name], recipe)
    results: dict[str, list[dict]] = {name: [] for name in folders}
    for _ in range(runs):
        for name, path in folders.items():
            results[name].append(measured_apart("benchmarks.full_size", "--measure-model", str(path)))
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in results.items()
    }


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo-out"))
    parser.add_argument("--full-size", type=Path, default=Path("full-size"))
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--skip-speed", action="store_true")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(2)
    if not arguments.skip_speed:
        print_table("Decode, per token", measure_speed(arguments.pairs, arguments.tokens))
    if (arguments.demo / "held-out").is_dir():
        print_table("Accuracy of the demo's model", measure_accuracy(arguments.demo))
    if (arguments.full_size / "genieblue").is_dir():
        print_table("Load of the full-size model", compare_loads(arguments.full_size, arguments.runs))
        for name in PRECISIONS.values():
            sizes = stored_sizes(arguments.full_size / name)
            print_table(f"Stored bytes, {name}", sizes)
            total = sum(row["bytes"] for row in sizes.values()) / 1e9
            print(f"{total:.2f} GB in all; the paper's phone: 1.92 GB at W4A16 (1.77 without GenieBlue)")


if __name__ == "__main__":
    main()
