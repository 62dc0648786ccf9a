"""docs/attention-table.md: what attention="auto" is, as `planecycle_fast.runtime.attention_table` has it.

python -m benchmarks.attention_page    writes the page
"""

from __future__ import annotations

import sys

from planecycle_fast.bench.table import markdown_table
from planecycle_fast.runtime.attention_table import TABLE
from planecycle_fast.runtime.attention_times import FORWARD, PROTOTYPE, TRAINING

from .part_table import PROJECT

PAGE = PROJECT / "docs" / "attention-table.md"
HEAD = """# Which attention runs

<!-- written by python -m benchmarks.attention_page -->

`attention="auto"` on an NVIDIA GPU is the first row below that fits and whose attention can run: it is installed,
takes the tensors as they lie, and torch's own switches (`torch.backends.cuda.enable_flash_sdp` and its like,
`torch.nn.attention.sdpa_kernel`, `TORCH_CUDNN_SDPA_DEPRIORITIZED=1`) allow it. `lifted.report(volume_shape)` says
which that is. One asked for by name never falls back. Rows of a sequence are its globals and the patches of a plane.

cuDNN takes about a second for each new size, so it comes only where a volume of the same sizes has come before in the
process, at version 9.15 or later, and not under `torch.use_deterministic_algorithms` in training, `torch.compile`, or
activation checkpointing around the whole model (whose second pass has to take what the first took; around blocks it
comes). Where sizes are symbols of torch.compile, rows about "any" number hold; packages are not called there. What
other tensors are, say those that autocast would cast, goes to torch's scaled_dot_product_attention.

"""


def page() -> str:
    """All of it."""
    where = ("compute capability", "bits", "head dimension", "rows", "step", "sizes")
    table = markdown_table((*where, "attention", "why"), [(*row.where(), row.attention, row.why) for row in TABLE], 8)
    parts = [HEAD, *[f"{line}\n" for line in table], "\n## The times\n\nOn an H100, bfloat16, ms, RoPE apart.\n"]
    for title, times in (
        ("Inference, some 2^17 rows in all", FORWARD),
        ("Forward and backward, the same", TRAINING),
        ("Inference, some 2^18 rows; `triton` as prototypes of its kernels", PROTOTYPE),
    ):
        names = list(dict.fromkeys([name for found in times.values() for name in found]))
        rows = [
            (*key, *[f"{found[name]:.3f}" if name in found else "" for name in names]) for key, found in times.items()
        ]
        headings = ("head dimension", "heads", "rows", *names)
        parts += [f"\n{title}:\n\n", *[f"{line}\n" for line in markdown_table(headings, rows, 0)]]
    return "".join(parts)


def main() -> int:
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
