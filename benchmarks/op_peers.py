"""What others offer for the same: FlashAttention and its Triton kernels, Liger, and plain torch as models write it.

Each maker raises NotHereError with the reason where its package is not installed or there is no GPU for it. Packages
are imported when a contender is made, and called as their users do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from planecycle_fast.bench.contenders import NotHereError
from planecycle_fast.geometry.planes import HW, Plane, Sizes, permutation
from planecycle_fast.ops import Axial, Tables
from planecycle_fast.ops.multihead_attention.attention import attention_on
from planecycle_fast.ops.multihead_attention.self_attention import self_attention_on
from planecycle_fast.ops.multihead_attention.self_attention_load import turned_on_load
from planecycle_fast.ops.rotary.rope import rope_on
from planecycle_fast.runtime.attentions import why_not_attention, why_not_for

from .op_cells import Maker

FLASH = {"flash2": "FlashAttention 2", "flash3": "FlashAttention 3", "flash4": "FlashAttention 4"}
TORCHS = {"flash": "SDPA, flash", "cudnn": "SDPA, cuDNN", "efficient": "SDPA, efficient"}
FLASH_TRITON, FLASH_JIT = "FlashAttention's Triton kernel", "FlashAttention's SwiGLU"
LIGER, SDPA, SEPARATE = "Liger", "SDPA", "separate passes"
TANH_EPILOGUE = "cuBLASLt's tanh epilogue"


def load(module: str, name: str, device: str) -> Any:
    """An attribute of a module that runs on GPUs. Raises `NotHereError`."""
    package = module.split(".")[0]
    if device != "cuda":
        raise NotHereError(f"{package} needs a CUDA device")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise NotHereError(f"{error.name or package} is not installed") from None
    except Exception as error:  # a broken installation raises anything
        raise NotHereError(f"importing {module} failed: {type(error).__name__}: {error}") from None


def maker(function: Callable[..., Callable[..., Any]]) -> Callable[..., Maker]:
    """`function`'s arguments give what makes a contender: nothing is imported before."""
    return lambda *settings: partial(function, *settings)


