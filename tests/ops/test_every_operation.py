"""Every operation that the package registers goes through the whole test bed; a new one without it fails here."""

import importlib
import inspect
import pkgutil

import pytest

pytest.importorskip("triton", reason="needs triton, to import kernels")

from planecycle_fast import ops
from planecycle_fast.ops.registration import OPS

from .. import interpreted
from ..kernelcheck import mutants_table
from ..kernelcheck.harness import op_tests
from ..specs import SPECS


def modules_of(package):
    """All modules of a package, those within its packages too."""
    names = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    return [importlib.import_module(name) for name in names if not name.endswith(".conftest")]


def _changed(tests):
    """Tests of `op_tests` that a class built on it replaces or drops."""
    return [name for name in vars(tests) if name.startswith("test_") and tests.__bases__ != (object,)]


def missing(registered, specs, classes):
    """What of the test bed each operation lacks, in words."""
    modules_of(ops)  # registering is what importing them does
    checked = {found.spec.op.name: _changed(found) for found in classes if hasattr(found, "spec")}
    others = {op.name for spec in specs for op in spec.others}  # tested with their operation
    for name in sorted(set(registered) - others):
        if name not in {spec.op.name for spec in specs}:
            yield f"{name} has no Spec in tests/specs"
        elif name not in checked:
            yield f"{name} has no `op_tests` in tests/interpreted/test_{name}.py"
        elif checked[name]:
            yield f"{name} leaves out {checked[name]}"
        if name not in mutants_table.operations():
            yield f"{name} has no mutants: its Spec must be in tests/specs/{name}.py"


def classes_of(modules):
    return [found for module in modules for _, found in inspect.getmembers(module, inspect.isclass)]


def test_every_operation_is_tested():
    assert sum(len(spec.ops) for spec in SPECS) == len(OPS) >= 1
    assert not list(missing(OPS, SPECS, classes_of(modules_of(interpreted))))


def test_an_operation_that_is_not_tested_is_noticed():
    classes = classes_of(modules_of(interpreted))
    assert list(missing({*OPS, "softmax"}, SPECS, classes)) == [
        "softmax has no Spec in tests/specs",
        "softmax has no mutants: its Spec must be in tests/specs/softmax.py",
    ]
    assert "plane_switch has no `op_tests` in tests/interpreted/test_plane_switch.py" in missing(OPS, SPECS, [])

    class WithoutProbe(op_tests(SPECS[0])):
        test_overflow = None

    name = SPECS[0].op.name
    assert list(missing({name}, SPECS, [WithoutProbe])) == [f"{name} leaves out ['test_overflow']"]
