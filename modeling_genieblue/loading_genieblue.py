"""Loading: our own files from a folder or the Hub, and the provenance of a model."""

import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file, extract_commit_hash

from .base_identity_genieblue import is_sample
from .configuration_genieblue import check_config_kinds
from .hints_genieblue import ACCEPT_BASE, GIVE_BASE, BaseNotFoundError, WrongBaseError
from .language_adapter_genieblue import tensors_of_other_kinds
from .model_files_genieblue import (
    ACCESS_KEYS,
    ADAPTER_CONFIG_NAME,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS_NAME,
    BASE_FINGERPRINT_NAME,
    CHANGED_WEIGHTS,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    HUB_KEYS,
    INDEX_NAME,
    QUANTIZED_ADAPTER_NAME,
    RECIPE_NAME,
    SHARED_HUB_KEYS,
    WEIGHTS_NAME,
    check_cached_sha256,
    check_settings_files,
    is_inner_folder,
    is_path,
    name_of_variant,
    read_settings,
    recorded_weights,
)

logger = logging.getLogger(__name__)

# What the base is given as it would be by hand.
BASE_KEYS = (
    "dtype", "torch_dtype", "max_memory", "offload_folder", "offload_buffers", "trust_remote_code", "disable_mmap",
    "experts_implementation",
)  # fmt: skip


