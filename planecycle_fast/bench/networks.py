"""The network of a cell, ready to run: an implementation of a vision transformer, or a peer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from .cells import PEER, Cell, parse_volume
from .contenders import make
from .peers import WIDTH, peer


class Network(NamedTuple):
    """What steps are made of."""

    run: Callable[[Tensor], tuple[Tensor, Tensor]]  # from a volume to patches (B, D*H*W, C) and vectors (B, C)
    width: int  # C
    weight: nn.Parameter  # the first that a volume meets: its gradient has passed through everything
    weight_bytes: int  # of all parameters and buffers


def network(
    cell: Cell,
    host: nn.Module | None,  # of `contenders.vit`; None for peers
    volume: Tensor,  # (B, 3, D, height, width), any values
) -> Network:
    """Raises NotHereError for what this machine lacks."""
    if cell.code == PEER:
        run = peer(cell.model, parse_volume(cell.volume), volume.device, volume.dtype)
        return Network(run, WIDTH[cell.model], next(run.parameters()), _bytes(run))
    run = make(host, cell.mode, cell.code, volume, cell.step == "finetune")
    module = getattr(run, "_orig_mod", run)  # within what torch.compile returns
    model = module.model if isinstance(module, nn.Module) else host  # a CUDA graph is no module
    return Network(run, host.embed_dim, model.patch_embed.proj.weight, _bytes(host))


def _bytes(module: nn.Module) -> int:
    return sum([t.nbytes for t in (*module.parameters(), *module.buffers())])
