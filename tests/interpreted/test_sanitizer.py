"""The sanitizers catch what they are there for, each fault in a kernel of its own, and let the rest pass."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..kernelcheck.elements import Elements
from ..kernelcheck.observers import Fault
from ..kernelcheck.overflow import OverflowFault, probing
from ..kernelcheck.recorder import recording
from ..kernelcheck.sanitizer import BoundsError, RaceError

BLOCK = 16


@triton.jit
def copy_kernel(x, out, n, shift_x, shift_out, stride, BLOCK: tl.constexpr):
    """What is right with shifts of 0: each program copies a block, the last a part of one."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(out + i + shift_out, tl.load(x + i * stride + shift_x, mask=mask), mask=mask)


def copy(x, out, n, shift_x=0, shift_out=0, stride=1):
    copy_kernel[(triton.cdiv(n, BLOCK),)](x, out, n, shift_x, shift_out, stride, BLOCK=BLOCK)
    return out


def test_what_is_right_passes():
    x = torch.arange(40.0)
    assert torch.equal(copy(x, torch.empty(40), 40), x)
    assert torch.equal(copy(x[::2], torch.empty(20), 20, stride=2), x[::2])


@pytest.mark.parametrize("shift", [1, -1, 10**6, -(10**6), 2**31 - 41], ids=str)
def test_out_of_bounds_read(shift):
    with pytest.raises(BoundsError, match=r"copy_kernel, program \(.*: load at no element of x of shape \(40,\)"):
        copy(torch.zeros(40), torch.empty(40), 40, shift_x=shift)


@pytest.mark.parametrize("shift", [1, -1, 10**6, -(10**6), 2**31 - 41], ids=str)
def test_out_of_bounds_write(shift):
    before = torch.zeros(40)
    with pytest.raises(BoundsError, match=r"copy_kernel, program \(.*: store at no element of out of shape \(40,\)"):
        copy(torch.ones(40), before, 40, shift_out=shift)


def test_read_past_a_view_inside_its_storage():
    storage = torch.zeros(5, 8)
    with pytest.raises(BoundsError, match="x of shape .* 8 of 16 lanes, the first 16 bytes .*, within its storage"):
        copy(storage[:, :4], torch.empty(40), 40)  # the gap between two rows of the view
    with pytest.raises(BoundsError, match="16 of 16 lanes, the first 64 bytes from .*, within its storage"):
        copy(storage.flatten()[8:24], torch.empty(40), 40)


def test_read_before_a_view_inside_its_storage():
    with pytest.raises(BoundsError, match="1 of 16 lanes, the first -4 bytes from .*, within its storage"):
        copy(torch.zeros(40)[8:], torch.empty(32), 32, shift_x=-1)


def test_a_neighbour_is_not_the_tensor():
    """Two tensors that lie side by side in one storage: a pointer to one must not reach the other."""
    x, out = torch.zeros(2, 40)
    with pytest.raises(BoundsError, match="load at no element of x"):
        copy(x, out, 40, shift_x=40)


@triton.jit
def unmasked_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n))


def test_missing_mask():
    x = torch.zeros(48)
    unmasked_kernel[(3,)](x, torch.empty(48), 48, BLOCK=BLOCK)
    with pytest.raises(BoundsError, match=r"program \(2, 0, 0\): store at no element of out .* 8 of 16 lanes"):
        unmasked_kernel[(3,)](x[:40], torch.empty(40), 40, BLOCK=BLOCK)


@triton.jit
def wide_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    pairs = x.to(tl.pointer_type(tl.int64))  # two elements at once
    tl.store(out.to(tl.pointer_type(tl.int64)) + i, tl.load(pairs + i))


def test_elements_taken_as_wider_ones():
    wide_kernel[(1,)](torch.zeros(32), torch.empty(32), BLOCK=BLOCK)
    with pytest.raises(BoundsError, match="load at no element of x .* 1 of 16 lanes, the first 120 bytes"):
        wide_kernel[(1,)](torch.zeros(31), torch.empty(32), BLOCK=BLOCK)
    with pytest.raises(BoundsError, match="load at an odd address of x"):
        wide_kernel[(1,)](torch.zeros(33)[1:], torch.empty(32), BLOCK=BLOCK)


@triton.jit
def stray_kernel(table, out):
    tl.store(out, tl.load(tl.load(table).to(tl.pointer_type(tl.float32))))


def test_a_pointer_from_nowhere():
    with pytest.raises(Fault, match="load through a pointer that comes from no tensor"):
        stray_kernel[(1,)](torch.tensor([64]), torch.empty(1))


@triton.jit
def overlapping_kernel(x, out, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i))


