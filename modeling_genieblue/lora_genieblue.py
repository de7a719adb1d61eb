"""A PEFT LoRA linear that computes the small matrices of sibling projections at once when it decodes."""

import torch
from peft.tuners import lora
from torch import nn

# Llama-style siblings that are called, in this order, with one and the same input.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class SharedDownProjection:
    """The stacked LoRA A matrices of sibling linears: one product `x @ [A_1; A_2; …]^T` for all of them.

    It is no `nn.Module`: the parameters stay where PEFT put them. Their memory is moved into one block, of which each
    becomes a part, so whatever is written to one of them is seen here.
    """

    def __init__(self, layers: list["SharedInputLoraLinear"]):
        self.layers = layers
        self._stacked: torch.Tensor | None = None  # (sum of ranks, in_features)
        self._addresses: list[int] | None = None
        # One tuple, so that two threads in the same view never see the input of one with the result of the other.
        self._last: tuple[torch.Tensor | None, list[torch.Tensor]] = (None, [])

    def __call__(self, layer: "SharedInputLoraLinear", x: torch.Tensor) -> torch.Tensor:
        """`x` of shape (..., in_features) → (tokens, rank) of `layer`."""
        last_input, parts = self._last
        if last_input is not x:
            low_rank = torch.mm(x.reshape(-1, x.shape[-1]), self._stacked_weight().t())  # (tokens, sum of ranks)
            parts = list(low_rank.split([sibling.down_weight().shape[0] for sibling in self.layers], dim=-1))
            self._last = (x, parts)
        if layer is self.layers[-1]:
            self._last = (None, [])  # do not keep the activation alive
        return parts[self.layers.index(layer)]

    def _stacked_weight(self) -> torch.Tensor:
        weights = [sibling.down_weight() for sibling in self.layers]
        if self._addresses != [weight.data_ptr() for weight in weights]:  # not packed yet, or moved (`.to(device)`)
            with torch.inference_mode(False):  # the parameters must stay fit for training
                self._stacked = torch.cat([weight.detach() for weight in weights])
                parts = self._stacked.split([len(weight) for weight in weights])
                for weight, part in zip(weights, parts, strict=True):
                    weight.data = part
            self._addresses = [weight.data_ptr() for weight in weights]
        return self._stacked


class SharedInputLoraLinear(lora.Linear):
    """PEFT's own LoRA linear (same names, same checkpoint), with a shorter path when no gradient is asked for.

    Training, merging, disabled or several adapters, mixed dtypes and compilation run PEFT's code unchanged.
    """

    shared_down: SharedDownProjection | None = None

    def down_weight(self) -> torch.Tensor:
        """The LoRA A matrix of the active adapter, (rank, in_features)."""
        return self.lora_A[self.active_adapter[0]].weight

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """`x` (..., in_features) → (..., out_features): the base linear plus `scaling * B A x`."""
        if torch.is_grad_enabled() or kwargs or args or torch.compiler.is_compiling() or not self._is_plain(x):
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)
        if self.shared_down is not None:
            low_rank = self.shared_down(self, x)
        else:
            low_rank = torch.mm(x.reshape(-1, x.shape[-1]), self.down_weight().t())
        name = self.active_adapter[0]
        # In place and fused: at batch size 1 the cost of LoRA is the number of operations, not their arithmetic.
        flat = result.view(-1, result.shape[-1])
        flat.addmm_(low_rank, self.lora_B[name].weight.t(), alpha=self.scaling[name])
        return result

    def _is_plain(self, x: torch.Tensor) -> bool:
        names = self.active_adapter
        if self._disable_adapters or self.merged_adapters or len(names) != 1 or self.lora_variant:
            return False
        weight = self.lora_A[names[0]].weight
        return weight.dtype == x.dtype and not weight.is_inference() and not self.lora_bias[names[0]]


def share_down_projections(view: nn.Module) -> None:
    """Connects the LoRA linears in `view` that read the same input (q, k, v; gate, up)."""
    for module in view.modules():
        for names in SIBLINGS:
            layers = [getattr(module, name, None) for name in names]
            if all(isinstance(layer, SharedInputLoraLinear) for layer in layers):
                shared = SharedDownProjection(layers)
                for layer in layers:
                    layer.shared_down = shared


__all__ = ["SharedInputLoraLinear"]
