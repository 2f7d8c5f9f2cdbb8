"""One training step of a Hugging Face model, with the eager loss and with ours: time, peak memory, longest sequence.

    python benchmarks/training_step.py --out benchmarks/results/MACHINE    # about seven minutes on two cores
    python benchmarks/training_step.py --gigabytes 8 --hidden 1024 --layers 8 --device cuda

One sequence of growing length through a Qwen3 of random weights (vocabulary 151,936, fp32 on a CPU, bf16 on a GPU):
forward, GRPO loss, backward. Peak memory is what PyTorch's allocator hands out beyond the weights, gradients included.
The longest sequence within --gigabytes is found by bisection over measured peaks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from grpo_kernels import grpo_loss, hf
from grpo_kernels.bench import report
from grpo_kernels.bench.measure import Clock, peak_bytes, quiet

EAGER, LOGITS, HIDDEN = "eager PyTorch", "grpo_loss, in place", "hf.attach (from hidden states)"
COLORS = {EAGER: "#762a83", LOGITS: "#5aae61", HIDDEN: "#1b7837"}
LENGTHS = tuple(2**k for k in range(6, 17))
STEP = 64
"""Tokens to which the longest sequence is found."""
CHUNK_BYTES = 2**28
Step = Callable[[int], None]


def make_model(arguments: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    heads = max(2, arguments.hidden // 64)
    config = transformers.Qwen3Config(
        vocab_size=151936, hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers, num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=64,
        max_position_embeddings=2 * LENGTHS[-1], tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    return transformers.Qwen3ForCausalLM(config).to(arguments.device, dtype)


def eager_loss(logits: torch.Tensor, ids: torch.Tensor, advantages: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """As short as it gets: no entropy, no metrics."""
    log_probs = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    ratio, A = (log_probs - old).exp(), advantages[:, None]
    return -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A).mean(-1).mean()


def steps(model: Any, device: str) -> dict[str, Step]:
    """A step by each way to the loss, as a function of the sequence's length."""

    def inputs(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(151936, (1, length), generator=generator).to(device)
        old = (-11.9 + 0.1 * torch.randn(1, length - 1, generator=generator)).to(device)
        return ids, torch.ones(1, device=device), old

    def eager(length: int) -> None:
        ids, advantages, old = inputs(length)
        eager_loss(model(input_ids=ids).logits, ids, advantages, old).backward()

    def logits(length: int) -> None:
        ids, advantages, old = inputs(length)
        options = {"old_log_probs": old, "inplace": True, "grad_scale": 1.0}
        # No name for the logits: they would live on, gradient and all, through the backward pass of the model.
        grpo_loss(model(input_ids=ids).logits, ids[:, 1:], advantages, **options).loss.backward()

    attached = hf.attach(model, "grpo", chunk_bytes=CHUNK_BYTES)

    def hidden(length: int) -> None:
        ids, advantages, old = inputs(length)
        grpo = {"token_ids": ids[:, 1:], "advantages": advantages, "old_log_probs": old}
        attached(input_ids=ids, grpo=grpo).loss.backward()

    return {EAGER: eager, LOGITS: logits, HIDDEN: hidden}


class Runner:
    """Peak bytes and seconds of a step, remembered."""

    def __init__(self, model: Any, step: Step, device: str, bar: tqdm) -> None:
        self.model, self.step, self.device, self.bar = model, step, device, bar
        self.points: dict[int, dict[str, float]] = {}

    def peak(self, length: int) -> float:
        if length not in self.points:
            self.bar.set_postfix_str(f"{length} tokens")
            self.model.zero_grad(set_to_none=True)
            with quiet():
                self.points[length] = {"bytes": peak_bytes(lambda: self.step(length), self.device)}
            self.bar.update()
        return self.points[length]["bytes"]

    def time(self, length: int) -> None:
        self.model.zero_grad(set_to_none=True)
        clock = Clock(self.device)
        self.step(length)
        clock.mark()
        self.points[length]["seconds"] = clock.seconds()[0]

    def longest(self, limit: float) -> int:
        """The longest sequence, to 64 tokens or a sixteenth, whose peak is within the limit; every peak measured."""
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


def table(found: dict[str, Any]) -> str:
    gigabytes = found["gigabytes"]
    eager = found["providers"][EAGER]
    lengths = sorted(int(n) for n in eager["points"])
    shown = str(max(n for n in lengths if "seconds" in eager["points"][str(n)]))
    lines = [report.caption(found["environment"]) + f", transformers {found['transformers']}", ""]
    heads = [
        "",
        f"longest sequence in {gigabytes:g} GB",
        "× eager",
        f"peak at {shown} tokens",
        f"step at {shown} tokens",
    ]
    lines += [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name, provider in found["providers"].items():
        point = provider["points"][shown]
        times = provider["longest"] / eager["longest"]
        cells = [name, f"**{provider['longest']:,}** tokens", f"{times:.1f}"]
        lines.append(f"| {' | '.join(cells)} | {point['bytes'] / 1e6:.0f} MB | {1e3 * point['seconds']:.0f} ms |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, seconds) = pyplot.subplots(1, 2, figsize=(10.5, 4))
    for name, provider in found["providers"].items():
        points = sorted((int(n), p) for n, p in provider["points"].items())
        label = f"{name}: {provider['longest']:,} tokens"
        style = {"marker": "o", "ms": 3.5, "color": COLORS[name]}
        memory.plot([n for n, _ in points], [p["bytes"] / 1e9 for _, p in points], **style)
        timed = [(n, p["seconds"]) for n, p in points if "seconds" in p]
        seconds.plot(*zip(*timed, strict=True), label=label, **style)
    limit = found["gigabytes"]
    memory.axhline(limit, color="#b2182b", lw=1, ls="--")
    memory.text(LENGTHS[0], limit * 1.06, f"{limit:g} GB", color="#b2182b", fontsize=8)
    memory.set_ylabel("peak memory beyond the weights, GB")
    seconds.set_ylabel("forward, loss, backward: seconds")
    for panel in (memory, seconds):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        ticks = [n for n in LENGTHS if str(n) in found["providers"][HIDDEN]["points"]][::2]
        panel.set_xticks(ticks, [f"{n:,}" for n in ticks])
        panel.set_xlabel("tokens in the sequence")
        panel.grid(alpha=0.3)
    seconds.legend(
        fontsize=8, frameon=False, title=f"longest sequence in {limit:g} GB", title_fontsize=8, loc="lower right"
    )
    sizes = found["model"]
    figure.suptitle(
        f"A training step of a Qwen3 with {sizes['layers']} layers of {sizes['hidden']} and 151,936 columns; "
        f"{found['environment']['machine']}", fontsize=9,
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--hidden", type=int, default=256, help="of the model; a multiple of 64")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="folder for training_step.json, .md and .png")
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
    print(table(found))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "training_step.json").write_text(json.dumps(found, indent=1) + "\n")
        (arguments.out / "training_step.md").write_text(table(found))
        plot(found, arguments.out / "training_step.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
