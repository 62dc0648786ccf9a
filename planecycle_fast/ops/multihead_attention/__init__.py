"""Attention of rows within each sequence: `attention` by whichever implementation, `self_attention` by own kernels.

`attention.py` calls FlashAttention 2, 3 or 4, torch's kernels or plain operations: `runtime.attentions` says which can
be called, `runtime.attention_table` which "auto" takes. `self_attention.py` is public: RoPE of queries and keys, then
attention. Its kernels: `self_attention_triton.py`, `self_attention_backward_triton.py`, what they share,
`self_attention_turning_triton.py`, and their sizes, `*_tiles.py`. `self_attention_within.py` turns a packed qkv in
place although it needs a gradient, in training.
"""