@dataclass
class LoadRequest:
    """One call of `from_pretrained`: where our files are, and what the base is to be loaded with."""

    path: str
    # Not shown: there may be a token among them.
    hub_kwargs: dict[str, Any] = field(repr=False)
    own_kwargs: dict[str, Any] = field(repr=False)
    base_kwargs: dict[str, Any] = field(repr=False)

    @classmethod
    def from_arguments(cls, path: str | os.PathLike, kwargs: dict[str, Any]) -> "LoadRequest":
        """Sorts the keyword arguments of `from_pretrained` into ours and the base's."""
        kwargs = dict(kwargs)
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_KEYS if kwargs.get(key) is not None}
        if not os.path.isdir(path):  # all files are of one commit, whatever is pushed in the meantime
            asked = hub_kwargs.pop("revision", None)
            hub_kwargs["revision"] = hub_commit(os.fspath(path), asked, newest=True, **hub_kwargs) or asked
        base_kwargs = {key: kwargs[key] for key in BASE_KEYS if kwargs.get(key) is not None}
        base_kwargs |= {key: hub_kwargs[key] for key in SHARED_HUB_KEYS if key in hub_kwargs}
        if kwargs.get("quantization_config") is not None:
            base_kwargs["quantization_config"] = kwargs.pop("quantization_config")
        own_device_map, base_device_map = _split_device_map(kwargs.pop("device_map", None))
        if own_device_map is not None:
            kwargs["device_map"], base_kwargs["device_map"] = own_device_map, base_device_map
        # `AutoModel` passes the attention implementation in the configuration.
        attention = kwargs.pop("attn_implementation", None)
        attention = attention or getattr(kwargs.get("config"), "_attn_implementation_internal", None)
        if attention is not None:
            own_attention, base_attention = attention, attention
            if isinstance(attention, dict):
                base_attention = attention.get("text_config", attention.get(""))
                own_attention = {key: value for key, value in attention.items() if key != "text_config"}
            kwargs["attn_implementation"] = own_attention
            if base_attention is not None:
                base_kwargs["attn_implementation"] = base_attention
        return cls(os.fspath(path), hub_kwargs, kwargs, base_kwargs)

    def file(self, name: str, *, folder: str = "") -> str:
        """Path of one of our files, in the folder or in the Hub's cache; `OSError` if it is missing."""
        path: Any = self.find(name, folder=folder, required=True)
        return path

    def find(self, name: str, *, folder: str = "", required: bool = False) -> str | None:
        """As `file`, but `None` for a missing one unless it is `required`."""
        subfolder = os.path.join(self.hub_kwargs.get("subfolder", ""), folder)
        hub_kwargs = {**self.hub_kwargs, "subfolder": subfolder, "_raise_exceptions_for_missing_entries": required}
        is_gone = os.path.isdir(self.path) and not os.path.isfile(os.path.join(self.path, subfolder, name))
        path = None if is_gone else cached_file(self.path, name, **hub_kwargs)
        if path is None and required:
            raise FileNotFoundError(
                f"{self.path} has no {os.path.join(folder, name)}: it is incomplete; save or fetch it again."
            )
        return path

    def access(self) -> dict[str, Any]:
        """What our files were looked up with, and the base's are too."""
        return {key: self.hub_kwargs[key] for key in ACCESS_KEYS if key in self.hub_kwargs}

    def check_layout(self) -> dict[str, Any]:
        """The settings in `config.json`.

        Raises `OSError` if there is none, `ValueError` for an adapter in the root, which `AutoModel` prefers.
        """
        try:
            has_config = self.find(CONFIG_NAME, required=not os.path.isdir(self.path)) is not None
        except OSError as error:
            raise OSError(f"{self.path} could not be loaded: {error}") from error
        if not has_config:  # transformers would go on with a default configuration
            raise OSError(f"{self.path} has no {CONFIG_NAME}: expected the folder or Hub id of a saved GenieBlue.")
        check_settings_files(self.path, {CONFIG_NAME: "model_type", GENERATION_CONFIG_NAME: None}, **self.hub_kwargs)
        config_file = self.file(CONFIG_NAME)
        settings = read_settings(config_file)
        check_config_kinds(settings, config_file)
        if self.find(ADAPTER_CONFIG_NAME) is not None:
            raise ValueError(
                f"{self.path} has {ADAPTER_CONFIG_NAME} in its root, so `AutoModel` takes it for a plain adapter and "
                f"loads the base instead of GenieBlue. Move the adapter's files to {ADAPTER_FOLDER}/."
            )
        return settings

    def check_weight_files(self, settings: dict[str, Any]) -> None:
        """`ValueError` if a weight file is not the one that `settings` (of config.json) record.

        That costs nothing for files in the Hub's cache (`check_cached_sha256`); others are not read.
        """
        recorded = recorded_weights(settings)
        variant = self.own_kwargs.get("variant")
        of_load = (
            ("", name_of_variant(WEIGHTS_NAME, variant)),
            (ADAPTER_FOLDER, name_of_variant(ADAPTER_WEIGHTS_NAME, variant)),
            (ADAPTER_FOLDER, QUANTIZED_ADAPTER_NAME),
        )
        for folder, name in of_load:
            place = f"{folder}/{name}" if folder else name
            if place in recorded:
                path = self.find(name, folder=folder)
                check_cached_sha256(self.path, place, path, recorded[place], CHANGED_WEIGHTS)

    def load_own_weights(
        self, from_pretrained: Callable, model_args: tuple, base_model: Any
    ) -> tuple[PreTrainedModel, dict]:
        """Vision tower and projector, strictly: a missing or unexpected tensor is a `ValueError`."""
        kwargs = {**self.hub_kwargs, **self.own_kwargs, "use_safetensors": True}
        on_given_base = isinstance(base_model, nn.Module)
        if on_given_base and "dtype" not in kwargs and "torch_dtype" not in kwargs:
            kwargs["dtype"] = base_model.dtype
        kwargs["ignore_mismatched_sizes"] = True  # reported below, by name
        try:
            self._check_number_kinds()
            model, info = from_pretrained(self.path, *model_args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"The weights of {self.path} cannot be read ({error}): the file is damaged; fetch it again."
            ) from error
        problems = [
            f"{title} {sorted(map(str, info[key]))[:3]} ({len(info[key])} in all)"
            for key, title in (
                ("missing_keys", "missing"), ("unexpected_keys", "unexpected"), ("mismatched_keys", "wrong shape")
            )
            if info.get(key)
        ]  # fmt: skip
        if problems:
            raise ValueError(f"The weights of {self.path} do not fit its configuration: {'; '.join(problems)}.")
        if on_given_base and "device_map" not in kwargs:
            model.to(base_model.device)
        return model, info

    def _check_number_kinds(self) -> None:
        """`ValueError` for integer or complex tensors among our own weights, which transformers casts in silence."""
        sharded = self.find(INDEX_NAME) is not None
        name = name_of_variant(WEIGHTS_NAME, self.own_kwargs.get("variant"))
        path = self.find(name, required=os.path.isdir(self.path) and not sharded)
        if path is None:
            return
        with safe_open(path, framework="pt") as file:
            if problems := tensors_of_other_kinds(file, file.keys()):
                raise ValueError(f"{path} does not fit its configuration: {'; '.join(problems[:3])}. Fetch it again.")

    def adapter_file(self, name: str | None = None) -> str:
        """Path of a file of the adapter, by default its weights, in a folder or the cache; `OSError` without one."""
        name = name or name_of_variant(ADAPTER_WEIGHTS_NAME, self.own_kwargs.get("variant"))
        return self.file(name, folder=ADAPTER_FOLDER)

    def adapter_settings(self) -> dict[str, Any]:
        """PEFT's configuration beside the adapter's weights; `OSError` if it is missing or damaged."""
        return read_settings(self.adapter_file(ADAPTER_CONFIG_NAME))

    def has_generation_settings(self) -> bool:
        """Whether there are any to be had from us: in our files, or given to `from_pretrained`."""
        is_given = self.own_kwargs.get("generation_config") is not None
        return is_given or self.find(GENERATION_CONFIG_NAME) is not None

    def base_samples(self, required: bool) -> dict[str, dict]:
        """The recorded sample of the base's values; `OSError` if there is none although it is needed."""
        path = self.find(BASE_FINGERPRINT_NAME, required=required)
        if path is None:
            return {}
        samples = read_settings(path)
        if not samples or not all(map(is_sample, samples.values())):
            raise BaseNotFoundError(f"{path} records no base: it is damaged; fetch it again.", ACCEPT_BASE)
        return samples

    def base_location(self, config: Any, required: bool = True) -> str | None:
        """Hub id or absolute path of the base that `config` names; a path is relative to our own folder.

        A path beside a repository on the Hub leads nowhere: a `ValueError`, or `None` if it is not `required`.
        A base in a subfolder of our own repository on the Hub is downloaded, and loaded from there as from a folder.
        """
        name = config.base_model_name_or_path
        if name is None or not is_path(name):
            return name
        if os.path.isabs(name):  # once loaded
            return name
        if not os.path.isdir(self.path):
            if is_inner_folder(name):
                revision = self.hub_kwargs.get("revision")
                whole = snapshot_download(
                    self.path, revision=revision, allow_patterns=f"{name[2:]}/*", **self.access()
                )
                return os.path.join(whole, name[2:])
            if not required:
                return None
            raise WrongBaseError(f"{self.path} names its base by a path on another computer, {name!r}.", GIVE_BASE)
        folder = os.path.join(os.path.realpath(self.path), self.hub_kwargs.get("subfolder", ""))
        return os.path.normpath(os.path.join(folder, name))


