"""Compare every backend x preset x dtype with the float64 reference on this machine: a table and an exit status.

Each figure is the largest error as a share of what the ULP rule allows (tolerance.py); above 1 the rule is broken.
Beside the errors: whether a second run gives the same bits; whether a sequence has the same bits alone and in its
batch, and in the no-grad pass for old log-probs; how far backends are from each other; and, from hidden states, the
gradients' error beside that of eager PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..calls.teacher import Teacher
from ..linear import linear_grpo_loss
from ..log_probs import token_log_probs
from ..loss import grpo_loss
from ..objectives.config import LossConfig
from ..objectives.divergence import Divergence
from ..objectives.kl import KL
from ..objectives.settings import check_name, check_seed, read_device, read_name
from ..objectives.surrogates import Clip
from ..streams import say
from . import records, reference
from .progress import progress_bar
from .tolerance import Comparison, Truth, compare, truth_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
SEQUENCES = 4
ALONE = slice(2, 4)
"""Sequences that are run again by themselves: a whole group of group_mean."""
HIDDEN = 64
ALLOWED_OF_EAGER = 2.0


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    backend: str
    preset: str
    dtype: str
    comparison: Comparison
    repeatable: bool
    invariant: bool
    """ℓ, entropy and gradient have the same bits alone, in the batch, and in the no-grad pass."""
    apart: float
    """Largest distance from a backend before it, as a share of what the rule allows the two together; shown only: it
    follows from the errors, and would lay one backend's fault at another's door."""

    @property
    def passed(self) -> bool:
        return self.comparison.holds and self.repeatable and self.invariant


@dataclass(frozen=True)
class LinearResult:
    """From hidden states: relative L2 errors of the gradients, the larger of hidden states' and weight's."""

    backend: str
    preset: str
    dtype: str
    error: float
    eager: float
    """The error of eager PyTorch that upcasts its logits to fp32."""

    @property
    def passed(self) -> bool:
        exact = 64 * torch.finfo(torch.float64).eps if self.dtype == "fp64" else 0.0  # eager is the truth itself there
        return math.isfinite(self.error) and self.error <= ALLOWED_OF_EAGER * self.eager + exact


@dataclass(frozen=True)
class Case:
    """Logits and everything beside them; old and ref are near the policy, so that ratios straddle the clip."""

    logits: Tensor
    token_ids: Tensor
    advantages: Tensor
    mask: Tensor
    options: dict[str, Any]

    def alone(self) -> Case:
        """Some of the sequences as a batch of their own."""
        known = {k: v[ALONE] if isinstance(v, Tensor) else v for k, v in self.options.items()}
        if "teacher" in known:
            known["teacher"] = Teacher(logits=self.options["teacher"].logits[ALONE])
        return Case(self.logits[ALONE], self.token_ids[ALONE], self.advantages[ALONE], self.mask[ALONE], known)


@dataclass(frozen=True)
class Run:
    loss: Tensor
    log_probs: Tensor
    entropy: Tensor
    gradient: Tensor


def make_case(
    config: LossConfig, dtype: torch.dtype, vocab: int, tokens: int, seed: int, device: str, **options: Any
) -> Case:
    """A padded batch of SEQUENCES ragged sequences, (B, T+1, V) logits, KL on, temperature 0.9."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(SEQUENCES, max(1, tokens // SEQUENCES) + 1, vocab, generator=generator)
    return case_of(logits.to(device=device, dtype=dtype), config, generator, **options)


