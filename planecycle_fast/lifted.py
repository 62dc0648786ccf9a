"""The module that `lift` makes: the 2D model's own parts, run along the planes of a volume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Adapter
from .attention_maps import AttentionMap, attention_map, check_patch
from .blocks import LiftedBlock, SharedModule, Step, holds_lifted, list_of, mirrored, run_lifted
from .depth_position import describe_depth, embed_with_depth, tables_of
from .features import VolumeFeatures
from .inputs import check_volume, not_taken, wanted_layers
from .layer import Layer, Stream, enter
from .ops import Norm
from .ops.registry import resolve
from .parts import Plan, known_norm
from .planes import HW, Plane, Sizes, permutation
from .pooling import Transition, between
from .report import describe
from .rope import PlaneAngles
from .stream import check_strict
from .taps import Tap, live, tapped
from .tracing import fix_shape, shape_of, traceable


class LiftedModel(SharedModule):
    """A 2D model that takes volumes. Made by `lift`; attributes it lacks are those of the 2D model.

    `blocks` are called once per layer with the residual stream in plane order: `LiftedBlock` says what hooks on them
    see. Walking through the modules of a lifted model meets these blocks instead of the 2D model's, under the same
    names, so that sharding and checkpointing by block work.
    """

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
    ) -> None:
        super().__init__(adapter.model)
        # Past nn.Module.__setattr__: a child of the host may have the same name, and keeps it.
        self.__dict__.update(adapter=adapter, mode=mode, planes=planes, pool_method=pool_method, globals_at=globals_at)
        self.__dict__.update(backend=backend, attention=attention, strict=strict, lifted_blocks=(), mirrors={})
        self.__dict__.update(depth_position=depth_position, taps={})

    @property
    def cycle_order(self) -> tuple[str, ...]:
        """Names of the planes that the layers take in turn."""
        return tuple(plane.name for plane in self.planes)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, first to last: `LiftedBlock`s, or what has been put around them."""
        hosts = list(self.adapter.blocks)
        known = self.lifted_blocks
        if len(hosts) != len(known) or not all([mine.host is host for mine, host in zip(known, hosts)]):
            self._lift_blocks(hosts)
        return self.block_list

    def _lift_blocks(self, hosts: list[nn.Module]) -> None:
        known = {id(block.host): block for block in self.lifted_blocks}
        blocks = tuple([known.get(id(host)) or LiftedBlock(self.adapter, host) for host in hosts])
        by_host = {id(block.host): block for block in blocks}
        children = {name: child for name, child in self._modules.items() if child is not None}
        replaced = {name: mirrored(child, by_host) for name, child in children.items()}
        mirrors = {name: module for name, module in replaced.items() if module is not children[name]}
        self.__dict__.update(lifted_blocks=blocks, mirrors=mirrors, block_list=list_of(mirrors.values(), blocks))

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As of any module, with lifted blocks in place of the 2D model's."""
        _ = self.blocks
        seen = set()
        for name, module in self._modules.items():
            module = self.mirrors.get(name, module)
            if module is not None and module not in seen:
                seen.add(module)
                yield name, module

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As of any module, with lifted blocks in place of the 2D model's."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        _ = self.blocks
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, module in self._modules.items():
            module = self.mirrors.get(name, module)
            if module is not None:
                yield from module.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def plans(self) -> list[Plan]:
        """Per block: the parts that the model's own code runs, and why."""
        _ = self.blocks
        return [block.plan() for block in self.lifted_blocks]

    def report(self) -> None:
        """Prints per block what is fused, by which backend, what is not, and why."""
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        print(describe(self.plans(), self.backend, self.attention, self.strict, device))
        if self.depth_position != "none":
            print(describe_depth(self.depth_position, self.adapter, self.planes))

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self), name):  # a property of ours raised AttributeError: show that error
            return object.__getattribute__(self, name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "adapter" not in self.__dict__ or name.startswith("__"):
                raise
        return getattr(self.adapter.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and holds_lifted(value):  # what walks through modules sets what it finds
            if self.mirrors.get(name) is value:
                return
            raise TypeError(f"{name} cannot be set to a module that holds lifted blocks; set blocks[i] one by one")
        host = self.__dict__["adapter"].model if "adapter" in self.__dict__ else None
        if host is not None and name in host.__dict__ and name not in self.__dict__ and name != "training":
            setattr(host, name, value)  # what one reads through the lifted model, one sets through it
        else:
            super().__setattr__(name, value)

    def _replicate_for_data_parallel(self) -> LiftedModel:
        raise TypeError("a lifted model cannot be replicated by DataParallel; use DistributedDataParallel")

    def extra_repr(self) -> str:
        order = ",".join(self.cycle_order)
        depth = "" if self.depth_position == "none" else f", depth_position={self.depth_position}"
        how = f"mode={self.mode}, cycle_order={order}, pool_method={self.pool_method}, globals_at={self.globals_at}"
        return how + depth

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
        if others:
            raise TypeError(not_taken(next(iter(others))))
        sizes = self._check(volume)
        return self._run(volume, sizes, 1, norm=True)[0]

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
        sizes = self._check(volume)
        return self._run(volume, sizes, n, norm)

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
        """Writes the 2D model's weights and the settings of the lift to a folder: `pretrained.save_pretrained`."""
        from .pretrained import save_pretrained  # which needs what makes lifted models

        save_pretrained(self, folder, **options)

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
        sizes = self._check(volume)
        wanted_layers(layers, len(self.blocks), "layers")
        chosen, has_cls, maps = check_patch(patch, sizes), self.adapter.has_cls, {}
        if chosen is None and not has_cls:
            raise ValueError("patch must be given for a model without a class token, got None")

        def look(i: int, layer: Layer, stream: Stream) -> None:
            if i not in maps:  # checkpointed blocks run again in backward
                maps[i] = attention_map(i, self.lifted_blocks[i].reading.now(), stream, layer, has_cls, chosen)

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
        blocks, features, layers = list(self.blocks), [], {}
        wanted = wanted_layers(n, len(blocks))
        check_strict(self.backend, self.attention, self.strict, self.plans, volume.device)
        axes = len(self.planes[0].sequence)
        tables = tables_of(self.depth_position, self.adapter, self.lifted_blocks, volume, self.training, axes)
        images = fix_shape(volume).transpose(1, 2).flatten(0, 1)  # (B*D, 3, height, width)
        backend, planes = resolve(self.backend, volume.device), self.planes
        embedded = embed_with_depth(self.depth_position, sizes[0], self.adapter, images, backend)
        held, taps = [enter(*embedded, self._layer(backend, HW, planes[0], sizes))], live(self.taps)
        del embedded

        def step(i: int) -> Step:
            key = (i == 0, i % len(planes))  # of the planes before and after
            if tables.augments or key not in layers:  # each block may have angles of its own
                old, new = planes[(i - 1) % len(planes) if i else 0], planes[i % len(planes)]
                layers[key] = self._layer(backend, old, new, sizes, tables.for_block(new, sizes), entered=i == 0)
            run = blocks[i] if see is None or i not in wanted else partial(see, i, blocks[i])
            return partial(tapped, taps[i], run) if i in taps else run, layers[key]

        done, last = 0, max(wanted)
        for end in range(last + 1) if tables.augments else sorted(wanted):  # draws are made block by block
            steps = [step(i) for i in range(done, end + 1)]
            leaving = self._leaving(planes[end % len(planes)], sizes, norm, backend) if end in wanted else None
            if end == last and leaving[0] is not None:
                steps.append(leaving)
            while steps:
                held = [run_lifted(steps, held)]
            if leaving is not None:
                features.append(self._features(held[0], *leaving, norm))
                held = [] if end == last else [Stream(*held[0])]  # seen: features may be views of it
            done = end + 1
        return features

    def _layer(
        self,
        backend: str,
        old: Plane,
        new: Plane,
        sizes: Sizes,
        angles: PlaneAngles | None = None,
        entered: bool = False,
    ) -> Layer:
        """A change of planes; of none, and no pooling, where the stream has just `entered`."""
        m = between(old, new, sizes, self.pool_method, self.globals_at)
        if entered:
            m = Transition(new.slices(sizes), new.slices(sizes))
        g = self.adapter.num_globals
        return Layer(old, new, sizes, g, m, angles, backend, self.attention, self.strict)

    def _leaving(self, plane: Plane, sizes: Sizes, norm: bool, backend: str) -> tuple[Norm | None, Layer]:
        """The model's final norm, where it is asked for and operations know it, and the change to canonical order."""
        target = HW if self.globals_at == "depth" else plane
        pooling = Transition(plane.slices(sizes), target.slices(sizes))  # of the residual, before the norm
        layer = Layer(plane, target, sizes, self.adapter.num_globals, pooling, backend=backend, strict=self.strict)
        return known_norm(self.adapter.final_norm())[0] if norm else None, layer

    def _features(
        self, out: Stream | tuple[Tensor, Tensor], final: Norm | None, layer: Layer, norm: bool
    ) -> VolumeFeatures:
        """Of a stream, or of tokens and their norm: canonical features."""
        if isinstance(out, Stream):
            out = layer.switch(out, final)
        tokens = out if final is None else out[1]  # (B*S, g + L, C)
        if norm and final is None:
            tokens = self.adapter.norm(tokens)
        slices, g, plane = layer.new.slices(layer.sizes), layer.num_globals, layer.new
        batch, channels = len(tokens) // slices, tokens.shape[-1]
        patches = tokens[:, g:].reshape(batch, *plane.ordered(layer.sizes), channels)
        globals_ = tokens[:, :g].unflatten(0, (batch, slices))  # (B, S, g, C)
        has_cls = int(self.adapter.has_cls)
        features = VolumeFeatures(
            patches=patches.permute(permutation(plane, HW)),
            cls=globals_[:, :, 0] if has_cls else None,
            registers=globals_[:, :, has_cls:] if g > has_cls else None,
        )
        return traceable(features)

    def _check(self, volume: Tensor) -> Sizes:
        """Validates the volume; returns its size (D, H, W) in tokens."""
        check_volume(volume, self.adapter.in_channels, self.host)
        depth, height, width = shape_of(volume)[2:]
        self.adapter.check_image_size(height, width)
        patch_h, patch_w = self.adapter.patch_size
        return depth, height // patch_h, width // patch_w
