"""patchify: slices of a volume as rows of pixels, so that a patch embedding is one matrix product.

Start with `pixel_rows.py`, the reference, and `patchify.py`, the public function. `patchify_triton.py` is the kernels,
there and back; backend "cpu" has none of its own. `engine.embedding` multiplies the rows by a host's weights.
"""
