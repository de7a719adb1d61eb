"""Time and peak memory of a stage-2 step: ours, stock PEFT with the same trained parts, and full fine-tuning.

    python -m benchmarks.training step --threads 1 [--batch 4] [--length 97] [--rounds 2] [--steps 4] [--json]

Ours is trained by the trainer of `genieblue train`, the others by transformers' `Trainer` as it is. All three see the
same samples of one tile and some text, of which a twentieth is labelled, with the same SigLIP-like tower and projector
over a Llama of random weights in the shape of SmolLM2-135M (`--blocks` of its 30), in bf16 autocast over float32
trained weights, with torch's fused AdamW and clipped gradients. Stock PEFT trains as many parameters as we do. Steps
are timed from the end of one to the end of the next, data loading, logging and checks included, a few at a time in
turn; the figures are medians. Peak memory is that of a process that runs nothing else.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PrinterCallback,
    SiglipVisionConfig,
    SiglipVisionModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.report import measured_apart, print_table
from benchmarks.views import seconds, synchronize
from genieblue.training.memory import peak_memory
from genieblue.training.run_log import RunLog
from genieblue.training.settings import TrainingSettings
from genieblue.training.stages import training_arguments
from genieblue.training.structure import GenieBlueStructure
from genieblue.training.trainer import StageTrainer
from modeling_genieblue import GenieBlueForConditionalGeneration

LABELLED_SHARE = 0.05
SHAPES = {
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
                     "vocab_size": 49152, "num_hidden_layers": 30},
    "bluelm-3b": {"hidden_size": 2560, "intermediate_size": 6912, "num_attention_heads": 32, "num_key_value_heads": 8,
                  "vocab_size": 100008, "num_hidden_layers": 32},
}  # fmt: skip
OURS, PEFT, FULL = NAMES = ("genieblue", "stock PEFT", "full fine-tuning")


class Rival(nn.Module):
    """A language model that gets the image features in place of the image tokens, as every such model does."""

    def __init__(self, model: GenieBlueForConditionalGeneration, language_model: Any):
        super().__init__()
        self.language_model = language_model
        self.tower, self.projector = model.vision_tower, model.multi_modal_projector
        self.image_token_id = model.config.image_token_id

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **inputs: Any) -> Any:
        """The language model's outputs, with the loss of `labels`."""
        is_image = input_ids == self.image_token_id
        embeddings = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        features = self.projector(self.tower(pixel_values.to(self.tower.dtype)).last_hidden_state)
        merged = embeddings.masked_scatter(is_image[..., None], features.to(embeddings.dtype))
        return self.language_model(inputs_embeds=merged, **inputs)


def make_contender(name: str, options: argparse.Namespace) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A model of which the same parts require gradients, in float32, and samples for it.

    Full fine-tuning trains all of the language model instead.
    """
    model = make_model(options.shape, options.blocks, options.device)
    structure = GenieBlueStructure(model)
    trained = [parameter for each, parameter in model.named_parameters() if structure.group_of(each)]
    count = sum(parameter.numel() for parameter in trained)
    if name == OURS:
        contender: nn.Module = model
    else:
        image_path = [*model.vision_tower.parameters(), *model.multi_modal_projector.parameters()]
        image_path = [parameter for parameter in image_path if any(parameter is each for each in trained)]
        language_model: Any = model.language_model
        if name == PEFT:
            with TemporaryDirectory() as folder:
                model.save_pretrained(folder + "/model")
                language_model = PeftModel.from_pretrained(
                    language_model, folder + "/model", subfolder="language_adapter", is_trainable=True
                )
            language = [parameter for parameter in language_model.parameters() if parameter.requires_grad]
        else:
            language = list(language_model.parameters())
        trained = [*image_path, *language]
        contender = Rival(model, language_model)
    if name == PEFT and (found := sum(parameter.numel() for parameter in trained)) != count:
        raise ValueError(f"Stock PEFT trains {found} parameters, ours {count}: the figures would not compare.")
    contender.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    return contender, make_samples(model.config, options.length, options.batch * (options.steps + 1))


def make_model(shape: str, blocks: int | None, device: str) -> GenieBlueForConditionalGeneration:
    """A GenieBlue with random weights over a Llama of a known shape, and a tower of 12 × 12 patches."""
    torch.manual_seed(0)
    sizes = dict(SHAPES[shape])
    sizes["num_hidden_layers"] = blocks or sizes["num_hidden_layers"]
    config = LlamaConfig(**sizes, tie_word_embeddings=True)
    vision = SiglipVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6, image_size=192,
        patch_size=16,
    )  # fmt: skip
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        tower = SiglipVisionModel(vision).to(torch.bfloat16)
    return GenieBlueForConditionalGeneration.from_base(base, tower)


def make_samples(config: Any, length: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Samples of one tile and text, `length` tokens together, of which a twentieth is labelled."""
    generator = torch.Generator().manual_seed(0)
    side, labelled = config.vision_config.image_size, max(1, round(LABELLED_SHARE * length))
    samples = []
    for _ in range(count):
        ids = torch.randint(5, 1000, (length,), generator=generator)
        ids[: config.image_seq_length] = config.image_token_id
        labels = ids.clone()
        labels[:-labelled] = -100
        pixels = torch.randn(3, side, side, generator=generator)
        samples.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    return samples


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Samples of one length → a batch."""
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


class StepTimes(TrainerCallback):
    """Seconds from the end of each step to the end of the next one, by `clock`."""

    def __init__(self, device: str, clock: Callable[[], float]):
        self.seconds: list[float] = []
        self._device, self._clock, self._last = torch.device(device), clock, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the time; the first step, which allocates, only starts the clock."""
        synchronize(self._device)
        now = self._clock()
        if state.global_step > 1:
            self.seconds.append(now - self._last)
        self._last = now


