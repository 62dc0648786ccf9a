"""The methods of an accelerated model: callable objects that know it, so that they are copied and pickled with it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..engine.embedding import Embedded, by_product, may_be_product
from ..engine.graph_store import GraphStore
from ..engine.passes import OnStream, Step, check_strict, run_pass
from ..engine.report import table_of
from ..engine.stream import Layer, Stream, enter
from ..geometry.planes import DHW, HW, Plane, Sizes, parse_plane
from ..geometry.pooling import Transition, between
from ..geometry.rope import PlaneAngles, kept
from ..hosts.description import BlockDescription, Reading, describe
from ..hosts.dinov3 import (
    BLOCK,
    block_parts,
    common_norm,
    embed_parts,
    from_patches,
    input_channels,
    norm_parts,
    patch_projection,
    takes_volumes,
)
from ..hosts.known import known_norm, why_called
from ..inputs import check_volume, wanted_layers
from ..ops import Norm
from ..ops.choice import Choice
from ..runtime.tracing import fix_shape, shape_of

PLANES = ("HW", "DW", "DH")  # of a converted block


class AuthorsBlock(OnStream):
    """A block of the authors' model in one pass: by itself, or the 2D block within a converted one.

    Hooks on it make it run as a whole, `AuthorsBlock.whole`.
    """

    def __init__(self, reading: Reading, block: nn.Module, as_list: bool) -> None:
        self.reading, self.block, self.as_list = reading, block, as_list

    def whole(self, tokens: Tensor, layer: Layer) -> Tensor:
        if self.as_list:  # as the authors' model calls it: hooks see that
            return self.block([tokens], [layer.sincos])[0]
        return self.block(tokens, layer.sincos)


class Method:
    """What the shadowing methods share: running the blocks on the residual stream."""

    _read: Sequence[tuple[nn.Module, Reading]] = ()  # 2D blocks and what they consist of, kept between passes

    gelu = "exact"  # of those that were pickled before there was another
    graphs: GraphStore | None = None

    def __init__(
        self,
        model: nn.Module,
        backend: str,
        attention: str,
        strict: bool,
        gelu: str = "exact",
        graphs: GraphStore | None = None,
    ) -> None:
        self.model, self.backend, self.attention, self.strict, self.gelu = model, backend, attention, strict, gelu
        self.graphs = graphs

    def __getstate__(self) -> dict[str, Any]:  # copies look for themselves
        return {name: value for name, value in vars(self).items() if name != "_read"}

    def _prepare(
        self,
        x: Tensor,  # (B, 3, D, height, width)
        masks: Tensor | None = None,  # (B*D, H*W) bool, (B, D*H*W) for Flatten3D
    ) -> tuple[Sizes, Plane]:
        """The volume's size in tokens, and the plane whose order the model's own tokens are in. Checks all of it."""
        model = self.model
        check_volume(x, input_channels(model), model, "x")
        depth, *pixels = shape_of(x)[2:]
        sizes = (depth, *[n // model.patch_size for n in pixels])  # a rest is lost, as it always was
        start = DHW if takes_volumes(model) and model.block_type == "Flatten3D" else HW
        if any([n < 1 for n in sizes]):
            size = model.patch_size
            raise ValueError(f"x must have slices of at least one patch, {size} x {size} pixels, got {tuple(x.shape)}")
        if masks is not None:
            expected = (x.shape[0] * start.slices(sizes), start.length(sizes))
            if not isinstance(masks, Tensor) or masks.dtype != torch.bool or tuple(masks.shape) != expected:
                got = f"{masks.dtype} of {tuple(masks.shape)}" if isinstance(masks, Tensor) else type(masks).__name__
                raise ValueError(f"masks must be a bool tensor of shape {expected}, got {got}")
        return sizes, start

    def _run(
        self,
        x: Tensor,  # (B, 3, D, height, width)
        masks: Tensor | None,
        wanted: set[int],
        as_list: bool = False,  # how blocks that are not converted are called: hooks see it
        norm: bool = True,
        local: bool = False,  # see `norm_parts`
    ) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Sizes]:
        """Per layer wanted: tokens (N, g + L, C), in the order of the model's own; of them, or with `norm` of their
        final norm, globals (N, g, C) and patches (N, L, C). And sizes.
        """
        sizes, start = self._prepare(x, masks)
        store = None if torch.compiler.is_compiling() or masks is not None else self.graphs
        if store is None:
            return self._blocks(x, masks, sizes, start, wanted, as_list, norm, local), sizes

        def run(x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:  # (B, 3, D, height, width)
            return self._blocks(x, None, sizes, start, wanted, as_list, norm, local)

        what = (frozenset(wanted), as_list, norm, local)
        return store.run(self.model, what, run, x, self._wrapped), sizes

    def _wrapped(self) -> str | None:
        reason = next((block.whole for block in self.descriptions() if block.whole is not None), None)
        return None if reason is None else f"a block as a whole is called: {reason}"

    def pass_settings(self) -> Sequence[Any]:
        """What a pass reads besides modules and their attributes."""
        return self.backend, self.attention, self.strict, self.gelu

    def _blocks(
        self,
        x: Tensor,  # (B, 3, D, height, width)
        masks: Tensor | None,
        sizes: Sizes,
        start: Plane,
        wanted: set[int],
        as_list: bool,
        norm: bool,
        local: bool,
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        model, g, layers, tables = self.model, self.model.n_storage_tokens + 1, {}, {}
        choice = Choice.of(self.backend, self.attention, self.strict, x.device, self.gelu, x.shape)
        check_strict(choice, self.attention, self.descriptions)
        converted, readings, blocks = self._converted, self._readings(), [*model.blocks]
        inside = [converted and _need_not_be_called(block) for block in blocks]
        planes = [plane_of(block) if plain else start for block, plain in zip(blocks, inside)]
        embedded, at = self._embed(x, masks, start, choice)
        channels = embedded.patches.shape[2]
        choice = choice.for_rows(channels)
        count = planes[0].slices(sizes)  # globals are all alike
        entering = Layer(at, planes[0], sizes, g, Transition(at.slices(sizes), count), choice)
        held, shape = [enter(embedded, entering)], (x.shape[0], *sizes, channels)
        del embedded

        def angles_of(rope: nn.Module | None, plane: Plane) -> PlaneAngles | None:
            """By the model's own module: once per plane, or anew for every block while it may draw."""
            if rope is not None and (rope.training or (rope, plane) not in tables):
                grid = plane.grid(sizes)  # (n0, n1), or (D, H, W)
                tables[rope, plane] = _angles(rope, grid)
            return tables.get((rope, plane))

        def step(i: int) -> Step:
            block, plane, old = blocks[i], planes[i], planes[max(i - 1, 0)]
            rope = block.rope_embed if inside[i] else None if converted else model.rope_embed
            pool_method = _pool_method(block) if inside[i] else "PCg"
            key = (i == 0, old, plane, rope, pool_method)
            if key not in layers or (rope is not None and rope.training):  # which may draw for each block
                m = between(old, plane, sizes, pool_method)
                if i == 0 or start == DHW:
                    m = Transition(plane.slices(sizes), plane.slices(sizes))
                layers[key] = Layer(old, plane, sizes, g, m, choice, angles_of(rope, plane))
            if converted and not inside[i]:
                return partial(_call_converted, block, shape), layers[key]
            inner, reading = readings[i]
            return AuthorsBlock(reading, inner, as_list and not converted), layers[key]

        def leave(i: int) -> tuple[Norm | None, Layer]:
            m = Transition(planes[i].slices(sizes), start.slices(sizes))
            return final, Layer(planes[i], start, sizes, g, m, choice)

        def split(out: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            tokens, normed = out if isinstance(out, tuple) else (out, out)
            if norm and final is None:
                return tokens, *norm_parts(model, tokens, local)
            return tokens, normed[:, :g], normed[:, g:]

        common = common_norm(model, local) if norm else None
        final = None if common is None else known_norm(common)[0]

        # RoPE and drop path draw in the order of the blocks.
        draws = model.training or (model.rope_embed is not None and model.rope_embed.training)
        found = run_pass(step, held, wanted, leave, lambda out, layer: out, draws)
        return [split(out) for out in found]

    def _embed(
        self,
        x: Tensor,  # (B, 3, D, height, width)
        masks: Tensor | None,
        start: Plane,
        choice: Choice,
    ) -> tuple[Embedded, Plane]:
        """All tokens before the first block, and the plane in whose order they are."""
        model, x, g = self.model, fix_shape(x), self.model.n_storage_tokens + 1
        projection = patch_projection(model) if masks is None and may_be_product(x, choice) else None
        if projection is not None:
            return by_product(projection, partial(from_patches, model), g, x, choice), HW
        images = x.transpose(1, 2).flatten(0, 1)  # (B*D, 3, height, width)
        embedded = embed_parts(model, images) if masks is None else None
        if embedded is not None:
            return Embedded(*embedded), HW
        tokens = model.prepare_tokens_with_masks(x if takes_volumes(model) else images, masks)[0]
        return Embedded(tokens[:, g:], tokens[:, :g]), start

    @property
    def _converted(self) -> bool:
        return not takes_volumes(self.model) or self.model.block_type == "PlaneCycle"

    def _readings(self) -> Sequence[tuple[nn.Module, Reading]]:
        """The 2D block of each block, and what it consists of."""
        inner = [block.blk2d for block in self.model.blocks] if self._converted else [*self.model.blocks]
        if torch.compiler.is_compiling():  # what is kept would be guarded: a graph more at the second call
            return [(block, Reading(block_parts(block))) for block in inner]
        if len(inner) != len(self._read) or not all([known is block for (known, _), block in zip(self._read, inner)]):
            self._read = [(block, Reading(block_parts(block))) for block in inner]
        return self._read

    def descriptions(self) -> list[BlockDescription]:
        """Per block: its parts, and which of them the model's own code runs and why (`kept`)."""
        called = "it, or its plane change, is watched or wrapped"
        return [
            describe(called) if self._converted and not _need_not_be_called(block) else reading.now()
            for block, (_, reading) in zip(self.model.blocks, self._readings())
        ]


def _call_converted(
    block: nn.Module,
    shape: tuple[int, ...],  # (B, D, H, W, C)
    stream: Stream,
    layer: Layer,
) -> Stream:
    """A converted block that somebody watches, as the authors' model calls it: in the model's own order."""
    return Stream(block(layer.switch(stream), shape))


class ForwardFeatures(Method):
    """`forward_features_list` of an accelerated model."""

    def __call__(self, x_list: Sequence[Tensor], masks_list: Sequence[Tensor | None]) -> list[dict[str, Tensor]]:
        """Features of volumes (B, 3, D, height, width), one dictionary each.

        Blocks of Slice2D and Flatten3D take several volumes at once, by the model's own code (drop path
        draws for all of them together). Converted blocks take one after another; the authors' code
        silently drops all volumes but the first.

        Raises ValueError or TypeError for volumes or masks that do not fit the model or each other.
        """
        if not isinstance(x_list, Sequence) or not isinstance(masks_list, Sequence) or not x_list:
            got = f"{type(x_list).__name__} and {type(masks_list).__name__}" if x_list else "no volume"
            raise ValueError(f"x and masks must be lists of equal length, one mask or None for each volume, got {got}")
        if len(x_list) != len(masks_list):
            raise ValueError(
                f"masks must hold one mask or None for each of {len(x_list)} volumes, got {len(masks_list)}"
            )
        model, last = self.model, len(self.model.blocks) - 1
        if len(x_list) > 1 and takes_volumes(model) and model.block_type != "PlaneCycle":
            return type(model).forward_features_list(model, x_list, masks_list)
        outputs = []
        for i, (x, masks) in enumerate(zip(x_list, masks_list)):
            [(tokens, globals_, patches)], _ = self._run(x, masks, {last}, True, local=model.training and i == 1)
            outputs.append(
                {
                    "x_norm_clstoken": globals_[:, 0],
                    "x_storage_tokens": globals_[:, 1:],
                    "x_norm_patchtokens": patches,
                    "x_prenorm": tokens,
                    "masks": masks,
                }
            )
        return outputs


class IntermediateLayers(Method):
    """`get_intermediate_layers` of an accelerated model."""

    def __call__(
        self,
        x: Tensor,  # (B, 3, D, height, width)
        *,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple:
        """Patches after the `n` last layers, or after the layers listed, in layer order.

        Each is (B*D, H*W, C), (B, D*H*W, C) for Flatten3D, or (B, C, D, H, W) with `reshape`; with the
        class token (N, C) and the registers (N, r, C) if asked for, a tuple of them per layer.

        Raises ValueError or TypeError for layers that the model lacks or that are listed twice, or an x that
        is no volume for this model.
        """
        wanted = wanted_layers(n, len(self.model.blocks))
        if isinstance(n, Sequence) and len(n) != len(wanted):
            raise ValueError(f"n must not list a layer twice, got {list(n)}")
        found, sizes = self._run(x, None, wanted, norm=norm)
        outputs = []
        for _, globals_, patches in found:
            if reshape:
                patches = patches.reshape(x.shape[0], *sizes, -1).permute(0, 4, 1, 2, 3).contiguous()
            parts = [patches]
            if return_class_token:
                parts.append(globals_[:, 0])
            if return_extra_tokens:
                parts.append(globals_[:, 1:])
            outputs.append(tuple(parts) if len(parts) > 1 else patches)
        return tuple(outputs)


class Replicate(Method):
    """`_replicate_for_data_parallel` of an accelerated model: a replica would run the parameters of the original."""

    def __call__(self) -> NoReturn:
        raise TypeError("an accelerated model cannot be replicated by DataParallel; use DistributedDataParallel")


class Report(Method):
    """`report` of an accelerated model."""

    def __call__(self) -> None:
        """Prints per block what is fused, by which backend, what is not, and why."""
        token = self.model.cls_token
        choice = Choice.of(self.backend, self.attention, self.strict, token.device, self.gelu)
        print(table_of(self.descriptions(), choice, token.dtype, self.model.training))
        if self.graphs is not None:
            print(*self.graphs.describe(token.device), sep="\n")


METHODS = {  # by the name that each shadows
    "forward_features_list": ForwardFeatures,
    "get_intermediate_layers": IntermediateLayers,
    "_replicate_for_data_parallel": Replicate,
    "report": Report,
}


def plane_of(block: nn.Module) -> Plane:
    """The plane of a converted block. Raises ValueError for one that such a block does not have."""
    if block.plane not in PLANES:
        raise ValueError(
            f"model.blocks must have a cycle_order of planes {', '.join(PLANES)}, got {block.plane!r} for block "
            f"{block.block_idx}"
        )
    return parse_plane(block.plane)


def _need_not_be_called(block: nn.Module) -> bool:
    """Whether calling the 2D block inside cannot be told from calling this converted block."""
    if type(block).__name__ != BLOCK:
        return False
    if "_get_rope" in block.__dict__:  # the authors' block, patched
        return False
    operator = getattr(block, "planecycleop", None)
    return why_called(block) is None and (operator is None or why_called(operator) is None)


def _pool_method(block: nn.Module) -> str:
    return block.pool_method if hasattr(block, "pool_method") else block.planecycleop.pool_method


def _angles(rope: nn.Module, grid: Sequence[int]) -> PlaneAngles:
    """Tables of a plane, by the model's own module; the same from pass to pass, where only periods make them."""

    def make() -> PlaneAngles:
        made = PlaneAngles(None, sincos=rope(**dict(zip("HW" if len(grid) == 2 else "DHW", grid))))
        if not torch.compiler.is_compiling():
            made.by_axis()  # now, as later it may be in inference mode
        return made

    if torch.compiler.is_compiling():
        return make()
    settings = [value for name, value in vars(rope).items() if not name.startswith("_")]
    periods = getattr(rope, "periods", None)
    plain = all([value is None or isinstance(value, (bool, int, float, str, torch.dtype)) for value in settings])
    if not isinstance(periods, Tensor) or rope.training or not plain or why_called(rope) is not None:
        return make()
    return kept(periods, (type(rope), type(rope).forward, tuple(grid), *settings), make)
