"""A PEFT LoRA linear that computes the small matrices of sibling projections at once when it decodes."""

import threading

import torch
from peft.tuners import lora
from torch import nn
from torch.nn import functional

# Llama-style siblings that are called, in this order, with one and the same input.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class DownProjection:
    """The stacked LoRA A matrices of linears that read one input: one product `x @ [A_1; A_2; …]^T` for all of them.

    It is no `nn.Module`: the parameters stay where PEFT put them. Their memory is moved into one block, of which each
    becomes a part, so whatever is written to one of them is seen here.
    """

    def __init__(self, layers: list["SharedInputLoraLinear"]):
        self.layers = layers
        self._packing = threading.Lock()
        self._packed: tuple[list[int], torch.Tensor, list[int]] | None = None  # addresses, block, ranks
        # One tuple, so that two threads in the same view never see the input of one with the result of the other.
        self._last: tuple[torch.Tensor | None, tuple[torch.Tensor, ...]] = (None, ())

    def __getstate__(self) -> dict:
        return {"layers": self.layers}  # a copied or pickled view has parameters of its own, which pack anew

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["layers"])

    def __call__(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """`x` of shape (..., in_features) → (tokens, rank) of the layer at `index`."""
        last_input, parts = self._last
        # The first of them always begins anew: a tensor may have been written to since a pass that did not end.
        if index == 0 or last_input is not x:
            block, ranks = self._stacked_weight()
            # In the precision of the weight, (tokens, sum of ranks).
            parts = torch.mm(x.reshape(-1, x.shape[-1]).to(block.dtype), block.t()).split(ranks, dim=-1)
            self._last = (x, parts)
        if index == len(self.layers) - 1:
            self._last = (None, ())  # do not keep the activation alive
        return parts[index]

    def _stacked_weight(self) -> tuple[torch.Tensor, list[int]]:
        weights = [layer.lora_A[layer.active_adapter[0]].weight for layer in self.layers]
        addresses = [weight.data_ptr() for weight in weights]
        if self._packed is None or self._packed[0] != addresses:  # new, or moved by `.to(device)`
            with self._packing, torch.inference_mode(False):  # the parameters must stay fit for training
                block = torch.cat([weight.detach() for weight in weights])
                ranks = [len(weight) for weight in weights]
                for weight, part in zip(weights, block.split(ranks), strict=True):
                    weight.data = part
                self._packed = ([weight.data_ptr() for weight in weights], block, ranks)
        return self._packed[1:]


class SharedInputLoraLinear(lora.Linear):
    """PEFT's own LoRA linear (same names, same checkpoint), with a shorter path for inference.

    Training, merging, disabled or several adapters, autocast and compilation run PEFT's code unchanged.
    """

    down_projection: tuple[DownProjection, int] | None = None  # and the place of this layer in it

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """`x` (..., in_features) → (..., out_features): the base linear plus `scaling * B A x`."""
        if torch.is_grad_enabled() or args or kwargs or not self._is_plain(x):
            return super().forward(x, *args, **kwargs)
        name = self._active_adapter[0] if isinstance(self._active_adapter, list) else self._active_adapter
        modules = self._modules  # a dictionary: at batch size 1, each attribute look-up of a module is felt
        base_layer = modules["base_layer"]
        if type(base_layer) is nn.Linear and not base_layer._forward_hooks and not base_layer._forward_pre_hooks:
            result = functional.linear(x, base_layer.weight, base_layer.bias)
        else:
            result = base_layer(x)
        projection, index = self.down_projection
        low_rank = projection(index, x)
        up_weight = modules["lora_B"]._modules[name].weight.t()
        # In place: what LoRA costs at batch size 1 is the number of operations, not their arithmetic.
        flat = result.view(-1, result.shape[-1])
        if flat.dtype == low_rank.dtype:
            flat.addmm_(low_rank, up_weight, alpha=self.scaling[name])
        else:
            flat.add_(torch.mm(low_rank, up_weight), alpha=self.scaling[name])  # summed in float32, rounded once
        return result

    def merge(self, *args, **kwargs) -> None:
        """PEFT's own; `ValueError` for a quantized base, on which PEFT would do nothing and drop the LoRA."""
        weight = self.get_base_layer().weight
        if type(weight) not in (torch.Tensor, nn.Parameter) or not weight.is_floating_point():
            raise ValueError(
                f"LoRA cannot be merged into quantized weights ({type(weight).__name__}): merge it in 16 bits, then "
                "quantize."
            )
        super().merge(*args, **kwargs)

    def _is_plain(self, x: torch.Tensor) -> bool:
        return not (
            self.training  # dropout
            or self._disable_adapters
            or self.merged_adapters
            or self.lora_variant
            or self.down_projection is None
            or len(self.active_adapters) != 1
            or x.requires_grad
            or torch.is_autocast_enabled(x.device.type)
            or torch.compiler.is_compiling()
        )


def connect_down_projections(view: nn.Module) -> None:
    """Gives each LoRA linear of `view` its down-projection, one in common to those that read the same input."""
    for module in view.modules():
        for names in SIBLINGS:
            layers = [getattr(module, name, None) for name in names]
            if all(isinstance(layer, SharedInputLoraLinear) for layer in layers):
                shared = DownProjection(layers)
                for index, layer in enumerate(layers):
                    layer.down_projection = (shared, index)
    for module in view.modules():
        if isinstance(module, SharedInputLoraLinear) and module.down_projection is None:
            module.down_projection = (DownProjection([module]), 0)


__all__ = ["SharedInputLoraLinear"]
