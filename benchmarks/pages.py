"""Times the default call with and without kept memory, while the system has huge pages and after none are left.

    python benchmarks/pages.py --out benchmarks/results/MACHINE    # two minutes on two cores; takes most of the memory

A gradient of the logits' size lies in the pages of the last one; ``GRPO_KERNELS_KEEP_MEMORY=0`` leaves it to PyTorch's
allocator, which has the tensors of the others. Fragmented memory is made: most of what is free is mapped in small
pages, and all but every sixteenth go back, so that no huge page is left in between.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from outputs import Outputs
from torch import Tensor

from grpo_kernels.backends import blocks
from grpo_kernels.bench import report
from grpo_kernels.bench.measure import run
from grpo_kernels.bench.providers import IN_PLACE, OURS, Provider, from_logits
from grpo_kernels.bench.workload import Spec, Workload
from grpo_kernels.verification import records

SHAPES = ((256, 32000, "fp32"), (256, 151936, "fp32"), (1024, 151936, "bf16"))
WITHOUT = f"{OURS}, {blocks.SWITCH}=0"
COMPILED = "torch.compile, fp32 upcast"
NAMES = (OURS, IN_PLACE, WITHOUT, COMPILED)
SHARE = 0.8
"""Of the free memory, what is fragmented."""
_PAGE, _GROUP = 4096, 16


def providers(spec: Spec) -> list[Provider]:
    """Return the calls of NAMES."""
    offered = {provider.name: provider for provider in from_logits(spec)}
    ours = offered[OURS]

    def without(work: Workload) -> Tensor:
        with mock.patch.dict(os.environ, {blocks.SWITCH: "0"}):
            return ours.loss(work)

    return [ours, offered[IN_PLACE], Provider(WITHOUT, without, ours.bytes, ours=True), offered[COMPILED]]


@contextlib.contextmanager
def fragmented() -> Iterator[int]:
    """Leave no huge page in most of what is free; give the number of free huge pages."""
    free = records.free_memory("cpu")
    assert free is not None
    size = int(SHARE * free) // (_PAGE * _GROUP) * _PAGE * _GROUP
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as small:
        small.madvise(mmap.MADV_NOHUGEPAGE)
        for start in range(0, size, _PAGE):
            small[start] = 1
        for start in range(0, size, _PAGE * _GROUP):
            small.madvise(mmap.MADV_DONTNEED, start + _PAGE, (_GROUP - 1) * _PAGE)
        yield free_huge_pages()


def free_huge_pages() -> int:
    """Return how many free blocks of 2 MB and more the system has, as /proc/buddyinfo counts them."""
    counts = [line.split()[4:] for line in Path("/proc/buddyinfo").read_text().splitlines()]
    return sum(int(zone[9]) + 2 * int(zone[10]) for zone in counts)


def table(found: dict[str, Any]) -> str:
    """Return a line for each call: its first, and the median of later ones beside the call in place."""
    states = found["states"]
    heads = ["", *(f"{report.title(row)}, {name}" for name, rows in states.items() for row in rows)]
    pages = found["free_huge_pages"]
    lines = [
        f"{report.caption(found['environment'])}. Milliseconds of loss and gradient: the first call / the median of "
        f"later ones, and as a multiple of those in place. Free pages of 2 MB: {pages['as it is']:,} as it is, "
        f"{pages['fragmented']:,} fragmented.",
        "", *report.table_head(heads),
    ]  # fmt: skip
    for name in NAMES:
        cells = []
        for rows in states.values():
            for row in rows:
                p, place = row["providers"][name], report.milliseconds(row, IN_PLACE)
                assert place is not None
                cells.append(f"{1e3 * p['first_call_s']:.0f} / {p['step_ms']:.1f} ({p['step_ms'] / place:.2f}x)")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


OUTPUTS = Outputs("pages", table)


def main() -> int:
    """Measure both states, print the table, and write it."""
    parser = OUTPUTS.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    specs = [Spec(*shape) for shape in SHAPES]
    found: dict[str, Any] = {"environment": report.environment("cpu"), "free_huge_pages": {}, "states": {}}
    for state, prepared in (("as it is", contextlib.nullcontext(free_huge_pages())), ("fragmented", fragmented())):
        with prepared as pages:
            print(f"{state}: {pages:,} free pages of 2 MB", flush=True)
            found["free_huge_pages"][state] = pages
            found["states"][state] = list(run(specs, providers, arguments.rounds, progress=print))
    OUTPUTS.finish(found, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
