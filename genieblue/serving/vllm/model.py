"""GenieBlue as a model of vLLM: one engine, the base's weights once, each request in its own view."""

import glob
from collections.abc import Iterable
from typing import Any

from genieblue.serving.vllm.plugin import require_supported_vllm

require_supported_vllm()

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal
from vllm.model_executor.models.siglip import SiglipVisionTransformer
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from genieblue.serving.vllm.adapter import LanguageAdapter
from genieblue.serving.vllm.processing import (
    GenieBlueDummyInputs,
    GenieBlueMultiModalProcessor,
    GenieBlueProcessingInfo,
)
from genieblue.serving.vllm.views import MARK, Rows
from modeling_genieblue.model_files_genieblue import ADAPTER_FOLDER, ADAPTER_WEIGHTS_NAME, WEIGHTS_NAME
from modeling_genieblue.projector_genieblue import GenieBlueMultiModalProjector


@MULTIMODAL_REGISTRY.register_processor(
    GenieBlueMultiModalProcessor, info=GenieBlueProcessingInfo, dummy_inputs=GenieBlueDummyInputs
)
class GenieBlueForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsMRoPE):
    """The base as vLLM runs it alone, and a second module tree over its weights for passes with images.

    Which view a token runs is told by its position: those of a request with images are moved by `MARK`. vLLM keeps the
    positions of a request through prefill in pieces, decoding and preemption.
    """

    allow_patterns_overrides = [WEIGHTS_NAME]

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Never in a prompt: the renderer writes image tokens itself."""
        return None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        self.config = config = model_config.hf_config
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_tower = SiglipVisionTransformer(
                config.vision_config, None, prefix=maybe_prefix(prefix, "vision_tower"), use_head=False
            )
            self.multi_modal_projector = GenieBlueMultiModalProjector(config)
        with self._mark_language_model(vllm_config):
            # Its modules have the base's own names, by which the settings of a quantized base tell them apart.
            self.language_model = init_vllm_registered_model(vllm_config=vllm_config, hf_config=config.text_config)
        self._rows = Rows()
        self._is_measured = False
        self._adapter = LanguageAdapter(vllm_config, self.language_model, self._rows)
        self.multimodal_language_model = self._adapter.tree
        self.secondary_weights = [
            # The files that were checked; of several patterns in one source vLLM takes the first that matches.
            *(
                DefaultModelLoader.Source(
                    config.base_model_name_or_path,
                    config.base_model_revision,
                    prefix="language_model.",
                    allow_patterns_overrides=[glob.escape(name)],
                )
                for name in config.base_weight_files
            ),
            DefaultModelLoader.Source(
                model_config.model,
                model_config.revision,
                subfolder=ADAPTER_FOLDER,
                prefix="adapter.",
                allow_patterns_overrides=[ADAPTER_WEIGHTS_NAME],
            ),
        ]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list) -> tuple[torch.Tensor, int]:
        """Positions of one request, (3, tokens), and what is added to those of the tokens that it generates."""
        return self._rows.positions_of_request(len(input_tokens), bool(mm_features))

    def embed_multimodal(self, pixel_values: torch.Tensor | None = None, num_tiles: Any = None, **_: Any) -> Any:
        """Tokens of each image, (tiles * image_seq_length, hidden_size)."""
        if pixel_values is None:
            return []
        features = self.vision_tower(pixel_values.to(self.vision_tower.dtype))
        tokens = self.multi_modal_projector(features).flatten(0, 1)
        return tokens.split([int(count) * self.config.image_seq_length for count in num_tiles.flatten().tolist()])

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Hidden states, (tokens, hidden_size); a pass of texts alone is the base's own."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("A CUDA graph of a whole pass would replay one view for all: use piecewise graphs.")
        positions = positions[0] if positions.ndim == 2 else positions  # the three rows are the same
        inputs = {"input_ids": input_ids, "intermediate_tensors": intermediate_tensors, "inputs_embeds": inputs_embeds}
        if not self._is_measured and get_forward_context().attn_metadata is None:
            # vLLM measures how much memory a pass takes: one of both views takes the most.
            self._is_measured = True
            odd = torch.arange(len(positions), device=positions.device) % 2
            self._run(*self._rows.read_marks(positions + odd * MARK), inputs)
        return self._run(*self._rows.read(positions), inputs)

    def _run(self, positions: torch.Tensor, is_multimodal: bool, inputs: dict[str, Any]) -> torch.Tensor:
        model = self.multimodal_language_model if is_multimodal else self.language_model.model
        return model(positions=positions, **inputs)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The base's head, for both views."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fills everything from tensors that come one by one; only the adapter's are kept for a while.

        That none is missing was checked before, as vLLM does not miss the weights of a linear.
        """
        adapter: dict[str, torch.Tensor] = {}

        def others() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name.startswith("adapter."):
                    adapter[name.removeprefix("adapter.")] = tensor
                else:
                    yield name, tensor

        loaded = AutoWeightsLoader(self).load_weights(others())
        self._adapter.load(adapter)
        return loaded | {name for name, _ in self.named_parameters() if name.startswith("multimodal_language_model.")}
