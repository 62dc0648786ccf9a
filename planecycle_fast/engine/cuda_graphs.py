"""CUDA graphs: a model captured for one shape of volume, and replayed on new ones without Python between kernels.

For small volumes a GPU waits for the host, launch after launch; a graph launches all kernels at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

WARM_UPS = 3  # runs before capture: kernels compile, libraries allocate what they need


class Graph:
    """A captured model: call it with a volume of the captured shape, dtype and device. Made by `cuda_graph`."""

    def __init__(self, model: nn.Module, volume: Tensor) -> None:
        self.model = model
        self._places = _places(model)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(volume.device)
        stream.wait_stream(torch.cuda.current_stream(volume.device))
        # A buffer that anyone may write to, no inference tensor; casts of weights are part of the graph, not cached.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(volume.device), _no_cached_casts():
            self._input = volume.detach().clone()
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    model(self._input)
            torch.cuda.current_stream().wait_stream(stream)
            try:
                with torch.cuda.graph(self._graph, stream=stream):
                    self._output = model(self._input)
            except RuntimeError as error:
                raise RuntimeError(
                    f"the model cannot be captured in a CUDA graph: {error}; expected a model whose forward only "
                    "launches work on the GPU: no value may go back to Python, and no hook may wait for one"
                ) from error

    def __call__(
        self,
        volume: Tensor,  # of the captured shape
    ) -> Any:
        """What the model returns for this volume, in memory of its own. No gradients; Python hooks do not run.

        Raises:
            TypeError: volume is not a tensor.
            ValueError: another shape, dtype or device than was captured; or weights that have moved or been replaced.
        """
        _check_tensor(volume)
        captured = self._input
        for name in ("shape", "dtype", "device"):
            if getattr(volume, name) != getattr(captured, name):
                expected, got = (_text(getattr(t, name)) for t in (captured, volume))
                raise ValueError(
                    f"volume must have the captured {name}, {expected}, got {got}; capture again for others"
                )
        places = _places(self.model)
        if places != self._places:
            name = next(name for name in {**self._places, **places} if places.get(name) != self._places.get(name))
            raise ValueError(f"the model's {name} has moved in memory since the graph was captured; capture it again")
        with torch.no_grad(), torch.cuda.device(captured.device):
            captured.copy_(volume)
            self._graph.replay()
            return tree_map_only(Tensor, torch.clone, self._output)


def _places(model: nn.Module) -> dict[str, int]:
    """Where parameters and buffers are in memory, by name."""
    return {name: t.data_ptr() for name, t in (*model.named_parameters(), *model.named_buffers())}


@contextmanager
def _no_cached_casts() -> Iterator[None]:
    """Autocast casts weights in every pass: what it kept from one to the next would not follow them."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def cuda_graph(
    model: nn.Module,
    volume: Tensor,  # (B, 3, D, Himg, Wimg), on a CUDA device
) -> Graph:
    """Captures a lifted model for volumes like this one; for inference.

    Weights may change in place afterwards. What is captured is what runs now: the backend, attention and hooks of
    this moment.

    Args:
        model: a lifted or accelerated model in evaluation mode, on the volume's device.
        volume: any values.

    Raises:
        TypeError: model is no module, or volume no tensor.
        ValueError: a volume that is not on a CUDA device, or a model in training mode.
        RuntimeError: the model does something that a graph cannot hold.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check_tensor(volume)
    if volume.device.type != "cuda":
        raise ValueError(f"volume must be on a CUDA device to be captured in a CUDA graph, got {volume.device}")
    if model.training:
        raise ValueError("model must be in evaluation mode, model.eval(): random draws would repeat with every replay")
    return Graph(model, volume)


def _check_tensor(volume: object) -> None:
    if not isinstance(volume, Tensor):
        raise TypeError(f"volume must be a tensor, got {type(volume).__name__}")


def _text(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
