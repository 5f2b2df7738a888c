"""Small wrong versions of a source file, one change each, for `benchmarks/mutation.py`.

Contains what is changed and how the change is written back so that every other line keeps its
number. Changes only what runs inside functions: comparisons, arithmetic, signs, boolean logic,
numbers by one, arguments swapped or left out, returned values, ends of slices, reductions taken
for their neighbours (any for all), statements dropped. Leaves alone docstrings, texts of errors and
all other strings, annotations, assertions (`strict=` of zip is one), and what runs on import
(defaults, class bodies, constants).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

COMPARISONS: dict[type, list[type]] = {
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}
ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.RShift: ast.LShift,
    ast.LShift: ast.RShift,
}
_PAIRS = (
    ("any", "all"), ("amin", "amax"), ("min", "max"), ("cumsum", "cumprod"), ("sum", "mean"),
    ("nanmean", "nansum"), ("tril", "triu"), ("sin", "cos"), ("floor", "ceil"),
    ("argmax", "argmin"),
    ("zeros", "ones"), ("zeros_like", "ones_like"), ("new_zeros", "new_ones"), ("add_", "sub_"),
    ("mul_", "div_"), ("exp", "log"), ("append", "remove"), ("removeprefix", "removesuffix"),
    ("startswith", "endswith"), ("mul", "div"), ("tril_", "triu_"), ("prod", "sum"),
)  # fmt: skip
NEIGHBOURS = dict(_PAIRS) | {other: one for one, other in _PAIRS if other != "sum"}


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        path: of the file, below the folder of the sources
        function: dotted name of the function that is changed
        operator: kind of change
        line: of what is changed
        first, last: lines whose tests may notice it: the statement, or the head of a block;
            counted from the line of `def`, so that they stand when lines above come or go
        before, after: the code, on one line
        start, stop: bytes of the file that are replaced
        text: what replaces them
        copy: counts equal changes in one function
    """

    path: str
    function: str
    operator: str
    line: int
    first: int
    last: int
    before: str
    after: str
    start: int
    stop: int
    text: str
    copy: int = 0

    @property
    def key(self) -> str:
        """Names the change whatever happens to the lines above it."""
        again = f" #{self.copy + 1}" if self.copy else ""
        return f"{self.path}:{self.function}: {self.before} -> {self.after}{again}"

    def applied(self, source: bytes) -> bytes:
        """The file with the change."""
        return source[: self.start] + self.text.encode() + source[self.stop :]


def mutants_of(path: str, source: bytes) -> list[Mutant]:
    """Every change of a file, in its order."""
    return _Finder(path, source).found()


