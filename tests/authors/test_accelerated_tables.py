"""Tables of RoPE of accelerated models: the module's own, kept as long as nothing that makes them changes."""

import pytest
import torch

from planecycle_fast.authors.accelerated import _angles

from ..host_models import BY_NAME


@pytest.fixture
def rope():
    return BY_NAME["facebook-stand-in"].make().rope_embed.eval()


def test_they_are_those_of_the_module_and_kept(rope):
    found = _angles(rope, (2, 3))
    assert all(map(torch.equal, found.sincos(), rope(H=2, W=3)))
    assert _angles(rope, (2, 3)) is found and _angles(rope, (3, 2)) is not found


def patched(rope):
    forward = rope.forward
    rope.forward = lambda **sizes: tuple([2 * t for t in forward(**sizes)])


def hooked(rope):
    rope.register_forward_hook(lambda module, args, out: tuple([2 * t for t in out]))


def scaled(rope):
    rope.periods.mul_(2)


def replaced(rope):
    rope.periods = rope.periods * 2


def of_another_dtype(rope):
    rope.to(torch.bfloat16)


@pytest.mark.parametrize("change", [patched, hooked, scaled, replaced, of_another_dtype])
def test_changes_are_followed(rope, change):
    before = _angles(rope, (2, 3))
    change(rope)
    found = _angles(rope, (2, 3))
    assert found is not before and not torch.equal(found.sincos()[0], before.sincos()[0])
    assert all(map(torch.equal, found.sincos(), rope(H=2, W=3)))


def test_training_makes_them_anew(rope):
    assert _angles(rope.train(), (2, 3)) is not _angles(rope, (2, 3))


def test_gradients_may_need_what_inference_mode_has_made(rope):
    with torch.inference_mode():
        found = _angles(rope, (2, 3))
        tables = [*found.sincos(), *found.halves(), *found.by_axis().sin, *found.by_axis().cos]
    assert _angles(rope, (2, 3)) is found and not any([t.is_inference() for t in tables])
