"""The forward kernels of self_attention, without a GPU: how much of their work is useful, and what it is made of."""

import tempfile

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, to compile kernels")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels are not compiled under TRITON_INTERPRET=1", allow_module_level=True)

from triton.backends.compiler import GPUTarget

from planecycle_fast.ops.multihead_attention.self_attention_tiles import holds_keys, in_tiles, tiles, useful_share

from ..kernelcheck.codegen import ARCHITECTURES, _run, check_binary, compile_variant
from ..kernelcheck.launches import OPTIONS, launches_of, variants
from ..specs.self_attention import MODELS, SPEC, case, codegen_case

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("rows, least", [(21, 0.4), (261, 0.75), (1029, 0.85)])
def test_products_are_little_padding(rows, least):
    """Issue's bars, head dim 64; counted from the tiles of the launch as well as by `useful_share`."""
    launch = launches_of(SPEC, case((rows,), 0, 6, 64, 2, kind="dense", load="q", device="meta"), BF16)[0]
    given = launch.constants
    queries = -(-rows // given["QUERIES"]) * given["QUERIES"]
    keys = given.get("FULL", -(-rows // given["KEYS"])) * given["KEYS"] + given.get("TAIL", 0)
    issued = queries * keys * (2 * given["BLOCK_J"] + given["BLOCK_C"])
    assert useful_share(rows, 64, BF16) == rows**2 * 128 / issued >= least


def test_tiles_cover_all_keys_and_few_more():
    for rows in range(1, 400):
        for dtype in (BF16, FP32):
            found = tiles(rows, 64, dtype)
            assert (found.regime != "general") == holds_keys(rows, 64, dtype)
            covered = found.full * found.keys + found.tail if found.regime == "short" else found.keys
            if found.regime != "general":
                assert rows <= covered < 2 * rows + 16
    assert in_tiles(261, 64) == (4, 16) and in_tiles(256, 64) == (4, 0) and in_tiles(300, 64) == (4, 64)


def test_one_build_for_all_sizes():
    """A symbol for rows takes the kernel that any number of rows takes."""
    cases = [case((n,), g, heads, 64, sequences, kind="dense", load="q", device="meta") for n in (400, 512, 1029)
             for g, heads, sequences in ((0, 6, 1), (5, 12, 16))]  # fmt: skip
    launches = [launches_of(SPEC, c, BF16)[0] for c in cases]
    assert len(variants(launches, [True])) == 1
    assert tiles(object(), 64, BF16).regime == "general"


def test_general_tiles_are_of_wgmma():
    """16 bits on an H100: products of a warp group, of keys in shared memory."""
    launch = launches_of(SPEC, codegen_case("1029 rows of 64, keys turned"), BF16)[0]
    variant = launch.variant(True, 90)
    options = {name: getattr(variant.options, name) for name in OPTIONS}
    compiled = triton.compile(variant.source(), target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        sass = _run(triton.knobs.nvidia.nvdisasm.path, "-c", cubin.name)
    assert "HGMMA" in sass and "HMMA" not in sass


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_products_run_on_tensor_cores(model, dtype, arch):
    """All but those of wide heads in float32 whose keys turn for each tile of queries: fused multiply-adds."""
    launch = launches_of(SPEC, codegen_case(model), dtype)[0]
    exact = launch.constants["PRECISION"] == "ieee" and dtype == FP32
    assert not exact or (model == "261 rows of 96" and dtype == FP32)
    check_binary(compile_variant(launch.variant(True, arch), arch), arch, True, 4, tensor_cores=not exact)
