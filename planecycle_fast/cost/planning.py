"""What a pass over a volume will cost, before anything runs: FLOPs, bytes moved and peak memory.

The lifted model's own code runs, on tensors without data: shapes, dtypes and lifetimes are those of a real pass, and
`Meter` counts. For a CPU tensors are torch's fake ones, so that the code takes the paths that it takes there. For a GPU
they are on device "meta", which stands for it: neither CUDA nor a GPU is needed, triton is, else the reference is what
is planned (`Planned.path` says which).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..inputs import check_one_of
from ..lifted import LiftedModel, lift
from ..ops.choice import OPERATIONS, Choice
from ..runtime.backends import meta_stands_for_cuda
from ..weights.load import model_without_weights
from .gpus import PASSES
from .meter import Meter

CLASSES = 11  # of the head that is trained: the most of the 3D data sets in the paper
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Planned:
    """The cost of one step on one volume, of (B, channels, D, height, width). Bytes, unless it says otherwise."""

    shape: tuple[int, ...]
    flops: int  # operations, two per multiplication and addition of matrix products and attention
    read: int  # by all operations, each reading its inputs and
    written: int  # writing its outputs once
    launches: int  # operations: on a GPU at least as many kernels
    blocks: int  # passes of the host through a block, a backward counting as two
    peak_bytes: int  # that live at once above weights and volume; gradients count, a state of an optimiser does not
    weight_bytes: int  # parameters and buffers
    volume_bytes: int
    optimizer_bytes: int  # two moments for every trained parameter, in its dtype, as AdamW keeps them
    path: str  # which operations were planned: "triton", "cpu" or "reference", or several
    output_bytes: int = 0  # of the features, of "inference"

    @property
    def total_bytes(self) -> int:
        """All that must fit into memory at once."""
        return self.peak_bytes + self.weight_bytes + self.volume_bytes + self.optimizer_bytes


def plan(
    model: nn.Module | str,
    shape: tuple[int, ...],
    *,
    mode: str = "planecycle",
    pool_method: str = "PCg",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    step: str = "inference",
    backend: str = "auto",
    **settings: Any,
) -> Planned:
    """Plans one step of a lifted model; computes nothing and allocates nothing of the volume's size.

    Args:
        model: a 2D vision transformer, which stays as it is, on any device, "meta" too; or a name for
            `weights.load`.
        shape: of the volume, (B, channels, D, height, width) in pixels.
        mode, pool_method, backend, settings: as `lift` takes them.
        dtype: of weights and volume.
        device: "cpu", or "cuda" for an NVIDIA GPU, which need not be there.
        step: "inference"; "probe", features without gradients and a linear head on them, trained; "finetune", forward
            and backward of the whole model and a head. `take_step` says what they are.

    Raises:
        TypeError: model is neither a module nor a name, or an argument of a wrong type.
        ValueError: an unknown name, a shape that the model does not take, or what `lift` refuses.
    """
    check_one_of(step, PASSES, "step")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    if isinstance(shape, str) or len(shape) != 5 or not all([isinstance(n, int) and n > 0 for n in shape]):
        raise ValueError(f"shape must be five sizes (B, channels, D, height, width), at least 1 each, got {shape!r}")
    kind = torch.device(device).type
    if kind not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    if isinstance(model, str):
        model = model_without_weights(model)
    cast = _shell(model, torch.device("meta")).to(dtype)  # by the model, which may keep buffers: timm's RoPE does
    with _without_data(kind) as planned_device:
        shell = _shell(cast, planned_device).train(step == "finetune")
        lifted = lift(shell, mode=mode, pool_method=pool_method, backend=backend, **settings)
        volume = torch.empty(shape, dtype=dtype, device=planned_device)
        head = None if step == "inference" else make_head(lifted, volume)
        target = torch.zeros(shape[0], dtype=torch.long, device=planned_device)
        with Meter() as meter:
            out = take_step(lifted, volume, step, head, target)
        weights = [*lifted.parameters(), *lifted.buffers()]
        trained = [] if head is None else [*head.parameters(), *(lifted.parameters() if step == "finetune" else ())]
        return Planned(
            shape=tuple(shape),
            flops=meter.flops,
            read=meter.read,
            written=meter.written,
            launches=meter.launches,
            blocks=PASSES[step] * len(lifted.blocks),
            peak_bytes=meter.peak,
            weight_bytes=sum([t.nbytes for t in weights]),
            volume_bytes=volume.nbytes,
            optimizer_bytes=2 * sum([p.nbytes for p in trained if p.requires_grad]),
            path=_path(lifted, planned_device),
            output_bytes=sum([t.nbytes for t in out if t is not None]) if step == "inference" else 0,
        )


def take_step(
    lifted: LiftedModel,
    volume: Tensor,  # (B, channels, D, height, width)
    step: str,
    head: nn.Module | None = None,  # (B, C) -> (B, CLASSES)
    target: Tensor | None = None,  # (B,), of int64
) -> Any:
    """One step of training or inference, on tensors with data or without. Gradients stay in ``.grad``.

    "inference" returns the features; the others the loss, cross entropy of ``head(features.pooled())``.
    """
    if step == "inference":
        with torch.no_grad():
            return lifted(volume)
    with torch.set_grad_enabled(step == "finetune"):
        pooled = lifted(volume).pooled()
    loss = F.cross_entropy(head(pooled), target)
    loss.backward()
    return loss.detach()


def make_head(
    lifted: LiftedModel,
    volume: Tensor,  # (B, channels, D, height, width)
) -> nn.Linear:
    """What `take_step` trains on the features of such volumes: a linear layer to `CLASSES` classes."""
    with torch.no_grad():
        channels = lifted(volume[:1, :, :1]).patches.shape[-1]
    return nn.Linear(channels, CLASSES, dtype=volume.dtype, device=volume.device)


@contextlib.contextmanager
def _without_data(kind: str) -> Iterator[torch.device]:
    """Within the block tensors made on the device that it gives have no data."""
    if kind == "cpu":
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True):
            yield torch.device("cpu")
    else:
        with meta_stands_for_cuda(), GpuAttention():
            yield torch.device("meta")


class GpuAttention(TorchFunctionMode):
    """On "meta" torch's attention is the plain one, with all scores in memory; on an NVIDIA GPU it is one of these."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].device.type == "meta":
            return _gpu_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _gpu_attention(
    q: Tensor,  # (N, heads, rows, hd)
    k: Tensor,  # like q
    v: Tensor,  # like q
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # like q
    """FlashAttention for 16 bits, the memory-efficient one for float32 and with a mask."""
    if attn_mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    grad = torch.is_grad_enabled() and any([t.requires_grad for t in (q, k, v)])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, grad, dropout_p, is_causal, scale=scale)[0]


def _shell(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a model whose parameters and buffers have no data: on "meta", or within `_without_data`."""
    memo: dict[int, Any] = {}
    for t in (*model.parameters(), *model.buffers()):
        made = torch.empty_like(t, device=device)
        memo[id(t)] = nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made
    return copy.deepcopy(model, memo)


def _path(lifted: LiftedModel, device: torch.device) -> str:
    """Which backends the operations are planned on, and whether the model's own code runs as well."""
    choice = Choice.of(lifted.backend, lifted.attention, lifted.strict, device, lifted.gelu)
    found = {getattr(choice, op) for op in OPERATIONS}
    own = any([block.kept for block in lifted.descriptions()])
    return " and ".join([*sorted(found), *(["the model's own code"] if own else [])])
