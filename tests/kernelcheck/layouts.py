"""The same values in memory that is laid out differently: what users pass, and what gradients come as."""

import torch


def contiguous(t):
    return t.contiguous()


def sliced(t):  # out of a larger tensor, along every axis
    larger = t.new_full([n + 3 for n in t.shape], float("nan"))
    view = larger[tuple([slice(1, n + 1) for n in t.shape])]
    return view.copy_(t)


def stepped(t):  # every second channel of something
    return torch.stack([t, torch.full_like(t, float("nan"))], -1).flatten(-2)[..., ::2]


def permuted(t):  # channels slowest
    if t.ndim < 2:
        return t
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def offset(t):  # not aligned to 16 bytes
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


def expanded(t):  # one sequence for all: stride 0
    return t[:1].expand_as(t)


def constant(t):  # all strides 0, the gradient of a sum
    return t.flatten()[:1].view([1] * t.ndim).expand_as(t) if t.numel() else t


def channels_last_3d(t):  # a token tensor taken from maps (N, C, ...) of that format
    if t.ndim < 2:
        return t
    maps = t.movedim(-1, 1)
    maps = maps[(..., *[None] * (5 - t.ndim))].contiguous(memory_format=torch.channels_last_3d)
    return maps[(..., *[0] * (5 - t.ndim))].movedim(1, -1)


# Where all slices are equal, a reference may be exact by structure, and no measure of rounding.
VARIED = [contiguous, sliced, stepped, permuted, offset, channels_last_3d]
LAYOUTS = [contiguous, sliced, stepped, permuted, offset, expanded, constant, channels_last_3d]
