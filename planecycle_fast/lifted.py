"""`lift`, and the module that it makes: the 2D model's own parts, run along the planes of a volume; `unlift`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .engine.attention_maps import AttentionMap, attention_map, check_patch
from .engine.depth_position import KINDS, add_depth, check_depth_position, describe_depth, tables_of
from .engine.embedding import embed
from .engine.framework_class import class_of, reduced
from .engine.graph_store import GraphOptions, GraphStore, graph_store
from .engine.lifted_block import LiftedBlock
from .engine.module_tree import LiftedTree, TreeModule
from .engine.passes import Step, check_strict, run_pass
from .engine.report import table_of
from .engine.stream import Layer, Stream, enter
from .engine.taps import Tap, hooks_on, live, tapped
from .features import VolumeFeatures, traceable
from .geometry.planes import DEFAULT_CYCLE, HW, Plane, Sizes, parse_cycle, permutation
from .geometry.pooling import Transition, between, check_pooling
from .hosts import Adapter, find_adapter
from .hosts.buffers import BufferCheck
from .hosts.description import BlockDescription
from .hosts.known import known_norm
from .hosts.placement import TensorsOfHost, brought, run_placed, running_place
from .hosts.wrapped import unwrapped
from .inputs import check_others, check_volume, plain, wanted_layers
from .ops import Norm
from .ops.activations.gelu import check_gelu
from .ops.choice import Choice
from .runtime.attentions import check_attention
from .runtime.backends import pick
from .runtime.recording import is_recording
from .runtime.tracing import fix_shape, shape_of
from .weights import saving

MODES = ("planecycle", "slice2d", "flatten3d")


class LiftedModel(TensorsOfHost, TreeModule):
    """A 2D model that takes volumes. Made by `lift`; attributes it lacks are those of the 2D model.

    `blocks` are called once per layer with the residual stream in plane order: `LiftedBlock` says what hooks on them
    see. Walking through the modules of a lifted model meets these blocks instead of the 2D model's, under the same
    names, so that sharding and checkpointing by block work.
    """

    gelu = "exact"  # of those that were pickled before there was another
    graphs: GraphStore | None = None

    def __init__(
        self,
        adapter: Adapter,
        mode: str,
        planes: tuple[Plane, ...],
        pool_method: str,
        globals_at: str,
        backend: str,
        attention: str,
        strict: bool,
        depth_position: str = "none",
        gelu: str = "exact",
        graphs: GraphStore | None = None,
    ) -> None:
        super().__init__(adapter.model, LiftedTree(adapter))
        # Past nn.Module.__setattr__: a child of the host may have the same name, and keeps it.
        self.__dict__.update(adapter=adapter, mode=mode, planes=planes, pool_method=pool_method, globals_at=globals_at)
        self.__dict__.update(backend=backend, attention=attention, strict=strict, check_buffers=BufferCheck())
        self.__dict__.update(depth_position=depth_position, gelu=gelu, taps={}, after_steps=None, graphs=graphs)
        self.__class__ = class_of(type(self), adapter)

    @property
    def cycle_order(self) -> tuple[str, ...]:
        """Names of the planes that the layers take in turn."""
        return tuple(plane.name for plane in self.planes)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, first to last: `LiftedBlock`s, or what has been put around them."""
        return self.lifted_tree.block_list(self._modules)

    @property
    def lifted_blocks(self) -> tuple[LiftedBlock, ...]:
        """The layers, without what has been put around them."""
        self.lifted_tree.layers()
        return self.lifted_tree.blocks

    def descriptions(self) -> list[BlockDescription]:
        """Per block: its parts, and which of them the model's own code runs and why (`kept`)."""
        return [block.description() for block in self.lifted_blocks]

    def report(self, volume_shape: Sequence[int] | None = None) -> None:
        """Prints per block what is fused, by which backend, what is not, and why; on a GPU also which attention runs.

        With ``lift(graphs=True)`` also what has been captured, what runs eagerly, and why.

        Args:
            volume_shape: (B, channels, D, height, width) in pixels, for which attention is said plane by plane; None:
                by the number of rows of a sequence, and the MLP as of many rows.

        Raises ValueError for a shape that no volume of this model has.
        """
        device, dtype = running_place(self) or (torch.device("cpu"), None)
        planes = None if volume_shape is None else self._lengths(volume_shape)
        choice = Choice.of(self.backend, self.attention, self.strict, device, self.gelu)
        print(table_of(self.descriptions(), choice, dtype, self.training, planes))
        if self.depth_position != "none":
            print(describe_depth(self.depth_position, self.adapter, self.planes))
        if self.graphs is not None:
            print(*self.graphs.describe(device), sep="\n")

    def _lengths(self, volume_shape: Sequence[int]) -> dict[str, tuple[int, int]]:
        """Sequences and rows along each plane of a volume (B, channels, D, height, width)."""
        given, channels = isinstance(volume_shape, Sequence), self.adapter.in_channels
        whole = given and len(volume_shape) == 5 and all([isinstance(n, int) and n > 0 for n in volume_shape])
        if not whole or volume_shape[1] != channels:
            expected = f"five sizes (B, {channels}, D, height, width), at least 1 each"
            got = repr(volume_shape) if given else type(volume_shape).__name__
            raise ValueError(f"volume_shape must be {expected}, got {got}")
        batch, _, depth, height, width = volume_shape
        self.adapter.check_image_size(height, width)
        patch_h, patch_w = self.adapter.patch_size
        sizes, g = (depth, height // patch_h, width // patch_w), self.adapter.num_globals
        return {plane.name: (batch * plane.slices(sizes), g + plane.length(sizes)) for plane in self.planes}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LiftedModel:
        super()._apply(fn, recurse)
        if self.graphs is not None:  # weights may be elsewhere: nothing holds the old ones
            self.graphs.drop_lost()
        return self

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self), name):  # a property of ours raised AttributeError: show that error
            return object.__getattribute__(self, name)
        return super().__getattr__(name)

    def passes_on(self, name: str) -> bool:
        return "adapter" in self.__dict__ and not name.startswith("__")

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and hasattr(LiftedModel, name) and name not in self._modules:
            if getattr(self, name) is value:
                return  # what walks through modules sets what it finds
            raise TypeError(f"{name} cannot be set to a module: it is an attribute of lifted models; set blocks[i]")
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self) or super().__reduce_ex__(protocol)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__class__ = class_of(type(self), self.adapter)

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of classes that are kept on one device, as transformers and accelerate ask for them."""
        theirs = getattr(self.host, "_no_split_modules", None) or ()
        replaced = {type(block.host).__name__ for block in self.lifted_blocks}
        return [LiftedBlock.__name__, *[name for name in theirs if name not in replaced]]

    @classmethod
    def is_custom_code(cls) -> bool:
        """What transformers asks of each part: where it saves a model around this one, keys of this part stay."""
        return True

    def _replicate_for_data_parallel(self) -> LiftedModel:
        raise TypeError("a lifted model cannot be replicated by DataParallel; use DistributedDataParallel")

    def plane_after(self, layer: int) -> Plane:
        """The plane whose slices have a set of globals each, in the features after a layer."""
        return HW if self.globals_at == "depth" else self.planes[layer % len(self.planes)]

    def extra_repr(self) -> str:
        order = ",".join(self.cycle_order)
        depth = "" if self.depth_position == "none" else f", depth_position={self.depth_position}"
        how = f"mode={self.mode}, cycle_order={order}, pool_method={self.pool_method}, globals_at={self.globals_at}"
        return how + depth + ("" if self.gelu == "exact" else f", gelu={self.gelu}")

    def forward(
        self,
        volume: Tensor,  # (B, 3, D, height, width), pixels
        **others: Any,
    ) -> VolumeFeatures:
        """Features of the last layer after the model's final norm.

        Raises:
            TypeError: volume is not a floating-point tensor, or an argument of the 2D model's forward, such as
                Hugging Face's output_attentions: the message says what does its work here.
            ValueError: wrong rank, channels or size, an empty volume, or another device or dtype than
                the model's.
        """
        check_others(others)
        return self._pass("forward", volume, lambda volume, sizes: self._layers(1, True, volume, sizes)[0])

    def intermediate(
        self,
        volume: Tensor,  # (B, 3, D, height, width), pixels
        n: int | Sequence[int] = 1,
        norm: bool = True,
    ) -> list[VolumeFeatures]:
        """Features after several layers, in layer order.

        Args:
            volume: as for `forward`.
            n: how many of the last layers, or the indices of layers (negative ones count from the end).
            norm: apply the model's final norm to each.

        Raises ValueError for layers that the model lacks, and whatever `forward` raises.
        """
        return self._pass("intermediate", volume, partial(self._layers, n, norm))

    def _layers(
        self,
        n: int | Sequence[int],
        norm: bool,
        volume: Tensor,  # (B, 3, D, height, width)
        sizes: Sizes,
    ) -> list[VolumeFeatures]:
        """Features after each layer wanted: by a graph where one was captured."""
        store = None if torch.compiler.is_compiling() else self.graphs
        if store is None or (self.taps and live(self.taps)):
            return self._run(volume, sizes, n, norm)
        wanted, told = frozenset(wanted_layers(n, len(self.lifted_tree.layers()))), self.after_steps
        replayed = None if told is None else partial(told, max(wanted) + 2)  # layers, and the norm

        def run(volume: Tensor) -> list[VolumeFeatures]:  # (B, 3, D, height, width)
            return self._run(volume, sizes, n, norm)

        return store.run(self, (wanted, norm), run, volume, self._wrapped, replayed)

    def _wrapped(self) -> str | None:
        around = next(self.around(), None)
        return None if around is None else f"a block is within a {type(around).__name__}"

    def pass_settings(self) -> list[Any]:
        """What a pass reads besides modules and their attributes."""
        tree = self.lifted_tree
        tree.layers()
        of_parts = [s for block in tree.blocks for s in getattr(block.reading.parts, "settings", tuple)()]
        return [tree.changes, *of_parts, *hooks_on(self.taps)]

    def tap(self, layer: int) -> Tap:
        """Where hooks see a layer's patches as maps (B, C, D, H, W), in canonical order, within the pass.

        For GradCAM, Captum's `LayerGradCam` and their like: what comes after the layer is computed from the output of
        this module, so that it has gradients, and a forward hook may return other maps in its place. Globals pass
        beside it: what is read from a class token does not depend on the patches of the last layer, but on those of
        the layers before. The same module at every call; it is no part of the tree of modules, and as long as nobody
        has hooks on it nothing of it runs.

        Args:
            layer: its index (negative ones count from the end).

        Raises TypeError or ValueError for one that the model lacks.
        """
        [i] = wanted_layers([layer], len(self.blocks), "layer")
        return self.taps.setdefault(i, Tap(i))

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Writes the 2D model's weights and the settings of the lift to a folder: `weights.saving.save_pretrained`."""
        saving.save_pretrained(self, folder, **options)

    def attention_maps(
        self,
        volume: Tensor,  # (B, 3, D, height, width), pixels
        layers: int | Sequence[int] = 1,
        patch: Sequence[int] | None = None,
    ) -> list[AttentionMap]:
        """Where class tokens, and a chosen patch, look in some layers, on the plane of each; in layer order.

        Args:
            volume: as for `forward`.
            layers: how many of the last ones, or their indices (negative ones count from the end).
            patch: (d, h, w), the indices of a patch; None: class tokens alone.

        Returns: an `AttentionMap` of each layer, with weights (B, heads, D, H, W) in float32, or in the model's dtype
        if that is wider. `viz.attention_picture` draws them.

        Raises:
            TypeError: layers or patch are no indices.
            ValueError: layers that the model lacks, a patch outside the volume, no patch for a model without a class
                token, attention that runs in the model's own code (`report()` says why), and whatever `forward` raises.
        """
        return self._pass("attention_maps", volume, partial(self._attention_maps, layers, patch))

    def _attention_maps(
        self,
        layers: int | Sequence[int],
        patch: Sequence[int] | None,
        volume: Tensor,  # (B, 3, D, height, width)
        sizes: Sizes,
    ) -> list[AttentionMap]:
        wanted_layers(layers, len(self.lifted_blocks), "layers")
        chosen, has_cls = check_patch(patch, sizes), self.adapter.has_cls
        maps: dict[int, AttentionMap] = {}
        if chosen is None and not has_cls:
            raise ValueError("patch must be given for a model without a class token, got None")

        def look(i: int, layer: Layer, stream: Stream) -> None:
            block = self.lifted_blocks[i]
            with brought(block.host):
                found = attention_map(i, block.description(), stream, layer, has_cls, chosen)
            maps.setdefault(i, found)  # checkpointed blocks run again in backward, and have to do the same

        def see(i: int, block: nn.Module, stream: Stream, layer: Layer) -> Stream:
            # Within its call: hooks before it have changed the stream, and weights that were sharded are there.
            return block(stream, replace(layer, look=partial(look, i, layer)))

        self._run(volume, sizes, layers, norm=False, see=see)
        return [*maps.values()]

    def _run(
        self,
        volume: Tensor,  # (B, 3, D, height, width)
        sizes: Sizes,
        n: int | Sequence[int],
        norm: bool,
        see: Callable[[int, nn.Module, Stream, Layer], Stream] | None = None,
    ) -> list[VolumeFeatures]:
        """Runs the layers up to the last one wanted; the features after each one wanted.

        `see` takes the place of calling those: it is given index, block, stream and layer.
        """
        blocks, planes, layers = self.lifted_tree.layers(), self.planes, {}
        wanted = wanted_layers(n, len(blocks))
        choice = Choice.of(self.backend, self.attention, self.strict, volume.device, self.gelu, volume.shape)
        check_strict(choice, self.attention, self.descriptions)
        axes, g = len(planes[0].sequence), self.adapter.num_globals
        tables = tables_of(self.depth_position, self.adapter, self.lifted_tree.blocks, volume, self.training, axes)
        embedded = embed(self.adapter, fix_shape(volume), choice)
        if self.depth_position == "sincos":
            inplace = choice.may_overwrite(embedded.patches, new=embedded.stream is not None)
            embedded = embedded.become(add_depth(embedded.patches, sizes[0], self.adapter, inplace))
        choice, taps = choice.for_rows(embedded.patches.shape[2]), live(self.taps)
        entering = Layer(HW, planes[0], sizes, g, self._pooling(HW, planes[0], sizes), choice)
        held = [enter(embedded, entering)]
        del embedded

        def step(i: int) -> Step:
            key = (i == 0, i % len(planes))  # of the planes before and after
            if tables.augments or key not in layers:  # each block may have angles of its own
                old, new = planes[(i - 1) % len(planes) if i else 0], planes[i % len(planes)]
                count = new.slices(sizes)  # of a stream that has just entered nothing is pooled
                pooling = self._pooling(old, new, sizes) if i else Transition(count, count)
                layers[key] = Layer(old, new, sizes, g, pooling, choice, tables.for_block(new, sizes))
            run = blocks[i] if see is None or i not in wanted else partial(see, i, blocks[i])
            return partial(tapped, taps[i], run) if i in taps else run, layers[key]

        final = self.adapter.final_norm() if norm else None
        final = None if final is None else known_norm(final)[0]  # else `Adapter.norm` runs

        def leave(i: int) -> tuple[Norm | None, Layer]:
            plane, target = planes[i % len(planes)], self.plane_after(i)
            pooling = Transition(plane.slices(sizes), target.slices(sizes))  # of the residual, before the norm
            return final, Layer(plane, target, sizes, g, pooling, choice)

        finish, told = partial(self._features, norm), None if is_recording() else self.after_steps
        return run_pass(step, held, wanted, leave, finish, tables.augments, told)  # draws: block by block

    def _pooling(self, old: Plane, new: Plane, sizes: Sizes) -> Transition:
        return between(old, new, sizes, self.pool_method, self.globals_at)

    def _features(self, norm: bool, out: Tensor | tuple[Tensor, Tensor], layer: Layer) -> VolumeFeatures:
        """Of tokens (B*S, g + L, C), or of them and their norm: canonical features."""
        tokens = out if isinstance(out, Tensor) else out[1]
        if norm and isinstance(out, Tensor):
            tokens = self.adapter.norm(tokens)
        slices, g, plane = layer.new.slices(layer.sizes), layer.num_globals, layer.new
        batch, channels = tokens.shape[0] // slices, tokens.shape[-1]
        patches = tokens[:, g:].reshape(batch, *plane.ordered(layer.sizes), channels)
        globals_ = tokens[:, :g].unflatten(0, (batch, slices))  # (B, S, g, C)
        has_cls = int(self.adapter.has_cls)
        features = VolumeFeatures(
            patches=patches.permute(permutation(plane, HW)),
            cls=globals_[:, :, 0] if has_cls else None,
            registers=globals_[:, :, has_cls:] if g > has_cls else None,
        )
        return traceable(features)

    def _pass(
        self,
        method: str,
        volume: Tensor,  # (B, 3, D, height, width)
        run: Callable[[Tensor, Sizes], Any],
    ) -> Any:
        """What a method does: ``run(volume, sizes)`` of a valid volume and its size (D, H, W) in tokens."""

        def checked(volume: Tensor) -> Any:  # (B, 3, D, height, width)
            check_volume(volume, self.adapter.in_channels, self)
            self.check_buffers(self.adapter)
            depth, height, width = shape_of(volume)[2:]
            self.adapter.check_image_size(height, width)
            patch_h, patch_w = self.adapter.patch_size
            return run(volume, (depth, height // patch_h, width // patch_w))

        return run_placed(self, method, checked, plain(volume))


def lift(
    model: nn.Module,
    mode: str = "planecycle",
    cycle_order: str | Sequence[str | Plane] = DEFAULT_CYCLE,
    pool_method: str = "PCg",
    globals_at: str = "depth",
    backend: str = "auto",
    attention: str = "auto",
    strict: bool = True,
    adapter: Callable[[nn.Module], Adapter] | None = None,
    depth_position: str = "none",
    gelu: str = "exact",
    graphs: bool | GraphOptions = False,
) -> LiftedModel:
    """A module that runs the 2D `model` on volumes, layer by layer along the planes of a cycle.

    Nothing is trained, copied or changed: the lifted model shares the very parameters, submodules and
    state_dict keys of `model`, so training, casting, loading and LoRA show in both. For an independent
    one, lift a ``copy.deepcopy(model)``. (Paper sections 2.2 and 2.3.)

    Args:
        model: a 2D vision transformer; see `planecycle_fast.hosts` for the supported classes.
        mode: "planecycle"; "slice2d", every slice by itself, which equals the 2D model; "flatten3d",
            all tokens of the volume in one sequence, at D times the cost of attention.
        cycle_order: planes of "planecycle", of any length, repeated over the layers.
        pool_method: "PCg" or "PCm", how globals pass between planes of "planecycle".
        globals_at: "depth" or "plane", where they rest between layers of "planecycle".
        backend: "auto" or a name of `backends()`.
        attention: "auto", or a name of `attentions.attentions()`.
        strict: a backend, attention or GELU asked for by name that would have to leave parts of a block to the model's
            own code (hooks, dropout, kinds it does not know) raises ValueError when the model runs; False lets it.
            `LiftedModel.report` lists these parts.
        adapter: a class or function that makes an `Adapter` for `model`, for models of your own.
        depth_position: "none", as in the paper; for models that know no place along D (DINOv2, CLIP, MAE) "sincos",
            which adds one to the patches, in slice2d too, or "rope1d", which turns queries and keys by it on planes
            that contain D. Neither learns anything; `planecycle_fast.engine.depth_position` says what they compute.
        gelu: "exact"; or "tanh_epilogue", in place of every exact GELU of an MLP its tanh approximation, off by up to
            4.8e-4, which cuBLASLt computes within the layer before it: faster in inference on NVIDIA GPUs, the same
            function everywhere, with gradients too. A model with other MLPs, such as SwiGLU, or whose own code runs
            them, raises ValueError when it runs, unless `strict` is False. `save_pretrained` records it.
        graphs: True, or `GraphOptions`: passes over volumes that repeat are captured as CUDA graphs, the second of a
            size, in inference and training, and replayed from then on; what no graph can do, and all on other devices
            than CUDA's, runs eagerly, and `LiftedModel.report` says why. A way to run: it is not saved.

    Raises:
        TypeError: model is no nn.Module, cycle_order no sequence of names, or graphs something else.
        ValueError: an unsupported model, or an unknown or unusable name in any other argument.
    """
    if isinstance(model, LiftedModel):
        raise ValueError(f"model is lifted already ({model.extra_repr()}); lift unlift(model) instead")
    cycle = check_names(mode, cycle_order, pool_method, globals_at, depth_position, gelu)
    if backend != "auto":
        pick(backend)
    check_attention(attention)
    host = _make_adapter(model, adapter)
    # The other modes are cycles too. "HW" never pools; "DHW" keeps one set of globals per volume.
    if mode != "planecycle":
        cycle, pool_method, globals_at = parse_cycle(("HW" if mode == "slice2d" else "DHW",)), "PCg", "plane"
    host.check_planes(cycle)
    check_depth_position(depth_position, host)
    how = (backend, attention, strict, depth_position, gelu, graph_store(graphs))
    return LiftedModel(host, mode, cycle, pool_method, globals_at, *how)


def check_names(
    mode: str, cycle_order: str | Sequence[str | Plane], pool_method: str, globals_at: str, depth_position: str,
    gelu: str,
) -> tuple[Plane, ...]:  # fmt: skip
    """The planes of a cycle. Raises ValueError or TypeError for any of these, as of `lift`, that no model can have."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    check_pooling(pool_method, globals_at)
    if depth_position not in KINDS:
        raise ValueError(f"depth_position must be one of {', '.join(KINDS)}, got {depth_position!r}")
    check_gelu(gelu)
    return parse_cycle(cycle_order)


def _make_adapter(model: nn.Module, adapter: Callable[[nn.Module], Adapter] | None) -> Adapter:
    if adapter is None:
        return find_adapter(model)(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(adapter):
        raise TypeError(f"adapter must be a class or function that makes an Adapter, got {type(adapter).__name__}")
    made = adapter(model)
    if not isinstance(made, Adapter):
        raise TypeError(f"adapter must make an Adapter, got {type(made).__name__}")
    return made


def unlift(lifted: LiftedModel) -> nn.Module:
    """The 2D model that was lifted: `unlift(lift(model)) is model`. Raises TypeError for anything else."""
    if not isinstance(lifted, LiftedModel):
        raise TypeError(f"lifted must be a model made by lift(), got {type(lifted).__name__}")
    return lifted.adapter.model


def lifted_in(model: nn.Module) -> LiftedModel:
    """A lifted model, or the one inside what torch has put around it. Raises TypeError for anything else."""
    inside = unwrapped(model) if isinstance(model, nn.Module) else model
    if not isinstance(inside, LiftedModel):
        raise TypeError(f"lifted must be a model made by lift(), got {type(inside).__name__}")
    return inside
