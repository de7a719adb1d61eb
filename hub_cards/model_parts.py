"""Parameters and bytes of each part of a GenieBlue, read from file headers only."""

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, SafetensorsParsingError

from hub_cards.model_folder import (
    PartSize,
    adapter_weights,
    as_parameters,
    check_is_genieblue,
    own_weight_files,
    parameter_sizes,
    shown_precisions,
    stored_size,
    sum_by_part,
)
from modeling_genieblue.model_files_genieblue import (
    CONFIG_NAME,
    VLM_MODULES,
    ModelFiles,
    is_inner_folder,
    own_modules,
    read_settings,
)

logger = logging.getLogger(__name__)

LANGUAGE_MODEL = "language_model"
ADAPTER_PARTS = ("replicated_blocks", "lora")


@dataclass(frozen=True)
class ModelInfo:
    """The configuration of a GenieBlue, and the size of each of its parts.

    The part `language_model` is the base, whose files are in its own repository; `None` if it cannot be found.
    """

    config: dict[str, Any]
    parts: dict[str, PartSize | None]

    @property
    def precisions(self) -> dict[str, str]:
        """Precision by part of a quantized GenieBlue, else empty; the base has the precision of its blocks."""
        quantization = self.config.get("quantization")
        if quantization is None:
            return {}
        shown = shown_precisions(quantization)
        shown = {LANGUAGE_MODEL: shown["llm"], **dict.fromkeys(VLM_MODULES, "w16a16"), **shown}
        return {name: shown[name] for name in self.parts}

    def as_json(self) -> dict[str, Any]:
        """`{"parts": {name: {"parameters": int, "bytes": int}}}`; both are `None` for an unknown part.

        Parts of a quantized GenieBlue also have a `precision`.
        """
        unknown = {"parameters": None, "bytes": None}
        parts = {name: unknown if size is None else asdict(size) for name, size in self.parts.items()}
        for name, precision in self.precisions.items():
            parts[name] = {"precision": precision, **parts[name]}
        return {"parts": parts}


def model_info(
    model: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> ModelInfo:
    """Sizes of the parts of a saved GenieBlue (folder or Hub id), without reading or downloading weights.

    `base` overrides the recorded base. Raises `OSError` or `ValueError` if `model` is not a GenieBlue, or its files
    are missing or damaged.
    """
    files = _Files(model, revision=revision, token=token, cache_dir=cache_dir)
    config_path = files.find(CONFIG_NAME, must_answer=True)
    if config_path is None:
        raise FileNotFoundError(f"{model} has no {CONFIG_NAME}: give the folder of a saved GenieBlue, or a Hub id.")
    config = check_is_genieblue(read_settings(config_path), model)
    for name, kind in (("text_config", dict), ("base_model_name_or_path", str)):
        if not isinstance(config.get(name), kind | None):
            raise OSError(f"{config_path} has {config[name]!r} for {name}: it is damaged; fetch it again.")

    own = map(files.tensor_sizes, own_weight_files(files.name, files.locate))
    parts: dict[str, PartSize | None] = dict.fromkeys((LANGUAGE_MODEL, *own_modules(config), *ADAPTER_PARTS))
    if config.get("vlm_config") is not None:  # one whose blocks are all copied has no LoRA
        parts = dict.fromkeys(parts, PartSize())
    parts |= sum_by_part(own, files.tensor_sizes(adapter_weights(config)))
    parts[LANGUAGE_MODEL] = _base_size(files, config, None if base is None else os.fspath(base))
    return ModelInfo(config, parts)


def _base_size(files: "_Files", config: dict[str, Any], base: str | None) -> PartSize | None:
    name, revision = base or config.get("base_model_name_or_path"), config.get("base_model_revision")
    if name is None:
        logger.warning("The model does not record its base, so the base's size is unknown.")
        return None
    subfolder = ""
    if base is None and files.folder is None and is_inner_folder(name):
        name, revision, subfolder = files.name, files.hub.get("revision"), name[2:]
    elif base is None and name.startswith("."):  # relative to the model's own folder
        name = os.path.normpath(os.path.join(os.path.realpath(files.name), name))
    try:
        hub = files.hub | {"revision": None if base is not None else revision}
        base_files = _Files(name, subfolder=subfolder, **hub)
        weights = own_weight_files(base_files.name, base_files.locate)
        sizes = [size for file in weights for size in base_files.tensor_sizes(file).values()]
    except (OSError, ValueError, EntryNotFoundError) as error:
        logger.warning("The base's size is unknown: %s", " ".join(str(error).split()))
        return None
    return sum(sizes, PartSize())


class _Files(ModelFiles):
    """Files of a model in a folder or on the Hub; large ones are not downloaded."""

    def locate(self, file: str) -> Path | None:
        """Like `find`; for weights on the Hub, a placeholder path if they exist."""
        if self.folder is not None or not file.endswith(".safetensors"):
            return self.find(file)
        api, revision = HfApi(token=self.hub.get("token")), self.hub.get("revision")
        is_there = self.cached(file) is not None or api.file_exists(self.name, self.place(file), revision=revision)
        return Path(file) if is_there else None

    def tensor_sizes(self, file: str) -> dict[str, PartSize]:
        """Size of each tensor in a safetensors file, from its header; `OSError` if it is missing or damaged."""
        path = self.cached(file)
        if path is not None:
            return parameter_sizes(path)
        if self.folder is not None:
            raise FileNotFoundError(f"{self.folder} has no {file}: save or download the model again.")
        try:
            api, revision = HfApi(token=self.hub.get("token")), self.hub.get("revision")
            metadata = api.parse_safetensors_file_metadata(self.name, self.place(file), revision=revision)
        except (EntryNotFoundError, SafetensorsParsingError) as error:
            raise OSError(f"The header of {file} in {self.name} cannot be read: {error}") from error
        return {name: as_parameters(name, stored_size(tensor)) for name, tensor in metadata.tensors.items()}
