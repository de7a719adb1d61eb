"""A quantized base LLM in its own repository, which plain users of the base can load too."""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.utils.hub import cached_file

from .model_files_genieblue import (
    CHANGED_BASE,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    HUB_KEYS,
    QMAP_NAME,
    QUANTIZED_WEIGHTS_NAME,
    check_cached_sha256,
    read_settings,
    recorded_weights,
)
from .quantized_files_genieblue import QuantizedFile, fill_from_quantized_file
from .quantized_linears_genieblue import check_quanto_installed
from .quantized_precision_guard_genieblue import PrecisionGuard, guard_tree
from .quantized_settings_genieblue import ACTIVATIONS, BASE_PARTS, check_quantization, is_our_quantization

try:
    from accelerate import init_empty_weights
except ImportError:  # only needed where something is quantized
    init_empty_weights = None

# What `AutoModel` hands on, or what has no meaning where weights are read from safetensors onto one device.
OTHER_OPTIONS = (
    "quantization_config", "torch_dtype", "use_safetensors", "low_cpu_mem_usage", "max_memory", "offload_folder",
    "offload_buffers", "adapter_kwargs", "trust_remote_code", "dtype", "device_map", "attn_implementation",
    "output_loading_info", "weights_only", "ignore_mismatched_sizes",
)  # fmt: skip