def test_write_write_race():
    x = torch.zeros(40)
    overlapping_kernel[(2,)](x, torch.empty(40), 16, BLOCK=BLOCK)
    with pytest.raises(RaceError, match=r"write-write race of programs \(0, 0, 0\) and \(1, 0, 0\) at element \(15,\)"):
        overlapping_kernel[(2,)](x, torch.empty(40), 15, BLOCK=BLOCK)


@triton.jit
def shifted_kernel(x, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i + step))


def test_read_write_race():
    with pytest.raises(RaceError, match=r"read-write race of programs \(0, 0, 0\) and \(1, 0, 0\) at element \(16,\)"):
        shifted_kernel[(2,)](torch.zeros(40), 3, BLOCK=BLOCK)


@triton.jit
def backward_kernel(x, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i - 3, mask=pid > 0, other=0.0))


def test_write_read_race():
    with pytest.raises(RaceError, match=r"write-read race of programs \(0, 0, 0\) and \(1, 0, 0\) at element \(13,\)"):
        backward_kernel[(2,)](torch.zeros(40), BLOCK=BLOCK)


def test_a_race_of_two_views():
    """The same memory under two names."""
    storage = torch.zeros(43)
    with pytest.raises(RaceError, match="write-read race of programs .* of x of shape"):
        copy(storage[:40], storage[3:], 40)


def test_a_race_of_two_storages():
    """The same memory by two tensors that torch does not know to share it."""
    memory = np.zeros(43, np.float32)
    x, out = torch.from_numpy(memory[:40]), torch.from_numpy(memory[3:])
    with pytest.raises(RaceError, match="write-read race of programs"):
        copy(x, out, 40)
    copy(torch.from_numpy(memory[:16]), torch.from_numpy(memory), 16)


@triton.jit
def halves_kernel(out):
    pid = tl.program_id(0)
    tl.store(out.to(tl.pointer_type(tl.int16)) + pid, pid.to(tl.int16))


def test_parts_of_an_element():
    out = torch.zeros(2)
    halves_kernel[(4,)](out)
    assert out.view(torch.int16).tolist() == [0, 1, 2, 3]


@triton.jit
def mixed_widths_kernel(out):
    pid = tl.program_id(0)
    if pid == 0:
        tl.store(out + 1, 1.0)
    else:
        tl.store(out.to(tl.pointer_type(tl.int16)) + pid + 1, pid.to(tl.int16))


def test_a_race_of_accesses_of_two_widths():
    with pytest.raises(RaceError, match=r"write-write race of programs \(0, 0, 0\) and \(1, 0, 0\) at element \(1,\)"):
        mixed_widths_kernel[(2,)](torch.zeros(2))


@triton.jit
def clash_kernel(out, scale, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 2, (i * scale).to(tl.float32))


def test_lanes_of_a_store_that_clash():
    clash_kernel[(1,)](torch.empty(8), 0, BLOCK=BLOCK)  # the same value twice is fine
    with pytest.raises(RaceError, match=r"lanes of one store write different values to \(0,\) of out"):
        clash_kernel[(1,)](torch.empty(8), 1, BLOCK=BLOCK)


@triton.jit
def histogram_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out + tl.load(x + i), 1)


@triton.jit
def swap_kernel(out):
    tl.atomic_cas(out, 0, 1)


def test_atomics_are_fine():
    x, out = torch.arange(48) % 5, torch.zeros(5, dtype=torch.int32)
    histogram_kernel[(3,)](x, out, BLOCK=BLOCK)
    assert out.tolist() == torch.bincount(x).tolist()
    swap_kernel[(4,)](out)


@triton.jit
def mixed_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(out + i, tl.load(x + i))
    tl.store(out + i, tl.load(x + i))


def test_an_atomic_does_not_excuse_a_store():
    with pytest.raises(RaceError, match="write-atomic race"):
        mixed_kernel[(2,)](torch.zeros(16), torch.zeros(16), BLOCK=BLOCK)


def test_an_atomic_out_of_bounds():
    with pytest.raises(BoundsError, match="atomic at no element of out"):
        histogram_kernel[(3,)](torch.arange(48) % 6, torch.zeros(5, dtype=torch.int32), BLOCK=BLOCK)


