"""A tiny GenieBlue with its data, for tests of training; as a script, a run that kills itself."""

import os
import signal
import sys
from pathlib import Path

import torch
from PIL import Image
from tiny_models import save_tiny_base, tiny_vision_tower
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from genieblue.training.stages import TrainingSettings, train
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor

# Six steps an epoch, checkpoints that are all kept.
RUN = {"epochs": 3, "save_steps": 2, "keep_checkpoints": 9}
COLOURS = ("red", "green", "blue", "white", "black", "yellow", "gray", "pink")


def make_base(folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny base on disk."""
    return save_tiny_base("llama", folder, dtype=dtype)


def make_model(base: str | Path, **options):
    """A new GenieBlue on the base in a folder, and its processor; always the same weights."""
    torch.manual_seed(1)
    model = GenieBlueForConditionalGeneration.from_base(
        AutoModelForCausalLM.from_pretrained(base),
        tiny_vision_tower(),
        **{"lora_rank": 4, "lora_dropout": 0.1, **options},
    )
    processor = GenieBlueProcessor.from_base(
        AutoTokenizer.from_pretrained(base),
        image_token_id=model.config.image_token_id,
        image_seq_length=model.config.image_seq_length,
        tile_size=24,
        max_tiles=4,
    )
    return model, processor


def chat(question: str, answer: str, *images) -> dict:
    """One sample in the form of messages."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": list(images)}


def make_data() -> list[dict]:
    """Eleven samples: eight with an image of one or three tiles, three of text."""
    pictures = [(colour, Image.new("RGB", (24 + 24 * (i % 2), 24), colour)) for i, colour in enumerate(COLOURS)]
    rows = [chat("<image>\nWhich colour?", f"It is {colour}.", image) for colour, image in pictures]
    return rows + [chat(f"What is {i}?", f"A number, {i}.") for i in range(3)]


def make_settings(**options) -> TrainingSettings:
    """Stage 2 in small steps that are logged one by one."""
    defaults = {
        "stage": 2, "batch_size": 2, "logging_steps": 1, "save_steps": 0, "learning_rate": 1e-3, "warmup_steps": 1,
        "eval_max_new_tokens": 4, "show_progress": False,
    }  # fmt: skip
    return TrainingSettings(**{**defaults, **options})


class AtStep(TrainerCallback):
    """Calls a function with the model when so many steps are done."""

    def __init__(self, step: int, function):
        self.step, self.function = step, function

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.function(model)


def losses(result) -> dict[int, float]:
    """Logged loss by step."""
    return {entry["step"]: entry["loss"] for entry in result.log_history if "loss" in entry}


def run_and_die(base: str, output: str, step: str) -> None:
    """A run of RUN that is killed, as `kill -9` does it, when `step` steps are done."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model, processor = make_model(base)
    die = AtStep(int(step), lambda _: os.kill(os.getpid(), signal.SIGKILL))
    train(model, processor, make_data(), output, make_settings(**RUN), callbacks=[die])


if __name__ == "__main__":
    run_and_die(*sys.argv[1:])
