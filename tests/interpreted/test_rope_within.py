"""Queries and keys turned within a packed qkv, on Triton's kernel."""

from ..test_rope_within import *  # noqa: F403
