"""Loss + gradient + log-probs + entropy + metrics on a CPU, side by side with plain PyTorch in one run.

    python benchmarks/cpu_loss.py                 # the table of README, a few minutes on two cores
    python benchmarks/cpu_loss.py --quick         # fewer rounds
    python benchmarks/cpu_loss.py --out DIR       # also DIR/cpu_loss.json and DIR/cpu_loss.md

Providers take turns inside each round; figures are medians over rounds; a ratio compares medians of one run. The
machine's in-place-scale bandwidth is measured in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from baselines import eager_loss
from torch import Tensor
from tqdm import tqdm

import grpo_kernels
from grpo_kernels import KL, LossConfig, grpo_loss
from grpo_kernels.backends import cpu

SHAPES = ((512, 32000), (256, 151936))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BETA = 0.04
CONFIG = LossConfig.preset("grpo", kl=KL(BETA))
SEQUENCES = 8
ENOUGH = 90_000
"""Milliseconds of samples of one provider."""


class Batch:
    """One workload; ``buffer`` is restored from ``kept`` between runs, since in place overwrites it."""

    def __init__(self, tokens: int, vocab: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (SEQUENCES, tokens // SEQUENCES)
        self.kept = (3 * torch.randn(*shape, vocab, generator=generator)).to(dtype)
        self.buffer = self.kept.clone()
        self.ids = torch.randint(vocab, shape, generator=generator)
        self.advantages = torch.randn(SEQUENCES, generator=generator)
        self.mask = torch.ones(shape, dtype=torch.bool)
        log_probs = grpo_kernels.token_log_probs(self.kept, self.ids).log_probs
        self.old = log_probs + 0.2 * torch.randn(shape, generator=generator)
        self.ref = log_probs + 0.2 * torch.randn(shape, generator=generator)

    def restore(self) -> None:
        self.buffer.copy_(self.kept)

    def logits(self) -> Tensor:
        """The buffer as a model would hand it over: not a leaf; its backward takes the gradient and does no work."""
        return _Model.apply(torch.zeros((), requires_grad=True), self)


class _Model(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, batch: Batch) -> Tensor:
        return batch.buffer.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        return None, None


def ours(batch: Batch, inplace: bool, **options) -> None:
    out = grpo_loss(
        batch.logits(), batch.ids, batch.advantages, batch.mask, old_log_probs=batch.old, ref_log_probs=batch.ref,
        config=CONFIG if not options else "grpo", inplace=inplace, **options,
    )  # fmt: skip
    out.loss.backward()


def eager(batch: Batch, loss: Callable[..., tuple[Tensor, ...]], upcast: bool) -> None:
    arguments = (batch.ids, batch.advantages, batch.mask, batch.old, batch.ref, BETA, upcast)
    loss(batch.logits(), *arguments)[0].backward()


def reference(batch: Batch) -> None:
    out = grpo_kernels.reference.grpo_loss(
        batch.logits(), batch.ids, batch.advantages, batch.mask, old_log_probs=batch.old,
        ref_log_probs=batch.ref, config=CONFIG,
    )  # fmt: skip
    out.loss.backward()


def providers(compiled: Callable[..., tuple[Tensor, ...]]) -> dict[str, Callable[[Batch], object]]:
    return {
        "in place": lambda b: ours(b, True),
        "out of place": lambda b: ours(b, False),
        "eager, fp32 upcast": lambda b: eager(b, eager_loss, True),
        "eager, logits' dtype": lambda b: eager(b, eager_loss, False),
        "torch.compile, fp32 upcast": lambda b: eager(b, compiled, True),
        "grpo_kernels.reference": reference,
        "scale in place": lambda b: b.buffer.mul_(1.0),
    }


def measure(batch: Batch, functions: dict[str, Callable[[Batch], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each provider, in turn inside each round; none is called again after ``ENOUGH``."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            if sum(samples[name]) > ENOUGH:
                continue
            batch.restore()
            start = time.perf_counter()
            function(batch)
            if turn:  # the first round warms up and compiles
                samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in samples.items()}


def skipped_work(batch: Batch, rounds: int) -> dict[str, float]:
    """Milliseconds in place, without KL, as rows drop out."""
    half = batch.mask.clone()
    half[: SEQUENCES // 2] = False
    whole_mask, whole_advantages = batch.mask, batch.advantages

    def with_mask(b: Batch) -> None:
        b.mask = half
        ours(b, True, kl_coef=0.0)
        b.mask = whole_mask

    def with_zeros(b: Batch) -> None:
        b.advantages = whole_advantages * (torch.arange(SEQUENCES) % 2)
        ours(b, True, kl_coef=0.0, skip_zero_advantage=True)
        b.advantages = whole_advantages

    functions = {
        "every row": lambda b: ours(b, True, kl_coef=0.0),
        "half masked": with_mask,
        "half A = 0, skipped": with_zeros,
        "zeroing alone": lambda b: b.buffer.zero_(),
    }
    return measure(batch, functions, rounds)


MEMORY_CODE = """
import sys
sys.path.insert(0, {folder!r})
from cpu_loss import Batch, DTYPES, ours, peak_growth
batch = Batch({tokens}, {vocab}, DTYPES[{dtype!r}])
ours(batch, {inplace})
batch.restore()
print(peak_growth(lambda: ours(batch, {inplace})))
"""


def peak_growth(function: Callable[[], object]) -> int:
    """Bytes by which the process's peak resident memory grows while the function runs (Linux)."""
    status = Path("/proc/self/status")

    def field(name: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = field("VmRSS")
    function()
    return field("VmHWM") - before


def extra_memory(tokens: int, vocab: int, dtype: str, inplace: bool) -> float | None:
    """Peak memory beyond the inputs, as a fraction of the logits; in a process of its own. None where unmeasurable."""
    if sys.platform != "linux":
        return None
    folder = str(Path(__file__).resolve().parent)
    code = MEMORY_CODE.format(folder=folder, tokens=tokens, vocab=vocab, dtype=dtype, inplace=inplace)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(result.stdout) / (tokens * vocab * DTYPES[dtype].itemsize)


def run(rounds: int) -> list[dict]:
    rows = []
    progress = tqdm(total=len(SHAPES) * len(DTYPES), unit="workload", file=sys.stderr)
    for tokens, vocab in SHAPES:
        for dtype in DTYPES:
            progress.set_description(f"{tokens}x{vocab} {dtype}")
            torch.compiler.reset()
            batch = Batch(tokens, vocab, DTYPES[dtype])
            times = measure(batch, providers(torch.compile(eager_loss)), rounds)
            row = {
                "tokens": tokens,
                "vocab": vocab,
                "dtype": dtype,
                "ms": times,
                "skipped_ms": skipped_work(batch, rounds),
            }
            row["extra_memory"] = {
                name: extra_memory(tokens, vocab, dtype, name == "in place") for name in ("in place", "out of place")
            }
            rows.append(row)
            progress.update()
    progress.close()
    return rows


def environment() -> dict:
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "instruction_set": cpu.instruction_set(),
        "torch": torch.__version__,
        "grpo_kernels": grpo_kernels.__version__,
    }


