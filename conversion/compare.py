"""Compares two saved GenieBlues: settings, what makes their requests, and every tensor that they add to a base."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from hub_cards.model_folder import adapter_weights, check_is_genieblue
from modeling_genieblue.model_files_genieblue import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    OWN_MODULES,
    PROCESSOR_CONFIGS,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_FILES,
    VLM_FOLDER,
    VLM_MODULES,
    ModelFiles,
    file_sha256,
    read_settings,
    weight_files,
)

# Settings that say how or by what a folder was written, and not what its model computes.
OTHER_SETTINGS = ("_name_or_path", "architectures", "auto_map", "transformers_version", "weight_fingerprint")
# What makes a request of texts and images, and runs it: processor, tokenizer, templates, generation, code.
OTHER_FILES = (
    GENERATION_CONFIG_NAME, *PROCESSOR_CONFIGS, *TOKENIZER_FILES, "additional_chat_templates/*", "*.py",
    f"{VLM_FOLDER}/*", f"{VLM_FOLDER}/additional_chat_templates/*",
)  # fmt: skip
# Those of them, in any folder, that are compared setting by setting.
SETTINGS_FILES = (GENERATION_CONFIG_NAME, *PROCESSOR_CONFIGS, TOKENIZER_CONFIG_NAME)
CHANGED, ONLY_FIRST, ONLY_SECOND = "changed", "only in the first", "only in the second"
OTHER_SHAPE, OTHER_DTYPE = "other shape", "other dtype"


@dataclass(frozen=True)
class TensorDifference:
    """A tensor in which two GenieBlues differ.

    Attributes:
        how: `changed`, `other shape`, `other dtype`, `only in the first` or `only in the second`.
        difference: L2 norm of the difference, relative to the first one's; for `changed`, and for `other dtype` if
            both are of floating-point numbers.
    """

    part: str
    name: str
    how: str
    difference: float | None


@dataclass(frozen=True)
class FileDifference:
    """A file besides `config.json` and weights in which two GenieBlues differ.

    Attributes:
        how: `changed`, `only in the first` or `only in the second`.
        settings: those that differ, with both values; empty for a file that is no list of settings.
    """

    name: str
    how: str
    settings: dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Comparison:
    """Settings of `config.json` that differ, with both values; other files and tensors that differ; and how many
    tensors each part has."""

    settings: dict[str, tuple[Any, Any]]
    files: list[FileDifference]
    tensors: list[TensorDifference]
    counts: dict[str, int]

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not self.settings and not self.files and not self.tensors


def compare_models(
    first: str, second: str, *, revisions: tuple[str | None, str | None] = (None, None), **hub: Any
) -> Comparison:
    """Compares two GenieBlues (folder or Hub id), 16-bit or quantized, tensor by tensor, without loading them.

    Args:
        revisions: branch, tag or commit of each on the Hub.
        hub: keyword arguments of huggingface_hub, such as `token`.

    Raises `OSError` for missing or damaged files, `ValueError` for another kind of model.
    """
    models = [_SavedTensors(name, revision, hub) for name, revision in zip((first, second), revisions, strict=True)]
    files = [_other_files(name, revision, hub) for name, revision in zip((first, second), revisions, strict=True)]
    places = sorted({*files[0], *files[1]})
    changed = [change for place in places if (change := _compare_file(place, *files)) is not None]
    with models[0], models[1]:
        names = sorted({*models[0].places, *models[1].places})
        differences = [difference for name in names if (difference := _compare(name, *models)) is not None]
    counts: dict[str, int] = {}
    for name in names:
        counts[_part(name)] = counts.get(_part(name), 0) + 1
    return Comparison(_differing(*(model.config for model in models)), changed, differences, counts)


def _other_files(name: str, revision: str | None, hub: Mapping[str, Any]) -> dict[str, Path]:
    """Path by place of the files of a GenieBlue that `OTHER_FILES` names."""
    if Path(name).is_dir():
        folder = Path(name)
    else:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(OTHER_FILES), **hub))
    paths = [path for pattern in OTHER_FILES for path in folder.glob(pattern) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _compare_file(name: str, first: Mapping[str, Path], second: Mapping[str, Path]) -> FileDifference | None:
    if name not in first or name not in second:
        return FileDifference(name, ONLY_FIRST if name in first else ONLY_SECOND, {})
    paths = first[name], second[name]
    if Path(name).name in SETTINGS_FILES:
        settings = _differing(*(read_settings(path) for path in paths))
        return FileDifference(name, CHANGED, settings) if settings else None
    is_equal = file_sha256(paths[0]) == file_sha256(paths[1])
    return None if is_equal else FileDifference(name, CHANGED, {})


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings in which two files differ, by dotted name, with both values; `None` where there is none."""
    one, other = _flat(first), _flat(second)
    names = sorted({*one, *other})
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


class _SavedTensors:
    """The own tensors of a saved GenieBlue, read one by one; a context that keeps its files open."""

    def __init__(self, name: str, revision: str | None, hub: Mapping[str, Any]):
        files = ModelFiles(name, revision=revision, **hub)
        path = files.find(CONFIG_NAME)
        if path is None:
            raise FileNotFoundError(f"{name} has no {CONFIG_NAME}: give a folder or Hub id of a GenieBlue.")
        self.config = check_is_genieblue(read_settings(path), path)
        self.paths: list[Path] = list(weight_files(files.find).values())
        adapter = adapter_weights(self.config)
        if (found := files.find(adapter)) is None or not self.paths:
            raise FileNotFoundError(f"{name} has no {adapter if found is None else 'weights'}: it is incomplete.")
        self.paths.append(found)
        self.places: dict[str, Any] = {}

    def __enter__(self) -> "_SavedTensors":
        self._stack = ExitStack()
        for path in self.paths:
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise OSError(f"{path} cannot be read ({error}): it is damaged; fetch it again.") from error
            self.places |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *_error: Any) -> None:
        self._stack.close()

    def read(self, name: str) -> torch.Tensor | None:
        """A tensor by name, if there is one."""
        return self.places[name].get_tensor(name) if name in self.places else None


def _compare(name: str, first: _SavedTensors, second: _SavedTensors) -> TensorDifference | None:
    one, other = first.read(name), second.read(name)
    if one is None or other is None:
        return TensorDifference(_part(name), name, ONLY_SECOND if one is None else ONLY_FIRST, None)
    if one.shape != other.shape:
        return TensorDifference(_part(name), name, OTHER_SHAPE, None)
    if one.dtype != other.dtype:
        are_floats = one.is_floating_point() and other.is_floating_point()
        return TensorDifference(_part(name), name, OTHER_DTYPE, _relative(one, other) if are_floats else None)
    if torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):  # NaN equals itself, too
        return None
    return TensorDifference(_part(name), name, CHANGED, _relative(one, other))


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.double(), other.double()
    return float((other - one).norm() / one.norm().clamp(min=1e-30))


def _part(name: str) -> str:
    first = name.partition(".")[0]
    if first in (*OWN_MODULES, *VLM_MODULES):
        return first
    return "lora" if ".lora_" in name else "replicated_blocks"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, without those that say nothing of the model."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if name in OTHER_SETTINGS:
            continue
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.loads(json.dumps(value))
    return flat