def read_base_quantization(location: str | os.PathLike, **hub_kwargs: Any) -> dict[str, Any] | None:
    """How the base at `location` (folder or Hub id) was quantized by GenieBlue; `None` if it was not."""
    path = cached_file(str(location), CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    quantization = None if path is None else read_settings(path).get("quantization_config")
    return quantization if is_our_quantization(quantization) else None


def nothing_missing() -> dict[str, Any]:
    """What transformers reports of a complete load; anything else has been an error here already."""
    return {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def chosen_dtype(asked: torch.dtype | str | None, own: torch.dtype | str) -> torch.dtype:
    """The precision asked for, or the model's own for none or `auto`; `ValueError` unless it is floating point."""
    given = own if asked in (None, "auto") else asked
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`dtype` is {given!r}: expected one of {', '.join(ACTIVATIONS)}.")
    return dtype


def on_meta_device(make: Callable[[], nn.Module]) -> nn.Module:
    """A module whose parameters have no memory yet, while its buffers (which no file holds) are right."""
    if init_empty_weights is None:
        raise ModuleNotFoundError(
            "Loading a quantized model needs accelerate: `pip install 'genieblue[quantization]'`.", name="accelerate"
        )
    with init_empty_weights():
        return make()


def one_device(device_map: Any) -> torch.device:
    """The device of a map that names one; `ValueError` for a model spread over several."""
    if isinstance(device_map, dict):
        devices = set(device_map.values())
        device_map = devices.pop() if len(devices) == 1 else device_map
    if device_map is None:
        return torch.device("cpu")
    if device_map in ("auto", "balanced", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device_map, str | int | torch.device):
        return torch.device(device_map)
    raise ValueError(
        f"`device_map` is {device_map!r}: a quantized model is loaded onto one device. Give its name, such as 'cuda'."
    )


def load_quantized_base(
    location: str | os.PathLike,
    *,
    config: Any = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """The base of its own class, with quantized linears, from a folder or a Hub id.

    Raises `OSError` for missing or damaged files, `ValueError` for tensors that are missing or not expected, for
    weights in the Hub's cache with another sha256 than is recorded, and for a `quantization_config` on top.
    """
    check_quanto_installed()
    check_options(kwargs)
    if kwargs.get("quantization_config") is not None:
        raise ValueError(
            f"{location} is already quantized; `quantization_config` would quantize it again. Leave it out, or load "
            "the unquantized base."
        )
    location = os.fspath(location)
    hub_kwargs = {key: kwargs[key] for key in HUB_KEYS if kwargs.get(key) is not None}
    own_config = (
        AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code, **hub_kwargs)
        if config is None
        else copy.deepcopy(config)
    )
    settings: Any = getattr(own_config, "quantization_config", None) or read_base_quantization(location, **hub_kwargs)
    if not is_our_quantization(settings):
        raise ValueError(f"{location} is not a base quantized by GenieBlue: load it without this class.")
    check_quantization(settings, BASE_PARTS, f"`quantization_config` of {location}")
    model_class = _own_class(location, own_config, settings, trust_remote_code, hub_kwargs)
    for name in ("auto_map", "quantization_config"):
        own_config.__dict__.pop(name, None)
    dtype = chosen_dtype(dtype or kwargs.get("torch_dtype"), settings["activations"])
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    base: Any = on_meta_device(lambda: model_class._from_config(own_config, dtype=dtype, **attention))
    files: dict[str, Any] = {
        name: cached_file(location, name, **hub_kwargs) for name in (QUANTIZED_WEIGHTS_NAME, QMAP_NAME)
    }
    weights, recorded = files[QUANTIZED_WEIGHTS_NAME], recorded_weights(settings).get(QUANTIZED_WEIGHTS_NAME)
    check_cached_sha256(location, QUANTIZED_WEIGHTS_NAME, weights, recorded, CHANGED_BASE)
    file = QuantizedFile(weights, files[QMAP_NAME])
    fill_from_quantized_file(base, file, dtype=dtype, device=one_device(device_map), tied=_tied(base))
    use_stored_generation_config(base, location, hub_kwargs)
    base.config.name_or_path = location
    base.config.quantization_config = settings
    guard_tree(base, dtype, _QuantizedBase)
    base.requires_grad_(False).eval()
    loaded: Any = (base, nothing_missing()) if kwargs.get("output_loading_info") else base
    return loaded


def use_stored_generation_config(model: PreTrainedModel, location: str, hub_kwargs: dict[str, Any]) -> None:
    """Gives a model that was made from its configuration the generation settings of its folder, where it has any."""
    file = cached_file(location, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if file is not None:
        model.generation_config = GenerationConfig.from_pretrained(location, **hub_kwargs)


def check_options(options: dict[str, Any]) -> None:
    """`TypeError` for keyword arguments that mean nothing when a quantized model is loaded."""
    given = {name for name, value in options.items() if value is not None}
    if unknown := sorted(given - set(HUB_KEYS) - set(OTHER_OPTIONS)):
        raise TypeError(f"A quantized model cannot be loaded with {', '.join(unknown)}: leave it out.")


def _own_class(location: str, config: Any, settings: dict[str, Any], trust: bool, hub_kwargs: dict[str, Any]) -> Any:
    """The class that the unquantized base has: transformers' own, or that of the base's code."""
    own_map = settings.get("base_auto_map")
    if own_map is None:
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise ValueError(f"{location} has model_type {config.model_type!r}, for which transformers has no model.")
        return AutoModelForCausalLM._model_mapping[type(config)]
    if not isinstance(own_map, dict) or not isinstance(own_map.get("AutoModelForCausalLM"), str):
        raise ValueError(f"`base_auto_map` of {location} names no class of the base: the file is damaged.")
    if not trust:
        raise ValueError(
            f"{location} needs Python code of its own repository; if you trust that code, pass "
            "`trust_remote_code=True`."
        )
    hub_kwargs = {key: value for key, value in hub_kwargs.items() if key != "subfolder"}
    model_class = get_class_from_dynamic_module(own_map["AutoModelForCausalLM"], location, **hub_kwargs)
    model_class.register_for_auto_class("AutoModelForCausalLM")
    return add_generation_mixin_to_remote_model(model_class)


def _tied(base: PreTrainedModel) -> tuple[str, str] | None:
    """Names of the LM head and of the embedding whose weight it shares."""
    names = {id(module): name for name, module in base.named_modules()}
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    is_tied = getattr(base.config.get_text_config(decoder=True), "tie_word_embeddings", False)
    return (names[id(head)], names[id(embedding)]) if is_tied and head is not None else None


class _QuantizedBase(PrecisionGuard):
    """What a quantized base cannot do, refused in a sentence."""

    config: Any

    def save_pretrained(self, save_directory: str | os.PathLike, *_args: Any, **_kwargs: Any) -> None:
        """Always a `ValueError`: the weights in memory are packed for one kernel."""
        raise ValueError(
            f"A quantized base is not saved from memory: copy its folder or repository ({self.config.name_or_path}) "
            f"to {save_directory}."
        )


class QuantizedBaseForCausalLM:
    """What `AutoModelForCausalLM` finds in the repository of a quantized base; it gives the base's own class.

    No `PreTrainedModel`: that would have to name one configuration class, where each base has its own.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Called by `AutoModelForCausalLM`; nothing to do."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *_args: Any, **kwargs: Any) -> Any:
        """See `load_quantized_base`."""
        return load_quantized_base(pretrained_model_name_or_path, **kwargs)
