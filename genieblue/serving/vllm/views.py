"""Two views of one decoder: which tokens of a pass run which, and a second module tree over the same weights.

Needs no vLLM. Everything in a decoder block but attention works on single tokens. So one pass may hold tokens of both
views: each module with weights of its own runs on the rows of its view, and attention with its KV cache is one.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

MARK = 1 << 29  # added to the positions of a request with images; positions may be int32


class Rows:
    """The view of each row (token) of the current pass, shared by all modules of the second tree."""

    def __init__(self) -> None:
        self.multimodal: torch.Tensor | None = None  # (rows,) of bool in a mixed pass, `None` if all are multimodal
        self._parts: tuple[torch.Tensor, torch.Tensor] | None = None
        self._marked: WeakSet[torch.Tensor] = WeakSet()  # positions of requests that the engine has not forgotten

    def positions_of_request(self, length: int, has_images: bool) -> tuple[torch.Tensor, int]:
        """Positions of a prompt, (3, length), and what is added to those of the tokens generated after it.

        The engine keeps the very tensor for as long as it has the request.
        """
        mark = MARK if has_images else 0
        positions = (torch.arange(length) + mark).expand(3, -1)
        if has_images:
            self._marked.add(positions)
        return positions, mark

    def read(self, positions: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """The positions, (rows,), without marks, and whether any row had one.

        While there is no request with images it does not wait for a device to tell. The marks of former ones are taken
        off even then, as the engine pads a pass with what an earlier one left; and in place, as CUDA graphs read the
        positions of the text view where they were when it was captured.
        """
        if not self._marked:
            return positions.bitwise_and_(MARK - 1), False
        return self.read_marks(positions)

    def read_marks(self, positions: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """As `read`, whichever requests there are."""
        marked = positions >= MARK
        count = int(marked.sum())
        if count == 0:
            return positions, False
        is_mixed = count < len(marked)
        self.multimodal = marked if is_mixed else None
        self._parts = ((~marked).nonzero()[:, 0], marked.nonzero()[:, 0]) if is_mixed else None
        return positions - marked * MARK, True

    def run(self, text: Callable, multimodal: Callable, *inputs: Any) -> Any:
        """`text(*inputs)` for rows of text and `multimodal(*inputs)` for the others; results in the order of rows."""
        if self._parts is None:
            return multimodal(*inputs)
        results = [
            function(*(value[rows] if isinstance(value, torch.Tensor) else value for value in inputs))
            for function, rows in zip((text, multimodal), self._parts, strict=True)
        ]
        return self._join(*results)

    def _join(self, text: Any, multimodal: Any) -> Any:
        if isinstance(text, tuple):
            return tuple(self._join(*pair) for pair in zip(text, multimodal, strict=True))
        if text is None:
            return None
        assert self._parts is not None
        joined = text.new_empty(len(text) + len(multimodal), *text.shape[1:])
        joined[self._parts[0]], joined[self._parts[1]] = text, multimodal
        return joined


class CopiedModule(nn.Module):
    """A module of a replicated block: the base's own, and its trained copy for rows of the multimodal view."""

    def __init__(self, original: nn.Module, copy: nn.Module, rows: Rows):
        super().__init__()
        self.original, self.copy, self.rows = original, copy, rows

    def forward(self, *inputs: Any) -> Any:
        """What each row's module makes of it."""
        return self.rows.run(self.original, self.copy, *inputs)


class LoraLinear(nn.Module):
    """A linear of any other block: the base's own, plus `lora_b @ lora_a @ x` for rows of the multimodal view.

    Args:
        original: returns the output, or a tuple whose first entry it is.
        lora_a: (ranks, inputs); lora_b: (outputs, ranks), scaled.
        reduce: sums what the devices of tensor parallelism each made of their share of the inputs.
    """

    def __init__(
        self, original: nn.Module, lora_a: torch.Tensor, lora_b: torch.Tensor, rows: Rows, reduce: Callable | None
    ):
        super().__init__()
        self.original, self.rows, self.reduce = original, rows, reduce
        self.lora_a = nn.Parameter(lora_a, requires_grad=False)
        self.lora_b = nn.Parameter(lora_b, requires_grad=False)

    def forward(self, x: torch.Tensor) -> Any:
        """(rows, inputs) → (rows, outputs), or the tuple that the base's linear returns."""
        result = self.original(x)
        low_rank = nn.functional.linear(x, self.lora_a)
        if self.reduce is not None:
            low_rank = self.reduce(low_rank)
        if self.rows.multimodal is not None:
            low_rank = low_rank * self.rows.multimodal[:, None]
        output, *others = result if isinstance(result, tuple) else (result,)
        output = torch.addmm(output, low_rank, self.lora_b.t())
        return (output, *others) if isinstance(result, tuple) else output


def second_tree(
    module: nn.Module, substitute: Callable[[str, nn.Module], nn.Module | None], path: str = ""
) -> nn.Module:
    """A tree like `module` that shares everything with it, but for what `substitute(path, module)` gives instead.

    Containers are copied, without what they hold; modules without children (and those that are not changed anywhere
    below) are the very objects of the first tree, so whatever is done to their weights is done to both.
    """
    if (other := substitute(path, module)) is not None:
        return other
    children = {
        name: second_tree(child, substitute, f"{path}.{name}".strip(".")) for name, child in module.named_children()
    }
    if all(child is module.get_submodule(name) for name, child in children.items()):
        return module
    tree = module.__class__.__new__(module.__class__)
    tree.__dict__ = {**module.__dict__, "_modules": {**module._modules, **children}}
    return tree
