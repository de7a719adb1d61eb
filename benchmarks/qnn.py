"""QNN bundles: size against the ideal, export at full size, and accuracy on the demo's model.

    python -m benchmarks.qnn [--demo demo-out] [--full-size full-size] [--parts 16] [--bundles qnn-bundles]

Bytes are those of random-weight models of 24 M and 138 M parameters in the matrices of the base, in one part and in
four; they do not depend on how codes are chosen, so these are rounded to nearest. `blocks` are four of the BlueLM-3B
shape, one of them replicated, exported by default settings: an eighth of that model without its LM head. Accuracy is
that of the model which `make demo` left in `--demo`: PyTorch in 32 bits, the bundle's QDQ graphs on the CPU, and the
emulator. The real size is the BlueLM-3B-shaped model which `benchmarks/full_size.py` made in `--full-size`, with a
vision tower of SigLIP so400m: time, and the highest resident memory of the process and of those that it started, taken
twice a second. Bundles are kept in `--bundles`, so that a stopped run goes on. Each table can be left out: `--skip
sizes blocks accuracy full-size`. Nothing here runs on a phone.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel
from transformers.utils import logging as transformers_logging

from benchmarks.report import MemoryWatch, print_table
from benchmarks.views import TOY_VISION
from conversion.qnn.bundle.metadata import Bundle
from conversion.qnn.bundle.runner import QnnRunner
from conversion.qnn.export import export_bundle
from conversion.qnn.graphs.names import PRECISIONS, ROUNDINGS
from conversion.qnn.qdq.block_rounding import LORA_BITS
from conversion.qnn.verify import verify_bundle
from conversion.staging import UNFINISHED
from modeling_genieblue import (
    GenieBlueConfig,
    GenieBlueForConditionalGeneration,
    GenieBlueImageProcessor,
    GenieBlueProcessor,
)
from modeling_genieblue.language_adapter_genieblue import adapter_parameters

SOC = "sm8750"
Rows = dict[str, dict[str, Any]]
PAPER_GB = 1.92
SIZES = {
    "24 M": {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 2},
    "138 M": {"hidden_size": 1280, "intermediate_size": 3456, "num_attention_heads": 10, "num_key_value_heads": 2},
}
FULL_BLOCKS = {
    "hidden_size": 2560, "intermediate_size": 6912, "num_attention_heads": 20, "num_key_value_heads": 4,
    "num_hidden_layers": 4,
}  # fmt: skip
ALL_BLOCKS = 32
TOY_CHAT = "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% else %}" \
    "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"  # fmt: skip


def make_processor(config: Any) -> GenieBlueProcessor:
    """A processor with a tokenizer of a few words, as the weights are random; what exports need of one."""
    words = {word: index for index, word in enumerate(("<pad>", "<s>", "</s>", "<unk>"))}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip
    return GenieBlueProcessor(
        GenieBlueImageProcessor(tile_size=config.vision_config.image_size),
        tokenizer,
        image_seq_length=config.image_seq_length,
        image_token_id=config.image_token_id,
        chat_template=TOY_CHAT,
    )


def random_requests(config: Any, count: int, tokens: int) -> list[dict[str, torch.Tensor]]:
    """`count` requests of one image tile and `tokens` random tokens of text around it."""
    generator = torch.Generator().manual_seed(0)
    side, requests = config.vision_config.image_size, []
    for _ in range(count):
        text = torch.randint(3, 1000, (1, tokens), generator=generator)
        image = torch.full((1, config.image_seq_length), config.image_token_id)
        requests.append(
            {
                "input_ids": torch.cat([text[:, : tokens // 4], image, text[:, tokens // 4 :]], dim=1),
                "pixel_values": torch.rand(1, 3, side, side, generator=generator) * 2 - 1,
            }
        )
    return requests


def random_model(folder: Path, shape: dict[str, int]) -> Path:
    """Writes a GenieBlue with random weights and a toy vision tower, once: of 8 blocks if `shape` names no number.

    A quarter of the blocks is replicated.
    """
    if not (folder / "genieblue" / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(**{"num_hidden_layers": 8, **shape}, vocab_size=2048, max_position_embeddings=2048,
                             tie_word_embeddings=False)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / "base")
        base = LlamaForCausalLM.from_pretrained(folder / "base")
        model = GenieBlueForConditionalGeneration.from_base(base, SiglipVisionModel(SiglipVisionConfig(**TOY_VISION)))
        with torch.no_grad():
            for _, _, parameter in adapter_parameters(model.multimodal_language_model):
                parameter.add_(torch.randn_like(parameter) * 0.01)
        model.save_pretrained(folder / "genieblue", processor=make_processor(model.config))
    return folder / "genieblue"


def ideal_bytes(source: Path, bundle: Path) -> float:
    """Bytes of base, copies and LoRA at the bits that a bundle's weights and their scales have, and nothing else."""
    model: Any = GenieBlueForConditionalGeneration.from_pretrained(source)
    bits = Bundle(bundle).metadata["bits_per_weight"]
    table = model.language_model.get_input_embeddings().weight
    head = model.language_model.get_output_embeddings().weight
    matrices = [p for p in model.language_model.parameters() if p.ndim == 2 and p is not table]
    total = bits * (sum(p.numel() for p in matrices) + (head.numel() if head is table else 0))
    for name, _, parameter in adapter_parameters(model.multimodal_language_model):
        if parameter.ndim == 2:
            total += parameter.numel() * (LORA_BITS if ".lora_" in name else bits)
    return total / 8


