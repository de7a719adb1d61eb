"""Figures of exports and extractions, one sub-command each.

    python -m benchmarks.exchange lora [--demo demo-out]
    python -m benchmarks.exchange extract [--demo demo-out] [--vlm vlm-out]
    python -m benchmarks.exchange full-size [--folder full-size-vlm] [--blocks 32]

`lora`: what the LoRA form of the demo's GenieBlue costs at each rank, error and size. Accuracy is that of the model
which `make demo` left in `--demo`, on its 500 held-out scans. Bytes are those of the copied blocks in the form,
against those of the copies themselves. The form answers through the GenieBlue's own path: its copied blocks get the
base's weights and norms plus the stored products of low rank.

`extract`: a GenieBlue of a VLM that was trained as a whole from the demo's base (it is made first, if `--vlm` does not
exist), at several budgets. Bytes are those of all that the language side adds, against those of the base.

`full-size`: minutes and peak memory of an extraction from a BlueLM-3B-shaped pair of random weights, which is made
first; in a process of its own. Mapped weights are in the peak as far as they were in memory at that time (Linux).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from benchmarks.full_size import weight_bytes
from benchmarks.report import MemoryWatch, measured_apart, print_table
from benchmarks.vlms import make_demo_vlm, make_full_size_pair
from conversion.extract import extract_genieblue
from conversion.extraction_plan import Choice
from conversion.lora_form import LoraForm, export_lora
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor, VlmGenieBlueProcessor
from modeling_genieblue.language_adapter_genieblue import ADAPTER, PEFT_PREFIX, adapter_parameters, find_blocks
from modeling_genieblue.model_files_genieblue import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS_NAME,
    WEIGHTS_NAME,
    read_settings,
)

CALIBRATION_CHATS = 64
CHOICES: dict[str, dict[str, Any]] = {
    **{f"rank {rank}": {"rank": rank} for rank in (4, 8, 16, 32, 64)},
    "full rank": {},
    **{f"error {error}": {"error": error} for error in (0.3, 0.2, 0.1, 0.05, 0.02)},
}
SHARES = (0.125, 0.25, 0.5)  # of the copies' bytes
BUDGETS = (0.12, 0.15, 0.2, 0.35, 0.5)  # of the base's bytes, for all that an extraction adds
TEXT_TOKENS, READ_AT_ONCE = 4096, 25
HEALING_STEPS, HEALING_BATCH = 150, 16


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

    return map(ChatCollator(processor).encode, _new_scans())


def _new_scans() -> Any:
    from genieblue.lab.scans import NumberScans, split_scans

    return NumberScans(split_scans()[0], CALIBRATION_CHATS, seed=99, curriculum=0)


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


def measure_extractions(demo: Path, vlm: Path) -> dict[str, dict[str, float | str]]:
    """Exact match, bytes and text of extractions at several budgets, beside those of the VLM and the base."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    from genieblue.lab.text import held_out_stream, perplexity, split_documents

    base, tokenizer = (kind.from_pretrained(demo / "base") for kind in (AutoModelForCausalLM, AutoTokenizer))
    source, own = AutoModelForImageTextToText.from_pretrained(vlm), AutoProcessor.from_pretrained(vlm)
    processor = VlmGenieBlueProcessor(tokenizer, own)
    text = held_out_stream(tokenizer, split_documents().held_out)[: TEXT_TOKENS + 1]
    full = sum(each.numel() * each.itemsize for each in base.parameters())
    figures: dict[str, dict[str, float | str]] = {
        "base": {"perplexity": perplexity(base, text)},
        "VLM": {"exact_match": read_scans(source, processor, demo), "perplexity": perplexity(source, text)},
    }
    choices: dict[str, tuple[Any, bool]] = {"all blocks copied": (Choice(copies=base.config.num_hidden_layers), False)}
    for share in BUDGETS:
        budget = Choice("auto", max_bytes=int(share * full))
        choices |= {f"{share:.0%}, by {kind}": (budget, kind == "outputs") for kind in ("weights", "outputs")}
    quarter, least = Choice("skip", max_bytes=int(0.35 * full)), int(BUDGETS[0] * full)
    choices["35%, a quarter of the blocks copied, by outputs"] = (quarter, True)
    healed = f"{BUDGETS[0]:.0%}, by weights, {HEALING_STEPS} steps of stage 2"
    choices[healed] = (Choice("auto", max_bytes=least), False)
    for name, (choice, calibrated) in choices.items():
        with tempfile.TemporaryDirectory() as folder:
            chats = map(as_chat, _new_scans()) if calibrated else None
            extraction = extract_genieblue(vlm, demo / "base", Path(folder, "mine"), choice, calibration=chats)
            made = heal(extraction.output, Path(folder, "healed")) if name == healed else extraction.output
            model = GenieBlueForConditionalGeneration.from_pretrained(made)
            figures[name] = {
                "exact_match": read_scans(model, processor, demo),
                "share": added_bytes(made) / full,
                "copied": ", ".join(map(str, extraction.plan.copied)) or "none",
                "perplexity": perplexity(model, text),
                "text": "equal" if is_text_the_bases(model, base, text) else "differs",
            }
        print(name, figures[name], flush=True)
    return figures


