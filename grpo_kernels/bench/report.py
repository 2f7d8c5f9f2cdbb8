"""Makes a Markdown table, CSV and sentences of rows of measurements."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .. import __version__
from ..backends import switched
from ..verification import records
from .providers import IN_PLACE, OURS
from .workload import KINDS, Spec

Row = dict[str, Any]
SPEC_FIELDS = ("tokens", "vocab", "dtype", "hidden", "kind", "upstream", "device")


def environment(device: str, backend: str | None = None) -> dict[str, Any]:
    """Return what the figures were measured on and with; ``backend`` where ours was asked for by name."""
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
    if name := switched() or backend:
        found["backend"] = name
    return found


def caption(environment: dict[str, Any]) -> str:
    """Return the machine and the versions as one line, which stands above a table."""
    parts = [environment["machine"]]
    if "threads" in environment:
        threads = environment["threads"]
        parts += [f"{threads} thread{'s' if threads > 1 else ''}", environment["instruction_set"]]
    if "backend" in environment:
        parts += [f"ours on backend={environment['backend']!r}"]
    return ", ".join([*parts, f"torch {environment['torch']}", f"grpo_kernels {environment['grpo_kernels']}"])


def spec_of(row: Row) -> Spec:
    """Return the workload that a row was measured on."""
    return Spec(**{name: row[name] for name in SPEC_FIELDS})


def title(row: Row) -> str:
    """Return a row's workload in words, as the first cell of its line."""
    return str(spec_of(row))


def milliseconds(row: Row, name: str) -> float | None:
    """Return the median time of a provider's loss and gradient; None where it was not timed."""
    ms: float | None = row["providers"].get(name, {}).get("step_ms")
    return ms


def times(row: Row, name: str, base: str = OURS) -> float | None:
    """Return how many times as long as ``base``, our default call, a provider takes; None where one is not timed."""
    ms, ours = milliseconds(row, name), milliseconds(row, base)
    return None if ms is None or ours is None else ms / ours


def fastest_other(row: Row) -> str | None:
    """Return the fastest provider that is not ours and gives the same outputs; None where none was timed."""
    others = {name: p for name, p in row["providers"].items() if not p["ours"] and p["same_outputs"] and "step_ms" in p}
    return min(others, key=lambda name: float(others[name]["step_ms"]), default=None)


COLUMNS = (
    "workload", "provider", "call", "forward ms", "step ms", "of it backward", "× ours", "GB/s", "of the bound",
    "extra memory", "kept", "first call s", "new length s", "loss error", "gradient error", "same bits",
)  # fmt: skip


def cells(row: Row, name: str) -> list[str]:
    """Return the cells of one provider of a row, one for each of COLUMNS."""
    p = row["providers"][name]
    call = f"`{p['call']}`" if p.get("call") else ""
    if "step_ms" not in p:
        reason = p.get("skipped") or p.get("failed")
        memory, first = _memory(row, p.get("extra_bytes")), _number(p.get("first_call_s"), "{:.2f}")
        return [title(row), name, call, *[""] * 6, memory, "", first, *[""] * 3, reason or ""]
    share = _number(times(row, name), "{:.2f}")
    rate = ["", _of_the_bound(row, p)]
    if row["hidden"] is None and rate[1]:
        rate[0] = f"{2 * row['logits_bytes'] / p['step_ms'] / 1e6:.1f}"
    return [
        *(title(row), name, call, _ms(p["forward_ms"]), _ms(p["step_ms"]), _ms(p["backward_ms"]), share, *rate),
        *(_memory(row, p.get(key)) for key in ("extra_bytes", "kept_bytes")),
        *(_number(p.get(key), "{:.2f}") for key in ("first_call_s", "new_length_s")),
        *(f"{p['loss_error']:.0e}", f"{p['gradient_error']:.0e}", "yes" if p["repeatable"] else "no"),
    ]


def _of_the_bound(row: Row, p: dict[str, Any]) -> str:
    """Return the bound as a share of a provider's time; nothing where rows are left out: it is that of all rows."""
    return f"{100 * row['yardstick_ms'] / p['step_ms']:.0f} %" if row["kind"] == "all" else ""


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _memory(row: Row, size: int | None) -> str:
    """Return bytes in sizes of the logits, from hidden states in MB."""
    if size is None:
        return ""
    return f"{size / row['logits_bytes']:.2f} ×" if row["hidden"] is None else f"{size / 1e6:.0f} MB"


def sentences(rows: Sequence[Row]) -> list[str]:
    """Return each workload's outcome: ours as it is called, and the fastest of the others with the same outputs."""
    lines = []
    for row in rows:
        ours, other = milliseconds(row, OURS), fastest_other(row)
        if ours is None or other is None:
            continue
        quick = milliseconds(row, IN_PLACE)
        beside = "" if quick is None else f" ({_ms(quick)} in place)"
        lines.append(
            f"- {title(row)}: ours takes {_ms(ours)} ms{beside}; {other}, the fastest of the others with the same "
            f"outputs, {times(row, other):.1f}x as long"
        )
    return lines


