"""Small models with the interface of facebookresearch/dinov3 and of the authors' code, written for these tests.

They stand in where no checkout of the real code is there (tests/peers.py), to test the plumbing: names,
arguments, keys, order of calls. That the results are the authors' is shown on their own code only.
"""

import torch
import torch.nn.functional as F
from torch import nn


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.3))

    def forward(self, x):
        return x * self.gamma


class LinearKMaskedBias(nn.Linear):
    """A key bias that counts for nothing."""

    def __init__(self, dim):
        super().__init__(dim, 3 * dim)
        mask = torch.ones(3, dim)
        mask[1] = 0
        self.register_buffer("bias_mask", mask.flatten())

    def forward(self, x):
        return F.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class SelfAttention(nn.Module):
    def __init__(self, dim, heads, mask_k_bias):
        super().__init__()
        self.num_heads = heads
        self.qkv = LinearKMaskedBias(dim) if mask_k_bias else nn.Linear(dim, 3 * dim)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x, rope=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if rope is not None:
            q, k = _rotate(q, *rope), _rotate(k, *rope)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _rotate(t, sin, cos):
    start = t.shape[-2] - sin.shape[0]
    patches = t[..., start:, :].to(sin.dtype)
    a, b = patches.tensor_split(2, -1)
    turned = patches * cos + torch.cat([-b, a], -1) * sin
    return torch.cat([t[..., :start, :], turned.to(t.dtype)], -2)


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.0)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class SwiGLUFFN(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(dim, 2 * dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class SelfAttentionBlock(nn.Module):
    def __init__(self, dim, heads, swiglu, mask_k_bias, drop):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-5), nn.LayerNorm(dim, eps=1e-5)
        self.attn, self.mlp = SelfAttention(dim, heads, mask_k_bias), SwiGLUFFN(dim) if swiglu else Mlp(dim)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)
        self.sample_drop_ratio = drop

    def forward(self, x, rope=None):
        return self._list(x, rope) if isinstance(x, list) else self._list([x], [rope])[0]

    def _list(self, x, rope):
        x = self._branch(x, rope, lambda t, r: self.ls1(self.attn(self.norm1(t), r)))
        return self._branch(x, rope, lambda t, _: self.ls2(self.mlp(self.norm2(t))))

    def _branch(self, x, rope, branch):
        """Drop path by leaving sequences out; of all volumes of a list before any is computed."""
        if not (self.training and self.sample_drop_ratio):
            return [t + branch(t, r) for t, r in zip(x, rope)]
        kept = [
            torch.randperm(len(t), device=t.device)[: max(1, int(len(t) * (1 - self.sample_drop_ratio)))] for t in x
        ]
        parts = zip(x, rope, kept)
        return [t.index_add(0, k, branch(t[k], r), alpha=len(t) / len(k)) for t, r, k in parts]


