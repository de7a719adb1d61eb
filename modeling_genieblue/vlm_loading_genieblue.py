"""Loads the parts of a GenieBlue that a VLM adds to the base: everything of the VLM but its language model."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig

from .language_adapter_genieblue import tensors_of_other_kinds
from .loading_genieblue import LoadRequest
from .model_files_genieblue import GENERATION_CONFIG_NAME, VLM_FOLDER, WEIGHTS_NAME, name_of_variant, some
from .vlm_configuration_genieblue import VlmGenieBlueConfig
from .vlm_language_genieblue import OwnLanguage, OwnRows

try:
    from accelerate import init_empty_weights
except ImportError:  # PEFT needs it too
    raise

# Of `from_pretrained`: these are heeded here, or mean nothing where each tensor is read once.
OPTIONS = (
    "config", "dtype", "torch_dtype", "attn_implementation", "variant", "generation_config", "device_map",
    "trust_remote_code", "use_safetensors", "low_cpu_mem_usage", "weights_only", "max_memory", "offload_folder",
    "offload_buffers", "adapter_kwargs", "output_loading_info",
)  # fmt: skip
OF_CHECKPOINT = "multimodal_language_model."  # the adapter again, in a checkpoint of training


def load_vlm_parts(model_class: type, request: LoadRequest, base_model: Any) -> tuple[Any, dict]:
    """A model with a VLM whose language model has no memory yet, still without a base, and an empty loading report.

    Raises `OSError` for missing or damaged files, and `ValueError` for tensors that do not fit the configuration.
    """
    kwargs = dict(request.own_kwargs)
    if unknown := sorted(name for name, value in kwargs.items() if value is not None and name not in OPTIONS):
        raise TypeError(
            f"A GenieBlue of a VLM cannot be loaded with {', '.join(unknown)}: leave it out, or change its "
            "configuration and pass that as `config`."
        )
    config: Any = kwargs.get("config") or VlmGenieBlueConfig.from_pretrained(request.path, **request.hub_kwargs)
    config = copy.deepcopy(config)
    dtype = _chosen_dtype(kwargs.get("dtype") or kwargs.get("torch_dtype"), config, base_model)
    request.base_kwargs["dtype"] = dtype
    attention = {name: kwargs[name] for name in ("attn_implementation",) if kwargs.get(name) is not None}
    make: Any = model_class
    with init_empty_weights():
        model = make._from_config(config, dtype=dtype, **attention)
    path = request.file(name_of_variant(WEIGHTS_NAME, kwargs.get("variant")))
    try:
        with safe_open(path, framework="pt") as file:
            _fill(model, file, dtype, request.path)
    except SafetensorError as error:
        raise OSError(f"The weights of {request.path} cannot be read ({error}): fetch them again.") from error
    if (given := kwargs.get("generation_config")) is not None:
        model.generation_config = given
    elif (own := request.find(GENERATION_CONFIG_NAME)) is not None:
        model.generation_config = GenerationConfig.from_pretrained(Path(own).parent)
    of_vlm = request.file(GENERATION_CONFIG_NAME, folder=VLM_FOLDER)
    model.vlm.generation_config = GenerationConfig.from_pretrained(Path(of_vlm).parent)
    model.config.name_or_path = request.path
    return model, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def _chosen_dtype(wanted: Any, config: Any, base_model: Any) -> torch.dtype:
    if wanted in (None, "auto"):
        wanted = base_model.dtype if isinstance(base_model, nn.Module) else config.dtype
    return getattr(torch, wanted) if isinstance(wanted, str) else wanted or torch.float32


def _places(model: Any, file: Any, part: str, where: str) -> torch.Tensor:
    """Where the VLM's own rows of `embedding` or `head` are, (count,); `OSError` if that cannot be."""
    places = file.get_tensor(f"own_language.{part}.indices")
    count = len(model.vlm.get_input_embeddings().weight)
    if places.dtype != torch.long or places[0] < 0 or places[-1] >= count or (places.diff() <= 0).any():
        raise OSError(
            f"own_language.{part}.indices in the weights of {where} are {places.dtype} from {places.min()} to "
            f"{places.max()}, expected increasing ones from 0 to {count - 1}: the file is damaged; fetch it again."
        )
    return places


def _fill(model: Any, file: Any, dtype: torch.dtype, where: str) -> None:
    config = model.config
    rows = {"embedding": config.own_embedding_rows, "head": config.own_head_rows or 0}
    expected = {f"own_language.tensors.{name}": None for name in config.own_language_tensors or ()}
    for name, count in rows.items():
        if count:
            expected |= {f"own_language.{name}.indices": [count], f"own_language.{name}.weight": None}
    of_vlm = {name: list(each.shape) for name, each in model.state_dict().items()}
    expected |= of_vlm
    found = {name for name in file.keys() if not name.startswith(OF_CHECKPOINT)}
    problems = [f"missing: {some(sorted(lacking))}"] if (lacking := expected.keys() - found) else []
    problems += [f"unexpected: {some(sorted(extra))}"] if (extra := found - expected.keys()) else []
    problems += [
        f"{name} has shape {shape}, expected {expected[name]}"
        for name in sorted(found & expected.keys())
        if expected[name] is not None and (shape := list(file.get_slice(name).get_shape())) != expected[name]
    ]
    indices = {name for name in found if name.endswith(".indices")}
    persistent = {name for name, each in model.state_dict().items() if not each.is_floating_point()}
    problems += tensors_of_other_kinds(file, found & expected.keys() - indices - persistent)
    if problems:
        raise ValueError(
            f"The weights do not fit config.json: {'; '.join(problems[:3])}. Load the files that belong together "
            "(same repository, same revision)."
        )

    def tensor(name: str) -> torch.Tensor:
        value = file.get_tensor(name)
        return value.to(dtype) if value.is_floating_point() else value

    for name in of_vlm:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._parameters:
            module.register_parameter(leaf, nn.Parameter(tensor(name)))
        else:
            module._buffers[leaf] = tensor(name)
    own = {
        name: OwnRows(_places(model, file, name, where), tensor(f"own_language.{name}.weight"))
        for name, count in rows.items()
        if count
    }
    tensors = {name: tensor(f"own_language.tensors.{name}") for name in config.own_language_tensors or ()}
    model.own_language = OwnLanguage(tensors, own.get("embedding"), own.get("head"))
