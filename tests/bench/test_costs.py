"""FLOPs and exponents by counting, memory as it is planned and measured, other networks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planecycle_fast.bench import costs
from planecycle_fast.bench.cells import DTYPES, MODES, PEERS, STEPS, Cell, parse_volume
from planecycle_fast.bench.contenders import NotHereError
from planecycle_fast.bench.laws import fit_exponent, fit_laws
from planecycle_fast.bench.peers import WIDTH, ACSConv, peer, to_acs
from planecycle_fast.cost.planning import plan

from .small_bench import small  # noqa: F401

GLOBALS, CHANNELS, LAYERS = 5, 128, 2


def attention_flops(sequences):  # queries times keys, and scores times values, two for a multiplication and an addition
    return sum([2 * 2 * number * rows**2 * CHANNELS for number, rows in sequences])


def test_attention_flops_are_those_of_the_formula(small):  # noqa: F811
    depth, height, width = 4, 6, 2
    hw, dw = (depth, GLOBALS + height * width), (height, GLOBALS + depth * width)
    expected = {"slice2d": [hw, hw], "PCg": [hw, dw], "PCm": [hw, dw], "flatten3d": [(1, GLOBALS + 48)] * 2}
    for mode, sequences in expected.items():
        assert costs.flops("ViT-S", mode, "1x4x96x32", "inference").attention == attention_flops(sequences)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mode", MODES)
def test_planned_flops_are_flop_counters(small, mode, step):  # noqa: F811
    counted = costs.flops("ViT-S", mode, "2x4x64", step).total
    planned = plan(small("ViT-S", "meta", torch.float32), (2, 3, 4, 64, 64), step=step, **MODES[mode]).flops
    assert planned == pytest.approx(counted, rel=0.01)


def test_exponents_of_known_laws():
    sizes = [2, 3, 5, 9]
    assert fit_exponent(sizes, [7 * n**3.5 for n in sizes]) == pytest.approx(3.5)
    assert fit_exponent([10, 100], [4, 4]) == pytest.approx(0)
    for wrong in (([2], [3]), ([2, 2], [3, 4]), ([1, 2], [0, 1]), ([1, 2, 3], [1, 2])):
        with pytest.raises(ValueError, match="sizes must be"):
            fit_exponent(*wrong)


def test_attention_of_flatten3d_costs_d_times_as_much(small):  # noqa: F811
    found = {law.mode: law for law in fit_laws("ViT-S", ("slice2d", "PCg", "flatten3d"))}
    assert found["flatten3d"].cubes == pytest.approx(6, abs=0.05) and found["flatten3d"].depths == pytest.approx(
        2, abs=0.01
    )
    assert found["slice2d"].depths == pytest.approx(1, abs=1e-6)
    assert found["PCg"].cubes == pytest.approx(found["slice2d"].cubes, abs=1e-6) == pytest.approx(4.9, abs=0.05)
    ratios = [b / a for a, b in zip(found["PCg"].attention, found["flatten3d"].attention)]
    assert ratios[-1] == pytest.approx(32, rel=0.02)


def test_peak_of_memory():
    def run(x):
        a = x + 1  # 1 MiB
        b = torch.cat([a, a])  # and 2
        del a
        return b * 2  # and 2: 4 in the end

    assert costs.peak_bytes(run, torch.zeros(2**18)) == pytest.approx(4 * 2**20, abs=1000)


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to"
            ),
            True,
        ),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory(error, is_it):
    assert costs.is_out_of_memory(error) is is_it


def test_torch_says_so_on_a_cpu():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert costs.is_out_of_memory(caught.value)


def test_acs_convolutions_look_along_three_planes():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(2, 6, 3, padding=1), torch.randn(1, 2, 5, 6, 7)
    out = ACSConv(conv)(x)
    assert out.shape == (1, 6, 5, 6, 7)
    for axis in range(3):  # each third is the 2D convolution of every slice along its axis
        slices = x.movedim(2 + axis, 1).flatten(0, 1)
        part = slice(2 * axis, 2 * axis + 2)
        expected = F.conv2d(slices, conv.weight[part], conv.bias[part], padding=1).movedim(0, 1 + axis)[None]
        torch.testing.assert_close(out[:, part], expected)


def test_acs_networks_keep_their_weights():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 4, 1)
    )
    before = {name: t.clone() for name, t in model.state_dict().items()}
    made = to_acs(model).eval()
    assert {name: t.shape for name, t in made.state_dict().items()} == {name: t.shape for name, t in before.items()}
    assert all([torch.equal(t, before[name]) for name, t in made.state_dict().items()])
    assert made(torch.randn(1, 3, 8, 16, 12)).shape == (1, 4, 2, 4, 3)


def test_memory_of_a_peer_is_foreseen():
    try:
        need = [costs.peer_peak(Cell("ACS ResNet-50", dtype, "1x8x64", "inference", "", "peer")) for dtype in DTYPES]
    except NotHereError as error:
        pytest.skip(str(error))
    stem = 64 * 4 * 32 * 32  # elements that the first layer makes, and its norm again
    assert need[0] >= 2 * 4 * stem and need[1] == need[2] == pytest.approx(need[0] / 2, rel=0.01)


@pytest.mark.parametrize("name", PEERS)
def test_peers_give_one_vector_per_volume(name):
    volume = parse_volume("2x8x64")
    try:
        run = peer(name, volume, "meta", torch.float32)
    except NotHereError as error:
        pytest.skip(str(error))
    with torch.no_grad():
        patches, vectors = run(torch.empty(volume.shape, device="meta"))
    assert patches is vectors and vectors.shape == (2, WIDTH[name])
    assert not run.training


def test_vivit_says_what_it_does_not_take():
    with pytest.raises(NotHereError, match="even number of slices"):
        peer("ViViT-B", parse_volume("1x7x64"), "meta", torch.float32)
