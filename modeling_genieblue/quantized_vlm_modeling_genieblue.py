"""A GenieBlue with a VLM whose language model is quantized; all else of the VLM is as it was."""

from typing import Any

import torch

from .loading_genieblue import LoadRequest
from .quantized_base_genieblue import check_options
from .quantized_linears_genieblue import FrozenLinear
from .quantized_modeling_genieblue import QuantizedGenieBlueForConditionalGeneration, check_is_quantized
from .quantized_precision_guard_genieblue import is_frozen
from .quantized_vlm_configuration_genieblue import QuantizedVlmGenieBlueConfig
from .vlm_loading_genieblue import load_vlm_parts
from .vlm_modeling_genieblue import VlmGenieBlueForConditionalGeneration


class QuantizedVlmGenieBlueForConditionalGeneration(
    VlmGenieBlueForConditionalGeneration, QuantizedGenieBlueForConditionalGeneration
):
    """A GenieBlue with a VLM, on a quantized base, with copies and LoRA of 4 or 8 bits; made by `genieblue quantize`.

    The VLM's vision side and connector, and its own norms, biases and rows of embedding and head, have 16 bits.
    """

    config_class = QuantizedVlmGenieBlueConfig

    @classmethod
    def _load_own_weights(cls, request: LoadRequest, model_args: tuple, base_model: Any) -> tuple[Any, dict]:
        check_is_quantized(request)
        check_options({name: value for name, value in request.own_kwargs.items() if name != "config"})
        return load_vlm_parts(cls, request, base_model)

    def _join(self) -> None:
        """Makes the VLM's language model of the multimodal view, whose adapter is filled now."""
        # Both views have the same modules of quantized weights, so one with a bias of the VLM's own must be another.
        view = self.multimodal_language_model
        for name, _ in self.own_language.tensors.named_parameters():
            owner = name.rpartition(".")[0]
            path = f"{owner}.base_layer" if hasattr(view.get_submodule(owner), "base_layer") else owner
            linear: Any = view.get_submodule(path)
            if is_frozen(linear):
                twin = FrozenLinear(linear.weight, linear.bias, linear.weight_qtype.name)
                twin.weight = linear.weight  # the object itself, not one over the same memory
                view.set_submodule(path, twin)
        super()._join()

    def _check_save(self, dtype: torch.dtype | None) -> torch.dtype:
        return QuantizedGenieBlueForConditionalGeneration._check_save(self, dtype)


QuantizedVlmGenieBlueForConditionalGeneration.register_for_auto_class("AutoModel")
