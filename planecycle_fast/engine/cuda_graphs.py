"""CUDA graphs: a pass recorded for one shape of volume, and replayed on new ones without Python between kernels.

For small volumes a GPU waits for the host, launch after launch; a graph launches all kernels at once. `Graph` is one
of them, with its gradients; `graph_store` keeps several for a lifted model.
"""

from __future__ import annotations

import random
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..hosts.buffers import version
from ..runtime.backends import asked_for
from ..runtime.recording import HostDraws, is_recording, recording
from . import cuda_recorder
from .embedding import is_one_channel
from .snapshot import Snapshot, modules_of

WARM_UPS = 3  # runs before capture: kernels compile, libraries allocate what they need
_VERSION = attrgetter("_version")
_LEAF: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]  # autograd's node of one
_one_at_a_time = threading.Lock()  # recordings: torch allows no more
_ADVICE = "no value may go back to Python, and no hook may wait for one"


class GraphChangedError(ValueError):
    """A model is not what it was when its graph was captured; the message says what has changed."""


class Graph:
    """A captured model: call it with a volume of the captured shape, dtype and device. Made by `cuda_graph`.

    Gradients, where it was captured with them, go into ``.grad`` as those of the model do.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[Tensor], Any],  # the pass
        volume: Tensor,  # (B, 3, D, Himg, Wimg)
        gradients: bool,
        own_results: bool = True,
    ) -> None:
        self.model, self.own_results, self._run = model, own_results, run
        self.mode = mode_of(volume.device)
        self.replays = 0
        self._recorder, self._device = cuda_recorder.RECORDER, volume.device
        self._snapshot = Snapshot(model)
        self._trains = any([m.training for m in model.modules()])  # buffers and random numbers go on with every pass
        self._draws, self._generators, self._lock = HostDraws(), _generators(model), threading.RLock()
        self._pending: Callable[[], Any] = _nothing
        self._leaves = _Leaves(model if gradients else None)
        self._learns: list[Tensor] = []  # parameters that have a gradient
        self._parameters = [p for p in model.parameters() if not p.is_inference()]
        self._needs: list[frozenset[int]] = []  # of those, and of the volume if it has one, by which outputs
        with (
            _one_at_a_time,
            torch.inference_mode(False),
            torch.set_grad_enabled(gradients),
            self._recorder.on(volume.device),
        ):
            self._record(volume)
        if (why := self._snapshot.moved() or self._snapshot.changed()) is not None:
            raise RuntimeError(f"the model changes while it runs: {why}")
        self._stream = self._recorder.stream(volume.device)

    # ----- Recording

    def _record(self, volume: Tensor) -> None:
        """Warm-ups, then the passes; random numbers and buffers are afterwards what they were."""
        device = volume.device
        self._place_volume(volume)
        buffers = [(b, b.clone(), version(b)) for b in self.model.buffers()]
        weights = [*self.model.parameters(), *self._leaves.made]
        versions = [version(t) for t in weights]
        host = torch.get_rng_state()
        try:
            # Casts of weights are part of a graph, not kept from one pass to the next.
            with self._recorder.same_draws(device), _no_cached_casts(), self._recorder.aside(device):
                self._warm_up()
                backward = self._backward_pass if self._needs else None
                self._recorded = self._recorder.record(self._forward_pass, backward, device)
        finally:
            torch.set_rng_state(host)
            with torch.no_grad():
                for buffer, before, at in buffers:
                    if self._trains or version(buffer) != at:  # batch norm writes without a new version
                        buffer.copy_(before)
        if versions != [version(t) for t in weights]:
            raise RuntimeError("the model writes to its parameters as it runs")

    def _place_volume(self, volume: Tensor) -> None:
        """What passes read, and the memory behind it, which is written to: of one channel where all are the same."""
        of_one = volume.ndim > 1 and is_one_channel(volume)
        self._place = (volume[:, :1] if of_one else volume).detach().clone(memory_format=torch.contiguous_format)
        self._input = self._place.expand(volume.shape) if of_one else self._place
        self._input.requires_grad_(torch.is_grad_enabled() and volume.requires_grad)

    def _warm_up(self) -> None:
        every = [*([self._input] if self._input.requires_grad else []), *self._leaves.made]
        for i in range(WARM_UPS):
            last, state = i == WARM_UPS - 1, torch.get_rng_state()
            others = [get_state() for get_state, _ in self._generators]
            self._draws.hand_out() if last else self._draws.collect()
            with self._recorder.no_waiting() if last else nullcontext():
                with recording(self._draws), self._leaves:
                    leaves, self._spec = tree_flatten(self._run(self._input))
                tensors = [t for t in leaves if isinstance(t, Tensor)]
                self._constants = [None if isinstance(t, Tensor) else _constant(t) for t in leaves]
                self._is_tensor = [isinstance(t, Tensor) for t in leaves]
                self._differentiable = [t.requires_grad for t in tensors]
                ends = [t for t in tensors if t.requires_grad]
                self._ends = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in ends]
                if i == 0:
                    _check_leaves(ends, every)
                if i == 0 and every and ends:
                    self._find_needs(ends, every)
                elif self._needs:
                    self._backward_pass(tensors)
            del leaves, tensors, ends
            if not last:
                self._check_draws(state, others)

    def _find_needs(self, ends: list[Tensor], every: list[Tensor]) -> None:
        """Which outputs give a gradient to which input: the rest has none, as in eager passes."""
        needs: list[set[int]] = [set() for _ in every]
        with torch.autocast(self._device.type, enabled=False):
            for i, (end, ones) in enumerate(zip(ends, self._ends)):
                found = torch.autograd.grad([end], every, [ones], retain_graph=True, allow_unused=True)
                for need, gradient in zip(needs, found):
                    need |= set() if gradient is None else {i}
        kept = [(t, frozenset(need)) for t, need in zip(every, needs) if need]
        self._needs = [need for _, need in kept]
        self._learns = [self._leaves.of(t) for t, _ in kept if t is not self._input]
        self._wanted = [t for t, _ in kept]
        kinds = dict.fromkeys([t.dtype for t in self._wanted])
        self._groups = [[i for i, t in enumerate(self._wanted) if t.dtype == kind] for kind in kinds]

    def _check_draws(self, state: Tensor, others: list[Any]) -> None:
        """Raises RuntimeError for random numbers that a replay would repeat. The states are those before a pass."""
        if any([_plain(get_state()) != _plain(before) for (get_state, _), before in zip(self._generators, others)]):
            for (_, set_state), before in zip(self._generators, others):
                set_state(before)
            raise RuntimeError("the model draws random numbers in Python, which every replay would repeat")
        if not self._recorder.draws_alone():
            return
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        self._draws.draw_only()
        if not torch.equal(after, torch.get_rng_state()):
            raise RuntimeError("the model draws random numbers on the CPU, which every replay would repeat")

    def _forward_pass(self) -> list[Tensor]:
        self._draws.hand_out()
        with recording(self._draws), self._leaves:
            return [t for t in tree_flatten(self._run(self._input))[0] if isinstance(t, Tensor)]

    def _backward_pass(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """All gradients, those of a dtype side by side, so that one copy takes them out."""
        ends = [t for t in outputs if t.requires_grad]
        with torch.autocast(self._device.type, enabled=False):
            found = torch.autograd.grad(ends, self._wanted, self._ends)
            return [torch._utils._flatten_dense_tensors([found[i] for i in group]) for group in self._groups]

    # ----- Replaying

    def __call__(
        self,
        volume: Tensor,  # of the captured shape
    ) -> Any:
        """What the model returns for this volume, in memory of its own. Python hooks do not run.

        Gradients as far as they were captured: none in a graph of inference.

        Raises:
            TypeError: volume is not a tensor.
            ValueError: another shape, dtype or device than was captured, a volume that needs a gradient where none was
                captured, another state of autocast, or a model that has changed: weights that have moved or been
                replaced, hooks, modes and settings.
            RuntimeError: another graph is being captured on this stream.
        """
        _check_tensor(volume)
        captured = self._input
        for name in ("shape", "dtype", "device"):
            if getattr(volume, name) != getattr(captured, name):
                expected, got = (_text(getattr(t, name)) for t in (captured, volume))
                raise ValueError(
                    f"volume must have the captured {name}, {expected}, got {got}; capture again for others"
                )
        if self._place is not captured and volume.stride(1):
            raise ValueError(
                "volume must be of one channel, expanded, as that of the capture, got one of several; capture again"
            )
        if (why := self._recorder.why_not(captured.device)) is not None:
            raise RuntimeError(f"a graph cannot be replayed here: {why}")
        if self._needs and volume.requires_grad and not captured.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "volume must need no gradient, as that of the capture, got one that does; capture again with it"
            )
        if (mode := mode_of(captured.device)) != self.mode:
            raise ValueError(
                f"autocast, and the switches of kernels, must be as they were captured, {self.mode}, got {mode}; "
                "capture again"
            )
        return self.replay(volume)

    def replay(
        self,
        volume: Tensor,  # as captured
    ) -> Any:
        """The same, for a volume that has been looked at. Raises GraphChangedError for a model that has changed."""
        if (why := self._snapshot.moved()) is not None:
            raise _changed(why)
        gradients = bool(self._needs) and torch.is_grad_enabled()
        before = gradients or self._trains
        if before and (why := self._snapshot.changed()) is not None:
            raise _changed(why)
        taken = _Replayed.apply(self, volume, *self._learns) if gradients else self.take(volume, look=not before)
        outputs = iter(taken)
        leaves = [next(outputs) if is_tensor else c for is_tensor, c in zip(self._is_tensor, self._constants)]
        return tree_unflatten(leaves, self._spec)

    @property
    def nbytes(self) -> int:
        """Of device memory."""
        return self._recorded.nbytes + sum([t.nbytes for t in (self._place, *self._ends)])

    @property
    def is_lost(self) -> bool:
        """Whether weights are elsewhere now, so that it can never be replayed again."""
        return self._snapshot.moved() is not None

    @property
    def is_pending(self) -> bool:
        """Whether a forward pass waits for its backward pass, whose memory the next one would overwrite."""
        return self._pending() is not None

    def take(
        self,
        volume: Tensor,  # as captured
        look: bool = False,
    ) -> list[Tensor]:
        """The tensors of a forward pass. With `look` the model is compared with what it was while the device works."""
        with self._lock, torch.no_grad(), self._recorder.on(self._device):
            self._follow()
            self._draws.draw_again()
            self._place.copy_(volume if self._place is self._input else volume[:, :1])
            self._recorded.forward()
            self.replays += 1
            if look and (why := self._snapshot.changed()) is not None:
                raise _changed(why)
            return [t.clone() if self.own_results else t.detach() for t in self._recorded.outputs]

    def take_gradients(
        self,
        gradients: Sequence[Tensor | None],  # of those outputs that can have one
    ) -> list[Tensor | None]:
        """Gradients of the volume, if it has one, and of the parameters in `_learns`."""
        with self._lock, torch.no_grad(), self._recorder.on(self._device):
            self._follow()
            for place, gradient in zip(self._ends, gradients):
                place.zero_() if gradient is None else place.copy_(gradient)
            self._recorded.backward()
            flat = [t.clone() for t in self._recorded.gradients]
        given = {i for i, gradient in enumerate(gradients) if gradient is not None}
        found: list[Tensor | None] = [None] * len(self._wanted)
        for group, together in zip(self._groups, flat):
            parts = torch._utils._unflatten_dense_tensors(together, [self._wanted[i] for i in group])
            for i, part in zip(group, parts):
                found[i] = part if self._needs[i] & given else None
        return found if self._input.requires_grad and self._wanted[0] is self._input else [None, *found]

    def _follow(self) -> None:
        """Waits for the stream of the last replay, where that was another one."""
        stream = self._recorder.stream(self._device)
        if stream != self._stream:
            self._recorder.wait_for(self._stream, self._device)
            self._stream = stream

    def versions(self) -> int:
        """Changes with what is written to parameters, frozen ones too, and to results that are memory of the graph."""
        results = () if self.own_results else self._recorded.outputs
        return sum(map(_VERSION, self._parameters)) + sum(map(_VERSION, results))

    def begin(self) -> object:
        """What is held as long as a backward pass may come."""
        token = _Token()
        self._pending = weakref.ref(token)
        return token


class _Leaves:
    """Within the block a model has tensors of its own as parameters: the same memory, but leaves of no other pass.

    What autograd does last for a leaf is bound to the stream on which it was used first, as long as any pass of then
    is alive, or DistributedDataParallel: that cannot be part of a capture on another stream.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._places: list[tuple[dict[str, Any], str, nn.Parameter, nn.Parameter]] = []
        by_original: dict[nn.Parameter, nn.Parameter] = {}
        dictionaries = {} if model is None else {id(m._parameters): m._parameters for m in modules_of(model)}
        for held in dictionaries.values():
            for name, p in held.items():
                if p is not None and p.requires_grad:
                    leaf = by_original.setdefault(p, nn.Parameter(p.detach()))
                    self._places.append((held, name, p, leaf))
        self.made: list[Tensor] = [*by_original.values()]
        self._originals: dict[Tensor, Tensor] = {leaf: p for p, leaf in by_original.items()}

    def of(self, leaf: Tensor) -> Tensor:
        """The parameter whose memory a leaf has."""
        return self._originals[leaf]

    def __enter__(self) -> None:
        for held, name, _original, leaf in self._places:
            held[name] = leaf

    def __exit__(self, *raised: object) -> None:
        for held, name, original, _leaf in self._places:
            held[name] = original