def functions_of(source: bytes) -> dict[str, tuple[int, int]]:
    """First and last line of every function and method of a file, those inside others left out."""

    def inside(node: ast.AST, name: str) -> Iterator[tuple[str, tuple[int, int]]]:
        for child in getattr(node, "body", []):
            if isinstance(child, ast.ClassDef):
                yield from inside(child, f"{name}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                yield f"{name}{child.name}", (child.lineno, child.end_lineno or child.lineno)

    return dict(inside(ast.parse(source), ""))


class _Finder:
    def __init__(self, path: str, source: bytes):
        self.path, self.source = path, source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def found(self) -> list[Mutant]:
        mutants, seen = [], {}
        for mutant in self.inside(ast.parse(self.source), ""):
            copy = seen.get(mutant.key, 0)
            seen[mutant.key] = copy + 1
            mutants.append(Mutant(**{**mutant.__dict__, "copy": copy}))
        return mutants

    def inside(self, node: ast.AST, name: str) -> Iterator[Mutant]:
        """All changes in the functions and methods of a module or class."""
        for child in getattr(node, "body", []):
            if isinstance(child, ast.ClassDef):
                yield from self.inside(child, f"{name}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                self.function, self.origin = f"{name}{child.name}", child.lineno
                self.known = {a.arg for a in ast.walk(child.args) if isinstance(a, ast.arg)}
                yield from self.block(child.body)

    def block(self, body: list[ast.stmt]) -> Iterator[Mutant]:
        for statement in body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # a docstring, or ...
            yield from self.statement(statement)

    def statement(self, node: ast.stmt) -> Iterator[Mutant]:
        inner = [getattr(node, part, []) for part in ("body", "orelse", "finalbody")]
        handlers = [handler.body for handler in getattr(node, "handlers", [])]
        blocks = [block for block in (*inner, *handlers) if block]
        self.first = node.lineno
        self.last = max(node.lineno, blocks[0][0].lineno - 1) if blocks else node.end_lineno
        yield from self.dropped(node)
        if isinstance(node, ast.FunctionDef):
            yield from self.block(node.body)
            return
        if not isinstance(node, (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom)):
            for part in self.parts(node):
                yield from self.expression(part)
        if isinstance(node, (ast.If, ast.While)):
            yield self.mutant("condition", node.test, ast.UnaryOp(ast.Not(), node.test))
        if isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
            other = ast.AugAssign(node.target, ARITHMETIC[type(node.op)](), node.value)
            yield self.mutant("arithmetic", node, other)
        if isinstance(node, ast.Return) and not _is_none(node.value):
            yield self.mutant("return", node, ast.Return(ast.Constant(None)))
        if isinstance(node, ast.Assign):
            self.known |= {
                n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)
            }
        for block in blocks:
            yield from self.block(block)

    def parts(self, node: ast.stmt) -> list[ast.expr]:
        """Expressions of a statement itself, annotations and blocks left out."""
        return [
            value
            for field, value in ast.iter_fields(node)
            if field not in ("annotation", "body", "orelse", "returns", "args", "decorator_list")
            for value in (value if isinstance(value, list) else [value])
            if isinstance(value, (ast.expr, ast.withitem))
        ]

    def dropped(self, node: ast.stmt) -> Iterator[Mutant]:
        """A statement left out, where the code still runs without it."""
        matters = isinstance(node, (ast.Raise, ast.AugAssign, ast.Continue, ast.Break))
        matters |= isinstance(node, ast.Expr)
        if isinstance(node, ast.Assign):
            names = [n for t in node.targets for n in ast.walk(t)]
            stored = [
                n.id for n in names if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            ]
            matters |= all(name in self.known for name in stored)
        if matters:
            yield self.mutant("dropped statement", node, ast.Pass())

    def expression(self, node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, ast.JoinedStr) or (
            isinstance(node, ast.keyword) and node.arg == "strict"
        ):
            return
        yield from self.changed(node)
        for child in ast.iter_child_nodes(node):
            yield from self.expression(child)

    def changed(self, node: ast.AST) -> Iterator[Mutant]:
        """Changes of this node, those of its children left out."""
        if isinstance(node, ast.Compare):
            for i, op in enumerate(node.ops):
                for other in COMPARISONS[type(op)]:
                    ops = [*node.ops[:i], other(), *node.ops[i + 1 :]]
                    yield self.mutant(
                        "comparison", node, ast.Compare(node.left, ops, node.comparators)
                    )
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            if not any(_is_text(side) for side in (node.left, node.right)):
                other = ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
                yield self.mutant("arithmetic", node, other)
        elif isinstance(node, ast.BoolOp):
            op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield self.mutant("boolean", node, ast.BoolOp(op, node.values))
        elif isinstance(node, ast.UnaryOp):
            if not isinstance(node.op, ast.UAdd):
                kind = "not" if isinstance(node.op, ast.Not) else "sign"
                yield self.mutant(kind, node, node.operand)
        elif isinstance(node, ast.Constant):
            yield from self.constant(node)
        elif isinstance(node, ast.Call):
            yield from self.call(node)
        elif isinstance(node, ast.Slice):
            yield from self.slice(node)
        elif isinstance(node, ast.IfExp):
            other = ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
            yield self.mutant("condition", node, other)
        elif isinstance(node, ast.comprehension):
            for test in node.ifs:
                yield self.mutant("condition", test, ast.UnaryOp(ast.Not(), test))

    def constant(self, node: ast.Constant) -> Iterator[Mutant]:
        value = node.value
        if isinstance(value, bool):
            yield self.mutant("constant", node, ast.Constant(not value))
        elif isinstance(value, int):
            yield self.mutant("constant", node, ast.Constant(value + 1))
            yield self.mutant("constant", node, ast.Constant(value - 1))
        elif isinstance(value, float):
            yield self.mutant("constant", node, ast.Constant(value + 1))

    def call(self, node: ast.Call) -> Iterator[Mutant]:
        plain = not any(isinstance(a, ast.Starred) for a in node.args)
        ordered = not (isinstance(node.func, ast.Name) and node.func.id in ("min", "max"))
        for i, (one, other) in enumerate(pairwise(node.args) if plain and ordered else ()):
            if ast.dump(one) != ast.dump(other):
                args = [*node.args[:i], other, one, *node.args[i + 2 :]]
                yield self.mutant(
                    "swapped arguments", node, ast.Call(node.func, args, node.keywords)
                )
        if plain and len(node.args) > 1:
            other = ast.Call(node.func, node.args[:-1], node.keywords)
            yield self.mutant("dropped argument", node, other)
        for i, keyword in enumerate(node.keywords):
            if keyword.arg not in (None, "strict"):
                rest = [*node.keywords[:i], *node.keywords[i + 1 :]]
                other = ast.Call(node.func, node.args, rest)
                yield self.mutant("dropped argument", node, other)
        if isinstance(node.func, ast.Attribute) and node.func.attr in NEIGHBOURS:
            func = ast.Attribute(node.func.value, NEIGHBOURS[node.func.attr], ast.Load())
            yield self.mutant("neighbour", node, ast.Call(func, node.args, node.keywords))
        elif isinstance(node.func, ast.Name) and node.func.id in ("any", "all", "min", "max"):
            name = ast.Name(NEIGHBOURS[node.func.id], ast.Load())
            yield self.mutant("neighbour", node, ast.Call(name, node.args, node.keywords))

    def slice(self, node: ast.Slice) -> Iterator[Mutant]:
        ends = []
        for end in ("lower", "upper"):
            value = getattr(node, end)
            number = value.operand if isinstance(value, ast.UnaryOp) else value
            if value is None and not (node.lower is None and node.upper is None):
                ends.append((end, ast.Constant(1 if end == "lower" else -1)))
            elif value is not None and not isinstance(number, ast.Constant):
                ends.append((end, ast.BinOp(value, ast.Add(), ast.Constant(1))))
        for end, value in ends:
            changed = {"lower": node.lower, "upper": node.upper, "step": node.step, end: value}
            yield self.mutant("slice", node, ast.Slice(**changed))

    def mutant(self, operator: str, node: ast.AST, other: ast.AST) -> Mutant:
        """`node` written as `other`, over as many lines."""
        start = self.starts[node.lineno - 1] + node.col_offset
        stop = self.starts[node.end_lineno - 1] + node.end_col_offset
        after = ast.unparse(ast.fix_missing_locations(other))
        lines = "\n" * (node.end_lineno - node.lineno)
        bare = isinstance(node, (ast.stmt, ast.Slice))  # no brackets around these
        text = after + lines if bare else f"({after}{lines})"
        return Mutant(
            self.path, self.function, operator, node.lineno, self.first - self.origin,
            self.last - self.origin,
            " ".join(self.source[start:stop].decode().split()), after, start, stop, text,
        )  # fmt: skip


def _is_none(node: ast.expr | None) -> bool:
    return node is None or (isinstance(node, ast.Constant) and node.value is None)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
