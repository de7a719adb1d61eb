"""What each rounding costs a GenieBlue on a real base: answers to images, and perplexity of texts in the text view.

    python -m benchmarks.quantization_images MODEL --held-out digits.jsonl receipts.jsonl --texts gsm8k.txt help.txt \
        --calibration chats.jsonl texts.jsonl --out rows --cases w8 rtn:64 mse:64 hqq:64 gptq:64 awq:64 mixed:4.5

MODEL is in 16 bits, on a base off the grid (`benchmarks.quantization_base make`). Cases are what `genieblue quantize`
writes: `w8` for 8 bits; a method and the size of its groups; `mixed` and the bits per weight. Two more are tried in
memory, with LoRA and vision side in 16 bits: `hqq`, by optimum-quanto, with zero points that are no whole numbers; and
`awq`, scales of the inputs as powers of their root mean squares, with the exponent of least error in outputs for each
group of linears with the same inputs, then rounded as by `mse`. `healed` is `mixed`, then trained on the quantized
base with the chats of `--healing`, then its own parts rounded again. Each case leaves its figures in `--out`, where a
stopped run goes on.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from optimum.quanto import HqqOptimizer, qint4
from optimum.quanto.tensor import quantize_weight
from transformers.utils import logging as transformers_logging

from benchmarks.report import print_table
from conversion.quantization.healing import put_on_quantized_base
from conversion.quantization.hessians import linear_hessians
from conversion.quantization.mixed import Budget, bits_per_weight
from conversion.quantization.precision import QuantizationRecipe
from conversion.quantization.quantize import quantize_genieblue
from conversion.quantization.rounding import round_weight
from conversion.quantization.views import CalibrationSamples, multimodal_view, text_view
from conversion.verdict import perplexity_change
from genieblue.data.calibration_chats import read_calibration
from genieblue.evaluation.answering import answerer_of
from genieblue.evaluation.evaluate import Evaluation, ScoredAnswer, compare, evaluate
from genieblue.evaluation.held_out import HeldOutData
from genieblue.evaluation.samples import EvaluationDataset
from genieblue.training.settings import TrainingSettings
from genieblue.training.stages import train
from genieblue.training.structure import GenieBlueStructure
from hub_cards.verdicts import PLAIN_TEXT
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor
from modeling_genieblue.as_built_genieblue import AsBuilt
from modeling_genieblue.language_adapter_genieblue import find_blocks
from modeling_genieblue.quantized_precision_guard_genieblue import is_frozen
from modeling_genieblue.view_routing_genieblue import TEXT

BEFORE = "16 bits"
CASES = ("w8", "rtn:64", "mse:64", "hqq:64", "gptq:64", "awq:64", "mixed:4.375", "mixed:4.5")
EXPONENTS = (0.0, 0.25, 0.5, 0.75)
HEALING_STEPS, HEALING_BATCH = 120, 8
SAME_INPUTS = {"q_proj": "norm 1", "k_proj": "norm 1", "v_proj": "norm 1", "gate_proj": "norm 2", "up_proj": "norm 2"}
Linears = list[tuple[str, torch.nn.Linear]]


def measure(model: Any, arguments: argparse.Namespace, processor: Any) -> dict[str, Any]:
    """Answers to all chats, and by text the losses of its samples."""
    answerer = answerer_of(model, processor, batch_size=16)
    found = [evaluate(answerer, EvaluationDataset(path), max_new_tokens=12).answers for path in arguments.held_out]
    texts = {path.name: HeldOutData([path], processor).measure(model).losses for path in arguments.texts}
    return {
        "answers": [asdict(answer) for answers in found for answer in answers],
        "losses": {name: losses[TEXT, PLAIN_TEXT] for name, losses in texts.items()},
    }


def rounded(
    case: str, source: Path, samples: CalibrationSamples, healing: Path | None, folder: Path
) -> tuple[Any, float | None]:
    """A quantized model and its bits per weight of the blocks, if they are chosen."""
    method, _, number = case.partition(":")
    if method in ("hqq", "awq"):
        model = GenieBlueForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
        round_in_memory(model, method, int(number), samples)
        return model, None
    is_mixed = method in ("mixed", "healed")
    recipe = QuantizationRecipe(
        llm="w8a16" if method == "w8" else "w4a16",
        replicated_blocks="w8a16" if method == "w8" else "w4a16",
        rounding={"w8": "rtn", "mixed": "gptq", "healed": "gptq"}.get(method, method),
        group_size=64 if method == "w8" or is_mixed else int(number),
    )
    options: dict[str, Any] = {
        "samples": samples if is_mixed or method == "gptq" else None,
        "budget": Budget(bits_per_weight=float(number)) if is_mixed else None,
    }
    report = quantize_genieblue(source, folder / "model", recipe, base_output=folder / "base", **options)
    if method == "healed":
        assert healing is not None, "healing needs chats to train on: give --healing"
        heal(source, folder / "base", healing, folder / "trained")
        report = quantize_genieblue(
            folder / "trained", folder / "healed", recipe, quantized_base=folder / "base", **options
        )
    bits = bits_per_weight(report.mixed) if report.mixed else None
    return with_plain_linears(GenieBlueForConditionalGeneration.from_pretrained(report.output)), bits


def heal(source: Path, base: Path, chats: Path, out: Path) -> None:
    """Trains LoRA and replicated blocks on the values of a quantized base, as `train --on-quantized` does."""
    model = GenieBlueForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    structure = GenieBlueStructure(model)
    structure.trained_on = put_on_quantized_base(model, base)
    settings = TrainingSettings(
        2, steps=HEALING_STEPS, batch_size=HEALING_BATCH, learning_rate=1e-4, warmup_steps=6, max_length=256,
        save_steps=0,
    )  # fmt: skip
    train(structure, GenieBlueProcessor.from_pretrained(source), chats, out, settings)


@torch.no_grad()
def with_plain_linears(model: Any) -> Any:
    """The model with the values of its quantized linears in bfloat16: kernels for these are slower on prompts."""
    plain: dict[int, torch.nn.Linear] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not is_frozen(child):
                continue
            if id(child) not in plain:
                linear = torch.nn.Linear(child.in_features, child.out_features, bias=False, dtype=torch.bfloat16)
                linear.weight.copy_(child.weight.dequantize())
                linear.bias = child.bias
                plain[id(child)] = linear
            setattr(parent, name, plain[id(child)])
    model._as_built = AsBuilt(model)  # what it stands on from here on
    return model


def views_of(model: Any, samples: CalibrationSamples) -> Iterator[tuple[Any, Linears, Any]]:
    """Each view with the linears that are its own, and what runs it on the samples."""
    seen: set[int] = set()
    for calibrated in (text_view(model, samples), multimodal_view(model, samples)):
        path, blocks = find_blocks(calibrated.model)
        linears = []
        for name, module in blocks.named_modules():
            is_base = isinstance(module, torch.nn.Linear) and "lora_" not in name
            if is_base and id(module.weight) not in seen:
                seen.add(id(module.weight))
                linears.append((f"{path}.{name}", module))
        yield calibrated.model, linears, lambda view=calibrated: [view.model(**one) for one in view.requests]


@torch.no_grad()
def round_in_memory(model: Any, method: str, group_size: int, samples: CalibrationSamples) -> None:
    """Gives the linears of the base's blocks and of the replicated ones rounded values."""
    for view, linears, run in list(views_of(model, samples)):
        if method == "hqq":
            for _, linear in linears:
                linear.weight.copy_(hqq(linear.weight, group_size))
            continue
        hessians = linear_hessians(view, run, [name for name, _ in linears])
        for _, group in groupby(linears, key=lambda each: inputs_of(each[0])):
            scale_and_round(list(group), hessians, group_size)
    model._as_built = AsBuilt(model)


