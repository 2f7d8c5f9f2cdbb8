"""Rows of measurements as a Markdown table, CSV and sentences."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .. import __version__
from ..verification import records
from .workload import Spec

Row = dict[str, Any]
SPEC_FIELDS = ("tokens", "vocab", "dtype", "hidden", "kind", "upstream", "device")


def environment(device: str) -> dict[str, Any]:
    """What the figures were measured on and with."""
    found: dict[str, Any] = {
        "machine": records.device_kind(device),
        "torch": torch.__version__,
        "grpo_kernels": __version__,
    }
    if torch.device(device).type == "cpu":
        from ..backends import cpu, native

        try:
            found["instruction_set"] = cpu.instruction_set()
        except native.Unavailable:
            found["instruction_set"] = "no compiled kernels"
        found["threads"] = torch.get_num_threads()
    return found


def caption(environment: dict[str, Any]) -> str:
    """One line above a table."""
    parts = [environment["machine"]]
    if "threads" in environment:
        parts += [f"{environment['threads']} threads", environment["instruction_set"]]
    return ", ".join([*parts, f"torch {environment['torch']}", f"grpo_kernels {environment['grpo_kernels']}"])


def spec_of(row: Row) -> Spec:
    return Spec(**{name: row[name] for name in SPEC_FIELDS})


def title(row: Row) -> str:
    return str(spec_of(row))


def fastest(row: Row, ours: bool) -> str | None:
    """Of ours, or of the others that give the same outputs."""
    timed = {
        name: p["step_ms"]
        for name, p in row["providers"].items()
        if "step_ms" in p and p["ours"] == ours and p["same_outputs"]
    }
    return min(timed, key=lambda name: timed[name]) if timed else None


COLUMNS = (
    "workload", "provider", "forward ms", "step ms", "of it backward", "× ours", "GB/s", "of the bound",
    "extra memory", "first call s", "new length s", "loss error", "gradient error", "same bits",
)  # fmt: skip


def cells(row: Row, name: str) -> list[str]:
    """One provider of a row, a cell for each of COLUMNS."""
    p = row["providers"][name]
    if "step_ms" not in p:
        reason = p.get("skipped") or p.get("failed")
        memory = _memory(row, p)
        return [title(row), name, *[""] * 6, memory, _number(p.get("first_call_s"), "{:.2f}"), *[""] * 3, reason or ""]
    best = fastest(row, ours=True)
    share = f"{p['step_ms'] / row['providers'][best]['step_ms']:.2f}" if best else ""
    rate = ["", _of_the_bound(row, p)]
    if row["hidden"] is None and rate[1]:
        rate[0] = f"{2 * row['logits_bytes'] / p['step_ms'] / 1e6:.1f}"
    return [
        *(title(row), name, _ms(p["forward_ms"]), _ms(p["step_ms"]), _ms(p["backward_ms"]), share, *rate),
        *(_memory(row, p), *(_number(p.get(key), "{:.2f}") for key in ("first_call_s", "new_length_s"))),
        *(f"{p['loss_error']:.0e}", f"{p['gradient_error']:.0e}", "yes" if p["repeatable"] else "no"),
    ]


def _of_the_bound(row: Row, p: dict[str, Any]) -> str:
    """Nothing where rows are left out: the bound is that of all rows."""
    return f"{100 * row['yardstick_ms'] / p['step_ms']:.0f} %" if row["kind"] == "all" else ""


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _memory(row: Row, p: dict[str, Any]) -> str:
    if "extra_bytes" not in p:
        return ""
    if row["hidden"] is not None:
        return f"{p['extra_bytes'] / 1e6:.0f} MB"
    return f"{p['extra_bytes'] / row['logits_bytes']:.2f} ×"


def sentences(rows: Sequence[Row]) -> list[str]:
    """Each workload's outcome: ours beside the fastest of the others that gives the same outputs."""
    lines = []
    for row in rows:
        mine, other = fastest(row, ours=True), fastest(row, ours=False)
        if mine is None or other is None:
            continue
        ratio = row["providers"][other]["step_ms"] / row["providers"][mine]["step_ms"]
        how = f"{ratio:.1f}x faster than" if ratio >= 1 else f"{1 / ratio:.2f}x slower than"
        lines.append(f"- {title(row)}: {how} {other}, the fastest with the same outputs")
    return lines