NOTES = (
    "A step is loss, log-probs, entropy, metrics and gradient; forward is the same without a gradient. × ours is the "
    "step as a multiple of that of `ours`, the default call, which allocates its gradient. GB/s are two times the "
    "logits in a step's time. The bound is measured in the same rounds: reading and writing the logits once, and from "
    "hidden states three GEMMs (on a CPU in fp32). Extra memory is the peak beyond the inputs, in sizes of the logits "
    "(from hidden states in MB); kept is what stays of it for the next call, the system's to take. A new length is the "
    "first call with a length that was not seen before (torch.compile may find parts of its work in a cache on disk, "
    "as in the first call). Errors are relative, beside float64."
)


def table_head(cells: Sequence[str]) -> list[str]:
    """Return the two lines that a table in Markdown begins with."""
    return [f"| {' | '.join(cells)} |", "| --- " * len(cells) + "|"]


def markdown(rows: Sequence[Row], environment: dict[str, Any]) -> str:
    """Return every provider of every workload as a table to paste, with what it was measured on."""
    lines = [f"{caption(environment)}; medians", "", *table_head(COLUMNS)]
    for row in rows:
        for name in row["providers"]:
            escaped = (cell.replace("|", "\\|") for cell in cells(row, name))  # what a peer raises may hold one
            lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join([*lines, "", NOTES, "", *sentences(rows)]).rstrip() + "\n"


SHOWN = ("provider", "forward ms", "step ms", "× ours", "GB/s", "of the bound", "extra memory", "gradient error")
"""The columns that a first look at a terminal needs."""


def text(rows: Sequence[Row]) -> str:
    """Return the columns of SHOWN for a terminal, aligned."""
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
    """Return a line for each provider of each workload, in plain numbers."""
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
    """Return a line for each workload: the time of ours, how many times as long ``columns`` take, and memory.

    Where ours is slower than a provider, its number is below 1.
    """
    columns, linear = list(columns), any(row["hidden"] is not None for row in rows)
    mine = list(dict.fromkeys(name for row in rows for name, p in row["providers"].items() if p["ours"]))
    mine.sort(key=lambda name: name != OURS)
    unit, bound = (
        ("MB", "the three GEMMs") if linear else ("copies of the logits", "reading and writing the logits once")
    )
    heads = [
        "tokens × hidden size × vocabulary" if linear else "tokens × vocabulary",
        *(f"{name}: ms" for name in mine),
    ]
    heads += ["ours, of the bound", *columns, f"peak memory: {' / '.join(mine)} / the least of the others"]
    lines = [
        f"{caption(environment)}. Ours: median milliseconds of loss and gradient; the others: how many times as long "
        f"as `ours` they take. The bound is {bound}; memory is the peak beyond the inputs, in {unit}.{_variants(rows)}",
        "", *table_head(heads),
    ]  # fmt: skip
    for row in rows:
        ours = row["providers"][OURS]
        if "step_ms" not in ours:
            continue
        line = [title(row), *(_ms(milliseconds(row, name)) for name in mine), _of_the_bound(row, ours)]
        line += [_number(times(row, name), "{:.1f}x") or "–" for name in columns]
        others = [p for p in row["providers"].values() if not p["ours"] and "extra_bytes" in p]
        least: dict[str, Any] = min(others, key=lambda p: p["extra_bytes"], default={})
        peaks = (p.get("extra_bytes") for p in (*(row["providers"].get(name, {}) for name in mine), least))
        memory = " / ".join(_memory(row, peak) or "–" for peak in peaks)
        lines.append(f"| {' | '.join([*line, memory])} |")
    return "\n".join(lines) + "\n"


def _variants(rows: Sequence[Row]) -> str:
    """Return what the words after a workload's shape mean."""
    kinds = [kind for kind in KINDS if kind != "all" and any(row["kind"] == kind for row in rows)]
    text = "".join(f" {kind}: {KINDS[kind]}." for kind in kinds)
    if any(row["upstream"] != 1 for row in rows):
        text += " upstream: the loss is multiplied by that number before backward, which ours is told as `grad_scale`."
    return text


def headline(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Return sentences: how many times as long as ours ``names`` take over all workloads, and the memory of each.

    They are of the workloads in which every token is live and all of them were timed; empty where there is none.
    """
    rows = [row for row in rows if row["kind"] == "all"]
    rows = [row for row in rows if all(milliseconds(row, name) is not None for name in (OURS, IN_PLACE, *names))]
    if not rows:
        return ""

    def beside(base: str) -> list[str]:
        return [f"{_range([times(row, name, base) or 0.0 for row in rows])}x" for name in names]

    def copies(name: str) -> str:
        return _range([row["providers"][name]["extra_bytes"] / row["logits_bytes"] for row in rows])

    spoken = [_spoken(name) for name in names]
    first, *rest = (f"{name} takes **{found}**" for name, found in zip(spoken, beside(OURS), strict=True))
    return (
        f"over {len(rows)} workloads {first} the time of the default call of `grpo_loss`"
        f"{''.join(f', {text}' for text in rest)}; of the time with `inplace=True` {' and '.join(beside(IN_PLACE))}. "
        f"Peak memory beyond the inputs, in copies of the logits: {copies(OURS)} for the default call, "
        f"{copies(IN_PLACE)} in place, {', '.join(f'{copies(a)} for {b}' for a, b in zip(names, spoken, strict=True))}"
    )


def _spoken(name: str) -> str:
    """Return a provider's name for a sentence, whose own commas it would disturb."""
    what, comma, how = name.partition(", ")
    return f"{what} ({how})" if comma else what


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low}-{high}"
