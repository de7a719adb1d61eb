"""Load time and peak memory of a full-size GenieBlue with random weights, as one table.

    python -m benchmarks.full_size [--folder full-size] [--runs 3]

Makes, once, a BlueLM-3B-shaped base (2.7 G parameters), a SigLIP so400m/14-384 and a GenieBlue of both in bf16: about
8 GB in `--folder`. Then, each in a process of its own and in turn: the plain base's load plus reading our bytes, and
`AutoModel.from_pretrained` of the GenieBlue; medians of the runs. Peak memory is the process's highest resident set
above that of a process that has only imported the libraries, against the bytes of all weights.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from huggingface_hub import parse_local_safetensors_file_metadata

from benchmarks.report import measured_apart, print_table
from genieblue.training.memory import peak_resident_memory


def make_models(folder: Path) -> None:
    """Writes `base/` and `genieblue/` with random bf16 weights, unless they are there."""
    if (folder / "genieblue" / "config.json").exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, SiglipVisionModel

    from genieblue.lab.parameters import PRESETS, SIGLIP
    from modeling_genieblue import GenieBlueForConditionalGeneration
    from modeling_genieblue.language_adapter_genieblue import adapter_parameters

    def fill(model: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.02)
        return model.eval()

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    fill(AutoModelForCausalLM.from_config(PRESETS["bluelm-3b"])).save_pretrained(folder / "base", max_shard_size="2GB")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    vision = fill(SiglipVisionModel(SIGLIP))
    model = GenieBlueForConditionalGeneration.from_base(base, vision)
    with torch.no_grad():
        for name, _, parameter in adapter_parameters(model.multimodal_language_model):
            if ".lora_A." not in name:  # copies begin as the originals, and B as zero
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder / "genieblue")


def weight_bytes(folder: Path) -> tuple[int, int]:
    """(bytes of the weight files, number of parameters in them) below `folder`."""
    files = list(folder.rglob("*.safetensors"))
    counts = [parse_local_safetensors_file_metadata(path).parameter_count for path in files]
    return sum(path.stat().st_size for path in files), sum(sum(count.values()) for count in counts)


def measure_base(folder: Path) -> dict[str, float]:
    """In this process: seconds for the plain base, and for that and reading the GenieBlue's bytes."""
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    AutoModelForCausalLM.from_pretrained(folder / "base")
    loaded = time.perf_counter() - start
    buffer = bytearray(1 << 24)
    for path in sorted((folder / "genieblue").rglob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return {"base_seconds": loaded, "seconds": time.perf_counter() - start}


def measure_model(folder: Path) -> dict[str, float]:
    """In this process: seconds and peak bytes of loading a GenieBlue, and of two requests after it."""
    import torch
    from transformers import AutoModel

    import modeling_genieblue.quantized_parts_genieblue  # noqa: F401 (imports are left out of the time)

    torch.set_num_threads(2)
    imported = peak_resident_memory()
    start = time.perf_counter()
    model = AutoModel.from_pretrained(folder)
    seconds, loaded = time.perf_counter() - start, peak_resident_memory() - imported
    requests = run_requests(model)
    return {"seconds": seconds, "loaded_bytes": loaded, **requests, "peak_bytes": peak_resident_memory() - imported}


def run_requests(model) -> dict:
    """Seconds of one text and one image request, 8 new tokens each."""
    import torch

    text = torch.randint(3, 1000, (1, 32))
    image = torch.cat([text, torch.full((1, model.config.image_seq_length), model.config.image_token_id), text], dim=1)
    pixels = torch.randn(1, 3, 384, 384)
    seconds = {}
    for name, inputs in (("text", {"input_ids": text}), ("image", {"input_ids": image, "pixel_values": pixels})):
        start = time.perf_counter()
        mask = torch.ones_like(inputs["input_ids"])
        model.generate(**inputs, attention_mask=mask, max_new_tokens=8, do_sample=False)
        seconds[f"{name}_request_seconds"] = time.perf_counter() - start
    return seconds


def main() -> None:
    """Makes the models, runs the cases in turn and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("full-size"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--measure-base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure-model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_base:
        print(json.dumps(measure_base(arguments.measure_base)))
        return
    if arguments.measure_model:
        print(json.dumps(measure_model(arguments.measure_model)))
        return
    folder = arguments.folder
    make_models(folder)
    bases, models = [], []
    for _ in range(arguments.runs):
        bases.append(measured_apart("benchmarks.full_size", "--measure-base", str(folder)))
        models.append(measured_apart("benchmarks.full_size", "--measure-model", str(folder / "genieblue")))
    own_bytes, own_parameters = weight_bytes(folder / "genieblue")
    base_bytes, base_parameters = weight_bytes(folder / "base")

    def median(results: list[dict], key: str) -> float:
        return statistics.median(result[key] for result in results)

    figures = {
        "parameters of the base": base_parameters,
        "parameters that GenieBlue adds": own_parameters,
        "our bytes / (parameters × 2)": own_bytes / (2 * own_parameters),
        "plain base load, s": median(bases, "base_seconds"),
        "plain base load + reading our bytes, s": median(bases, "seconds"),
        "AutoModel load, s": median(models, "seconds"),
        "load ratio": statistics.median(m["seconds"] / b["seconds"] for m, b in zip(models, bases, strict=True)),
        "bytes of all weights, GB": (own_bytes + base_bytes) / 1e9,
        "peak after loading / bytes of weights": median(models, "loaded_bytes") / (own_bytes + base_bytes),
        "peak after both requests / bytes of weights": median(models, "peak_bytes") / (own_bytes + base_bytes),
        "text request, s": median(models, "text_request_seconds"),
        "image request, s": median(models, "image_request_seconds"),
    }
    print_table("Full size", {name: {"measured": value} for name, value in figures.items()})


if __name__ == "__main__":
    main()
