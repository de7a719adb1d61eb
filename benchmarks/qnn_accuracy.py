"""QNN bundles of a real model: what each precision costs, in answers to images and in perplexity of text.

    python -m benchmarks.qnn_accuracy MODEL --calibration chats.jsonl --held-out answers.jsonl --text gsm8k_test.jsonl

Exports MODEL once for each of `--settings` (into `--bundles`, where a finished one is used again), and runs the QDQ
graphs on the CPU: answers to `--held-out`, perplexity of the first tokens of `--text` (a text, or a JSONL whose
strings are joined), and the verdict of the export. The emulator repeats `--emulated` answers. Chunks are short,
so that little time is spent on padding. Nothing here runs on a phone.
"""

import argparse
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers.utils import logging as transformers_logging

from benchmarks.report import print_table
from conversion.qnn.bundle.runner import QnnRunner
from conversion.qnn.export import export_bundle
from conversion.qnn.verdict import bundle_logits
from genieblue.cli.qnn import HELD_OUT, divide_chats
from genieblue.data.calibration_chats import read_chats
from genieblue.data.collation import ChatCollator
from genieblue.evaluation.answering import ModelAnswerer
from genieblue.evaluation.evaluate import evaluate
from genieblue.evaluation.qnn_answering import BundleAnswerer
from genieblue.evaluation.samples import EvaluationDataset
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor

SETTINGS: dict[str, dict[str, Any]] = {
    "w8a16": {"llm": "w8a16"},
    "mixed-5": {"llm": "mixed"},
    "mixed-4.75": {"llm": "mixed", "bits_per_weight": 4.75},
    "w4a16-32": {"llm": "w4a16"},
    "w4a16-64": {"llm": "w4a16", "group_size": 64},
    "w4a16-32-rtn": {"llm": "w4a16", "rounding": "rtn"},
    "w4a16-channel-rtn": {"llm": "w4a16", "group_size": 0, "rounding": "rtn"},
}
LENGTHS = {"chunk_length": 64, "context_length": 512}


def read_windows(path: Path, tokenizer: Any, tokens: int) -> torch.Tensor:
    """The first `tokens` of a text in rows of a context."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
        text = "\n\n".join("\n".join(value for value in row.values() if isinstance(value, str)) for row in rows)
    ids = tokenizer(text[: 8 * tokens], add_special_tokens=False, verbose=False)["input_ids"]
    length = LENGTHS["context_length"]
    return torch.tensor(ids[: tokens // length * length]).reshape(-1, length)


def perplexity(windows: torch.Tensor, logits: Iterable[torch.Tensor]) -> float:
    """Of the tokens after the first of each window (length,), from its logits (length, vocabulary)."""
    losses = [functional.cross_entropy(rows[:-1], ids[1:]) for ids, rows in zip(windows, logits, strict=True)]
    return math.exp(float(torch.stack(losses).mean()))


def measure(answerer: Any, data: EvaluationDataset, tokens: int) -> dict[str, float]:
    """Percent of right answers, in all and by task."""
    scores = evaluate(answerer, data, max_new_tokens=tokens).scores()
    return {score.task: round(100 * score.mean, 1) for score in scores}


@torch.no_grad()
def measure_model(path: Path, windows: torch.Tensor, data: EvaluationDataset, tokens: int) -> dict[str, float]:
    """Perplexity and answers of the model itself."""
    model = GenieBlueForConditionalGeneration.from_pretrained(path)
    logits = (model.language_model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in windows)
    answerer = ModelAnswerer(model, GenieBlueProcessor.from_pretrained(path))
    return {"perplexity": round(perplexity(windows, logits), 3), **measure(answerer, data, tokens)}


def main() -> None:
    """Prints one row per setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bundles", type=Path, default=Path("qnn-bundles"))
    parser.add_argument("--settings", nargs="*", choices=[*SETTINGS], default=["w8a16", "mixed-5"])
    parser.add_argument("--samples", type=int, default=64, help="calibration chats")
    parser.add_argument("--images", type=int, default=100, help="held-out chats")
    parser.add_argument("--text-tokens", type=int, default=6144)
    parser.add_argument("--new-tokens", type=int, default=10)
    parser.add_argument("--emulated", type=int, default=0, help="held-out chats that the emulator answers too")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    processor = GenieBlueProcessor.from_pretrained(arguments.model)
    data = EvaluationDataset(arguments.held_out).first(arguments.images)
    windows = read_windows(arguments.text, processor.tokenizer, arguments.text_tokens)
    encode = ChatCollator(processor).encode
    chats, held_back = divide_chats(read_chats(arguments.calibration, arguments.samples + HELD_OUT), arguments.samples)

    own = measure_model(arguments.model, windows, data, arguments.new_tokens)
    rows: dict[str, dict[str, Any]] = {"PyTorch": own}
    print_table("Bundles", rows)
    for name in arguments.settings:
        bundle, start = arguments.bundles / name, time.perf_counter()
        if not bundle.exists():
            export_bundle(
                arguments.model, bundle, soc="sm8750", calibration=map(encode, chats),
                held_out=map(encode, held_back), **LENGTHS, **SETTINGS[name],
            )  # fmt: skip
        seconds = time.perf_counter() - start
        runner = QnnRunner(bundle)

        coded = bundle_logits(runner.bundle, "text", [runner.embed(ids.tolist()) for ids in windows])
        text = perplexity(windows, map(torch.from_numpy, coded))
        facts = runner.bundle.metadata
        rows[name] = {
            "bits": facts["bits_per_weight"],
            "MB": round(sum(path.stat().st_size for path in bundle.glob("language_*/*.bin")) / 1e6, 1),
            "seconds": round(seconds),
            **{
                f"{name}, {view}": round(found[key], 4)
                for view, found in facts["verdict"]["logits"].items()
                for name, key in (("cosine", "cosine"), ("largest error", "largest_error"))
            },
            "verdict": facts["verdict"]["result"],
            "perplexity": round(text, 3),
            "ratio": round(text / own["perplexity"], 3),
            **measure(BundleAnswerer(runner), data, arguments.new_tokens),
        }
        print_table("Bundles", rows)
        if arguments.emulated:
            few = data.first(arguments.emulated)
            found = [
                evaluate(BundleAnswerer(one), few, max_new_tokens=arguments.new_tokens).answers
                for one in (runner, QnnRunner(bundle, backend="emulator"))
            ]
            same = sum(a.answer == b.answer for a, b in zip(*found, strict=True))
            rows[name]["emulator as CPU"] = f"{same} of {arguments.emulated}"
            print_table("Bundles", rows)


if __name__ == "__main__":
    main()
