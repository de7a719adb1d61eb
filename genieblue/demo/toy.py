"""The quick demo: a Llama from scratch learns to read handwritten numbers."""

import math
import tempfile
from pathlib import Path
from typing import Any

from conversion.create import create_genieblue
from genieblue.demo.digit_tower import make_digit_tower
from genieblue.demo.recipe import DemoRecipe
from genieblue.lab.readings import Reading
from genieblue.lab.scans import NumberScans, draw_held_out, split_scans
from genieblue.lab.toy_base import make_toy_base
from genieblue.training.settings import TrainingSettings

STAGES: dict[int, dict[str, Any]] = {
    1: {"steps": 60, "batch_size": 32, "learning_rates": {"multi_modal_projector": 2e-3}},
    2: {
        "steps": 2700,
        "batch_size": 16,
        "learning_rates": {
            "vision_tower": 5e-4, "multi_modal_projector": 2e-3, "lora": 2e-3, "replicated_blocks": 1e-3
        },
    },
}  # fmt: skip
NUMBERS_PER_LENGTH = 125


class ToyDemo(DemoRecipe):
    """1.6 million parameters, under 10 minutes on two cores."""

    base_title = "Base LLM: a small Llama learns English from Python's own documentation"
    tower_title = "Vision tower: a small SigLIP learns digits, instead of a public one"
    title = "Held-out scans, as GenieBlue sees and reads them"
    text_questions = ("Explain: Numeric literals", "Explain: The import statement", "What is a function call?")
    max_new_tokens = 8

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.train_scans, self.held_out_scans = split_scans(self.seed)

    def make_base(self, out: Path) -> None:
        make_toy_base(out, steps=math.ceil(700 * self.scale), seed=self.seed)

    def make_model(self, base: Path, out: Path) -> None:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".vision-") as vision:
            make_digit_tower(Path(vision), self.train_scans, steps=math.ceil(700 * self.scale), seed=self.seed)
            create_genieblue(base, vision, out)

    def settings(self, stage: int) -> TrainingSettings:
        options = {**STAGES[stage], "steps": math.ceil(STAGES[stage]["steps"] * self.scale)}
        return TrainingSettings(
            stage, **options, warmup_steps=math.ceil(0.03 * options["steps"]), vision_layer_decay=1.0,
            max_length=1024, save_steps=0, shuffle=False, logging_steps=20, seed=self.seed,
        )  # fmt: skip

    def training_data(self, stage: int) -> NumberScans:
        settings = self.settings(stage)
        # Single digits first: starting with four digits, there is too little time to learn.
        return NumberScans(
            self.train_scans, settings.steps * settings.batch_size, seed=self.seed + stage,
            curriculum=0.37 if stage == 2 else 1.0,
        )  # fmt: skip

    def held_out(self) -> list[Reading]:
        return draw_held_out(self.held_out_scans, math.ceil(NUMBERS_PER_LENGTH * self.scale))