class _Token:
    """Held by a forward pass until its backward pass has run."""


def _nothing() -> None:
    """In the place of a reference to what is gone."""


class _Replayed(torch.autograd.Function):
    """A replay of the forward pass, and in backward one of the other."""

    @staticmethod
    def forward(ctx: Any, graph: Graph, volume: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        outputs = graph.take(volume)
        ctx.graph, ctx.turn, ctx.versions, ctx.pending = graph, graph.replays, graph.versions(), graph.begin()
        ctx.mark_non_differentiable(*[t for t, has in zip(outputs, graph._differentiable) if not has])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        graph = ctx.graph
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a pass replayed as a CUDA graph has no second derivative; run create_graph=True without graphs"
            )
        if ctx.pending is None:
            raise RuntimeError("backward of this pass has run already; keep it by retain_graph=True, as without graphs")
        if graph.replays != ctx.turn:
            raise RuntimeError(
                "activations of this pass have been overwritten by a later one through the same graph; run backward "
                "before the next forward pass, or capture two graphs"
            )
        if graph.versions() != ctx.versions:
            raise RuntimeError(
                "parameters, or results that are memory of the graph, have been written to between the forward pass "
                "and backward"
            )
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.pending = None
        ends = [g for g, has in zip(gradients, graph._differentiable) if has]
        return (None, *graph.take_gradients(ends))


