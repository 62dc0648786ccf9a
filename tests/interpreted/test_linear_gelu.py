"""The Triton kernel of linear_gelu passes everything, and refuses what it does not take."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import planecycle_fast as pcf
from planecycle_fast.cost.meter import Meter
from planecycle_fast.ops import linear_gelu, linear_gelu_ref
from planecycle_fast.ops.activations import linear_gelu as op
from planecycle_fast.ops.activations import linear_gelu_table
from planecycle_fast.ops.activations import linear_gelu_triton as kernels
from planecycle_fast.ops.activations.linear_gelu import why_not_linear_gelu
from planecycle_fast.ops.activations.linear_gelu_table import NARROW, WIDE, tiling
from planecycle_fast.ops.activations.linear_gelu_triton import OP
from planecycle_fast.ops.registry import Cost

from ..host_models import BY_NAME
from ..kernelcheck.budget import check_bits
from ..kernelcheck.harness import op_tests
from ..kernelcheck.observers import Observer, observing
from ..kernelcheck.recorder import recording
from ..specs.linear_gelu import SPEC, case

TestLinearGelu = op_tests(SPEC, examples=25)

DTYPES = [torch.float16, torch.bfloat16]


def through(values):
    """GELU of values, by a layer that passes them on."""
    values = torch.stack([values, *[torch.zeros_like(values)] * 7], -1)
    return linear_gelu(values, torch.eye(8, dtype=values.dtype), backend="triton")[:, 0]


@pytest.mark.parametrize("dtype, few", [(torch.float16, 1e-5), (torch.bfloat16, 4e-4)], ids=["half", "bf16"])
def test_every_value_of_gelu_is_rounded_once(dtype, few):
    """All there are between -5.5 and 20: within one rounding, and so many more of the value itself."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    x = bits[(bits >= -5.5) & (bits <= 20)]
    got, exact = through(x).double(), x.double() * torch.special.ndtr(x.double())
    info = torch.finfo(dtype)
    assert ((got - exact).abs() <= exact.abs() * (info.eps / 2 + few) + info.smallest_normal * info.eps).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_from_zero_it_is_zero_or_the_value(dtype):
    x = torch.tensor([-6.0, -10.0, -100.0, -6e4, 9.0, 100.0, 6e4, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    got = through(x)
    assert (got[:4].abs() < 1.2e-7).all() and (got[1:4].signbit()).all()
    check_bits("values", got[4:8], x[4:8])
    assert got[8:].isnan().all()  # as in float64: infinity times zero


def test_x_is_read_once_and_the_result_written_once():
    x, weight, bias = torch.zeros(300, 64).half(), torch.zeros(512, 64).half(), torch.zeros(512).half()
    assert OP.cost(x, weight, bias) == OP.cost(x, weight, None) == Cost(300 * 64 * 2, 300 * 512 * 2, 1)


def test_tiles_follow_the_hidden_channels():
    assert [tiling(hidden) for hidden in (1536, 3072, 4096, 2048, 392)] == [WIDE] * 5
    assert [tiling(hidden) for hidden in (8, 128, 384)] == [NARROW] * 3


class Grids(Observer):
    def __init__(self):
        self.grids = []

    def launched(self, launch):
        self.grids.append(launch.grid[0])


def test_as_many_programs_as_tiles_and_no_more_than_multiprocessors():
    with observing(Grids()) as seen:
        for rows, hidden in ((1, 8), (129, 512), (128 * 67, 512)):
            SPEC.fast(**case((rows,), 8, hidden).make(torch.bfloat16))
    assert seen.grids == [1, 4, 132]


class OnGpu(torch.Tensor):
    """What its body asks of a tensor on a GPU, without one."""

    device = torch.device("cuda", 0)


def test_a_gpu_says_how_many_programs_run_at_once(monkeypatch):
    launched = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=7))
    monkeypatch.setattr(kernels, "launch", lambda _, grid, *__, **constants: launched.append((grid, constants)))
    monkeypatch.setattr(kernels, "tiling", lambda hidden: NARROW._replace(programs=2))
    for rows in (128 * 3, 128 * 40):
        tensors = case((rows,), 8, 8).make(torch.bfloat16).values()
        OP.body(*[t.as_subclass(OnGpu) for t in tensors])
    assert [grid for grid, _ in launched] == [(3,), (14,)]
    assert {constants["PROGRAMS"] for _, constants in launched} == {14}


def test_as_many_tiles_as_it_takes(monkeypatch):
    launched = []
    monkeypatch.setattr(kernels, "launch", lambda *arguments, **_: launched.append(arguments))
    x = torch.empty(2**30, 8, dtype=torch.half, device="meta")
    OP.body(x, torch.empty(2**15, 8, dtype=torch.half, device="meta"), None)  # 2**23 by 2**7
    assert len(launched) == 1
    with pytest.raises(ValueError, match=f"1073741824 rows in {2**23 * (2**7 + 1)} tiles; expected at most 2"):
        OP.body(x, torch.empty(2**15 + 256, 8, dtype=torch.half, device="meta"), None)


X, WEIGHT, BIAS = torch.zeros(6, 16).half(), torch.zeros(24, 16).half(), torch.zeros(24).half()


