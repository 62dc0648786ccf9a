"""Which cells a sweep takes, and what its arguments refuse."""

import pytest
import torch

from planecycle_fast.bench import cells as which
from planecycle_fast.bench.cells import Cell, choices, full, groups, parse_volume, quick

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_volumes_by_name():
    volume = parse_volume("4x32x160")
    assert volume.shape == (4, 3, 32, 160, 160) and volume.tokens == (32, 10, 10) and volume.patches == 3200
    assert str(volume) == "4x32x160"
    assert str(parse_volume("1x8x64x96")) == "1x8x64x96" and parse_volume("1x8x64x96").shape == (1, 3, 8, 64, 96)


@pytest.mark.parametrize("text", ["", "64", "1x64", "1x8x60", "0x8x64", "1x8x64x", "1x8x64x64x64", "axbxc", "1x8x-64"])
def test_volumes_that_are_none(text):
    with pytest.raises(ValueError, match="volumes must"):
        parse_volume(text)


def test_choices():
    assert choices(None, which.VITS, "models") is None
    assert choices("vit-b, ViT-S,vit-b", which.VITS, "models") == ["ViT-B", "ViT-S"]
    with pytest.raises(ValueError, match="models must be some of ViT-S, ViT-B.* got 'resnet'"):
        choices("resnet", which.VITS, "models")
    with pytest.raises(ValueError, match="steps"):
        choices(",", which.STEPS, "steps")


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("make", [quick, full])
def test_cells_are_of_known_names_and_no_two_are_the_same(make, device):
    cells = make(device)
    assert len(set(cells)) == len(cells)
    for cell in cells:
        assert (cell.mode in which.MODES and cell.code in which.CODES) != (cell.model in which.PEERS)
        assert cell.step in which.STEPS and cell.dtype == ("bf16" if device == CUDA else "fp32")
        assert str(parse_volume(cell.volume)) == cell.volume
        assert cell.code != which.GRAPH or (device == CUDA and cell.step in ("inference", "finetune"))


def test_the_full_sweep_is_everything():
    cells = full(CUDA)
    for axis, values in {
        "model": (*which.VITS, *which.PEERS), "volume": which.FULL_VOLUMES, "step": which.STEPS,
        "mode": (*which.MODES, ""), "code": (*which.CODES, which.PEER),
    }.items():  # fmt: skip
        assert {getattr(cell, axis) for cell in cells} == set(values)


def test_the_quick_sweep_shows_every_mode_implementation_and_step():
    cells = quick(CPU)
    assert {cell.mode for cell in cells} == {*which.MODES, ""}
    assert {cell.code for cell in cells} == {which.FAST, which.REFERENCE, which.AUTHORS, which.PEER}
    assert {cell.step for cell in cells} == set(which.STEPS) and {cell.model for cell in cells} == {
        "ViT-S",
        *which.PEERS,
    }


def test_what_is_asked_for_is_taken():
    cells = quick(CPU, models=["ViT-B"], volumes=["2x4x64"], dtypes=["bf16"], steps=["finetune"])
    assert {cell.group for cell in cells} == {("ViT-B", "bf16", "2x4x64", "finetune")}
    assert {cell.mode for cell in cells} == set(which.MODES)


def test_groups_are_what_is_measured_in_turns():
    cells = [Cell("m", "fp32", volume, "inference", "PCg", code) for code in "ab" for volume in "xy"]
    assert [[(cell.volume, cell.code) for cell in group] for group in groups(cells)] == [
        [("x", "a"), ("x", "b")], [("y", "a"), ("y", "b")],
    ]  # fmt: skip
