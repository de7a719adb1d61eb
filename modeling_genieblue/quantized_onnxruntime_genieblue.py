"""Linears whose 4- or 8-bit codes are multiplied by ONNX Runtime on a CPU, for fast decoding.

The codes of a quantized linear are repacked, none of them changed, into the layout of the operator `MatMulNBits`. The
operator rounds the activations to int8 inside (one scale per token and block of inputs): faster than 16-bit
activations, and not the same numbers.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

try:
    import onnxruntime
    from onnx import TensorProto, helper
except ImportError:
    onnxruntime: Any = None

logger = logging.getLogger(__name__)

ACCURACY_LEVEL = 4  # of MatMulNBits: activations in int8, sums in int32; 1 would compute in float32
# Linears of a Llama-style block that are called, in this order, with one and the same input.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
LARGEST_BLOCK, SMALLEST_BLOCK = 128, 16  # inputs per block; the operator also takes 256, which is no faster


class PackedWeight(NamedTuple):
    """The weight of one linear in the layout of `MatMulNBits`; a block is a run of inputs of one output."""

    in_features: int
    bits: int
    blob: np.ndarray  # uint8 (out_features, blocks, block_size * bits / 8), the first code in the low bits
    scale: np.ndarray  # float32 (out_features, blocks)
    zero_point: np.ndarray | None  # uint8 (out_features, bytes per row); None: 2 ** (bits - 1) everywhere

    @property
    def layout(self) -> tuple:
        """Equal for weights that can be stacked along the outputs."""
        return self.in_features, self.bits, self.blob.shape[1:], self.zero_point is None


def block_size_of(in_features: int, bits: int, group_size: int) -> int | None:
    """Inputs per `MatMulNBits` block for weights with one scale per `group_size` inputs; None: no such block exists.

    A group is split into equal blocks, each a power of two. With one group per row, any block will do.
    """
    if bits not in (4, 8) or group_size < 1:
        return None
    if group_size >= in_features:
        block = SMALLEST_BLOCK
        while block < min(in_features, LARGEST_BLOCK):
            block *= 2
        return block
    block = min(group_size & -group_size, LARGEST_BLOCK)  # the largest power of two that divides the group
    return block if block >= SMALLEST_BLOCK else None


def pack_weight(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, *, bits: int, group_size: int
) -> PackedWeight:
    """Codes (out, in), scale and zero point (out, groups) → the same numbers as `MatMulNBits` reads them.

    A weight is `(code - zero_point) * scale`. Codes are uint8 with a zero point, or int8 without (symmetric).
    """
    out_features, in_features = codes.shape
    block = block_size_of(in_features, bits, group_size)
    if block is None:
        raise ValueError(
            f"ONNX Runtime takes 4- and 8-bit codes in groups of a multiple of {SMALLEST_BLOCK} inputs, or one group "
            f"per output; got {bits} bits, groups of {group_size}, {in_features} inputs. Leave this linear as it is."
        )
    _check_quantized(codes, scale, zero_point, bits, group_size)
    blocks = -(-in_features // block)
    group_of_block = torch.arange(blocks) * block // group_size
    if zero_point is None:
        codes = (codes.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    else:
        zero_point = zero_point[:, group_of_block]
        if bits == 4:
            zero_point = _pair_up(functional.pad(zero_point, (0, blocks % 2)))
    # What fills the last block is multiplied by zeros.
    codes = functional.pad(codes, (0, blocks * block - in_features))
    blob = (_pair_up(codes) if bits == 4 else codes).reshape(out_features, blocks, block * bits // 8)
    return PackedWeight(
        in_features,
        bits,
        blob.contiguous().numpy(),
        scale[:, group_of_block].to(torch.float32).contiguous().numpy(),
        None if zero_point is None else zero_point.contiguous().numpy(),
    )


def _pair_up(values: torch.Tensor) -> torch.Tensor:
    return values[:, 0::2] | values[:, 1::2] << 4


def _check_quantized(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int, group: int):
    groups = -(-codes.shape[1] // group)
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor is not None and tensor.shape != (len(codes), groups):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {(len(codes), groups)}.")
    kind = torch.int8 if zero_point is None else torch.uint8
    if codes.dtype != kind or (zero_point is not None and zero_point.dtype != kind):
        given = f"codes {codes.dtype}" + ("" if zero_point is None else f", zero points {zero_point.dtype}")
        raise ValueError(f"Got {given}; expected uint8 codes with uint8 zero points, or int8 codes without.")
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if zero_point is None else (0, (1 << bits) - 1)
    for name, tensor in (("codes", codes), ("zero_point", zero_point)):
        if tensor is not None and (tensor.min() < low or tensor.max() > high):
            raise ValueError(f"{name} of {bits} bits must lie in {low}..{high}, found {tensor.min()}..{tensor.max()}.")


def check_onnxruntime_installed() -> None:
    """`ValueError` if a package that this backend needs is not installed."""
    if onnxruntime is None:
        raise ValueError(
            "The ONNX Runtime backend needs the packages onnxruntime and onnx, which are not installed: "
            "`pip install 'genieblue[onnxruntime]'`."
        )


def _make_session(weight: PackedWeight, bias: np.ndarray | None) -> Any:
    """A session of one `MatMulNBits` node: float32 `x` (tokens, in_features) → `y` (tokens, out_features)."""
    out_features, blocks, bytes_per_block = weight.blob.shape
    tensors = {"weight": weight.blob, "scale": weight.scale, "zero_point": weight.zero_point, "bias": bias}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    inputs = ["x", "weight", "scale", "zero_point", "order_of_inputs", "bias"]
    node = helper.make_node(
        "MatMulNBits",
        [name if name == "x" or name in present else "" for name in inputs],  # "" stands for a missing one
        ["y"],
        domain="com.microsoft",
        K=weight.in_features,
        N=out_features,
        bits=weight.bits,
        block_size=bytes_per_block * 8 // weight.bits,
        accuracy_level=ACCURACY_LEVEL,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", weight.in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", out_features])],
        [
            helper.make_tensor(
                name,
                TensorProto.UINT8 if tensor.dtype == np.uint8 else TensorProto.FLOAT,
                tensor.shape,
                tensor.tobytes(),
                raw=True,
            )
            for name, tensor in present.items()
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that wait busily for the next product keep torch's own threads from the processor.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Each session would keep the memory of the longest prompt it has seen.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    # The session has its own, repacked copy of the weight. The bytes of the model stay behind only for a change of
    # the execution provider, which never happens here; they would double the memory.
    session._model_bytes = b""
    return session


class _OneToken:
    """Memory for the input and output of one token, bound to a session once: binding costs as much as a small run."""

    def __init__(self, product: "FusedOnnxRuntimeLinears"):
        with torch.inference_mode(False):  # tensors made in inference mode could not be written to outside it
            self.x = torch.empty(1, product.in_features)
            self.y = torch.empty(1, sum(product.out_features))
        self.binding = product.bind(self.x, self.y)


class FusedOnnxRuntimeLinears:
    """The product of one input with the stacked weights of linears that read it, computed once for all of them.

    It is no `nn.Module`. The linears are called in their order with one and the same tensor; any other order or input
    gives the same numbers, but computes the whole product again.
    """

    def __init__(
        self,
        weights: Sequence[PackedWeight],
        biases: Sequence[torch.Tensor | None],
    ):
        """Raises `ValueError` unless all weights have the same `layout`."""
        check_onnxruntime_installed()
        if len({weight.layout for weight in weights}) != 1:
            raise ValueError(f"Weights to be stacked need one layout, got {[weight.layout for weight in weights]}.")
        self.in_features = weights[0].in_features
        self.out_features = [len(weight.blob) for weight in weights]
        stacked = (
            weights[0]
            if len(weights) == 1
            else weights[0]._replace(
                blob=np.concatenate([weight.blob for weight in weights]),
                scale=np.concatenate([weight.scale for weight in weights]),
                zero_point=None
                if weights[0].zero_point is None
                else np.concatenate([weight.zero_point for weight in weights if weight.zero_point is not None]),
            )
        )
        bias = None
        if any(part is not None for part in biases):
            parts = [
                torch.zeros(size) if part is None else part.detach().to("cpu", torch.float32)
                for part, size in zip(biases, self.out_features, strict=True)
            ]
            bias = torch.cat(parts).numpy()
        self._session = _make_session(stacked, bias)
        self._idle: list[_OneToken] = []  # as many as threads have run at once
        self._last = threading.local()  # .input: a tensor; .parts: its products that no linear has asked for yet

    def __call__(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """`x` (..., in_features) → (..., out_features) of the linear at `index`: new memory, precision of `x`."""
        if len(self.out_features) == 1:
            return self._compute(x)[0]
        last = self._last
        # The first linear always computes: `x` may have been written to since the last call.
        if index == 0 or getattr(last, "input", None) is not x or last.parts[index] is None:
            last.input, last.parts = x, self._compute(x)
        # Handed out once: the caller may add to it in place, as LoRA does.
        part, last.parts[index] = last.parts[index], None
        if index == len(self.out_features) - 1:
            last.input, last.parts = None, []  # do not keep the activations alive
        return part

    def _compute(self, x: torch.Tensor) -> list[Any]:
        shape = x.shape[:-1]
        tokens = shape.numel()
        if tokens == 1:
            try:
                memory = self._idle.pop()
            except IndexError:
                memory = _OneToken(self)
            memory.x.copy_(x.detach().reshape(1, -1))
            self._session.run_with_iobinding(memory.binding)
            result = memory.y.to(x.dtype, copy=True)
            self._idle.append(memory)
            parts = (result,) if len(self.out_features) == 1 else result.split(self.out_features, dim=-1)
            return [part.view(*shape, -1) for part in parts]
        result = torch.empty(tokens, sum(self.out_features))
        if tokens:
            flat = x.detach().reshape(tokens, -1).to(torch.float32).contiguous()
            self._session.run_with_iobinding(self.bind(flat, result))
        parts = [part.to(x.dtype).contiguous() for part in result.split(self.out_features, dim=-1)]
        return [part.view(*shape, size) for part, size in zip(parts, self.out_features, strict=True)]

    def bind(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        """A binding of the session to the memory of `x` and `y`, which must stay alive as long as it is used."""
        binding = self._session.io_binding()
        binding.bind_input("x", "cpu", 0, np.float32, tuple(x.shape), x.data_ptr())
        binding.bind_output("y", "cpu", 0, np.float32, tuple(y.shape), y.data_ptr())
        return binding


class OnnxRuntimeLinear(nn.Module):
    """A linear whose 4- or 8-bit codes are multiplied by ONNX Runtime's `MatMulNBits`, activations rounded to int8.

    It has no parameters and never changes, so a deep copy is the same object. It runs on a CPU, for inference only.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        bias: torch.Tensor | None,
        *,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
    ):
        """Codes (out, in), scale (out, groups), bias (out,): uint8 codes with uint8 zero points, or int8 without.

        `dtype` is what `weight.dtype` shows. Raises `ValueError` for groups that the operator cannot take, and if ONNX
        Runtime is not installed.
        """
        check_onnxruntime_installed()
        weight = pack_weight(codes, scale, zero_point, bits=bits, group_size=group_size)
        self._set(FusedOnnxRuntimeLinears([weight], [bias]), 0, dtype)

    def _set(self, product: FusedOnnxRuntimeLinears, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = product.in_features, product.out_features[index]
        self.product = (product, index)
        # One number, so that it takes no memory; no number, so that whoever computes with it sees it.
        self._weight = torch.full((1, 1), torch.nan, dtype=dtype).expand(self.out_features, self.in_features)

    @classmethod
    def siblings(
        cls,
        weights: Sequence[PackedWeight],
        biases: Sequence[torch.Tensor | None],
        dtypes: Sequence[torch.dtype],
    ) -> list["OnnxRuntimeLinear"]:
        """Linears that read the same input, in the order in which they are called, over one common product."""
        product = FusedOnnxRuntimeLinears(weights, biases)
        linears = [cls.__new__(cls) for _ in weights]
        for index, (linear, dtype) in enumerate(zip(linears, dtypes, strict=True)):
            linear._set(product, index, dtype)
        return list(linears)

    @property
    def weight(self) -> torch.Tensor:
        """Stands in for code that reads the shape, precision and device of a linear's weight; its values are NaN."""
        return self._weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (..., in_features) → (..., out_features), in the precision of `x`."""
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "A linear on the ONNX Runtime backend is for inference only and has no gradients: train the model at "
                "16 or 32 bits, or run it under `torch.no_grad()`."
            )
        if x.shape[-1] != self.in_features or x.device.type != "cpu":
            raise ValueError(
                f"The ONNX Runtime backend got {tuple(x.shape)} on {x.device}, expected (..., {self.in_features}) on "
                "the CPU. On a GPU, load the model without this backend."
            )
        product, index = self.product
        return product(index, x)

    def __deepcopy__(self, memo: dict) -> "OnnxRuntimeLinear":
        return self

    def __reduce_ex__(self, protocol: int):
        raise ValueError(
            "A linear on the ONNX Runtime backend cannot be pickled: save the quantized model without the backend."
        )

    def _save_to_state_dict(self, *_args) -> None:
        raise ValueError(
            "A model on the ONNX Runtime backend cannot be saved, because its weights are repacked for this computer: "
            "save the quantized model without the backend."
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int, int]


def use_onnxruntime(
    tree: nn.Module,
    extract: Callable[[nn.Module], Quantized | None],
) -> int:
    """Replaces the quantized linears in `tree` by `OnnxRuntimeLinear` and returns how many places changed.

    `extract` gives (codes, scale, zero_point, bits, group_size) of a quantized linear, None for any other module. A
    module that occurs in several places becomes one object; trees that share modules are converted at once, as a
    list. Linears that the operator cannot take stay as they are and are logged.
    """
    check_onnxruntime_installed()
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in tree.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    changed, unfit = 0, set()
    groups = _sibling_groups(tree, places)
    while groups:  # emptied as it goes, and `places` too: nothing else keeps the originals alive
        new = {}
        for original in groups.pop():
            if (pieces := extract(original)) is not None:
                codes, bits, group_size = pieces[0], *pieces[3:]
                if block_size_of(codes.shape[1], bits, group_size) is None:
                    unfit.add(f"{tuple(codes.shape)} at {bits} bits in groups of {group_size}")
                else:
                    new[original] = pieces
        for original, linear in _convert(new).items():
            for parent, name in places.pop(original):
                parent._modules[name] = linear
                changed += 1
    if unfit:
        logger.warning(
            "Quantized linears of these shapes stay on the default backend, ONNX Runtime cannot take them: %s",
            "; ".join(sorted(unfit)),
        )
    return changed


def _sibling_groups(tree: nn.Module, places: dict[nn.Module, list]) -> list[list[nn.Module]]:
    """The modules of `places`, those together that are called with one and the same input."""
    groups, grouped = [], set()
    for parent in tree.modules():
        for names in SIBLINGS:
            children = [getattr(parent, name, None) for name in names]
            # In the multimodal view a linear sits inside its LoRA linear.
            linears = [getattr(child, "base_layer", child) for child in children]
            if all(linear in places and linear not in grouped for linear in linears):
                groups.append(linears)
                grouped.update(linears)
    return groups + [[module] for module in places if module not in grouped]


def _convert(new: dict[nn.Module, Quantized]) -> dict[nn.Module, OnnxRuntimeLinear]:
    """One `OnnxRuntimeLinear` for each quantized module, over a common product where the layouts are equal."""
    weights = {
        module: pack_weight(codes, scale, zero_point, bits=bits, group_size=group_size)
        for module, (codes, scale, zero_point, bits, group_size) in new.items()
    }
    together = [list(new)] if len({weight.layout for weight in weights.values()}) == 1 else [[one] for one in new]
    made: dict[nn.Module, OnnxRuntimeLinear] = {}
    modules: list[Any]
    for modules in together:
        linears = OnnxRuntimeLinear.siblings(
            [weights[module] for module in modules],
            [module.bias for module in modules],
            [module.weight.dtype for module in modules],
        )
        made.update(zip(modules, linears, strict=True))
    return made


__all__ = ["OnnxRuntimeLinear", "use_onnxruntime"]
