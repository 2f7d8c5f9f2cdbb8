"""Computes what a vocabulary cut over p ranks costs, from what this machine can measure of it.

    python benchmarks/scaling.py --out benchmarks/results/MACHINE    # about three minutes on two cores

Each rank holds V/p columns of the head. Measured here: the loss from hidden states and its gradients at V/p columns,
on one core, and gloo's all-gather and all-to-all between 2 and 4 processes. Computed, from CONSTANTS: the GEMMs of a
large head on GPUs, the sum of the hidden states' gradient, the statistics of rows, latency. What ranks tell each other
is added up without overlap.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from outputs import Outputs

from grpo_kernels import linear_grpo_loss
from grpo_kernels.bench import report
from grpo_kernels.bench.measure import Clock
from grpo_kernels.bench.plot import STYLES, Style, bare, head, new_figure, plain_log
from grpo_kernels.bench.providers import OURS
from grpo_kernels.objectives.groups import gather

RANKS = (1, 2, 4, 8, 16, 32, 64)
VOCAB = 151_936
PROCESSES = (2, 4)
PAYLOADS = (64, 128 << 10, 8 << 20)
"""Bytes that a rank contributes to a collective; the second are the statistics of 8192 tokens."""
REPEATS = {64: 200, 128 << 10: 100, 8 << 20: 15}


class Constant(NamedTuple):
    """A number that the computed columns rest on."""

    value: float
    text: str
    source: str


CONSTANTS = {
    "N": Constant(8192, "8,192 tokens", "chosen"),
    "H": Constant(4096, "hidden size 4,096", "chosen"),
    "V": Constant(VOCAB, f"{VOCAB:,} columns", "Qwen3's vocabulary"),
    "F": Constant(790e12, "790 TFLOP/s", "80 % of an H100's dense bf16 peak of 989; assumed, not measured"),
    "NVLink": Constant(450e9, "450 GB/s each way", "an H100's data sheet: 900 GB/s both ways"),
    "IB": Constant(50e9, "50 GB/s each way", "NDR: 400 Gbit/s for each GPU"),
    "NVLink latency": Constant(20e-6, "20 µs a collective", "assumed: NCCL issue 1259 has 6 µs, and a launch"),
    "IB latency": Constant(46e-6, "46 µs a collective", "NCCL issue 1244: 16 GPUs, two nodes"),
    "chunk": Constant(4096, "4,096 rows a chunk", "chosen"),
    "b": Constant(2, "2 bytes an element of the hidden states' gradient", "bf16"),
    "S": Constant(16, "16 bytes a token contributed by each rank", "four fp32 numbers"),
}
WIRES = ("NVLink", "IB")
COLLECTIVES = 3
"""Of a chunk of rows: its statistics are gathered, its gradient is dealt out, added up and gathered."""


def value(name: str) -> float:
    """Return a constant's number."""
    return CONSTANTS[name].value


def gemm_seconds(ranks: int) -> float:
    """Return the time of a rank's three GEMMs, 6·N·H·V/p operations."""
    return 6 * value("N") * value("H") * value("V") / ranks / value("F")


def hidden_seconds(ranks: int, wire: str) -> float:
    """Return the time of the sum of the hidden states' gradient over ranks: an all-reduce, or an all-to-all and an
    all-gather, of which a rank receives (p - 1)/p of the gradient each."""
    return 2 * (ranks - 1) / ranks * value("N") * value("H") * value("b") / value(wire)


def statistics_seconds(ranks: int, wire: str, steps: int) -> float:
    """Return the time of the rows' statistics: in one step, as it is, all are gathered, S·(p - 1) bytes a token; in two
    each rank would combine its share of the tokens, and the results be gathered, 2·S·(p - 1)/p."""
    received = (ranks - 1) * (1 if steps == 1 else 2 / ranks)
    return value("N") * value("S") * received / value(wire)


def latency_seconds(ranks: int, wire: str) -> float:
    """Return the latency of all collectives."""
    return value("N") / value("chunk") * COLLECTIVES * value(f"{wire} latency") if ranks > 1 else 0.0


def wire_seconds(ranks: int, wire: str) -> float:
    """Return the time of everything that ranks tell each other, one after the other."""
    return hidden_seconds(ranks, wire) + statistics_seconds(ranks, wire, 1) + latency_seconds(ranks, wire)


