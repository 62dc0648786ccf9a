"""One way: the converter's model runs its blocks as a lifted model does, with as few calls of the package."""

import copy
import sys
from pathlib import Path

import pytest
import torch

import planecycle_fast as pcf

from .. import standins

PACKAGE = str(Path(pcf.__file__).parent)


def calls(run):
    """How many functions of the package a call of `run` calls."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("grad", [False, True])
def test_a_converted_model_makes_at_most_a_fifth_more_calls_than_a_lifted_one(grad):
    host = standins.DinoVisionTransformer(patch_size=4, depth=12).eval()
    lifted, converted = pcf.lift(host), pcf.PlaneCycleConverter()(copy.deepcopy(host)).eval()
    volume, found = torch.randn(1, 3, 4, 16, 16), []
    with torch.set_grad_enabled(grad):
        for model in (lifted, converted.forward_features):
            model(volume)  # parts are read, the library is loaded
            found.append(calls(lambda: model(volume)))  # noqa: B023
    assert 0 < found[1] <= 1.2 * found[0], found


def test_what_changes_between_passes_is_seen():
    """Readings are kept between passes; blocks that are replaced, hooked or given another plane are read again."""
    model = pcf.PlaneCycleConverter()(standins.DinoVisionTransformer(patch_size=4).eval())
    volume, calls_of_hook = torch.randn(1, 3, 4, 16, 16), []

    def patches():
        with torch.no_grad():
            return model.forward_features(volume)["x_norm_patchtokens"]

    before = patches()
    torch.testing.assert_close(patches(), before, rtol=0, atol=0)
    handle = model.blocks[1].blk2d.mlp.register_forward_hook(lambda *_: calls_of_hook.append(1))
    torch.testing.assert_close(patches(), before)
    assert calls_of_hook == [1]
    handle.remove()
    model.blocks[2].blk2d = copy.deepcopy(model.blocks[2].blk2d)
    with torch.no_grad():
        model.blocks[2].blk2d.mlp.fc1.weight.mul_(3)
    assert not torch.allclose(patches(), before)
    model.blocks[2] = copy.deepcopy(model.blocks[2])
    with torch.no_grad():
        model.blocks[2].blk2d.mlp.fc1.weight.div_(3)
    torch.testing.assert_close(patches(), before)
    model.blocks[3].cycle_order = ("DW",)
    assert not torch.allclose(patches(), before)


def test_nothing_that_is_kept_between_passes_makes_a_second_graph():
    model = pcf.PlaneCycleConverter()(standins.DinoVisionTransformer(patch_size=4, depth=3).eval())
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    run = torch.compile(model.forward_features, backend=counted, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for sizes in ((4, 16, 20), (4, 16, 20), (5, 12, 24)):
            volume = torch.randn(1, 3, *sizes)
            found = run(volume)["x_norm_patchtokens"]
            torch.testing.assert_close(found, model.forward_features(volume)["x_norm_patchtokens"])
    assert len(graphs) == 1
