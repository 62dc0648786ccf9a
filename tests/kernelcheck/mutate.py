"""Edits of a kernel's source, one at a time: faults that its tests must notice.

Each kind of edit is a function of a node of the syntax tree that gives the texts to put in its place. Edited are the
functions under ``@triton.jit`` and those that launch them. Nothing here imports what it edits.
"""

import ast
import itertools
import random
import re
from dataclasses import dataclass

PAIRS = [("num_in", "num_out"), ("num_next", "num_prev"), ("before", "after"), ("first", "end"), ("source", "target")]
SWAPS = dict(PAIRS) | {b: a for a, b in PAIRS}


@dataclass(frozen=True)
class Mutant:
    """One edit."""

    module: str
    kind: str
    function: str
    line: str  # of source, before
    before: str
    after: str
    start: int  # where `before` stands in the source
    end: int

    def source(self, original):
        return original[: self.start] + self.after + original[self.end :]


class _Source:
    def __init__(self, text):
        if not text.isascii():
            raise ValueError("the source of kernels must be ASCII, so that columns are characters")
        self.text = text
        self.lines = [0, *itertools.accumulate(len(line) for line in text.splitlines(keepends=True))]

    def span(self, node):
        """Where a node stands."""
        start = self.lines[node.lineno - 1] + node.col_offset
        return start, self.lines[node.end_lineno - 1] + node.end_col_offset

    def of(self, node):
        """The text of a node; of an operation in parentheses, which do not belong to it."""
        start, end = self.span(node)
        operation = isinstance(node, (ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.UnaryOp, ast.Lambda))
        return f"({self.text[start:end]})" if operation else self.text[start:end]


def _called(node):
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def another_stride(node, s, names):
    """A stride or size of the same tensor: x_seq for x_batch."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names:
        family = [name for name in names if re.match(r"(x|out)_", name) and name[:2] == node.id[:2]]
        if node.id in family and len(family) > 1:
            yield family[(family.index(node.id) + 1) % len(family)]


def another_axis_of_the_plane(node, s, names):
    """The next of several numbered names: n2 for n1."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and re.fullmatch(r"[a-z]\d", node.id):
        family = sorted(name for name in names if re.fullmatch(node.id[0] + r"\d", name))
        if node.id in family and len(family) > 1:
            yield family[(family.index(node.id) + 1) % len(family)]