def _changed(why: str) -> GraphChangedError:
    return GraphChangedError(f"the model is not as it was captured: {why}; capture it again")


def mode_of(device: torch.device) -> tuple[Any, ...]:
    """What besides a model and its volume says which kernels run: autocast, the backend, and torch's switches."""
    on = torch.is_autocast_enabled(device.type)
    autocast = torch.get_autocast_dtype(device.type) if on else None
    return (f"autocast {autocast}", asked_for("auto"), *cuda_recorder.RECORDER.settings())


def why_not_recorded(model: nn.Module, device: torch.device) -> str | None:
    """Why no pass of a model on this device can be recorded, whatever it computes; or None."""
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.device != device:
            return f"its {name} is on {t.device}, the volume on {device}"
        if is_traceable_wrapper_subclass(t):
            return f"its {name} is a {type(t).__name__}, whose memory is not known"
    if parametrize._cache_enabled:
        return "torch.nn.utils.parametrize.cached() keeps weights that a graph would go on to read"
    held = next((name for name, b in model.named_buffers() if b.requires_grad), None)
    return None if held is None else f"its buffer {held} needs a gradient"


def _generators(model: nn.Module) -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Of random numbers that no device draws, but for torch's own: reading the state of each, and setting it."""
    found: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [(random.getstate, random.setstate)]
    if (numpy := sys.modules.get("numpy")) is not None:
        found.append((numpy.random.get_state, numpy.random.set_state))
    held = {id(v): v for m in modules_of(model) for v in vars(m).values() if isinstance(v, torch.Generator)}
    return found + [(own.get_state, own.set_state) for own in held.values() if own.device.type == "cpu"]


