"""`lift(graphs=True)`: graphs of the passes that repeat, by shape of volume; everything else runs eagerly, and why.

The first pass of a kind runs eagerly, the second is captured. What was captured and no longer fits, as the model has
changed or as others needed the memory, runs eagerly again, and is captured later the sooner it was lost.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from ..hosts.known import why_called
from ..hosts.placement import is_sharded
from ..runtime.recording import is_recording
from ..runtime.tracing import recorder, transforms_active
from . import cuda_recorder
from .cuda_graphs import Graph, GraphChangedError, mode_of, why_not_recorded
from .embedding import is_one_channel
from .snapshot import modules_of

ENTRIES = 64  # passes that are known at a time
AT_ONCE = 4  # graphs of one kind, of passes that wait for backward at the same time
USEFUL = 16  # replays: fewer do not pay for a capture
MOST_WAITING, REFUSED = 4096, 64  # eager passes before a capture: at most, and after one that failed


@dataclass(frozen=True)
class GraphOptions:
    """What ``lift(graphs=...)`` takes besides True.

    Raises ValueError for a limit, or a largest size, that is no positive number.
    """

    limit: int | None = None  # bytes of device memory for all graphs of a model; None: a quarter of the device's
    own_results: bool = True  # results are the caller's; False: the next call of that shape overwrites them
    largest: int | None = 2**26  # elements of a volume; of more the kernels take longer than their launches

    def __post_init__(self) -> None:
        for name, of in (("limit", "bytes"), ("largest", "elements")):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value <= 0):
                raise ValueError(f"{name} must be a positive number of {of}, or None, got {value!r}")


class GraphStore:
    """The graphs of one model. Copies of it are empty."""

    def __init__(self, options: GraphOptions) -> None:
        self.options = options
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()  # least recently used first
        self._eager: Counter[str] = Counter()  # passes that no graph can do, by reason
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphStore, (self.options,)

    def run(
        self,
        model: nn.Module,
        what: Hashable,
        run: Callable[[Tensor], Any],
        volume: Tensor,  # (B, C, D, height, width)
        wrapped: Callable[[], str | None],
        replayed: Callable[[], Any] | None = None,
    ) -> Any:
        """``run(volume)``, by a graph where there is one.

        Args:
            model: whose pass it is, with all that it reads; several where one was copied by ``copy.copy``.
            what: the pass, besides the volume and the model.
            wrapped: says what stands around a block, whose Python would not run in replays.
            replayed: called after a replay.
        """
        why = why_eager(volume) or cuda_recorder.RECORDER.why_not(volume.device)
        if why is None and self.options.largest is not None and volume.numel() > self.options.largest:
            why = f"volumes of more than {self.options.largest:,} elements keep a GPU busy without graphs"
        if why is not None:
            if not is_recording():
                self._eager[why] += 1
                self.drop_lost()
            return self._run_eagerly(model, run, volume)
        lies = volume.shape, volume.dtype, volume.device, volume.requires_grad, is_one_channel(volume)
        kind = (id(model), what, *lies, torch.is_grad_enabled(), model.training, *mode_of(volume.device))
        with self._lock:
            entry = self._entry(kind, model, volume)
            graph = None if entry is None else self._graph(entry, model, run, volume, wrapped)
            try:
                found = None if graph is None else (graph.replay(volume),)
            except GraphChangedError as error:
                assert entry is not None
                entry.lose(str(error))
                self.drop_lost()
                found = None
        if found is None:
            return self._run_eagerly(model, run, volume)
        if replayed is not None:
            replayed()
        return found[0]

    def _run_eagerly(self, model: nn.Module, run: Callable[[Tensor], Any], volume: Tensor) -> Any:
        """With the memory of all graphs, should it need that; not where a second run would draw or count twice."""
        try:
            return run(volume)
        except torch.OutOfMemoryError:
            draws = torch.is_grad_enabled() or any([m.training for m in model.modules()])
            if is_recording() or draws or not self.captured:
                raise
        with self._lock:  # the error, and what it held, is gone
            for entry in self._entries.values():
                if entry.graph is not None:
                    entry.lose("an eager pass needed its memory")
        cuda_recorder.RECORDER.give_back()
        return run(volume)

    def clear(self) -> None:
        """Gives all memory back; what repeats is captured anew."""
        with self._lock:
            self._entries.clear()
        cuda_recorder.RECORDER.give_back()

    def drop_lost(self) -> None:
        """Graphs hold on to the weights that they were captured with: no longer, once they are elsewhere."""
        # Eager passes do not wait for another thread's capture: it waits for autograd's thread, which may be in one.
        if not self._lock.acquire(blocking=False):
            return
        try:
            for entry in self._entries.values():
                if entry.graph is not None and entry.graph.is_lost:
                    entry.lose("weights have moved or been replaced")
        finally:
            self._lock.release()

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len([entry for entry in self._entries.values() if entry.graph is not None])

    def describe(self, device: torch.device) -> list[str]:
        """Lines for `report`."""
        if not cuda_recorder.RECORDER.takes(device):
            return [f"graphs: none, everything runs eagerly: {cuda_recorder.RECORDER.why_not(device)}"]
        with self._lock:
            entries, eager = [*self._entries.values()], [*self._eager.items()]
        held = [each for each in entries if each.graph is not None]
        total = sum([each.nbytes for each in held])
        lines = [f"graphs: {len(held)} captured, {total / 2**20:.0f} of at most {self._limit(device) / 2**20:.0f} MiB"]
        lines += [f"  {each.describe()}" for each in entries]
        lines += [f"  eager, {count} times: {reason}" for reason, count in eager]
        return lines if len(lines) > 1 else [*lines, "  the second volume of a size will be captured"]

    def _limit(self, device: torch.device) -> int:
        return self.options.limit or cuda_recorder.RECORDER.total_memory(device) // 4

    def _entry(self, kind: tuple[Any, ...], model: nn.Module, volume: Tensor) -> _Entry | None:
        """Of this kind the first whose backward pass has run; None where too many wait for theirs."""
        for number in range(AT_ONCE):
            key = (*kind, number)
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = _Entry(_words(volume, model.training))
            if entry.graph is None or not entry.graph.is_pending:
                self._entries.move_to_end(key)
                while len(self._entries) > ENTRIES:
                    self._entries.popitem(last=False)
                return entry
        self._eager[f"{AT_ONCE} passes of a kind wait for backward, each in a graph"] += 1
        return None

    def _graph(
        self,
        entry: _Entry,
        model: nn.Module,
        run: Callable[[Tensor], Any],
        volume: Tensor,  # (B, C, D, height, width)
        wrapped: Callable[[], str | None],
    ) -> Graph | None:
        """The graph of an entry, captured if it is time to."""
        if entry.graph is not None:
            return entry.graph
        entry.seen += 1
        if entry.seen <= entry.waits:
            return None
        why = wrapped() or why_not_captured(model, volume.device)
        if why is None:
            try:
                entry.graph = Graph(model, run, volume, torch.is_grad_enabled(), self.options.own_results)
            except torch.OutOfMemoryError:
                why = "there was not enough memory to capture it"
            except Exception as error:  # an eager pass raises what is wrong with the model or the volume
                why = f"it cannot be captured: {str(error).strip() or type(error).__name__}"
        if why is not None:
            entry.refuse(why)
            cuda_recorder.RECORDER.give_back()
            return None
        return self._make_room(entry, volume.device)

    def _make_room(self, newest: _Entry, device: torch.device) -> Graph | None:
        """Graphs that were used least recently go, until all others are within the limit."""
        limit, gone = self._limit(device), False
        if newest.nbytes > limit:
            newest.refuse(f"its graph takes {newest.nbytes / 2**20:.0f} MiB, of at most {limit / 2**20:.0f}")
            cuda_recorder.RECORDER.give_back()
            return None
        for entry in [*self._entries.values()]:
            if sum([each.nbytes for each in self._entries.values()]) <= limit:
                break
            if entry.graph is not None and entry is not newest:
                entry.lose("its graph gave way to others, which were used since")
                gone = True
        if gone:
            cuda_recorder.RECORDER.give_back()
        return newest.graph


class _Entry:
    """One kind of pass: its graph, or why there is none."""

    def __init__(self, words: str) -> None:
        self.words, self.why = words, "until it repeats"
        self.graph: Graph | None = None
        self.waits, self.seen = 1, 0  # eager passes before a capture, and those that there were

    @property
    def nbytes(self) -> int:
        return 0 if self.graph is None else self.graph.nbytes

    def lose(self, why: str) -> None:
        """The graph is no use any more; the next is captured the later, the less this one was used."""
        used = self.graph is not None and self.graph.replays > USEFUL
        self.graph, self.why, self.seen = None, why, 0
        self.waits = 1 if used else min(4 * self.waits, MOST_WAITING)

    def refuse(self, why: str) -> None:
        self.lose(why)
        self.waits = max(self.waits, REFUSED)

    def describe(self) -> str:
        if self.graph is None:
            return f"{self.words}: eager, {self.why}"
        return f"{self.words}: captured, {self.graph.replays} replays, {self.nbytes / 2**20:.0f} MiB"


def graph_store(graphs: bool | GraphOptions) -> GraphStore | None:
    """What ``graphs=`` stands for. Raises TypeError for anything but True, False and `GraphOptions`."""
    if not isinstance(graphs, (bool, GraphOptions)):
        raise TypeError(f"graphs must be True, False or GraphOptions, got {type(graphs).__name__}")
    return GraphStore(GraphOptions() if graphs is True else graphs) if graphs else None


def _words(volume: Tensor, training: bool) -> str:
    shape, dtype = "x".join(map(str, volume.shape)), str(volume.dtype).removeprefix("torch.")
    step = "with gradients" if torch.is_grad_enabled() else "without gradients"
    return f"{shape} {dtype}, {step}" + (", in training" if training else "")


def why_eager(
    volume: Tensor,  # any shape
) -> str | None:
    """Why this very pass has to run operation by operation, or None: somebody sees, changes or repeats them."""
    if is_recording():
        return "it is being captured itself"
    if (recording := recorder()) is not None:
        return f"{recording} is running"
    if transforms_active():
        return "a transform of torch.func, or forward mode, is active"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode sees all operations"
    if torch._C._len_torch_function_stack() and any(
        [type(mode) is not torch.utils._device.DeviceContext for mode in _get_current_function_mode_stack()]
    ):
        return "a function mode sees all calls"
    if type(volume) not in (Tensor, nn.Parameter):
        return f"the volume is a {type(volume).__name__}"
    if torch._C._current_graph_task_id() != -1:
        return "it is computed again within backward"
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return "hooks decide what is kept for backward"
    return "anomaly detection looks at every operation" if torch.is_anomaly_enabled() else None


def why_not_captured(model: nn.Module, device: torch.device) -> str | None:
    """Why passes of a model are not captured without being asked for: Python of somebody's would not run in replays."""
    for module, name in modules_of(model).items():
        if is_sharded(module):
            return f"its {name or 'root'} is sharded, and its weights come and go"
        if module is not model and (reason := why_called(module)) is not None:
            return f"its {name}: {reason}"
    return why_not_recorded(model, device)
