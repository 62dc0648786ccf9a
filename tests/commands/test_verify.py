"""`planecycle-fast verify` passes what is right, finds planted faults, and names the block they are in."""

import pytest
import torch

from planecycle_fast.commands import verify as module
from planecycle_fast.commands.cli import main
from planecycle_fast.commands.verify import compare
from planecycle_fast.engine import block as stream
from planecycle_fast.runtime import native
from planecycle_fast.weights.load import random_note

from ..host_models import BY_NAME

pytestmark = pytest.mark.skipif(not native.ready(), reason="verifies backend 'cpu'")

FAULTY = 2  # the block that faults are planted in


@pytest.fixture
def model():
    made = BY_NAME["timm-dinov3-s-qkvb"].make()
    made.blocks[FAULTY].is_faulty = True  # copies have it too
    return made


def shape(depth=3):
    return (1, 3, depth, 48, 80)


def wrong(rows):
    return [row.what for row in rows if not row.within]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"mode": "slice2d"}, {"pool_method": "PCm"}], ids=str)
def test_the_fast_path_is_within_the_budget(model, settings, dtype):
    rows = compare(model, shape(), dtype=dtype, backend="cpu", seeds=3, **settings)
    assert wrong(rows) == []
    blocks = len(model.blocks)
    expected = ["features", *[f"block {i}" for i in range(blocks)], *[f"gradients of block {i}" for i in range(blocks)],
                "gradient of the volume", "gradients of the rest"]  # fmt: skip
    assert [row.what for row in rows] == expected
    assert all(row.error > 0 and row.reference > 0 and 0 < row.share < 1 for row in rows)


def test_a_fault_of_one_block(model, monkeypatch):
    """A thousandth of its MLP's branch is missing, in inference."""
    monkeypatch.setattr("planecycle_fast.engine.cpu_groups.CALL", 0)  # blocks one by one
    real = stream.run_in_groups

    def faulty(block, *rest):
        done = real(block, *rest)
        if done is None or not hasattr(block.parts.block, "is_faulty"):
            return done
        return done[0]._replace(branch=done[0].branch * 0.999), done[1]

    monkeypatch.setattr(stream, "run_in_groups", faulty)
    assert wrong(compare(model, shape(), backend="cpu", seeds=2)) == ["features", f"block {FAULTY}"]


def test_a_fault_of_gradients_alone(model, monkeypatch):
    """A hundredth too much, on the way back through one block's MLP: what comes before it is wrong as well."""

    class Fault(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    real = stream.mlp_branch

    def faulty(block, normed, layer):
        out = real(block, normed, layer)
        return Fault.apply(out) if layer.choice.add_norm == "cpu" and hasattr(block.parts.block, "is_faulty") else out

    monkeypatch.setattr(stream, "mlp_branch", faulty)
    found = wrong(compare(model, shape(), backend="cpu", seeds=2))
    assert f"gradients of block {FAULTY}" in found and "gradient of the volume" in found
    assert not any(what == "features" or what.startswith("block") for what in found)
    assert not any(f"gradients of block {i}" in found for i in range(FAULTY + 1, len(model.blocks)))


def test_what_is_not_finite_is_found(model, monkeypatch):
    real = stream.run_in_groups

    def faulty(block, *rest):
        done = real(block, *rest)
        if done is not None and hasattr(block.parts.block, "is_faulty"):
            done[0][1].view(-1)[7] = float("nan")
        return done

    monkeypatch.setattr(stream, "run_in_groups", faulty)
    assert f"block {FAULTY}" in wrong(compare(model, shape(), backend="cpu", seeds=1))


@pytest.mark.parametrize("lost", ["a group", "the last", "the volume's"])
def test_gradients_that_are_lost(model, monkeypatch, lost):
    real, group = module._gradients, "gradients of block 1"

    def losing(lifted, volume):
        found = real(lifted, volume)
        if lifted.backend != "cpu":
            return found
        if lost == "a group":
            del found[group]
        elif lost == "the last":
            found[group].popitem()
        else:
            found["gradient of the volume"].clear()
        return found

    monkeypatch.setattr(module, "_gradients", losing)
    expected = "gradient of the volume" if lost == "the volume's" else group
    assert wrong(compare(model, shape(), backend="cpu", seeds=2)) == [expected]


def test_another_shape_or_dtype(model, monkeypatch):
    real = module._everything
    changes = {"shape": lambda t: t[:1], "dtype": lambda t: t.double()}
    for change in changes.values():

        def faulty(lifted, *rest, change=change):
            found = real(lifted, *rest)
            if lifted.backend == "cpu":
                found["features"]["patches"] = change(found["features"]["patches"][None])
                found["features"]["cls"] = change(found["features"]["cls"][:, :1])
            return found

        monkeypatch.setattr(module, "_everything", faulty)
        assert "features" in wrong(compare(model, shape(), backend="cpu", seeds=1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reference_that_is_not_finite_measures_nothing(model, value):
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[3] = value
    with pytest.raises(ValueError, match="the reference is not finite in"):
        compare(model, shape(), backend="cpu", seeds=1)


def test_weights_of_ones_own_are_not_replaced(capsys, monkeypatch, tmp_path):
    """Whatever the folder is called."""
    seen, folder = [], str(tmp_path / "random_crops")
    monkeypatch.setattr(module, "load_model", lambda name: (BY_NAME["timm-dinov3-s"].make(), name))
    monkeypatch.setattr("planecycle_fast.bench.contenders.randomise", lambda model: seen.append(model) or model)
    command = ["--volume", "1x2x32", "--device", "cpu"]
    assert main(["verify", folder, *command]) == 0
    assert not seen and folder in capsys.readouterr().out.replace("\n", "")
    monkeypatch.setattr(module, "load_model", lambda name: (BY_NAME["timm-dinov3-s"].make(), random_note(name)))
    assert main(["verify", "a-model", *command]) == 0
    assert len(seen) == 1


def test_the_command(capsys, monkeypatch):
    command = ["verify", "vit_small_patch16_dinov3", "--volume", "1x2x32", "--device", "cpu", "--backend", "cpu"]
    monkeypatch.setattr(module, "load_model", lambda name: (BY_NAME["timm-dinov3-s"].make(), "random"))
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "within the budget" in text and "gradients of block 4" in text and "TOO LARGE" not in text
    real = stream.run_in_groups

    def faulty(*args):
        done = real(*args)
        if done is None:
            return done
        out, ran = done  # a stream, or tokens and their norm
        return (out._replace(branch=out.branch * 0.99) if hasattr(out, "branch") else (out[0], out[1] * 0.99)), ran

    monkeypatch.setattr(stream, "run_in_groups", faulty)
    assert main(command) == 1
    text = capsys.readouterr().out
    assert "out of the budget: features, block 0, block 1" in text and "TOO LARGE" in text


@pytest.mark.parametrize(
    "change, message",
    [
        (["--volume", "8"], "volume must be like"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--backend", "fast"], "backend must be 'auto' or one of"),
        (["--device", "tpu"], "device must be"),
        (["--mode", "3d"], "mode must be one of"),
    ],
)
def test_bad_arguments(capsys, change, message):
    assert main(["verify", "vit_small_patch16_dinov3", "--volume", "1x2x32", *change]) == 1
    assert message in capsys.readouterr().err


def test_no_seeds(model):
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        compare(model, shape(), seeds=0)