def case_of(logits: Tensor, config: LossConfig, generator: torch.Generator, **scaling: Any) -> Case:
    device, length, vocab = logits.device, logits.shape[1] - 1, logits.shape[2]
    shape = (SEQUENCES, length)
    ids = torch.randint(vocab, shape, generator=generator).to(device)
    mask = (torch.arange(length) < torch.tensor([length, length, (length + 1) // 2, 1])[:, None]).to(device)
    scaling = {"temperature": 0.9, **scaling}
    log_probs = token_log_probs(logits.double(), ids, backend="torch", **scaling).log_probs

    def near() -> Tensor:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        spread = 3e-3 if config.pooling.pools else 0.3
        return log_probs + spread * noise

    options = {"old_log_probs": near(), "ref_log_probs": near(), "config": config, **scaling}
    advantages = torch.randn(SEQUENCES, generator=generator).to(device)
    if config.divergence is not None:
        apart = 0.3 * torch.randn(logits.shape, generator=generator)
        options["teacher"] = Teacher(logits=(logits + apart.to(device)).to(logits.dtype))
    return Case(logits, ids, advantages, mask, options)


def _scale(dtype: torch.dtype) -> float:
    """fp16 gradients need a loss scale, as in training; announcing one is also what lets them take one pass."""
    return 2.0**12 if dtype == torch.float16 else 1.0


def run(case: Case, backend: str, **options: Any) -> Run:
    real = torch.float64 if case.logits.dtype == torch.float64 else torch.float32
    known: dict[str, Any] = {k: v.to(real) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    scale = _scale(case.logits.dtype)
    leaf = case.logits.clone().requires_grad_()
    known |= {"backend": backend, "grad_scale": scale, **options}
    out = grpo_loss(leaf, case.token_ids, case.advantages, case.mask, **known)
    (out.loss * scale).backward()
    assert leaf.grad is not None
    return Run(out.loss.detach(), out.log_probs, out.entropy, leaf.grad)


def truth(case: Case) -> Truth:
    return truth_of(case.logits, case.token_ids, case.advantages, case.mask, **case.options)


def same_bits(a: Run, b: Run) -> bool:
    return all(torch.equal(x, y) for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True))


def batch_invariant(case: Case, backend: str) -> bool:
    """With one denominator for both, a sequence's figures do not depend on what is beside it."""
    whole, alone = (run(c, backend, normalizer=7.0) for c in (case, case.alone()))
    pairs = [(whole.log_probs[ALONE], alone.log_probs), (whole.entropy[ALONE], alone.entropy)]
    pairs.append((whole.gradient[ALONE], alone.gradient))
    with torch.no_grad():
        scaling = {name: case.options[name] for name in ("temperature", "logit_softcap") if name in case.options}
        old_pass = token_log_probs(case.logits, case.token_ids, case.mask, backend=backend, **scaling)
    pairs += [(whole.log_probs, old_pass.log_probs), (whole.entropy, old_pass.entropy)]
    return all(torch.equal(a, b) for a, b in pairs)


def distance(exact: Truth, a: Run, b: Run) -> float:
    """How far two runs are apart, as a share of what both may be off."""
    dtype, rows = a.gradient.dtype, exact.log_probs.shape[1]
    scale = _scale(dtype)
    both = 2 * exact.gradient_bound(dtype, scale)
    apart = (a.gradient.double() - b.gradient.double())[:, :rows].abs() / scale
    share = torch.where(exact.edge[..., None], 0.0, apart / both)
    pairs = ((a.log_probs, b.log_probs), (a.entropy, b.entropy))
    shares = [share, *((x.double() - y.double()).abs() / exact.log_prob_bound(x.dtype) / 2 for x, y in pairs)]
    return max(float(torch.nan_to_num(s, nan=torch.inf, posinf=torch.inf).max()) for s in shares)


def complete(name: str, **changes: object) -> LossConfig:
    """A preset with the lengths and groups that it needs to run on a case, a KL term and an entropy bonus."""
    changes = {"kl": KL(0.04), "entropy_coef": 0.01, **changes}
    config = LossConfig.preset(name, **changes)
    if config.aggregation == "constant":
        return LossConfig.preset(name, constant_length=64, **changes)
    if config.aggregation == "group_mean":
        return LossConfig.preset(name, group_size=2, **changes)
    return config


LONG = "long rows"
"""One more line for each dtype: a vocabulary that takes other kernels, and every option that no preset has."""
LONG_VOCAB, LONG_TOKENS = 40_000, 8
LONG_CONFIG = LossConfig(
    Clip(0.2, 0.28, dual=3.0), aggregation="token_mean", kl=KL(0.04, ratio_weighted=True), entropy_coef=0.01
)


DIVERGED = {
    "grpo+reverse_kl": complete("grpo", divergence=Divergence("reverse_kl", 0.5)),
    "forward_kl": LossConfig(None, divergence=Divergence("forward_kl")),
}
"""Lines with a divergence from a teacher: beside a policy term, and alone."""


def clear_case(
    config: LossConfig, dtype: torch.dtype, vocab: int, tokens: int, seed: int, device: str, **options: Any
) -> tuple[Case, Truth]:
    """A case, and its truth, with no ratio so near a bound that fp32 cannot tell the side."""
    for attempt in range(20):
        case = make_case(config, dtype, vocab, tokens, seed + 1000 * attempt, device, **options)
        exact = truth(case)
        if not bool(exact.edge.any()):
            break
    return case, exact


def verify(
    names: list[str], presets: list[str], dtypes: list[str], vocab: int, tokens: int, seed: int, device: str
) -> Iterator[Result]:
    for dtype in dtypes:
        for preset in (*presets, *DIVERGED, LONG):
            if preset == LONG:
                long = (LONG_CONFIG, DTYPES[dtype], LONG_VOCAB, LONG_TOKENS, seed, device)
                case, exact = clear_case(*long, logit_softcap=30.0)
            else:
                config = DIVERGED.get(preset) or complete(preset)
                case, exact = clear_case(config, DTYPES[dtype], vocab, tokens, seed, device)
            before: list[Run] = []
            for backend in names:
                first = run(case, backend)
                found = compare(exact, **dataclasses.asdict(first), grad_scale=_scale(DTYPES[dtype]))
                apart = max((distance(exact, first, other) for other in before), default=0.0)
                repeatable = same_bits(first, run(case, backend))
                yield Result(backend, preset, dtype, found, repeatable, batch_invariant(case, backend), apart)
                before.append(first)


@dataclass(frozen=True)
class LinearCase:
    """A case whose logits are hidden states times a weight."""

    hidden: Tensor
    weight: Tensor
    rest: Case
    """Its logits are not read, nor its teacher's."""
    teacher: tuple[Tensor, Tensor] | None
    """Hidden states and weight of a teacher."""

    def gradients(self, dtype: torch.dtype, backend: str | None) -> tuple[Tensor, ...]:
        """Of hidden states and weight; without a backend eager PyTorch that upcasts its logits to fp32."""
        hidden, weight = (leaf.detach().to(dtype).requires_grad_() for leaf in (self.hidden, self.weight))
        arguments = (self.rest.token_ids, self.rest.advantages, self.rest.mask)
        options, taught = dict(self.rest.options), None
        if self.teacher is not None:
            taught = tuple(tensor.to(dtype) for tensor in self.teacher)
        if backend is not None:
            if taught is not None:
                options["teacher"] = Teacher(hidden=taught[0], weight=taught[1])
            loss = linear_grpo_loss(hidden, weight, *arguments, backend=backend, **options).loss
        else:
            if taught is not None:
                options["teacher"] = Teacher(logits=_upcast(*taught))
            loss = reference.grpo_loss(_upcast(hidden, weight), *arguments, **options).loss
        return torch.autograd.grad(loss, (hidden, weight))


def _upcast(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return logits of half precision in fp32."""
    logits = torch.nn.functional.linear(hidden, weight)
    return logits if logits.dtype == torch.float64 else logits.float()


def make_linear_case(
    config: LossConfig, dtype: torch.dtype, vocab: int, tokens: int, seed: int, device: str
) -> LinearCase:
    """Hidden states of size HIDDEN, logits of the spread of make_case's; a teacher's states are half as many again."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(width: int) -> tuple[Tensor, Tensor]:
        hidden = torch.randn(SEQUENCES, tokens // SEQUENCES + 1, width, generator=generator)
        weight = 3 * width**-0.5 * torch.randn(vocab, width, generator=generator)
        return hidden.to(device=device, dtype=dtype), weight.to(device=device, dtype=dtype)

    hidden, weight = drawn(HIDDEN)
    logits = torch.nn.functional.linear(hidden.double(), weight.double())
    rest = case_of(logits, config, generator)
    return LinearCase(hidden, weight, rest, None if config.divergence is None else drawn(HIDDEN * 3 // 2))


LINEAR = ("grpo", "grpo+reverse_kl")


def verify_linear(
    names: list[str], dtypes: list[str], vocab: int, tokens: int, seed: int, device: str
) -> Iterator[LinearResult]:
    for name in dtypes:
        dtype = DTYPES[name]
        for preset in LINEAR:
            config = DIVERGED.get(preset) or complete(preset)
            case = make_linear_case(config, dtype, vocab, tokens, seed, device)
            exact = case.gradients(torch.float64, None)
            eager = _error(case.gradients(dtype, None), exact)
            for backend in names:
                yield LinearResult(backend, preset, name, _error(case.gradients(dtype, backend), exact), eager)


def _error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Return the larger relative error; 0 for a gradient that is rightly 0 throughout, as with a single column."""
    apart = [(float((a.double() - b).norm()), float(b.norm())) for a, b in zip(found, exact, strict=True)]
    return max(0.0 if error == 0 else error / size if size > 0 else math.inf for error, size in apart)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", action="append", help=f"one of {', '.join(DTYPES)}; repeatable (default: all)")
    parser.add_argument("--preset", action="append", help="repeatable (default: all)")
    parser.add_argument("--backend", action="append", help="repeatable (default: all that are usable)")
    parser.add_argument("--vocab", type=int, default=4097, metavar="V", help="vocabulary size (default: 4097)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens in a case (default: 64)")
    parser.add_argument("--seed", type=int, default=0)


def main(arguments: argparse.Namespace) -> int:
    known = LossConfig.presets()
    presets = [read_name("--preset", name, known) for name in arguments.preset or known]
    dtypes = arguments.dtype or list(DTYPES)
    for name in dtypes:
        check_name("--dtype", name, DTYPES)
    for option, value, least in (("--vocab", arguments.vocab, 1), ("--tokens", arguments.tokens, SEQUENCES)):
        if value < least:
            raise ValueError(f"{option} must be at least {least}; got {value}.")
    check_seed("--seed", arguments.seed)
    read_device("--device", arguments.device)
    check_memory(arguments.vocab, arguments.tokens, arguments.device)
    usable = _usable(arguments.device, arguments.backend)
    if not usable:
        say("no backend to verify")
        return 1
    what = (dtypes, arguments.vocab, arguments.tokens, arguments.seed, arguments.device)
    results: list[Result] = []
    linear: list[LinearResult] = []
    total = len(usable) * len(dtypes) * (len(presets) + len(DIVERGED) + 1 + len(LINEAR))
    bar = progress_bar(total, "verify", "check")
    try:
        for result in verify(usable, presets, *what):
            results.append(result)
            bar.update()
        for found in verify_linear(usable, *what):
            linear.append(found)
            bar.update()
    except KeyboardInterrupt:
        bar.close()
        print(f"{table(results)}\n\ninterrupted after {len(results) + len(linear)} of {total} checks")
        return 130
    bar.close()
    print(table(results))
    print()
    print(linear_table(linear))
    everything: list[Result | LinearResult] = [*results, *linear]
    broken = sum(not r.passed for r in everything)
    print(f"\n{len(everything) - broken} of {len(everything)} hold" + (f"; {broken} BROKEN" if broken else ""))
    if usable == ["torch"] and not arguments.backend:
        print(f"plain PyTorch alone: no compiled kernels serve {arguments.device} here, for the reasons above")
    records.write(arguments.device, sorted({r.backend for r in results}), len(everything), broken)
    return 1 if broken else 0


BYTES_PER_ELEMENT = 110
"""Peak of the float64 comparison; 102 measured with --vocab 151936 --tokens 64 --preset grpo --dtype bf16."""


def check_memory(vocab: int, tokens: int, device: str) -> None:
    """Raise before anything is allocated if the float64 comparison does not fit the device."""
    need, there = BYTES_PER_ELEMENT * vocab * (tokens + SEQUENCES), records.free_memory(device)
    if there is not None and need > there:
        raise ValueError(
            f"--vocab {vocab} x --tokens {tokens} would take about {need / 1e9:.1f} GB for the float64 comparison; "
            f"{there / 1e9:.1f} GB are free. --tokens {max(SEQUENCES, int(tokens * there / need / 2))} fits."
        )


def _usable(device: str, asked: list[str] | None) -> list[str]:
    """Backends that serve this device; one that was asked for and does not is an error."""
    usable = []
    backends.check_not_switched("verify compares backends by name")
    for name in asked or backends.names():
        check_name("--backend", name, backends.names())
        if asked:
            backends.check_serves("--backend", name, device)
            usable.append(name)
        elif (reason := backends.unsupported(name, device)) is None:
            usable.append(name)
        else:
            say(f"left out {name}: {reason}")
    return usable


def table(results: list[Result]) -> str:
    """One line for each backend, preset and dtype; errors as shares of what the rule allows."""
    lines = [
        "largest error / what the ULP rule allows (> 1: broken); ulps: largest gradient error in last places;",
        "same bits: in a second run / alone, in the batch and in the old pass; apart: from other backends, of twice",
        "what the rule allows",
        "",
        f"{'dtype':<5} {'preset':<15} {'backend':<8} {'log-prob':>8} {'entropy':>8} {'loss':>8} {'gradient':>8} "
        f"{'ulps':>6}  {'same bits':<9} {'apart':>6}",
    ]
    for r in results:
        c = r.comparison
        bits = f"{'yes' if r.repeatable else 'NO'} / {'yes' if r.invariant else 'NO'}"
        lines.append(
            f"{r.dtype:<5} {r.preset:<15} {r.backend:<8} {c.log_prob:8.3f} {c.entropy:8.3f} {c.loss:8.3f} "
            f"{c.gradient:8.3f} {c.gradient_ulps:6.2f}  {bits:<9} {r.apart:6.3f}" + ("" if r.passed else " BROKEN")
        )
    return "\n".join(lines)


def linear_table(results: list[LinearResult]) -> str:
    lines = [f"from hidden states: error of the gradients, of eager PyTorch's, ratio (allowed: {ALLOWED_OF_EAGER:g} x)"]
    for r in results:
        share = f"{r.error / r.eager:.2f} x" if r.eager else ""
        lines.append(
            f"{r.dtype:<5} {r.preset:<15} {r.backend:<8} {r.error:8.1e} {r.eager:8.1e} {share:>8}"
            + ("" if r.passed else " BROKEN")
        )
    return "\n".join(lines)
