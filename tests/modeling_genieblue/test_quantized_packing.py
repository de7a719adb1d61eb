"""4-bit codes for torch's CPU kernel: the bytes of torch's own packing, made in another way."""

import inspect
import os
import subprocess
import sys

import pytest
import torch

from modeling_genieblue import quantized_packing_genieblue as packing
from modeling_genieblue.quantized_linears_genieblue import check_quanto_installed

# Rows that end with a block of each layout, within one, and behind several of the pieces that are packed at a time.
ROWS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 576, 1040, 1536)
CAPABILITIES = {"avx512": (64, 32), "avx2": (32, 16), "default": (32, 1)}


def packed_by_torch(codes):
    return torch._convert_weight_to_int4pack_for_cpu(codes.int(), 2)


def codes_of(rows, columns):
    return torch.randint(16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))


def assert_packs_as_torch_does(rows, columns, group):
    codes = codes_of(rows, columns)
    stored = packing.pack(codes.view(-1, group))
    packed = packing.packed_for_kernel(stored, rows, columns)
    assert torch.equal(packed._data, packed_by_torch(codes)), (rows, columns, group)
    assert packed.shape == codes.shape


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", ROWS)
def test_bytes_are_those_of_torchs_packing(rows, group):
    for columns in (group, 3 * group):
        assert_packs_as_torch_does(rows, columns, group)


def test_layout_of_this_computer_is_known():
    assert packing.kernel_layout() in packing.LAYOUTS


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_of_torch_has_its_layout(capability):
    tests = [inspect.getsource(part) for part in (packed_by_torch, codes_of, assert_packs_as_torch_does)]
    code = "\n".join([
        "import torch",
        "from modeling_genieblue import quantized_packing_genieblue as packing",
        *tests,
        f"if torch.backends.cpu.get_cpu_capability().lower() != {capability!r}: raise SystemExit(77)",
        f"assert packing.kernel_layout() == {CAPABILITIES[capability]}",
        f"for rows in {ROWS}: assert_packs_as_torch_does(rows, 64, 32)",
    ])  # fmt: skip
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if result.returncode == 77:
        pytest.skip(f"this CPU has no {capability}")
    assert result.returncode == 0, result.stderr


def test_kernel_of_another_layout_gets_torchs_own_packing(monkeypatch):
    monkeypatch.setattr(packing, "LAYOUTS", ())
    packing.kernel_layout.cache_clear()
    try:
        assert packing.kernel_layout() is None
        assert_packs_as_torch_does(112, 64, 32)
    finally:
        packing.kernel_layout.cache_clear()


def test_layout_of_arm_has_neighbours_in_blocks_of_16():
    codes = codes_of(48, 32)
    packed = packing.pack_in_layout(packing.pack(codes), 16, 1).view(3, 32, 8)
    expected = [[[codes[16 * block + 2 * pair, column] | codes[16 * block + 2 * pair + 1, column] << 4
                  for pair in range(8)] for column in range(32)] for block in range(3)]  # fmt: skip
    assert packed.tolist() == torch.tensor(expected).tolist()


def test_quanto_unpacks_by_the_same_function():
    check_quanto_installed()
    codes = codes_of(8, 16)
    assert torch.equal(torch.ops.quanto.unpack(packing.pack(codes), 4), codes)
