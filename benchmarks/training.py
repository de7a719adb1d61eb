"""Figures of training, one sub-command each.

    python -m benchmarks.training packing --base smollm2 --texts gsm8k_train.jsonl

`--base` is a folder with a base LLM, of which the tokenizer and the shape are taken (with `--blocks` of its blocks and
random weights). `--texts` is a JSONL file with `question` and `answer`, such as GSM8K's.

packing: one epoch over the same samples, padded, grouped by length and packed, in turn. CPU time of the steps, data
loading included, on one thread; medians of the runs.

step: see `training_step`. processes: see `training_processes`.
"""

import argparse
import itertools
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    SiglipVisionConfig,
    SiglipVisionModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from benchmarks import training_processes, training_step
from benchmarks.report import print_table
from genieblue.data.chats import ChatDataset
from genieblue.data.collation import ChatCollator
from genieblue.training.settings import TrainingSettings
from genieblue.training.stages import train
from genieblue.training.structure import GenieBlueStructure
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor

TILE = 112  # pixels
IMAGES = ((112, 112), (224, 112), (112, 224), (224, 224))  # one, three and five tiles with the thumbnail


def make_pair(base: Path, blocks: int) -> tuple[Any, Any]:
    """A GenieBlue of random weights in the shape of a base, with a small vision tower, and its processor."""
    torch.manual_seed(0)
    language = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(base, num_hidden_layers=blocks), dtype=torch.float32
    )
    vision = SiglipVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=3, image_size=TILE,
        patch_size=14,
    )  # fmt: skip
    model = GenieBlueForConditionalGeneration.from_base(
        language, SiglipVisionModel(vision), base_model_name_or_path=str(base)
    )
    processor = GenieBlueProcessor.from_base(
        AutoTokenizer.from_pretrained(base), image_token_id=model.config.image_token_id,
        image_seq_length=model.config.image_seq_length, tile_size=TILE, max_tiles=4,
    )  # fmt: skip
    return model, processor


def make_samples(texts: Path, count: int) -> list[dict[str, Any]]:
    """Two thirds questions with worked answers, one third images with short answers."""
    with texts.open(encoding="utf-8") as file:
        pairs = [json.loads(line) for line in itertools.islice(file, count - count // 3)]
    samples = [_sample(pair["question"], pair["answer"]) for pair in pairs]
    for number in range(count // 3):
        image = Image.effect_noise(IMAGES[number % len(IMAGES)], 60).convert("RGB")
        samples.append(_sample("<image>\nIs this a photo or noise?", "It is noise.", image))
    return samples


def _sample(question: str, answer: str, *images: Image.Image) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": list(images)}


class CpuTime(TrainerCallback):
    """CPU seconds from the first step to the last one."""

    seconds = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Starts."""
        self._begin = time.process_time()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends."""
        self.seconds = time.process_time() - self._begin


def packing(options: argparse.Namespace) -> None:
    """Packed and grouped against padded batches: tokens a second without padding."""
    torch.set_num_threads(1)
    model, processor = make_pair(options.base, options.blocks)
    samples = make_samples(options.texts, options.samples)
    collator = ChatCollator(processor)
    rows = [row for sample in samples for row in collator.rows(sample)]
    tokens = sum(len(row["input_ids"]) for row in rows)
    labelled = sum(label >= 0 for row in rows for label in row["labels"])
    cases = {
        f"padded, {options.batch_size} samples": {"batch_size": options.batch_size},
        f"by length, {options.batch_size} samples": {"batch_size": options.batch_size, "group_by_length": True},
        f"packed, {options.packs} rows of {options.max_length}": {
            "batch_size": options.packs, "pack": True, "max_length": options.max_length
        },
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    steps: dict[str, int] = {}
    for _, (name, case) in itertools.product(range(options.runs), cases.items()):
        settings = TrainingSettings(stage=2, save_steps=0, show_progress=False, **case)
        clock = CpuTime()
        with tempfile.TemporaryDirectory() as folder:
            result = train(UnsavedStructure(model), processor, ChatDataset(samples), Path(folder) / "out", settings,
                           callbacks=[clock])  # fmt: skip
        seconds[name].append(clock.seconds)
        steps[name] = result.steps
    padded = seconds[next(iter(cases))]
    table = {}
    for name, times in seconds.items():
        ratios = [first / second for first, second in zip(padded, times, strict=True)]
        table[name] = {
            "steps": str(steps[name]),
            "tokens/s": tokens / statistics.median(times),
            "labelled tokens/s": labelled / statistics.median(times),
            "against padded": f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
        }
    mean = statistics.mean(len(row["input_ids"]) for row in rows)
    print_table(f"{len(rows)} samples of {mean:.0f} tokens, {options.blocks} blocks", table)


class UnsavedStructure(GenieBlueStructure):
    """A structure that is trained for its time alone."""

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Writes nothing."""


def main() -> None:
    """Runs one benchmark."""
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("packing", help="padded, grouped and packed batches")
    command.add_argument("--base", type=Path, required=True)
    command.add_argument("--texts", type=Path, required=True)
    command.add_argument("--blocks", type=int, default=30)
    command.add_argument("--samples", type=int, default=120)
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--packs", type=int, default=2)
    command.add_argument("--max-length", type=int, default=1024)
    command.add_argument("--runs", type=int, default=3)
    command.set_defaults(run=packing)
    training_step.add_options(commands.add_parser("step", help="a step against stock PEFT and full fine-tuning"))
    training_processes.add_options(commands.add_parser("processes", help="two processes against one"))
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
