"""The identity of a base: the sha256 of its weight files, and sample values from each tensor."""

import json
import logging
import math
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.file_download import repo_folder_name
from safetensors import safe_open
from torch import nn

from .arguments_genieblue import WEIGHT_DTYPES
from .model_files_genieblue import (
    QUANTIZED_WEIGHTS_NAME,
    WEIGHT_SHARDS,
    WEIGHTS_NAME,
    ModelFiles,
    cached_sha256,
    file_sha256,
    weight_files,
)

logger = logging.getLogger(__name__)

VALUES_PER_PLACE = 4
WEIGHT_FILES = "*.safetensors"


def tensor_samples(values: nn.Module | dict[str, torch.Tensor]) -> dict[str, dict]:
    """`{name: {"shape", "dtype", "positions", "values"}}`: a few values from each tensor of a model.

    `values` are tensors by name, or a model, whose `plain_values` are used.
    """
    return {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "positions": (positions := _positions(tensor.numel())),
            "values": _values_at(tensor, positions).float().tolist(),
        }
        for name, tensor in (plain_values(values) if isinstance(values, nn.Module) else values).items()
    }


def plain_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that can be compared by value; offloaded and quantized ones cannot."""
    return {name: parameter for name, parameter in model.named_parameters() if is_plain_weight(parameter)}


def _positions(count: int) -> list[int]:
    """A few adjacent positions at one and three quarters of a tensor, so that only few pages of a file are read."""
    if count <= 2 * VALUES_PER_PLACE:
        return list(range(count))
    places = (count // 4, 3 * count // 4 - VALUES_PER_PLACE)
    return [start + step for start in places for step in range(VALUES_PER_PLACE)]


def _values_at(parameter: torch.Tensor, positions: list[int]) -> torch.Tensor:
    return parameter.detach().reshape(-1)[positions].cpu()


def is_plain_weight(parameter: torch.Tensor) -> bool:
    """Whether the values of `parameter` can be read directly: floating point, dense and in memory."""
    plain_type = type(parameter) in (torch.Tensor, nn.Parameter)
    return plain_type and parameter.device.type != "meta" and parameter.dtype in WEIGHT_DTYPES


def is_sample(sample: Any) -> bool:
    """Whether `sample` is a valid entry of `tensor_samples`; one from a damaged file may not be."""
    if not isinstance(sample, dict):
        return False
    shape, positions, values = (sample.get(name) for name in ("shape", "positions", "values"))
    if not (isinstance(shape, list) and isinstance(positions, list) and isinstance(values, list)):
        return False
    if not isinstance(sample.get("dtype"), str):
        return False
    whole = all(type(number) is int and number >= 0 for number in (*shape, *positions))
    fits = len(positions) == len(values) and all(isinstance(value, int | float) for value in values)
    is_dtype = isinstance(getattr(torch, sample["dtype"], None), torch.dtype)
    return whole and fits and is_dtype and all(position < math.prod(shape) for position in positions)


def compare_with_samples(
    model: nn.Module, samples: dict[str, dict], values: dict[str, torch.Tensor] | None = None
) -> list[str]:
    """Differences between `model` and recorded samples, one sentence each; empty if it is the same base.

    A base in another dtype is the same if one set of values rounds to the other. Tensors that cannot be compared by
    value (offloaded, or quantized by transformers) are skipped.

    Args:
        values: tensors to compare, by default the model's `plain_values`.
    """
    if values is None:
        quantization = getattr(model.config, "quantization_config", None)
        if isinstance(quantization, dict):  # a method of transformers would be an object
            return [
                f"it was quantized by {quantization.get('quant_method')!r}, which transformers does not know, and the "
                "recorded base was not: give the unquantized base, or load the quantized GenieBlue that it belongs to"
            ]
        values = plain_values(model)
        # An unrecorded name means a different base, unless some tensors could not be compared.
        is_complete = len(values) == sum(1 for _ in model.parameters())
    else:
        is_complete = True
    differences = []
    compared = [name for name in samples if name in values]
    for name in compared:
        found, sample = values[name], samples[name]
        if list(found.shape) != sample["shape"]:
            differences.append(f"{name} has shape {list(found.shape)}, expected {sample['shape']}")
        elif not _same_values(found := _values_at(found, sample["positions"]), sample):
            expected = torch.tensor(sample["values"])
            worst = int((found.float() - expected).abs().argmax())
            differences.append(f"{name} contains {found[worst]:.7g}, expected {expected[worst]:.7g}")
    if is_complete:
        differences += [f"{name} is missing" for name in samples if name not in values]
        differences += [f"{name} does not exist in the recorded base" for name in values if name not in samples]
    if samples and not compared and not differences:
        differences.append("none of its tensors could be compared with the recorded ones")
    return differences


def different_settings(base: Any, recorded: Any) -> list[str]:
    """Settings that affect what a base computes and differ from the recorded ones, one sentence each.

    Args:
        base: the configuration of the loaded base.
        recorded: `text_config` of the GenieBlue.
    """
    found, expected = (deciding_settings(config) for config in (base.get_text_config(decoder=True), recorded))
    # A setting that only one of them has belongs to another version of transformers or of the base's code: skip it.
    return [
        f"its configuration has {name} {found[name]!r}, expected {expected[name]!r}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]


def deciding_settings(config: Any) -> dict[str, Any]:
    """The settings of a configuration that decide what its model computes, by name, as JSON has them."""
    settings = json.loads(json.dumps(config.to_dict(), default=str))
    # The maximum position matters only for scaled rotary embeddings.
    rope = json.dumps([settings.get("rope_parameters"), settings.get("rope_scaling")])
    is_stretched = any(kind in rope for kind in ('"dynamic"', '"yarn"', '"longrope"', '"su"'))
    left_out = OTHER_SETTINGS if is_stretched else (*OTHER_SETTINGS, "max_position_embeddings")
    return {name: value for name, value in settings.items()
            if not any(fnmatchcase(name, pattern) for pattern in left_out)}  # fmt: skip


# Settings of a base that do not affect logits: names, versions, formats, generation and training settings.
OTHER_SETTINGS = (
    "_*", "name_or_path", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype",
    "quantization_config", "attn_implementation", "*_attn_implementation", "use_cache", "cache_implementation",
    "return_dict*", "output_attentions", "output_hidden_states", "output_router_logits", "torchscript", "id2label",
    "label2id", "num_labels", "problem_type", "task_specific_params", "finetuning_task", "tokenizer_class",
    "*_token_id", "*_dropout", "dropout", "*_pdrop", "initializer_range", "initializer_factor", "router_aux_loss_coef",
    "router_jitter_noise", "chunk_size_feed_forward", "gradient_checkpointing", "keys_to_ignore_at_inference",
)  # fmt: skip


def _same_values(found: torch.Tensor, sample: dict) -> bool:
    recorded_dtype = getattr(torch, sample["dtype"])
    recorded = torch.tensor(sample["values"], dtype=torch.float64)
    if torch.equal(recorded.to(found.dtype), found) or torch.equal(found.to(recorded_dtype).double(), recorded):
        return True
    # float16 and bfloat16 round differently: neither can represent the other's values.
    half_types = {torch.float16, torch.bfloat16}
    mixed = found.dtype != recorded_dtype and {found.dtype, recorded_dtype} <= half_types
    return mixed and torch.allclose(found.double(), recorded, rtol=2**-7, atol=1e-7)


def cached_commits(base: nn.Module, name: str, cache_dir: str | os.PathLike | None = None) -> dict[str, bool]:
    """Commits of the Hub id `name` with weights in the local cache, and whether these are `base`'s weights."""
    samples = tensor_samples(base)
    return {folder.name: _holds(folder, samples) for folder in cached_snapshots(name, cache_dir)}


