"""4-bit codes, two in a byte: as they are stored, and as torch's CPU kernel reads them."""

import functools
from typing import Any

import torch

try:
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmPackedTensor
except ImportError:  # only needed where something is quantized
    TinyGemmPackedTensor: Any = torch.Tensor

# The kernel reads blocks of rows, column by column: (rows of a block, distance of the two rows that share a byte).
# On AVX-512, on AVX2, without either, and on ARM; see `weight_to_int4pack_kernel` in torch's int4mm_kernel.cpp.
LAYOUTS = ((64, 32), (32, 16), (32, 1), (16, 1))
PROBE_ROWS = 240  # whole blocks and a rest in every layout, each other than in the others
ROWS_AT_A_TIME = 512  # a multiple of every block; few enough to stay in a cache


def pack(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes, uint8 (rows, columns) → (rows / 2, columns): the second half of the rows in the high bits."""
    low, high = codes.chunk(2)
    return low | (high << 4)


def unpack(packed: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """The inverse of `pack`, for 4 or 2 bits."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


def packed_for_kernel(stored: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """quanto's packed tensor for torch's CPU kernel, from stored 4-bit codes of a matrix (uint8 of any shape)."""
    rows = stored.view(out_features // 2, in_features)
    layout = kernel_layout()
    if layout is None:
        return TinyGemmPackedTensor.pack(unpack(rows))
    size = torch.Size((out_features, in_features))
    return TinyGemmPackedTensor(pack_in_layout(rows, *layout), size, (in_features, 1))


@functools.cache
def kernel_layout() -> tuple[int, int] | None:
    """The layout of torch's kernel on this computer, known by packing a matrix; `None` for one that is not here."""
    seed = torch.Generator("cpu").manual_seed(0)
    codes = torch.randint(16, (PROBE_ROWS, 32), dtype=torch.uint8, device="cpu", generator=seed)
    expected = TinyGemmPackedTensor.pack(codes)._data
    return next((layout for layout in LAYOUTS if torch.equal(pack_in_layout(pack(codes), *layout), expected)), None)


def pack_in_layout(stored: torch.Tensor, block: int, distance: int) -> torch.Tensor:
    """`stored` (rows / 2, columns), rows of the second half in the high bits → (rows, columns / 2) in a layout."""
    half, columns = stored.shape
    packed = torch.empty(2 * half, columns // 2, dtype=torch.uint8, device=stored.device)
    if half % block == 0:  # no block has rows of both halves
        _pack_rows(stored, packed[:half], block, distance)
        _pack_rows(stored, packed[half:], block, distance, are_high=True)
        return packed
    codes, whole = unpack(stored), 2 * half // block * block
    _pack_rows(codes[:whole], packed[:whole], block, distance)
    if whole < 2 * half:  # neighbours share a byte there
        _pack_rows(codes[whole:], packed[whole:], 2 * half - whole, 1)
    return packed


def _pack_rows(rows: torch.Tensor, packed: torch.Tensor, block: int, distance: int, *, are_high: bool = False) -> None:
    """Low or high bits of `rows` (count, columns), of whole blocks, into `packed` (count, columns / 2)."""
    columns = rows.shape[1]
    for first in range(0, len(rows), ROWS_AT_A_TIME):
        piece = slice(first, first + ROWS_AT_A_TIME)
        one, other = rows[piece].view(-1, block // (2 * distance), 2, distance, columns).unbind(2)
        shared = one >> 4 | other & 240 if are_high else one & 15 | other << 4
        by_column = shared.view(-1, block // 2, columns).transpose(1, 2)
        packed[piece].view(-1, columns, block // 2).copy_(by_column)
