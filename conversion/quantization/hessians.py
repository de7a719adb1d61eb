"""Calibration for rounding: what the linears of a model read, block by block, while the blocks are being rounded."""

import inspect
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]
Hessians = dict[str, torch.Tensor]


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
    """Runs the blocks of `view` one after the other, each on what the processed blocks before it put out.

    Every batch runs through `view` once, to record how each block is called; from then on only blocks run, twice
    each. In memory are one hidden state per batch and the Hessians of one block.

    Args:
        batches: arguments of `view`, such as `{"input_ids": ids}`, `{"inputs_embeds": embeds, "attention_mask": mask}`
            or, for a vision tower, `{"pixel_values": pixels}`. Positions where a (batch, length) `attention_mask` is
            zero do not count.
        blocks_path: path of the `nn.ModuleList` of blocks in `view`.
        process: is given the index of a block, the block, and the Hessian `2 X^T X / n` of the inputs of its linears,
            by name in the block; float32, on the CPU. Linears that read one tensor share one Hessian. A linear that
            never ran has none. It may change the block, or put another in its place.
        select: names of the linears of a block whose Hessian is wanted; all of them if left out.
        progress: is given the indices of the blocks and hands them on, as `tqdm` does.

    Returns the outputs of the last block, one (batch, length, hidden_size) for each batch. Raises `ValueError` for no
    batches, and for a model that does more with its hidden states than to pass them from block to block.
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
            for number, (_, calls, _) in enumerate(recorded):
                hidden_states[number] = calls[index].run(blocks[index], hidden_states[number])
                calls[index] = None  # masks that no later block is given go now
    finally:
        for module, training in modes:
            module.training = training
    return hidden_states


@torch.no_grad()
def linear_hessians(module: nn.Module, run: Callable[[], object], names: Sequence[str]) -> Hessians:
    """Hessians `2 X^T X / n` (float32, CPU) of the linears `names` of `module`, over all they read during `run()`.

    For linears outside of blocks, such as a projector's or an LM head; padding counts. Raises `ValueError` for one
    that never ran.
    """
    with _HessianCollector(module, names) as collector:
        run()
    hessians = collector.hessians()
    if silent := [name for name in names if name not in hessians]:
        raise ValueError(f"No calibration sample reached {', '.join(silent)}: give samples that use every linear.")
    return hessians


def text_batches(tokenizer: Any, texts: Iterable[str], length: int, count: int) -> list[torch.Tensor]:
    """Up to `count` rows of token ids (1, length): the texts in their order, separated by empty lines and packed.

    Each row begins with what the tokenizer begins a text with (`<s>`, or nothing). Texts that are not needed are not
    read. Raises `ValueError` for text that does not fill one row, and warns if it fills fewer than asked for.
    """
    start = _leading_tokens(tokenizer)
    if count < 1 or length <= len(start):
        raise ValueError(
            f"{count} calibration samples of {length} tokens were asked for: expected at least 1, of more than "
            f"{len(start)} tokens."
        )
    own = length - len(start)
    tokens, used = [], 0
    for text in texts:
        if len(tokens) >= count * own:
            break
        if text.strip():
            tokens += tokenizer(text.strip() + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
            used += 1
    filled = min(count, len(tokens) // own)
    if filled == 0:
        raise ValueError(
            f"The calibration data has {len(tokens)} tokens in {used} texts; a sample of {length} tokens needs {own}: "
            "give more text, or ask for shorter samples (--sample-length)."
        )
    if filled < count:
        logger.warning("The calibration texts fill %d samples of %d tokens; %d were wanted.", filled, length, count)
    rows = torch.tensor(tokens[: filled * own]).view(filled, -1)
    return list(torch.cat([torch.tensor(start, dtype=rows.dtype).expand(filled, -1), rows], dim=1).split(1))


def read_paragraphs(path: str | os.PathLike) -> list[str]:
    """The paragraphs of a UTF-8 text file: what empty lines separate. `OSError` or `ValueError` if there are none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}): convert it, or give another file.") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error}): give a text file with calibration samples.") from error
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    if not paragraphs:
        raise ValueError(f"{path} holds no text: give a file with calibration samples, such as plain prose.")
    return paragraphs