def cached_snapshots(name: str, cache_dir: str | os.PathLike | None = None) -> list[Path]:
    """Folders in the local cache, named by their commits, with weights of the Hub id `name`."""
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    snapshots = cache / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
    return [folder for folder in snapshots.glob("*") if any(folder.glob(WEIGHT_FILES))]


def _holds(folder: Path, samples: dict[str, dict]) -> bool:
    compared = 0
    for path in folder.glob(WEIGHT_FILES):
        with safe_open(path, framework="pt") as file:
            for name in samples.keys() & set(file.keys()):
                tensor = file.get_tensor(name)
                if list(tensor.shape) != samples[name]["shape"]:
                    return False
                if not _same_values(_values_at(tensor, samples[name]["positions"]), samples[name]):
                    return False
                compared += 1
    return compared > 0


def weight_file_hashes(
    base: str | os.PathLike, revision: str | None = None, *, token: str | bool | None = None, **hub: Any
) -> dict[str, str]:
    """sha256 of each weight file of a base (folder or Hub id), by name.

    Files in the Hub cache are named by their sha256. For missing files the Hub is asked, unless `local_files_only`.
    Returns `{}` when there are no files (a base in memory only).
    """
    try:
        files = ModelFiles(base, revision=revision, token=token, **hub)
        hashes = {name: cached_sha256(path) or file_sha256(path) for name, path in weight_files(files.cached).items()}
    except (FileNotFoundError, HFValidationError):
        return {}
    if hashes or files.folder is not None or hub.get("local_files_only"):
        return hashes
    return _published_hashes(str(base), revision, token)


def _published_hashes(name: str, revision: str | None, token: str | bool | None) -> dict[str, str]:
    """sha256 of a repository's weight files according to the Hub, for a base without local files."""
    try:
        files = HfApi(token=token).model_info(name, revision=revision, files_metadata=True).siblings
    except (HfHubHTTPError, OSError, ValueError) as error:
        logger.debug("No files of %s: %s", name, error)
        return {}
    hashes = {file.rfilename: file.lfs.sha256 for file in files or () if file.lfs is not None}
    for single in (WEIGHTS_NAME, QUANTIZED_WEIGHTS_NAME):
        if single in hashes:
            return {single: hashes[single]}
    return {name: sha256 for name, sha256 in hashes.items() if fnmatchcase(name, WEIGHT_SHARDS)}
