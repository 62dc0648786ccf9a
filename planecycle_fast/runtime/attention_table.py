"""What attention="auto" is on a GPU: the first row of `TABLE` that fits and whose attention can run here.

A row says why it is there: "measured on an H100", and the times of all, or "static", and what speaks for it. The times
are in `attention_times`; `python -m benchmarks.gpu --only attention` measures them on the GPU at hand, and names every
size at which another choice is faster; `python -m benchmarks.attention_page` writes the table into docs.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from .attention_times import FORWARD, PROTOTYPE, ROPE, TRAINING, told
from .attentions import MODULES, SWITCHES, AttentionCall, why_not_attention, why_not_call
from .tracing import constant_when_compiled

INFERENCE, TRAINED = ("inference",), ("training",)
BOTH = INFERENCE + TRAINED
H100, B200, OTHERS, ALL = (9,), (10,), (8, 11, 12), tuple(range(5, 13))  # major compute capabilities
HALF, SINGLE = (16,), (32,)  # bits of the dtype
MOST = 512  # decisions that are kept


class AttentionRow(NamedTuple):
    """One choice, and where it holds. Ranges are closed; None: without an end."""

    capabilities: tuple[int, ...]  # major ones
    bits: tuple[int, ...]
    head_dims: tuple[int, int | None]
    rows: tuple[int, int | None]
    steps: tuple[str, ...]
    attention: str
    why: str
    repeats: bool = False  # only where volumes of the same sizes have come before

    def fits(self, major: int, call: AttentionCall, repeats: bool) -> bool:
        """Whether this row is about such a call; of an unknown number of rows, whether it is about any number."""
        step = "training" if call.backward else "inference"
        if major not in self.capabilities or call.dtype.itemsize * 8 not in self.bits or step not in self.steps:
            return False
        if not _within(call.head_dim, self.head_dims) or (self.repeats and not repeats):
            return False
        return self.rows == EVERY if call.rows is None else _within(call.rows, self.rows)

    def where(self) -> tuple[str, str, str, str, str, str]:
        """Compute capability, bits, head dimensions, rows, step and sizes, in words."""
        names = "any" if self.capabilities == ALL else ", ".join([f"{major}.x" for major in self.capabilities])
        bits = ", ".join([str(each) for each in self.bits])
        sizes = "that repeat" if self.repeats else "any"
        return names, bits, told_range(self.head_dims), told_range(self.rows), ", ".join(self.steps), sizes


class ChosenAttention(NamedTuple):
    """An attention, and why this one."""

    attention: str
    why: str


def told_range(limits: tuple[int, int | None]) -> str:
    """In words."""
    if limits[1] is None:
        return "any" if limits[0] <= 1 else f"{limits[0]} and more"
    return f"up to {limits[1]}" if limits[0] <= 1 else f"{limits[0]} to {limits[1]}"


def _within(number: int, limits: tuple[int, int | None]) -> bool:
    return limits[0] <= number and (limits[1] is None or number <= limits[1])


EVERY: tuple[int, int | None] = (0, None)  # rows
SMALL, LARGE, WIDE = (1, 64), (65, 128), (129, 256)  # head dimensions
ONE_TILE, SHORT, LONG = (1, 64), (65, 320), (321, 2048)  # rows: one tile, all keys in one program, many tiles
_TILE = "static: sequences share tiles that others leave mostly empty, and RoPE takes no pass"
_SHORT = "static: keys turn once for all queries, without a softmax that goes on; RoPE takes no pass"
_BACKWARD = "static: gradients of q, k and v go turned back into one tensor, without atomics or a pass that joins them"
_FLASH = "static: tensor cores, any length, no time for a new size"
_EFFICIENT = "static: what torch has for 32 bits, and for what no other takes"
_PUBLISHED = (
    "static: published for H100s, backward at 512 and 1,024 rows, head dimension 64, TFLOP/s: FlashAttention 3 272 and "
    "363, cuDNN 266 and 348, FlashAttention 2 (torch's flash) 198 and 238"
)
_SM100 = (
    "static: published for B200s, forward at 1,024 rows, TFLOP/s: cuDNN 980, FlashAttention 4 784; flash has "
    "no kernels made for them"
)

TABLE = (
    # sm_90, 16 bits, head dimensions up to 64, inference
    AttentionRow(H100, HALF, SMALL, ONE_TILE, INFERENCE, "triton",
                 f"{told(PROTOTYPE, 64, 21)}; to all but the first RoPE adds a pass of {ROPE}; ours as a prototype"),
    AttentionRow(H100, HALF, SMALL, SHORT, INFERENCE, "triton",
                 f"{_SHORT}. A prototype without RoPE, {told(PROTOTYPE, 64, 69, 261)}; RoPE adds a pass of {ROPE}"),
    AttentionRow(H100, HALF, SMALL, LONG, INFERENCE, "triton",
                 f"{told(PROTOTYPE, 64, 1029)}; RoPE is a pass for all; ours as a prototype"),
    AttentionRow(H100, HALF, SMALL, (129, None), INFERENCE, "flash3", told(FORWARD, 64, 261, 1029)),
    AttentionRow(H100, HALF, SMALL, (1, 32), INFERENCE, "efficient", told(FORWARD, 64, 21)),
    AttentionRow(H100, HALF, SMALL, (33, None), INFERENCE, "cudnn", told(FORWARD, 64, 69, 261, 1029), repeats=True),
    AttentionRow(H100, HALF, SMALL, EVERY, INFERENCE, "flash", f"{told(FORWARD, 64, 69, 261, 1029)}; for sizes that "
                 "do not repeat, or are not known before"),
    # wider heads
    AttentionRow(H100, HALF, LARGE, ONE_TILE, INFERENCE, "triton", _TILE),
    AttentionRow(H100, HALF, LARGE, EVERY, INFERENCE, "flash3", told(FORWARD, 128, 261, 1029)),
    AttentionRow(H100, HALF, LARGE, (33, None), INFERENCE, "cudnn", told(FORWARD, 128, 261, 1029), repeats=True),
    AttentionRow(H100, HALF, LARGE, EVERY, INFERENCE, "flash", told(FORWARD, 128, 261, 1029)),
    AttentionRow(H100, HALF, WIDE, EVERY, INFERENCE, "flash3", "static: made for this GPU"),
    # training
    AttentionRow(H100, HALF, (1, 128), ONE_TILE, TRAINED, "triton",
                 f"{_BACKWARD}; RoPE takes no pass. The others, RoPE and joining apart, {told(TRAINING, 64, 21)}"),
    AttentionRow(H100, HALF, SMALL, (1, 32), TRAINED, "efficient", told(TRAINING, 64, 21)),
    AttentionRow(H100, HALF, SMALL, (33, None), TRAINED, "cudnn", told(TRAINING, 64, 69, 261, 1029), repeats=True),
    AttentionRow(H100, HALF, SMALL, (33, 160), TRAINED, "efficient", told(TRAINING, 64, 69, 133)),
    AttentionRow(H100, HALF, SMALL, (321, None), TRAINED, "flash3", _PUBLISHED),
    AttentionRow(H100, HALF, SMALL, EVERY, TRAINED, "flash", f"{told(TRAINING, 64, 261, 1029)}; for sizes that do not "
                 "repeat, or are not known before"),
    AttentionRow(H100, HALF, LARGE, (33, None), TRAINED, "cudnn", _PUBLISHED, repeats=True),
    AttentionRow(H100, HALF, (65, 256), EVERY, TRAINED, "flash3", _PUBLISHED),
    # sm_100 and others: nothing has been measured
    AttentionRow(B200, HALF, (1, 128), (1, 320), INFERENCE, "triton", _SHORT),
    AttentionRow((8, 10, 11, 12), HALF, (1, 128), ONE_TILE, TRAINED, "triton", f"{_BACKWARD}; RoPE takes no pass"),
    AttentionRow(B200, HALF, (1, 128), (33, None), BOTH, "cudnn", _SM100, repeats=True),
    AttentionRow(B200, HALF, (1, 128), EVERY, BOTH, "flash4", _SM100),
    AttentionRow(OTHERS, HALF, (1, 128), (1, 320), INFERENCE, "triton", _SHORT),
    AttentionRow((8, 9, 10, 11, 12), HALF, (1, 256), EVERY, BOTH, "flash", _FLASH),
    # 32 bits, and the rest
    AttentionRow((8, 9, 10, 11, 12), SINGLE, (1, 128), ONE_TILE, BOTH, "triton", _TILE),
    AttentionRow(ALL, (16, 32), (1, None), EVERY, BOTH, "efficient", _EFFICIENT),
    AttentionRow(ALL, (16, 32, 64), (1, None), EVERY, BOTH, "sdpa", "static: takes everything: other head "
                 "dimensions padded, 64 bits, nothing at all"),
)  # fmt: skip

_kept: dict[tuple[object, ...], ChosenAttention] = {}


def choose_attention(device: torch.device, call: AttentionCall, repeats: bool, own: bool = True) -> ChosenAttention:
    """What "auto" is for tensors on a GPU that every attention takes as they lie.

    Args:
        repeats: whether volumes of the same sizes have come before, so that a second spent on one of them comes back.
        own: whether kernels of ours may run: not where a backend that is not "triton" was asked for.
    """
    if torch.compiler.is_compiling():
        return _chosen_when_compiled(device, *call, own)
    now = [is_on() for is_on, _ in SWITCHES.values()]
    key = (device, call, repeats, own, torch.are_deterministic_algorithms_enabled(), *now)
    found = _kept.get(key)
    if found is None:
        if len(_kept) >= MOST:
            _kept.clear()
        found = _kept[key] = _choose(device, call, repeats, own)
    return found


@constant_when_compiled
def _chosen_when_compiled(
    device: torch.device,
    dtype: torch.dtype,
    sequences: int | None,
    rows: int | None,
    heads: int,
    head_dim: int,
    backward: bool,
    scale: float | None,
    own: bool,
) -> ChosenAttention:
    call = AttentionCall(dtype, sequences, rows, heads, head_dim, backward, scale)
    return _choose(device, call, repeats=False, own=own, packages=False)


def _choose(
    device: torch.device, call: AttentionCall, repeats: bool, own: bool, packages: bool = True
) -> ChosenAttention:
    major = torch.cuda.get_device_capability(device)[0]
    for row in TABLE:
        passed_over = row.attention in MODULES and not packages
        if not passed_over and row.fits(major, call, repeats) and _why_not(row.attention, device, call, own) is None:
            return ChosenAttention(row.attention, row.why)
    return ChosenAttention("sdpa", TABLE[-1].why)  # of an architecture that the table does not have


def _why_not(attention: str, device: torch.device, call: AttentionCall, own: bool) -> str | None:
    """Why "auto" passes over an attention, or None."""
    if attention == "triton" and not own:
        return "another backend was asked for"
    if attention == "cudnn" and os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1":
        return "TORCH_CUDNN_SDPA_DEPRIORITIZED is 1"
    return why_not_attention(attention) or why_not_call(attention, device, call)