def _leading_tokens(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer puts before a text."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for position in range(len(whole) - len(plain) + 1):
        if whole[position : position + len(plain)] == plain:
            return whole[:position]
    return []


class _LastBlockReached(Exception):
    """All calls are recorded: the last block and the head need not run."""


@dataclass
class _BlockCall:
    """How a model calls one of its blocks, apart from the hidden states."""

    args: tuple  # those after the hidden states
    kwargs: dict[str, Any]
    positional: bool  # whether the hidden states come as the first argument, or by name

    def run(self, block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.positional:
            return _hidden_states_of(block(hidden_states, *self.args, **self.kwargs))
        return _hidden_states_of(block(hidden_states=hidden_states, **self.kwargs))


def _hidden_states_of(output: Any) -> torch.Tensor:
    """A block returns its hidden states, or a tuple that begins with them."""
    hidden_states = output if isinstance(output, torch.Tensor) else output[0]
    if not isinstance(hidden_states, torch.Tensor):
        raise ValueError(
            f"A block returned {type(output).__name__} of {type(hidden_states).__name__}: expected a tensor, or a "
            "tuple that begins with one."
        )
    return hidden_states


def _record_calls(
    view: nn.Module, blocks: nn.ModuleList, batch: Batch
) -> tuple[torch.Tensor, list[_BlockCall | None], torch.Tensor | None]:
    """Input of the first block, the call of each block, and which positions count (None: all) for one batch.

    Masks and position embeddings that a model makes once and gives to many blocks are kept once.
    """
    calls: list[_BlockCall] = []
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []  # of the latest block only

    def before(index: int, args: tuple, kwargs: dict) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if index != len(calls) or (outputs and hidden_states is not outputs[-1]):
            raise ValueError(
                f"{type(view).__name__} does not pass its hidden states straight from block to block (at block "
                f"{index}): it cannot be calibrated. Use a rounding method without calibration samples."
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
    if "use_cache" in inspect.signature(view.forward).parameters:
        arguments["use_cache"] = False  # blocks run more than once, and a cache would grow each time
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
    raise ValueError(f"{type(view).__name__} ran {len(calls)} of its {len(blocks)} blocks: expected it to run all.")


def _kept_positions(batch: Batch) -> torch.Tensor | None:
    """Boolean (batch, length) of the positions that are no padding, or None if there is no padding."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.bool().all():
        return None
    return mask.bool()


def _linear_names(block: nn.Module) -> list[str]:
    return [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]


class _HessianCollector:
    """Sums `X^T X` of what linears read while the context is open.

    Linears that are called one after the other with the very same tensor (query, key and value; gate and up) make up
    a group with one sum. A linear may be in several groups, if a model's path depends on its input.
    """

    def __init__(self, module: nn.Module, names: Iterable[str]):
        self.kept_positions: torch.Tensor | None = None  # of the batch that runs
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
        """Adds the latest input to the sum of those that read it."""
        if self._latest is None:
            return
        (values, kept), readers = self._latest, tuple(self._readers)
        self._latest, self._readers = None, []
        rows = values.detach().reshape(-1, values.shape[-1])
        if kept is not None and len(rows) == kept.numel():  # otherwise a router chose some of the positions
            rows = rows[kept.reshape(-1).to(rows.device)]
        if not len(rows):
            return
        rows = rows.float()
        if readers not in self._sums:
            self._sums[readers] = (rows.t() @ rows, len(rows))
        else:
            total, number = self._sums[readers]
            self._sums[readers] = (total.addmm_(rows.t(), rows), number + len(rows))


__all__ = ["linear_hessians", "read_paragraphs", "text_batches", "walk_blocks"]