def table(rows: list[dict], env: dict) -> str:
    """Markdown: times, ratios to each baseline, share of the in-place-scale bandwidth, memory."""
    baselines = ("eager, fp32 upcast", "eager, logits' dtype", "torch.compile, fp32 upcast")
    lines = [
        f"{env['cpu']}, {env['threads']} threads, {env['instruction_set']}, torch {env['torch']}; median ms",
        "",
        "| tokens × vocab | | in place | out of place | eager fp32 | eager | compile | "
        "÷ eager fp32 | ÷ eager | ÷ compile | of in-place scale | Gelem/s | extra memory |",
        "| --- |" + " --- |" * 12,
    ]
    for row in rows:
        ms = row["ms"]
        ours_ms = ms["in place"]
        memory = " / ".join("-" if m is None else f"{100 * m:.1f} %" for m in row["extra_memory"].values())
        cells = [f"{row['tokens']}×{row['vocab']}", row["dtype"], f"{ours_ms:.2f}", f"{ms['out of place']:.2f}"]
        cells += [f"{ms[name]:.0f}" for name in baselines]
        cells += [f"**{ms[name] / ours_ms:.1f}x**" for name in baselines]
        cells += [
            f"{100 * ms['scale in place'] / ours_ms:.0f} %",
            f"{row['tokens'] * row['vocab'] / ours_ms / 1e6:.2f}",
            memory,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Extra memory: peak beyond the inputs, as a share of the logits, in place / out of place.", ""]
    lines += [
        "| rows that cost nothing (in place, no KL) | every row | half masked | half A = 0, skipped | zeroing alone |"
    ]
    lines += ["| --- |" + " --- |" * 4]
    for row in rows:
        values = " | ".join(f"{value:.2f}" for value in row["skipped_ms"].values())
        lines.append(f"| {row['tokens']}×{row['vocab']} {row['dtype']} | {values} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--out", type=Path, help="folder for cpu_loss.json and cpu_loss.md")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = run(3 if arguments.quick else arguments.rounds)
    env = environment()
    text = table(rows, env)
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "cpu_loss.json").write_text(json.dumps({"environment": env, "rows": rows}, indent=2) + "\n")
        (arguments.out / "cpu_loss.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