def the_other_plane(node, s, names):
    """New for old, out for in, end for start."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and SWAPS.get(node.id) in names:
        yield SWAPS[node.id]


def drop_mask(node, s, names):
    """A load or store of all lanes."""
    if _called(node) in ("tl.load", "tl.store") and any(k.arg == "mask" for k in node.keywords):
        kept = [s.of(a) for a in node.args] + [s.of(k) for k in node.keywords if k.arg not in ("mask", "other")]
        yield f"{s.of(node.func)}({', '.join(kept)})"


def half_mask(node, s, names):
    """A mask that guards one side only. (What is masked by a number are bits.)"""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd) and not _is_number(node.right):
        for kept, dropped in ((node.left, node.right), (node.right, node.left)):
            yield f"{s.of(kept)} & ({s.of(dropped)} | True)"


def _is_number(node):
    return isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant)


def bound_off_by_one(node, s, names):
    """`<` that lets one more in, or one fewer."""
    others = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.GtE: (">=", ">"), ast.Gt: (">", ">=")}
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in others:
        same, other = others[type(node.ops[0])]
        left, right = s.of(node.left), s.of(node.comparators[0])
        yield f"{left} {other} {right}"
        yield f"{left} {same} {right} - 1"


def wrong_axis(node, s, names):
    """A reduction over, or a program of, another axis; a column for a row."""
    if _called(node) in ("tl.sum", "tl.max", "tl.min", "tl.program_id", "tl.num_programs"):
        axis = next((k.value for k in node.keywords if k.arg == "axis"), node.args[-1] if node.args else None)
        if isinstance(axis, ast.Constant) and axis.value in (0, 1):
            start, end = (place - s.span(node)[0] for place in s.span(axis))
            yield s.of(node)[:start] + str(1 - axis.value) + s.of(node)[end:]
    if isinstance(node, ast.Subscript) and s.of(node).endswith(("[:, None]", "[None, :]")):
        rows = s.of(node).endswith("[:, None]")
        yield s.of(node.value) + ("[None, :]" if rows else "[:, None]")


def narrow_integer(node, s, names):
    """32 bits where there were 64."""
    if isinstance(node, ast.Call) and s.of(node).endswith(".to(tl.int64)"):
        yield s.of(node)[: -len("tl.int64)")] + "tl.int32)"
    if _called(node) == "tl.cast" and s.of(node.args[1]) == "tl.int64":
        yield f"tl.cast({s.of(node.args[0])}, tl.int32)"
    if isinstance(node, ast.arg) and node.annotation and s.of(node.annotation) == "tl.int64":
        yield f"{node.arg}: tl.int32"


def drop_edge(node, s, names):
    """Division that drops the last, partly filled tile or bin, or adds one."""
    if _called(node) in ("tl.cdiv", "triton.cdiv"):
        yield f"(({s.of(node.args[0])}) // ({s.of(node.args[1])}))"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv):
        left, right = s.of(node.left), s.of(node.right)
        yield f"(({left} + {right} - 1) // ({right}))"


def shorter_loop(node, s, names):
    """A loop without its last step, or without its first."""
    if _called(node) in ("range", "tl.range", "tl.static_range"):
        args = [s.of(a) for a in node.args]
        first, last, *step = args if len(args) > 1 else ["0", *args]
        rest = [*step, *(s.of(k) for k in node.keywords)]
        yield f"{s.of(node.func)}({', '.join([first, f'{last} - {(step or [1])[0]}', *rest])})"
        yield f"{s.of(node.func)}({', '.join([f'{first} + {(step or [1])[0]}', last, *rest])})"


def another_reduction(node, s, names):
    """The largest for the sum, the smaller for the larger, the last for the total."""
    swaps = {"tl.sum": "tl.max", "tl.maximum": "tl.minimum", "tl.minimum": "tl.maximum"}
    if _called(node) in swaps:
        yield s.of(node).replace(_called(node), swaps[_called(node)], 1)
    if isinstance(node, ast.AugAssign):
        yield f"{s.of(node.target)} = {s.of(node.value)}"


def another_operator(node, s, names):
    """`-` for `+`, `+` for `*`, `%` for `//`."""
    swaps = {ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.FloorDiv: "%", ast.Mod: "//"}
    if isinstance(node, ast.BinOp) and type(node.op) in swaps:
        yield f"({s.of(node.left)} {swaps[type(node.op)]} {s.of(node.right)})"


def drop_factor(node, s, names):
    """One side of a product alone."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        yield s.of(node.left)
        yield s.of(node.right)


def other_branch(node, s, names):
    """The other branch of a condition."""
    if isinstance(node, ast.If):
        yield f"not ({s.of(node.test)})"
    if isinstance(node, ast.IfExp):
        yield f"({s.of(node.orelse)} if {s.of(node.test)} else {s.of(node.body)})"
    if _called(node) == "tl.where" and len(node.args) == 3:
        condition, yes, no = (s.of(a) for a in node.args)
        yield f"tl.where({condition}, {no}, {yes})"


def drop_dependency(node, s, names):
    """A step left out that later ones build on."""
    if isinstance(node, ast.AugAssign):
        yield "pass"
    if isinstance(node, ast.Expr) and _called(node.value).endswith((".store", ".debug_barrier")):
        yield "pass"


