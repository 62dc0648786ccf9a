"""Queries and keys turned within a packed qkv, on Triton's kernel."""

from ..ops.test_rope_within import *  # noqa: F403
