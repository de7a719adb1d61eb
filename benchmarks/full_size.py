"""Load time and peak memory of a full-size GenieBlue with random weights, as one table.

    python benchmarks/full_size.py [--folder full-size] [--runs 3] [--json]

Makes, once, a BlueLM-3B-shaped base (2.7 G parameters), a SigLIP so400m/14-384 and a GenieBlue of both in bf16: about
8 GB in `--folder`. Then, each in a process of its own and in turn: the plain base's load plus reading our bytes, and
`AutoModel.from_pretrained` of the GenieBlue; medians of the runs. Peak memory is the process's highest resident set
above that of a process that has only imported the libraries, against the bytes of all weights.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from safetensors import safe_open


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
    parameters = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dictionary)
                count = 1
                for size in file.get_slice(name).get_shape():
                    count *= size
                parameters += count
    return sum(path.stat().st_size for path in files), parameters


def measure(what: str, folder: Path) -> dict:
    """Runs one case in this process: seconds, peak bytes, and for `genieblue` two requests."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    import modeling_genieblue  # noqa: F401 (registers the classes; imports are left out of the time)

    torch.set_num_threads(2)
    imported = peak_bytes()
    start = time.perf_counter()
    result = {}
    if what == "base":
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        result["base_seconds"] = time.perf_counter() - start
        buffer = bytearray(1 << 24)
        for path in sorted((folder / "genieblue").rglob("*.safetensors")):
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        result["seconds"] = time.perf_counter() - start
        del base
    elif what == "genieblue":
        model = AutoModel.from_pretrained(folder / "genieblue")
        result["seconds"] = time.perf_counter() - start
        result["loaded_bytes"] = peak_bytes() - imported
        result |= run_requests(model)
    result["peak_bytes"] = peak_bytes() - imported
    return result


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


def peak_bytes() -> int:
    """Highest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Makes the models, runs the cases in turn, prints the table (or with `--json` the numbers)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("full-size"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", choices=["base", "genieblue"], help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.folder)))
        return
    if arguments.make:
        make_models(arguments.folder)
        return

    def run(*options: str) -> str:
        command = [sys.executable, __file__, "--folder", str(arguments.folder), *options]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    run("--make")
    cases: dict[str, list[dict]] = {"base": [], "genieblue": []}
    for _ in range(arguments.runs):
        for what, results in cases.items():
            results.append(json.loads(run("--measure", what).splitlines()[-1]))
    own_bytes, own_parameters = weight_bytes(arguments.folder / "genieblue")
    base_bytes, base_parameters = weight_bytes(arguments.folder / "base")

    def median(what: str, key: str) -> float:
        return statistics.median(result[key] for result in cases[what])

    pairs = zip(cases["genieblue"], cases["base"], strict=True)
    rows = {
        "parameters of the base": base_parameters,
        "parameters that GenieBlue adds": own_parameters,
        "our bytes / (parameters × 2)": own_bytes / (2 * own_parameters),
        "plain base load, s": median("base", "base_seconds"),
        "plain base load + reading our bytes, s": median("base", "seconds"),
        "AutoModel load, s": median("genieblue", "seconds"),
        "load ratio": statistics.median(ours["seconds"] / base["seconds"] for ours, base in pairs),
        "bytes of all weights, GB": (own_bytes + base_bytes) / 1e9,
        "peak after loading / bytes of weights": median("genieblue", "loaded_bytes") / (own_bytes + base_bytes),
        "peak after both requests / bytes of weights": median("genieblue", "peak_bytes") / (own_bytes + base_bytes),
        "text request, s": median("genieblue", "text_request_seconds"),
        "image request, s": median("genieblue", "image_request_seconds"),
    }
    if arguments.json:
        print(json.dumps(rows))
        return
    for name, value in rows.items():
        print(f"{name:46}{value:>16,}" if isinstance(value, int) else f"{name:46}{value:16.3f}")


if __name__ == "__main__":
    main()
