"""plane_switch for the test bed: every pair of planes, awkward sizes, both pool methods."""

import itertools
from dataclasses import replace
from functools import partial

import torch

from planecycle_fast.geometry.planes import DH, DHW, DW, HW, PLANES
from planecycle_fast.geometry.pooling import GLOBALS_AT, POOL_METHODS, transition
from planecycle_fast.ops import plane_switch, plane_switch_ref
from planecycle_fast.ops.plane_change.plane_switch_triton import OP

from ..kernelcheck.spec import Case, Spec

PAIRS = list(itertools.product(PLANES.values(), repeat=2))


def case(old, new, sizes, g, channels, batch=1, pool_method="PCg", globals_at="depth", name=""):
    m = transition(old.slices(sizes), new.slices(sizes), sizes[0], pool_method, globals_at)
    return Case(
        tensors={"x": (batch * old.slices(sizes), g + old.length(sizes), channels)},
        settings=dict(old=old, new=new, sizes=sizes, num_globals=g, transition=m),
        name=name or f"{old}-{new}-{pool_method}-{globals_at}",
    )


def op_arguments(tensors, settings):
    """The call that `plane_switch` makes, and the one of its backward."""
    x, m = tensors["x"], settings["transition"]
    old, new, sizes, g = (settings[name] for name in ("old", "new", "sizes", "num_globals"))
    rest = (list(sizes), g, m.num_prev if m.via is None else m.via, m.mean)
    batch = x.shape[0] // old.slices(sizes)
    grad = x.new_ones(batch * new.slices(sizes), g + new.length(sizes), x.shape[2], requires_grad=x.requires_grad)
    return [(OP, (x, old.name, new.name, *rest, False)), (OP, (grad, new.name, old.name, *rest, True))]


def groups(t, settings):
    g = settings["num_globals"]
    name = "globals where M is 1" if settings["transition"].is_identity else "globals"
    return {name: t[:, :g], "patches": t[:, g:]}


def named_cases():
    ways = itertools.cycle(itertools.product(GLOBALS_AT, (1, 2, 3), (5, 1, 9, 4)))
    for (old, new), pool_method in itertools.product(PAIRS, POOL_METHODS):
        globals_at, batch, g = next(ways)
        yield case(old, new, (3, 5, 2), g, 7, batch, pool_method, globals_at)
    yield case(HW, DW, (5, 7, 3), 0, 8, 2, name="no globals")
    yield case(DW, DH, (1, 1, 1), 5, 1, name="ones")
    yield case(HW, DHW, (13, 2, 3), 2, 8, name="prime depth, to one slice")
    yield case(DHW, DH, (2, 3, 11), 17, 8, name="many globals, from one slice")
    yield case(DW, DH, (6, 4, 4), 3, 8, name="bands of different bins at equal sizes")
    yield case(DW, DH, (12, 4, 4), 3, 8, name="M is 1, by way of three times as many slices")
    yield case(DW, DH, (3, 1, 1), 3, 8, pool_method="PCm", name="M is 1, a mean of one")
    yield case(HW, DW, (64, 4, 4), 5, 8, name="64^3 volume: 21 rows to 261")
    yield case(DH, HW, (64, 4, 4), 5, 8, pool_method="PCm", name="64^3 volume: 261 rows to 21")
    yield case(HW, DH, (2, 17, 16), 1, 8, name="a row more than a tile has")
    yield case(HW, DW, (2, 3, 2), 8, 16, name="as many globals as a tile has")
    yield case(DW, DH, (2, 3, 4), 16, 16, name="two tiles of globals")
    yield case(HW, DW, (20, 19, 1), 2, 300, pool_method="PCm", name="a mean of more slices than a tile has")
    yield case(HW, DW, (20, 3, 1), 2, 300, pool_method="PCm", name="a mean of three tiles of slices, written to one")
    counted = case(DW, DH, (2051, 1, 2), 1, 1, pool_method="PCm", name="more slices in a bin than fp16 counts")
    yield replace(counted, only=torch.float16)
    yield case(HW, DW, (2, 2, 3), 2, 300, name="channels in two blocks, the last one short")
    yield case(DW, HW, (2, 3, 2), 2, 384, pool_method="PCm", name="ViT-S channels")


