"""`accelerate`: a model of the authors' code, the same from outside, without their copies between planes.

The model keeps its class, modules and state_dict keys. A few of its methods are shadowed by attributes of
the instance (`accelerated.py`). Everything else, the options of `forward` and `forward_features` for
example, stays the model's own code.
"""

from __future__ import annotations

from torch import nn

from ..engine.graph_store import GraphOptions, graph_store
from ..hosts.dinov3 import BLOCK, CLASS, holds_converted, is_dinov3, takes_volumes
from ..ops.activations.gelu import check_gelu
from ..runtime.attentions import check_attention
from ..runtime.backends import pick
from .accelerated import METHODS, Method, plane_of

BLOCK_TYPES = ("PlaneCycle", "Slice2D", "Flatten3D")
_REPLACED = ("forward_features_list", "get_intermediate_layers", "_get_intermediate_layers_not_chunked")


def accelerate(
    model: nn.Module,
    backend: str = "auto",
    attention: str = "auto",
    strict: bool = True,
    gelu: str = "exact",
    graphs: bool | GraphOptions = False,
) -> nn.Module:
    """Runs a model of the authors' code (HINTLab/PlaneCycle) without its copies, in place, and returns it.

    Class, outputs, random draws in training and state_dict keys stay what they are; `restore` undoes
    it. Between converted blocks the residual stream stays in plane order, globals go through one matrix, and RoPE
    tables are made once per plane. A converted block that has hooks or wrappers (checkpointing, FSDP),
    or is patched or compiled, is called itself, in the order that it expects. Accelerating twice sets
    the new arguments. A shallow copy, `copy.copy`, runs the original: use `copy.deepcopy`.

    Args:
        model: a `DinoVisionTransformer` of the authors' code of any block_type, "PlaneCycle" after
            their `PlaneCycleConverter`; or a stock one converted by `planecycle_fast.PlaneCycleConverter`.
        backend: "auto" or a name of `backends()`.
        attention: "auto", or a name of `attentions.attentions()`.
        strict: a backend, attention or GELU asked for by name that would have to leave parts of a block to the model's
            own code raises ValueError when the model runs; False lets it. ``model.report()`` prints which parts.
        gelu: "exact", or "tanh_epilogue": as of `lift`.
        graphs: as of `lift`; passes with masks run eagerly.

    Raises:
        TypeError: model is no nn.Module, or graphs something else.
        ValueError: a model of another kind, one that is not converted, one whose methods are overridden,
            or an unknown or unusable name in another argument.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if backend != "auto":
        pick(backend)
    check_attention(attention)
    check_gelu(gelu)
    check_model(model)
    store = graph_store(graphs)
    for name, method in METHODS.items():
        setattr(model, name, method(model, backend, attention, strict, gelu, store))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate`, in place, and returns the model.

    Raises ValueError for a model that is not accelerated, or that cannot run otherwise (a stock dinov3
    model with converted blocks: use `PlaneCycleConverter.restore`).
    """
    if not isinstance(model, nn.Module) or not any(isinstance(model.__dict__.get(name), Method) for name in METHODS):
        raise ValueError(f"model must be accelerated to be restored, got a {type(model).__name__} that is not")
    if not takes_volumes(model):
        raise ValueError(
            "model must be of the authors' code, got a stock dinov3 model, whose converted blocks its own code cannot "
            "call; use PlaneCycleConverter(keep_original=True) and its restore"
        )
    return restore_methods(model)


def restore_methods(model: nn.Module) -> nn.Module:
    """Takes the shadowing attributes away, where there are any. Raises ValueError where something wraps them."""
    wrapped = [name for name in METHODS if not isinstance(model.__dict__.get(name, None), (Method, type(None)))]
    if wrapped:
        raise ValueError(
            f"model must have its methods as accelerate left them, got another {wrapped[0]} in their place"
        )
    for name in METHODS:
        model.__dict__.pop(name, None)
    return model


def check_model(model: nn.Module, convertible: bool = False) -> None:
    """Raises ValueError unless `accelerate` can take the model, or PlaneCycleConverter if `convertible`."""
    name = type(model).__name__
    if not is_dinov3(model):
        raise ValueError(
            f"model must be a {CLASS} of the authors' code or one converted by PlaneCycleConverter, got a {name}; "
            "use planecycle_fast.lift for other models"
        )
    if not convertible:
        _check_blocks(model)
    for method in _REPLACED:
        owner = next((cls for cls in type(model).__mro__ if method in cls.__dict__), None)
        own = model.__dict__.get(method)
        if (owner is not None and owner.__name__ != CLASS) or not isinstance(own, (Method, type(None))):
            raise ValueError(
                f"model must have the {method} of {CLASS}, got one that is overridden, which accelerate would hide"
            )


def _check_blocks(model: nn.Module) -> None:
    name, converted = type(model).__name__, holds_converted(model.blocks)
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
    for block in model.blocks:
        if type(block).__name__ == BLOCK:
            plane_of(block)
