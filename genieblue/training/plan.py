"""What a run will take, before it starts: parameters, memory, disk, tokens and steps."""

import contextlib
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from genieblue.data.collation import EncodedChats
from genieblue.data.packing import PackedChats
from genieblue.training.feature_cache import bytes_of_tile
from genieblue.training.settings import TrainingSettings
from genieblue.training.sharding import trained_blocks
from genieblue.training.structure import VISION_TOWER, GenieBlueStructure
from genieblue.training.zero import BUCKET, zero_stage
from hub_cards.short_numbers import counted, short_bytes, short_count

FLOAT32 = 4  # bytes
MOMENTS = 2  # of Adam, by parameter
GATHERED = 3  # with FSDP at the same time: the weights of a block and of the next one, and gradients of one
PROBED = 64  # samples whose length is measured
# Activations that a block keeps for its backward pass, in values by token and hidden unit, without the attention
# matrix, which fused attention never stores (arXiv 2205.05198, equation 1: 34 bytes in 16 bits).
KEPT_BY_BLOCK, KEPT_BY_CHECKPOINTED_BLOCK = 17, 1


@dataclass(frozen=True)
class TrainingPlan:
    """The costs of a run; sizes in bytes, memory by device.

    Attributes:
        parameters: by part; `base` is frozen.
        memory: by use; `activations (estimate)` is for one batch of samples of mean length, or of mean packs.
        checkpoint: bytes of one checkpoint; `kept` of all that are on disk at the same time, with the final model.
        image_features: bytes that the features of a frozen vision tower take on disk at most, if they are kept.
        passes: over the data.
        samples: in an epoch, in which those of a mixture may repeat; `shares` are those of its parts.
        tokens_per_sample: mean of the first samples, image tokens included; `labelled` is the share that is learned.
    """

    parameters: dict[str, int]
    trained: dict[str, int]
    memory: dict[str, int]
    checkpoint: int
    kept: int
    image_features: int
    passes: float
    samples: int
    packs: int | None  # that the samples are in
    tokens_per_sample: float
    labelled: float
    tokens_per_step: float
    steps: int
    shares: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`, with sums."""
        return asdict(self) | {"memory_total": sum(self.memory.values())}


def plan_training(
    structure: GenieBlueStructure,
    groups: tuple[str, ...],
    data: EncodedChats | PackedChats,
    settings: TrainingSettings,
    *,
    held_out: int = 0,
) -> TrainingPlan:
    """Works out a run's costs from the model and a few encoded samples; `held_out` are those of the validation."""
    parameters, trained = _count_parameters(structure, groups)
    count = sum(trained.values())
    world = int(os.environ.get("WORLD_SIZE", 1))
    chats = data.chats if isinstance(data, PackedChats) else data
    lengths, labelled, tiles, pixels = _probe(chats)
    mean = sum(lengths) / len(lengths)
    tokens = data.num_tokens / len(data) if isinstance(data, PackedChats) else mean  # in a row of a batch
    per_step = settings.samples_per_step
    steps = settings.steps or math.ceil(math.ceil(len(data) / per_step) * (settings.epochs or 1.0))
    passes = steps * per_step / len(data)
    own = sum(parameters.values()) - parameters["base"]
    zero = zero_stage()
    share = math.ceil(count / world) if settings.fsdp or zero else count
    exchanged = BUCKET if zero else count if world > 1 and not settings.fsdp else 0
    gathered = _largest_group(structure, groups) if settings.fsdp else 0
    memory = {
        "base": sum(tensor.numel() * tensor.element_size() for tensor in structure.frozen.parameters()),
        "trained weights (float32)": (count + share if zero else share) * FLOAT32,
        "untrained parts": (own - count) * structure.frozen.dtype.itemsize,
        "gradients (float32)": (count if zero == 1 else share) * FLOAT32,
        "optimizer (AdamW, float32)": share * MOMENTS * FLOAT32,
        "gradients being exchanged": exchanged * FLOAT32,
        "blocks being gathered": gathered * GATHERED * FLOAT32,
        "activations (estimate)": _activations(
            structure, settings, VISION_TOWER in trained, tokens, pixels * tokens / sum(lengths), labelled
        ),
    }
    checkpoint = count * (1 + MOMENTS) * FLOAT32
    checkpoints = (settings.keep_checkpoints + 1) * checkpoint if settings.save_steps else 0  # one while it is written
    best = 2 * count * FLOAT32 if held_out else 0  # one while it is written
    features = 0
    if settings.cache_image_features:
        seen = min(passes, 1.0) * len(chats) + held_out
        features = math.ceil(seen * tiles / min(PROBED, len(chats))) * bytes_of_tile(structure.model.vision_tower)
    return TrainingPlan(
        parameters=parameters,
        trained=trained,
        memory={name: value for name, value in memory.items() if value},
        checkpoint=checkpoint,
        kept=checkpoints + best + own * structure.frozen.dtype.itemsize + features,
        image_features=features,
        passes=passes,
        samples=len(chats),
        packs=len(data) if isinstance(data, PackedChats) else None,
        tokens_per_sample=mean,
        labelled=labelled,
        tokens_per_step=tokens * min(per_step, len(data)),
        steps=steps,
        shares=chats.chats.shares(),
    )


def check_disk(plan: TrainingPlan, folder: Path) -> None:
    """`OSError` if the disk cannot hold all that the run will write."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    missing = plan.kept - _bytes_in(folder)  # a resumed run has some of it
    features = f", image features of {short_bytes(plan.image_features)}" if plan.image_features else ""
    if missing > free:
        raise OSError(
            f"The run will write {short_bytes(missing)} (checkpoints of {short_bytes(plan.checkpoint)} each, the model"
            f"{features}), but {existing} has {short_bytes(free)} free: free some space, keep fewer checkpoints "
            "(`keep_checkpoints`, --keep-checkpoints), or write none (`save_steps=0`, --save-steps 0)"
            f"{'; or leave out `cache_image_features` (--cache-image-features)' if features else ''}."
        )


def _bytes_in(folder: Path) -> int:
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another process of the run cleans up
                size += os.path.getsize(os.path.join(parent, name))
    return size


def format_plan(plan: TrainingPlan) -> list[str]:
    """The plan as lines of text."""
    parts = ", ".join(f"{name} {short_count(number)}" for name, number in plan.trained.items())
    memory = ", ".join(f"{name} {short_bytes(size)}" for name, size in plan.memory.items())
    shares = ", ".join(f"{name} {share:.1%}" for name, share in plan.shares.items())
    packs = "" if plan.packs is None else f", in {counted(plan.packs, 'pack')}"
    features = f" and image features of {short_bytes(plan.image_features)}, read in {plan.passes:.2g} epochs"
    features = features if plan.image_features else ""
    return [
        f"Trained parameters: {short_count(sum(plan.trained.values()))} ({parts}); the base's "
        f"{short_count(plan.parameters['base'])} stay frozen.",
        f"Memory per device: about {short_bytes(sum(plan.memory.values()))} ({memory}).",
        f"Disk: {short_bytes(plan.checkpoint)} per checkpoint, at most {short_bytes(plan.kept)} at a time with the "
        f"model{features}.",
        f"Steps: {plan.steps:,}, of about {plan.tokens_per_step:,.0f} tokens ({counted(plan.samples, 'sample')} of "
        f"{plan.tokens_per_sample:,.0f} tokens on average, {plan.labelled:.0%} of them learned{packs}).",
        *([f"Data: {shares} of the samples drawn; an epoch has {plan.samples:,}."] if shares else []),
    ]


def remaining(steps: int, seconds: float, price_per_hour: float | None) -> str:
    """Time for `steps` of `seconds` each, and what it costs."""
    left = steps * seconds
    hours = left / 3600
    time = f"{hours:.1f} hours" if hours >= 1 else f"{left / 60:.0f} minutes" if left >= 120 else f"{left:.0f} s"
    cost = "" if price_per_hour is None else f", about {hours * price_per_hour:.2f} at {price_per_hour:g} an hour"
    return f"About {time} left for {steps:,} steps of {seconds:.2f} s{cost}."


def _count_parameters(structure: GenieBlueStructure, groups: tuple[str, ...]) -> tuple[dict[str, int], dict[str, int]]:
    """Of each part, and of each group that is trained: a part may have parameters that never are."""
    parts = {"base": sum(parameter.numel() for parameter in structure.frozen.parameters())}
    trained = dict.fromkeys(groups, 0)
    frozen = {id(parameter) for parameter in structure.frozen.parameters()}
    for name, parameter in structure.model.named_parameters():
        if id(parameter) in frozen:
            continue
        group = structure.group_of(name)
        part = group or name.partition(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
        if group in trained:
            trained[group] += parameter.numel()
    return parts, trained


def _largest_group(structure: GenieBlueStructure, groups: tuple[str, ...]) -> int:
    """Parameters of the largest part that FSDP gathers at once: a block, or all that is in none."""
    trained = {id(each): each.numel() for name, each in structure.model.named_parameters()
               if structure.group_of(name) in groups}  # fmt: skip
    blocks = [sum(trained.get(id(each), 0) for each in block.parameters())
              for block in trained_blocks(structure.model, lambda each: id(each) in trained)]  # fmt: skip
    return max([*blocks, sum(trained.values()) - sum(blocks)])


def _probe(data: EncodedChats) -> tuple[list[int], float, int, int]:
    """Lengths of some samples spread over the data, the share of labelled tokens, how many tiles and pixel values."""
    count = min(PROBED, len(data))
    rows = [row for number in range(count) for row in data[number * len(data) // count]]
    lengths = [len(row["input_ids"]) for row in rows]
    labelled = sum(label >= 0 for row in rows for label in row["labels"])
    tiles = [row["pixel_values"] for row in rows if "pixel_values" in row]
    return lengths, labelled / sum(lengths), sum(map(len, tiles)), sum(each.numel() for each in tiles)


def _activations(
    structure: GenieBlueStructure,
    settings: TrainingSettings,
    trains_tower: bool,
    tokens: float,
    pixels: float,
    labelled: float,
) -> int:
    """Bytes that one batch keeps for its backward pass, roughly."""
    text = structure.model.config.text_config
    size = 2 if structure.frozen.dtype == torch.bfloat16 else FLOAT32
    kept = KEPT_BY_CHECKPOINTED_BLOCK if settings.gradient_checkpointing else KEPT_BY_BLOCK
    blocks = text.num_hidden_layers * text.hidden_size * tokens
    tower = structure.vision_activations(pixels) if trains_tower else 0
    logits = tokens * labelled * text.vocab_size * FLOAT32
    return int(settings.batch_size * ((blocks + tower) * kept * size + 2 * logits))
