"""Compare every backend x preset x dtype with the float64 reference on this machine: a table and an exit status.

Each figure is the largest error as a share of what the ULP rule allows (tolerance.py); above 1 the rule is broken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends
from .checks import check_device_name
from .config import KL, LossConfig, check_name
from .log_probs import token_log_probs
from .loss import grpo_loss
from .tolerance import Comparison, compare, truth_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
SEQUENCES = 4


@dataclass(frozen=True)
class Result:
    backend: str
    preset: str
    dtype: str
    comparison: Comparison
    repeatable: bool

    @property
    def passed(self) -> bool:
        return self.comparison.holds and self.repeatable


@dataclass(frozen=True)
class Case:
    """Logits and everything beside them; old and ref are near the policy, so that ratios straddle the clip."""

    logits: Tensor
    token_ids: Tensor
    advantages: Tensor
    mask: Tensor
    options: dict[str, Any]


def make_case(config: LossConfig, dtype: torch.dtype, vocab: int, tokens: int, seed: int, device: str) -> Case:
    """A padded batch of SEQUENCES ragged sequences, (B, T+1, V) logits, KL on, temperature 0.9."""
    generator = torch.Generator().manual_seed(seed)
    length = max(1, tokens // SEQUENCES)
    shape = (SEQUENCES, length)
    logits = (3 * torch.randn(SEQUENCES, length + 1, vocab, generator=generator)).to(device=device, dtype=dtype)
    ids = torch.randint(vocab, shape, generator=generator).to(device)
    mask = (torch.arange(length) < torch.tensor([length, length, (length + 1) // 2, 1])[:, None]).to(device)
    log_probs = token_log_probs(logits.double(), ids, temperature=0.9, backend="torch").log_probs

    def near() -> Tensor:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        spread = 0.3 if config.level == "token" else 3e-3
        return log_probs + spread * noise

    options = {"old_log_probs": near(), "ref_log_probs": near(), "temperature": 0.9, "config": config}
    advantages = torch.randn(SEQUENCES, generator=generator).to(device)
    return Case(logits, ids, advantages, mask, options)


def run_case(case: Case, backend: str) -> tuple[Comparison, bool]:
    """The comparison, and whether a second run gives the same bits."""
    truth = truth_of(case.logits, case.token_ids, case.advantages, case.mask, **case.options)
    real = torch.float64 if case.logits.dtype == torch.float64 else torch.float32
    options: dict[str, Any] = {k: v.to(real) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    # fp16 gradients need a loss scale, as in training; announcing one is also what lets them take one pass.
    scale = 2.0**12 if case.logits.dtype == torch.float16 else 1.0
    runs = []
    for _ in range(2):
        leaf = case.logits.clone().requires_grad_()
        out = grpo_loss(leaf, case.token_ids, case.advantages, case.mask, backend=backend, grad_scale=scale, **options)
        (out.loss * scale).backward()
        assert leaf.grad is not None
        runs.append((out.loss.detach(), out.log_probs, out.entropy, leaf.grad))
    repeatable = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    return compare(truth, *runs[0], grad_scale=scale), repeatable


def complete(name: str, **changes: object) -> LossConfig:
    """A preset with the lengths and groups that it needs to run on a case, and a KL term."""
    config = LossConfig.preset(name, kl=KL(0.04), **changes)
    if config.aggregation == "constant":
        return LossConfig.preset(name, kl=KL(0.04), constant_length=64, **changes)
    if config.aggregation == "group_mean":
        return LossConfig.preset(name, kl=KL(0.04), group_size=2, **changes)
    return config


def verify(
    names: list[str], presets: list[str], dtypes: list[str], vocab: int, tokens: int, seed: int, device: str
) -> Iterator[Result]:
    for backend in names:
        for dtype in dtypes:
            for preset in presets:
                case = make_case(complete(preset), DTYPES[dtype], vocab, tokens, seed, device)
                yield Result(backend, preset, dtype, *run_case(case, backend))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", action="append", help=f"one of {', '.join(DTYPES)}; repeatable (default: all)")
    parser.add_argument("--preset", action="append", help="repeatable (default: all)")
    parser.add_argument("--backend", action="append", help="repeatable (default: all that are usable)")
    parser.add_argument("--vocab", type=int, default=4097, metavar="V", help="vocabulary size (default: 4097)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens in a case (default: 64)")
    parser.add_argument("--seed", type=int, default=0)


def main(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    presets = arguments.preset or list(LossConfig.presets())
    dtypes = arguments.dtype or list(DTYPES)
    for kind, given, allowed in (("--preset", presets, LossConfig.presets()), ("--dtype", dtypes, DTYPES)):
        for name in given:
            check_name(kind, name, allowed)
    if arguments.vocab < 1 or arguments.tokens < SEQUENCES:
        raise ValueError(f"--vocab must be at least 1 and --tokens at least {SEQUENCES}.")
    check_device_name("--device", arguments.device)
    usable = _usable(arguments.device, arguments.backend)
    if not usable:
        print("no backend to verify", file=sys.stderr)
        return 1
    results = list(
        tqdm(
            verify(usable, presets, dtypes, arguments.vocab, arguments.tokens, arguments.seed, arguments.device),
            total=len(usable) * len(presets) * len(dtypes),
            desc="verify",
            file=sys.stderr,
            leave=False,
        )
    )
    print(table(results))
    broken = [r for r in results if not r.passed]
    print(f"\n{len(results) - len(broken)} of {len(results)} hold" + (f"; {len(broken)} BROKEN" if broken else ""))
    return 1 if broken else 0


def _usable(device: str, asked: list[str] | None) -> list[str]:
    """Backends that serve this device; one that was asked for and does not is an error."""
    usable = []
    for name in asked or backends.names():
        check_name("--backend", name, backends.names())
        reason = backends.get(name).unsupported(backends.Request(torch.device(device)))
        if reason is None:
            usable.append(name)
        elif asked:
            raise ValueError(f"--backend {name} cannot serve {device}: {reason}")
        else:
            print(f"left out {name}: {reason}", file=sys.stderr)
    return usable


def table(results: list[Result]) -> str:
    """One line for each backend, preset and dtype; errors as shares of what the rule allows."""
    lines = [
        "largest error / what the ULP rule allows (> 1: broken); ulps: largest gradient error in last places",
        f"{'backend':<8} {'preset':<11} {'dtype':<5} {'log-prob':>9} {'entropy':>9} {'loss':>9} {'gradient':>9} "
        f"{'ulps':>6}  {'same bits':<9}",
    ]
    for r in results:
        c = r.comparison
        verdict = "yes" if r.repeatable else "NO"
        lines.append(
            f"{r.backend:<8} {r.preset:<11} {r.dtype:<5} {c.log_prob:9.3f} {c.entropy:9.3f} {c.loss:9.3f} "
            f"{c.gradient:9.3f} {c.gradient_ulps:6.2f}  {verdict:<9}" + ("" if r.passed else " BROKEN")
        )
    return "\n".join(lines)
