"""Figures of exports: what the LoRA form of the demo's GenieBlue costs at each rank, error and size.

    python -m benchmarks.exchange [--demo demo-out]

Accuracy is that of the model which `make demo` left in `--demo`, on its 500 held-out scans. Bytes are those of the
copied blocks in the form, against those of the copies themselves. The form answers through the GenieBlue's own path:
its copied blocks get the base's weights and norms plus the stored products of low rank.
"""

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from benchmarks.report import print_table
from conversion.lora_form import LoraForm, export_lora
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor
from modeling_genieblue.language_adapter_genieblue import ADAPTER, PEFT_PREFIX, adapter_parameters, find_blocks
from modeling_genieblue.model_files_genieblue import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, read_settings

CALIBRATION_CHATS = 64
CHOICES: dict[str, dict[str, Any]] = {
    **{f"rank {rank}": {"rank": rank} for rank in (4, 8, 16, 32, 64)},
    "full rank": {},
    **{f"error {error}": {"error": error} for error in (0.3, 0.2, 0.1, 0.05, 0.02)},
}
SHARES = (0.125, 0.25, 0.5)  # of the copies' bytes


@torch.no_grad()
def put_form_in_place(model: Any, folder: Path) -> None:
    """Gives the copied blocks of a loaded GenieBlue what the LoRA form in `folder` makes of them."""
    path, _ = find_blocks(model.multimodal_language_model)
    alpha = read_settings(folder / ADAPTER_CONFIG_NAME)["lora_alpha"]
    with safe_open(folder / ADAPTER_WEIGHTS_NAME, framework="pt") as file:
        for index in model.config.replicated_layers:
            wrapper = model.multimodal_language_model.get_submodule(f"{path}.{index}")
            copied = wrapper.modules_to_save[ADAPTER]
            copied.load_state_dict(wrapper.original_module.state_dict())
            for name, module in copied.named_modules():
                key = f"{PEFT_PREFIX}{path}.{index}.{name}"
                if f"{key}.lora_A.weight" in file.keys():
                    a, b = (file.get_tensor(f"{key}.lora_{kind}.weight") for kind in "AB")
                    module.weight += (b @ a) * (alpha / len(a))


def calibration_chats(processor: Any) -> Iterable[dict[str, Any]]:
    """New numbers of the scans that the demo was trained on, with their answers; none is of the held-out scans."""
    from genieblue.data.collation import ChatCollator
    from genieblue.lab.scans import NumberScans, split_scans

    encode = ChatCollator(processor).encode
    return map(encode, NumberScans(split_scans()[0], CALIBRATION_CHATS, seed=99, curriculum=0))


def measure(demo: Path) -> dict[str, dict[str, float | str]]:
    """Exact match, bytes and the logits' error of each form, with and without calibration."""
    from genieblue.evaluation.answering import ModelAnswerer
    from genieblue.evaluation.evaluate import evaluate
    from genieblue.evaluation.samples import EvaluationDataset

    source = demo / "genieblue"
    processor = GenieBlueProcessor.from_pretrained(source)
    questions = EvaluationDataset(demo / "held-out" / "answers.jsonl")

    def score(model: Any) -> float:
        return evaluate(ModelAnswerer(model, processor, batch_size=25), questions, max_new_tokens=8).scores()[0].mean

    model = GenieBlueForConditionalGeneration.from_pretrained(source)
    own = {name: weight for name, _, weight in adapter_parameters(model.multimodal_language_model)}
    copies = sum(each.numel() * each.itemsize for name, each in own.items() if ".modules_to_save." in name)
    fixed = sum(each.numel() * each.itemsize for each in own.values()) - copies
    rows: dict[str, dict[str, float | str]] = {"exact form": {"exact_match": score(model), "bytes of copies": copies}}
    budgets = {f"{share:g} of the copies' bytes": {"max_bytes": int(fixed + share * copies)} for share in SHARES}
    for name, choice in (CHOICES | budgets).items():
        for calibrated in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "lora")
                chats = calibration_chats(processor) if calibrated else None
                form: LoraForm = export_lora(source, out, calibration=chats, **choice)
                model = GenieBlueForConditionalGeneration.from_pretrained(source)
                put_form_in_place(model, out)
                size = sum(matrix.bytes for matrix in form.matrices)
                rows[f"{name}, by {'outputs' if calibrated else 'weights'}"] = {
                    "exact_match": score(model),
                    "bytes of copies": size,
                    "share": size / copies,
                    "logits": form.measurements[-1].value.partition(" ")[0],
                }
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo-out"))
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print_table("LoRA form of the demo's model", measure(arguments.demo))


if __name__ == "__main__":
    main()
