"""Tiny GenieBlues of VLMs, and quantized versions of them, made once each in a process."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_tokenizer
from tiny_vlms import image_request, tiny_vlm_pair
from transformers import AutoModelForCausalLM

from conversion.quantization.precision import QuantizationRecipe
from conversion.quantization.quantize import QuantizationReport, quantize_genieblue
from conversion.quantization.views import CalibrationSamples
from modeling_genieblue import GenieBlueConfig, GenieBlueForConditionalGeneration

TEXT = torch.arange(20, 29)[None]
W8 = {"llm": "w8a16", "lora": "w8a16"}


@functools.cache
def _storage() -> tempfile.TemporaryDirectory:
    """A folder for this process, which goes with it."""
    return tempfile.TemporaryDirectory(prefix="genieblue-quantized-vlms-")


@functools.cache
def vlm_source(family: str, tied: bool = False) -> Path:
    """A 16-bit GenieBlue of a tiny VLM, two of four blocks copied, beside its base, `base-llm`: only to be read."""
    folder = Path(_storage().name, f"{family}{'-tied' * tied}")
    vlm, base = tiny_vlm_pair(family, tie_word_embeddings=tied)
    base.save_pretrained(folder / "base-llm")
    tiny_tokenizer().save_pretrained(folder / "base-llm")
    base = AutoModelForCausalLM.from_pretrained(folder / "base-llm")
    model = GenieBlueForConditionalGeneration.from_vlm(vlm, base, replicated_layers=[1, 3], lora_rank=4)
    model.save_pretrained(folder / "genieblue")
    return folder / "genieblue"


def quantize_vlm(source: Path, folder: Path, options: dict | None = None, **recipe: Any) -> QuantizationReport:
    """`quantize_genieblue` to `folder/genieblue` and `folder/base`, with the recipe's fields as keywords."""
    options = dict(options or {})
    if not options.keys() & {"base_output", "quantized_base", "self_contained"}:
        options["base_output"] = folder / "base"
    chosen = QuantizationRecipe.for_config(GenieBlueConfig.from_pretrained(source), **recipe)
    return quantize_genieblue(source, folder / "genieblue", chosen, **options)


@functools.cache
def quantized_vlm(family: str, tied: bool = False, **recipe: Any) -> Path:
    """Folder with `genieblue` and its `base`, quantized once in a process: only to be read."""
    folder = Path(_storage().name, "-".join((family, str(tied), *recipe.values())))
    quantize_vlm(vlm_source(family, tied), folder, **recipe)
    return folder


def vlm_samples(family: str, count: int = 6) -> CalibrationSamples:
    """Random text, and requests with one image each."""
    seed = torch.Generator().manual_seed(3)
    return CalibrationSamples(
        text=[torch.randint(3, 180, (1, 32), generator=seed) for _ in range(count)],
        multimodal=[image_request(family, 1 + number % 2) for number in range(count)],
    )


@torch.no_grad()
def dequantized(model: Any, source: Path) -> Any:
    """The 16-bit GenieBlue in `source` in the precision of `model`, with the values of that quantized one."""
    plain = GenieBlueForConditionalGeneration.from_pretrained(source, dtype=model.language_model.dtype)
    for name in ("language_model", "multimodal_language_model"):
        values = dict(getattr(model, name).named_parameters(remove_duplicate=False))
        for path, parameter in getattr(plain, name).named_parameters(remove_duplicate=False):
            value: Any = values[path]
            # By way of `.data`: a model refuses requests once the values of its base are seen to change.
            parameter.data.copy_(value.dequantize() if hasattr(value, "qtype") else value)
    return plain
