"""`lift` turns a 2D vision transformer into its 3D form; `unlift` gives the 2D model back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from .engine.depth_position import KINDS, check_depth_position
from .geometry.planes import DEFAULT_CYCLE, Plane, parse_cycle
from .geometry.pooling import check_pooling
from .hosts import Adapter, find_adapter
from .hosts.wrapped import unwrapped
from .lifted import LiftedModel
from .runtime.attentions import check_attention
from .runtime.backends import pick

MODES = ("planecycle", "slice2d", "flatten3d")


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
        strict: a backend or attention asked for by name that would have to leave parts of a block to the model's own
            code (hooks, dropout, kinds it does not know) raises ValueError when the model runs; False lets it.
            `LiftedModel.report` lists these parts.
        adapter: a class or function that makes an `Adapter` for `model`, for models of your own.
        depth_position: "none", as in the paper; for models that know no place along D (DINOv2, CLIP, MAE) "sincos",
            which adds one to the patches, in slice2d too, or "rope1d", which turns queries and keys by it on planes
            that contain D. Neither learns anything; `planecycle_fast.engine.depth_position` says what they compute.

    Raises:
        TypeError: model is no nn.Module, or cycle_order no sequence of names.
        ValueError: an unsupported model, or an unknown or unusable name in any other argument.
    """
    if isinstance(model, LiftedModel):
        raise ValueError(f"model is lifted already ({model.extra_repr()}); lift unlift(model) instead")
    cycle = check_names(mode, cycle_order, pool_method, globals_at, depth_position)
    if backend != "auto":
        pick(backend)
    check_attention(attention)
    host = _make_adapter(model, adapter)
    # The other modes are cycles too. "HW" never pools; "DHW" keeps one set of globals per volume.
    if mode != "planecycle":
        cycle, pool_method, globals_at = parse_cycle(("HW" if mode == "slice2d" else "DHW",)), "PCg", "plane"
    host.check_planes(cycle)
    check_depth_position(depth_position, host)
    return LiftedModel(host, mode, cycle, pool_method, globals_at, backend, attention, strict, depth_position)


def check_names(
    mode: str, cycle_order: str | Sequence[str | Plane], pool_method: str, globals_at: str, depth_position: str
) -> tuple[Plane, ...]:
    """The planes of a cycle. Raises ValueError or TypeError for any of these, as of `lift`, that no model can have."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    check_pooling(pool_method, globals_at)
    if depth_position not in KINDS:
        raise ValueError(f"depth_position must be one of {', '.join(KINDS)}, got {depth_position!r}")
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
