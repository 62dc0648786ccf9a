"""The transitions M of the globals."""

import itertools

import pytest
import torch

from planecycle_fast.geometry.pooling import GLOBALS_AT, POOL_METHODS, Transition, transition

from .. import naive

COUNTS = [1, 2, 3, 4, 5, 7, 8, 9]
CASES = list(itertools.product(COUNTS, COUNTS, COUNTS))


def chain(g, depth, num_next, pool_method, globals_at):
    """PyTorch's own pooling, one step after the other."""
    if globals_at == "depth":
        g = naive.pool(g, depth)
    return naive.pool(g, num_next) if pool_method == "PCg" else naive.mean(g, num_next)


@pytest.mark.parametrize("globals_at", GLOBALS_AT)
@pytest.mark.parametrize("pool_method", POOL_METHODS)
def test_every_form_equals_torch_pooling(pool_method, globals_at):
    for num_prev, num_next, depth in CASES:
        m = transition(num_prev, num_next, depth, pool_method, globals_at)
        g = torch.randn(2, num_prev, 3, 4, dtype=torch.float64)
        expected = chain(g, depth, num_next, pool_method, globals_at)
        dense = m.dense()
        assert dense.shape == (num_next, num_prev)
        torch.testing.assert_close(torch.einsum("ij,bjgc->bigc", dense, g), expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(m.apply(g), expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(dense.sum(1), torch.ones(num_next, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("globals_at", GLOBALS_AT)
@pytest.mark.parametrize("pool_method", POOL_METHODS)
def test_bands_are_exactly_the_non_zeros(pool_method, globals_at):
    for num_prev, num_next, depth in CASES:
        m = transition(num_prev, num_next, depth, pool_method, globals_at)
        first, last = m.bands()
        columns = torch.arange(num_prev)
        inside = (columns >= first[:, None]) & (columns <= last[:, None])
        assert torch.equal(m.dense() != 0, inside), (num_prev, num_next, depth)


@pytest.mark.parametrize("globals_at", GLOBALS_AT)
def test_mean_then_broadcast_is_the_whole_matrix(globals_at):
    for num_prev, num_next, depth in CASES:
        m = transition(num_prev, num_next, depth, "PCm", globals_at)
        assert torch.equal(m.mean_weights().expand(num_next, -1), m.dense())
    with pytest.raises(ValueError, match="mean_weights exist for pool_method 'PCm' only"):
        transition(3, 4, 5).mean_weights()


@pytest.mark.parametrize("globals_at", GLOBALS_AT)
@pytest.mark.parametrize("pool_method", POOL_METHODS)
def test_is_identity_says_the_truth(pool_method, globals_at):
    for num_prev, num_next, depth in CASES:
        m = transition(num_prev, num_next, depth, pool_method, globals_at)
        truth = num_prev == num_next and torch.allclose(m.dense(), torch.eye(num_prev, dtype=torch.float64))
        assert m.is_identity == truth, (num_prev, num_next, depth)


def test_what_is_not_the_identity():
    d, h = 7, 5
    assert transition(d, d, d, "PCg").is_identity  # HW to HW
    assert not transition(d, d, d, "PCm").is_identity  # HW to HW is a mean
    assert torch.equal(transition(d, d, d, "PCm").dense(), torch.full((d, d), 1 / d, dtype=torch.float64))
    assert not transition(h, h, d, "PCg", "depth").is_identity  # DW to DW passes through D slices
    assert transition(h, h, d, "PCg", "plane").is_identity
    assert transition(h, h, 2 * h, "PCg", "depth").is_identity  # each repeated twice, averaged again
    assert Transition(1, 1, mean=True).is_identity  # one set of globals stays what it is


@pytest.mark.parametrize("pool_method", POOL_METHODS)
def test_autocast_does_not_round_the_globals(pool_method):
    m, g = transition(7, 5, 6, pool_method), torch.randn(2, 7, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast, dense = m.apply(g), m.dense(torch.float32)
    assert torch.equal(under_autocast, m.apply(g))
    assert torch.equal(dense, m.dense(torch.float32))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("pool_method", POOL_METHODS)
def test_one_bad_value_reaches_only_the_slices_that_torch_pooling_gives_it_to(pool_method, value):
    for num_prev, num_next, depth in CASES[::7]:
        g = torch.randn(1, num_prev, 1, 2, dtype=torch.float64)
        g[0, num_prev // 2, 0, 0] = value
        expected = chain(g, depth, num_next, pool_method, "depth")
        torch.testing.assert_close(
            transition(num_prev, num_next, depth, pool_method).apply(g), expected, equal_nan=True
        )


def test_bfloat16_is_summed_in_float32():
    g = torch.randn(1, 100, 2, 8).bfloat16()
    m = transition(100, 3, 100)
    expected = (m.dense(torch.float32) @ g.float().flatten(2)).unflatten(2, (2, 8)).bfloat16()
    assert m.apply(g).dtype == torch.bfloat16
    assert torch.equal(m.apply(g), expected)


def test_unknown_names():
    with pytest.raises(ValueError, match="pool_method must be one of PCg, PCm, got 'max'"):
        transition(2, 3, 4, "max")
    with pytest.raises(ValueError, match="globals_at must be one of depth, plane, got 'slice'"):
        transition(2, 3, 4, "PCg", "slice")


@pytest.mark.parametrize("name", ["num_prev", "num_next", "via"])
def test_no_slices_at_all(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Transition(**({"num_prev": 3, "num_next": 4} | {name: 0}))