def share(ranks: int, wire: str) -> float:
    """Return the wire's time as a share of the GEMMs'."""
    return wire_seconds(ranks, wire) / gemm_seconds(ranks)


# Measured


def shard_step(tokens: int, hidden: int, columns: int) -> Callable[[], object]:
    """Return the loss and its gradients, in fp32, of a head of so many columns."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, tokens, hidden, generator=generator, requires_grad=True)
    weight = (torch.randn(columns, hidden, generator=generator) / hidden**0.5).requires_grad_()
    ids = torch.randint(columns, (1, tokens), generator=generator)
    advantages = torch.ones(1)

    def step() -> None:
        states.grad = weight.grad = None
        linear_grpo_loss(states, weight, ids, advantages).loss.backward()

    return step


def compute_times(tokens: int, hidden: int, rounds: int) -> dict[str, Any]:
    """Return milliseconds of one core in each round at every number of ranks, all in turns. It is the core's own time:
    what else runs on the machine does not count."""
    torch.set_num_threads(1)
    steps = {ranks: shard_step(tokens, hidden, VOCAB // ranks) for ranks in RANKS}
    for step in steps.values():
        step()
    times: dict[int, list[float]] = {ranks: [] for ranks in RANKS}
    for k in range(rounds):
        print(f"compute: round {k + 1} of {rounds}", flush=True)
        for i in range(len(RANKS)):
            ranks = RANKS[(i + k) % len(RANKS)]
            began = time.process_time()
            steps[ranks]()
            times[ranks].append(1e3 * (time.process_time() - began))
    rows = [{"ranks": ranks, "columns": VOCAB // ranks, "ms": ms} for ranks, ms in times.items()]
    return {"tokens": tokens, "hidden": hidden, "rows": rows}


def collectives(ranks: int) -> list[dict[str, Any]]:
    """Return what gloo's collectives take between so many processes of one thread each."""
    print(f"gloo: {ranks} processes", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (ranks, folder), nprocs=ranks)
        return json.loads((Path(folder) / "found.json").read_text())


