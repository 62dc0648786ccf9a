"""`accelerate`: a model of the authors' code, the same from outside, without their copies between planes.

The model keeps its class, modules and state_dict keys. Two of its methods are shadowed by attributes of
the instance: callable objects that know the model, so that they are copied and pickled with it.
Everything else, the options of `forward` and `forward_features` for example, stays the model's own code.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .adapters.dinov3 import BLOCK, CLASS, is_converted, is_dinov3, norm_parts, takes_volumes
from .backends import check_attention, pick
from .layers import wanted_layers
from .ops import plane_switch
from .planes import DHW, HW, Plane, Sizes, parse_plane
from .pooling import transition

_METHODS = ("forward_features_list", "get_intermediate_layers")  # the shadowed ones
BLOCK_TYPES = ("PlaneCycle", "Slice2D", "Flatten3D")


def accelerate(model: nn.Module, backend: str = "auto", attention: str = "auto") -> nn.Module:
    """Makes a model of the authors' code (HINTLab/PlaneCycle) faster, in place, and returns it.

    Class, outputs, random draws in training and state_dict keys stay what they are; `restore` undoes
    it. Tokens stay in plane order between converted blocks, globals go through one matrix, and RoPE
    tables are made once per plane. A block that something watches or wraps (hooks, checkpointing, FSDP)
    is called itself, in the order that it expects. Accelerating twice sets the new arguments.

    Args:
        model: a `DinoVisionTransformer` of the authors' code of any block_type, "PlaneCycle" after
            their `PlaneCycleConverter`; or a stock one converted by `planecycle_fast.PlaneCycleConverter`.
        backend: "auto" or a name of `backends()`.
        attention: "auto": the model's own.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: a model of another kind, one that is not converted, one whose methods are overridden,
            or an unknown or unusable name in another argument.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if backend != "auto":
        pick(backend)
    check_attention(attention)
    _check(model)
    model.forward_features_list = ForwardFeatures(model, backend)
    model.get_intermediate_layers = IntermediateLayers(model, backend)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate`, in place, and returns the model.

    Raises ValueError for a model that is not accelerated, or that cannot run otherwise (a stock dinov3
    model with converted blocks: use `PlaneCycleConverter.restore`).
    """
    if not _is_accelerated(model):
        raise ValueError(f"model must be accelerated to be restored, got a {type(model).__name__} that is not")
    if not takes_volumes(model):
        raise ValueError(
            "model must be of the authors' code, got a stock dinov3 model, whose converted blocks its own code cannot "
            "call; use PlaneCycleConverter(keep_original=True) and its restore"
        )
    return restore_methods(model)


def restore_methods(model: nn.Module) -> nn.Module:
    """Takes the shadowing attributes away, where there are any."""
    for name in _METHODS:
        if isinstance(model.__dict__.get(name), _Method):
            del model.__dict__[name]
    return model


class _Method:
    """What the two shadowing methods share: running the blocks."""

    def __init__(self, model: nn.Module, backend: str) -> None:
        self.model, self.backend = model, backend

    def _prepare(
        self,
        x: Tensor,  # (B, 3, D, height, width)
        masks: Tensor | None = None,  # (B*D, H*W) bool, (B, D*H*W) for Flatten3D
    ) -> tuple[Tensor, Sizes, Plane]:
        """Embedded tokens, the volume's size in tokens, and the plane whose order they are in."""
        model = self.model
        if not isinstance(x, Tensor) or x.ndim != 5:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a volume, a tensor of shape (B, 3, D, height, width), got {got}")
        if not takes_volumes(model):
            tokens, grid = model.prepare_tokens_with_masks(x.transpose(1, 2).flatten(0, 1), masks)
            return tokens, (x.shape[2], *grid), HW
        tokens, shape = model.prepare_tokens_with_masks(x, masks)
        if model.block_type == "PlaneCycle":
            return tokens, tuple(shape[1:4]), HW
        if model.block_type == "Flatten3D":
            return tokens, tuple(shape), DHW
        return tokens, (x.shape[2], *shape), HW

    def _run(
        self,
        tokens: Tensor,  # (B*P, g + L, C), plane order of `start`
        sizes: Sizes,
        start: Plane,
        wanted: set[int],
    ) -> list[Tensor]:  # like `tokens`, one per layer wanted
        """Runs the blocks up to the last one wanted; the residual stream after each one wanted."""
        model, tables = self.model, _Tables()
        g, depth, channels = model.n_storage_tokens + 1, sizes[0], tokens.shape[-1]
        batch, plane, outputs = tokens.shape[0] // start.slices(sizes), start, []
        converted = not takes_volumes(model) or model.block_type == "PlaneCycle"
        for i, block in enumerate(model.blocks):
            if i > max(wanted):
                break
            plain = converted and _is_plain(block)
            following = parse_plane(block.plane) if plain else start
            pool_method = _pool_method(block) if plain else "PCg"
            m = transition(plane.slices(sizes), following.slices(sizes), depth, pool_method)
            tokens, plane = plane_switch(tokens, plane, following, sizes, g, m, self.backend), following
            if plain:
                tokens = block.blk2d(tokens, tables.get(block.rope_embed, ("H", "W"), plane.grid(sizes)))
            elif converted:
                tokens = block(tokens, (batch, *sizes, channels))
            else:
                axes = ("D", "H", "W") if plane == DHW else ("H", "W")
                tokens = block(tokens, tables.get(model.rope_embed, axes, plane.grid(sizes)))
            if i in wanted:
                m = transition(plane.slices(sizes), start.slices(sizes), depth)
                outputs.append(plane_switch(tokens, plane, start, sizes, g, m, self.backend))
        return outputs


class ForwardFeatures(_Method):
    """`forward_features_list` of an accelerated model."""

    def __call__(self, x_list: Sequence[Tensor], masks_list: Sequence[Tensor | None]) -> list[dict[str, Tensor]]:
        """Features of volumes (B, 3, D, height, width), one dictionary each.

        Blocks of Slice2D and Flatten3D take several volumes at once, as the model's own code does it
        (drop path draws for all of them together); converted blocks take one after another.
        """
        model, last = self.model, len(self.model.blocks) - 1
        if len(x_list) > 1 and takes_volumes(model) and model.block_type != "PlaneCycle":
            return type(model).forward_features_list(model, x_list, masks_list)
        outputs = []
        for i, (x, masks) in enumerate(zip(x_list, masks_list)):
            tokens = self._run(*self._prepare(x, masks), wanted={last})[0]
            globals_, patches = norm_parts(model, tokens, local=model.training and i == 1)
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


class IntermediateLayers(_Method):
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

        Raises ValueError for layers that the model lacks, or an x that is no volume.
        """
        model, g = self.model, self.model.n_storage_tokens + 1
        wanted = wanted_layers(n, len(model.blocks))
        tokens, sizes, start = self._prepare(x)
        outputs = []
        for out in self._run(tokens, sizes, start, wanted):
            globals_, patches = norm_parts(model, out) if norm else (out[:, :g], out[:, g:])
            if reshape:
                patches = patches.reshape(x.shape[0], *sizes, -1).permute(0, 4, 1, 2, 3).contiguous()
            parts = [patches]
            if return_class_token:
                parts.append(globals_[:, 0])
            if return_extra_tokens:
                parts.append(globals_[:, 1:])
            outputs.append(tuple(parts) if len(parts) > 1 else patches)
        return tuple(outputs)


class _Tables:
    """RoPE tables by the model's own module: once per plane, or anew for every block while it may draw."""

    def __init__(self) -> None:
        self.rope: nn.Module | None = None
        self.made: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def get(
        self, rope: nn.Module | None, axes: tuple[str, ...], grid: tuple[int, ...]
    ) -> tuple[Tensor, Tensor] | None:  # sin and cos, (L, hd) each
        if rope is None:
            return None
        if rope is not self.rope:  # blocks share one, usually
            self.rope, self.made = rope, {}
        if rope.training or grid not in self.made:
            self.made[grid] = rope(**dict(zip(axes, grid)))
        return self.made[grid]


def _is_plain(block: nn.Module) -> bool:
    """Whether calling the 2D block inside cannot be told from calling this converted block."""
    return type(block).__name__ == BLOCK and not any(
        _is_watched(m) for m in (block, getattr(block, "planecycleop", None))
    )


def _is_watched(module: nn.Module | None) -> bool:
    if module is None:
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__ or module._compiled_call_impl is not None


def _pool_method(block: nn.Module) -> str:
    return block.pool_method if hasattr(block, "pool_method") else block.planecycleop.pool_method


def _is_accelerated(model: nn.Module) -> bool:
    return isinstance(model, nn.Module) and isinstance(model.__dict__.get("forward_features_list"), _Method)


def _check(model: nn.Module) -> None:
    name = type(model).__name__
    if not is_dinov3(model):
        raise ValueError(
            f"model must be a {CLASS} of the authors' code or one converted by PlaneCycleConverter, got a {name}; "
            "use planecycle_fast.lift for other models"
        )
    converted = is_converted(model)
    if not takes_volumes(model):
        if not converted:
            raise ValueError(
                f"model must take volumes, got a stock {name}; use planecycle_fast.lift(model), "
                "or PlaneCycleConverter()(model) for the authors' interface"
            )
    elif model.block_type not in BLOCK_TYPES:
        raise ValueError(f"model.block_type must be one of {', '.join(BLOCK_TYPES)}, got {model.block_type!r}")
    elif converted != (model.block_type == "PlaneCycle"):
        state = "converted blocks" if converted else "blocks that no PlaneCycleConverter wrapped"
        raise ValueError(
            f"model must have converted blocks for block_type 'PlaneCycle' only, got {model.block_type!r} with {state}"
        )
    for method in _METHODS:
        owner = next(cls for cls in type(model).__mro__ if method in cls.__dict__)
        ours = isinstance(model.__dict__.get(method, None), _Method)
        if owner.__name__ != CLASS or (method in model.__dict__ and not ours):
            raise ValueError(
                f"model must have the {method} of {CLASS}, got one that is overridden; accelerate would hide it"
            )