@triton.jit
def add_kernel(x, row, out, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    i = tl.program_id(0) * BLOCK + c
    tl.store(out + i, tl.load(x + i) + tl.load(row + c))


def test_broadcasts_are_fine():
    x, row = torch.randn(3, 16), torch.randn(16)
    out = torch.empty(3, 16)
    add_kernel[(3,)](x, row, out, BLOCK=BLOCK)  # all programs read the same row
    assert torch.equal(out, x + row)
    expanded = torch.ones(1).expand(40)
    assert torch.equal(copy(expanded, out.flatten()[:40], 40, stride=0), expanded)
    overlapping = torch.arange(40.0).unfold(0, 16, 1)
    assert torch.equal(copy(overlapping, torch.empty(40), 40), torch.arange(40.0))


def test_in_place_is_fine():
    x, row = torch.randn(3, 16), torch.randn(16)
    expected = x + row
    add_kernel[(3,)](x, row, x, BLOCK=BLOCK)
    assert torch.equal(x, expected)


def test_launches_do_not_race_with_each_other():
    x = torch.zeros(40)
    for _ in range(2):
        copy(x, x, 40)
        copy(x[8:], x, 16)


def test_elements_of_a_view():
    whole = torch.empty(4, 6, 5)
    turned, expanded = whole.permute(2, 0, 1), whole[:1].expand(7, 6, 5)
    for view in (whole, whole[1:, ::2, 1:4], turned, expanded, whole[:, 2], whole[2:2]):
        elements = Elements(view.shape, view.stride())
        places = whole.untyped_storage().nbytes() // 4
        belongs = torch.zeros(places, dtype=torch.bool)
        belongs.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        found = elements.contain(torch.arange(places).numpy() - view.storage_offset())
        assert found.tolist() == belongs.tolist()
    far = torch.tensor([2**40 + 18, 2**40 + 19]).numpy()
    assert Elements((5, 7), (2**40, 3)).contain(far).tolist() == [True, False]
    assert Elements((4, 6, 5), (30, 5, 1)).index(47) == (1, 3, 2)
    with pytest.raises(ValueError, match="overlaps itself, too large to list"):
        Elements((10**5, 10**5), (1, 1))


@triton.jit
def tiles_kernel(x, out, columns, step, BLOCK: tl.constexpr):
    """Copies tiles by descriptors: what lies beyond their ends is read as zeros, and not written."""
    row = tl.program_id(0) * step
    for column in range(0, columns, BLOCK):
        out.store([row, column], x.load([row, column]))


def tiles(x, out, shape=None, step=BLOCK):
    """`shape` of both descriptors."""
    shape = list(x.shape) if shape is None else shape
    described = [TensorDescriptor(t, shape, [*t.stride()], [BLOCK, BLOCK]) for t in (x, out)]
    tiles_kernel[(triton.cdiv(shape[0], step),)](*described, shape[1], step, BLOCK=BLOCK)
    return out


def test_descriptors_that_are_right_pass_and_are_counted_within_their_ends():
    storage = torch.full((40, 40), torch.nan)
    x = storage[:20, :24].copy_(torch.randn(20, 24))
    with recording() as record:
        assert torch.equal(tiles(x, torch.empty(20, 24)), x)
    assert (record.read, record.written) == (20 * 24 * 4, 20 * 24 * 4)
    assert record.stored == {"tiles_kernel": {"out"}}
    with recording(uncounted={"out"}, once={"x"}) as record:
        tiles(x, torch.empty(20, 24))
        tiles(x, torch.empty(20, 24))
    assert (record.read, record.written) == (20 * 24 * 4, 0)  # the second reads what has been read


def test_a_descriptor_of_more_than_the_tensor():
    storage = torch.zeros(40, 40)
    with pytest.raises(BoundsError, match=r"tiles_kernel, .*: load at no element of x of shape .*, within its storage"):
        tiles(storage[:20, :24], torch.empty(20, 24), [21, 24])
    with pytest.raises(BoundsError, match=r"load at no element of x"):
        tiles(storage[:20, :24], torch.empty(20, 24), [20, 28])
    with pytest.raises(BoundsError, match=r"store at no element of out of shape \(20, 24\)"):
        tiles(storage, torch.empty(20, 24), [21, 24])


def test_programs_that_meet_by_descriptors():
    with pytest.raises(
        RaceError, match=r"write-write race of programs \(0, 0, 0\) and \(1, 0, 0\) at element \(8, 0\)"
    ):
        tiles(torch.zeros(32, 16), torch.empty(32, 16), step=BLOCK // 2)
    x = torch.zeros(32, 16)
    with pytest.raises(RaceError, match="write-read race"):
        tiles(x, x, step=BLOCK // 2)


def test_coordinates_of_descriptors_that_overflow():
    x, out = (torch.empty(2**31 - 1, 16, device="meta") for _ in range(2))
    with probing():
        tiles(x, out)
    with pytest.raises(OverflowFault, match="multiply of .* and 32 gives .*, which does not fit into int32"), probing():
        described = [TensorDescriptor(t, [*t.shape], [*t.stride()], [BLOCK, BLOCK]) for t in (x, out)]
        tiles_kernel[(2**27,)](*described, 16, 2 * BLOCK, BLOCK=BLOCK)


def test_descriptors_of_rows_that_are_not_aligned():
    with pytest.raises(AssertionError, match="16-byte aligned"):
        tiles(torch.zeros(20, 18), torch.empty(20, 18))
    with pytest.raises(AssertionError, match="16-byte aligned"):
        tiles(torch.zeros(401)[1:].view(20, 20), torch.empty(20, 20))
