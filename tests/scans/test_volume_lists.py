"""Volumes of different sizes: as each by itself, in order."""

import numpy as np
import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import planecycle_fast as pcf
from planecycle_fast.scans.volume_lists import PIXELS
from planecycle_fast.scans.volume_sets import load_volumes

from ..host_models import BY_NAME
from ..toy import ToyViT, toy_lift

SHAPES = [(2, 4, 6), (3, 4, 4), (2, 4, 6), (1, 6, 2), (3, 4, 4), (2, 4, 6), (3, 4, 4)]


def volumes(batched=()):
    torch.manual_seed(1)
    return [torch.randn(2 if i in batched else 1, 3, *shape) for i, shape in enumerate(SHAPES)]


@pytest.fixture(scope="module")
def lifted():
    torch.manual_seed(0)
    return toy_lift(ToyViT(rope=False)).eval()


def assert_same(features, expected, exact):
    for got, want in zip(features, expected):
        torch.testing.assert_close(got, want, **(dict(rtol=0, atol=0) if exact else {}))


@pytest.mark.parametrize("given", ["list", "generator", "without batch"])
@pytest.mark.parametrize("batch", [1, 2, None])
def test_each_is_as_by_itself_and_in_order(lifted, given, batch):
    each = volumes()
    forms = {"list": each, "generator": (v for v in each), "without batch": [v[0] for v in each]}
    passes, order = [], []
    hook = lifted.blocks[0].register_forward_pre_hook(lambda module, args: passes.append(1))
    with torch.no_grad():
        features = pcf.map_volumes(lifted, forms[given], batch=batch, done=order.append)
        hook.remove()
        assert len(features) == len(each) and sorted(order) == list(range(len(each)))
        for got, volume in zip(features, each):
            assert got.patches.shape[0] == 1
            assert_same(got, lifted(volume), batch == 1)
    assert len(passes) == {1: 7, 2: 5, None: 3}[batch]


def test_batches_stay_together_and_limits_hold(lifted):
    each, sizes = volumes(batched=(0, 4)), []
    hook = lifted.blocks[0].register_forward_pre_hook(lambda module, args: sizes.append(len(args[0].tokens())))
    with torch.no_grad():
        features = pcf.map_volumes(lifted, each, batch=2)
        hook.remove()
        for got, volume in zip(features, each):
            assert_same(got, lifted(volume), False)
    assert [len(f.patches) for f in features] == [len(v) for v in each]
    assert sorted(sizes) == sorted([2 * 2, 2 * 2, 1, 3, 2 * 3, 3])  # sequences of each pass: D * volumes


def test_dtypes_layers_and_gradients(lifted):
    each = volumes()
    with torch.no_grad():
        layers = pcf.map_volumes(lifted, each, layers=(0, 2))
        for got, volume in zip(layers, each):
            for one, want in zip(got, lifted.intermediate(volume, (0, 2)), strict=True):
                assert_same(one, want, False)
    each = [v.requires_grad_() for v in each]
    loss = sum(f.pooled().square().sum() for f in pcf.map_volumes(lifted, each))
    got = torch.autograd.grad(loss, [*each, lifted.norm.weight])
    loss = sum(lifted(v).pooled().square().sum() for v in each)
    for one, want in zip(got, torch.autograd.grad(loss, [*each, lifted.norm.weight])):
        torch.testing.assert_close(one, want)


def test_scans_inputs_and_sets_of_medmnist(tmp_path):
    lifted = pcf.lift(BY_NAME["hf-dinov2"].make())
    images = np.random.default_rng(0).integers(0, 255, (3, 3, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "organmnist3d.npz", train_images=images, train_labels=np.arange(3)[:, None])
    scans = load_volumes(tmp_path / "organmnist3d.npz", "train_images")
    with torch.no_grad():
        for given in (scans, [pcf.prepare(image, lifted) for image in images]):
            features = pcf.map_volumes(lifted, given, batch=2)
            for got, image in zip(features, images, strict=True):
                assert_same(got, lifted(pcf.prepare(image, lifted).pixels), False)
    assert PIXELS // (3 * 28 * 28) > 3  # all of them together by default


def test_nothing_gives_nothing_and_models_may_be_wrapped(lifted):
    assert pcf.map_volumes(lifted, []) == []
    with torch.no_grad():
        (got,) = pcf.map_volumes(checkpoint_wrapper(lifted), volumes()[:1])
        assert_same(got, lifted(volumes()[0]), False)


@pytest.mark.parametrize("bad, error, words", [
    (torch.randn(3, 4), ValueError, r"volumes\[2\] must have shape \(C, D, height, width\) or"),
    (torch.randn(1, 2, 4, 4), ValueError, r"volumes\[2\] must have shape \(B, 3, D, height, width\)"),
    (torch.randn(3, 2, 5, 4), ValueError, r"volumes\[2\]: volume's slices must be a multiple of the patch"),
    (torch.randn(3, 2, 4, 4).double(), ValueError, r"volumes\[2\] must have the model's dtype"),
    (torch.ones(3, 2, 4, 4, dtype=int), TypeError, r"volumes\[2\] must have a floating-point dtype"),
    (torch.randn(3, 0, 4, 4), ValueError, r"volumes\[2\] must not be empty"),
    (np.ones((3, 2, 4, 4), np.float32), TypeError, r"volumes\[2\] must be a torch.Tensor, got ndarray"),
    (pcf.Scan(torch.rand(2, 4, 4), np.eye(4)), ValueError, r"volumes\[2\]: mean and std must be given for a ToyViT"),
])  # fmt: skip
def test_what_is_wrong_is_named_by_its_index(lifted, bad, error, words):
    with pytest.raises(error, match=words):
        pcf.map_volumes(lifted, [*volumes()[:2], bad])


class Watching(torch.Tensor):
    """As MONAI's MetaTensor: whatever is made of one is one as well."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert func is not torch.Tensor.new_empty, "which MetaTensor cannot do"
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_features_of_tensors_that_watch_functions_are_plain(dtype):
    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make()).to(dtype), host.volume(1, dtype=dtype)
    watching, size = volume.as_subclass(Watching), tuple(volume.shape[2:])
    for run in (
        lifted,
        lambda v: lifted.intermediate(v)[0],
        lambda v: pcf.map_volumes(lifted, [v])[0],
        lambda v: pcf.sliding_window(lifted, v, size),
    ):
        for got, expected in zip(run(watching), run(volume), strict=True):
            assert type(got) is torch.Tensor and torch.equal(got, expected)
    assert type(lifted.attention_maps(watching, 1)[0].cls) is torch.Tensor


def test_bad_settings(lifted):
    for batch in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="batch must be a number of volumes, 1 or more, got"):
            pcf.map_volumes(lifted, volumes(), batch=batch)
    with pytest.raises(TypeError, match="volumes must be a list or another iterable of volumes, got Tensor"):
        pcf.map_volumes(lifted, volumes()[0])
    with pytest.raises(ValueError, match="layers must hold indices"):
        pcf.map_volumes(lifted, volumes(), layers=(7,))
    with pytest.raises(TypeError, match="lifted must be a model made by lift"):
        pcf.map_volumes(ToyViT(), volumes())


def test_what_fails_in_a_pass_names_the_volumes(lifted):
    hook = lifted.blocks[1].register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(ValueError("odd")))
    try:
        with pytest.raises(ValueError, match="volumes 0, 2, 5: odd"):
            pcf.map_volumes(lifted, volumes())
    finally:
        hook.remove()
