"""A GenieBlue with quantized weights: loaded from codes, and saved by copying files."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .as_built_genieblue import AsBuilt
from .base_loading_genieblue import BASE_LOADERS, check_identity
from .language_adapter_genieblue import adapter_parameters
from .loading_genieblue import LoadRequest
from .model_files_genieblue import CONFIG_NAME, MEASUREMENTS_NAME, RECIPE_NAME, read_settings
from .modeling_genieblue import GenieBlueForConditionalGeneration
from .quantized_base_genieblue import load_quantized_base
from .quantized_configuration_genieblue import QuantizedGenieBlueConfig
from .quantized_parts_genieblue import (
    check_base_is_quantized,
    has_quantized_base,
    load_quantized_adapter,
    load_quantized_parts,
    quantized_values,
    stored_files,
)
from .quantized_precision_guard_genieblue import PrecisionGuard
from .quantized_settings_genieblue import QUANT_METHOD

PREFIX = "quantized_"  # of the files that a repository names if its weights are quantized
BASE_LOADERS[QUANT_METHOD] = load_quantized_base


class QuantizedGenieBlueForConditionalGeneration(PrecisionGuard, GenieBlueForConditionalGeneration):
    """A GenieBlue with weights of 4 or 8 bits, on a base that is quantized or not; made by `genieblue quantize`.

    The weights are neither trained nor cast: what is saved is the files that were loaded.
    """

    config_class = QuantizedGenieBlueConfig
    _kept_facts = (RECIPE_NAME, MEASUREMENTS_NAME)  # what was measured holds as long as the weights are the same

    @classmethod
    def of_rounded(
        cls,
        model: GenieBlueForConditionalGeneration,
        quantization: dict[str, Any],
        files: dict[str, Path],
        base_samples: dict[str, dict] | None,
    ) -> "QuantizedGenieBlueForConditionalGeneration":
        """`model`, whose weights were rounded, as what is saved with `files` in their place; it is changed.

        Args:
            quantization: see `QuantizedGenieBlueConfig`.
            files: the weights, and the base if it lies inside, by their places in the folder of the new model.
            base_samples: `tensor_samples` of a base that takes the place of the model's own.
        """
        settings = {name: value for name, value in model.config.to_dict().items() if name != "auto_map"}
        settings["quantization"] = quantization
        model.config = QuantizedGenieBlueConfig.from_dict(settings)
        model.__class__ = cls._class_for(settings)
        model.provenance.files = files
        if base_samples is not None:
            model.provenance.base_samples = base_samples
        model._as_built = AsBuilt(model)
        quantized: Any = model.requires_grad_(False)
        return quantized

    @classmethod
    def _load_own_weights(cls, request: LoadRequest, model_args: tuple, base_model: Any) -> tuple[Any, dict]:
        check_is_quantized(request)
        return load_quantized_parts(cls, request, base_model)

    def _check_base(self, base: PreTrainedModel, request: LoadRequest, samples: dict[str, dict] | None) -> None:
        check_base_is_quantized(base, self.config, request.path)
        if samples is not None:
            values = quantized_values(base) if has_quantized_base(self.config) else None
            check_identity(base, self.config, samples, request, values)

    def _load_adapter(self, request: LoadRequest) -> None:
        load_quantized_adapter(self.multimodal_language_model, request, self.language_model.dtype)
        self.provenance.files = stored_files(request, self.config)

    def _check_save(self, dtype: torch.dtype | None) -> torch.dtype:
        own = getattr(torch, self.config.quantization["activations"])
        if dtype not in (None, own):
            raise ValueError(
                f"This GenieBlue is quantized for {self.config.quantization['activations']} and cannot be saved in "
                f"{dtype}: quantize the 16-bit one again."
            )
        if any(value.requires_grad for _, _, value in adapter_parameters(self.multimodal_language_model)):
            raise ValueError("A quantized GenieBlue is saved from its files, so training is lost: train in 16 bits.")
        return own

    def _write_weights(
        self, folder: Path, dtype: torch.dtype, state: Mapping[str, torch.Tensor], is_checkpoint: bool
    ) -> None:
        for place, source in self.provenance.files.items():  # what is in memory is packed for a kernel
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / place)


def check_is_quantized(request: LoadRequest) -> None:
    """`ValueError` for a folder that is not quantized, or in another form, and for a `quantization_config` on top."""
    settings = read_settings(request.file(CONFIG_NAME))
    if settings.get("quantization") is None:
        raise ValueError(f"{request.path} is not quantized: load it by GenieBlueForConditionalGeneration.")
    if not (settings.get("auto_map") or {}).get("AutoModel", "").rpartition("--")[2].startswith(PREFIX):
        raise ValueError(
            f"{request.path} was quantized by an earlier version of GenieBlue, whose files can no longer be read: "
            "quantize the 16-bit GenieBlue again (`genieblue quantize`)."
        )
    if request.base_kwargs.get("quantization_config") is not None:
        raise ValueError(
            f"{request.path} is already quantized; `quantization_config` would quantize it again. Leave it out, or "
            "load the unquantized model."
        )


QuantizedGenieBlueForConditionalGeneration.register_for_auto_class("AutoModel")
