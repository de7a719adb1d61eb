"""The base of a GenieBlue that is to be served: where it is, and whether it is the recorded one. Needs no vLLM."""

import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from genieblue.serving.vllm.own_weights import check_own_weights
from genieblue.serving.vllm.quantized_base import check_quantization, compare_rounded
from modeling_genieblue.base_identity_genieblue import compare_with_samples, different_settings
from modeling_genieblue.hints_genieblue import BaseNotFoundError, WrongBaseError
from modeling_genieblue.language_adapter_genieblue import tensors_of_other_kinds
from modeling_genieblue.loading_genieblue import LoadRequest
from modeling_genieblue.model_files_genieblue import (
    CONFIG_NAME,
    MODEL_TYPE,
    QUANT_METHOD,
    ModelFiles,
    cached_sha256,
    read_settings,
    weight_files,
)

# Bases whose block is a tree of linears and norms around one attention, which the tests run in both views.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
)


class ServedBase(NamedTuple):
    """A base that was checked: folder or Hub id, and the names of the files of weights that are to be loaded.

    `quantization` is what vLLM needs to know of weights that others quantized.
    """

    location: str
    revision: str | None
    architectures: list[str]
    weight_files: list[str]
    quantization: dict[str, Any] | None


def find_base(model: str, revision: str | None, config: Any) -> ServedBase:
    """The base that `config` names, after all files that are to be served were checked.

    `config` is that of the GenieBlue in `model`. Raises `ValueError` for a base that vLLM or this plugin cannot run,
    or that is not the recorded one, and for weights that do not fit; `OSError` for missing or damaged files. All say
    what to do.
    """
    request = LoadRequest.from_arguments(model, {"revision": revision})
    settings = request.check_layout()
    if settings.get("vlm_config") is not None:
        raise ValueError(
            f"{model} sees with a whole VLM, which the plugin for vLLM does not run: load it with transformers."
        )
    if settings.get("quantization") is not None:
        raise ValueError(
            f"{model} has weights that `genieblue quantize` wrote, in a format (optimum-quanto's) that vLLM does not "
            "read: serve the 16-bit GenieBlue that it was made from, or this one with `transformers serve`."
        )
    request.check_weight_files(settings)
    if config.rank_pattern:
        raise ValueError(
            f"{model} has LoRA of several ranks ({config.lora_rank} and others in `rank_pattern`), and vLLM runs one "
            "rank here: serve it with `transformers serve`."
        )
    _check_adapter_settings(request.adapter_settings(), config)
    base = request.base_location(config)
    if base is None:
        raise WrongBaseError(f"{model} does not record its base.")
    base_revision = None if os.path.isdir(base) else config.base_model_revision
    files = ModelFiles(base, revision=base_revision)
    recorded = settings.get("base_model_name_or_path")  # `config` may have another one, that was given instead
    architectures, quantization = _check_base_settings(base, files, config, recorded)
    samples = request.base_samples(required=True)
    check_own_weights(request, config, samples)
    paths = _check_base_weights(base, files, config, recorded, samples, quantization)
    if quantization and quantization["quant_method"] == "gptq":  # vLLM would look for them in the GenieBlue's files
        names = [name for path in paths.values() for name in _tensor_names(path)]
        linears = [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]
        quantization["modules_in_block_to_quantize"] = linears
    return ServedBase(base, base_revision, architectures, list(paths), quantization)


def _check_adapter_settings(found: dict[str, Any], config: Any) -> None:
    """`ValueError` if PEFT would run another adapter than `config` means."""
    of_peft: dict[str, Any] = {"r": 8, "lora_alpha": 8, "use_rslora": False, "use_dora": False}
    of_peft |= {"alpha_pattern": {}, "rank_pattern": {}}
    meant = of_peft | {"r": config.lora_rank, "lora_alpha": config.lora_alpha}
    for name, value in meant.items():
        if (has := found.get(name) or of_peft[name]) != value:
            raise ValueError(
                f"language_adapter/adapter_config.json has {name} {has!r}, config.json means {value!r}: serve "
                "files that belong together (same repository, same revision)."
            )


