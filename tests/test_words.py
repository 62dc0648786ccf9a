"""One word for a thing: names of classes, and functions that a module beside them would hide."""

import ast
import re

import pytest

from .test_import_order import MODULES, ROOT

TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def types_of(tree):
    """Classes and names for types of a module: those that begin with a capital letter and have a small one."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name.lstrip("_")
        elif isinstance(node, ast.Assign):
            yield from [n.id for n in node.targets if isinstance(n, ast.Name) and re.match("[A-Z].*[a-z]", n.id)]


def hidden_names(package, names):
    """Those of a package's own names that a module or package in it has as well."""
    beside = {path.stem for path in [*(ROOT / package).glob("*.py"), *(ROOT / package).glob("*/")]}
    return sorted(set(names) & beside)


def test_no_two_types_have_the_same_name():
    found = {}
    for module, tree in TREES.items():
        for name in types_of(tree):
            found.setdefault(name, []).append(module)
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}
    assert {"Cost", "Row", "VolumeFeatures"} <= set(found)


@pytest.mark.parametrize("package", [path.parent.relative_to(ROOT).as_posix() for path in ROOT.rglob("__init__.py")])
def test_importing_a_module_hides_no_function(package):
    """A package's own name would be the module as soon as that is imported."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    own = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    imported = [
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module  # "from . import ops" is the package itself
        for alias in node.names
    ]
    assert hidden_names(package, own + imported) == []


def test_only_the_function_of_a_file_has_its_name():
    """`plan` of commands/plan.py would be its own; a `plan` in a file beside it would be another thing."""
    found = []
    for module, tree in TREES.items():
        package, _, file = module.rpartition(".")
        names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        found += [f"{module}: {name}" for name in hidden_names(package.replace(".", "/"), names) if name != file]
    assert found == []


def test_what_has_a_name_twice_is_seen():
    tree = ast.parse("class Row: pass\nclass _Cost: pass\nRow = dict\nSIZES = 1\nsizes = Item = int\nT = int")
    assert list(types_of(tree)) == ["Row", "Cost", "Row", "Item"]
    assert hidden_names("ops", ["rotary", "tiles", "rope", "add_norm"]) == ["rotary", "tiles"]
