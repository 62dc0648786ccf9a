"""patchify for the test bed: patches of every width, pixels that fill none, rows with room for globals, two dtypes."""

from functools import partial

import torch

from planecycle_fast.ops import patchify, patchify_ref
from planecycle_fast.ops.patch_embedding.patchify_triton import OP

from ..kernelcheck.spec import Case, Spec


def case(size, patch, g=0, batch=1, dtype=None, narrower=None, name=""):
    """`size` is (channels, D, height, width) in pixels; `dtype` the rows'."""
    pixels, of = "x".join(str(n) for n in (batch, *size)), "x".join(str(n) for n in patch)
    return Case(
        tensors={"volume": (batch, *size)},
        settings=dict(patch=patch, num_globals=g, dtype=dtype),
        name=name or f"{pixels} patch {of}, {g} globals",
        narrower={"volume": narrower} if narrower else {},
    )


def op_arguments(tensors, settings):
    """The call that `patchify` makes, and the one of its backward."""
    volume, g = tensors["volume"], settings["num_globals"]
    patch, size = [volume.shape[1], *settings["patch"]], [*volume.shape[2:]]
    dtypes = (volume.dtype, settings["dtype"] or volume.dtype)
    out = OP.overload(volume.to("meta"), patch, size, g, *dtypes, False)
    grad = volume.new_ones(out.shape, dtype=out.dtype, requires_grad=volume.requires_grad)
    return [(OP, (t, patch, size, g, *dtypes, back)) for t, back in ((volume, False), (grad, True))]


def groups(t, settings):
    """Rows of globals and of patches, or pixels."""
    g = settings["num_globals"]
    return {"pixels": t} if t.ndim == 5 else {"globals": t[:, :g], "patches": t[:, g:]}


def named_cases():
    yield case((3, 2, 32, 48), (16, 16), 5, 2, name="ViT's patch")
    yield case((3, 2, 28, 42), (14, 14), 1, 2, name="DINOv2's patch: rows end in zeros")
    yield case((1, 3, 32, 32), (16, 16), 5, name="one channel")
    yield case((3, 2, 37, 45), (16, 16), 4, name="pixels that fill no patch")
    yield case((2, 2, 19, 31), (3, 5), 2, name="patches of odd sizes")
    yield case((1, 1, 1, 1), (1, 1), name="ones")
    yield case((5, 3, 7, 2), (7, 1), 1, 2, name="one patch below, patches a pixel wide")
    yield case((3, 2, 8, 16), (8, 8), 17, name="more globals than patches, more than a tile has")
    yield case((4, 1, 72, 40), (8, 8), name="channels in two blocks, the last one short")
    yield case((3, 1, 9, 330), (2, 3), 3, name="more columns than a tile has")
    yield case((33, 1, 33, 4), (3, 2), 1, name="rows of 198 elements, lines that fill no tile")
    yield case((3, 2, 32, 32), (16, 16), 5, dtype=torch.bfloat16, name="rounded to bf16")
    yield case((3, 1, 28, 30), (14, 14), 1, dtype=torch.float16, name="rounded to fp16, patch 14")
    yield case((3, 1, 32, 32), (16, 16), 1, dtype=torch.float32, narrower=torch.bfloat16, name="bf16 pixels widened")


def huge_cases():
    yield case((3, 100_000, 224, 224), (16, 16), 5, name="100,000 slices")
    yield case((1, 3, 40_000, 50_000), (16, 16), 1, name="2^32 pixels in three slices")
    yield case((3, 1, 2**17, 2**16), (14, 14), 1, name="2^34 pixels in a slice, patch 14")
    yield case((1, 1, 2**28, 3), (1, 1), 1, name="patches of a pixel, 2^28 lines")
    yield case((1, 1, 3, 2**28), (1, 1), 1, name="patches of a pixel, 2^28 columns")
    yield case((2, 40_000, 64, 64), (8, 8), 5, 9, name="360,000 slices in nine volumes")
    yield case((2, 3, 16, 32), (16, 16), 2**28, name="2^28 globals")
    yield case((2, 5, 2**18, 4096), (1, 1), name="2^30 patches in a slice", dtype=torch.float32)
    yield case((1, 2, 32, 48), (16, 16), 1, 100_000, name="100,000 volumes")


def random_cases():
    from hypothesis import strategies as st

    patches = st.tuples(*[st.sampled_from([1, 2, 3, 4, 8])] * 2)
    return st.builds(
        lambda patch, lines, columns, rest, channels, depth, g, batch, dtype: case(
            (channels, depth, lines * patch[0] + min(rest[0], patch[0] - 1), columns * patch[1] + rest[1] % patch[1]),
            patch, g, batch, dtype,
        ),
        patches, st.integers(1, 3), st.integers(1, 4), st.tuples(st.integers(0, 3), st.integers(0, 3)),
        st.integers(1, 3), st.integers(1, 2), st.sampled_from([0, 1, 5]), st.integers(1, 2),
        st.sampled_from([None, None, torch.bfloat16]),
    )  # fmt: skip


def codegen_case(patch, rows):
    """Of four by eight patches; `rows` are their dtype, None: the volume's."""
    return case((3, 3, 4 * patch, 8 * patch), (patch, patch), 5, 2, rows)


SPEC = Spec(
    op=OP,
    fast=partial(patchify, backend="triton"),
    reference=patchify_ref,
    op_arguments=op_arguments,
    typical=case((2, 3, 8, 16), (4, 4), 2, 2, name="typical"),
    plain=[case((3, 4, 64, 64), (16, 16), 5, 2), case((1, 2, 64, 32), (16, 16), 0)],
    cases=list(named_cases()),
    small=[case((2, 2, 4, 5), (2, 2), 1, 2), case((1, 1, 3, 4), (3, 1)), case((3, 1, 2, 4), (2, 4), 2)],
    empty=[case((2, 3, 4, 4), (2, 2), 1, 0, name="none"), case((1, 1, 9, 3), (4, 1), 0, 0, name="none, no globals")],
    huge=list(huge_cases()),
    strategy=random_cases,
    groups=groups,
    exact=frozenset({"pixels", "globals", "patches"}),
    factors={"patch": [16, 14], "rows": [None, torch.bfloat16]},
    factors_case=codegen_case,
    wide=lambda choice: choice["patch"] == 16,  # rows of 14 pixels are not 16 bytes apart
    compiled_for=frozenset({"patch"}),
    outputs={"patchify_kernel": {"rows"}, "patchify_back_kernel": {"volume"}},
)  # fmt: skip
