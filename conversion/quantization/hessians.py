"""Calibration for rounding: collects the inputs of linear layers block by block, while the blocks are rounded."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin

Batch = Mapping[str, Any]
Hessians = dict[str, torch.Tensor]
ADDS_TO_BLOCKS = ("qwen3_vl",)  # types of VLMs whose decoder gets features of images between its blocks


def check_runs_by_blocks(vlm_type: str, remedy: str) -> None:
    """`ValueError`, which ends in `remedy`, for a VLM whose blocks cannot be run one by one on chats with images."""
    if vlm_type in ADDS_TO_BLOCKS:
        raise ValueError(
            f"A VLM of type {vlm_type!r} adds features of images between its blocks, which therefore cannot be "
            f"calibrated on chats with images one by one: {remedy}."
        )


@torch.no_grad()
def walk_blocks(
    view: nn.Module,
    batches: Iterable[Batch],
    blocks_path: str,
    process: Callable[[int, nn.Module, Hessians], None],
    *,
    select: Callable[[int, nn.Module], Iterable[str]] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> list[torch.Tensor]:
    """Runs the blocks of `view` in order, each on the outputs of the already processed blocks before it.

    Every batch runs through `view` once, to record how each block is called; then only the blocks run, twice each.
    Memory holds one hidden state per batch and the Hessians of one block.

    Args:
        batches: arguments of `view`, such as `{"input_ids": ids}`, `{"inputs_embeds": embeds, "attention_mask": mask}`
            or, for a vision tower, `{"pixel_values": pixels}`. Positions where a (batch, length) `attention_mask` is
            zero do not count.
        blocks_path: path of the `nn.ModuleList` of blocks in `view`.
        process: called with the index of a block, the block, and the Hessians `2 X^T X / n` of the inputs of its
            linear layers, by name in the block; float32, on the CPU. Layers that read the same tensor share one
            Hessian; a layer that never ran has none. It may change or replace the block.
        select: names of the linear layers of a block that need a Hessian; by default all.
        progress: wraps the iterable of block indices, like `tqdm`.

    Returns the outputs of the last block, one (batch, length, hidden_size) per batch. Raises `ValueError` if there are
    no batches, or if the model changes its hidden states between blocks.
    """
    modes = [(module, module.training) for module in view.modules()]
    view.eval()
    try:
        blocks = view.get_submodule(blocks_path)
        recorded = [_record_calls(view, blocks, batch) for batch in batches]
        if not recorded:
            raise ValueError("There are no calibration batches: give at least one.")
        hidden_states = [first_input for first_input, _, _ in recorded]
        for index in (progress or iter)(range(len(blocks))):
            names = _linear_names(blocks[index]) if select is None else list(select(index, blocks[index]))
            collector = _HessianCollector(blocks[index], names)
            if names:
                with collector:
                    for hidden, (_, calls, kept) in zip(hidden_states, recorded, strict=True):
                        collector.kept_positions = kept
                        calls[index].run(blocks[index], hidden)
            process(index, blocks[index], collector.hessians())
            # Again, now rounded: the next block is calibrated on inputs with the errors of this one, so that its
            # rounding can compensate for them.
            for number, (_, calls, _) in enumerate(recorded):
                hidden_states[number] = calls[index].run(blocks[index], hidden_states[number])
                calls[index] = None  # frees masks that no later block uses
    finally:
        for module, training in modes:
            module.training = training
    return hidden_states


@torch.no_grad()
def linear_hessians(module: nn.Module, run: Callable[[], object], names: Sequence[str]) -> Hessians:
    """Hessians `2 X^T X / n` (float32, CPU) of the linear layers `names` of `module`, over their inputs in `run()`.

    For layers outside the blocks, such as a projector or an LM head; padding counts. Raises `ValueError` for a layer
    that never ran.
    """
    with _HessianCollector(module, names) as collector:
        run()
    hessians = collector.hessians()
    if silent := [name for name in names if name not in hessians]:
        raise ValueError(f"No calibration sample reached {', '.join(silent)}: give samples that use every layer.")
    return hessians


class _LastBlockReached(Exception):
    """All calls are recorded, so the last block and the head need not run."""


@dataclass
class _BlockCall:
    """How a model calls one of its blocks, apart from the hidden states."""

    args: tuple  # those after the hidden states
    kwargs: dict[str, Any]
    positional: bool  # whether the hidden states are the first positional argument or a keyword

    def run(self, block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.positional:
            return _hidden_states_of(block(hidden_states, *self.args, **self.kwargs))
        return _hidden_states_of(block(hidden_states=hidden_states, **self.kwargs))


def _hidden_states_of(output: Any) -> torch.Tensor:
    """The hidden states that a block returned, alone or as the first item of a tuple."""
    hidden_states = output if isinstance(output, torch.Tensor) else output[0]
    if not isinstance(hidden_states, torch.Tensor):
        raise ValueError(
            f"A block returned {type(output).__name__} of {type(hidden_states).__name__}: expected a tensor, or a "
            "tuple that starts with one."
        )
    return hidden_states


def _record_calls(
    view: nn.Module, blocks: nn.ModuleList, batch: Batch
) -> tuple[torch.Tensor, list[_BlockCall | None], torch.Tensor | None]:
    """Input of the first block, the call of each block, and which positions count (None: all) for one batch.

    Masks and position embeddings that a model computes once and passes to many blocks are stored once.
    """
    calls: list[_BlockCall] = []
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []  # of the latest block only

    def before(index: int, args: tuple, kwargs: dict) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if index != len(calls) or (outputs and hidden_states is not outputs[-1]):
            raise ValueError(
                f"{type(view).__name__} changes its hidden states between blocks (before block {index}), so it cannot "
                "be calibrated: use a rounding method without calibration samples."
            )
        if not inputs:
            inputs.append(hidden_states)
        others = {name: value for name, value in kwargs.items() if args or name != "hidden_states"}
        calls.append(_BlockCall(args[1:], others, bool(args)))
        if len(calls) == len(blocks):
            raise _LastBlockReached

    def after(_module: nn.Module, _args: tuple, output: Any) -> None:
        outputs[:] = [_hidden_states_of(output)]

    arguments = dict(batch)
    if "use_cache" in inspect.signature(view.forward).parameters or isinstance(view, GenerationMixin):
        arguments["use_cache"] = False  # blocks run several times, and a cache would grow each time
    handles = [block.register_forward_hook(after) for block in blocks]
    for index, block in enumerate(blocks):
        handles.append(
            block.register_forward_pre_hook(
                lambda _module, args, kwargs, index=index: before(index, args, kwargs), with_kwargs=True
            )
        )
    try:
        view(**arguments)
    except _LastBlockReached:
        return inputs[0], calls, _kept_positions(batch)
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError(f"{type(view).__name__} ran only {len(calls)} of its {len(blocks)} blocks: expected all.")


def _kept_positions(batch: Batch) -> torch.Tensor | None:
    """Boolean mask (batch, length) of positions that are not padding, or None if there is no padding."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.bool().all():
        return None
    return mask.bool()


