"""A saved GenieBlue and its base for `verify`, loaded lazily."""

import os
from collections.abc import Iterator
from filecmp import cmp
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import modeling_genieblue
from conversion.origin import find_origin
from conversion.verdict import HeldOut
from conversion.verification.checks import CheckFailed
from hub_cards.model_folder import read_model_config
from modeling_genieblue import (
    GenieBlueConfig,
    GenieBlueForConditionalGeneration,
    GenieBlueProcessor,
    VlmGenieBlueConfig,
    VlmGenieBlueProcessor,
)
from modeling_genieblue.addresses_genieblue import refuse_address
from modeling_genieblue.model_files_genieblue import (
    ADAPTER_FOLDER,
    HUB_KEYS,
    check_folder_or_id,
    is_inner_folder,
    is_path,
)
from modeling_genieblue.quantized_base_genieblue import load_quantized_base, read_base_quantization

OWN_FILES = ["*.json", "*.jinja", "*.py", "*.model", "*.txt", "*.safetensors"]
PROMPTS = (
    "The capital of France is",
    "Question: a train leaves at 9:40 and arrives at 11:05. How long does the journey take?\nAnswer:",
    "def add(a, b):\n    return",
)
# Settings of an adapter that determine its weights and how they are used.
ADAPTER_SETTINGS = (
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "bias",
    "lora_bias", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "target_modules",
    "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern", "layer_replication",
    "modules_to_save", "trainable_token_indices",
)  # fmt: skip


def foreign_code(folder: Path) -> list[str]:
    """Python files in a folder that are not byte for byte those of the installed package."""
    own = Path(modeling_genieblue.__file__).parent
    files = sorted(folder.glob("*.py"))
    return [path.name for path in files if not (own / path.name).is_file() or not cmp(path, own / path.name, False)]


