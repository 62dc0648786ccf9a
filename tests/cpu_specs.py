"""Operations of backend "cpu" for the test bed: the specs of the Triton kernels, whose schemas are theirs too."""

from dataclasses import replace
from functools import partial

from planecycle_fast.ops import plane_switch, swiglu
from planecycle_fast.ops.activations import swiglu_cpu
from planecycle_fast.ops.native_ops import OPS
from planecycle_fast.ops.plane_change import plane_switch_cpu
from planecycle_fast.ops.residual import add_norm_cpu
from planecycle_fast.ops.rotary import rope_cpu

from .specs import add_norm as boundary
from .specs import plane_switch as switch
from .specs import rope as rotary
from .specs import swiglu as gated


def _of_same_name(op_arguments):
    """The calls of the Triton operations, made to those of csrc."""
    return lambda tensors, settings: [(OPS[op.name], call) for op, call in op_arguments(tensors, settings)]


PLANE_SWITCH = replace(
    switch.SPEC,
    op=plane_switch_cpu.OP,
    fast=partial(plane_switch, backend="cpu"),
    op_arguments=_of_same_name(switch.op_arguments),
    any_strides=False,
)
ADD_NORM = replace(
    boundary.SPEC,
    op=add_norm_cpu.OP,
    others=(add_norm_cpu.BACKWARD,),
    fast=boundary.on(plane_switch, backend="cpu"),
    op_arguments=partial(boundary.op_arguments, forward_op=add_norm_cpu.OP, backward_op=add_norm_cpu.BACKWARD),
    every_dtype=True,
)
ROPE = replace(
    rotary.SPEC,
    op=rope_cpu.OP,
    others=(rope_cpu.IN_PLACE,),
    fast=partial(rotary.fast, backend="cpu"),
    op_arguments=partial(
        rotary.op_arguments, op=rope_cpu.OP, in_place=rope_cpu.IN_PLACE, arguments_of=rope_cpu.arguments_of
    ),
    any_strides=False,
)
SWIGLU = replace(
    gated.SPEC,
    op=swiglu_cpu.OP,
    others=(swiglu_cpu.BACKWARD, swiglu_cpu.IN_PLACE),
    fast=partial(swiglu, backend="cpu"),
    op_arguments=lambda tensors, settings: [
        (OPS["swiglu_" if op is gated.INPLACE else op.name], call) for op, call in gated.op_arguments(tensors, settings)
    ],
)
SPECS = [PLANE_SWITCH, ADD_NORM, ROPE, SWIGLU]
