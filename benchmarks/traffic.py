"""``make traffic``: what one block moves, per change of planes: elements of C per row, launches, copies.

The ledger's rules are those of `planecycle_fast/cost/traffic.py`; an operation of this package counts as one pass that
reads each input once and writes each output once, however many of torch's its reference needs. Forward, without
gradients; nothing is timed. Compared are PlaneCycle and slice2d on the residual stream, and with PLANECYCLE_REPO the
authors' code.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import _disable_current_modes

import planecycle_fast as pcf
from planecycle_fast.bench.table import markdown_table
from planecycle_fast.cost.traffic import Traffic
from planecycle_fast.engine import block, branches, stream
from planecycle_fast.hosts.description import BlockDescription
from planecycle_fast.ops import linear_gelu_ref
from planecycle_fast.ops.choice import Choice
from planecycle_fast.runtime.backends import meta_stands_for_cuda
from tests import peers

OPERATIONS = {  # and where the engine calls them
    "plane_switch": [(stream, "switch_on")], "add_norm": [(block, "add_norm_on")],
    "rope": [(branches, "rope_on"), (branches, "rope_within")],
    "attention": [(branches, "attention_on"), (branches, "attention")],
    "gelu": [(branches, "gelu_ref")], "linear_gelu": [(branches, "linear_gelu_on")],
    "swiglu": [(branches, "swiglu_on")],
}  # fmt: skip
SIZES = (16, 16, 16)  # tokens; alike, so that every plane has as many rows
LONG = (24, 24, 24)  # of sequences whose keys turn before attention
CHANNELS, GLOBALS, PATCH = 384, 5, 16
AUTHORS_PATCH = 4  # smaller pictures for the same tokens


class BlockTraffic(NamedTuple):
    """One block."""

    code: str
    planes: str  # from the plane before to its own
    moved: float  # elements of C per row of the sequence, read and written
    weight_casts: float  # the same, of weights that autocast casts
    launches: int
    copies: int


@contextmanager
def fused(traffic: Traffic, operations: Iterable[str] = OPERATIONS):
    """Counts these operations of the package as one pass each, and not what their reference does inside."""

    def counted(name, function):
        def call(*args, **kwargs):
            versions = [(t, t._version) for t in traffic.tensors([args, kwargs])]
            with _disable_current_modes():
                out = function(*args, **kwargs)
            inputs = [t for t, _ in versions]
            changed = [t for t, version in versions if t._version != version]
            made = [t for t in traffic.tensors(out) if not any(t is other for other in inputs)]
            traffic.add(name, inputs, changed + made)
            return out

        return call

    with ExitStack() as stack:
        for name in operations:
            for module, called in OPERATIONS[name]:
                stack.enter_context(patch.object(module, called, counted(name, getattr(module, called))))
        yield


def of_call(
    code: str, planes: str, call, rows: int, dtype: torch.dtype, operations=OPERATIONS, training: bool = False
) -> BlockTraffic:
    """Counts one call of a block that has `rows` rows; of `operations` as one pass, of others what they declare."""
    unit = rows * CHANNELS * dtype.itemsize
    traffic = Traffic(smallest=rows * CHANNELS // 2, weights=True)
    torch.clear_autocast_cache()  # as at the beginning of a step
    with torch.set_grad_enabled(training), fused(traffic, operations), traffic:
        call()
    casts = traffic.rows.pop("weight casts", None)
    copies = sum(traffic.copies.values())
    moved = (traffic.read + traffic.written) / unit
    return BlockTraffic(code, planes, moved, 0.0 if casts is None else (casts.read + casts.written) / unit,
               traffic.launches + (0 if casts is None else casts.launches), copies)  # fmt: skip


def lifted_rows(
    code: str,
    dtype: torch.dtype,
    autocast: bool = False,
    backend: str = "reference",
    training: bool = False,
    sizes: tuple[int, int, int] = SIZES,
    epilogue: bool = False,
    **settings,
) -> list[BlockTraffic]:
    """Blocks of a lifted ViT-S (timm, one packed qkv), one for each change of planes of the default cycle.

    Forward, and in `training` with a gradient for everything.

    On backend "triton" operations count what they declare, on tensors without data: kernels do not run. `sizes` are
    (D, H, W) in tokens. With `epilogue` fc1 takes GELU into its epilogue, as on GPUs where that is faster.
    """
    import timm

    depth, height, width = sizes
    device, operations = ("cpu", OPERATIONS) if backend == "reference" else ("meta", ("attention",))
    model = timm.create_model("vit_small_patch16_dinov3", pretrained=False, num_classes=0, depth=5).to(dtype).eval()
    calls: list = []
    take = pcf.LiftedBlock.take  # a hook would change what blocks hand on

    def kept(lifted_block: pcf.LiftedBlock, held: list[pcf.Stream], at: stream.Layer, following: object = ()) -> tuple:
        calls.append((lifted_block, pcf.Stream(*held[0]), at))
        return take(lifted_block, held, at)

    volume = torch.randn(1, 3, depth, height * PATCH, width * PATCH, dtype=dtype, device=device)
    rows = depth * (GLOBALS + height * width)
    with ExitStack() as stack:
        stack.enter_context(nullcontext() if backend == "reference" else meta_stands_for_cuda())
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=autocast))
        if epilogue:
            stack.enter_context(patch.object(branches, "linear_gelu_on", linear_gelu_ref))
            stack.enter_context(patch.object(branches, "_in_epilogue", _in_epilogue))
        lifted = pcf.lift(model.to(device), backend=backend, **settings)
        with torch.set_grad_enabled(training), patch.object(pcf.LiftedBlock, "take", kept):
            lifted(volume)
        counted = torch.bfloat16 if autocast else dtype
        found = []
        for lifted_block, came, at in calls[1:]:
            call = partial(lifted_block.take, [came], at)
            found.append(of_call(code, f"{at.old} to {at.new}", call, rows, counted, operations, training))
    return [row for i, row in enumerate(found) if row not in found[:i]]


def _in_epilogue(block: BlockDescription, normed: torch.Tensor, choice: Choice) -> torch.Tensor:
    """As on a GPU that is in the table."""
    return branches.linear_gelu_on(normed, *branches.plain_weights(block))


def authors_rows(dtype: torch.dtype) -> list[BlockTraffic]:
    """Blocks of the authors' own code, converted by their converter; each goes from HW to its plane and back."""
    model_class, converter = peers.authors()
    model = model_class(
        embed_dim=CHANNELS, num_heads=6, depth=3, patch_size=AUTHORS_PATCH, n_storage_tokens=GLOBALS - 1,
        layerscale_init=0.3, pos_embed_rope_dtype="fp32", block_type="PlaneCycle",
    )  # fmt: skip
    model.init_weights()
    model = converter()(model).to(dtype).eval()
    calls = []
    handles = [b.register_forward_pre_hook(lambda m, args: calls.append((m, args))) for b in model.blocks]
    with torch.no_grad():
        model(torch.randn(1, 3, SIZES[0], SIZES[1] * AUTHORS_PATCH, SIZES[2] * AUTHORS_PATCH, dtype=dtype))
    for handle in handles:
        handle.remove()
    rows = SIZES[0] * (GLOBALS + SIZES[1] * SIZES[2])
    names = {"HW": "HW to HW", "DW": "HW to DW to HW", "DH": "HW to DH to HW"}
    return [
        of_call("authors' code", names[their_block.plane], partial(their_block, *args), rows, dtype)
        for their_block, args in calls
    ]