def logits_of(model: nn.Module, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits (batch, length, vocabulary) of a pass without a cache."""
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False, **inputs).logits


class SavedModel:
    """The model to verify; its parts are loaded when a check first needs them."""

    def __init__(self, name: str, base: Any, revision: str | None, hub: dict, trust: bool, dtype: Any, device: Any):
        self.name, self.hub, self.trust, self.dtype, self.device = name, hub, trust, dtype, device
        self.held_out: HeldOut | None = None
        refuse_address(base, "The base")
        self.is_local = os.path.isdir(name)
        check_folder_or_id(name)
        self.revision = None
        if self.is_local:
            self.folder = Path(os.path.realpath(name))
        else:
            # A star matches subfolders too, which may contain anything: only the adapter's belongs to the model.
            own_files = {"allow_patterns": OWN_FILES, "ignore_patterns": ["*/*"]}
            self.folder = Path(snapshot_download(name, revision=revision, **own_files, **hub))
            self.revision = self.folder.name  # a snapshot folder is named after its commit
            snapshot_download(name, revision=self.revision, allow_patterns=f"{ADAPTER_FOLDER}/*", **hub)
        recorded = read_model_config(self.folder)
        self.is_quantized = recorded.get("quantization") is not None
        inner_base = recorded.get("base_model_name_or_path")
        if not self.is_local and is_inner_folder(inner_base):
            snapshot_download(name, revision=self.revision, allow_patterns=f"{inner_base[2:]}/*", **hub)
        self.base_override = None if base is None else os.fspath(base)

    def files(self) -> list[str]:
        """Places of all files in the repository, with "/", including files that are not downloaded."""
        if self.is_local or self.hub.get("local_files_only"):
            paths = (path for path in self.folder.rglob("*") if path.is_file())
            return [path.relative_to(self.folder).as_posix() for path in paths]
        return HfApi(token=self.hub.get("token")).list_repo_files(self.name, revision=self.revision)

    @cached_property
    def config(self) -> GenieBlueConfig:
        return GenieBlueConfig.from_pretrained(self.folder)

    @property
    def has_vlm(self) -> bool:
        """Whether its multimodal side is a whole VLM."""
        return isinstance(self.config, VlmGenieBlueConfig)

    @property
    def processor_class(self) -> type:
        """The class of its processor."""
        return VlmGenieBlueProcessor if self.has_vlm else GenieBlueProcessor

    @property
    def source(self) -> dict[str, Any]:
        """Arguments for `from_pretrained`: the model's folder, or its id at the verified commit."""
        return self.hub if self.is_local else {**self.hub, "revision": self.revision}

    @cached_property
    def base(self) -> tuple[str, dict[str, Any]]:
        """Location of the plain base, and keyword arguments to load it directly."""
        name, revision = self.base_override, None
        if name is None:
            name, revision = self.config.base_model_name_or_path, self.config.base_model_revision
            if name is None:
                raise CheckFailed("config.json does not record a base: give its folder or Hub id (--base).")
            if is_path(name):
                name = os.path.normpath(self.folder / name)
        if is_path(name) and not os.path.isdir(name):
            raise CheckFailed(f"The base should be in {name}, but that folder does not exist.")
        options = {**self.hub, "trust_remote_code": self.trust}
        if revision is not None and not os.path.isdir(name):
            options["revision"] = revision
        try:
            AutoConfig.from_pretrained(name, **options)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise CheckFailed(
                f"The base {name} needs Python code from its repository; if you trust that code, allow it "
                "(--trust-remote-code)."
            ) from error
        return name, options

    @cached_property
    def base_quantization(self) -> dict[str, Any] | None:
        """Quantization settings in the plain base's config.json; `None` unless GenieBlue quantized it."""
        name, options = self.base
        return read_base_quantization(name, **{key: options[key] for key in HUB_KEYS if key in options})

    @cached_property
    def origin(self) -> tuple[str, dict[str, Any]]:
        """Of a quantized model: folder or Hub id, and commit, of the 16-bit one; see `find_origin`."""
        recorded = self.config.quantization.get("source") or {}  # pyright: ignore[reportAttributeAccessIssue]
        return find_origin(recorded, self.folder, is_local=self.is_local)

    @cached_property
    def plain(self) -> PreTrainedModel:
        """The base alone, loaded only by transformers or, if it is quantized, as `AutoModelForCausalLM` loads it."""
        name, options = self.base
        dtype = self.dtype
        if self.is_quantized and dtype == "auto":  # also of a base that is not quantized itself
            dtype = self.config.quantization["activations"]
        if self.base_quantization is not None:
            return load_quantized_base(name, dtype=dtype, device_map=self.device, **options)
        base = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **options)
        return base.to(self.device)

    @cached_property
    def model(self) -> GenieBlueForConditionalGeneration:
        """The GenieBlue with its own copy of the base, loaded by the installed package."""
        options = {"trust_remote_code": self.trust, "dtype": self.dtype, "base_model": self.base_override}
        if self.is_quantized:  # packed for the device's kernels as they are read
            options["device_map"] = self.device
        return GenieBlueForConditionalGeneration.from_pretrained(self.name, **options, **self.source).to(self.device)

    @cached_property
    def base_tokenizer(self) -> Any:
        name, options = self.base
        return AutoTokenizer.from_pretrained(name, **options)

    @cached_property
    def prompts(self) -> list[torch.Tensor]:
        """Token ids of the prompts, each (1, length)."""
        return [self.base_tokenizer(text, return_tensors="pt")["input_ids"].to(self.device) for text in PROMPTS]

    @cached_property
    def plain_logits(self) -> list[torch.Tensor]:
        """The plain base's logits for each prompt, (1, length, vocabulary), computed before PEFT modifies it."""
        return [logits_of(self.plain, ids) for ids in self.prompts]

    def different_settings(self, lora_config: PeftConfig) -> Iterator[str]:
        """Differences between the adapter's saved settings and config.json, one sentence each."""
        saved = PeftConfig.from_pretrained(self.folder / ADAPTER_FOLDER)
        # A local base is written as a path relative to the folder, in both files.
        lora_config.base_model_name_or_path = read_model_config(self.folder).get("base_model_name_or_path")
        for name in ADAPTER_SETTINGS:
            here, there = (_comparable(getattr(config, name, None)) for config in (saved, lora_config))
            if here != there:
                yield f"adapter_config.json has {name} {here!r}, expected {there!r} from config.json"

    def release(self, *names: str) -> None:
        """Frees loaded weights: the named parts, or all."""
        for name in names or ("plain", "model", "plain_logits"):
            self.__dict__.pop(name, None)


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | tuple | set) else value
