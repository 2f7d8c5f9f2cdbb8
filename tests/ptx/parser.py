"""PTX text -> kernels: instructions with operands, registers, labels, and the source lines that they come from."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

CONTROL = ("bra", "ret", "exit", "bar", "barrier", "shfl", "redux", "vote", "trap", "brkpt", "call")
WAITS = ("wait_group", "wait_all", "try_wait", "test_wait")
BITS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32}
BITS |= {"u32": 32, "s32": 32, "f32": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64, "f16x2": 32, "bf16x2": 32}
SPECIAL = ("%tid.", "%ntid.", "%ctaid.", "%nctaid.", "%laneid", "%warpid", "%cluster_", "%clusterid.", "%nclusterid.")
SPACES = ("global", "shared", "local", "param", "const")

CLASSES = {
    "mufu": ("ex2", "lg2", "rcp"),
    "mov": ("mov", "cvta", "ret", "createpolicy"),
    "branch": ("bra",),
    "sync": ("mbarrier", "bar", "barrier", "fence", "vote", "redux", "mapa", "membar"),
    "select": ("setp", "selp"),
    **{name: (name,) for name in ("cvt", "cp", "shfl")},
}
CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names}


@dataclass
class Instruction:
    """One instruction. An operand is a tuple: what it is, then its value (see ``_Body.operand``)."""

    pc: int
    text: str
    guard: tuple[int, bool] | None  # predicate register, whether negated
    parts: list[str]  # its name and qualifiers
    operands: list[Any]
    place: str  # file:line < file:line it is inlined at

    @property
    def name(self) -> str:
        return self.parts[0]

    @functools.cached_property
    def is_control(self) -> bool:
        """Whether it may move the program counter or wait, so that machine.py carries it out."""
        return self.name in CONTROL or any(word in self.parts for word in WAITS)

    @property
    def space(self) -> str:
        """The memory it accesses."""
        spaces = (part.split("::")[0] for part in self.parts)
        return next((space for space in spaces if space in SPACES), "generic")

    @property
    def kind(self) -> str:
        """The class that it is counted in."""
        if self.name in ("ld", "st", "ldmatrix", "stmatrix"):
            return f"{self.name[:2]}.{self.space}"
        found = CLASS_OF.get(self.name)
        if self.parts[-1] == "f64" and found in (None, "select"):
            return "fp64"
        return found or ("fp32" if self.parts[-1] in ("f32", "bf16", "f16", "bf16x2", "f16x2") else "int")


@dataclass
class Kernel:
    """A kernel, and the functions made of its straight-line code as it is executed."""

    name: str
    parameters: dict[str, tuple[int, int]]  # offset and size in bytes
    parameter_bytes: int
    threads: int | None  # at most, of a block
    dynamic_shared: list[str]  # names of the memory that a launch asks for
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: list[int] = field(default_factory=list)  # bits of each register
    segments: dict[int, tuple[Any, int]] = field(default_factory=dict)  # begin -> function, end


class Module(Mapping[str, Kernel]):
    """Every kernel of a PTX module by its name, each read when it is asked for: all of ours take ten seconds. That
    raises NotImplementedError for directives that are not known here."""

    def __init__(self, text: str) -> None:
        self._files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M))
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        text = re.sub(r"//[^\n]*", "", text)
        self._externs = re.findall(r"^\.extern \.shared \.align \d+ \.b8 (\S+)\[\];", text, re.M)
        entry = re.compile(r"^\.visible \.entry (\S+?)\((.*?)\)(.*?)^\{(.*?)^\}", re.M | re.S)
        self._texts = {name: others for name, *others in entry.findall(text)}
        self._read: dict[str, Kernel] = {}

    def __getitem__(self, name: str) -> Kernel:
        if name not in self._read:
            parameters, directives, body = self._texts[name]
            threads = re.search(r"\.(?:maxntid|reqntid) (\d+)", directives)
            kernel = Kernel(name, *_layout(parameters), int(threads[1]) if threads else None, self._externs)
            _Body(kernel, self._files).read(re.sub(r"^(\s*\.loc\b[^\n]*)$", r"\1;", body, flags=re.M))
            self._read[name] = kernel
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)


def _layout(parameters: str) -> tuple[dict[str, tuple[int, int]], int]:
    """Offset and size of each parameter, and the bytes of all."""
    layout, end = {}, 0
    for declared in filter(None, map(str.strip, parameters.split(","))):
        *types, name = declared.split()
        count = re.search(r"\[(\d+)\]$", name)
        size = BITS[next(t[1:] for t in types if t[1:] in BITS)] // 8
        align = int(types[2]) if types[1] == ".align" else size
        start = -(-end // align) * align
        end = start + size * (int(count[1]) if count else 1)
        layout[name.split("[")[0]] = (start, end - start)
    return layout, end


class _Body:
    """Reads the text of one kernel's body into it."""

    def __init__(self, kernel: Kernel, files: dict[str, str]) -> None:
        self.kernel, self.files = kernel, files
        self.families: dict[str, str] = {}  # of registers: "%r" -> b32
        self.scopes: list[dict[str, int]] = [{}]
        self.place = "?"

    def read(self, text: str) -> None:
        for token in self._tokens(text):
            if token == "{":
                self.scopes.append({})
            elif token == "}":
                self.scopes.pop()
            elif token.endswith(":"):
                self.kernel.labels[token[:-1]] = len(self.kernel.code)
            elif token.startswith("."):
                self._directive(token)
            else:
                self._instruction(token)

    @staticmethod
    def _tokens(text: str) -> Iterator[str]:
        """Braces of scopes, labels with their colon, statements without their semicolon."""
        start = re.compile(r"[\s;]*(?:([{}])|([$\w]+:)|([^;]+);)")
        at, end = 0, len(text.rstrip(" \t\r\n;"))
        while at < end:
            found = start.match(text, at)
            yield " ".join((found[1] or found[2] or found[3]).split())
            at = found.end()

    def _directive(self, text: str) -> None:
        if text.startswith(".loc"):
            found = re.findall(r"(?:\.loc|inlined_at) (\d+) (\d+)", text)
            where = [f"{self.files.get(f, f).rsplit('/', 1)[-1]}:{line}" for f, line in found if line != "0"]
            self.place = " < ".join(where) or self.place
        elif text.startswith(".reg"):
            kind, names = re.match(r"\.reg \.(\w+) (.*)", text).groups()
            for name in map(str.strip, names.split(",")):
                if "<" in name:
                    self.families[name.split("<")[0]] = kind
                else:
                    self.scopes[-1][name] = self._new_register(kind)
        elif not text.startswith((".pragma", ".branchtargets")):
            raise NotImplementedError(f"{self.kernel.name}: the directive {text}")

    def _instruction(self, text: str) -> None:
        guard, rest = None, text
        if found := re.match(r"@(!?)(\S+) (.*)", text):
            guard, rest = (self._register(found[2]), bool(found[1])), found[3]
        name, _, operands = rest.partition(" ")
        pieces = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]][^,{}\[\]]*", operands)
        code = self.kernel.code
        parsed = [self.operand(piece.strip()) for piece in pieces]
        code.append(Instruction(len(code), text, guard, name.split("."), parsed, self.place))

    def _new_register(self, kind: str) -> int:
        self.kernel.widths.append(BITS[kind])
        return len(self.kernel.widths) - 1

    def _register(self, name: str) -> int | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        family = re.match(r"(%[a-z]+)\d+$", name)
        if family and family[1] in self.families:
            self.scopes[0][name] = self._new_register(self.families[family[1]])
            return self.scopes[0][name]
        return None

    def operand(self, text: str) -> Any:
        """(what it is, its value...): of vectors and pairs a list of operands, of memory a base and an offset."""
        if text[0] == "{":
            return ("vector", [self.operand(piece.strip()) for piece in text[1:-1].split(",")])
        if text[0] == "[":
            base, _, offset = text[1:-1].replace(" ", "").partition("+")
            return ("memory", self.operand(base), int(offset or "0", 0))
        if text[0] == "!":
            return ("not", self._register(text[1:]))
        if "|" in text:
            return ("pair", [self.operand(piece.strip()) for piece in text.split("|")])
        if (number := self._register(text)) is not None:
            return ("register", number)
        if text.startswith(SPECIAL):
            return ("special", text)
        if re.match(r"0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$", text):
            return ("bits", int(text[2:], 16), 32 if text[1] in "fF" else 64)
        if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
            return ("number", int(text.rstrip("U"), 0))
        if re.match(r"-?\d+\.\d*$", text):
            return ("float", float(text))
        return ("symbol", text)
