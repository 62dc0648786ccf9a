"""add_norm for the test bed, with and without a change of planes: what a boundary of blocks may ask for."""

import itertools

import torch

from planecycle_fast.geometry.planes import DH, DHW, DW, HW, PLANES
from planecycle_fast.geometry.pooling import GLOBALS_AT, POOL_METHODS, transition
from planecycle_fast.ops import Norm, plane_switch, plane_switch_ref
from planecycle_fast.ops.residual.add_norm_autograd import fake
from planecycle_fast.ops.residual.add_norm_backward_triton import BACKWARD
from planecycle_fast.ops.residual.add_norm_triton import OP

from ..kernelcheck.spec import Case, Spec

PAIRS = list(itertools.product(PLANES.values(), repeat=2))
VECTORS = ("scale", "weight", "bias")
ALL = ("branch", *VECTORS)
KINDS = [  # which tensors there are besides x, whether rms
    (ALL, False), (("branch", "weight", "bias"), False), (("branch", "scale", "weight"), True),
    (("weight", "bias"), False), (("branch", "scale"), None), (("branch", "weight"), True), (("branch",), None),
    (("branch", "scale", "weight"), False), ((), True), (("branch", "scale"), False),
]  # fmt: skip


def case(old, new, sizes, g, channels, batch=1, pool_method="PCg", globals_at="depth", name="", given=ALL, rms=False,
         norm_dtype=None, narrower=None, eps=1e-6):  # fmt: skip
    """`rms` None: no norm."""
    m = transition(old.slices(sizes), new.slices(sizes), sizes[0], pool_method, globals_at)
    rows = (batch * old.slices(sizes), g + old.length(sizes), channels)
    tensors = {"x": rows} | ({"branch": rows} if "branch" in given else {})
    tensors |= {name: (channels,) for name in VECTORS if name in given}
    kind = "sum" if rms is None else "rms" if rms else "layer"
    return Case(
        tensors=tensors,
        settings=dict(old=old, new=new, sizes=sizes, num_globals=g, transition=m, eps=eps, rms=rms,
                      norm_dtype=norm_dtype),
        name=name or f"{old}-{new}-{pool_method}-{globals_at}-{kind}-{'-'.join(given)}",
        narrower=narrower or {},
    )  # fmt: skip


def on(function, **fixed):
    """`plane_switch` as a function of tensors by name."""

    def call(x, old, new, sizes, num_globals, transition, eps, rms, norm_dtype, branch=None, scale=None, weight=None,
             bias=None):  # fmt: skip
        norm = None if rms is None else Norm(weight, bias, eps, rms)
        return function(
            x, old, new, sizes, num_globals, transition, branch, scale, norm, norm_dtype=norm_dtype, **fixed
        )

    return call


def op_arguments(tensors, settings, forward_op=OP, backward_op=BACKWARD):
    """The call that `plane_switch` makes, and the one of its backward."""
    m, rms = settings["transition"], settings["rms"]
    old, new, sizes, g = (settings[name] for name in ("old", "new", "sizes", "num_globals"))
    x, branch, *vectors = [None if t is None else t.contiguous() for t in map(tensors.get, ("x", *ALL))]
    kind = "none" if rms is None else "rms" if rms else "layer"
    where = (old.name, new.name, list(sizes), g, m.num_prev if m.via is None else m.via, m.mean)
    forward = (x, branch, *vectors, *where, kind, settings["eps"], settings["norm_dtype"])
    with torch.no_grad():
        y, normed, mean, rstd = fake(*forward) if x.device.type == "meta" else forward_op(*forward)
    y = y if y.numel() or not x.numel() else x
    grads = [None if not t.numel() and x.numel() else torch.ones_like(t) for t in (y, normed)]
    alike = branch is None or (vectors[0] is None and branch.dtype == x.dtype)
    wanted = [v is not None for v in vectors]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    backward = (
        *grads, y, mean, rstd, vectors[1], branch if wanted[0] else None, vectors[0], *where, kind, wanted, x.dtype,
        None if alike else branch.dtype, wide,
    )  # fmt: skip
    return [(forward_op, forward), (backward_op, backward)]


def groups(t, settings):
    if t.ndim == 1:
        return {"vector": t}
    g = settings["num_globals"]
    return {"globals": t[:, :g], "patches": t[:, g:]}


