"""Which base a GenieBlue belongs to: sha256 of the base's weight files, and a sample of each tensor's values."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name
from safetensors import safe_open
from torch import nn

from .quantized_linears_genieblue import QUANTIZED_WEIGHTS_NAME, is_our_quantization, sampled_codes, scales_of

logger = logging.getLogger(__name__)

BASE_FINGERPRINT_NAME = "base_fingerprint.json"
VALUES_PER_PLACE = 4
WEIGHT_FILES = "*.safetensors"
WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"


def tensor_samples(model: nn.Module) -> dict[str, dict]:
    """`{name: {"shape", "dtype", "positions", "values"}}`: some values of each parameter.

    Of a quantized one scales and codes are sampled. Parameters on the meta device (offloaded ones) are left out, and
    quantized ones of a kind that is not ours.
    """
    return {
        name: {
            "shape": list(values.shape),
            "dtype": str(values.dtype).removeprefix("torch."),
            "positions": (positions := _positions(values.numel())),
            "values": _values_at(values, positions).float().tolist(),
        }
        for name, values in _readable_values(model).items()
    }


def _readable_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """What can be compared by value: plain parameters; scales and some codes of quantized ones, by other names."""
    readable = {}
    for name, parameter in model.named_parameters():
        if is_plain_weight(parameter):
            readable[name] = parameter
        elif (scales := scales_of(parameter)) is not None:
            readable[f"{name}._scale"] = scales
            readable[f"{name}._codes"] = sampled_codes(parameter)
    return readable


def _positions(count: int) -> list[int]:
    """A few neighbours at a quarter and at three quarters of a tensor, so that few pages of a file are read."""
    if count <= 2 * VALUES_PER_PLACE:
        return list(range(count))
    places = (count // 4, 3 * count // 4 - VALUES_PER_PLACE)
    return [start + step for start in places for step in range(VALUES_PER_PLACE)]


def _values_at(parameter: torch.Tensor, positions: list[int]) -> torch.Tensor:
    return parameter.detach().reshape(-1)[positions].cpu()


def is_plain_weight(parameter: torch.Tensor) -> bool:
    """Whether the values of `parameter` can be read as they are: floating point, stored densely, and in memory."""
    plain_type = type(parameter) in (torch.Tensor, nn.Parameter)
    return plain_type and parameter.device.type != "meta" and parameter.dtype in _FLOATING


_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_sample(sample: Any) -> bool:
    """Whether `sample` can be one of `tensor_samples`, and not what is left of one in a damaged file."""
    if not isinstance(sample, dict):
        return False
    lists = [sample.get(name) for name in ("shape", "positions", "values")]
    if not all(isinstance(numbers, list) for numbers in lists) or not isinstance(sample.get("dtype"), str):
        return False
    shape, positions, values = lists
    whole = all(type(number) is int and number >= 0 for number in (*shape, *positions))
    fits = len(positions) == len(values) and all(isinstance(value, int | float) for value in values)
    is_dtype = isinstance(getattr(torch, sample["dtype"], None), torch.dtype)
    return whole and fits and is_dtype and all(position < math.prod(shape) for position in positions)


def compare_with_samples(model: nn.Module, samples: dict[str, dict]) -> list[str]:
    """Differences between `model` and recorded samples, one sentence each; an empty list if it is the same base.

    A base in another dtype is the same base if one set of values rounds to the other. Offloaded tensors, and those
    that transformers quantized, cannot be compared value by value and are passed over.
    """
    differences = []
    compared = 0
    parameters = _readable_values(model)
    both = [any(name.endswith("._scale") for name in names) for names in (samples, parameters)]
    if is_our_quantization(getattr(model.config, "quantization_config", None)) and not both[0]:
        return [
            "it was quantized by GenieBlue, and the recorded base was not: give the unquantized base, or load the "
            "quantized GenieBlue that it belongs to"
        ]
    found = {name.removesuffix("._scale").removesuffix("._codes") for name in parameters}
    readable = both[0] == both[1] and len(found) == sum(1 for _ in model.parameters())
    for name, sample in samples.items():
        parameter = parameters.get(name)
        if parameter is None:
            if readable:
                differences.append(f"{name} is missing")
        else:
            compared += 1
            if list(parameter.shape) != sample["shape"]:
                differences.append(f"{name} has shape {list(parameter.shape)}, expected {sample['shape']}")
            elif not _same_values(found := _values_at(parameter, sample["positions"]), sample):
                expected = torch.tensor(sample["values"])
                worst = int((found.float() - expected).abs().argmax())
                differences.append(f"{name} holds {found[worst]:.7g} where {expected[worst]:.7g} was recorded")
    if readable:
        differences += [f"{name} is unknown to the recorded base" for name in parameters if name not in samples]
    if samples and not compared and not differences:
        differences.append("none of its tensors could be compared with the recorded ones")
    return differences


def different_settings(base: Any, recorded: Any) -> list[str]:
    """Settings that decide what a base computes and that are not as recorded, one sentence each.

    Args:
        base: the configuration of the loaded base.
        recorded: `text_config` of the GenieBlue.
    """
    found, expected = (_deciding_settings(config) for config in (base.get_text_config(decoder=True), recorded))
    # A setting that only one of them has is one that only one version of transformers, or of the base's code, knows.
    return [
        f"its configuration has {name} {found[name]!r} where {expected[name]!r} was recorded"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]


def _deciding_settings(config: Any) -> dict[str, Any]:
    settings = json.loads(json.dumps(config.to_dict(), default=str))
    # How far positions reach matters where rotary embeddings are stretched, and nowhere else.
    rope = json.dumps([settings.get("rope_parameters"), settings.get("rope_scaling")])
    is_stretched = any(kind in rope for kind in ('"dynamic"', '"yarn"', '"longrope"', '"su"'))
    left_out = OTHER_SETTINGS if is_stretched else (*OTHER_SETTINGS, "max_position_embeddings")
    return {name: value for name, value in settings.items()
            if not any(fnmatchcase(name, pattern) for pattern in left_out)}  # fmt: skip


# Of a base's configuration, what changes no logits: names, versions, formats, and settings of generation or training.
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
    # float16 and bfloat16 round the same number differently: neither holds the other's values.
    half_types = {torch.float16, torch.bfloat16}
    mixed = found.dtype != recorded_dtype and {found.dtype, recorded_dtype} <= half_types
    return mixed and torch.allclose(found.double(), recorded, rtol=2**-7, atol=1e-7)


def cached_commits(base: nn.Module, name: str, cache_dir: str | os.PathLike | None = None) -> dict[str, bool]:
    """Commits of the Hub id `name` whose weights are in the local cache, and whether they are those of `base`."""
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    snapshots = cache / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
    samples = tensor_samples(base)
    return {folder.name: _holds(folder, samples) for folder in snapshots.glob("*") if any(folder.glob(WEIGHT_FILES))}


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
    base: str | os.PathLike,
    revision: str | None = None,
    *,
    read_files: bool = True,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> dict[str, str]:
    """sha256 by name of each safetensors file of a base, a folder or a Hub id.

    Files of the Hub cache are named by their sha256; with `read_files=False` only such names are returned, and nothing
    is read or asked for. The Hub is asked about files that are not in the cache, unless `local_files_only`. Returns
    `{}` when there are no files (a base that lives in memory only).
    """
    folder = Path(base)
    if folder.is_dir():
        files = _weight_files(lambda name: folder / name if (folder / name).is_file() else None)
        return {name: file_sha256(path) for name, path in files.items()}

    def find(name: str) -> Path | None:
        try:
            return Path(
                hf_hub_download(str(base), name, revision=revision, cache_dir=cache_dir, local_files_only=True)
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            logger.debug("No %s of %s: %s", name, base, error)
            return None

    hashes = {}
    for name, path in _weight_files(find).items():
        blob = os.path.basename(os.path.realpath(path))
        if len(blob) == 64 and all(character in "0123456789abcdef" for character in blob):
            hashes[name] = blob
        elif read_files:
            hashes[name] = file_sha256(path)
    if hashes or not read_files or local_files_only:
        return hashes
    return _published_hashes(str(base), revision, token)


def _published_hashes(name: str, revision: str | None, token: str | bool | None) -> dict[str, str]:
    """sha256 of a repository's weight files as the Hub knows them, for a base whose files are not on this computer."""
    try:
        files = HfApi(token=token).model_info(name, revision=revision, files_metadata=True).siblings
    except (HfHubHTTPError, OSError, ValueError) as error:
        logger.debug("No files of %s: %s", name, error)
        return {}
    hashes = {file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None}
    if WEIGHTS_NAME in hashes:
        return {WEIGHTS_NAME: hashes[WEIGHTS_NAME]}
    if QUANTIZED_WEIGHTS_NAME in hashes:
        return {QUANTIZED_WEIGHTS_NAME: hashes[QUANTIZED_WEIGHTS_NAME]}
    return {name: sha256 for name, sha256 in hashes.items() if fnmatchcase(name, "model-*-of-*.safetensors")}


def _weight_files(find: Callable[[str], Path | None]) -> dict[str, Path]:
    """The weight files that transformers would load: one file, or else the shards of an index."""
    names = [WEIGHTS_NAME if find(WEIGHTS_NAME) is not None else QUANTIZED_WEIGHTS_NAME]
    if names != [WEIGHTS_NAME] and (index := find(INDEX_NAME)) is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index} names a file outside of its folder ({outside[0]!r}): do not trust this base.")
    return {name: path for name in names if (path := find(name)) is not None}


def file_sha256(path: str | os.PathLike) -> str:
    """sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


__all__ = ["compare_with_samples", "different_settings", "tensor_samples", "weight_file_hashes"]