def language_bytes(bundle: Path) -> int:
    """Bytes of the decoder's context binaries."""
    return sum(path.stat().st_size for path in bundle.glob("language_*/*.bin"))


def export_measured(bundle: Path, source: Path, **options: Any) -> dict[str, float]:
    """Exports a model unless that was done; seconds and memory only of an export that began from nothing."""
    if bundle.exists():
        return {}
    is_new = not bundle.with_name(bundle.name + UNFINISHED).exists()
    start = time.perf_counter()
    with MemoryWatch() as memory:
        export_bundle(source, bundle, soc=SOC, **options)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": memory.peak, "own_peak_bytes": memory.own} if is_new else {}


def measure_agreement(bundle: Path) -> Rows:
    """What `genieblue verify` says about each graph: emulator against CPU-QDQ, and CPU-QDQ against float."""
    checks = [check for check in verify_bundle(bundle) if ":" in check.name]
    return {check.name: {"result": f"{'passed' if check.ok else 'FAILED'}: {check.detail}"} for check in checks}


def measure_sizes(folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Bytes of the shared binaries against the ideal, at two sizes and by number of parts."""
    for name, shape in SIZES.items():
        source = random_model(folder / f"random-{shape['hidden_size']}", shape)
        requests = random_requests(GenieBlueConfig.from_pretrained(source), 2, 160)
        for parts in (1, 4):
            bundle = folder / f"{source.parent.name}-in-{parts}"
            row = export_measured(
                bundle, source, calibration=requests, context_length=512, parts=parts, llm="w4a16", rounding="rtn"
            )
            yield f"{name} in {parts} part(s)", {**stored_and_ideal(source, bundle), **row}


def stored_and_ideal(source: Path, bundle: Path) -> dict[str, float]:
    """Bytes of a bundle's decoder against the ideal."""
    stored, ideal = language_bytes(bundle), ideal_bytes(source, bundle)
    return {"bytes": stored, "ideal": ideal, "ratio": stored / ideal}


def measure_blocks(folder: Path, samples: int) -> dict[str, float]:
    """An export of four blocks of the real size by default settings, and what as many as there are would take."""
    source, bundle = random_model(folder / "random-2560", FULL_BLOCKS), folder / "random-2560-in-1"
    requests = random_requests(GenieBlueConfig.from_pretrained(source), samples, 128)
    row = export_measured(bundle, source, calibration=requests)
    row = {"blocks": FULL_BLOCKS["num_hidden_layers"], **stored_and_ideal(source, bundle), **row}
    times = ALL_BLOCKS / FULL_BLOCKS["num_hidden_layers"]
    return row | {f"{name}, {ALL_BLOCKS} blocks": times * row[name] for name in ("bytes", "seconds") if name in row}


def measure_accuracy(demo: Path, bundle: Path, scans: int, emulated: int, **options: str) -> Rows:
    """Exact match on the demo's held-out scans: PyTorch, the bundle on the CPU, and fewer of them on the emulator."""
    from genieblue.data.collation import ChatCollator
    from genieblue.evaluation.answering import ModelAnswerer
    from genieblue.evaluation.evaluate import evaluate
    from genieblue.evaluation.qnn_answering import BundleAnswerer
    from genieblue.evaluation.samples import EvaluationDataset
    from genieblue.lab.scans import NumberScans, split_scans
    from genieblue.lab.text import split_documents, training_stream

    processor = GenieBlueProcessor.from_pretrained(demo / "genieblue")
    numbers = NumberScans(split_scans()[0], 48, seed=99, curriculum=0)
    text = training_stream(processor.tokenizer, split_documents().train)[: 8 * 120].view(8, 1, 120)
    calibration = [ChatCollator(processor).encode(sample) for sample in numbers]
    calibration += [{"input_ids": row} for row in text]
    questions = EvaluationDataset(demo / "held-out" / "answers.jsonl").first(scans)
    model = GenieBlueForConditionalGeneration.from_pretrained(demo / "genieblue")
    found = {"PyTorch, 32 bits": evaluate(ModelAnswerer(model, processor), questions, max_new_tokens=8)}
    lengths = {"chunk_length": 32, "context_length": 128}
    export_measured(bundle, demo / "genieblue", calibration=calibration, **lengths, **options)
    for name, backend, count in (("bundle, CPU-QDQ", "cpu", scans), ("bundle, emulator", "emulator", emulated)):
        answerer = BundleAnswerer(QnnRunner(bundle, backend=backend))
        found[name] = evaluate(answerer, questions.first(count), max_new_tokens=8)
    said = {name: [answer.answer for answer in evaluation.answers] for name, evaluation in found.items()}
    reference, on_cpu = said["PyTorch, 32 bits"], said["bundle, CPU-QDQ"]
    return {
        name: {
            "scans": len(answers),
            "exact_match": found[name].scores()[0].mean,
            "as PyTorch": sum(a == b for a, b in zip(answers, reference, strict=False)) / len(answers),
            "as CPU-QDQ": sum(a == b for a, b in zip(answers, on_cpu, strict=False)) / len(answers),
        }
        for name, answers in said.items()
    }


def measure_full_size(source: Path, folder: Path, parts: int, samples: int) -> dict[str, Any]:
    """Exports the BlueLM-3B-shaped model whole: seconds, memory, and the bundle's bytes by kind of file."""
    config = GenieBlueConfig.from_pretrained(source / "genieblue")
    if not (source / "genieblue" / "tokenizer.json").exists():
        make_processor(config).save_pretrained(source / "genieblue")
    requests = random_requests(config, samples, 128)
    bundle = folder / f"full-size-in-{parts}"
    row = {
        "parts": parts,
        **export_measured(bundle, source / "genieblue", calibration=requests, parts=parts, llm="w4a16"),
    }
    row |= {
        "language binaries": language_bytes(bundle),
        "ideal of those": int(ideal_bytes(source / "genieblue", bundle)),
        "vision binary": (bundle / "vision" / "vision.bin").stat().st_size,
        "embeddings.raw": (bundle / "embeddings.raw").stat().st_size,
    }
    on_phone = row["language binaries"] + row["vision binary"] + row["embeddings.raw"]
    whole = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    return row | {"for the phone": on_phone, "with qdq/ and probe.npz": whole, "the paper's GB": PAPER_GB}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo-out"))
    parser.add_argument("--full-size", type=Path, default=Path("full-size"))
    parser.add_argument("--bundles", type=Path, default=Path("qnn-bundles"))
    parser.add_argument("--parts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=4, help="requests that the real size is calibrated on")
    parser.add_argument("--scans", type=int, default=500)
    parser.add_argument("--emulated", type=int, default=20)
    parser.add_argument("--lora", choices=["constants", "inputs"], default="constants")
    parser.add_argument("--llm", choices=PRECISIONS, default="w4a16")
    parser.add_argument("--rounding", choices=ROUNDINGS, default="gptq")
    parser.add_argument("--skip", nargs="*", default=[], choices=["sizes", "blocks", "accuracy", "full-size"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    bundles = arguments.bundles
    bundles.mkdir(parents=True, exist_ok=True)
    if "sizes" not in arguments.skip:
        print_table("Bytes of the shared binaries", dict(measure_sizes(bundles)))
    if "blocks" not in arguments.skip:
        print_table("BlueLM-3B shape, four blocks", {"measured": measure_blocks(bundles, arguments.samples)})
    if "accuracy" not in arguments.skip and (arguments.demo / "held-out").is_dir():
        options = {"lora": arguments.lora, "llm": arguments.llm, "rounding": arguments.rounding}
        bundle = bundles / "-".join(["demo", *options.values()])
        rows = measure_accuracy(arguments.demo, bundle, arguments.scans, arguments.emulated, **options)
        print_table("Accuracy of the demo's model", rows)
        print_table("Agreement of its graphs", measure_agreement(bundle))
    if "full-size" not in arguments.skip and (arguments.full_size / "genieblue").is_dir():
        figures = measure_full_size(arguments.full_size, bundles, arguments.parts, arguments.samples)
        print_table("BlueLM-3B shape", {name: {"measured": value} for name, value in figures.items()})


if __name__ == "__main__":
    main()
