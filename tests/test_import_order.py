"""The house: which package may import which, and that no way leads back, neither between packages nor modules."""

import ast
import functools
import re
from pathlib import Path

import pytest

import planecycle_fast as pcf

ROOT = Path(pcf.__file__).parent
# Packages and root modules, the lowest floor first: each imports lower lines only, not even lazily another one's.
ORDER = """
optional version features
runtime
geometry
ops
hosts
inputs
engine weights
operator lifted
pretrained authors cost
scans
export bench
__init__
commands
__main__
"""
ORDER = [line.split() for line in ORDER.split("\n")[1:-1]]
FLOORS = 11
BY_NAME = "moved"  # imports modules by their names alone


def modules():
    """{dotted name: file}; a package by its own name, the root as ""."""
    files = {path.relative_to(ROOT).with_suffix("").parts: path for path in ROOT.rglob("*.py")}
    named = {".".join(parts).removesuffix("__init__").rstrip("."): path for parts, path in files.items()}
    return {name: path for name, path in named.items() if name != BY_NAME}


MODULES = modules()


@functools.cache
def imports(name, lazily):
    """The modules that one imports, with those within functions or without; never for type checkers alone."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from visit(ast.Module(child.orelse, []))
            elif isinstance(child, ast.ImportFrom):
                if child.level:
                    base = [part for part in package if part]
                    base = base[: len(base) + 1 - child.level] + (child.module or "").split(".")
                elif (child.module or "").split(".")[0] == ROOT.name:
                    base = child.module.split(".")[1:]
                else:
                    continue
                base = ".".join([part for part in base if part])
                inside = [f"{base}.{alias.name}".lstrip(".") for alias in child.names]
                yield from [module if module in MODULES else base for module in inside]
            elif isinstance(child, ast.Import):
                for alias in child.names:
                    first, _, rest = alias.name.partition(".")
                    if first == ROOT.name:
                        yield rest
            elif lazily or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from visit(child)

    return {module for module in visit(ast.parse(path.read_text())) if module in MODULES} - {name}


def room_of(module):
    return module.split(".")[0] or "__init__"


def circle_in(arrows):
    """Names that lead from one to the next and back to the first, or None. `arrows`: {name: those it imports}."""
    done = set()

    def follow(name, way):
        if name in way:
            return way[way.index(name) :]
        if name in done:
            return None
        found = next(filter(None, [follow(other, [*way, name]) for other in sorted(arrows.get(name, ()))]), None)
        done.add(name)
        return found

    return next(filter(None, [follow(name, []) for name in sorted(arrows)]), None)


def floors(arrows):
    known = {}

    def floor(name):
        if name not in known:
            known[name] = 1 + max(map(floor, arrows[name]), default=0)
        return known[name]

    return {name: floor(name) for name in arrows}


ROOMS = {room: set() for line in ORDER for room in line}
for module in MODULES:
    others = {room_of(other) for other in imports(module, lazily=True)}
    ROOMS.setdefault(room_of(module), set()).update(others - {room_of(module)})


def test_every_package_and_root_module_has_its_place():
    assert sorted(ROOMS) == sorted([room for line in ORDER for room in line])
    assert {room_of(module) for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_packages_import_lower_ones_only(room):
    height = {name: i for i, line in enumerate(ORDER) for name in line}
    higher = [
        f"{module or '__init__'} imports {other or '__init__'}"
        for module in MODULES
        if room_of(module) == room
        for other in sorted(imports(module, lazily=True))
        if room_of(other) != room and height[room_of(other)] >= height[room]
    ]
    assert not higher


def test_there_are_no_circles():
    assert circle_in(ROOMS) is None
    assert circle_in({module: imports(module, lazily=True) for module in MODULES}) is None


def test_the_house_is_not_higher_than_it_has_to_be():
    assert max(floors(ROOMS).values()) <= FLOORS


def test_circles_and_floors_are_seen():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    assert floors({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 3, "b": 2, "c": 1}
    at_once, ever = (imports("ops.residual.add_norm", lazily) for lazily in (False, True))
    assert {"runtime.backends", "ops.residual.norm"} <= at_once
    assert "ops.residual.add_norm_cpu" in ever - at_once


@pytest.mark.parametrize("package", [path.parent.relative_to(ROOT).as_posix() for path in ROOT.rglob("__init__.py")])
def test_a_package_says_what_it_is_for_and_where_to_start(package):
    text = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text()))
    assert package == "." or len(text.split("\n")) >= 3
    assert not [name for name in re.findall(r"`(\w+\.py)`", text) if not (ROOT / package / name).exists()]
    if package == ".":
        assert [line for line in ORDER if not all(re.search(rf"^    .*\b{name}\b", text, re.M) for name in line)] == [
            ["__init__"], ["__main__"],
        ]  # fmt: skip
    elif "/" not in package:
        assert "Start with" in text and re.search(r"[Mm]ay\s+import", text)


def test_contributing_lists_packages_in_this_order():
    text = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    height = {name: i for i, line in enumerate(ORDER) for name in line if (ROOT / name).is_dir()}
    listed = re.findall(r"^\| `planecycle_fast/(\w+)/`", text, re.M)
    assert sorted(listed) == sorted(height) and listed == sorted(listed, key=height.get)


@pytest.mark.parametrize("package", ["", "ops"])
def test_no_public_name_is_that_of_a_module_beside_it(package):
    """Importing the module would put it in the place of what has its name."""
    public = set((pcf.ops if package else pcf).__all__) - {"ops"}
    beside = {path.stem for path in [*(ROOT / package).glob("*.py"), *(ROOT / package).glob("*/")]}
    assert not public & beside
