"""Runs Python in a process of its own in which this project's packages cannot be imported."""

import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

# Refuses the packages wherever they may be installed, and the tests' own modules.
PREAMBLE = """
import json, os, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_genieblue", "hub_cards", "conversion", "genieblue", "tiny_models"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import torch
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # as the test's: sums are then in one order
def answer(value):
    print("\\nANSWER " + json.dumps(value))
"""


def ask(model):
    """What a test and a clean process ask alike: logits of a text and of an image, ids generated for the image."""
    text = torch.arange(20, 29)[None]
    image = torch.tensor([[5, *[model.config.image_token_id] * model.config.image_seq_length, 9, 40, 41]])
    pixels = torch.linspace(-1, 1, 3 * 24 * 24).reshape(1, 3, 24, 24)
    with torch.no_grad():
        logits = model(text).logits, model(image, pixel_values=pixels).logits
    ids = model.generate(image, pixel_values=pixels, do_sample=False, max_new_tokens=4, pad_token_id=0)
    return [*(tensor.double().tolist() for tensor in logits), ids.tolist()]


def run_clean(code: str, cwd: Path, env: dict[str, str]) -> Any:
    """What `code` gave to `answer(...)`; it has `torch` and `ask`. Its output as an AssertionError if it failed."""
    script = PREAMBLE + inspect.getsource(ask) + textwrap.dedent(code)
    result = subprocess.run([sys.executable, "-c", script], cwd=cwd, env=env, capture_output=True, text=True)
    answers = [line for line in result.stdout.splitlines() if line.startswith("ANSWER ")]
    assert result.returncode == 0 and answers, f"{result.returncode} {result.stdout[-2000:]} {result.stderr}"
    return json.loads(answers[-1].removeprefix("ANSWER "))
