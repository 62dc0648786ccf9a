"""What tests and benchmarks name that only run on a GPU is there: functions, attributes, arguments; needs no GPU.

Names are followed from imports on, through modules, classes and objects that modules hold. What only a call or a
subscript gives is not seen.
"""

import ast
import contextlib
import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path

import pytest

for name in ("timm", "transformers", "triton"):
    pytest.importorskip(name, reason=f"needs {name}, which tests on a GPU import")

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("tests/gpu/test_*.py"), *ROOT.glob("benchmarks/gpu*.py")])
OURS = ("planecycle_fast", "tests", "benchmarks")


def missing(source, scope):
    """What of a module's source is not there, in words, given the module's own names."""
    for part in ast.parse(source).body:
        nodes = list(ast.walk(part))
        local = {node.arg for node in nodes if isinstance(node, ast.arg)}
        if not isinstance(part, (ast.Assign, ast.AnnAssign, ast.For)):
            local |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        known = {name: value for name, value in scope.items() if name not in local}
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module("." * node.level + (node.module or ""), scope["__package__"])
                for alias in node.names:
                    if not _has(module, alias.name):
                        yield f"line {node.lineno}: {module.__name__} has no {alias.name}"
                    known[alias.asname or alias.name] = getattr(module, alias.name, None)
        for node in nodes:
            if isinstance(node, ast.Attribute) and (owner := _value(node.value, known)) is not None:
                if _is_ours(owner) and not _has(owner, node.attr):
                    yield f"line {node.lineno}: {ast.unparse(node.value)} has no {node.attr}"
            elif isinstance(node, ast.Call) and (function := _value(node.func, known)) is not None:
                yield from _wrong_arguments(node, function)


def _value(node, known):
    """What a chain of names stands for, or None where that cannot be told."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := _value(node.value, known)) is not None:
        return getattr(owner, node.attr, None)
    return None


def _has(owner, name):
    if inspect.ismodule(owner) and importlib.util.find_spec(owner.__name__).submodule_search_locations:
        with contextlib.suppress(ImportError):  # a part that nobody has imported yet
            importlib.import_module(f"{owner.__name__}.{name}")
    return hasattr(owner, name)


def _is_ours(owner):
    named = owner.__name__ if inspect.ismodule(owner) else inspect.getattr_static(owner, "__module__", None)
    named = named or type(owner).__module__
    is_namespace = inspect.ismodule(owner) or inspect.isclass(owner) or not callable(owner)
    return is_namespace and isinstance(named, str) and named.split(".")[0] in OURS


def _wrong_arguments(call, function):
    if not inspect.isfunction(function) or function.__module__.split(".")[0] not in OURS:
        return
    if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
        return
    try:
        inspect.signature(function).bind(*call.args, **{k.arg: k.value for k in call.keywords})
    except TypeError as error:
        yield f"line {call.lineno}: {ast.unparse(call.func)}: {error}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_named_is_there(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert list(missing(path.read_text(), vars(module))) == []


FAULTS = {
    "extract._device('auto')": "extract has no _device",  # the one that was there
    "pcf.extract.compute_all(1)": "pcf.extract has no compute_all",
    "pcf.LiftedModel.intermediates": "pcf.LiftedModel has no intermediates",
    "SPEC.factors_case(1)": None,  # None is a value
    "SPEC.quick(1)": "SPEC has no quick",
    "from planecycle_fast.ops import add_norms": "planecycle_fast.ops has no add_norms",
    "from planecycle_fast.ops import rope\n    rope.tables": None,  # an attribute of a function
    "extract.usable_device()": "extract.usable_device: missing a required argument: 'name'",
    "extract.usable_device('auto', device=1)": "extract.usable_device: got an unexpected keyword argument 'device'",
    "extract.usable_device('auto').typ": None,  # what a call gives
    "pcf = 1; pcf.nothing": None,
}


@pytest.mark.parametrize("line", FAULTS)
def test_what_is_not_there_is_noticed(line):
    import planecycle_fast as pcf
    from planecycle_fast.scans import extraction as extract

    from .specs.plane_switch import SPEC

    scope = {"pcf": pcf, "extract": extract, "SPEC": replace(SPEC, factors_case=None), "__package__": "tests"}
    expected = [] if FAULTS[line] is None else [f"line 2: {FAULTS[line]}"]
    assert list(missing(f"def test():\n    {line}\n", scope)) == expected


def test_the_files_are_found():
    assert {"test_gpu", "test_gpu_ops", "gpu", "gpu_models"} <= {path.stem for path in FILES}
