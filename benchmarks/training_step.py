"""Measures a training step of a Hugging Face model, with the eager loss and with ours: time, peak memory, and the
longest sequence.

    python benchmarks/training_step.py --out benchmarks/results/MACHINE    # about eight minutes on two cores
    python benchmarks/training_step.py --gigabytes 8 --hidden 1024 --layers 8 --device cuda

One sequence of growing length through a Qwen3 of random weights (vocabulary 151,936, fp32 on a CPU, bf16 on a GPU):
forward, GRPO loss, backward. Peak memory is what PyTorch's allocator hands out beyond the weights, gradients included.
The longest sequence within --gigabytes is found by bisection over measured peaks.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from outputs import Outputs
from tqdm import tqdm

from grpo_kernels import grpo_loss, hf
from grpo_kernels.bench import report
from grpo_kernels.bench.measure import Clock, peak_bytes, quiet
from grpo_kernels.bench.plot import STYLES as BENCH_STYLES
from grpo_kernels.bench.plot import Style, bare, bars, head, new_figure
from grpo_kernels.bench.providers import IN_PLACE, OURS

EAGER, LOGITS, HIDDEN = "eager PyTorch", "grpo_loss", "hf.attach (from hidden states)"
LOGITS_IN_PLACE = f"{LOGITS}, in place"
STYLES = {
    EAGER: BENCH_STYLES["eager, fp32 upcast"],
    LOGITS: BENCH_STYLES[OURS],
    LOGITS_IN_PLACE: BENCH_STYLES[IN_PLACE],
    HIDDEN: Style("#0072b2", "^", "-."),
}
VOCAB = 151936
LENGTHS = tuple(2**k for k in range(6, 17))
STEP = 64
"""How exactly the longest sequence is found, in tokens."""
CHUNK_BYTES = 2**28
Step = Callable[[int], None]


def make_model(arguments: argparse.Namespace) -> Any:
    """Make a Qwen3 of random weights with the sizes that were asked for."""
    torch.manual_seed(0)
    heads = max(2, arguments.hidden // 64)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB, hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers, num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=64,
        max_position_embeddings=2 * LENGTHS[-1], tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    return transformers.Qwen3ForCausalLM(config).to(arguments.device, dtype)


def eager_loss(logits: torch.Tensor, ids: torch.Tensor, advantages: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Compute the loss as short as it gets: no entropy, no metrics."""
    log_probs = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    ratio, A = (log_probs - old).exp(), advantages[:, None]
    return -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A).mean(-1).mean()


