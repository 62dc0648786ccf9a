"""Lifted models compiled by AOTInductor, and run where this package is not."""

import json

import pytest
import torch

import planecycle_fast as pcf
from planecycle_fast.export.formats import NamedTensors

from ..export.test_export_command import alone, needs_compiler
from ..host_models import BY_NAME

pytestmark = [needs_compiler, pytest.mark.full]  # each compiles for half a minute or more

CASES = {
    "hf-clip": ("D", {}),
    "timm-dinov3-s": ("D", {}),
    "hf-dinov2": ("none", {"mode": "slice2d"}),
    "facebook-stand-in": ("B,D", {"globals_at": "plane"}),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_ahead(tmp_path, monkeypatch, name):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    host, (dynamic, settings) = BY_NAME[name], CASES[name]
    layers = "num_hidden_layers" if name.startswith("hf") else "depth"
    model = pcf.lift(host.make(**{layers: 2}), **({"cycle_order": ("HW", "DW")} | settings))
    path = tmp_path / "out" / "m.pt2"
    path.parent.mkdir()
    done = pcf.export_model(model, host.volume(1, 3), path, "aoti", dynamic)
    assert done.files == (path,) and [*path.parent.iterdir()] == [path]
    run = torch._inductor.aoti_load_package(str(path))
    about = json.loads(run.get_metadata()["planecycle_fast"])
    assert about["mode"] == model.mode and about["dynamic"] == list(done.dynamic)
    cases = [(1, 3), *([(1, 2), (1, 7)] if "D" in dynamic else []), *([(3, 4)] if "B" in dynamic else [])]
    for i, (batch, depth) in enumerate(cases):
        volume = host.volume(batch, depth)
        with torch.no_grad():
            expected = NamedTensors(model)(volume)
        got = run(volume)
        assert list(got) == list(expected)
        for key, right in expected.items():
            torch.testing.assert_close(got[key], right, rtol=0, atol=1e-4)
        torch.save((volume, dict(got)), tmp_path / f"{i}.pt")
    code = f"""
import torch
run = torch._inductor.aoti_load_package("out/m.pt2")
for i in range({len(cases)}):
    volume, expected = torch.load(f"{{i}}.pt")
    for name, got in run(volume).items():
        assert torch.equal(got, expected[name])
"""
    alone(code, tmp_path)


def test_another_size_is_noticed_only_where_that_is_asked_for(tmp_path):
    """As docs/export.md says: torch looks at sizes where a variable of the environment says so."""
    host = BY_NAME["hf-clip"]
    model = pcf.lift(host.make(num_hidden_layers=1))
    pcf.export_model(model, host.volume(1, 3), tmp_path / "m.pt2", "aoti", "none")
    shape = tuple(host.volume(1, 4).shape)
    code = f"""
import os
os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"
import torch
run = torch._inductor.aoti_load_package("m.pt2")
try:
    run(torch.zeros{shape})
except RuntimeError as error:
    assert "unmatched dim value at 2, expected: 3, but got: 4" in str(error)
else:
    raise SystemExit("another size was taken")
"""
    alone(code, tmp_path)
