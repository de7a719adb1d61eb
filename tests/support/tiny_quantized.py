"""Tiny GenieBlue models whose linears are large enough for 4 bits, and quantized versions of them, made once each."""

import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_genieblue import IMAGE, change_adapter, prompt, row, tiles
from tiny_models import REMOTE_CODE_FAMILIES, SEED, save_tiny_base, tiny_vision_tower
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.quantization.precision import QuantizationRecipe
from conversion.quantization.quantize import CalibrationSamples, QuantizationReport, quantize_genieblue
from modeling_genieblue import GenieBlueConfig, GenieBlueForConditionalGeneration, GenieBlueProcessor

# Multiples of 32 inputs and 16 outputs everywhere, also of the key and value projections.
SHAPE = {"hidden_size": 64, "intermediate_size": 160}
TOWER = {"hidden_size": 32, "intermediate_size": 64}
OWN_WEIGHTS, OWN_QMAP = "genieblue/model.safetensors", "genieblue/quanto_qmap.json"
ADAPTER, ADAPTER_QMAP = (
    "genieblue/language_adapter/quantized_adapter.safetensors",
    "genieblue/language_adapter/quanto_qmap.json",
)
BASE_WEIGHTS, BASE_QMAP = "base/quantized_model.safetensors", "base/quanto_qmap.json"
TEXT, REQUEST, PIXELS = prompt(9), row(5, IMAGE, 9, 40, 41), tiles()


@functools.cache
def _storage() -> tempfile.TemporaryDirectory:
    """A folder for this process, which goes with it."""
    return tempfile.TemporaryDirectory(prefix="genieblue-quantized-")


def _folder(*key: Any) -> Path:
    return Path(_storage().name, str(len(list(Path(_storage().name).iterdir()))) + "-" + "-".join(map(str, key)))


def save_large_pair(folder: Path, family: str = "llama", *, tower: dict | None = None, **overrides: Any) -> Path:
    """Saves a base as `folder/base-llm` and a trained-looking GenieBlue as `folder/genieblue`, float32; the latter."""
    options = {key: overrides.pop(key) for key in ("lora_rank", "downsample_factor") if key in overrides}
    head_dim = {"head_dim": 16} if family in ("qwen3", "gemma3_text", "gemma2") else {}
    save_tiny_base(family, folder / "base-llm", **{**SHAPE, **head_dim, **overrides})
    base = AutoModelForCausalLM.from_pretrained(folder / "base-llm", trust_remote_code=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = GenieBlueForConditionalGeneration.from_base(
            base, tiny_vision_tower(**{**TOWER, **(tower or {})}), **{"lora_rank": 4, **options}
        )
    change_adapter(model, scale=0.05).save_pretrained(folder / "genieblue")
    return folder / "genieblue"


def with_processor(genieblue: Path) -> Path:
    """Saves the processor of a pair, whose images are one tile, beside its weights."""
    config = GenieBlueConfig.from_pretrained(genieblue)
    GenieBlueProcessor.from_base(
        AutoTokenizer.from_pretrained(genieblue.parent / "base-llm"),
        image_token_id=config.image_token_id,
        image_seq_length=config.image_seq_length,
        tile_size=config.vision_config.image_size,
        max_tiles=1,
    ).save_pretrained(genieblue)
    return genieblue


@functools.cache
def large_pair(family: str = "llama", **overrides: Any) -> Path:
    """`save_large_pair`, once in a process: only to be read."""
    return save_large_pair(_folder("plain", family), family, **overrides)


def calibration_samples(count: int = 4) -> CalibrationSamples:
    """Random text, and requests with one tile each."""
    return CalibrationSamples(
        text=[prompt(24, seed=seed) for seed in range(count)],
        multimodal=[{"input_ids": row(*prompt(6, seed=seed)[0].tolist(), IMAGE, 9, 40), "pixel_values": tiles(1, seed)}
                    for seed in range(count)],
    )  # fmt: skip


def quantize(source: Path, folder: Path, options: dict | None = None, **recipe: Any) -> QuantizationReport:
    """`quantize_genieblue` to `folder/genieblue` and `folder/base`, with the recipe's fields as keywords.

    For gptq there are samples, if `options` has none.
    """
    options = dict(options or {})
    if recipe.get("rounding") == "gptq":
        options.setdefault("samples", calibration_samples())
    recipe = QuantizationRecipe(**recipe)
    if recipe.changes_base and not options.keys() & {"base_output", "quantized_base", "self_contained"}:
        options["base_output"] = folder / "base"
    return quantize_genieblue(source, folder / "genieblue", recipe, **options)


@functools.cache
def quantized_pair(family: str = "llama", **recipe: Any) -> Path:
    """Folder with `genieblue` and, if it was changed, its `base`, quantized once in a process: only to be read."""
    folder = _folder("quantized", family, *recipe.values())
    quantize(large_pair(family), folder, trust_of(family), **recipe)
    return folder


def trust_of(family: str) -> dict[str, bool]:
    return {"trust_remote_code": True} if family in REMOTE_CODE_FAMILIES else {}


def own_copy(folder: Path, target: Path) -> Path:
    """A copy of a quantized pair that a test may damage."""
    return Path(shutil.copytree(folder, target / "copy"))


@contextmanager
def changed_tensors(path: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of a safetensors file, written back as the block leaves them."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    yield tensors
    save_file(tensors, path, metadata)


def load(folder: Path, **kwargs: Any) -> GenieBlueForConditionalGeneration:
    return GenieBlueForConditionalGeneration.from_pretrained(folder, **kwargs)


def load_base(folder: Path, **kwargs: Any):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)


@torch.no_grad()
def answers(model: GenieBlueForConditionalGeneration) -> list[torch.Tensor]:
    """Logits and generated ids of a text and of an image, with and without a cache."""
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    found = [model(TEXT).logits, model(REQUEST, pixel_values=PIXELS).logits, model(TEXT, view="multimodal").logits]
    for use_cache in (True, False):
        found.append(model.generate(TEXT, use_cache=use_cache, **options))
        found.append(model.generate(REQUEST, pixel_values=PIXELS, use_cache=use_cache, **options))
    return found


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under `folder`, by its path in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}  # fmt: skip


def leftovers(folder: Path) -> list[str]:
    """Everything in a folder, hidden things too."""
    return sorted(path.name for path in folder.iterdir())
