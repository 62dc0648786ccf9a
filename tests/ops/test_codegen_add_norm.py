"""Machine code of add_norm: whole rows in wide accesses, sizes that are not compiled for, float64."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, to compile kernels")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels are not compiled under TRITON_INTERPRET=1", allow_module_level=True)

from planecycle_fast.geometry.planes import DH, DW, HW
from planecycle_fast.ops.tiles import tile

from ..kernelcheck.codegen import ARCHITECTURES, check_binary, compile_variant
from ..kernelcheck.launches import launches_of, variants
from ..specs.add_norm import SPEC, case


def binary(channels, dtype, call=0, g=0, arch=90):
    launch = launches_of(SPEC, case(DW, DH, (32, 14, 16), g, channels), dtype)[call]
    return compile_variant(launch.variant(True, arch), arch)


@pytest.mark.parametrize("channels", [384, 768, 1024, 4096])
def test_forward_takes_rows_in_16_bytes(channels):
    """Loads of x and branch, stores of the sum and its norm; what is narrower is vectors and statistics."""
    head, tail, rows, warps = tile("forward", channels)
    each = (head + tail) * rows * 2 // (32 * warps) // 16  # accesses of a thread to its part of a tensor
    accesses = binary(channels, torch.bfloat16).accesses
    assert accesses["load"][16] >= 2 * each and accesses["store"][16] == 2 * each
    assert sum(accesses["store"].values()) == 2 * each + 2  # and both statistics
    assert sum(accesses["load"].values()) <= 2 * each + 3 * 2 * max(1, each)


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1152, 5120])
def test_backward_of_other_widths_does_not_spill(channels, dtype, arch):
    check_binary(binary(channels, dtype, 1, 5, arch), arch)


@pytest.mark.parametrize("call", [0, 1, 2])
def test_float64_compiles_too(call):
    """It may spill: nobody trains in it."""
    assert binary(384, torch.float64, call, g=5).instructions


@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
def test_sizes_are_not_specialised(pool_method):
    launches = []
    for sizes in [(32, 14, 14), (1, 1, 1), (17, 16, 16), (64, 4, 4), (16, 32, 48), (4096, 64, 64), (9, 31, 5)]:
        for old, new in ((HW, DW), (DW, DH), (DH, HW)):
            for batch, g in ((1, 5), (3, 1), (16, 16)):
                launches += launches_of(SPEC, case(old, new, sizes, g, 384, batch, pool_method), torch.bfloat16)
    assert max(launch.grid[0] for launch in launches) > 2**20
    assert len(variants(launches, [True])) == 3  # forward, backward and the sums of columns


def test_one_launch_forward_and_two_backward():
    for pool_method in ("PCg", "PCm"):
        launches = launches_of(SPEC, case(HW, DW, (32, 14, 14), 5, 384, 1, pool_method), torch.bfloat16)
        assert [len(launch.grid) for launch in launches] == [1, 1, 1]  # y and z end at 65,535


def test_as_many_programs_on_every_gpu():
    """Of backward, whose partial sums they are: by rows alone, and not more than so many."""
    grids = [launches_of(SPEC, case(HW, DW, sizes, 5, 384, batch), torch.bfloat16)[1].grid[0]
             for sizes, batch in (((16, 4, 4), 1), ((32, 28, 28), 8), ((64, 64, 64), 8))]  # fmt: skip
    assert grids[0] < 200 and all(grid <= 1024 + 128 for grid in grids)