class RopeEmbedding(nn.Module):
    """Periods of two axes, or with `sections` of three."""

    def __init__(self, head_dim, sections=None, rescale=None, base=100.0, normalize="separate"):
        super().__init__()
        self.D_head, self.base, self.min_period, self.max_period = head_dim, base, None, None
        self.normalize_coords, self.shift_coords, self.jitter_coords = normalize, None, None
        self.rescale_coords, self.dtype = rescale, torch.float32
        if sections:
            self.sections = sections
        periods = [base ** (torch.arange(n) / n) for n in sections or (head_dim // 4,)]
        self.register_buffer("periods", torch.cat(periods), persistent=sections is None)

    def forward(self, **sizes):
        common = {"min": min, "max": max}.get(self.normalize_coords, lambda _: None)(sizes.values())
        axes = [2 * (torch.arange(0.5, n, device=self.periods.device) / (common or n)) - 1 for n in sizes.values()]
        axes = torch.meshgrid(*axes, indexing="ij")
        coords = torch.stack(axes, -1).flatten(0, -2)  # (L, axes)
        if self.training and self.rescale_coords:
            coords = coords * self.rescale_coords ** torch.empty(1, device=coords.device).uniform_(-1, 1)
        periods = self.periods.split(self.sections) if hasattr(self, "sections") else [self.periods] * 2
        angles = torch.cat([2 * torch.pi * c[:, None] / p for c, p in zip(coords.T, periods)], 1).tile(2)
        return angles.sin(), angles.cos()


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).movedim(1, -1)  # (N, h, w, C)


class DinoVisionTransformer(nn.Module):
    """Without `block_type` the stock interface, with it the authors'."""

    def __init__(
        self,
        block_type=None,
        embed_dim=64,
        num_heads=2,
        depth=5,
        patch_size=4,
        n_storage_tokens=4,
        swiglu=False,
        mask_k_bias=True,
        drop_path_rate=0.0,
        untie_cls_and_patch_norms=False,
        untie_global_and_local_cls_norm=False,
        rescale=2.0,
        normalize="separate",
    ):
        super().__init__()
        self.patch_size, self.n_storage_tokens = patch_size, n_storage_tokens
        self.embed_dim = self.num_features = embed_dim
        self.patch_embed = PatchEmbed(embed_dim, patch_size)
        self.cls_token, self.mask_token = (
            nn.Parameter(torch.empty(1, 1, embed_dim)),
            nn.Parameter(torch.empty(1, embed_dim)),
        )
        if n_storage_tokens:
            self.storage_tokens = nn.Parameter(torch.empty(1, n_storage_tokens, embed_dim))
        head_dim = embed_dim // num_heads
        sections = tuple(head_dim * n // 16 for n in (2, 3, 3)) if block_type == "Flatten3D" else None
        self.rope_embed = RopeEmbedding(head_dim, sections, rescale, normalize=normalize)
        blocks = [SelfAttentionBlock(embed_dim, num_heads, swiglu, mask_k_bias, drop_path_rate) for _ in range(depth)]
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(embed_dim, eps=1e-5)
        self.untie_cls_and_patch_norms = untie_cls_and_patch_norms
        self.untie_global_and_local_cls_norm = untie_global_and_local_cls_norm
        self.cls_norm = nn.LayerNorm(embed_dim) if untie_cls_and_patch_norms else None
        self.local_cls_norm = nn.LayerNorm(embed_dim) if untie_global_and_local_cls_norm else None
        self.head = nn.Identity()
        if block_type:
            self.block_type = block_type
        for name, p in self.named_parameters():
            scale = "gamma" in name or ("norm" in name and "weight" in name)
            nn.init.normal_(p, 0.3 if "gamma" in name else float(scale), 0.1 if p.ndim == 2 else 0.3)

    def prepare_tokens_with_masks(self, x, masks=None):
        volume = x.shape
        if hasattr(self, "block_type"):
            x = x.transpose(1, 2).flatten(0, 1)
        x = self.patch_embed(x)
        grid = tuple(x.shape[1:3])
        x = x.flatten(1, 2)
        if self._is("Flatten3D"):
            x = x.reshape(volume[0], -1, x.shape[-1])
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token, x)
        registers = [self.storage_tokens] if self.n_storage_tokens else []
        globals_ = torch.cat([self.cls_token + 0 * self.mask_token, *registers], 1)
        x = torch.cat([globals_.expand(len(x), -1, -1), x], 1)
        if self._is("PlaneCycle"):
            return x, (volume[0], volume[2], *grid, x.shape[-1])
        return x, (volume[2], *grid) if self._is("Flatten3D") else grid

    def _is(self, block_type):
        return getattr(self, "block_type", None) == block_type

    def forward_features_list(self, x_list, masks_list):
        prepared = [self.prepare_tokens_with_masks(x, masks) for x, masks in zip(x_list, masks_list)]
        x, shapes = [p[0] for p in prepared], [p[1] for p in prepared]
        for block in self.blocks:
            if self._is("PlaneCycle"):
                x = [block(x[0], shapes[0])]
            else:
                x = block(x, [self._argument(shape)[0] for shape in shapes])
        return [self._output(i, t, masks) for i, (t, masks) in enumerate(zip(x, masks_list))]

    def _output(self, i, x, masks):
        g = self.n_storage_tokens + 1
        cls_norm = self.cls_norm or self.norm
        if self.local_cls_norm and self.training and i == 1:
            cls_norm = self.local_cls_norm
        front = cls_norm(x[:, :g])
        names = "x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens", "x_prenorm", "masks"
        return dict(zip(names, (front[:, 0], front[:, 1:], self.norm(x[:, g:]), x, masks)))

    def _argument(self, shape):
        if self._is("PlaneCycle"):
            return (shape,)
        return (self.rope_embed(**dict(zip("DHW" if len(shape) == 3 else "HW", shape))),)

    def forward_features(self, x, masks=None):
        if isinstance(x, torch.Tensor):
            return self.forward_features_list([x], [masks])[0]
        return self.forward_features_list(x, masks)

    def get_intermediate_layers(
        self, x, *, n=1, reshape=False, return_class_token=False, return_extra_tokens=False, norm=True
    ):
        wanted = range(len(self.blocks) - n, len(self.blocks)) if isinstance(n, int) else n
        tokens, shape = self.prepare_tokens_with_masks(x)
        g, outputs = self.n_storage_tokens + 1, []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, *self._argument(shape))
            if i not in wanted:
                continue
            front, patches = tokens[:, :g], tokens[:, g:]
            if norm:
                front, patches = (self.cls_norm or self.norm)(front), self.norm(patches)
            if reshape:
                sizes = (x.shape[2], x.shape[3] // self.patch_size, x.shape[4] // self.patch_size)
                patches = patches.reshape(len(x), *sizes, -1).permute(0, 4, 1, 2, 3).contiguous()
            parts = (
                patches,
                *([front[:, 0]] if return_class_token else []),
                *([front[:, 1:]] if return_extra_tokens else []),
            )
            outputs.append(parts if len(parts) > 1 else patches)
        return tuple(outputs)

    def forward(self, x, masks=None, is_training=None):
        features = self.forward_features(x, masks)
        training = hasattr(self, "block_type") if is_training is None else is_training  # their defaults differ
        return features if training else self.head(features["x_norm_clstoken"])


class Op(nn.Module):
    def __init__(self, pool_method):
        super().__init__()
        self.pool_method = pool_method


class PlaneCycleBlock(nn.Module):
    """With the attributes of the authors' block: its `planecycleop` holds the pool method."""

    def __init__(self, blk2d, rope_embed, g_len, block_idx, cycle_order, pool_method):
        super().__init__()
        self.blk2d, self.rope_embed, self.planecycleop = blk2d, rope_embed, Op(pool_method)
        self.g_len, self.block_idx, self.cycle_order = g_len, block_idx, cycle_order

    @property
    def plane(self):
        return self.cycle_order[self.block_idx % len(self.cycle_order)]

    def forward(self, x, shape):
        axis, g = {"HW": 1, "DW": 2, "DH": 3}[self.plane], self.g_len
        patches = x[:, g:].reshape(shape).movedim(axis, 1)
        globals_ = x[:, :g].unflatten(0, shape[:2])
        if self.planecycleop.pool_method == "PCm":
            globals_ = globals_.mean(1, keepdim=True)
        t = torch.cat([_pool(globals_, shape[axis]).flatten(0, 1), patches.flatten(0, 1).flatten(1, 2)], 1)
        rope = None
        if self.rope_embed is not None:
            rope = self.rope_embed(H=patches.shape[2], W=patches.shape[3])
        t = self.blk2d(t, rope)
        globals_ = _pool(t[:, :g].unflatten(0, (shape[0], -1)), shape[1])
        patches = t[:, g:].reshape(patches.shape).movedim(1, axis)
        return torch.cat([globals_.flatten(0, 1), patches.flatten(0, 1).flatten(1, 2)], 1)


def _pool(t, slices):
    """(B, P, g, C) to (B, slices, g, C)."""
    batch, _, g, dim = t.shape
    return F.adaptive_avg_pool1d(t.flatten(2).mT, slices).mT.reshape(batch, slices, g, dim)


class Converter:
    """As the authors' converter, as far as these tests need it."""

    def __init__(self, cycle_order=("HW", "DW", "DH", "HW"), pool_method="PCg", keep_original=False):
        self.settings, self.keep_original = (cycle_order, pool_method), keep_original

    def __call__(self, model):
        if self.keep_original:
            model._blocks_original = model.blocks
        g = model.n_storage_tokens + 1
        blocks = [PlaneCycleBlock(b, model.rope_embed, g, i, *self.settings) for i, b in enumerate(model.blocks)]
        model.blocks = nn.ModuleList(blocks)
        return model
