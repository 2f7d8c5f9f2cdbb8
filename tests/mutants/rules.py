"""The one-line faults that rules make of a source: its comparisons, signs, constants, terms, and what is chosen of two.

A fault's key is made of the function it is in, its line and what becomes of that, so that edits elsewhere leave it
alone; its rank is drawn from the key, so that a sample of the lowest ranks stays what it is as well.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from typing import NamedTuple


class Edit(NamedTuple):
    """``new`` in the place of columns [start, end) of a line, which are counted from 0."""

    line: int
    start: int
    end: int
    new: str
    rule: str


class Fault(NamedTuple):
    scope: str
    line: int
    before: str
    after: str
    rule: str
    occurrence: int
    """Of this line in this scope, from 0."""

    def rank(self, seed: int) -> str:
        """A number drawn from all but where it stands."""
        said = "\0".join((str(seed), self.scope, self.before, self.after, str(self.occurrence)))
        return hashlib.sha256(said.encode()).hexdigest()


COMPARISONS = {"<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<="), "==": ("!=",), "!=": ("==",)}
OPERATORS = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "&": "|", "|": "&"}
PAIRS = (
    *(("min", "max"), ("minimum", "maximum"), ("amin", "amax"), ("fmin", "fmax"), ("any", "all")),
    *(("expm1", "exp"), ("log1p", "log"), ("expm1_of", "exp_of"), ("zeros_like", "ones_like")),
    *(("True", "False"), ("true", "false")),
)
OTHERS = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
"""Names of which one is as good a word as the other."""


def number_after(text: str) -> str | None:
    """Another number: one more of a whole one, twice a fraction, 1 for 0."""
    if re.fullmatch(r"\d+", text):
        return str(int(text) + 1)
    match = re.fullmatch(r"(\d*\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+)(f?)", text)
    return None if match is None else f"{2 * float(match[1]) or 1.0}{match[2]}"


# Python, by its syntax.

WORDS = {ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in")}
SYMBOLS: dict[type, str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.BitAnd: "&",
    ast.BitOr: "|",
}
SIGNS = {ast.USub: "-", ast.Invert: "~", ast.Not: "not "}
SAID = (ast.Raise, ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)
"""What is of messages, types and names, in which a fault is none of a computation."""


class _Python(ast.NodeVisitor):
    def __init__(self, source: str) -> None:
        self.lines = [line.encode() for line in source.splitlines()]  # columns of ast are bytes
        self.edits: list[Edit] = []
        self.visit(ast.parse(source))

    def _edit(self, line: int, start: int, end: int, new: str, rule: str) -> None:
        self.edits.append(Edit(line - 1, self._column(line, start), self._column(line, end), new, rule))

    def _column(self, line: int, place: int) -> int:
        return len(self.lines[line - 1][:place].decode())

    def _between(self, left: ast.expr, right: ast.expr, old: str) -> tuple[int, int, int] | None:
        """Where an operator is between two operands of one line."""
        if left.end_lineno != right.lineno:
            return None
        assert left.end_col_offset is not None
        between = self.lines[right.lineno - 1][left.end_col_offset : right.col_offset].decode()
        found = re.search(rf"(?<![\w<>=!&|*/+-]){re.escape(old)}(?![\w<>=&|*/])", between)
        place = left.end_col_offset
        return None if found is None else (right.lineno, place + found.start(), place + found.end())

    def visit(self, node: ast.AST) -> None:
        if not isinstance(node, SAID):
            super().visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for child in [*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body]:
            self.visit(child)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            if type(operator) in WORDS:
                old, *news = WORDS[type(operator)]
            else:
                old = SYMBOLS[type(operator)]
                news = [*COMPARISONS[old]]
            if place := self._between(left, right, old):
                for new in news:
                    self._edit(*place, new, "comparison")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        old = SYMBOLS.get(type(node.op))
        values = [getattr(x, "value", 0) for x in (node.left, node.right)]  # of constants; a formatted string is a node
        of_text = any(value is None or isinstance(value, str) for value in values)
        of_text |= isinstance(node.left, ast.JoinedStr) or isinstance(node.right, ast.JoinedStr)
        if old and not of_text:
            if place := self._between(node.left, node.right, old):
                self._edit(*place, OPERATORS[old], "operator")
            self._drop(node.left, node.right, "dropped term")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            if place := self._between(left, right, old):
                self._edit(*place, new, "operator")
        self._drop(*node.values[-2:], "dropped condition")
        self.generic_visit(node)

    def _drop(self, left: ast.expr, right: ast.expr, rule: str) -> None:
        """The right operand, with what is between, unless it closes a parenthesis of the left one."""
        if left.end_lineno == right.end_lineno == right.lineno:
            assert left.end_col_offset is not None
            assert right.end_col_offset is not None
            dropped = self.lines[right.lineno - 1][left.end_col_offset : right.end_col_offset].decode()
            if dropped.count("(") == dropped.count(")") and not dropped.startswith(")"):
                self._edit(right.lineno, left.end_col_offset, right.end_col_offset, "", rule)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if sign := SIGNS.get(type(node.op)):
            self._edit(node.lineno, node.col_offset, node.col_offset + len(sign), "", "sign")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if not isinstance(node.value, bool | int | float):
            return
        assert node.end_col_offset is not None
        text = self.lines[node.lineno - 1][node.col_offset : node.end_col_offset].decode()
        if isinstance(node.value, bool):
            self._edit(node.lineno, node.col_offset, node.end_col_offset, OTHERS[text], "choice")
        elif new := number_after(text):
            self._edit(node.lineno, node.col_offset, node.end_col_offset, new, "constant")

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._word(node.lineno, node.col_offset, node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.end_lineno and node.end_col_offset:
            self._word(node.end_lineno, node.end_col_offset - len(node.attr.encode()), node.attr)
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg in ("min", "max"):
            self._word(node.lineno, node.col_offset, node.arg)
        self.generic_visit(node)

    def _word(self, line: int, start: int, word: str) -> None:
        if word in OTHERS:
            self._edit(line, start, start + len(word), OTHERS[word], "choice")


def _python_scopes(source: str) -> list[str]:
    """Of every line, the function and class that it is in."""
    scopes = [""] * len(source.splitlines())

    def name(node: ast.AST, outer: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            inner = outer
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = (*outer, child.name)
                assert child.end_lineno is not None
                scopes[child.lineno - 1 : child.end_lineno] = [".".join(inner)] * (child.end_lineno - child.lineno + 1)
            name(child, inner)

    name(ast.parse(source), ())
    return scopes


# C++ and CUDA, by their tokens: clang-format puts spaces around an operator of two operands, and none beside types.

SKIPPED = re.compile(r"\s*(#|//|template|using|static_assert|namespace|struct|enum|extern|asm|[\"%])|.*\basm\b")
OPERAND = r"(?:[\w.:\[\]]|->)+(?:<\w+>)?(?:\((?:[^()]|\([^()]*\))*\))?"
UPDATES = (("+=", "-="), ("-=", "+="), ("*=", "/="))
BEFORE_SIGNS = r"(?:(?<=[(,=?:{] )|(?<=[({])|(?<=return ))"
CPP_RULES = [
    *(
        (rf"(?<=[\w)\]] ){re.escape(old)}(?= [\w(:*&-])", new, "comparison")
        for old, news in COMPARISONS.items()
        for new in news
    ),
    *((rf"(?<=[\w)\]] ){re.escape(old)}(?= [\w(*&!-])", new, "operator") for old, new in (("&&", "||"), ("||", "&&"))),
    *((rf"(?<=[\w)\]] ){re.escape(old)}(?= [\w(-])", OPERATORS[old], "operator") for old in "+-*/"),
    *((rf"(?<=[\w)\]] ){re.escape(old)}(?= )", new, "operator") for old, new in UPDATES),
    (r"(?<=[\w)\]]) (?:&&|\|\|) [^&|();]*(?:\([^()]*\)[^&|();]*)*(?=[;)]| &&| \|\|)", "", "dropped condition"),
    (rf"(?<=[\w)\]]) [+-] {OPERAND}(?=[;,)}}]| [+-] )", "", "dropped term"),
    (rf"(?<=[\w)\]]) [*/] {OPERAND}(?=[;,)}}]| [+-] )", "", "dropped term"),
    (rf"{BEFORE_SIGNS}[-!](?=[\w(])", "", "sign"),
]
CPP_NUMBER = re.compile(r"(?<![\w.\"])(?:\d+\.\d*(?:e[+-]?\d+)?f?|\d+)(?![\w.\"x])")


def _cpp_edits(source: str) -> Iterator[Edit]:
    for number, whole in enumerate(source.splitlines()):
        line = whole.split("//")[0]
        if SKIPPED.match(line):
            continue
        for pattern, new, rule in CPP_RULES:
            for match in re.finditer(pattern, line):
                yield Edit(number, match.start(), match.end(), new, rule)
        for match in CPP_NUMBER.finditer(line):
            if other := number_after(match[0]):
                yield Edit(number, match.start(), match.end(), other, "constant")
        for match in re.finditer(r"\w+", line):
            if match[0] in OTHERS:
                yield Edit(number, match.start(), match.end(), OTHERS[match[0]], "choice")


def _cpp_scopes(source: str) -> list[str]:
    """Of every line, the last function, or class before its first, that began on it or before."""
    scopes, outer, inner = [], "", ""
    for line in source.splitlines():
        if match := re.match(r"(?:struct|class) (\w+)", line):
            outer = inner = match[1]
        elif line.startswith("}"):
            outer = inner = ""
        elif match := re.match(r"( ?)\1[\w:<>,&*~ ]*?(\w+)\((?!.*;\s*(?://.*)?$)", line):
            inner = match[2] if not match[1] else f"{outer}.{match[2]}".lstrip(".") if outer else inner
        scopes.append(inner)
    return scopes


def faults_of(source: str, python: bool) -> list[Fault]:
    """Every fault of these rules, in the order of the lines."""
    lines = source.splitlines()
    edits = _Python(source).edits if python else _cpp_edits(source)
    scopes = _python_scopes(source) if python else _cpp_scopes(source)
    seen: dict[tuple[str, str], list[int]] = {}
    for number, line in enumerate(lines):
        seen.setdefault((scopes[number], line.strip()), []).append(number)
    faults = []
    for line, start, end, new, rule in sorted(set(edits)):
        before, scope = lines[line], scopes[line]
        after = before[:start] + new + before[end:]
        occurrence = seen[scope, before.strip()].index(line)
        if after.strip() != before.strip():
            faults.append(Fault(scope, line, before.strip(), after.strip(), rule, occurrence))
    return faults


def sample(faults: list[Fault], count: int, seed: int) -> list[Fault]:
    """Those of the lowest ranks, of each line at most one."""
    chosen: dict[int, Fault] = {}
    for fault in sorted(faults, key=lambda fault: fault.rank(seed)):
        if len(chosen) == count:
            break
        chosen.setdefault(fault.line, fault)
    return list(chosen.values())
