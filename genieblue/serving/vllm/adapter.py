"""The trained language side in vLLM: copies of the replicated blocks and LoRA, from a stock adapter."""

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.utils import init_vllm_registered_model

from genieblue.serving.vllm.views import CopiedModule, LoraLinear, Rows, second_tree
from modeling_genieblue.language_adapter_genieblue import PEFT_PREFIX
from modeling_genieblue.model_files_genieblue import some


class LanguageAdapter:
    """Builds the second module tree of a language model, whose adapter `load` fills.

    Attributes:
        tree: shares every module of the language model that the adapter does not change.
    """

    def __init__(self, vllm_config: VllmConfig, language_model: Any, rows: Rows):
        self.config = vllm_config.model_config.hf_config
        self._packed = language_model.packed_modules_mapping
        self._replicated: list[int] = sorted(self.config.replicated_layers)
        self._copies: Any = self._copied_blocks(vllm_config)
        self._lora: dict[str, LoraLinear] = {}
        self._rows = rows
        self.tree: Any = second_tree(language_model.model, self._substitute)
        # Passes of one view only have a graph of their own; a mixed one takes rows apart by their view.
        self.tree.do_not_compile = True

    def _copied_blocks(self, vllm_config: VllmConfig) -> nn.Module:
        """A model of the replicated blocks alone, from vLLM's own class, which knows how to fill it."""
        text_config = copy.deepcopy(self.config.text_config)
        text_config.num_hidden_layers, text_config.vocab_size = len(self._replicated), 64
        if getattr(text_config, "layer_types", None):
            text_config.layer_types = [text_config.layer_types[index] for index in self._replicated]
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(text_config, name, None)
        layers = vllm_config.compilation_config.static_forward_context
        known = set(layers)
        copies = init_vllm_registered_model(
            vllm_config=_unquantized(vllm_config), hf_config=text_config, prefix="genieblue_copies"
        )
        for name in set(layers) - known:  # attention of the copies, which use that of the originals: one KV cache
            del layers[name]
        return copies

    def _substitute(self, path: str, module: nn.Module) -> nn.Module | None:
        """What stands in the second tree for a module of the first; `None` for a container, or the same."""
        found = re.fullmatch(r"layers\.(\d+)\.(.+)", path)
        if found is None or isinstance(module, AttentionLayerBase) or not list(module.parameters(recurse=False)):
            return None  # attention, which on a quantized base has scales of its own, is one for all rows
        index, name = int(found[1]), found[2]
        if index in self._replicated:
            block = self._copies.model.layers[self._replicated.index(index)]
            return CopiedModule(module, block.get_submodule(name), self._rows)
        if not isinstance(module, LinearBase):
            return None
        rank, parts = self.config.lora_rank, len(self._parts(path))
        is_row = isinstance(module, RowParallelLinear)
        inputs = module.input_size_per_partition if is_row else module.input_size
        outputs = sum(_part_sizes(module))
        options: dict[str, Any] = {"dtype": module.params_dtype, "device": next(module.parameters()).device}
        lora_a, lora_b = torch.zeros(rank * parts, inputs, **options), torch.zeros(outputs, rank * parts, **options)
        reduce = tensor_model_parallel_all_reduce if is_row and module.tp_size > 1 else None
        self._lora[path] = LoraLinear(module, lora_a, lora_b, self._rows, reduce)
        return self._lora[path]

    def _parts(self, path: str) -> list[str]:
        """Paths of the linears of the base that vLLM runs as the one at `path` (q, k and v, say)."""
        parent, _, name = path.rpartition(".")
        return [f"{parent}.{part}" for part in self._packed.get(name, [name])]

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fills copies and LoRA from the tensors of a stock PEFT file, which `check_own_weights` has seen.

        `ValueError` if vLLM's model has no place for one of them.
        """
        tensors = {name.removeprefix(f"{PEFT_PREFIX}model."): tensor for name, tensor in tensors.items()}
        copied = {name: tensors.pop(name) for name in list(tensors) if ".lora_" not in name}
        self._load_copies(copied)
        for path, module in self._lora.items():
            self._load_lora(path, module, tensors)
        if tensors:
            raise _wrong_adapter(f"has unexpected {some(sorted(tensors))}")

    def _load_copies(self, tensors: dict[str, torch.Tensor]) -> None:
        def renamed() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in tensors.items():
                _, index, inner_name = name.split(".", 2)
                yield f"model.layers.{self._replicated.index(int(index))}.{inner_name}", tensor

        expected = {name for name, _ in self._copies.named_parameters() if ".layers." in name}
        loaded = set(self._copies.load_weights(renamed()))
        if missing := expected - loaded:
            raise _wrong_adapter(f"lacks {some(sorted(missing))}")
        self._copies = None  # its blocks' modules are in the tree

    def _load_lora(self, path: str, module: LoraLinear, tensors: dict[str, torch.Tensor]) -> None:
        linear: Any = module.original
        rank, scale = self.config.lora_rank, self.config.lora_alpha / self.config.lora_rank
        parts = self._parts(path)
        down = torch.cat([tensors.pop(f"{part}.lora_A.weight") for part in parts])
        if isinstance(linear, RowParallelLinear):
            width = linear.input_size_per_partition
            down = down[:, linear.tp_rank * width : (linear.tp_rank + 1) * width]
        _fill(module.lora_a.data, down, path)
        row = 0
        for place, (part, size) in enumerate(zip(parts, _part_sizes(linear), strict=True)):
            up = tensors.pop(f"{part}.lora_B.weight")
            if size < len(up):
                is_key_or_value = isinstance(linear, QKVParallelLinear) and place > 0
                shard = linear.tp_rank // (linear.num_kv_head_replicas if is_key_or_value else 1)
                up = up[shard * size : (shard + 1) * size]
            place_of_part = module.lora_b.data[row : row + size, place * rank : (place + 1) * rank]
            _fill(place_of_part, up * scale, part)
            row += size


def _unquantized(vllm_config: VllmConfig) -> VllmConfig:
    """The same without the quantization of the base, which the trained parts do not have."""
    plain, plain.model_config = copy.copy(vllm_config), copy.copy(vllm_config.model_config)
    plain.quant_config = plain.model_config.quantization = None
    return plain


def _part_sizes(linear: Any) -> list[int]:
    """Outputs on this device of each part (q, k, v) of a linear."""
    sizes = getattr(linear, "output_partition_sizes", None)
    return list(sizes) if sizes else [linear.output_size]


def _fill(target: torch.Tensor, values: torch.Tensor, path: str) -> None:
    """Copies values of the same shape; others would be repeated where they can be."""
    if target.shape != values.shape:
        raise _wrong_adapter(f"has LoRA of shape {list(values.shape)} for {path}, expected {list(target.shape)}")
    target.copy_(values)


def _wrong_adapter(problem: str) -> ValueError:
    return ValueError(
        f"The language adapter {problem}: it does not fit this base and configuration. Serve files that belong "
        "together (same repository, same revision)."
    )
