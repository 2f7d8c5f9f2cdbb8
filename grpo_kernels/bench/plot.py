"""Draws rows of measurements: time against tokens and vocabulary, and peak memory; bars where too little varies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..files import replaced
from .providers import IN_PLACE, OURS
from .report import Row, milliseconds
from .workload import form

AXES = {"tokens": "tokens", "vocab": "columns of the vocabulary"}
TIME, MEMORY = "milliseconds", "peak memory"
ENOUGH = 4
"""How many points make a line."""


class Style(NamedTuple):
    """Says how a provider is drawn: told apart by marker and dash as well as by colour."""

    color: str
    marker: str
    dash: str


GREEN = "#00734f"
STYLES = {
    OURS: Style(GREEN, "o", "-"),
    IN_PLACE: Style("#35b58a", "v", "--"),
    "ours, chunks of 32 MB": Style("#35b58a", "v", "--"),
    "eager, fp32 upcast": Style("#d55e00", "s", "-"),
    "eager, logits' dtype": Style("#e69f00", "D", ":"),
    "torch.compile, fp32 upcast": Style("#0072b2", "^", "-"),
}
OTHERS = (
    Style("#a0519b", "X", "-."),
    Style("#56b4e9", "P", "--"),
    Style("#4d4d4d", "*", ":"),
    Style("#8c6d31", "h", "-"),
)
"""Colours are Okabe's and Ito's, which colour-blind readers tell apart."""


def style(name: str, names: Iterable[str]) -> Style:
    """Return how a provider is drawn, where ``names`` are all of the figure: of those without a style, each in turn."""
    others = [other for other in names if other not in STYLES]
    return STYLES[name] if name in STYLES else OTHERS[others.index(name) % len(OTHERS)]


def plot(rows: Sequence[Row], path: Path, heading: str) -> Path | None:
    """Draw lines against every axis that varies, with memory below, or bars; return the path, None for no timings.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = [row for row in rows if any("step_ms" in p for p in row["providers"].values())]
    rows = [row for row in rows if row["kind"] == "all" and row["upstream"] == 1] or rows
    if not rows:
        return None
    along = {axis: _along(rows, axis) for axis in AXES}
    lines = {axis: chosen for axis, chosen in along.items() if len({row[axis] for row in chosen}) >= ENOUGH}
    figure = _lines(lines) if lines else _bars(rows)
    note = "Medians, less is better; memory is the peak beyond the inputs"
    head(figure, "One GRPO loss with its gradient and metrics", f"{note}. {heading}")
    with replaced(path) as file:
        figure.savefig(file, dpi=150)
    return path