def _check_base_settings(
    base: str, files: ModelFiles, config: Any, recorded: str | None
) -> tuple[list[str], dict[str, Any] | None]:
    """The architectures in a base's config.json, and how it is quantized.

    `ValueError` if it cannot be served or computes something else.
    """
    path = files.find(CONFIG_NAME, must_answer=True)
    if path is None:
        raise BaseNotFoundError(f"The base {base} has no {CONFIG_NAME}: put it there, or fetch it again.")
    settings = read_settings(path)
    quantization = settings.get("quantization_config") or None
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        raise ValueError(
            f"The base {base} was quantized by `genieblue quantize`, in a format that vLLM does not read: serve the "
            "16-bit GenieBlue, on its 16-bit base."
        )
    if quantization:
        check_quantization(base, quantization)
    if settings.get("model_type") == MODEL_TYPE:
        raise ValueError(f"{base} is a GenieBlue, expected its base: the language model that it was made from.")
    architectures = settings.get("architectures") or []
    if not any(name in ARCHITECTURES for name in architectures):
        raise ValueError(
            f"The base {base} is a {architectures or settings.get('model_type')}; served by vLLM are GenieBlues on "
            f"{', '.join(ARCHITECTURES)}. Serve this one with `transformers serve`."
        )
    if differences := different_settings(AutoConfig.from_pretrained(path.parent), config.text_config):
        raise _wrong_base(base, recorded, differences)
    return architectures, quantization


def _check_base_weights(
    base: str,
    files: ModelFiles,
    config: Any,
    recorded: str | None,
    samples: dict[str, dict],
    quantization: dict[str, Any] | None,
) -> dict[str, Path]:
    """A base's files of weights by name; `ValueError` if their values are not the recorded ones, or these rounded.

    A few pages of each file are read.
    """
    paths = weight_files(files.find)
    if not paths:
        raise BaseNotFoundError(f"The base {base} has no weights in safetensors files: fetch it again.")
    names = Counter(name for path in paths.values() for name in _tensor_names(path))
    if repeated := [f"{name} is in {count} files" for name, count in names.items() if count > 1]:
        raise _wrong_base(base, recorded, repeated)  # vLLM takes the last one
    differences, rounded = [], set()
    if quantization:
        differences, rounded = compare_rounded(list(paths.values()), samples, quantization)
    else:
        hashes = config.base_model_fingerprint or {}
        for name, path in paths.items():
            found = cached_sha256(path)
            if None not in (found, hashes.get(name)) and found != hashes[name]:
                raise _wrong_base(base, recorded, [f"sha256 of {name} is {found}, expected {hashes[name]}"])
    plain = {name: sample for name, sample in samples.items() if name not in rounded}
    others, missing = _compare_files(list(paths.values()), plain)
    if others and quantization:
        others[-1] += " (AWQ and SmoothQuant move scales into norms, which LoRA would not follow: quantize without)"
    differences += others + [f"{name} is missing" for name in missing]
    if differences:
        raise _wrong_base(base, recorded, differences)
    return paths


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise OSError(f"{path} cannot be read ({error}): it is damaged; fetch it again.") from error


def _compare_files(paths: list[Path], samples: dict[str, dict]) -> tuple[list[str], list[str]]:
    """Differences of tensors in files from recorded samples, and the names of those that no file has."""
    differences, missing = [], set(samples)
    for path in paths:
        with safe_open(path, framework="pt") as file:
            names = sorted(missing & set(file.keys()))
            differences += tensors_of_other_kinds(file, names)
            for name in names:
                tensors = {name: file.get_tensor(name)}
                differences += compare_with_samples(None, {name: samples[name]}, tensors)
                missing.remove(name)
    return differences, sorted(missing)


def _wrong_base(base: str, recorded: str | None, differences: list[str]) -> WrongBaseError:
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return WrongBaseError(
        f"{base} is not the base that this GenieBlue was made for, {recorded}: "
        f"{'; '.join(differences[:3])}{more}. Serve it on that one."
    )
