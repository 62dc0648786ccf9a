"""What recording and replaying needs of CUDA, and nothing else: tests put a stand-in in the place of `RECORDER`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

Forward = Callable[[], "list[Tensor]"]
Backward = Callable[["list[Tensor]"], "list[Tensor]"]  # of the outputs of the forward pass


class Recorded(Protocol):
    """A pass that can be replayed on the memory it was recorded with."""

    outputs: list[Tensor]  # where a replay writes them
    gradients: list[Tensor]
    nbytes: int  # of device memory that it holds

    def forward(self) -> None: ...

    def backward(self) -> None: ...


class CudaRecorder:
    """Records passes by `torch.cuda.CUDAGraph`."""

    def takes(self, device: torch.device) -> bool:
        """Whether this kind of device has graphs."""
        return device.type == "cuda"

    def why_not(self, device: torch.device) -> str | None:
        """Why nothing can be recorded, or replayed, on a device now; or None."""
        if not self.takes(device):
            return f"CUDA graphs need a CUDA device, the volume is on {device}"
        if torch.cuda.is_current_stream_capturing():
            return "another CUDA graph is being captured on this stream, which takes the launches of eager code"
        return None

    def total_memory(self, device: torch.device) -> int:
        """Bytes of a device."""
        return torch.cuda.get_device_properties(device).total_memory

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        """Within the block the device is the current one."""
        return torch.cuda.device(device)

    def stream(self, device: torch.device) -> Any:
        """The current stream."""
        return torch.cuda.current_stream(device)

    def wait_for(self, stream: Any, device: torch.device) -> None:
        """What comes on the current stream runs after all that is on another one."""
        torch.cuda.current_stream(device).wait_stream(stream)

    def give_back(self) -> None:
        """Returns memory that nobody uses to the device."""
        with suppress(RuntimeError):  # of a device that has failed: the first error is the one to be shown
            torch.cuda.empty_cache()

    @contextmanager
    def same_draws(self, device: torch.device) -> Iterator[None]:
        """Random numbers of the device go on after the block as before it."""
        state = torch.cuda.get_rng_state(device)
        try:
            yield
        finally:
            torch.cuda.set_rng_state(state, device)

    def draws_alone(self) -> bool:
        """Whether the CPU's generator is another one than that of the device, which replays advance by themselves."""
        return True

    def settings(self) -> tuple[Any, ...]:
        """Switches of torch that say which kernels run."""
        c = torch._C
        # Not allow_tf32 and its like, which raise once fp32_precision has been set; what they set shows here as well.
        precision = c._get_fp32_precision_getter
        return (
            precision("generic", "all"), *[precision("cuda", of) for of in ("all", "matmul", "conv")],
            c._get_deterministic_algorithms(), c._get_cudnn_enabled(), c._get_cudnn_benchmark(),
            c._get_cudnn_deterministic(), c._get_flash_sdp_enabled(), c._get_mem_efficient_sdp_enabled(),
            c._get_math_sdp_enabled(), c._get_cudnn_sdp_enabled(), *c._get_sdp_priority_order(),
            c._get_cublas_allow_bf16_reduced_precision_reduction(),
            c._get_cublas_allow_fp16_reduced_precision_reduction(), c._get_cublas_allow_fp16_accumulation(),
        )  # fmt: skip

    @contextmanager
    def aside(self, device: torch.device) -> Iterator[None]:
        """Within the block a stream of its own is current, which waits for the present one, and is waited for."""
        stream, before = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            before.wait_stream(stream)

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Within the block what waits for the device raises RuntimeError, as it would while a graph is captured.

        A capture that has failed leaves torch's allocator less than it found: better to know before.
        """
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is a prototype of torch's
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def record(self, forward: Forward, backward: Backward | None, device: torch.device) -> Recorded:
        """Both passes, on the current stream, in memory of their own. Raises RuntimeError for what cannot be."""
        return _CudaRecorded(forward, backward, device)


class _CudaRecorded:
    def __init__(self, forward: Forward, backward: Backward | None, device: torch.device) -> None:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.current_stream(device)
        self._graphs = [torch.cuda.CUDAGraph() for _ in range(1 if backward is None else 2)]
        self.gradients: list[Tensor] = []
        # Threads that load data may go on: with "global" errors would come of what they ask of CUDA.
        with torch.cuda.graph(self._graphs[0], pool, stream, "thread_local"):
            made = forward()
        if backward is not None:
            with torch.cuda.graph(self._graphs[1], pool, stream, "thread_local"):
                self.gradients = [t.detach() for t in backward(made)]
        self.outputs = [t.detach() for t in made]
        self.nbytes = max(0, torch.cuda.memory_reserved(device) - before)

    def forward(self) -> None:
        self._graphs[0].replay()

    def backward(self) -> None:
        self._graphs[1].replay()


RECORDER = CudaRecorder()
