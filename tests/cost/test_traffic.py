"""The traffic counter counts bytes, copies and launches by the ledger's rules."""

import pytest
import torch

import planecycle_fast as pcf
from benchmarks import traffic as table
from planecycle_fast.cost.traffic import Traffic
from planecycle_fast.geometry.planes import DW, HW
from planecycle_fast.geometry.pooling import transition
from planecycle_fast.ops import plane_switch_ref

from .. import peers
from ..host_models import BY_NAME

X = torch.randn(3, 4, 8)  # 384 bytes
SIZE = X.numel() * 4


def count(function, *args, **settings):
    with Traffic(**settings) as traffic:
        function(*args)
    return traffic


@pytest.mark.parametrize(
    "function, read, written, launches, copies",
    [
        (lambda x: x.transpose(0, 1)[1:].unflatten(-1, (2, 4)), 0, 0, 0, {}),
        (lambda x: x.contiguous(), 0, 0, 0, {}),
        (lambda x: torch.empty_like(x), 0, 0, 0, {}),
        (lambda x: x + 1, SIZE, SIZE, 1, {}),
        (lambda x: x + x, 2 * SIZE, SIZE, 1, {}),
        (lambda x: x.add_(1), SIZE, SIZE, 1, {}),
        (lambda x: x.zero_(), 0, SIZE, 1, {}),
        (lambda x: torch.zeros_like(x), 0, SIZE, 1, {}),
        (lambda x: x.clone(), SIZE, SIZE, 1, {"clone": 1}),
        (lambda x: x.transpose(1, 2).contiguous(), SIZE, SIZE, 1, {"clone": 1}),
        (lambda x: x.transpose(1, 2).reshape(3, -1), SIZE, SIZE, 1, {"clone": 1}),
        (lambda x: torch.cat([x, x]), 2 * SIZE, 2 * SIZE, 1, {"cat": 1}),
        (lambda x: x[:, torch.tensor([0, 0])], SIZE // 2 + 16, SIZE // 2, 1, {"index": 1}),
        (lambda x: torch.sum(x, 0, out=torch.empty(4, 8)), SIZE, SIZE // 3, 1, {}),
        (lambda x: x.transpose_(0, 1).unsqueeze_(0), 0, 0, 0, {}),
        (lambda x: torch.equal(x, x), 2 * SIZE, 0, 1, {}),
        (lambda x: x.copy_(torch.empty_like(x)), SIZE, SIZE, 1, {"copy_": 1}),
        (lambda x: x.to(torch.bfloat16), SIZE, SIZE // 2, 1, {"_to_copy": 1}),
        (lambda x: x[:1].expand(3, 4, 8) * 2, SIZE // 3, SIZE, 1, {}),
        (lambda x: x.sum(), SIZE, 4, 1, {}),
        (lambda x: torch.add(x, 1, out=torch.empty_like(x)), SIZE, SIZE, 1, {}),
    ],
    ids=lambda v: str(v) if isinstance(v, int) else "",
)
def test_single_operations(function, read, written, launches, copies):
    traffic = count(function, X.clone())
    assert (traffic.read, traffic.written, traffic.launches) == (read, written, launches)
    assert traffic.copies == copies


def test_rows_by_operation():
    traffic = count(lambda x: (x + 1) * (x + 2), X)
    assert {name: (row.calls, row.launches) for name, row in traffic.rows.items()} == {"add": (2, 2), "mul": (1, 1)}
    assert traffic.rows["add"].read == traffic.rows["add"].written == 2 * SIZE


def test_backward_counts_too():
    x = X.clone().requires_grad_()
    traffic = count(lambda x: (x * x).sum().backward(), x)
    assert traffic.rows["mul"].calls == 3  # one forward, two backward


def test_small_tensors_can_be_left_out():
    weight = torch.ones(8)
    assert count(lambda x: x * weight, X, smallest=9).read == SIZE


def test_meta_tensors_count_the_same():
    def work(x):
        return torch.cat([x.transpose(1, 2).contiguous().transpose(1, 2), x * 2])

    on_cpu, on_meta = count(work, X), count(work, X.to("meta"))
    assert on_cpu.rows == on_meta.rows


def test_the_reference_reads_and_writes_each_patch_once():
    sizes, channels = (4, 4, 4), 32
    x = torch.randn(4, 16, channels)
    traffic = count(plane_switch_ref, x, HW, DW, sizes, 0, transition(4, 4, 4))
    assert traffic.read == traffic.written == x.numel() * 4
    assert traffic.copies == {"copy_": 1}


@peers.needs_planecycle
@pytest.mark.parametrize(
    "dtype, plane, forward, backward",
    [
        (torch.bfloat16, "HW", 100, 171),
        (torch.bfloat16, "DW", 104, 175),
        (torch.float32, "DH", 72, 135),
    ],
)
def test_the_authors_block(dtype, plane, forward, backward):
    """Elements of C per row, of one ViT-S block. Attention is one operation here, as with FlashAttention."""
    model_class, converter = peers.authors()
    model = model_class(
        embed_dim=384, num_heads=6, depth=1, patch_size=4, n_storage_tokens=4, layerscale_init=0.3,
        pos_embed_rope_dtype="fp32", block_type="PlaneCycle",
    )  # fmt: skip
    model.init_weights()
    model = converter(cycle_order=(plane,))(model).to(dtype).eval()
    inputs = []
    handle = model.blocks[0].register_forward_pre_hook(lambda module, args: inputs.extend(args))
    depth, side = 32, 32
    with torch.no_grad():
        model(torch.randn(1, 3, depth, 4 * side, 4 * side, dtype=dtype))
    handle.remove()
    inputs = [_leaves(value) for value in inputs]
    rows = depth * (5 + side * side)
    unit = rows * 384 * dtype.itemsize
    with Traffic(smallest=rows * 384 // 2) as there:
        out = model.blocks[0](*inputs)
    out = out[0] if isinstance(out, (list, tuple)) else out
    with Traffic(smallest=rows * 384 // 2) as back:
        out.backward(torch.empty_like(out))
    assert round((there.read + there.written) / unit) == forward
    assert round((back.read + back.written) / unit) == backward
    assert there.copies["cat"] == 6 and there.copies["clone"] >= 1


def _leaves(value):
    if isinstance(value, (list, tuple)):
        return [_leaves(v) for v in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


PLANES = ["HW to DW", "DW to DH", "DH to HW", "HW to HW"]


@pytest.mark.parametrize("settings", [{}, {"pool_method": "PCm"}, {"mode": "slice2d"}], ids=str)
def test_a_block_on_the_stream(settings):
    """At most 40 C elements per row, 12 launches, nothing that only copies; and HW to HW costs what slice2d costs."""
    rows = table.lifted_rows("ours", torch.bfloat16, **settings)
    assert [row.planes for row in rows] == (["HW to HW"] if settings.get("mode") == "slice2d" else PLANES)
    for row in rows:
        assert row.moved <= 40.0 and row.launches <= 12 and row.copies == 0 and row.weight_casts == 0, row


@pytest.mark.parametrize(
    "sizes, most, launches", [(table.SIZES, 36.0, 8), ((17, 17, 17), 36.0, 8), (table.LONG, 38.0, 9)], ids=str
)
def test_a_block_with_attention_of_our_own(sizes, most, launches):
    """Queries and keys turn within attention, up to 320 rows; beyond keys turn before, in a pass of their own."""
    rows = table.lifted_rows("ours", torch.bfloat16, backend="triton", attention="triton", sizes=sizes)
    assert [row.planes for row in rows] == PLANES
    for row in rows:
        assert row.moved <= most + 0.01 and (row.launches, row.copies) == (launches, 0), row


def test_a_block_whose_fc1_has_gelu_in_its_epilogue():
    """One launch less, and 8 C less: what goes into GELU is neither written nor read."""
    rows = table.lifted_rows("ours", torch.bfloat16, epilogue=True)
    assert [row.planes for row in rows] == PLANES
    for row in rows:
        assert row.moved <= 32.0 and row.launches == 8 and row.copies == 0, row


def test_weight_casts_under_autocast_stand_alone():
    for row in table.lifted_rows("ours", torch.float32, autocast=True):
        weights = 12 * table.CHANNELS**2 * (4 + 2)  # float32 in, bfloat16 out
        unit = table.SIZES[0] * (table.GLOBALS + table.SIZES[1] * table.SIZES[2]) * table.CHANNELS * 2
        assert row.weight_casts == pytest.approx(weights / unit) and row.moved <= 44.0


def test_a_copy_between_operations_would_be_seen(monkeypatch):
    from planecycle_fast.engine import branches

    own = branches.attention_on
    monkeypatch.setattr(branches, "attention_on", mine := lambda *args: own(*args))
    with table.fused(Traffic()):
        assert branches.attention_on is not mine
    assert branches.attention_on is mine  # what was there is put back
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: own_linear(self, x.clone()))
    row = table.lifted_rows("ours", torch.bfloat16, mode="slice2d")[0]
    assert row.copies == 4 and row.moved > 48


own_linear = torch.nn.Linear.forward


@peers.needs_planecycle
def test_the_authors_rows_of_the_table():
    rows = table.authors_rows(torch.bfloat16)
    assert [row.planes for row in rows] == ["HW to HW", "HW to DW to HW", "HW to DH to HW"]
    assert all(90 < row.moved < 110 and row.copies > 10 and row.launches > 40 for row in rows)


@pytest.mark.parametrize("name", ["timm-dinov3-s", "hf-dinov3", "timm-dinov2-s-reg4", "facebook-stand-in"])
def test_a_volume_enters_and_leaves_without_copies(name):
    """But for its slices, which the convolution wants; class and register tokens are not activations."""
    host = BY_NAME[name]
    lifted, volume = pcf.lift(host.make(), backend="reference"), host.volume(batch=2, depth=4, grid=(4, 4))
    traffic = Traffic(smallest=8 * 16 * 64 // 2)
    with torch.no_grad(), table.fused(traffic), traffic:
        lifted(volume)
    moved = {copy: traffic.rows[copy].read for copy in traffic.copies if traffic.rows[copy].read}
    assert moved == {"clone": volume.numel() * 4}
    assert traffic.rows["plane_switch"].calls == 1 + 5 + 1  # in, between, out