def steps(model: Any, device: str) -> dict[str, Step]:
    """Return a step by each way to the loss, as a function of the sequence's length."""

    def inputs(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(VOCAB, (1, length), generator=generator).to(device)
        old = (-11.9 + 0.1 * torch.randn(1, length - 1, generator=generator)).to(device)
        return ids, torch.ones(1, device=device), old

    def eager(length: int) -> None:
        ids, advantages, old = inputs(length)
        eager_loss(model(input_ids=ids).logits, ids, advantages, old).backward()

    def logits(length: int, inplace: bool) -> None:
        ids, advantages, old = inputs(length)
        options = {"old_log_probs": old, "inplace": inplace, "grad_scale": 1.0}
        # No name for the logits: they would live on, gradient and all, through the backward pass of the model.
        grpo_loss(model(input_ids=ids).logits, ids[:, 1:], advantages, **options).loss.backward()

    attached = hf.attach(model, "grpo", chunk_bytes=CHUNK_BYTES)

    def hidden(length: int) -> None:
        ids, advantages, old = inputs(length)
        grpo = {"token_ids": ids[:, 1:], "advantages": advantages, "old_log_probs": old}
        attached(input_ids=ids, grpo=grpo).loss.backward()

    calls = {name: functools.partial(logits, inplace=name == LOGITS_IN_PLACE) for name in (LOGITS, LOGITS_IN_PLACE)}
    return {EAGER: eager, **calls, HIDDEN: hidden}


class Runner:
    """Measures peak bytes and seconds of a step, and remembers them."""

    def __init__(self, model: Any, step: Step, device: str, bar: tqdm) -> None:
        self.model, self.step, self.device, self.bar = model, step, device, bar
        self.points: dict[int, dict[str, float]] = {}

    def peak(self, length: int) -> float:
        """Return the peak bytes of a step of this length."""
        if length not in self.points:
            self.bar.set_postfix_str(f"{length} tokens")
            self.model.zero_grad(set_to_none=True)
            with quiet():
                self.points[length] = {"bytes": peak_bytes(lambda: self.step(length), self.device)}
            self.bar.update()
        return self.points[length]["bytes"]

    def time(self, length: int) -> None:
        """Time a step of a length whose peak is known."""
        self.model.zero_grad(set_to_none=True)
        clock = Clock(self.device)
        self.step(length)
        clock.mark()
        self.points[length]["seconds"] = clock.seconds()[0]

    def longest(self, limit: float) -> int:
        """Find the longest sequence within the limit, to 64 tokens or a sixteenth; every peak is measured."""
        within, beyond = 0, 0
        for length in LENGTHS:
            if self.peak(length) > limit:
                beyond = length
                break
            self.time(length)
            within = length
        while beyond - within > max(STEP, within // 16):
            middle = (within + beyond) // 2 // STEP * STEP
            if self.peak(middle) > limit:
                beyond = middle
            else:
                within = middle
        return within


def shown_length(found: dict[str, Any]) -> str:
    """Return the longest length that the eager loss was timed at, as the points' key."""
    points = found["providers"][EAGER]["points"]
    return max((n for n, point in points.items() if "seconds" in point), key=int)


def table(found: dict[str, Any]) -> str:
    """Return a line for each way to the loss: the longest sequence, peak memory, and time beside the eager loss."""
    gigabytes, sizes = found["gigabytes"], found["model"]
    eager, shown = found["providers"][EAGER], shown_length(found)
    heads = ["", f"longest sequence in {gigabytes:g} GB", "× eager's", f"peak memory at {shown} tokens"]
    heads += [f"time of a step at {shown} tokens", "eager takes × this"]
    lines = [
        f"{report.caption(found['environment'])}, transformers {found['transformers']}. Forward, GRPO loss and "
        f"backward of a Qwen3 with {sizes['layers']} layers of {sizes['hidden']} and a vocabulary of {VOCAB:,}; memory "
        "is the peak beyond the weights, gradients included.",
        "", *report.table_head(heads),
    ]  # fmt: skip
    for name, provider in found["providers"].items():
        point = provider["points"][shown]
        times = provider["longest"] / eager["longest"]
        slower = eager["points"][shown]["seconds"] / point["seconds"]
        cells = [name, f"**{provider['longest']:,}** tokens", f"{times:.1f}x", f"{point['bytes'] / 1e6:.0f} MB"]
        lines.append(f"| {' | '.join(cells)} | {1e3 * point['seconds']:.0f} ms | {slower:.1f}x |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw peak memory against the length, and in bars the longest sequence and the time of a step."""
    providers, limit = found["providers"], found["gigabytes"]
    figure = new_figure(10, 4.6)
    left, right = figure.subfigures(1, 2, width_ratios=(5, 4))
    memory = left.subplots()
    for name, provider in providers.items():
        points = sorted((int(n), p["bytes"] / 1e9) for n, p in provider["points"].items())
        color, marker, dash = STYLES[name]
        memory.plot(*zip(*points, strict=True), dash, marker=marker, ms=5, lw=1.8, color=color, label=name)
    memory.axhline(limit, color="#555555", lw=1)
    memory.annotate(f"{limit:g} GB", (LENGTHS[0], limit), (0, 4), textcoords="offset points", fontsize=9)
    lengths = sorted({int(n) for provider in providers.values() for n in provider["points"] if int(n) in LENGTHS})
    ticks = lengths[::2]
    memory.set_xscale("log", base=2)
    memory.set_xticks(ticks, [f"{n:,}" for n in ticks], fontsize=9)
    memory.xaxis.minorticks_off()
    memory.set_ylim(0, None)
    memory.tick_params(axis="y", labelsize=9)
    memory.set_xlabel("tokens in the sequence", fontsize=9)
    memory.set_ylabel("peak memory beyond the weights, GB", fontsize=9)
    memory.grid(alpha=0.25)
    bare(memory)
    left.legend(loc="outside upper left", ncols=2, fontsize=9, frameon=False, handlelength=3.6)
    longest, seconds = right.subplots(2, 1)
    bars(longest, {name: p["longest"] for name, p in providers.items()}, STYLES, "tokens", "{:,.0f}".format)
    longest.set_title(f"Longest sequence in {limit:g} GB", fontsize=10, loc="left")
    shown = shown_length(found)
    times = {name: provider["points"][shown]["seconds"] for name, provider in providers.items()}
    bars(seconds, times, STYLES, "seconds", "{:.2f}".format)
    seconds.set_title(f"Time of a step with {int(shown):,} tokens", fontsize=10, loc="left")
    sizes, machine = found["model"], found["environment"]
    head(
        figure, "One training step: forward, GRPO loss, backward",
        f"A Qwen3 with {sizes['layers']} layers of {sizes['hidden']} and a vocabulary of {VOCAB:,}. "
        f"{report.caption(machine)}",
    )  # fmt: skip
    figure.savefig(path, dpi=150)


OUTPUTS = Outputs("training_step", table, plot)


def main() -> int:
    """Measure every way to the loss, print the table, and write table and plot."""
    parser = OUTPUTS.parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--hidden", type=int, default=256, help="of the model; a multiple of 64")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    model = make_model(arguments)
    found: dict[str, Any] = {"environment": report.environment(arguments.device), "gigabytes": arguments.gigabytes}
    found |= {"transformers": transformers.__version__, "providers": {}}
    found["model"] = {"hidden": arguments.hidden, "layers": arguments.layers}
    for name, step in steps(model, arguments.device).items():
        with tqdm(desc=name, unit="length") as bar:
            runner = Runner(model, step, arguments.device, bar)
            longest = runner.longest(arguments.gigabytes * 1e9)
        points = {str(length): point for length, point in sorted(runner.points.items())}
        found["providers"][name] = {"longest": longest, "points": points}
    OUTPUTS.finish(found, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