def _rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timeout)
    world = torch.distributed.group.WORLD
    found = []
    for payload in PAYLOADS:
        sent = torch.ones(payload, dtype=torch.uint8)
        received = torch.empty_like(sent)
        calls: dict[str, Callable[[], object]] = {
            "all-gather": lambda sent=sent: gather(sent, world),
            "all-to-all": lambda received=received, sent=sent: torch.distributed.all_to_all_single(received, sent),
        }
        for name, call in calls.items():
            seconds = []
            for _ in range(REPEATS[payload] + 3):
                torch.distributed.barrier()
                clock = Clock("cpu")
                call()
                clock.mark()
                seconds += clock.seconds()
            moved = payload * (ranks - 1) / (1 if name == "all-gather" else ranks)
            found.append({"processes": ranks, "collective": name, "payload": payload, "received": moved})
            found[-1]["seconds"] = sorted(seconds[3:])[REPEATS[payload] // 5]
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


# Written


def compute_shares(found: dict[str, Any]) -> dict[int, float]:
    """Return the time at V/p columns as a share of that at V columns: medians."""
    medians = {row["ranks"]: statistics.median(row["ms"]) for row in found["compute"]["rows"]}
    return {ranks: ms / medians[1] for ranks, ms in medians.items()}


def in_table(heads: list[str], lines: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [*report.table_head(heads), *(f"| {' | '.join(line)} |" for line in lines)]


def pair(cell: Callable[[str], float], form: str) -> str:
    """Return one number for each wire."""
    return " / ".join(f"{cell(wire):{form}}" for wire in WIRES)


def cost_lines(found: dict[str, Any]) -> list[str]:
    """Return the table of p."""
    heads = [
        "ranks p", "columns of a rank", "measured here: time at V/p, % of that at V (1/p)", "computed: GEMMs, ms",
        "hidden gradient, ms, NVLink / IB", "statistics, µs, NVLink / IB", "in two steps, µs, NVLink / IB",
        "latency, ms, NVLink / IB",
        "all wire as % of the GEMMs, NVLink / IB",
    ]  # fmt: skip
    lines = []
    for ranks, measured in compute_shares(found).items():
        cells = [str(ranks), f"{VOCAB // ranks:,}", f"{100 * measured:.1f} ({100 / ranks:.1f})"]
        cells += [f"{1e3 * gemm_seconds(ranks):.2f}"]
        if ranks == 1:
            lines.append([*cells, *["–"] * 5])
            continue
        cells += [pair(lambda wire, p=ranks: 1e3 * hidden_seconds(p, wire), ".2f")]
        cells += [pair(lambda wire, p=ranks, k=k: 1e6 * statistics_seconds(p, wire, k), ".1f") for k in (1, 2)]
        cells += [pair(lambda wire, p=ranks: 1e3 * latency_seconds(p, wire), ".2f")]
        lines.append([*cells, pair(lambda wire, p=ranks: 100 * share(p, wire), ".1f")])
    return in_table(heads, lines)


def collective_lines(found: dict[str, Any]) -> list[str]:
    """Return the table of gloo's collectives."""
    lines = []
    for row in found["gloo"]:
        rate = "–" if row["payload"] == PAYLOADS[0] else f"{row['received'] / row['seconds'] / 1e9:.2f}"
        cells = [str(row["processes"]), row["collective"], f"{row['payload']:,}", f"{1e6 * row['seconds']:,.0f}"]
        lines.append([*cells, rate])
    return in_table(["processes", "collective", "bytes of a rank", "µs", "GB/s received by a rank"], lines)


def constant_lines() -> list[str]:
    """Return the table of what is assumed."""
    return in_table(["", "", "source"], [[name, each.text, each.source] for name, each in CONSTANTS.items()])


def hidden_until(wire: str) -> int:
    """Return the most ranks whose wire, all of it, is no longer than the GEMM of the weight's gradient."""
    return max((p for p in range(2, 513) if share(p, wire) <= 1 / 3), default=1)


def two_steps_from(wire: str) -> int:
    """Return the fewest ranks at which two steps of statistics save more than another collective's latency."""
    more = value("N") / value("chunk") * value(f"{wire} latency")
    return next(p for p in range(2, 1 << 20) if statistics_seconds(p, wire, 1) - statistics_seconds(p, wire, 2) > more)


def conclusions(found: dict[str, Any]) -> list[str]:
    """Return what follows."""
    shares = compute_shares(found)
    statistics_here = [row for row in found["gloo"] if row["payload"] == PAYLOADS[1]]
    gathered = {row["processes"]: row for row in statistics_here if row["collective"] == "all-gather"}
    fair = max(p for p in RANKS if shares[p] * p <= 1.25)
    of_hidden = statistics_seconds(8, "NVLink", 1) / hidden_seconds(8, "NVLink")
    nvlink, ib = ({p: 100 * share(p, wire) for p in RANKS[1:]} for wire in WIRES)
    tokens, chunks, gemms = value("N"), value("N") / value("chunk"), 1e3 * gemm_seconds(8)
    times = [f"{1e3 * row['seconds']:.2f} ms between {p} processes" for p, row in gathered.items()]
    return [
        "What follows:",
        "",
        "- Cutting the columns divides the work. Measured here, p times the time at V/p is at most a quarter more "
        f"than the time at V up to p = {fair}; at p = 64 it is {shares[64] * 64:.2f} times that.",
        "- The wire's large part is the sum of the hidden states' gradient: (2/3)·(p - 1)·F/(V·bandwidth) of the "
        "GEMMs, whatever the number of tokens and the hidden size.",
        f"- Within a node all of the wire is small: over NVLink {nvlink[2]:.1f} % of the GEMMs at p = 2 and "
        f"{nvlink[8]:.1f} % at p = 8.",
        f"- Between nodes it is not: over IB {ib[8]:.0f} % at p = 8 and {ib[16]:.0f} % at p = 16. A vocabulary cut "
        "over IB is nobody's layout, so nothing is optimised for it.",
        "- The GEMM of the weight's gradient, a third of the work, needs no rank's answer and could hide the wire up "
        f"to p = {hidden_until('NVLink')} over NVLink and p = {hidden_until('IB')} over IB.",
        f"- The statistics are the small part: {100 * of_hidden:.1f} % of the hidden gradient's time at p = 8.",
        "- Each rank contributes 16 bytes a token and receives 16·(p - 1). Two steps would receive 32·(p - 1)/p: "
        "less from p = 3 on, and worth another collective's latency from "
        f"p = {two_steps_from('NVLink')} over NVLink and p = {two_steps_from('IB')} over IB.",
        f"- Latency is what a small batch pays: {1e3 * latency_seconds(8, 'NVLink'):.2f} ms at p = 8 for "
        f"{tokens:,.0f} tokens in {chunks:.0f} chunks, beside GEMMs of {gemms:.2f} ms.",
        f"- On this machine gloo gathers the statistics of 8,192 tokens in {' and '.join(times)}, beside what else "
        "runs there: enough for tests, and nothing about a network.",
        "- Nothing of this is measured on GPUs yet: not the GEMMs at V/p columns, not the wire, not what hides it.",
    ]


def text(found: dict[str, Any]) -> str:
    """Return the tables and what follows from them."""
    compute = found["compute"]
    lines = [
        f"Measured: {report.caption(found['environment'])}; {compute['tokens']} tokens, hidden size "
        f"{compute['hidden']}, fp32, medians of {len(compute['rows'][0]['ms'])} rounds of one core's own time. "
        "Everything else of the first table is computed. "
        "On GPUs: not yet measured.",
        "", *cost_lines(found),
        "", "Computed from:", "", *constant_lines(),
        "",
        "Measured between processes of this machine, by gloo, one call in five being faster. Waits for a core are in "
        f"it; the load was {found['load']:.0f} before the command began.",
        "", *collective_lines(found),
        "", *conclusions(found),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw the measured time at V/p columns, and the computed wire beside the GEMMs, against p."""
    figure = new_figure(10, 4.4)
    measured, computed = figure.subplots(1, 2)
    shares = compute_shares(found)
    color, marker, dash = STYLES[OURS]
    ideal = [100 / p for p in RANKS]
    measured.plot(RANKS, ideal, ":", color="#555555", lw=1.4, label="1/p")
    ours = [100 * shares[p] for p in RANKS]
    measured.plot(RANKS, ours, dash, marker=marker, ms=5, lw=1.8, color=color, label="measured on this CPU")
    measured.set_ylabel("time at V/p columns, % of that at V", fontsize=9)
    styles = {"NVLink": Style("#0072b2", "^", "-"), "IB": Style("#d55e00", "s", "-")}
    for wire, (color, marker, dash) in styles.items():
        percents = [100 * share(p, wire) for p in RANKS[1:]]
        computed.plot(RANKS[1:], percents, dash, marker=marker, ms=5, lw=1.8, color=color, label=f"{wire}, computed")
    computed.axhline(100 / 3, color="#555555", lw=1)
    note = "weight's GEMM, 1/3"
    computed.annotate(note, (12, 100 / 3), (0, 4), textcoords="offset points", ha="center", fontsize=9)
    computed.set_ylabel("all wire, % of the GEMMs", fontsize=9)
    for panel, ticks in ((measured, RANKS), (computed, RANKS[1:])):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(ticks, [str(p) for p in ticks], fontsize=9)
        panel.xaxis.minorticks_off()
        plain_log(panel.yaxis)
        panel.tick_params(axis="y", labelsize=9)
        panel.set_xlabel("ranks p", fontsize=9)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=9, frameon=False)
        bare(panel)
    compute, machine = found["compute"], report.caption(found["environment"])
    subtitle = f"Left: {machine}, {compute['tokens']} tokens, hidden size {compute['hidden']}. GPUs: not yet measured"
    head(figure, "A vocabulary of 151,936 columns over p ranks", subtitle)
    figure.savefig(path, dpi=150)


OUTPUTS = Outputs("scaling", text, plot)


def main() -> int:
    """Measure, print the tables, and write them."""
    parser = OUTPUTS.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    found = {
        "compute": compute_times(arguments.tokens, arguments.hidden, arguments.rounds),
        "environment": report.environment("cpu"),
        "gloo": [row for ranks in PROCESSES for row in collectives(ranks)],
        "load": load,
    }
    OUTPUTS.finish(found, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