def hub_commit(
    name: str, revision: str | None, *, newest: bool = False, local_files_only: bool = False, **hub_kwargs: Any
) -> str | None:
    """The commit that a revision of a Hub id points to; `None` if it cannot be found.

    That is the one in the cache, if there is one; with `newest` the Hub is asked first. (Older versions of
    transformers and huggingface_hub have no `resolve_revision`.)
    """
    hub_kwargs.pop("force_download", None)
    for only_cached in [True] if local_files_only else [False] if newest else [True, False]:
        try:
            path = cached_file(name, CONFIG_NAME, revision=revision, local_files_only=only_cached, **hub_kwargs)
        except (OSError, ValueError) as error:
            logger.debug("No commit of %s: %s", name, error)
        else:
            return extract_commit_hash(path, None)
    return None


@dataclass
class Provenance:
    """Where a GenieBlue came from: what a save writes again although it is not in memory.

    Attributes:
        source: the load that made it; `None` for a new one.
        access: `token`, `cache_dir` and `local_files_only`, with which the base's files are found again.
        base_samples: the recorded sample of the base's values.
        files: stored files that a save copies as they are, by their place in the folder.
        training_recipe: `{stage: {setting: value}}` of what was trained in this process, and before.
    """

    source: LoadRequest | None = None
    access: dict[str, Any] = field(default_factory=dict, repr=False)
    base_samples: dict[str, dict] = field(default_factory=dict, repr=False)
    files: dict[str, Path] = field(default_factory=dict)
    training_recipe: dict[str, dict[str, Any]] | None = None

    def facts(self, names: Iterable[str]) -> dict[str, Any]:
        """Content by name of JSON files that lay in the loaded folder; one that is gone or damaged is left out."""
        facts = {}
        for name in names:
            if self.source is None:
                break
            try:
                path = self.source.find(name)
                if path is not None:
                    facts[name] = json.loads(Path(path).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                logger.warning("%s of %s is no longer available: %s", name, self.source.path, error)
        if self.training_recipe is not None and RECIPE_NAME in names:
            facts[RECIPE_NAME] = self.training_recipe
        return facts


def _split_device_map(device_map: Any) -> tuple[Any, Any]:
    """Device maps of our own modules and of the base; a dictionary is split by module name."""
    if not isinstance(device_map, dict) or "" in device_map:
        return device_map, device_map
    prefix = "language_model."
    own = {name: device for name, device in device_map.items() if not f"{name}.".startswith(prefix)}
    base = {
        name.removeprefix("language_model").removeprefix("."): device
        for name, device in device_map.items()
        if f"{name}.".startswith(prefix)
    }
    return own, base or None
