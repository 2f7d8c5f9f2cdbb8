"""Times the loss from one thread to the machine's cores, alone and beside a process that spins on one of them.

    python benchmarks/thread_scaling.py --out benchmarks/results/MACHINE    # a minute on two cores

The workloads of ``python -m grpo_kernels bench``, by the default call and in place.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from outputs import Outputs
from torch import Tensor

from grpo_kernels.bench import plot, report
from grpo_kernels.bench.measure import run
from grpo_kernels.bench.providers import IN_PLACE, OURS, Provider, from_logits
from grpo_kernels.bench.workload import Spec, Workload

SHAPES = ((256, 32000, "fp32"), (256, 32000, "bf16"), (256, 151936, "fp32"), (256, 151936, "bf16"))
NAMES = (OURS, IN_PLACE)


def thread_counts() -> list[int]:
    """Return 1, 2, 4, ... and the number of cores."""
    cores = len(os.sched_getaffinity(0))
    return [*(1 << k for k in range(cores.bit_length()) if 1 << k < cores), cores]


def label(name: str, threads: int) -> str:
    """Return a provider's name in the rows."""
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def providers(spec: Spec) -> list[Provider]:
    """Return both calls on every number of threads, which each sets for itself."""

    def on(threads: int, provider: Provider) -> Provider:
        def loss(work: Workload) -> Tensor:
            torch.set_num_threads(threads)
            return provider.loss(work)

        return Provider(label(provider.name, threads), loss, provider.bytes, ours=True)

    ours = [provider for provider in from_logits(spec) if provider.name in NAMES]
    return [on(threads, provider) for threads in thread_counts() for provider in ours]


@contextlib.contextmanager
def spinning() -> Iterator[None]:
    """Keep a core busy with a process that never waits."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def table(found: dict[str, Any]) -> str:
    """Return a line for each number of threads: milliseconds, how many times faster than one thread, and how many times
    slower beside a spinning process."""
    alone, beside = found["rows"], found["beside"]
    heads = ["threads", *(f"{report.title(row)}{', in place' * (name == IN_PLACE)}" for row in alone for name in NAMES)]
    lines = [
        f"{report.caption(found['environment'])}. Median milliseconds of loss and gradient; in brackets how many times "
        "faster than one thread, and how many times slower beside a process that spins on a core.",
        "", *report.table_head(heads),
    ]  # fmt: skip
    for threads in found["threads"]:
        cells = [str(threads)]
        for row, spun in zip(alone, beside, strict=True):
            for name in NAMES:
                mine = label(name, threads)
                ms, other = report.milliseconds(row, mine), report.milliseconds(spun, mine)
                one = report.milliseconds(row, label(name, 1))
                assert ms is not None
                assert other is not None
                assert one is not None
                cells.append(f"{ms:.2f} ({one / ms:.1f}x, {other / ms:.1f}x)")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def curves(found: dict[str, Any], path: Path) -> None:
    """Draw how many times faster than one thread each number of threads is, from four numbers on."""
    counts = found["threads"]
    if len(counts) < plot.ENOUGH:
        return
    figure = plot.new_figure(10, 4.2)
    panels = figure.subplots(1, len(NAMES), sharey=True)
    for panel, name in zip(panels, NAMES, strict=True):
        for row, style in zip(found["rows"], plot.OTHERS, strict=False):
            times = [report.milliseconds(row, label(name, threads)) for threads in counts]
            dash = {"marker": style.marker, "color": style.color, "label": report.title(row)}
            panel.plot(counts, [times[0] / ms for ms in times if ms and times[0]], style.dash, **dash)
        panel.plot(counts, counts, ":", color="#bbbbbb", label="as many times")
        panel.set_xticks(counts, [str(threads) for threads in counts])
        panel.set_xlabel("threads", fontsize=9)
        panel.set_title(name, fontsize=10, loc="left")
        plot.bare(panel)
    panels[0].set_ylabel("times faster than one thread", fontsize=9)
    panels[0].legend(fontsize=9, frameon=False)
    plot.head(figure, "One GRPO loss with its gradient on several threads", report.caption(found["environment"]))
    figure.savefig(path, dpi=150)


OUTPUTS = Outputs("thread_scaling", table, curves)


def main() -> int:
    """Measure every number of threads, print the table, and write it."""
    parser = OUTPUTS.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    environment = report.environment("cpu")
    specs = [Spec(*shape) for shape in SHAPES]
    rows = list(run(specs, providers, arguments.rounds, progress=print))
    with spinning():
        beside = list(run(specs, providers, arguments.rounds, progress=print))
    found = {"environment": environment, "threads": thread_counts(), "rows": rows, "beside": beside}
    OUTPUTS.finish(found, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
