"""A small 2D vision transformer whose every part shows in its output.

Freshly initialised models hide errors: LayerScale of 1e-5 hides attention, zero biases hide a missing
one, globals that are equal in all slices hide a wrong pooling matrix. Here LayerScale is about 0.3,
biases are random, and globals depend on the slice's image.
"""

import torch
from torch import nn

import planecycle_fast as pcf
from planecycle_fast.geometry.rope import Rope

PATCH = 2


class ToyBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.ls1, self.ls2 = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))

    def forward(self, x, sincos=None):
        n, rows, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if sincos is not None:
            q, k = rotate(q, *sincos), rotate(k, *sincos)
        attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + self.ls1 * self.proj(attention.transpose(1, 2).reshape(n, rows, dim))
        return x + self.ls2 * self.fc2(torch.nn.functional.gelu(self.fc1(self.norm2(x))))


def rotate(t, sin, cos):
    """Rotate-half on the last len(sin) rows of (N, heads, rows, hd)."""
    g, half = t.shape[2] - len(sin), t.shape[3] // 2
    patches = t[:, :, g:]
    turned = torch.cat([-patches[..., half:], patches[..., :half]], -1)
    return torch.cat([t[:, :, :g], patches * cos + turned * sin], 2)


class ToyViT(nn.Module):
    def __init__(self, num_globals=5, depth=4, heads=2, head_dim=16, rope=True, normalize="separate", patch=PATCH):
        super().__init__()
        dim = heads * head_dim
        self.num_globals, self.patch, self.normalize = num_globals, patch, normalize
        self.stem = nn.Conv2d(3, dim, patch, patch)
        self.tokens = nn.Parameter(torch.empty(num_globals, dim))
        self.from_image = nn.Linear(dim, num_globals * dim)
        self.blocks = nn.ModuleList(ToyBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.register_buffer("periods", 100.0 ** (torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4)))
        if not rope:
            self.periods = None
        for name, p in self.named_parameters():
            nn.init.normal_(p, mean=0.3 if ".ls" in name else 0.0, std=0.1 if ".ls" in name else 0.25)

    def embed(self, images):
        patches = self.stem(images).flatten(2).mT  # (N, L, C)
        globals_ = self.tokens + self.from_image(patches.mean(1)).unflatten(1, self.tokens.shape)
        return torch.cat([globals_, patches], 1)

    def forward(self, images, sincos=None):
        x = self.embed(images)
        for block in self.blocks:
            x = block(x, sincos)
        return self.norm(x)


class ToyAdapter(pcf.Adapter):
    has_cls = True

    def __init__(self, model):
        super().__init__(model)
        self.num_globals, self.patch_size = model.num_globals, (model.patch, model.patch)
        self.has_cls = model.num_globals > 0

    @property
    def blocks(self):
        return self.model.blocks

    def embed(self, images):
        return self.model.embed(images)

    def call_block(self, block, tokens, grid, sincos):
        return block(tokens, sincos)

    def norm(self, tokens):
        return self.model.norm(tokens)

    def rope(self, dtype):
        if self.model.periods is None:
            return None
        return Rope(self.model.periods, normalize=self.model.normalize, coord_dtype=self.model.periods.dtype)


def toy_lift(model, **settings):
    return pcf.lift(model, adapter=ToyAdapter, **settings)
