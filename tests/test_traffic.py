"""The traffic counter counts bytes, copies and launches by the ledger's rules."""

import pytest
import torch

from planecycle_fast.ops import plane_switch_ref
from planecycle_fast.planes import DW, HW
from planecycle_fast.pooling import transition

from . import peers
from .kernelcheck.traffic import Traffic

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
