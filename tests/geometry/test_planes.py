"""Planes, cycles and row maps."""

import itertools

import pytest
import torch

from planecycle_fast.geometry.planes import DEFAULT_CYCLE, PLANES, Plane, parse_cycle, parse_plane, row_map

from .. import naive

SIZES = [(2, 3, 5), (1, 4, 7), (5, 1, 3), (3, 2, 1), (1, 1, 1)]


@pytest.mark.parametrize("sizes", SIZES)
def test_slices_and_grid_follow_the_table(sizes):
    d, h, w = sizes
    expected = {"HW": (d, (h, w)), "DW": (h, (d, w)), "DH": (w, (d, h)), "DHW": (1, (d, h, w))}
    for name, plane in PLANES.items():
        assert (plane.slices(sizes), plane.grid(sizes)) == expected[name]
        assert plane.length(sizes) * plane.slices(sizes) == d * h * w


def numbered_rows(plane, sizes, num_globals):
    """Row number of every voxel, (D, H, W), for one volume in the order of `plane`, by moving axes."""
    slices, length = plane.slices(sizes), plane.length(sizes)
    rows = torch.arange(slices * (num_globals + length)).view(slices, -1)[:, num_globals:]
    if plane.name == "DHW":
        return rows.reshape(sizes)
    axis = naive.BATCH_AXIS[plane.name] - 1
    moved = [sizes[axis], *(n for a, n in enumerate(sizes) if a != axis)]
    return rows.reshape(moved).movedim(0, axis)


@pytest.mark.parametrize("num_globals", [0, 1, 5])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("old, new", list(itertools.product(PLANES.values(), repeat=2)), ids=str)
def test_row_map_names_the_same_voxel(old, new, sizes, num_globals):
    index = row_map(old, new, sizes, num_globals).index()
    where_old, where_new = numbered_rows(old, sizes, num_globals), numbered_rows(new, sizes, 0)
    expected = torch.empty_like(index)
    expected[where_new.flatten()] = where_old.flatten()
    assert torch.equal(index, expected)


def test_parse_cycle():
    assert [p.name for p in parse_cycle(DEFAULT_CYCLE)] == ["HW", "DW", "DH", "HW"]
    assert parse_cycle("DW, DH,DHW") == tuple(PLANES[n] for n in ("DW", "DH", "DHW"))
    assert parse_cycle([PLANES["DH"]]) == (PLANES["DH"],)


@pytest.mark.parametrize("cycle", [(), [], "", "  "])
def test_empty_cycle(cycle):
    with pytest.raises(ValueError, match="cycle_order must name at least one plane, got an empty cycle"):
        parse_cycle(cycle)


def test_unknown_planes():
    with pytest.raises(ValueError, match=r"cycle_order\[1\] must be one of HW, DW, DH, DHW, got 'WH'"):
        parse_cycle(("HW", "WH"))
    with pytest.raises(TypeError, match=r"cycle_order\[0\] must be the name of a plane, got int 3"):
        parse_cycle([3])
    with pytest.raises(TypeError, match="cycle_order must be a sequence of plane names, got int 4"):
        parse_cycle(4)
    with pytest.raises(ValueError, match="plane must be one of"):
        parse_plane("hw")
    with pytest.raises(ValueError, match=r"cycle_order\[1\] must be one of HW, DW, DH, DHW, got ''"):
        parse_cycle("HW,,DW")
    with pytest.raises(ValueError, match="plane must be one of"):
        parse_plane(Plane("XY", (0,), (1, 1)))
