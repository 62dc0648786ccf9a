"""Milliseconds of attention alone that were measured on an H100 SXM, in bfloat16; `attention_table` goes by them.

torch 2.11 and its cuDNN, 2026-11-27: `benchmarks/results/nvidia-h100-80gb-hbm3/first-run.md` says how. "flash3" is the
wheel of the forward alone. RoPE is in none of these but "triton, RoPE included"; as a pass of its own it takes 0.30 ms
per 2^18 rows of 384 channels. `python -m benchmarks.gpu --only attention` measures them anew, own kernels included.
"""

from __future__ import annotations

ROPE = 0.30  # of a pass over 2^18 rows of 384 channels, queries and keys
# Inference, ms, of about 2^17 rows; by head dimension, heads, rows of a sequence.
FORWARD = {
    (64, 6, 21): {"flash": 0.958, "cudnn": 0.706, "efficient": 0.475, "flash3": 1.272},
    (64, 6, 69): {"flash": 0.379, "cudnn": 0.291, "efficient": 0.506, "flash3": 0.513},
    (64, 6, 133): {"flash": 0.578, "cudnn": 0.447, "efficient": 0.570, "flash3": 0.406},
    (64, 6, 261): {"flash": 0.587, "cudnn": 0.467, "efficient": 0.732, "flash3": 0.517},
    (64, 6, 517): {"flash": 0.744, "cudnn": 0.573, "efficient": 1.101, "flash3": 0.598},
    (64, 6, 1029): {"flash": 0.986, "cudnn": 0.766, "efficient": 1.818, "flash3": 0.698},
    (64, 6, 4101): {"flash": 2.841, "cudnn": 2.117, "efficient": 6.171, "flash3": 1.744},
    (64, 16, 21): {"flash": 2.323, "cudnn": 1.725, "efficient": 1.150, "flash3": 3.081},
    (64, 16, 69): {"flash": 0.825, "cudnn": 0.588, "efficient": 1.187, "flash3": 1.071},
    (64, 16, 133): {"flash": 1.264, "cudnn": 0.926, "efficient": 1.324, "flash3": 0.723},
    (64, 16, 261): {"flash": 1.311, "cudnn": 0.961, "efficient": 1.752, "flash3": 0.982},
    (64, 16, 517): {"flash": 1.649, "cudnn": 1.256, "efficient": 2.730, "flash3": 1.014},
    (64, 16, 1029): {"flash": 2.479, "cudnn": 1.887, "efficient": 4.728, "flash3": 1.689},
    (64, 16, 4101): {"flash": 7.350, "cudnn": 5.483, "efficient": 16.634, "flash3": 4.416},
    (128, 32, 261): {"flash": 3.311, "cudnn": 2.431, "efficient": 5.894, "flash3": 2.208},
    (128, 32, 1029): {"flash": 8.011, "cudnn": 5.036, "efficient": 15.872, "flash3": 4.136},
}
# Forward and backward, the same.
TRAINING = {
    (64, 6, 21): {"flash": 5.037, "cudnn": 2.379, "efficient": 1.822},
    (64, 6, 69): {"flash": 2.122, "cudnn": 1.651, "efficient": 1.923},
    (64, 6, 133): {"flash": 2.631, "cudnn": 1.760, "efficient": 2.548},
    (64, 6, 261): {"flash": 2.607, "cudnn": 1.746, "efficient": 3.178},
    (64, 6, 517): {"flash": 3.057, "cudnn": 2.063, "efficient": 4.703},
    (64, 6, 1029): {"flash": 4.276, "cudnn": 2.860, "efficient": 7.890},
    (64, 6, 4101): {"flash": 11.411, "cudnn": 7.469, "efficient": 26.210},
}
# Inference of about 2^18 rows; the Triton kernels of this are prototypes of ours.
PROTOTYPE = {
    (64, 6, 21): {"triton, RoPE included": 0.505, "triton": 0.426, "efficient": 0.951, "cudnn": 1.473, "flash": 1.783,
                  "flash3": 2.558},
    (64, 6, 69): {"triton, RoPE included": 0.818, "triton": 0.499, "flash": 0.652, "cudnn": 0.751, "efficient": 0.988,
                  "flash3": 1.104},
    (64, 6, 261): {"triton": 0.626, "cudnn": 0.960, "flash3": 0.976, "flash": 1.080, "efficient": 1.419},
    (64, 6, 1029): {"triton": 1.390, "flash3": 1.432, "cudnn": 1.607, "flash": 1.931, "efficient": 3.651},
}  # fmt: skip


def told(times: dict[tuple[int, int, int], dict[str, float]], head_dim: int, *lengths: int) -> str:
    """Some of them in words, fastest first."""
    parts = []
    for length in lengths:
        for (of_head, heads, rows), found in times.items():
            if (of_head, rows) == (head_dim, length):
                shown = ", ".join([f"{name} {ms:.3f}" for name, ms in sorted(found.items(), key=lambda each: each[1])])
                parts.append(f"at {rows} rows and {heads} heads {shown}")
    return f"measured on an H100, ms: {'; '.join(parts)}"
