"""Time and peak memory of a stage-2 step: ours, stock PEFT with the same trained parts, and full fine-tuning.

    python -m benchmarks.training step [--pairs 7] [--blocks 12] [--batch 4] [--device cpu] [--json]

All three run the same batch through the same SigLIP-like tower and projector, over a random-weight Llama of 12 blocks
with the hidden size and vocabulary of SmolLM2-135M, in bf16 autocast over float32 trained weights, with AdamW. About
one token in twenty is labelled. Times are interleaved, step by step, and medians; peak memory is that of a process
that runs nothing else, above one that has only built the model.
"""

import argparse
import copy
import json
import statistics
import time
from abc import ABC, abstractmethod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from benchmarks.report import measured_apart, print_table
from benchmarks.views import synchronize
from genieblue.training.structure import GenieBlueStructure
from modeling_genieblue import GenieBlueForConditionalGeneration

TEXT_TOKENS, LABELLED_SHARE = 97, 0.05
SHAPES = {
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
                     "vocab_size": 49152, "num_hidden_layers": 30},
    "bluelm-3b": {"hidden_size": 2560, "intermediate_size": 6912, "num_attention_heads": 32, "num_key_value_heads": 8,
                  "vocab_size": 100008, "num_hidden_layers": 32},
}  # fmt: skip
NAMES = ("genieblue", "stock PEFT", "full fine-tuning")


class Contender(ABC):
    """One way to train: a loss of a batch, and an optimizer over what it trains."""

    def __init__(self, model: GenieBlueForConditionalGeneration, device: str):
        self.model, self.device = model, device
        self.optimizer = torch.optim.AdamW(self.trained(), lr=1e-5)

    @abstractmethod
    def trained(self) -> list[nn.Parameter]:
        """The parameters that train, in float32."""

    @abstractmethod
    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch."""

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """Forward, backward and the optimizer."""
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(torch.device(self.device))


class GenieBlue(Contender):
    """The engine of `genieblue train`: everything that a GenieBlue adds, the head reading labelled positions alone."""

    def trained(self) -> list[nn.Parameter]:
        structure = GenieBlueStructure(self.model)
        self.model.train()
        found = []
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(structure.group_of(name) is not None)
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                found.append(parameter)
        return found

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**batch, keep_logits=False).loss


class Dense(Contender):
    """A language model that gets the image features in place of the image tokens, as every such model does."""

    language_model: Any

    def __init__(self, model: GenieBlueForConditionalGeneration, device: str):
        self.language_model = self.made_from(model)
        self.tower, self.projector = model.vision_tower, model.multi_modal_projector
        super().__init__(model, device)

    def made_from(self, model: GenieBlueForConditionalGeneration) -> Any:
        """The language model that trains."""
        return copy.deepcopy(model.language_model)

    def trained(self) -> list[nn.Parameter]:
        for part in (self.language_model, self.tower, self.projector):
            part.train()
        parameters = [*self.language_model.parameters(), *self.tower.parameters(), *self.projector.parameters()]
        return self._as_trained(dict.fromkeys(parameters))

    @staticmethod
    def _as_trained(parameters: Any) -> list[nn.Parameter]:
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
        return list(parameters)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids, is_image = batch["input_ids"], batch["input_ids"] == self.model.config.image_token_id
        embeddings = self.language_model.get_input_embeddings()(ids.masked_fill(is_image, 0))
        features = self.model.get_image_features(batch["pixel_values"]).pooler_output
        merged = embeddings.masked_scatter(is_image[..., None], features.to(embeddings.dtype))
        return self.language_model(
            inputs_embeds=merged, attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss


class StockPeft(Dense):
    """The same adapter in stock PEFT over the plain base, the tower and the projector beside it."""

    def made_from(self, model: GenieBlueForConditionalGeneration) -> Any:
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder + "/model")
            return PeftModel.from_pretrained(
                copy.deepcopy(model.language_model), folder + "/model", subfolder="language_adapter", is_trainable=True
            )

    def trained(self) -> list[nn.Parameter]:
        adapter = [parameter for parameter in self.language_model.parameters() if parameter.requires_grad]
        self.language_model.train()
        return self._as_trained([*adapter, *self.tower.parameters(), *self.projector.parameters()])


CONTENDERS = dict(zip(NAMES, (GenieBlue, StockPeft, Dense), strict=True))


def make_model(shape: str, blocks: int | None, device: str) -> GenieBlueForConditionalGeneration:
    """A GenieBlue with random weights over a Llama of a known shape, and a tower of 27 patches a side, or SigLIP's."""
    torch.manual_seed(0)
    sizes = dict(SHAPES[shape])
    sizes["num_hidden_layers"] = blocks or sizes["num_hidden_layers"]
    base = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).to(device, torch.bfloat16).eval()
    vision = SiglipVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6, image_size=192,
        patch_size=16,
    )  # fmt: skip
    tower = SiglipVisionModel(vision).to(device, torch.bfloat16)
    return GenieBlueForConditionalGeneration.from_base(base, tower)


