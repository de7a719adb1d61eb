"""The two views of one language model: the base itself, and a second module tree over the same parameters.

The text view is the base itself. The multimodal view is a second tree of the same architecture that uses the base's
own `Parameter` objects, with trained copies in place of the replicated blocks and LoRA on the linear layers of all
others. The trained parameters are saved as a stock PEFT adapter.
"""

import copy
import threading
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .frozen_view_genieblue import guard_view
from .language_adapter_genieblue import ADAPTER, find_blocks

try:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
except ImportError:  # Without a try transformers would import peft before `require_peft` can check it.
    raise


def build_multimodal_view(base: PreTrainedModel, lora_config: LoraConfig) -> PreTrainedModel:
    """A second tree over the base's parameters, with the adapter's own parameters still on the meta device.

    The base is not changed, except that its parameters are frozen (`requires_grad=False`). Both trees have its
    generation configuration and its loss. The view has its own configuration, so that changes to it (such as another
    attention implementation) do not affect the base.
    """
    # `deepcopy` returns what `memo` has for an object's id. Mapping tensors to themselves copies only the modules, so
    # the second tree takes no memory for weights and sees every change to them, such as a move to another device.
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    # Left by an earlier `generate`, and bound to the base: a copy would run the base instead of the view.
    left = [name for name in ("_compiled_call", "_cached_continuous_batching_manager") if name in vars(base)]
    memo |= {id(vars(base)[name]): name for name in left}
    view = copy.deepcopy(base, memo)
    for name in left:
        delattr(view, name)
    path, blocks = find_blocks(view)
    replicated = [int(name.rsplit(".", 1)[-1]) for name in lora_config.modules_to_save or ()]
    shared = {index: blocks[index] for index in replicated}
    # PEFT deep-copies every module in `modules_to_save`. Give it skeletons on the meta device, so that the copies take
    # no memory before the saved weights are loaded; the base's own blocks are put back below.
    for index, block in shared.items():
        blocks[index] = _meta_skeleton(block)
    try:
        inject_adapter_in_model(lora_config, view, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    except (AttributeError, ValueError) as error:
        raise _unsupported(base, f"PEFT refuses its blocks, {str(error).split('. ')[0]}") from error
    copied = tuple(f"{path}.{index}." for index in replicated)
    if any(name.startswith(copied) and isinstance(module, BaseTunerLayer) for name, module in view.named_modules()):
        raise _unsupported(base, "lists within its blocks are taken for the blocks themselves")
    for index, block in shared.items():
        wrapper = blocks[index]
        if not isinstance(wrapper, ModulesToSaveWrapper):
            raise ValueError(f"PEFT did not wrap block {index} of {type(base).__name__} at {path}.{index}.")
        wrapper.original_module = block
    base.requires_grad_(False)
    guard_view(view, base)
    return view


def _unsupported(base: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"{type(base).__name__} is not a decoder that GenieBlue can adapt: {reason}. Expected a Llama-style decoder, "
        "whose blocks are attention and an MLP of `nn.Linear` layers."
    )


def _meta_skeleton(block: nn.Module) -> nn.Module:
    """`block` with parameters on the meta device; quantized linear layers become plain ones, to hold a copy."""
    memo = {id(buffer): buffer for buffer in block.buffers()}
    for parameter in block.parameters():
        memo[id(parameter)] = (
            nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=False)
            if parameter.is_floating_point()
            else parameter
        )
    skeleton = copy.deepcopy(block, memo)
    for name, module in list(skeleton.named_modules()):
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            skeleton.set_submodule(name, plain.requires_grad_(False))
    return skeleton


class _FirstBlockReached(Exception):
    """Carries the input of a decoder's first block."""

    def __init__(self, hidden_states: torch.Tensor):
        self.hidden_states = hidden_states


class TextEmbedder:
    """Embeds token ids as the model does, so that running it on `inputs_embeds` gives the same result.

    Most decoders feed their blocks the plain embedding rows, or transform ids and embeddings alike. Some (BlueLM: a
    LayerNorm) transform the rows only if they are given ids; for these, the input of the first block must be passed
    instead. To find out which kind a model is, it is run up to its first block.
    """

    def __init__(self, view: PreTrainedModel):
        path, _ = find_blocks(view)
        self._view = view
        self._first_block = f"{path}.0"
        self._from_first_block: bool | None = None

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids (batch, length) → embeddings (batch, length, hidden_size)."""
        if self._from_first_block is None:
            self._from_first_block = self._needs_first_block()
        if self._from_first_block:
            return self._first_block_input(input_ids=input_ids)
        return self._view.get_input_embeddings()(input_ids)

    @torch.no_grad()
    def _needs_first_block(self) -> bool:
        embedding: Any = self._view.get_input_embeddings()
        ids = torch.arange(min(8, embedding.weight.shape[0]), device=embedding.weight.device)[None]
        was_training = self._view.training
        self._view.eval()  # dropout would spoil the comparison
        try:
            from_ids = self._first_block_input(input_ids=ids)
            rows = embedding(ids)
            if torch.equal(self._first_block_input(inputs_embeds=rows), from_ids):
                return False
            if torch.equal(self._first_block_input(inputs_embeds=from_ids), from_ids):
                return True
        finally:
            self._view.train(was_training)
        raise ValueError(
            f"{type(self._view).__name__} treats `inputs_embeds` differently from `input_ids`, so image features "
            "cannot be placed among its embeddings: use another base."
        )

    def _first_block_input(self, **inputs: torch.Tensor) -> torch.Tensor:
        thread = threading.get_ident()

        def stop(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            if threading.get_ident() == thread:  # do not stop a request that runs in another thread
                raise _FirstBlockReached(args[0] if args else kwargs["hidden_states"])

        handle = self._view.get_submodule(self._first_block).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._view(**inputs, use_cache=False)
        except _FirstBlockReached as reached:
            return reached.hidden_states
        finally:
            handle.remove()
        raise ValueError(f"{type(self._view).__name__} never ran its first block.")
