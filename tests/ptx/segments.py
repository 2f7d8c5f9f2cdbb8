"""Straight-line code -> Python: a segment becomes ``segment(w, R, m)`` over a warp w.

R are its registers, arrays of 32 lanes, unsigned of the register's width, predicates bool; m masks the active lanes,
None for all of them. Control and synchronisation end a segment, and so does what others may observe: stores and copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arithmetic
from .parser import BITS, Instruction, Kernel

DTYPES = {"f32": "f4", "f64": "f8", "s8": "i1", "s16": "i2", "s32": "i4", "s64": "i8"}
FLOATS = ("f16", "bf16", "f32", "f64")
HALVES = ("f16", "bf16")
ROUNDINGS = ("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi")
OBSERVED = ("st", "cp", "fence", "mbarrier", "stmatrix")

SIMPLE = {"add": "{} + {}", "sub": "{} - {}", "and": "{} & {}", "or": "{} | {}", "xor": "{} ^ {}", "not": "~{}"}
SIMPLE |= {"neg": "-{}", "abs": "np.abs({})", "shl": "shl({}, {})", "shr": "shr({}, {})"}
SIMPLE |= {"prmt": "prmt({}, {}, {})", "bfe": "bfe({}, {}, {})"}
SIMPLE |= {"bfi": "bfi({}, {}, {}, {})"}
"""What one expression says, without qualifiers that change it."""
OPERAND_KINDS = {("bfe", 2): "u32", ("bfe", 3): "u32", ("shl", 2): "u32", ("shr", 2): "u32", ("selp", 3): "pred"}
"""Of operands that have another type than the instruction."""

COMPARISONS = {"eq": "{a} == {b}", "lt": "{a} < {b}", "le": "{a} <= {b}", "gt": "{a} > {b}", "ge": "{a} >= {b}"}
COMPARISONS |= {"lo": "{a} < {b}", "ls": "{a} <= {b}", "hi": "{a} > {b}", "hs": "{a} >= {b}"}
COMPARISONS |= {"neu": "~({a} == {b})", "equ": "~(({a} < {b}) | ({a} > {b}))", "ltu": "~({a} >= {b})"}
COMPARISONS |= {"leu": "~({a} > {b})", "gtu": "~({a} <= {b})", "geu": "~({a} < {b})"}
COMPARISONS |= {"num": "({a} == {a}) & ({b} == {b})", "nan": "({a} != {a}) | ({b} != {b})"}
COMPARISONS["ne"] = "({a} < {b}) | ({a} > {b})"


def unsigned(bits: int) -> str:
    return f"u{bits // 8}"


def dtype_of(kind: str) -> str:
    return DTYPES.get(kind) or unsigned(BITS[kind])


def segment_at(kernel: Kernel, begin: int) -> tuple[Any, int]:
    """The function of the segment that begins there, and where it ends."""
    if begin not in kernel.segments:
        kernel.segments[begin] = _compile(kernel, begin)
    return kernel.segments[begin]


def _compile(kernel: Kernel, begin: int) -> tuple[Any, int]:
    segment, targets, pc = _Segment(kernel), set(kernel.labels.values()), begin
    while pc < len(kernel.code) and not kernel.code[pc].is_control and (pc == begin or pc not in targets):
        one = kernel.code[pc]
        try:
            segment.add(one)
        except (NotImplementedError, KeyError, StopIteration) as error:
            raise NotImplementedError(f"an instruction that the executor lacks: {one.text} ({error!r})") from error
        pc += 1
        if one.name in OBSERVED:
            break
    return segment.function(), pc


class _Segment:
    """The function of one segment, while it grows."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.lines: list[str] = []
        self.names = dict(vars(arithmetic))

    def function(self) -> Any:
        body = "\n    ".join(self.lines or ["pass"])
        exec(compile(f"def segment(w, R, m):\n    {body}\n", "<segment>", "exec"), self.names)
        return self.names["segment"]

    def add(self, one: Instruction) -> None:
        self.one, self.parts, self.operands, self.kind = one, one.parts, one.operands, one.parts[-1]
        self.ftz = "ftz" in one.parts
        self.mask = "m"
        if one.guard is not None:
            value = f"{'~' if one.guard[1] else ''}R[{one.guard[0]}]"
            self.lines.append(f"mm = {value} if m is None else m & {value}")
            self.mask = "mm"
        special = getattr(self, f"emit_{one.name}", None)
        if special is not None:
            special()
        else:
            self._only("rn", "ftz")
            expression = SIMPLE[one.name].format(*(self.get(i) for i in range(1, len(self.operands))))
            self.put(expression)

    def _only(self, *allowed: str) -> None:
        if unknown := set(self.parts[1:-1]) - set(allowed):
            raise NotImplementedError(f"qualifiers {', '.join(sorted(unknown))}")

    def _must(self, true: bool) -> None:
        if not true:
            raise NotImplementedError("this form")

    # Operands.

    def constant(self, value: Any, dtype: Any = None) -> str:
        """The name of 32 lanes of a value."""
        name = f"k{len(self.names)}"
        self.names[name] = np.full(32, value, dtype)
        return name

    def get(self, i: int, kind: str | None = None) -> str:
        """An operand as a number: of 16-bit floats the fp32 value."""
        kind = kind or OPERAND_KINDS.get((self.one.name, i), self.kind)
        text = self.read(self.operands[i], kind)
        if kind in HALVES:
            text = f"from_{kind}({text})"
        return f"ftz({text})" if self.ftz and kind == "f32" else text

    def read(self, operand: Any, kind: str) -> str:
        """An operand's bits, in the type that numpy has for the kind."""
        what, value = operand[:2]
        if what == "register":
            return self._read_register(value, kind)
        if what == "not":
            return f"(~R[{value}])"
        if what == "special":
            return f"w.special[{value!r}]"
        if what == "symbol":
            return f"w.address_of({value!r}, {dtype_of(kind)})"
        if kind == "pred":
            return self.constant(bool(value))
        wanted = np.dtype(getattr(arithmetic, dtype_of(kind)))
        if what == "bits":
            source = np.array([value], f"u{operand[2] // 8}")
            value = source.view(f"f{operand[2] // 8}")[0] if wanted.kind == "f" else int(value)
        if what == "number":
            wrapped = np.array([value & (2 ** (8 * wanted.itemsize) - 1)], f"u{wanted.itemsize}")
            value = wrapped.view(wanted)[0]
        return self.constant(value, wanted)

    def _read_register(self, number: int, kind: str) -> str:
        width, bits, text = self.kernel.widths[number], BITS[kind], f"R[{number}]"
        if kind == "pred" or width == 1:
            return text
        if width < bits:
            raise NotImplementedError(f"a {width}-bit register read as {kind}")
        text = f"{text}.astype({unsigned(bits)})" if width > bits else text
        wanted = dtype_of(kind)
        return text if wanted[0] == "u" else f"{text}.view({wanted})"

    def put(self, value: str, kind: str | None = None, to: Any = None) -> None:
        """A number into a register, the first operand unless it says which."""
        kind = kind or self.kind
        if self.ftz and kind == "f32":
            value = f"ftz({value})"
        if kind in HALVES:
            value = f"to_{kind}({value})"
        self.write(self.operands[0] if to is None else to, kind, value)

    def write(self, operand: Any, kind: str, value: str) -> None:
        """Bits into a register; wider ones are filled by sign for signed types."""
        if operand == ("symbol", "_"):
            return
        width, bits = self.kernel.widths[operand[1]], BITS[kind]
        if kind != "pred" and width != 1:
            if width < bits:
                raise NotImplementedError(f"{kind} into a register of {width} bits")
            if width > bits and kind[0] == "s":
                value = f"({value}).astype(i{width // 8}).view({unsigned(width)})"
            elif width > bits:
                value = f"({value}).astype({unsigned(width)})"
            elif dtype_of(kind)[0] != "u":
                value = f"({value}).view({unsigned(bits)})"
        target = f"R[{operand[1]}]"
        self.lines.append(f"v = {value}")
        kept = f"where({self.mask}, v, {target})"
        self.lines.append(f"{target} = {kept if self.mask == 'mm' else f'v if m is None else {kept}'}")

    def address(self, i: int) -> str:
        _, base, offset = self.operands[i]
        narrow = base[0] == "register" and self.kernel.widths[base[1]] == 32
        bits = 32 if narrow or (base[0] == "symbol" and self.one.space == "shared") else 64
        text = self.read(base, f"b{bits}")
        wrapped = offset & (2**bits - 1)
        return f"{text} + {self.constant(wrapped, f'u{bits // 8}')}" if offset else text

    def values(self, i: int) -> list[Any]:
        return self.operands[i][1] if self.operands[i][0] == "vector" else [self.operands[i]]

    # Moves, arithmetic, comparisons.

    def emit_mov(self) -> None:
        whole, kind = unsigned(BITS[self.kind]), self.kind
        if self.operands[0][0] == "vector":  # unpack
            pieces = self.operands[0][1]
            bits = BITS[kind] // len(pieces)
            for i, piece in enumerate(pieces):
                self.put(f"({self.get(1)} >> {whole}({i * bits})).astype({unsigned(bits)})", f"b{bits}", piece)
        elif self.operands[1][0] == "vector":
            pieces = self.operands[1][1]
            bits = BITS[kind] // len(pieces)
            packed = [
                f"({self.read(p, f'b{bits}')}.astype({whole}) << {whole}({i * bits}))" for i, p in enumerate(pieces)
            ]
            self.put(" | ".join(packed))
        else:
            self.write(self.operands[0], kind, self.read(self.operands[1], kind))

    def emit_selp(self) -> None:
        chosen = [self.read(self.operands[i], self.kind) for i in (1, 2)]
        self.write(self.operands[0], self.kind, f"where({self.get(3)}, {', '.join(chosen)})")

    def emit_mul(self) -> None:
        added = f" + {self.get(3)}" if self.one.name == "mad" else ""
        if self.kind in FLOATS:
            self._only("rn", "ftz")
        if "wide" in self.parts:
            wide = f"{self.kind[0]}{2 * BITS[self.kind]}"
            added = f" + {self.get(3, wide)}" if added else ""
            self.put(f"{self.get(1)}.astype({dtype_of(wide)}) * {self.get(2)}.astype({dtype_of(wide)}){added}", wide)
        else:
            self._must("hi" not in self.parts)
            self.put(f"{self.get(1)} * {self.get(2)}{added}")

    emit_mad = emit_mul

    def emit_add(self) -> None:
        if "rz" in self.parts:
            self._only("rz", "ftz")
            self._must(self.kind == "f32")
            self.put(f"add_f32_rz({self.get(1)}, {self.get(2)})")
        else:
            self._only("rn", "ftz")
            self.put(SIMPLE["add"].format(self.get(1), self.get(2)))

    def emit_fma(self) -> None:
        rounding = next(part for part in self.parts if part in ROUNDINGS)
        self._must((rounding, self.kind) in (("rn", "f32"), ("rm", "f32"), ("rn", "f64")))
        self.put(f"fma_{self.kind}_{rounding}({self.get(1)}, {self.get(2)}, {self.get(3)})")

    def emit_div(self) -> None:
        self._only("rn", "full", "approx", "ftz")
        a, b = self.get(1), self.get(2)
        if self.kind not in FLOATS:
            self.put(f"div_int({a}, {b})")
        else:
            self.put(f"{a} / {b}" if "rn" in self.parts else f"approximate({a}.astype(f8) / {b}, {a})")

    def emit_rem(self) -> None:
        self.put(f"rem_int({self.get(1)}, {self.get(2)})")

    def emit_ex2(self) -> None:
        self._must("approx" in self.parts and (self.kind == "f32" or self.one.name == "rcp"))
        name, a = self.one.name, self.get(1)
        exact = f"approximate({name}_exact({a}.astype(f8)), {a}, {name == 'ex2'})"
        self.put(exact if self.kind == "f32" else f"rcp_f64_approx({a})")

    emit_lg2 = emit_rcp = emit_ex2

    def emit_max(self) -> None:
        self._only("NaN", "ftz")
        extreme = f"{self.one.name}_{'nan' if 'NaN' in self.parts else 'num'}"
        function = extreme if self.kind in FLOATS else f"np.{self.one.name}imum"
        self.put(f"{function}({self.get(1)}, {self.get(2)})")

    emit_min = emit_max

    def emit_copysign(self) -> None:
        self.put(f"np.copysign({self.get(2)}, {self.get(1)})")

    def emit_shf(self) -> None:
        self.put(f"shf_{self.parts[1]}({self.get(1)}, {self.get(2)}, {self.get(3)}, {'wrap' in self.parts})")

    def emit_setp(self) -> None:
        compare = self.parts[1]
        self._must(len(self.operands) == 3)
        template = "{a} != {b}" if compare == "ne" and self.kind not in FLOATS else COMPARISONS[compare]
        value = template.format(a=self.get(1), b=self.get(2))
        self._must(self.operands[0][0] != "pair")
        self.put(value, "pred")

    def emit_testp(self) -> None:
        tests = {"finite": "isfinite", "infinite": "isinf", "notanumber": "isnan"}
        self.put(f"np.{tests[self.parts[1]]}({self.get(1)})", "pred")

    def emit_cvta(self) -> None:
        generic = f" {'-' if 'to' in self.parts else '+'} w.shared_window" if self.one.space == "shared" else ""
        self._must(self.one.space in ("shared", "global", "param"))
        self.put(self.get(1) + generic)

    def emit_cvt(self) -> None:
        *modes, to, source = self.parts[1:]
        rounding = next((mode for mode in modes if mode in ROUNDINGS), None)
        if unknown := set(modes) - {*ROUNDINGS, "ftz", "sat"}:
            raise NotImplementedError(f"qualifiers {', '.join(sorted(unknown))}")
        if to in ("bf16x2", "f16x2"):  # the first operand goes to the upper half
            self._must(rounding == "rn" and source == "f32")
            high, low = (f"to_{to[:-2]}({self.get(i, 'f32')}).astype(u4)" for i in (1, 2))
            self.put(f"({high} << u4(16)) | {low}", to)
        elif source in FLOATS and to in FLOATS:
            self._convert_float(to, source, rounding, "sat" in modes)
        else:
            self._must(
                source not in FLOATS
                and "sat" not in modes
                and (to not in FLOATS or (rounding == "rn" and to not in HALVES))
            )
            self.put(f"{self.get(1, source)}.astype({dtype_of(to)})", to)

    def _convert_float(self, to: str, source: str, rounding: str | None, saturate: bool) -> None:
        value = self.get(1, source)
        source = "f32" if source in HALVES else source
        whole = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}
        self._must(rounding in (None, "rn", *whole) and (to not in HALVES or rounding == "rn"))
        value = f"{whole[rounding]}({value})" if rounding in whole else value
        value = f"saturate({value})" if saturate else value
        self.put(f"{value}.astype({dtype_of(to)})" if to not in (*HALVES, source) else value, to)

    # Memory, and what is seen by others.

    def _call(self, function: str, *arguments: Any) -> str:
        return f"w.{function}({', '.join(map(str, (self.one.pc, *arguments, self.mask)))})"

    def emit_ld(self) -> None:
        targets = self.values(0)
        self._must(self.one.space in ("global", "shared", "param"))
        call = self._call(f"load_{self.one.space}", self.address(1), BITS[self.kind] // 8, len(targets))
        self.lines.append(f"x = {call}")
        view = "" if dtype_of(self.kind)[0] == "u" else f".view({dtype_of(self.kind)})"
        for i, target in enumerate(targets):
            self.write(target, self.kind, f"x[{i}]{view}")

    def emit_st(self) -> None:
        words = ", ".join(self.read(value, f"b{BITS[self.kind]}") for value in self.values(1))
        if "async" in self.parts:
            self.lines.append(self._call("store_async", self.address(0), f"[{words}]", self.address(2)))
        else:
            size = BITS[self.kind] // 8
            self._must(self.one.space in ("global", "shared"))
            self.lines.append(self._call(f"store_{self.one.space}", self.address(0), size, f"[{words}]"))

    def emit_cp(self) -> None:
        bulk = "bulk" in self.parts
        if "commit_group" in self.parts:
            self.lines.append(self._call("commit", repr("bulk" if bulk else "copies")))
        elif not bulk:
            size = self.operands[2][1]
            read = self.read(self.operands[3], "b32") if len(self.operands) > 3 else self.constant(size, "u4")
            self.lines.append(self._call("copy_async", self.address(0), self.address(1), size, read))
        elif self.parts[3:5] == ["shared::cluster", "global"] and "mbarrier::complete_tx::bytes" in self.parts:
            size = self.read(self.operands[2], "b32")
            self.lines.append(self._call("bulk_load", self.address(0), self.address(1), size, self.address(3)))
        else:
            self._must(self.parts[3:5] == ["global", "shared::cta"] and "bulk_group" in self.parts)
            size = self.read(self.operands[2], "b32")
            self.lines.append(self._call("bulk_store", self.address(0), self.address(1), size))

    def emit_mbarrier(self) -> None:
        remote = "shared::cluster" in self.parts
        self._must(self.one.space == "shared" and (not remote or "arrive" in self.parts))
        if "arrive" in self.parts:
            number = self.read(self.operands[2], "b32") if len(self.operands) > 2 else None
            arguments = self.address(1), number, "expect_tx" in self.parts, remote
            self.lines.append(self._call("barrier_arrive", *arguments))
            self.write(self.operands[0], "b64", self.constant(0, "u8"))
        elif "inval" not in self.parts:
            verb = next(part for part in self.parts if part in ("init", "expect_tx"))
            self.lines.append(self._call(f"barrier_{verb}", self.address(0), self.read(self.operands[1], "b32")))

    def emit_fence(self) -> None:
        self.lines.append(self._call("fence", repr(".".join(self.parts))))

    emit_membar = emit_fence

    def emit_mapa(self) -> None:
        self._must(self.parts[1:] == ["shared::cluster", "u32"])
        arguments = [self.read(self.operands[i], "b32") for i in (1, 2)]
        self.write(self.operands[0], "b32", self._call("mapa", *arguments))

    def emit_createpolicy(self) -> None:
        self.write(self.operands[0], "b64", self.constant(0, "u8"))

    def emit_ldmatrix(self) -> None:
        self._must(self.parts[1:4] == ["sync", "aligned", "m8n8"] and self.kind == "b16")
        call = self._call("ldmatrix", self.address(1), len(self.values(0)), "trans" in self.parts)
        self.lines.append(f"x = {call}")
        for i, target in enumerate(self.values(0)):
            self.write(target, "b32", f"x[{i}]")

    def emit_stmatrix(self) -> None:
        self._must(self.parts[1:4] == ["sync", "aligned", "m8n8"] and self.kind == "b16")
        words = ", ".join(self.read(value, "b32") for value in self.values(1))
        self.lines.append(self._call("stmatrix", self.address(0), "trans" in self.parts, f"[{words}]"))