def make_batch(model: GenieBlueForConditionalGeneration, size: int, device: str) -> dict[str, torch.Tensor]:
    """`size` samples of one tile and some text, of which a twentieth is labelled."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(5, 1000, (size, TEXT_TOKENS), generator=generator)
    image = torch.full((size, config.image_seq_length), config.image_token_id)
    ids = torch.cat([image, text], dim=1)
    labels = torch.full_like(ids, -100)
    count = max(1, round(LABELLED_SHARE * ids.shape[1]))
    labels[:, -count:] = ids[:, -count:]
    side = config.vision_config.image_size
    pixels = torch.randn(size, 3, side, side, generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
    return {name: value.to(device) for name, value in batch.items()}


def measure_times(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds of a step, and the ratio to our own, interleaved."""
    models = {name: make_model(arguments.shape, arguments.blocks, arguments.device) for name in NAMES}
    contenders = {name: CONTENDERS[name](models[name], arguments.device) for name in NAMES}
    batch = make_batch(models[NAMES[0]], arguments.batch, arguments.device)
    clock = time.process_time if arguments.device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(arguments.pairs + 1):
        for name in NAMES if number % 2 else reversed(NAMES):
            start = clock()
            contenders[name].step(batch)
            if number:  # the first one allocates
                seconds[name].append(clock() - start)
    rows = {}
    for name, values in seconds.items():
        ratios = [ours / other for ours, other in zip(seconds[NAMES[0]], values, strict=True)]
        tokens = batch["input_ids"].numel() / statistics.median(values)
        rows[name] = {
            "step, s": statistics.median(values), "tokens/s": tokens, "ours / this": statistics.median(ratios)
        }  # fmt: skip
    return rows


def measure_memory(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """In this process: peak bytes of two steps."""
    model = make_model(arguments.shape, arguments.blocks, arguments.device)
    contender = CONTENDERS[name](model, arguments.device)
    batch = make_batch(model, arguments.batch, arguments.device)
    for _ in range(2):
        contender.step(batch)
    if arguments.device == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated()}
    # Not `ru_maxrss`, which a process inherits from the one that starts it.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"bytes": 1024 * int(peak.split()[1])}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the sub-command `step`."""
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--blocks", type=int, help="instead of the shape's own number")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", choices=NAMES, help=argparse.SUPPRESS)
    parser.set_defaults(run=step)


def step(arguments: argparse.Namespace) -> None:
    """Prints the table, or in a process of its own the peak memory of one contender."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(json.dumps(measure_memory(arguments.memory_of, arguments)))
        return
    given = ["step", "--shape", arguments.shape, "--batch", str(arguments.batch), "--device", arguments.device]
    given += ["--blocks", str(arguments.blocks)] if arguments.blocks else []
    rows = measure_times(arguments)
    for name in NAMES:
        peak = measured_apart("benchmarks.training", *given, "--memory-of", name)["bytes"]
        rows[name]["peak memory, GB"] = peak / 1e9
    if arguments.json:
        print(json.dumps(rows))
    else:
        print_table(f"stage 2, {arguments.shape}, batch {arguments.batch}", rows)
