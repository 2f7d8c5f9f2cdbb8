"""Time and memory against tokens, and against the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Row

COLORS = {"ours, in place": "#1b7837", "ours": "#5aae61", "ours, chunks of 32 MB": "#a6dba0"}
OTHERS = ("#762a83", "#9970ab", "#2166ac", "#d6604d", "#b2182b", "#878787", "#e08214")
AXES = {"tokens": "tokens", "vocab": "vocabulary"}
PANELS = (("step_ms", "loss and gradient, ms", 1.0), ("extra_bytes", "peak beyond the inputs, MB", 1e-6))


def plot(rows: Sequence[Row], path: Path, heading: str) -> Path | None:
    """A column of panels for each axis that varies, time above memory; None where nothing varies."""
    rows = [row for row in rows if row["kind"] == "all" and row["upstream"] == 1]
    axes = [axis for axis in AXES if len({row[axis] for row in _along(rows, axis)}) > 1]
    if not axes:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(axes), figsize=(5.6 * len(axes), 6.4), squeeze=False)
    names = list(dict.fromkeys(name for row in rows for name in row["providers"]))
    for column, axis in enumerate(axes):
        chosen = _along(rows, axis)
        for line, (key, label, scale) in enumerate(PANELS):
            _draw(panels[line][column], chosen, names, axis, key, scale)
            panels[line][column].set_ylabel(label)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="lower center", ncols=min(3, len(labels)))
    figure.suptitle(heading, fontsize=9)
    figure.tight_layout(rect=(0, 0.04 + 0.025 * (len(labels) > 3), 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _draw(panel: Any, rows: Sequence[Row], names: list[str], axis: str, key: str, scale: float) -> None:
    others = [name for name in names if name not in COLORS]
    for name in names:
        measured = [(row[axis], row["providers"].get(name, {}).get(key)) for row in rows]
        points = sorted((x, scale * y) for x, y in measured if y is not None)
        if points:
            color = COLORS[name] if name in COLORS else OTHERS[others.index(name) % len(OTHERS)]
            panel.plot(*zip(*points, strict=True), marker="o", ms=4, lw=1.6, label=name, color=color)
    ticks = sorted({row[axis] for row in rows})
    rest = "vocab" if axis == "tokens" else "tokens"
    values = ", ".join(f"{value:,}" for value in sorted({row[rest] for row in rows}))
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.set_xlabel(f"{AXES[axis]} ({AXES[rest]} {values}, {rows[0]['dtype']})")


def _along(rows: Sequence[Row], axis: str) -> list[Row]:
    """Rows that differ in this axis alone: those of the commonest rest."""
    if not rows:
        return []
    rest = [tuple(row[key] for key in ("tokens", "vocab", "dtype", "hidden") if key != axis) for row in rows]
    commonest = max(rest, key=rest.count)
    return [row for row, key in zip(rows, rest, strict=True) if key == commonest]