def _plain(state: Any) -> Any:
    """A generator's state, as it can be compared: without arrays and tensors."""
    if isinstance(state, dict):
        return {name: _plain(each) for name, each in state.items()}
    if isinstance(state, tuple):
        return [*map(_plain, state)]
    return state.tolist() if hasattr(state, "tolist") else state


def _constant(leaf: Any) -> Any:
    """What a model returns besides tensors. Raises RuntimeError for what may hold some: they would stay as they are."""
    if leaf is None or isinstance(leaf, (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)):
        return leaf
    raise RuntimeError(
        f"the model returns a {type(leaf).__name__}, which may hold tensors; expected tensors, and tuples, lists or "
        "dictionaries of them (others as registered by torch.utils._pytree)"
    )


def _check_leaves(
    ends: Sequence[Tensor],  # what a pass returns, with its record for gradients
    every: Sequence[Tensor],  # whose gradients are known to be wanted
) -> None:
    """Raises RuntimeError where others would have a gradient too, which replays would lose."""
    known: set[int] = {*map(id, every)}
    waiting: list[Any] = [t.grad_fn or t for t in ends]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = node if isinstance(node, Tensor) else node.variable if isinstance(node, _LEAF) else None
        if leaf is None:
            waiting.extend([before for before, _ in node.next_functions])
        elif id(leaf) not in known:
            raise RuntimeError("the model keeps parameters elsewhere than in its modules")


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
    gradients: bool | None = None,
    own_results: bool = True,
) -> Graph:
    """Captures a lifted model for volumes like this one.

    Weights may change in place afterwards. What is captured is what runs now: the mode, backend, attention and hooks of
    this moment, and autocast. Random numbers (drop path, augmentation of positions) are new in every replay; the
    capture takes none from torch's generators. `lift(model, graphs=True)` captures by itself, for several shapes.

    With gradients, every forward pass is followed by its backward pass before the next one; they go into ``.grad``
    (and add up there) as usual, in memory of their own. For DistributedDataParallel use ``lift(graphs=True)``.

    Args:
        model: a lifted or accelerated model, or one that holds some, on the volume's device.
        volume: any values; one that needs a gradient gets it, where gradients are captured.
        gradients: capture backward too; None: of a model in training mode.
        own_results: results are the caller's. False: they are memory of the graph, which the next call overwrites,
            and which costs no copy.

    Raises:
        TypeError: model is no module, or volume no tensor.
        ValueError: a volume that is not on a CUDA device, a model with parts elsewhere, or one in
            DistributedDataParallel; or gradients of a model where nothing needs one.
        RuntimeError: the model does something that a graph cannot hold, another graph is being captured, or there is
            not enough memory.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check_tensor(volume)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model must be what DistributedDataParallel holds, got the latter: its reducer is Python that no graph "
            "holds; use DistributedDataParallel(lift(model, graphs=True))"
        )
    if not cuda_recorder.RECORDER.takes(volume.device):
        raise ValueError(f"volume must be on a CUDA device to be captured in a CUDA graph, got {volume.device}")
    wanted = model.training if gradients is None else gradients
    if (why := why_not_recorded(model, volume.device)) is not None:
        raise ValueError(f"model must be one that a CUDA graph can hold: {why}")
    if gradients and not (volume.requires_grad or any([p.requires_grad for p in model.parameters()])):
        raise ValueError("gradients must be of parameters or a volume that need them, got none that does")
    if (why := cuda_recorder.RECORDER.why_not(volume.device)) is not None or is_recording():
        raise RuntimeError(f"the model cannot be captured here: {why or 'it is being captured'}")
    try:
        return Graph(model, model, volume, wanted, own_results)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            traceback.clear_frames(error.__traceback__)  # which hold what has been captured so far
        cuda_recorder.RECORDER.give_back()
        raise RuntimeError(
            f"the model cannot be captured in a CUDA graph: {error}; expected a model whose forward only launches work "
            f"on the GPU: {_ADVICE}"
        ) from error


def _check_tensor(volume: object) -> None:
    if not isinstance(volume, Tensor):
        raise TypeError(f"volume must be a tensor, got {type(volume).__name__}")


def _text(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
