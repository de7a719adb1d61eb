"""What a GenieBlue's weights take in vLLM, by part; each tensor in memory counts once.

    VLLM_ENABLE_V1_MULTIPROCESSING=0 python benchmarks/serving_memory.py demo-out/genieblue

They are counted as loaded: on a CPU vLLM then packs them for its kernels.
"""

import argparse
import json
from collections.abc import Iterable
from typing import Any

from vllm import LLM

from genieblue.serving.vllm.model import GenieBlueForConditionalGeneration as Model

PARTS = (
    ("vision tower", lambda name: name.startswith("vision_tower.")),
    ("projector", lambda name: name.startswith("multi_modal_projector.")),
    ("base", lambda name: name.startswith("language_model.")),  # comes before the second tree, which shares it
    ("LoRA", lambda name: ".lora_" in name),
    ("copies", lambda name: ".copy." in name),
    ("other", lambda name: True),
)


def sizes_of(model: Any) -> dict[str, int]:
    """Bytes of each part of a model, and of tensors that it has under two names."""
    sizes, known = dict.fromkeys(["twice", *(part for part, _ in PARTS)], 0), set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        storage = parameter.untyped_storage()
        is_known = storage.data_ptr() in known
        part = "twice" if is_known else next(part for part, holds in PARTS if holds(name))
        known.add(storage.data_ptr())
        sizes[part] += storage.nbytes()
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    load_weights = Model.load_weights

    def load_and_count(model: Model, weights: Iterable) -> set[str]:
        loaded = load_weights(model, weights)
        print(json.dumps(sizes_of(model), indent=2))
        return loaded

    Model.load_weights = load_and_count
    LLM(options.model, dtype=options.dtype, enforce_eager=True, max_model_len=1024)


if __name__ == "__main__":
    main()