def new_figure(width: float, height: float) -> Any:
    """Return a figure of that size in inches, which no window shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_log(axis: Any) -> None:
    """Give a logarithmic axis, once all of it is drawn, ticks at 1, 2 and 5 of each power of ten as plain numbers.

    One that spans less than a power of ten gets some more, and less than twice its lowest value evenly spaced ones.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axis.set_major_locator(LogLocator(subs=subs) if high > 2 * low else MaxNLocator(5, steps=(1, 2, 5, 10)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def in_words(value: float) -> str:
    """Return a number with three digits, or all of those before the point."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def bars(
    panel: Any, values: dict[str, float], styles: dict[str, Style], label: str, words: Callable[[float], str] = in_words
) -> None:
    """Draw a horizontal bar for each name, its value beside it in ``words``."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for place, (name, value) in enumerate(values.items()):
        panel.barh(place, value, color=styles[name].color, height=0.72)
        panel.annotate(words(value), (value, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    panel.set_yticks(range(len(values)), list(values), fontsize=9)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.2 * max([*values.values(), 1e-9]))
    panel.set_xlabel(label, fontsize=9)
    panel.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    panel.tick_params(axis="x", labelsize=9)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", alpha=0.25)
    panel.set_axisbelow(True)
    bare(panel)


def bare(panel: Any) -> None:
    """Take away the frame's lines that show nothing."""
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def head(figure: Any, title: str, subtitle: str) -> None:
    """Put a title and, smaller, what was measured and on what above a figure's panels."""
    height = figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.62 / height), h_pad=0.08)
    figure.text(0.01, 1 - 0.2 / height, title, fontsize=12, fontweight="bold", va="center")
    figure.text(0.01, 1 - 0.46 / height, subtitle, fontsize=9, color="#555555", va="center")


def _workload(row: Row) -> str:
    hidden = "" if row["hidden"] is None else f", hidden size {row['hidden']:,}"
    return f"{row['tokens']:,} tokens × {row['vocab']:,} {AXES['vocab']}{hidden}, {_form(row)}"


def _form(row: Row) -> str:
    return form(row["dtype"], row["kind"], row["upstream"])


def _lines(chosen: dict[str, list[Row]]) -> Any:
    """Return a figure of a panel for each axis, and below them the memory of the largest workload in bars."""
    figure = new_figure(10, 7.6)
    above, below = figure.subfigures(2, 1, height_ratios=(5.0, 2.0))
    everything = [row for rows in chosen.values() for row in rows]
    names = list(dict.fromkeys(name for row in everything for name in row["providers"]))
    panels = above.subplots(1, len(chosen), squeeze=False, sharey=True)[0]
    for panel, (axis, rows) in zip(panels, chosen.items(), strict=True):
        _line_panel(panel, rows, names, axis)
    plain_log(panels[0].yaxis)
    panels[0].set_ylabel(TIME, fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    options = {"fontsize": 9, "frameon": False, "handlelength": 3.6, "borderaxespad": 0.0}
    above.legend(handles, labels, loc="outside upper left", ncols=3, **options)
    largest = max(everything, key=lambda row: float(row["logits_bytes"]))
    panel = below.subplots()
    _memory(panel, largest, names)
    panel.set_title(_workload(largest), fontsize=10, loc="left")
    return figure


def _line_panel(panel: Any, rows: Sequence[Row], names: list[str], axis: str) -> None:
    """Draw every provider's median over an axis."""
    for name in names:
        measured = [(row[axis], milliseconds(row, name)) for row in rows]
        found = sorted((x, ms) for x, ms in measured if ms is not None)
        if found:
            color, marker, dash = style(name, names)
            size, width = (6.5, 2.4) if name == OURS else (5.5, 1.6)
            panel.plot(*zip(*found, strict=True), dash, marker=marker, ms=size, lw=width, color=color, label=name)
    ticks = sorted({row[axis] for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=9)
    panel.xaxis.minorticks_off()
    panel.tick_params(axis="y", labelsize=9)
    panel.grid(alpha=0.25)
    rest = "vocab" if axis == "tokens" else "tokens"
    panel.set_xlabel(AXES[axis], fontsize=9)
    panel.set_title(f"{rows[0][rest]:,} {AXES[rest]}, {_form(rows[0])}", fontsize=10, loc="left")
    bare(panel)


def _bars(rows: Sequence[Row]) -> Any:
    """Return a figure of a line of panels for each workload: time, and memory beside it."""
    names = list(dict.fromkeys(name for row in rows for name in row["providers"]))
    figure = new_figure(10, 0.6 + len(rows) * (0.8 + 0.24 * len(names)))
    panels = figure.subplots(len(rows), 2, squeeze=False, width_ratios=(3, 2))
    for (time, memory), row in zip(panels, rows, strict=True):
        timed = {name: p["step_ms"] for name, p in row["providers"].items() if "step_ms" in p}
        bars(time, timed, {name: style(name, names) for name in timed}, TIME)
        time.set_title(_workload(row), fontsize=10, loc="left")
        if _memory(memory, row, names) == list(timed):
            memory.set_yticks([])  # the panel beside it names them
    return figure


def _memory(panel: Any, row: Row, names: list[str]) -> list[str]:
    """Draw peak memory, in copies of the logits, from hidden states in MB; return the names of the bars."""
    unit, scale = ("copies of the logits", row["logits_bytes"]) if row["hidden"] is None else ("MB", 1e6)
    peaks = {name: p["extra_bytes"] / scale for name, p in row["providers"].items() if "extra_bytes" in p}
    words = "{:.2f}".format if row["hidden"] is None else in_words
    bars(panel, peaks, {name: style(name, names) for name in peaks}, f"{MEMORY}, {unit}", words)
    return list(peaks)


def _along(rows: Sequence[Row], axis: str) -> list[Row]:
    """Return the rows that differ in this axis alone: those of the commonest rest."""
    keys = ("tokens", "vocab", "dtype", "hidden", "kind", "upstream")
    rest = [tuple(row[key] for key in keys if key != axis) for row in rows]
    commonest = max(rest, key=rest.count)
    return [row for row, key in zip(rows, rest, strict=True) if key == commonest]