def train_steps(name: str, contender: Any, samples: list[dict[str, torch.Tensor]], options: argparse.Namespace,
                batch: int, clock: Callable[[], float] = seconds) -> list[float]:  # fmt: skip
    """The seconds of some steps after a first one, by `clock`."""
    times, steps = StepTimes(options.device, clock), options.steps
    settings = TrainingSettings(stage=2, batch_size=batch, steps=steps + 1, save_steps=0, learning_rate=1e-5)
    with TemporaryDirectory() as folder:
        if name == OURS:
            structure = GenieBlueStructure(contender)
            recipe = structure.recipe(2)
            groups = structure.parameter_groups(
                recipe.learning_rates(settings.learning_rate, {}), settings.vision_layer_decay, settings.weight_decay
            )
            trainer: Trainer = StageTrainer(
                contender, training_arguments(settings, recipe, Path(folder)), data_collator=collate,
                train_dataset=samples, callbacks=[times, RunLog(Path(folder))], autocast_dtype=torch.bfloat16,
                settings_record={}, keep_checkpoints=1, optimizers=(torch.optim.AdamW(groups, fused=True), None),
            )  # fmt: skip
        else:
            arguments = TrainingArguments(
                output_dir=folder, per_device_train_batch_size=batch, max_steps=steps + 1, learning_rate=1e-5,
                lr_scheduler_type="cosine", weight_decay=settings.weight_decay, bf16=True, save_strategy="no",
                report_to=[], disable_tqdm=True, remove_unused_columns=False, use_cpu=options.device == "cpu",
                dataloader_pin_memory=options.device != "cpu",
            )  # fmt: skip
            trainer = Trainer(contender, arguments, data_collator=collate, train_dataset=samples, callbacks=[times])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return times.seconds


def measure_times(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds of a step, and the ratio of ours to it, a few steps of each in turn."""
    contenders = {name: make_contender(name, options) for name in NAMES}
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(options.rounds):
        for name in NAMES if number % 2 else reversed(NAMES):
            found[name] += train_steps(name, *contenders[name], options, options.batch)
    medians = {name: statistics.median(found[name]) for name in NAMES}
    return {
        name: {"step, s": value, "tokens/s": options.batch * options.length / value, "ours / this":
               medians[OURS] / value, "fastest": min(found[name]), "slowest": max(found[name])}
        for name, value in medians.items()
    }  # fmt: skip


def measure_memory(name: str, options: argparse.Namespace) -> dict[str, float]:
    """In this process: peak bytes of the steps."""
    train_steps(name, *make_contender(name, options), options, options.batch)
    return {"bytes": peak_memory(torch.device(options.device))}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the sub-command `step`."""
    add_shape_options(parser)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", choices=NAMES, help=argparse.SUPPRESS)
    parser.set_defaults(run=step)


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what is trained and for how long."""
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--blocks", type=int, help="instead of the shape's own number")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=97, help="tokens of a sample, those of its image included")
    parser.add_argument("--steps", type=int, default=4, help="of each in turn, after a first one")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")


def shape_arguments(options: argparse.Namespace) -> list[str]:
    """The same options for another process."""
    names = ("shape", "blocks", "batch", "length", "steps", "device")
    return [word for name in names if (value := getattr(options, name)) for word in (f"--{name}", str(value))]


def step(options: argparse.Namespace) -> None:
    """Prints the table, or in a process of its own the peak memory of one contender."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(measure_memory(options.memory_of, options)))
        return
    command = ("benchmarks.training", "step", *shape_arguments(options), "--steps", "2")
    peaks = {name: measured_apart(*command, "--memory-of", name)["bytes"] for name in NAMES}
    rows = measure_times(options)
    for name, peak in peaks.items():
        rows[name] |= {"peak memory, GB": peak / 1e9, "ours / this, memory": peaks[OURS] / peak}
    if options.json:
        print(json.dumps(rows))
    else:
        print_table(f"stage 2, {options.shape}, batches of {options.batch} × {options.length}", rows)