def table(dtype: torch.dtype = torch.bfloat16) -> list[BlockTraffic]:
    """All rows; the authors' only where PLANECYCLE_REPO names a checkout."""
    rows = lifted_rows("planecycle", dtype)
    rows += lifted_rows("planecycle, epilogue", dtype, epilogue=True)
    rows += lifted_rows("planecycle PCm", dtype, pool_method="PCm")
    rows += lifted_rows("slice2d", dtype, mode="slice2d")
    rows += lifted_rows("planecycle, autocast", torch.float32, autocast=True)
    own = dict(backend="triton", attention="triton")
    rows += lifted_rows("planecycle, own attention, 261 rows", dtype, **own)
    rows += lifted_rows("planecycle, own attention, 581 rows", dtype, sizes=LONG, **own)
    return rows + (authors_rows(dtype) if "PLANECYCLE_REPO" in os.environ else [])


def main() -> None:
    torch.manual_seed(0)
    rows = [(row.code, row.planes, f"{row.moved:.1f}", f"{row.weight_casts:.1f}", *row[4:]) for row in table()]
    headings = ("code", "planes", "moved (C per row)", "weight casts", "launches", "copies")
    print("\n".join(markdown_table(headings, rows, 2)))
    if "PLANECYCLE_REPO" not in os.environ:
        print("\nSet PLANECYCLE_REPO to a checkout of HINTLab/PlaneCycle for the authors' code.")


if __name__ == "__main__":
    main()