def another_constant(node, s, names):
    """An integer that is one larger."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield str(node.value + 1)


def coarse_sum(node, s, names):
    """Sums and weights in 16 bits."""
    if isinstance(node, ast.Call) and s.of(node).endswith(".to(ACC)"):
        yield f"{s.of(node)}.to(tl.float16).to(ACC)"
    if _called(node) == "_divide":
        yield f"{s.of(node)}.to(tl.float16).to(ACC)"


def used_masked_lanes(node, s, names):
    """Masked lanes that are not 0."""
    if isinstance(node, ast.keyword) and node.arg == "other":
        yield "other=2"


def another_tile(node, s, names):
    """A descriptor's tile at its coordinates the other way round, or at the beginning along one axis."""
    method = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
    if method in ("load", "store") and node.args and isinstance(node.args[0], ast.List) and len(node.args[0].elts) == 2:
        first, second = (s.of(place) for place in node.args[0].elts)
        rest = "".join(f", {s.of(a)}" for a in node.args[1:])
        for places in sorted({f"{second}, {first}", f"0, {second}", f"{first}, 0"} - {f"{first}, {second}"}):
            yield f"{s.of(node.func)}([{places}]{rest})"


KINDS = [
    another_stride, another_axis_of_the_plane, the_other_plane, drop_mask, half_mask, bound_off_by_one, wrong_axis,
    narrow_integer, drop_edge, shorter_loop, another_reduction, another_operator, drop_factor, other_branch,
    drop_dependency, another_constant, coarse_sum, used_masked_lanes, another_tile,
]  # fmt: skip


def mutants(text, module, most=4):
    """Mutants of a module's kernels and of what launches them, at most so many of a kind and function, always the same.

    Of `narrow_integer` there are all: what is too narrow shows at sizes that nobody runs.
    """
    s, found = _Source(text), []
    for function in _edited(ast.parse(text)):
        names = [arg.arg for arg in (*function.args.args, *function.args.kwonlyargs)]
        names += [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        names = list(dict.fromkeys(names))
        for kind in KINDS:
            edits = [(node, after) for node in _nodes(function) for after in kind(node, s, names)]
            of_kind = [_mutant(module, kind, function, *edit, s) for edit in edits]
            of_kind = [m for m in dict.fromkeys(of_kind) if _compiles(m, text, *s.span(function))]
            random.Random(f"{kind.__name__} {function.name}").shuffle(of_kind)
            of_kind = of_kind if kind is narrow_integer else of_kind[:most]
            found += sorted(of_kind, key=lambda m: (m.start, m.after))
    return list({(m.source(text)): m for m in reversed(found)}.values())[::-1]  # no edit twice, by two kinds


def _edited(module):
    """The functions under ``@triton.jit`` and those that launch them."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef):
            launches = any(_called(inner) == "launch" for inner in ast.walk(node))
            if launches or "triton.jit" in {_name_of(d) for d in node.decorator_list}:
                yield node


def code_of(text, function):
    """A function that is edited and whatever it needs of its module, without docstrings: what outcomes depend on."""
    module, lines = ast.parse(text), text.splitlines()
    named = {}
    for node in module.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        named |= {getattr(target, "name", getattr(target, "id", None)): node for target in targets}
    needed, new = [], [named[function]]
    while new:
        needed += new
        names = {inner.id for node in new for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        new = [node for name, node in named.items() if name in names and node not in needed]
    kept = set()
    for node in needed:
        kept |= set(
            range(min([node.lineno, *[d.lineno for d in getattr(node, "decorator_list", [])]]), node.end_lineno + 1)
        )
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            kept -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return "\n".join([lines[i - 1] for i in sorted(kept)])


def _name_of(decorator):
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)


def _nodes(function):
    """All of a function but its docstring and default values."""
    for part in (*function.args.args, *function.args.kwonlyargs, *function.body):
        yield from ast.walk(part)


def _mutant(module, kind, function, node, after, s):
    start, end = s.span(node.test if isinstance(node, ast.If) else node)
    line = s.text[s.lines[node.lineno - 1] :].splitlines()[0].strip()
    return Mutant(module, kind.__name__, function.name, line, s.text[start:end], after, start, end)


def _compiles(mutant, text, start, end):  # the function that stands there
    try:
        ast.parse(text[start : mutant.start] + mutant.after + text[mutant.end : end])
    except SyntaxError:
        return False
    return True
