"""Whether kernels advance pointers by 64-bit offsets, told by compiling them: part of the codegen gate, for mutants.

``python -m tests.kernelcheck.offsets OPERATION`` ends with status 1 and says so where they do not. Integers that are
too narrow overflow at sizes that operations refuse, or that nobody runs; a compiled kernel shows them at any.
"""

import sys

import torch

from .codegen import check_binary, compile_variant
from .codegen_table import all_factors, build, pairwise


def check_offsets(spec):
    """Raises CodegenError for a kernel of an operation, among all that its codegen builds need two by two."""
    seen = set()
    for choice in pairwise(all_factors(spec)):
        _, variant, _ = build(spec, **(choice | {"dtype": torch.bfloat16, "aligned": True, "arch": 90}))
        if variant.name not in seen:
            seen.add(variant.name)
            check_binary(compile_variant(variant, 90), 90)


if __name__ == "__main__":
    from ..specs import SPECS

    check_offsets(next(spec for spec in SPECS if spec.op.name == sys.argv[1]))
