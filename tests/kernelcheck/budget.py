"""The error budget: the one assert of all numeric tests of kernels.

Every group of rows of a tensor is compared with the same thing computed in float64. An element may be off by

    2 x the largest error, in its group, of torch's own operations in the same dtype   (the reference)
    + one rounding of its dtype at its own value

so the bar follows the dtype and the operation, and a kernel can be a little worse than torch but not much. The largest
error is that of several inputs: one alone may have half of it, or twice as much, by luck. Rounding
16-bit results toward zero would still fit in, so their errors must not lean one way either. What only moves is
compared bit for bit. NaN and infinities must stand exactly where float64 has them.
"""

from typing import NamedTuple

import torch

FACTOR = 2.0
SEEDS = 8  # different inputs that a reference's largest error is taken from
LEANING = 0.25  # eps: the median of nearest roundings is 0, of truncations about -0.35
ENOUGH = 64  # different values, for a median


class BudgetError(AssertionError):
    """A kernel is further from float64 than its budget. The message says which tensor, where, and both errors."""


class Errors(NamedTuple):
    """How far a reference is from float64."""

    dtype: torch.dtype
    largest: float = 0.0
    leaning: float = 0.0  # median error away from zero, in eps of each value; or what is more than one rounding

    def worse(self, other):
        return Errors(self.dtype, max(self.largest, other.largest), max(abs(self.leaning), abs(other.leaning)))


def errors(name, reference, exact):
    """The `Errors` of a reference where both are finite.

    Raises ValueError where one of them is finite and the other is not: such a reference measures nothing.
    """
    rounded = exact.to(reference.dtype).double()  # what overflows in this dtype counts as infinite
    odd = ~rounded.isfinite()
    if (~same(reference.double(), rounded) & (odd | ~reference.isfinite())).any():
        raise ValueError(f"{name}: the reference is not finite where float64 is, or the other way round")
    if exact.numel() == 0:
        return Errors(reference.dtype)
    largest = (reference.double() - exact).masked_fill(odd, 0).abs().amax().item()
    leaning, typical = _leaning(reference, exact)
    return Errors(reference.dtype, largest, max(abs(leaning), typical - LEANING))  # rounded more coarsely on the way


def _leaning(t, exact):
    """The median error and the median of its size, in eps of each value."""
    if torch.finfo(t.dtype).bits > 16:  # sums in the same precision lean as their weights were rounded
        return 0.0, 0.0
    normal = exact.isfinite() & t.isfinite() & (exact.abs() > torch.finfo(t.dtype).smallest_normal)
    values, first = torch.unique(exact[normal], return_inverse=True)  # what is repeated counts once
    if len(values) < ENOUGH:
        return 0.0, 0.0
    chosen = torch.zeros_like(values).scatter_(0, first, t[normal].double())
    found = (chosen - values) / (torch.finfo(t.dtype).eps * values)
    return found.median().item(), found.abs().median().item()


def reference_errors(compute, seeds=SEEDS):
    """What `check_all` needs: of the first input what is exact, and the largest `Errors` of all inputs, by name.

    Args:
        compute: of a seed, results of the reference and of the same in float64, by name.
    """
    exact, largest = {}, {}
    for seed in range(seeds):
        reference, wide = compute(seed)
        exact = exact or wide
        for name, t in reference.items():
            largest[name] = errors(name, t, wide[name]).worse(largest.get(name, Errors(t.dtype)))
    return exact, largest


def check_all(got, exact, largest):
    """`check` of results by name. Raises AssertionError where other ones came out."""
    assert got.keys() == exact.keys(), f"{list(got)} came out, expected {list(exact)}"
    for name, t in got.items():
        check(name, t, exact[name], largest[name])


def check(name, got, exact, reference):
    """`got` against `exact` (float64). `reference` has the `Errors` of torch in got's dtype.

    Raises BudgetError where `got` is out of budget.
    """
    if got.shape != exact.shape or got.dtype != reference.dtype:
        found, expected = f"{got.dtype} {tuple(got.shape)}", f"{reference.dtype} {tuple(exact.shape)}"
        raise BudgetError(f"{name}: {found}, expected {expected}")
    rounded = exact.to(got.dtype).double()
    odd = ~rounded.isfinite()
    wrong = ~same(got.double(), rounded) & (odd | ~got.isfinite())
    if wrong.any():
        reason = "not finite where float64 is, or the other way round"
        raise BudgetError(_message(name, wrong.double(), got, exact, reason))
    error = (got.double() - exact).abs().masked_fill(odd, 0)
    info = torch.finfo(got.dtype)
    rounding = exact.abs().masked_fill(odd, 0) * (info.eps / 2) + info.smallest_normal * info.eps / 2
    excess = error - (FACTOR * reference.largest + rounding)
    if (excess > 0).any():
        where = excess.argmax()
        reason = (
            f"error {error.flatten()[where]:.3g}, allowed {FACTOR:g} x {reference.largest:.3g} (the reference's "
            f"largest) + {rounding.flatten()[where]:.3g} (one rounding of {got.dtype})"
        )
        raise BudgetError(_message(name, excess, got, exact, reason))
    leaning, _ = _leaning(got, exact)
    if abs(leaning) > LEANING + FACTOR * abs(reference.leaning):
        reason = (
            f"errors lean one way, by {leaning:.2f} eps of {got.dtype} in the median (the reference's: "
            f"{reference.leaning:.2f}); a cast that truncates does that; largest error"
        )
        raise BudgetError(_message(name, error, got, exact, reason))


def check_bits(name, got, expected):
    """`got` equal to `expected` bit for bit, signs of zero included; any NaN equals any other."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise BudgetError(f"{name}: {got.dtype} {tuple(got.shape)}, expected {expected.dtype} {tuple(expected.shape)}")
    differs = ~same(got, expected) | (got.signbit() != expected.signbit()) & ~expected.isnan()
    if differs.any():
        raise BudgetError(_message(name, differs.double(), got, expected, "must be equal bit for bit"))


def check_footprint(name, got, expected):
    """NaN exactly where `expected` has NaN."""
    differs = got.isnan() != expected.isnan()
    if differs.any():
        raise BudgetError(
            _message(name, differs.double(), got, expected, f"{int(differs.sum())} elements differ in NaN")
        )


def same(a, b):
    """Where two tensors are equal, NaN being equal to NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def _message(name, badness, got, expected, text):
    where = tuple(int(i) for i in torch.unravel_index(badness.argmax(), badness.shape))
    count = int((badness > 0).sum())
    return (
        f"{name} at {where}: {text}; got {got[where].item():.6g}, expected {expected[where].item():.6g} "
        f"({count} of {got.numel()} elements are wrong)"
    )