def heal(folder: Path, out: Path) -> Path:
    """Trains an extraction on scans that the VLM was not trained on, of the same digits; returns `out`."""
    from genieblue.lab.scans import NumberScans, split_scans
    from genieblue.training.settings import TrainingSettings
    from genieblue.training.stages import train

    scans = NumberScans(split_scans()[0], HEALING_STEPS * HEALING_BATCH, seed=100, curriculum=0)
    settings = TrainingSettings(
        2, steps=HEALING_STEPS, batch_size=HEALING_BATCH, learning_rate=1e-3, warmup_steps=10, max_length=256,
        save_steps=0, shuffle=False,
    )  # fmt: skip
    model = GenieBlueForConditionalGeneration.from_pretrained(folder)
    train(model, VlmGenieBlueProcessor.from_pretrained(folder), scans, out, settings)
    return out


@torch.no_grad()
def read_scans(model: Any, processor: Any, demo: Path) -> float:
    """Share of the held-out scans that a VLM, or a GenieBlue of one, reads exactly, greedily."""
    from genieblue.evaluation.metrics import exact
    from genieblue.evaluation.samples import EvaluationDataset

    questions = EvaluationDataset(demo / "held-out" / "answers.jsonl")
    scores = []
    for start in range(0, len(questions), READ_AT_ONCE):
        samples = [questions[place] for place in range(start, min(start + READ_AT_ONCE, len(questions)))]
        inputs = processor.apply_chat_template(
            [sample.prompt for sample in samples], images=[sample.images for sample in samples], tokenize=True,
            add_generation_prompt=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True},
        )  # fmt: skip
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers = processor.vlm_processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        scores += [exact(answer, sample.references) for answer, sample in zip(answers, samples, strict=True)]
    return sum(scores) / len(scores)


@torch.no_grad()
def is_text_the_bases(model: Any, base: Any, text: torch.Tensor) -> bool:
    """Whether logits of held-out text, and what is generated after its beginnings, are the base's bit for bit."""
    windows = text[: text.numel() // 64 * 64].view(-1, 64)
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    starts = windows[:8, :16]
    return torch.equal(model(windows).logits, base(windows).logits) and torch.equal(
        model.generate(starts, attention_mask=torch.ones_like(starts), **options),
        base.generate(starts, attention_mask=torch.ones_like(starts), **options),
    )


def added_bytes(folder: Path) -> int:
    """Bytes of all that a saved GenieBlue of a VLM adds to its base's language model."""
    total = 0
    for name, prefix in ((f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS_NAME}", ""), (WEIGHTS_NAME, "own_language.")):
        with safe_open(folder / name, framework="pt") as file:
            tensors = [file.get_tensor(key) for key in file.keys() if key.startswith(prefix)]
            total += sum(each.numel() * each.itemsize for each in tensors)
    return total


def measure_full_size(folder: Path) -> dict[str, float]:
    """In this process: seconds and peak bytes of an extraction with a quarter of the blocks copied and rank 64."""
    start = time.perf_counter()
    with MemoryWatch() as memory:
        extract_genieblue(folder / "vlm", folder / "base", folder / "mine")
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time()}
    return seconds | {"peak": memory.peak, "own_peak": memory.own}


def full_size_figures(folder: Path, blocks: int) -> dict[str, dict[str, float | str]]:
    """The figures of `full-size`."""
    if not (folder / "vlm").exists():
        make_full_size_pair(folder, blocks)
    found = measured_apart("benchmarks.exchange", "full-size", "--folder", str(folder), "--measure")
    sizes = {name: weight_bytes(folder / name)[0] for name in ("base", "vlm", "mine")}
    return {
        "minutes": {"measured": found["seconds"] / 60},
        "CPU minutes": {"measured": found["cpu_seconds"] / 60},
        "peak, GB": {"measured": found["peak"] / 1e9},
        "peak without mapped files, GB": {"measured": found["own_peak"] / 1e9},
        **{f"weights of {name}, GB": {"measured": size / 1e9} for name, size in sizes.items()},
    }


def as_chat(sample: dict[str, Any]) -> Any:
    """The messages of a sample, some with plain strings, and its images."""
    contents = [message["content"] for message in sample["messages"] if not isinstance(message["content"], str)]
    images = [part["image"] for parts in contents for part in parts if "image" in part]
    return sample["messages"], images


def main() -> None:
    """Prints the table of a sub-command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", choices=("lora", "extract", "full-size"))
    parser.add_argument("--demo", type=Path, default=Path("demo-out"))
    parser.add_argument("--vlm", type=Path, default=Path("vlm-out"))
    parser.add_argument("--folder", type=Path, default=Path("full-size-vlm"))
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if arguments.measure:
        return print(json.dumps(measure_full_size(arguments.folder)))
    if arguments.figures == "lora":
        return print_table("LoRA form of the demo's model", measure(arguments.demo))
    if arguments.figures == "full-size":
        return print_table("Extraction at full size", full_size_figures(arguments.folder, arguments.blocks))
    if not arguments.vlm.exists():
        make_demo_vlm(arguments.demo, arguments.vlm)
    print_table("Extractions", measure_extractions(arguments.demo, arguments.vlm))


if __name__ == "__main__":
    main()