@maker
def named_attention(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """An attention by name, one of `FLASH` or `TORCHS`, on (N, rows, heads, hd)."""
    reason = why_not_attention(name)
    if reason is not None:
        raise NotHereError(reason)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        reason = why_not_for(name, q, k, v)
        if reason is not None:
            raise NotHereError(reason)
        return attention_on(name, q, k, v, None)

    return call


@maker
def own_attention(angles: Axial, num_globals: int, training: bool) -> Callable[[Tensor], Tensor]:
    """Our kernels, `as_blocks_do`."""
    reason = why_not_attention("triton")
    if reason is not None:
        raise NotHereError(reason)
    return as_blocks_do(angles, num_globals, training, "triton")


def as_blocks_do(angles: Axial, num_globals: int, training: bool, backend: str) -> Callable[[Tensor], Tensor]:
    """From qkv (N, rows, 3*heads, hd) to the context (N, rows, heads, hd), by `engine.branches`' ways of turning.

    What turns before attention loads it does so in place; blocks share tables, which are made once.
    """
    tables = angles.tables()

    def call(qkv: Tensor) -> Tensor:
        load = turned_on_load(qkv.shape[1], qkv.shape[3], qkv.dtype, training)
        if load == "qk":
            return self_attention_on(backend, qkv, None, None, tables, num_globals, load=load)
        if load == "":
            from planecycle_fast.ops.multihead_attention.self_attention_within import self_attention_within

            return self_attention_within(qkv, angles, tables, num_globals, qkv.shape[3] ** -0.5, False)
        q, k, v = qkv.chunk(3, 2)
        rope_on(backend, k, angles, num_globals, inplace=True)
        return self_attention_on(backend, q, k, v, tables, num_globals, load=load)

    return call


def sdpa(
    q: Tensor,  # (N, rows, heads, hd)
    k: Tensor,  # like q
    v: Tensor,  # like q
) -> Tensor:  # (N, rows, heads, hd)
    """torch's own, whichever of its kernels it picks."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def separate_passes(
    x: Tensor,  # (B*P1, g + L1, C)
    old: Plane,
    new: Plane,
    sizes: Sizes,
    num_globals: int,  # g
    pool_method: str = "PCg",
) -> Tensor:  # (B*P2, g + L2, C)
    """A change of planes by permuting, copying, pooling and concatenating, through HW as the authors' operator goes."""
    if old != HW:
        x = _one_change(x, old, HW, sizes, num_globals, "PCg")
    return x if new == HW and pool_method == "PCg" else _one_change(x, HW, new, sizes, num_globals, pool_method)


def _one_change(
    x: Tensor,  # (B*P1, g + L1, C)
    old: Plane,
    new: Plane,
    sizes: Sizes,
    g: int,
    pool_method: str,
) -> Tensor:  # (B*P2, g + L2, C)
    slices, channels = old.slices(sizes), x.shape[2]
    batch = x.shape[0] // slices
    patches = x[:, g:].reshape(batch, *old.ordered(sizes), channels).permute(permutation(old, new))
    patches = patches.reshape(batch * new.slices(sizes), new.length(sizes), channels)
    pooled = x[:, :g].reshape(batch, slices, g * channels).transpose(1, 2)  # (B, g*C, P1)
    if pool_method == "PCm":
        pooled = pooled.mean(2, keepdim=True).expand(-1, -1, new.slices(sizes))
    else:
        pooled = F.adaptive_avg_pool1d(pooled, new.slices(sizes))
    return torch.cat([pooled.transpose(1, 2).reshape(len(patches), g, channels), patches], 1)


def dense(
    tables: Tables,  # per axis (n_i, hd/4)
    num_globals: int,  # g
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # sine and cosine, (g + L, hd/2)
    """One table of all rows, as others want it; globals turn by nothing."""
    found = []
    for (first, second), still in ((tables.sin, 0.0), (tables.cos, 1.0)):
        n0, n1 = len(first), len(second)
        rows = torch.cat([first[:, None].expand(-1, n1, -1), second[None].expand(n0, -1, -1)], -1).flatten(0, 1)
        found.append(torch.cat([rows.new_full((num_globals, rows.shape[1]), still), rows]).to(dtype))
    return found[0], found[1]


def rotate_half(
    x: Tensor,  # (N, rows, heads, hd)
    sin: Tensor,  # (rows, hd/2)
    cos: Tensor,  # like sin
) -> Tensor:  # like x
    """RoPE as models write it in torch."""
    a, b = x.chunk(2, -1)
    wide = [torch.cat([t, t], -1)[:, None] for t in (sin, cos)]
    return (x * wide[1] + torch.cat([-b, a], -1) * wide[0]).to(x.dtype)


@maker
def flash_rotary(tables: Tables, num_globals: int, dtype: torch.dtype, device: str) -> Callable[..., Sequence[Tensor]]:
    """FlashAttention's Triton rotary, in place on a packed qkv (N, rows, 3*heads, hd)."""
    turn = load("flash_attn.layers.rotary", "apply_rotary_emb_qkv_", device)
    sin, cos = dense(tables, num_globals, dtype)
    return lambda qkv: turn(qkv.unflatten(2, (3, -1)), cos, sin).unbind(2)


@maker
def liger_rotary(tables: Tables, num_globals: int, dtype: torch.dtype, device: str) -> Callable[..., Sequence[Tensor]]:
    """Liger's rotary; it copies queries and keys out of a packed qkv (N, rows, 3*heads, hd)."""
    turn = load("liger_kernel.transformers.rope", "liger_rotary_pos_emb", device)
    sin, cos = (torch.cat([t, t], -1)[None] for t in dense(tables, num_globals, dtype))  # (1, rows, hd)

    def call(qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = qkv.chunk(3, 2)
        q, k = turn(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), v

    return call


@maker
def flash_add_norm(eps: float, device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """FlashAttention's Triton layer norm, which adds the residual; LayerScale takes a pass of its own."""
    layer_norm = load("flash_attn.ops.triton.layer_norm", "layer_norm_fn", device)

    def call(x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        normed, total = layer_norm(branch * scale, weight, bias, residual=x, eps=eps, prenorm=True)
        return total, normed

    return call


@maker
def liger_add_norm(eps: float, device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Liger's layer norm, after the sum."""
    norm = load("liger_kernel.ops.layer_norm", "LigerLayerNormFunction", device)

    def call(x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + branch * scale
        return total, norm.apply(total, weight, bias, eps)

    return call


@maker
def liger_add_rms_norm(eps: float, device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Liger's RMSNorm that adds the residual; LayerScale takes a pass of its own."""
    norm = load("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction", device)

    def call(x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        normed, total = norm.apply(branch * scale, x, weight, eps)
        return total, normed

    return call


@maker
def liger_swiglu(device: str, packed: bool) -> Callable[..., Tensor]:
    """Liger's SwiGLU, of gate and value in one tensor (newer versions) or in two."""
    name = "LigerFusedGateUpSiLUMulFunction" if packed else "LigerSiLUMulFunction"
    return load("liger_kernel.ops.swiglu", name, device).apply


@maker
def flash_swiglu(device: str, packed: bool) -> Callable[..., Tensor]:
    """FlashAttention's SwiGLU, by torch's jiterator."""
    swiglu = load("flash_attn.ops.activations", "swiglu", device)
    return (lambda joined: swiglu(*joined.chunk(2, -1))) if packed else swiglu