def huge_cases():
    yield case(HW, DW, (1024, 1024, 1024), 0, 8, name="2^30 tokens")
    yield case(DW, DH, (1024, 1024, 1023), 5, 8, name="2^30 tokens with globals")
    yield case(DH, HW, (64, 1024, 1024), 5, 64, 40, name="2^37 elements in 40 volumes")
    yield case(DHW, DH, (2**12, 2**12, 2**6), 3, 64, 3, globals_at="plane", name="from one slice")
    yield case(HW, DHW, (4, 2**14, 2**13), 5, 256, name="2^35 elements from slice to slice")
    yield case(HW, DW, (100_000, 10_000, 1), 0, 32, name="100,000 slices")
    yield case(DW, HW, (100_000, 10_000, 1), 0, 32, name="to 100,000 slices")
    yield case(HW, DW, (32_000, 30_000, 1), 5, 32, name="32,000 slices with globals")
    yield case(DW, HW, (32_000, 30_000, 1), 5, 32, name="to 32,000 slices with globals")
    yield case(HW, DH, (5_000, 3, 2), 1, 32, pool_method="PCm", name="a mean of 5,000 slices")
    yield case(DW, DH, (20_000, 230, 231), 5, 32, name="by way of 20,000 slices")
    yield case(DW, HW, (3, 2, 2), 2**28, 8, name="2^28 globals")
    yield case(DW, DH, (3, 2, 2), 2**28, 8, pool_method="PCm", name="2^28 globals, a mean")
    yield case(DW, HW, (3, 2, 2), 2**28, 9, name="2^28 globals, odd channels")
    yield case(DW, DH, (3, 2, 2), 2**28, 9, pool_method="PCm", name="2^28 globals, odd channels, a mean")
    yield case(HW, DW, (3, 5, 2), 5, 2**27, 9, name="2^27 channels")


def random_cases():
    from hypothesis import strategies as st

    sizes = st.tuples(*[st.integers(1, 3)] * 3) | st.sampled_from([(1, 1, 7), (5, 2, 3), (4, 3, 1), (7, 1, 2)])
    return st.builds(
        lambda pair, *rest: case(*pair, *rest),
        st.sampled_from(PAIRS),
        sizes,
        st.sampled_from([0, 1, 2, 5, 9]),
        st.sampled_from([1, 3, 8, 16, 33, 40, 80]),
        st.integers(1, 2),
        st.sampled_from(POOL_METHODS),
        st.sampled_from(GLOBALS_AT),
    )


def codegen_case(channels, pool):
    g = 0 if pool == "none" else 5
    return case(DW, DH, (32, 14, 16), g, channels, pool_method="PCm" if pool == "PCm" else "PCg")


SPEC = Spec(
    op=OP,
    fast=partial(plane_switch, backend="triton"),
    reference=plane_switch_ref,
    op_arguments=op_arguments,
    typical=case(HW, DW, (3, 4, 2), 9, 16, batch=2, name="typical"),
    plain=[case(old, new, (4, 4, 4), 5, 16, 2, m) for old, new in itertools.product((HW, DW, DH), repeat=2)
           for m in POOL_METHODS],
    cases=list(named_cases()),
    small=[
        case(DW, DH, (3, 2, 3), 1, 1),
        case(HW, DW, (2, 3, 1), 2, 2, pool_method="PCm"),
        case(DH, HW, (3, 1, 2), 1, 1, batch=2, globals_at="plane"),
        case(DHW, DH, (2, 2, 2), 1, 2),
    ],
    empty=[case(old, new, (2, 3, 4), 2, c, b, name=f"{old}-{new} B={b} C={c}") for old, new, b, c in
           [(HW, DW, 0, 4), (DW, DH, 2, 0), (DHW, HW, 0, 0)]],
    huge=list(huge_cases()),
    strategy=random_cases,
    groups=groups,
    exact=frozenset({"patches", "globals where M is 1"}),
    factors={"channels": [384, 768, 1024, 1280, 4096, 100], "pool": ["none", "PCg", "PCm"]},
    factors_case=codegen_case,
    wide=lambda choice: choice["channels"] * choice["dtype"].itemsize % 16 == 0,
    outputs={"plane_switch_kernel": {"out"}},
)  # fmt: skip