@pytest.mark.parametrize(
    "x, weight, bias, reason",
    [
        (X.float(), WEIGHT.float(), BIAS.float(), "float16 or bfloat16"),
        (X, WEIGHT.bfloat16(), BIAS, "the same of all"),
        (X, WEIGHT, BIAS.float(), "the same of all"),
        (X[:, :12].contiguous(), WEIGHT[:, :12].contiguous(), BIAS, "multiples of 8, got 12 to 24"),
        (X, WEIGHT[:20], BIAS[:20], "multiples of 8, got 16 to 20"),
        (X.T.contiguous().T, WEIGHT, BIAS, "rows of x at one distance"),
        (X.view(2, 3, 16).transpose(0, 1), WEIGHT, BIAS, "rows of x at one distance"),
        (X[:1].expand(6, 16), WEIGHT, BIAS, "rows of x at one distance"),
        (X, WEIGHT.T.contiguous().T, BIAS, "rows of weight at one distance"),
        (X, WEIGHT, torch.zeros(48).half()[::2], "dense bias"),
        (torch.zeros(97).half()[1:].view(6, 16), WEIGHT, BIAS, "rows of x that start at multiples of 16"),
        (torch.zeros(6, 20).half()[:, :16], WEIGHT, BIAS, "rows of x that start at multiples of 16"),
    ],
)
def test_what_it_does_not_take_is_told_by_name(x, weight, bias, reason):
    alike = x.dtype == weight.dtype == bias.dtype
    assert reason in why_not_linear_gelu(x, weight, bias)
    with pytest.raises(ValueError, match=reason if alike else "on the device of x and of its dtype"), torch.no_grad():
        linear_gelu(x, weight, bias, backend="triton")
    if alike:
        check_bits("out", linear_gelu(x, weight, bias), linear_gelu_ref(x, weight, bias))


def test_rows_apart_are_taken_as_they_lie():
    x, weight, bias = case((6,), 16, 24).make(torch.float16).values()
    apart = torch.full((6, 40), torch.nan).half()
    apart[:, :16] = x
    assert why_not_linear_gelu(apart[:, :16], weight, bias) is None
    check_bits("out", SPEC.fast(x, weight, bias), linear_gelu(apart[:, :16], weight, bias, backend="triton"))


def test_an_address_that_only_the_body_sees():
    with pytest.raises(ValueError, match="x must start at a multiple of 16 bytes"):
        OP(torch.zeros(97).half()[1:].view(6, 16), WEIGHT, BIAS)
    with pytest.raises(ValueError, match="1073741825 rows .* at most 2\\*\\*30"):
        OP.body(torch.empty(2**30 + 1, 16, dtype=torch.half, device="meta"), WEIGHT.to("meta"), None)


def test_gradients_are_refused_by_name_and_follow_torch_otherwise():
    x, weight, bias = (t.requires_grad_() for t in case((6,), 16, 24).make(torch.float16).values())
    with pytest.raises(NotImplementedError, match="linear_gelu on backend 'triton' has no gradients"):
        linear_gelu(x, weight, bias, backend="triton")
    with pytest.raises(NotImplementedError, match="has no gradients"):
        OP(x, weight, bias).sum().backward()
    linear_gelu(x, weight, bias).sum().backward()
    expected = torch.autograd.grad(F.gelu(F.linear(x, weight, bias)).sum(), [x, weight, bias])
    for got, other in zip((x.grad, weight.grad, bias.grad), expected):
        check_bits("gradient", got, other)


def test_products_are_counted():
    with Meter() as meter, FlopCounterMode(display=False) as counter:
        linear_gelu(X, WEIGHT, BIAS, backend="triton")
    assert counter.get_total_flops() == meter.flops == 2 * X.numel() * WEIGHT.shape[0]


def test_transforms_are_refused_by_name():
    with pytest.raises(NotImplementedError, match="linear_gelu has no forward-mode .* use backend='reference'"):
        torch.func.vmap(lambda t: linear_gelu(t, WEIGHT, BIAS, backend="triton"))(X[None])


@pytest.fixture
def lifted(monkeypatch):
    """A model whose fc1 the table says to win, where there is no GPU, for any number of rows."""
    model = BY_NAME["timm-dinov2-s"].make().eval().bfloat16()
    fc1 = model.blocks[0].mlp.fc1
    monkeypatch.setattr(op, "LEAST_ROWS", 1)
    monkeypatch.setitem(linear_gelu_table.MEASURED, (0, fc1.in_features, fc1.out_features), (1, 1.0, 2.0))
    return pcf.lift(model, backend="triton")


def taken(lifted, volume):
    """How many blocks took it, and the features."""
    with recording() as record:
        out = lifted(volume).patches
    return record.launches["linear_gelu_kernel"], out


def test_blocks_take_it_in_inference(lifted, monkeypatch):
    volume = BY_NAME["timm-dinov2-s"].volume(batch=1, depth=2, grid=(1, 2)).bfloat16()
    with torch.no_grad():
        count, got = taken(lifted, volume)
        exact = pcf.lift(pcf.unlift(lifted), backend="reference")(volume).patches
        assert count == len(lifted.blocks) == 5
        assert (got - exact).abs().max() < 0.05 * exact.abs().max()
        assert taken(pcf.lift(pcf.unlift(lifted), backend="triton", gelu="tanh_epilogue"), volume)[0] == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert taken(lifted, volume)[0] == 0
        handle = lifted.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None)
        assert taken(lifted, volume)[0] == 4
        handle.remove()
        with monkeypatch.context() as few:
            few.setattr(op, "LEAST_ROWS", 2**16)
            assert taken(lifted, volume)[0] == 0
    assert taken(lifted, volume)[0] == 0  # gradients are recorded