NOTES = (
    "step: loss, log-probs, entropy, metrics and gradient; forward: the same without gradient. × ours: of the fastest "
    "of ours. GB/s: two times the logits in a step's time. The bound, in the same rounds: reading and writing the "
    "logits once; from hidden states three GEMMs (on a CPU in fp32). "
    "extra memory: peak beyond the inputs, in sizes of the logits (from hidden states: in MB). new length: first call "
    "with a length that was not seen (torch.compile may find parts of its work in a cache on disk, as in the first "
    "call). Errors: relative, beside float64."
)


def markdown(rows: Sequence[Row], environment: dict[str, Any]) -> str:
    """A table to paste, with what it was measured on."""
    lines = [f"{caption(environment)}; medians", "", f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for row in rows:
        lines += [f"| {' | '.join(cells(row, name))} |" for name in row["providers"]]
    return "\n".join([*lines, "", NOTES, "", *sentences(rows)]).rstrip() + "\n"


SHOWN = ("provider", "forward ms", "step ms", "× ours", "GB/s", "of the bound", "extra memory", "gradient error")
"""Columns that a first look at a terminal needs."""


def text(rows: Sequence[Row]) -> str:
    """The same for a terminal, aligned."""
    shown = [COLUMNS.index(name) for name in SHOWN]
    lines = []
    for row in rows:
        table, reasons = [list(SHOWN)], []
        for name, p in row["providers"].items():
            if reason := p.get("skipped") or p.get("failed"):
                reasons.append(f"  {name}: {reason}")
            else:
                table.append([cells(row, name)[i] for i in shown])
        lines += ["", title(row), *_aligned(table), *reasons]
    return "\n".join([*lines, "", *sentences(rows)]).strip()


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = []
    for first, *rest in table:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def comma_separated(rows: Sequence[Row]) -> str:
    """A line for each provider of each workload, plain numbers."""
    numbers = sorted({key for row in rows for p in row["providers"].values() for key in p})
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow([*SPEC_FIELDS, "logits_bytes", "yardstick_ms", "provider", *numbers])
    for row in rows:
        for name, p in row["providers"].items():
            fixed = [row[key] for key in (*SPEC_FIELDS, "logits_bytes", "yardstick_ms")]
            writer.writerow([*fixed, name, *(p.get(key, "") for key in numbers)])
    return stream.getvalue()


def summary(rows: Sequence[Row], environment: dict[str, Any], columns: Iterable[str]) -> str:
    """A line for each workload: the best of ours, how many times its time each of ``columns`` takes, and memory."""
    columns = list(columns)
    lines = [f"{caption(environment)}; median ms of loss and gradient", ""]
    heads = ["", "ours", "of the bound", *(f"{name}" for name in columns), "memory: ours", "the least of the others"]
    lines += [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows:
        best = fastest(row, ours=True)
        if best is None:
            continue
        mine = row["providers"][best]
        line = [title(row), _ms(mine["step_ms"]), _of_the_bound(row, mine)]
        for name in columns:
            ms = row["providers"].get(name, {}).get("step_ms")
            line.append(f"{ms / mine['step_ms']:.1f}x" if ms else "–")
        others = [p for p in row["providers"].values() if not p["ours"] and "extra_bytes" in p and p["same_outputs"]]
        least: dict[str, Any] = min(others, key=lambda p: p["extra_bytes"], default={})
        lines.append(f"| {' | '.join([*line, _memory(row, mine), _memory(row, least)])} |")
    return "\n".join(lines) + "\n"


def headline(rows: Sequence[Row], names: Iterable[str]) -> str:
    """One sentence: how many times our time each of ``names`` takes over all workloads, and the memory."""
    parts = []
    for name in names:
        ratios = []
        for row in rows:
            best, other = fastest(row, ours=True), row["providers"].get(name, {})
            if best is not None and "step_ms" in other:
                ratios.append(other["step_ms"] / row["providers"][best]["step_ms"])
        if ratios:
            parts.append(f"**{_range(ratios, '{:.1f}')}x faster** than {name}")
    shares: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        mine = fastest(row, ours=True)
        for provider, p in row["providers"].items():
            if "extra_bytes" in p and (provider == mine or not p["ours"]):
                shares[p["ours"]].append(p["extra_bytes"] / row["logits_bytes"])
    ours, theirs = _range([100 * s for s in shares[True]], "{:.0f}"), _range(shares[False], "{:.1f}")
    return f"{', '.join(parts)}, with {ours} % extra memory instead of {theirs} copies of the logits"


def _range(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}-{high}"
