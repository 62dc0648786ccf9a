"""attention: softmax(q k^T * scale) v of each sequence, by FlashAttention 2, 3 or 4, torch's own, or plain operations.

It has no kernel of its own: `runtime.attentions` says which of the others can be called, and why one cannot.

self_attention: the same after queries and keys have turned, in one pass of own kernels.
"""
