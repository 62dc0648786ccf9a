"""What is timed of a network: inference, a step of a linear probe, a step of fine-tuning.

There is no optimiser: what it costs is the same for all. Steps return what contenders are compared by.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cost.planning import CLASSES
from .networks import Network

Run = Callable[[Tensor], tuple[Tensor, Tensor]]  # of `contenders.make`


def step_of(step: str, network: Network) -> Callable[[Tensor], Tensor]:
    """The step as a function of a volume (B, 3, D, height, width).

    inference  patches and one vector per volume, without gradients; returns the patches
    probe      the backbone without gradients, then forward and backward of a linear head; returns its gradient
    finetune   forward and backward of everything; returns the gradient of `network.weight`. Gradients are dropped
    """
    run, weight = network.run, network.weight
    if step == "inference":
        return lambda volume: inference(run, volume)[0]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        head = nn.Linear(network.width, CLASSES).to(weight.device, weight.dtype)
    if step == "probe":
        return lambda volume: _probe(run, head, volume)
    if step == "finetune":
        return lambda volume: _finetune(run, head, weight, volume)
    raise ValueError(f"step must be inference, probe or finetune, got {step!r}")


def inference(run: Run, volume: Tensor) -> tuple[Tensor, Tensor]:
    """(patches (B, D*H*W, C), one vector per volume (B, C))."""
    with torch.no_grad():
        return run(volume)


def _probe(run: Run, head: nn.Linear, volume: Tensor) -> Tensor:
    with torch.no_grad():
        vectors = run(volume)[1]
    with torch.enable_grad():
        _loss(head, vectors).backward()
    return _taken(head.weight, head)


def _finetune(run: Run, head: nn.Linear, weight: Tensor, volume: Tensor) -> Tensor:
    with torch.enable_grad():
        _loss(head, run(volume)[1]).backward()
    return _taken(weight, run, head)


def _loss(head: nn.Linear, vectors: Tensor) -> Tensor:
    labels = torch.arange(len(vectors), device=vectors.device) % CLASSES
    return F.cross_entropy(head(vectors).float(), labels)


def _taken(parameter: Tensor, *modules: nn.Module) -> Tensor:
    """The gradient of `parameter`; all gradients are gone afterwards."""
    gradient = parameter.grad
    for module in modules:
        for each in module.parameters():
            each.grad = None
    return gradient