def named_cases():
    ways = itertools.cycle(itertools.product(GLOBALS_AT, (1, 2), (2, 1, 5)))
    kinds = itertools.cycle(KINDS)
    for old, new in PAIRS:
        for pool_method in POOL_METHODS if new != DHW else ("PCg",):
            (globals_at, batch, g), (given, rms) = next(ways), next(kinds)
            yield case(old, new, (3, 4, 2), g, 24, batch, pool_method, globals_at, given=given, rms=rms)
    half = torch.bfloat16
    yield case(HW, DW, (3, 4, 2), 2, 24, 2, name="autocast", norm_dtype=half, narrower={"branch": half})
    yield case(HW, HW, (3, 4, 2), 0, 40, name="autocast in place", norm_dtype=half, narrower={"branch": half})
    yield case(HW, DW, (5, 7, 3), 0, 8, 2, name="no globals")
    yield case(HW, HW, (4, 3, 2), 0, 16, name="norm alone", given=("weight", "bias"))
    yield case(DW, DH, (1, 1, 1), 5, 32, name="ones")
    yield case(HW, DHW, (13, 2, 3), 2, 8, name="prime depth, to one slice")
    yield case(DHW, DH, (2, 3, 11), 17, 8, name="many globals, from one slice")
    yield case(DW, DH, (6, 4, 4), 3, 8, name="bands of different bins at equal sizes")
    yield case(HW, DH, (2, 9, 5), 1, 384, name="ViT-S channels, in two pieces")
    yield case(HW, DW, (20, 9, 1), 1, 140, pool_method="PCm", name="more slices than a tile has, a short tail")
    yield case(HW, DW, (3, 2, 2), 1, 1025, name="a head and one channel")
    yield case(DW, HW, (2, 3, 2), 2, 2048, name="one row to a tile")


def huge_cases():
    yield case(HW, DW, (1024, 1024, 1023), 5, 32, name="2^30 tokens with globals")
    yield case(DH, HW, (64, 256, 256), 5, 4096, 40, name="2^39 elements in 40 volumes")
    yield case(DHW, DH, (2**12, 2**12, 2**6), 3, 64, 3, globals_at="plane", name="from one slice")
    yield case(HW, DW, (100_000, 10_000, 1), 0, 8192, name="100,000 slices, 8192 channels")
    yield case(HW, DW, (32_000, 30_000, 1), 5, 100, name="32,000 slices with globals")
    yield case(DW, HW, (3, 2, 2), 2**28, 64, name="2^28 globals")
    yield case(DW, DH, (3, 2, 2), 2**28, 64, pool_method="PCm", name="2^28 globals, a mean")


def random_cases():
    from hypothesis import strategies as st

    sizes = st.tuples(*[st.integers(1, 3)] * 3) | st.sampled_from([(1, 1, 7), (5, 2, 3), (4, 3, 1), (7, 1, 2)])
    return st.builds(
        lambda pair, sizes, g, channels, batch, pool, at, kind: case(
            *pair, sizes, g, channels, batch, pool, at, given=kind[0], rms=kind[1]
        ),
        st.sampled_from(PAIRS),
        sizes,
        st.sampled_from([0, 1, 2, 5, 9]),
        st.sampled_from([4, 8, 16, 33, 40, 80]),
        st.integers(1, 2),
        st.sampled_from(POOL_METHODS),
        st.sampled_from(GLOBALS_AT),
        st.sampled_from(KINDS),
    )


BUILDS = [f"{channels} {pool} layer" for channels in (384, 768, 1024, 1280, 4096) for pool in ("PCg", "PCm")]
BUILDS += ["384 none sum", "100 PCg rms"]


def codegen_case(build):
    channels, pool, kind = build.split()
    g = 0 if pool == "none" else 5
    given, rms = {"layer": (ALL, False), "rms": (("branch", "weight"), True), "sum": (("branch", "scale"), None)}[kind]
    m = "PCm" if pool == "PCm" else "PCg"
    return case(DW, DH, (32, 14, 16), g, int(channels), pool_method=m, given=given, rms=rms)


SPEC = Spec(
    op=OP,
    others=(BACKWARD,),
    fast=on(plane_switch, backend="triton"),
    reference=on(plane_switch_ref),
    op_arguments=op_arguments,
    typical=case(HW, DW, (2, 3, 2), 2, 16, batch=2, name="typical"),
    plain=[case(old, new, (4, 4, 4), 5, 16, 2, m, given=given, rms=rms)
           for (old, new, m), (given, rms) in zip(itertools.product((HW, DW, DH), (HW, DW, DH), POOL_METHODS),
                                                  itertools.cycle(KINDS))],
    cases=list(named_cases()),
    small=[
        case(DW, DH, (2, 1, 2), 1, 3),
        case(HW, DW, (1, 3, 1), 1, 2, pool_method="PCm", given=("branch", "scale", "weight"), rms=True),
        case(HW, HW, (1, 1, 2), 0, 5, given=("weight", "bias")),
        case(DHW, DH, (2, 1, 2), 1, 2, given=("branch", "scale"), rms=None),
    ],
    empty=[case(old, new, (2, 3, 4), 2, c, b, name=f"{old}-{new} B={b} C={c}") for old, new, b, c in
           [(HW, DW, 0, 4), (DW, DH, 2, 0), (DHW, HW, 0, 0)]],
    huge=list(huge_cases()),
    strategy=random_cases,
    groups=groups,
    any_strides=False,
    every_dtype=False,
    forward_mode=False,
    cancels=True,
    twice=False,
    uncounted=frozenset({"scale", "weight", "bias", "mean", "rstd", "scale_sums", "weight_sums", "bias_sums",
                         "partials", "sums"}),
    outputs={"add_norm_kernel": {"out", "normed", "mean", "rstd"}, "column_sums_kernel": {"sums"},
             "add_norm_backward_kernel": {"grad_x", "grad_branch", "scale_sums", "weight_sums", "bias_sums"}},
    factors={"build": BUILDS},
    factors_case=codegen_case,
    wide=lambda choice: False,
)  # fmt: skip