def inputs_of(name: str) -> str:
    """The same for linears that read the same."""
    words = [word for word in name.split(".") if word != "base_layer"]
    return ".".join(words[:-1]) + SAME_INPUTS.get(words[-1], words[-1])


def hqq(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """The values of a matrix (out, in) on grids by half-quadratic optimization."""
    scale, shift = HqqOptimizer()(weight.float(), qint4, 0, group_size)
    return quantize_weight(weight.float(), qint4, 0, scale, shift, group_size=group_size, optimized=False).dequantize()


def scale_and_round(linears: Linears, hessians: dict[str, torch.Tensor], group_size: int) -> None:
    """Rounds linears with the same inputs on scaled inputs, with the exponent that costs their outputs least."""
    best: tuple[float, list[torch.Tensor]] | None = None
    for exponent in EXPONENTS:
        lost, values = 0.0, []
        for _, linear in linears:
            hessian, weight = hessians[linears[0][0]].float(), linear.weight.float()
            scales = hessian.diagonal().sqrt().clamp(min=1e-6) ** exponent
            scales = scales / (scales.max() * scales.min()).sqrt()
            values.append(round_weight(weight * scales, 4, group_size, method="mse").dequantize() / scales)
            change = values[-1] - weight
            lost += float(((change @ hessian) * change).sum())
        if best is None or lost < best[0]:
            best = lost, values
    assert best is not None
    for (_, linear), value in zip(linears, best[1], strict=True):
        linear.weight.copy_(value)


def row(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What was lost: points by task, and ratios of perplexities, each with a standard error."""
    one, other = (
        Evaluation([ScoredAnswer(**{**each, "references": tuple(each["references"])}) for each in found["answers"]])
        for found in (before, after)
    )
    figures: dict[str, Any] = {"bits": after["bits"] or "", "seconds": round(after["seconds"])}
    for each in compare(one, other):
        error = 100 * (each.standard_error or 0.0)
        figures[each.task] = f"{100 * each.second:.1f} ({100 * each.difference:+.1f} ± {error:.1f})"
    for name, losses in after["losses"].items():
        change = perplexity_change(name, before["losses"][name], losses)
        figures[name] = f"{change['after']:.3f} ({change['ratio']:.3f} ± {change['ratio'] * change['error']:.3f})"
    return figures


def main() -> None:
    """Prints one row per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help=".txt files")
    parser.add_argument("--calibration", type=Path, nargs="+", required=True, help="as for `quantize`")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples of each kind")
    parser.add_argument("--healing", type=Path, help="chats to train on, for `healed`")
    parser.add_argument(
        "--cases", nargs="+", default=["w8", "rtn:64", "mse:64", "gptq:64", "mixed:4.375", "mixed:4.5"]
    )
    parser.add_argument("--out", type=Path, default=Path("quantization-images"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    processor = GenieBlueProcessor.from_pretrained(arguments.model)
    samples = read_calibration(arguments.calibration, processor, count=arguments.samples, length=512)
    rows: dict[str, Any] = {}
    for case in (BEFORE, *arguments.cases):
        path = arguments.out / f"{case.replace(':', '-').replace(' ', '-')}.json"
        if not path.is_file():
            start, bits = time.perf_counter(), None
            with tempfile.TemporaryDirectory() as folder:
                if case == BEFORE:
                    model = GenieBlueForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.bfloat16)
                else:
                    model, bits = rounded(case, arguments.model, samples, arguments.healing, Path(folder))
                seconds = time.perf_counter() - start
                found = {"bits": bits, "seconds": seconds, **measure(model, arguments, processor)}
            path.write_text(json.dumps(found), encoding="utf-8")
        rows[case] = json.loads(path.read_text(encoding="utf-8"))
        print_table("Roundings", {name: row(rows[BEFORE], found) for name, found in rows.items()})


if __name__ == "__main__":
    main()