def _linear_names(block: nn.Module) -> list[str]:
    return [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]


class _HessianCollector:
    """Sums `X^T X` over the inputs of linear layers while the context is open.

    Layers that are called in a row with the same tensor object (query, key and value; gate and up) form a group with
    one sum: `X^T X` costs more than the layers themselves. A layer may be in several groups, if the model's control
    flow depends on the input.
    """

    def __init__(self, module: nn.Module, names: Iterable[str]):
        self.kept_positions: torch.Tensor | None = None  # of the current batch
        self._linears = {name: module.get_submodule(name) for name in names}
        self._handles: list = []
        self._sums: dict[tuple[str, ...], tuple[torch.Tensor, int]] = {}  # readers -> X^T X, number of rows
        self._latest: tuple[torch.Tensor, torch.Tensor | None] | None = None  # input, its kept positions
        self._readers: list[str] = []

    def __enter__(self) -> "_HessianCollector":
        for name, linear in self._linears.items():
            self._handles.append(
                linear.register_forward_pre_hook(
                    lambda _module, args, kwargs, name=name: self._read(name, args[0] if args else kwargs["input"]),
                    with_kwargs=True,
                )
            )
        return self

    def __exit__(self, *_error) -> None:
        for handle in self._handles:
            handle.remove()
        self._close_group()

    def hessians(self) -> Hessians:
        groups: dict[str, list[tuple[str, ...]]] = {}
        for readers in self._sums:
            for name in readers:
                groups.setdefault(name, []).append(readers)
        made: dict[tuple, torch.Tensor] = {}
        for keys in map(tuple, groups.values()):
            if keys not in made:
                rows = sum(self._sums[key][1] for key in keys)
                made[keys] = (sum(self._sums[key][0] for key in keys) * (2 / rows)).cpu()
        return {name: made[tuple(groups[name])] for name in self._linears if name in groups}

    def _read(self, name: str, values: torch.Tensor) -> None:
        if self._latest is None or self._latest[0] is not values:
            self._close_group()
            self._latest = (values, self.kept_positions)
        self._readers.append(name)

    def _close_group(self) -> None:
        """Adds the latest input to the sum of the layers that read it."""
        if self._latest is None:
            return
        (values, kept), readers = self._latest, tuple(self._readers)
        self._latest, self._readers = None, []
        rows = values.detach().reshape(-1, values.shape[-1])
        if kept is not None and len(rows) == kept.numel():  # otherwise a router selected some positions
            rows = rows[kept.reshape(-1).to(rows.device)]
        if not len(rows):
            return
        rows = rows.float()
        if readers not in self._sums:
            self._sums[readers] = (rows.t() @ rows, len(rows))
        else:
            total, number = self._sums[readers]
            self._sums[readers] = (total.addmm_(rows.t(), rows), number + len(rows))
