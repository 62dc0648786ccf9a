"""Numbers that a kernel is given, as scalars of one type.

What a number comes as depends on who launches. Triton types it by its annotation, or by its value, and makes a
constant of an int that is 1; under torch.compile annotations and `do_not_specialize` are dropped, floats are of 64 bits
and an int that is 1 is always a constant (pytorch 170289; in torch 2.11 all are while it looks for what is written).
A constant has no ``.to()``, and an offset counted in 32 bits ends at 2^31 elements. So kernels convert all they are
given before they use it; their annotations spare a second build where a number needs 64 bits.
"""

import triton
import triton.language as tl


@triton.jit
def scalars(numbers, DTYPE: tl.constexpr):
    """A tuple of ints or floats, whatever they come as, as a tuple of scalars of DTYPE."""
    return [tl.cast(number, DTYPE) for number in numbers]
