"""One case: which kernel runs on what, in which layout, and every way in which its outputs are wrong beside fp64."""

from __future__ import annotations

import math
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo_kernels.backends.contract import (
    DivergenceStats,
    RowGradients,
    Rows,
    RowStats,
    TokenInputs,
    TokenRecords,
    TokenValues,
)
from grpo_kernels.backends.spec import NUMBERS, ObjectiveSpec
from grpo_kernels.objectives.divergence import KINDS
from grpo_kernels.objectives.metrics import FIELDS

from . import arithmetic, launches

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP64: "fp64"}
ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 0.0, FP64: 0.0}
SPEC = ObjectiveSpec(2, 3, 0, 0, 0, 2, 0, 0)
"""A clip with k3 to the reference, and k2 to the sampler, for which old log-probs stand."""
GRAD_SCALE = 0.5
MIX = 0.375
"""Of divergences."""
STATS = ("log_prob", "entropy", "anchor", "log_sum")


@dataclass(frozen=True)
class Case:
    backend: str
    what: str  # a method of Run
    dtype: torch.dtype
    vocab: int
    plan: tuple[int, int, int] | None = None  # cluster, clusters, tiles; None: the backend's own
    seed: int = 0
    entropy: bool = False
    cap: float = 0.0
    per_row: bool = False  # a temperature for each row
    kind: str = ""  # of a divergence from a teacher
    teacher: torch.dtype = FP32
    skew: int = 0  # elements by which rows are off 16 bytes
    out: str = "own"  # "in" place, "own" tensor, "odd": aligned otherwise than the logits
    rows: tuple[int, int] = (2, 3)
    processors: int = launches.PROCESSORS
    perturbed: bool = False  # approximations err
    races: bool = False

    def __str__(self) -> str:
        parts = [self.backend, self.what, NAMES[self.dtype], str(self.vocab)]
        parts += [self.kind, f"from-{NAMES[self.teacher]}"] if self.kind else []
        parts += [f"plan{self.plan}".replace(" ", "")] if self.plan else []
        parts += [f"processors{self.processors}"] if self.processors != launches.PROCESSORS else []
        parts += [word for word in ("entropy", "cap", "per_row", "perturbed", "races") if getattr(self, word)]
        rows = f"rows{self.rows}".replace(" ", "")
        return " ".join([*parts, f"skew{self.skew}", f"out-{self.out}", rows, f"seed{self.seed}"])


def placed(shape: tuple[int, int, int], dtype: torch.dtype, skew: int) -> tuple[Tensor, Tensor]:
    """A (B, T, V) tensor whose rows begin ``skew`` elements, then others, off 16 bytes; and all of its memory."""
    batch, length, vocab = shape
    wide = 16 // dtype.itemsize
    pitch = -(-vocab // wide) * wide + (skew & -skew)  # 8-byte rows stay such
    memory = torch.full((skew + batch * (length + 1) * pitch + 64,), 7.0, dtype=dtype)  # a row more in each batch
    start = -(memory.data_ptr() // dtype.itemsize) % wide + skew
    return memory.as_strided(shape, ((length + 1) * pitch, pitch, 1), start), memory


def drawn(case: Case) -> dict[str, Tensor]:
    """Rows that bite: dead, confident, far below the largest, with -inf blocks, sampled at ends and tile bounds."""
    g = torch.Generator().manual_seed(1000 + case.vocab + case.rows[1])
    shape, count, vocab = case.rows, math.prod(case.rows), case.vocab
    values = 2 * torch.randn(count, vocab, generator=g)
    ids = torch.randint(vocab, (count,), generator=g)
    ids[0], ids[count - 1] = vocab - 1, 0
    live = torch.ones(count, dtype=torch.bool)
    slopes = torch.randn(2, count, generator=g)
    if count > 4:
        live[1] = False
        values[2, ids[2]] += 40  # confident
        values[3, : vocab // 2] = -math.inf
        values[3, vocab - 1] = 3.0
        ids[3] = vocab - 1
        values[4, ids[4]] -= 200 / max(1.0, 2 * case.cap)  # sums overflow relative to it
    if count > 5:
        slopes[:, 5] = 0
    if count > 6:
        ids[6] = min(vocab - 1, 8192)
        values[6] = -math.inf
        values[6, ids[6]] = 1.0
    if count > 8 and (case.what == "log_probs" or case.kind):  # nothing is possible, and a NaN besides
        values[7:9] = -math.inf
        values[8, vocab // 2] = math.nan
    logits, memory = placed((*shape, vocab), case.dtype, case.skew)
    logits.copy_(values.view(*shape, vocab))
    real = FP64 if case.dtype == FP64 else FP32
    chosen = {"temperature": 1.25, "logit_scale": 0.75, "logit_softcap": case.cap, "grad_scale": GRAD_SCALE}
    chosen |= {"kl_ratio_cap": 10.0, "rollout_low": 0.0, "entropy_threshold": -math.inf, "divergence_mix": MIX}
    numbers = [*(chosen.get(name, math.inf) for name in NUMBERS), 0.8, 1.2, math.inf]  # the last of clip
    data = {"logits": logits, "memory": memory, "ids": ids.view(shape), "live": live.view(shape)}
    data |= {"numbers": torch.tensor(numbers + [0.0] * 5, dtype=real)}
    data |= {"g": slopes[0].view(shape).to(real), "h": slopes[1].view(shape).to(real)}
    data["advantage"] = torch.randn(shape, generator=g).to(real)
    weights = ("policy", "kl", "entropy", "rollout_kl")
    data |= {f"{name}_weight": torch.rand(shape, generator=g).to(real) for name in weights}
    if case.kind:
        data |= _teacher(case, values.view(*shape, vocab), data, g)
    if case.per_row:
        data["temperature"] = torch.where(data["live"], 0.5 + torch.rand(shape, generator=g), math.nan).to(real)
    return data | {"noise": (0.4 * torch.randn(2, *shape, generator=g)).to(real)}


def _teacher(case: Case, values: Tensor, data: dict[str, Tensor], g: torch.Generator) -> dict[str, Tensor]:
    """Rows near the policy's; in the last one a column is impossible, in the one before nothing differs."""
    logits, _ = placed(tuple(values.shape), case.teacher, case.skew)
    logits.copy_(values + 0.5 * torch.randn(values.shape, generator=g))
    logits[-1, -1, 0] = -math.inf
    if case.teacher == case.dtype:
        logits[-1, -2] = data["logits"][-1, -2]
    weight = torch.randn(case.rows, generator=g).to(data["numbers"].dtype)
    weight[0, 0] = 0
    return {"teacher": logits, "weight": weight}


def flat(tensor: Tensor) -> Any:
    """As fp64 numpy, row after row."""
    return tensor.double().numpy().ravel()


class Truth:
    """A row's statistics, in fp64: arrays over the rows; ``y`` are the values of which they are a softmax's."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        x = data["logits"].double().numpy().reshape(-1, data["logits"].shape[-1])
        temperature, scale, cap = flat(data["numbers"])[:3]
        if "temperature" in data:
            temperature = np.where(flat(data["live"]), flat(data["temperature"]), 1)
        temperature = np.broadcast_to(temperature, len(x))
        self.ids, rows = data["ids"].numpy().ravel(), np.arange(len(x))
        inner = np.tanh(x * scale / cap) if cap else x
        self.factor = (1 if cap else scale) / temperature
        self.y = (cap * inner if cap else x) * self.factor[:, None]
        self.chain = (scale / temperature)[:, None] * ((1 - inner * inner) if cap else np.ones_like(x))
        largest = self.y.max(1)
        self.anchor, self.log_sum = largest / self.factor, np.log(np.exp(self.y - largest[:, None]).sum(1))
        self.lse = largest + self.log_sum
        p = np.exp(self.y - self.lse[:, None])
        self.entropy = self.lse - np.where(p > 0, p * np.where(p > 0, self.y, 0), 0).sum(1)
        self.log_prob = self.y[rows, self.ids] - self.lse

    def gradient(self, g: Any, h: Any) -> Any:
        """Of sum(g * log_prob + h * entropy), with respect to the logits."""
        log_p = self.y - self.lse[:, None]
        p = np.exp(log_p)
        one = np.zeros_like(p)
        one[np.arange(len(self.ids)), self.ids] = 1
        part = np.where(p > 0, p * (np.where(p > 0, log_p, 0) + self.entropy[:, None]), 0)
        return (g[:, None] * (one - p) - h[:, None] * part) * self.chain


def diverged(kind: str, y: Any, u: Any, mix: float) -> tuple[Any, Any]:
    """A divergence of softmax(y) from softmax(u), in fp64, and its gradient in y; NaN where D is infinite and has
    none."""
    y, u = (values - np.where(np.isinf(top := values.max(1, keepdims=True)), np.nan, top) for values in (y, u))
    y, u = (values - np.log(np.exp(values).sum(1, keepdims=True)) for values in (y, u))
    p, q = np.exp(y), np.exp(u)

    def kl(a: Any, log_a: Any, log_b: Any) -> Any:
        return np.where(a == 0, 0, a * np.where(a == 0, 0, log_a - log_b)).sum(1)

    share = {"jsd": 1 - mix, "skew_forward_kl": 1 - mix}.get(kind, mix)  # of p
    m = np.logaddexp(y + np.log(share), u + np.log(1 - share))
    d, s, odds, zero = y - u, y - m, np.exp(y - m), np.zeros_like(y)
    forward, reverse = (kl(q, u, y), p - q, zero), (kl(p, y, u), zero, d)
    value, own, slope = {
        "forward_kl": forward,
        "reverse_kl": reverse,
        "mixed_kl": tuple(mix * a + (1 - mix) * b for a, b in zip(forward, reverse, strict=True)),
        "jsd": (mix * kl(q, u, m) + (1 - mix) * kl(p, y, m), zero, (1 - mix) * s),
        "skew_forward_kl": (kl(q, u, m), zero, -(1 - mix) * np.exp(u - m)),
        "skew_reverse_kl": (kl(p, y, m), zero, s - mix * odds),
        "tvd": (np.abs(p - q).sum(1) / 2, zero, np.sign(d) / 2),
    }[kind]
    mean = np.where(p == 0, 0, p * slope).sum(1, keepdims=True)
    gradient = own + np.where(p == 0, 0, p * (slope - mean))
    return value, gradient + 0 * value[:, None] if kind != "forward_kl" else gradient


class Run:
    """A case executed: ``wrong`` says what is, ``outputs`` and ``machine`` are there to be looked at."""

    def __init__(self, case: Case, traced: int = sys.maxsize) -> None:
        self.case, self.wrong = case, []
        self.data = drawn(case)
        self.truth = Truth(self.data)
        self.live = self.data["live"].numpy().ravel()
        self.executor = launches.Executor(case.seed, case.races, traced)
        self.machine = self.executor.machine
        self.outputs: dict[str, Tensor] = {}
        arithmetic.PERTURBED = case.perturbed
        try:
            getattr(self, case.what)()
        except launches.CompileError:
            raise
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            self.wrong.append(f"{type(error).__name__} ({Path(last.filename).name}:{last.lineno}): {error}")
        self.wrong += [f"{text} ({times} times)" for text, times in self.machine.findings.items()]

    def _rows(self) -> Rows:
        for name, tensor in self.data.items():
            if name not in ("memory", "noise"):
                launches.map_tensor(self.executor.memory, name, tensor)
        d = self.data
        return Rows(d["logits"], d["ids"], d["live"], d["numbers"], self.case.cap > 0, d.get("temperature"))

    def _backend(self) -> Any:
        case = self.case
        return self.executor.cuda(case.plan) if case.backend == "cuda" else self.executor.triton(case.processors)

    def _mapped(self, name: str, tensor: Tensor) -> Tensor:
        launches.map_tensor(self.executor.memory, name, tensor)
        return tensor

    def _output(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """(B, T) of sevens."""
        d = self.data
        tensor = torch.full(d["ids"].shape, 7.0, dtype=dtype or d["numbers"].dtype)
        self.outputs[name] = self._mapped(name, tensor)
        return tensor

    def _known(self, *names: str) -> list[Tensor]:
        """Statistics as an earlier pass left them, NaN where nobody may look."""
        for name in names:
            values = np.where(self.live, getattr(self.truth, name), math.nan).reshape(self.case.rows)
            self._output(name).copy_(torch.from_numpy(values))
        return [self.outputs[name] for name in names]

    def _others(self) -> tuple[Tensor, Tensor]:
        """Old and reference log-probs: the policy's plus noise."""
        exact = np.where(self.live & np.isfinite(self.truth.log_prob), self.truth.log_prob, 0)
        exact, d = torch.from_numpy(exact).view(self.case.rows), self.data
        for name, noise in zip(("old", "ref"), d["noise"], strict=True):
            d[name] = self._mapped(name, (exact + noise).to(d["numbers"].dtype))
        return d["old"], d["ref"]

    def _out(self) -> Tensor:
        """Where the gradient goes; ``gaps`` is the memory around it, of sevens."""
        case, d = self.case, self.data
        if case.out == "in":
            self.gaps = d["memory"]
            return d["logits"]
        skew = (case.skew + 1) % 8 if case.out == "odd" else case.skew
        tensor, self.gaps = placed(tuple(d["logits"].shape), case.dtype, skew)
        return self._mapped("out", tensor)

    def _pairs(self) -> tuple[Rows, RowStats, Rows, RowStats, int]:
        """Both rows, and their statistics as the kernels of log-probs leave them: relative to the sampled token, where
        it is not too far from the largest."""
        rows, d = self._rows(), self.data
        teacher = Rows(d["teacher"], d["ids"], d["live"], d["numbers"], self.case.cap > 0, d.get("temperature"))
        stats = [self._sampled_stats("", self.truth), self._sampled_stats("teacher_", self._teacher_truth())]
        return rows, stats[0], teacher, stats[1], list(KINDS).index(self.case.kind)

    def _teacher_truth(self) -> Truth:
        return Truth(self.data | {"logits": self.data["teacher"]})

    def _sampled_stats(self, prefix: str, truth: Truth) -> RowStats:
        near = truth.log_prob > -60
        value = truth.y[np.arange(len(truth.ids)), truth.ids]
        found = {name: getattr(truth, name) for name in STATS}
        found["anchor"] = np.where(near, value / truth.factor, truth.anchor)
        found["log_sum"] = np.where(near, truth.lse - value, truth.log_sum)
        for name, values in found.items():
            values = np.where(self.live, values, math.nan).reshape(self.case.rows)
            self._output(prefix + name).copy_(torch.from_numpy(values))
        return RowStats(*(self.outputs[prefix + name] for name in STATS))

    def _diverged(self) -> tuple[Any, Any]:
        teacher = self._teacher_truth()
        return diverged(self.case.kind, self.truth.y, teacher.y, MIX)

    # Comparisons.

    def _compare(self, name: str, found: Any, wanted: Any, relative: float, absolute: Any) -> None:
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        same = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
        fine = same | (np.abs(found - wanted) <= absolute + relative * np.abs(wanted))
        if not fine.all():
            at = tuple(np.argwhere(~fine)[0].tolist())
            count = int((~fine).sum())
            self.wrong.append(f"{name}: {count} differ, first at {at}: {found[at]!r} is not {wanted[at]!r}")

    def _check_stats(self) -> None:
        """The anchor may be any origin, but -inf where no column is possible alone; with the sum it makes the
        log-sum-exp."""
        found = {name: flat(self.outputs[name]) for name in STATS}
        found["lse"] = found["anchor"] * self.truth.factor + found["log_sum"]
        impossible = self.live & np.isneginf(self.truth.y).all(1)
        self._compare("impossible rows", np.isneginf(found["anchor"]), impossible, 0, 0)
        tolerance = (1e-12, 1e-11) if self.case.dtype == FP64 else (1.5e-6, 8e-6)
        for name in ("log_prob", "entropy", "lse"):
            self._compare(name, found[name], np.where(self.live, getattr(self.truth, name), 0), *tolerance)

    def _check_gradient(self, out: Tensor, g: Any, h: Any, slack: Any = 0.0) -> None:
        wanted = np.where(self.live[:, None], self.truth.gradient(g, h), 0)
        wanted[(g == 0) & (h == 0)] = 0
        self._compare_gradient(out, wanted, slack)

    def _slope_errors(self) -> Any:
        """What rounding of ℓ, which may be -200, makes of the slopes of both KLs, (rows, 1); fp64 has its own."""
        if self.case.dtype == FP64:
            return 0.0
        weight = np.abs(flat(self.data["kl_weight"])) + np.abs(flat(self.data["rollout_kl_weight"]))
        size = np.nan_to_num(np.abs(self.truth.log_prob), nan=0.0, posinf=0.0)
        return (4 * 2.0**-24 * GRAD_SCALE * weight * size)[:, None]

    def _compare_gradient(self, out: Tensor, wanted: Any, slack: Any = 0.0) -> None:
        dtype = self.case.dtype
        real = 1e-11 if dtype == FP64 else 6e-5
        size = 2.0**-14 if dtype == FP16 else float(np.nanmax(np.abs(wanted)))
        absolute = max(size * 2e-6, 2e-7) * real / 6e-5 + (2.0**-24 if dtype == FP16 else 0)
        found = out.double().numpy().reshape(len(self.live), -1)
        self._compare("gradient", found, wanted, 1.02 * ROUNDING[dtype] + real, absolute + slack)
        gaps = torch.ones_like(self.gaps, dtype=torch.bool)
        start = (out.data_ptr() - self.gaps.data_ptr()) // out.element_size()
        torch.as_strided(gaps, out.shape, out.stride(), start).fill_(False)
        if not (self.gaps[gaps] == 7).all():
            self.wrong.append("elements between rows were written")

    def _terms(self) -> tuple[Any, Any, Any, Any]:
        """Policy term, both KL terms and slope of SPEC, from the papers."""
        names = ("advantage", "policy_weight", "old", "ref", "kl_weight", "rollout_kl_weight")
        d = {name: flat(self.data[name]) for name in names}
        log_prob, a = self.truth.log_prob, d["advantage"]
        ratio, away = np.exp(log_prob - d["old"]), d["ref"] - log_prob
        policy = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
        stopped = ((a > 0) & (ratio > 1.2)) | ((a < 0) & (ratio < 0.8))
        slope = d["policy_weight"] * np.where(stopped, 0, -ratio * a) + d["kl_weight"] * (1 - np.exp(away))
        moved = log_prob - d["old"]
        return policy, np.exp(away) - away - 1, moved**2 / 2, slope + d["rollout_kl_weight"] * moved

    def _records(self) -> TokenRecords:
        real = [self._output(name) for name in ("policy", "kl")]
        flags, of_sampler = self._output("flags", torch.uint8), self._output("rollout_kl")
        return TokenRecords(*real, flags, of_sampler.new_empty(0), of_sampler)

    # What is run.

    def log_probs(self) -> None:
        rows, stats = self._rows(), RowStats(*[self._output(name) for name in STATS])
        with self._backend() as backend:
            backend.log_probs(rows, stats)
        self._check_stats()

    def backward(self) -> None:
        rows, stats, out, d = self._rows(), RowStats(*self._known(*STATS)), self._out(), self.data
        g, h = d["g"], d["h"] if self.case.entropy else None
        with self._backend() as backend:
            backend.log_probs_backward(rows, stats, RowGradients(g, h), out)
        self._check_gradient(out, flat(g), flat(g if h is None else h) * (h is not None))

    def fused(self) -> None:
        rows, (old, ref), d = self._rows(), self._others(), self.data
        stats, records, out = RowStats(*[self._output(name) for name in STATS]), self._records(), self._out()
        weight = d["entropy_weight"] if self.case.entropy else None
        with self._backend() as backend:
            weights = (d["kl_weight"], weight, d["rollout_kl_weight"])
            inputs = TokenInputs(d["advantage"], d["policy_weight"], old, ref, None, *weights)
            backend.fused_loss(rows, inputs, SPEC, stats, records, out)
        self._check_stats()
        policy, kl, rollout_kl, slope = self._terms()
        self._compare("policy", flat(self.outputs["policy"]), np.where(self.live, policy, 0), 2e-5, 1e-6)
        self._compare("kl", flat(self.outputs["kl"]), np.where(self.live, kl, 0), 1e-4, 2e-5)
        self._compare("rollout_kl", flat(self.outputs["rollout_kl"]), np.where(self.live, rollout_kl, 0), 1e-4, 2e-5)
        h = 0 * slope if weight is None else -GRAD_SCALE * flat(weight)
        self._check_gradient(out, GRAD_SCALE * slope, h, self._slope_errors())

    def divergence(self) -> None:
        pairs = self._pairs()
        found = DivergenceStats(*[self._output(name) for name in DivergenceStats._fields])
        with self._backend() as backend:
            backend.divergence(*pairs, found)
        wanted = np.where(self.live, self._diverged()[0], 0)
        tolerance = (1e-11, 1e-13) if self.case.dtype == FP64 else (6e-6, 1e-8)
        self._compare("divergence", flat(found.divergence), wanted, *tolerance)

    def divergence_backward(self) -> None:
        """Of what the forward kernel has found."""
        pairs, out, d = self._pairs(), self._out(), self.data
        found = DivergenceStats(*[self._output(name) for name in DivergenceStats._fields])
        g, h = d["g"], d["h"] if self.case.entropy else None
        with self._backend() as backend:
            backend.divergence(*pairs, found)
            backend.divergence_backward(*pairs, found, RowGradients(g, h), d["weight"], out)
        weight = flat(d["weight"])[:, None]
        of_divergence = np.where(weight == 0, 0, weight * self._diverged()[1] * self.truth.chain)
        of_token = self.truth.gradient(flat(g), flat(g if h is None else h) * (h is not None))
        idle = (flat(g) == 0) & (True if h is None else flat(h) == 0)
        wanted = np.where(idle[:, None], 0, of_token) + of_divergence
        self._compare_gradient(out, np.where(self.live[:, None], wanted, 0))

    def fused_divergence(self) -> None:
        """``fused`` with the divergence in the loss; statistics of both rows."""
        rows, (old, ref), d = self._rows(), self._others(), self.data
        teacher = Rows(d["teacher"], d["ids"], d["live"], d["numbers"], self.case.cap > 0, d.get("temperature"))
        stats, theirs = (RowStats(*[self._output(whose + name) for name in STATS]) for whose in ("", "teacher_"))
        found = DivergenceStats(*[self._output(name) for name in DivergenceStats._fields])
        records, out = self._records(), self._out()
        entropy_weight = d["entropy_weight"] if self.case.entropy else None
        weights = (d["kl_weight"], entropy_weight, d["rollout_kl_weight"])
        inputs = TokenInputs(d["advantage"], d["policy_weight"], old, ref, None, *weights)
        known = rows, teacher, list(KINDS).index(self.case.kind), inputs, d["weight"], SPEC
        with self._backend() as backend:
            backend.fused_divergence(*known, stats, theirs, found, records, out)
        self._check_stats()
        entropy = np.where(self.live, self._teacher_truth().entropy, 0)
        self._compare("teacher's entropy", flat(theirs.entropy), entropy, 1.5e-6, 8e-6)
        value, in_z = self._diverged()
        self._compare("divergence", flat(found.divergence), np.where(self.live, value, 0), 6e-6, 1e-8)
        slope = GRAD_SCALE * self._terms()[-1]
        h = 0 * slope if entropy_weight is None else -GRAD_SCALE * flat(entropy_weight)
        weight = GRAD_SCALE * flat(d["weight"])[:, None]
        of_divergence = np.where(weight == 0, 0, weight * in_z * self.truth.chain)
        wanted = np.where(self.live[:, None], self.truth.gradient(slope, h) + of_divergence, 0)
        self._compare_gradient(out, wanted, self._slope_errors())

    def tokens(self) -> None:
        """token_terms, and token_sums from its records."""
        self._rows()
        log_prob, entropy, (old, ref), d = *self._known("log_prob", "entropy"), self._others(), self.data
        records, slope = self._records(), self._output("slope")
        loss = self._mapped("loss", torch.zeros(4, dtype=FP64))
        sums = self._mapped("sums", torch.zeros(len(FIELDS), dtype=FP64))
        weights = [d[f"{name}_weight"] for name in ("policy", "kl", "entropy", "rollout_kl")]
        with self._backend() as backend:
            values = TokenValues(log_prob, entropy, d["live"])
            inputs = TokenInputs(d["advantage"], weights[0], old, ref, None, *weights[1:])
            backend.token_terms(values, d["numbers"], inputs, SPEC, records, slope)
            backend.token_sums(values, d["live"], inputs, records, 3, 2, loss, sums)
        wanted = self._terms()
        names, sizes = ("policy", "kl", "rollout_kl", "slope"), (1e-6, 2e-5, 2e-5, 2e-5)
        for name, value, size in zip(names, wanted, sizes, strict=True):
            self._compare(name, flat(self.outputs[name]), np.where(self.live, value, 0), 5e-5, size)
        signed = zip(weights, (*wanted[:2], -self.truth.entropy, wanted[2]), strict=True)
        parts = [(flat(weight) * value)[self.live].sum() for weight, value in signed]
        self._compare("sums", sums.numpy()[:4], parts, 1e-5, 1e-5)
        self._compare("loss", loss.numpy()[0], sum(parts), 1e-5, 1e-5)

    def rescale(self) -> None:
        """gradient *= upstream / announced."""
        logits = self.data["logits"]
        before = logits.double().clone()
        self._rows()
        upstream, announced = (self._mapped(name, torch.tensor(x)) for name, x in (("up", 3.0), ("known", 1.5)))
        with self._backend() as backend:
            backend.rescale(logits, upstream, announced)
        self._compare("rescaled", logits.double().numpy(), (before * 2).to(self.case.dtype).double().numpy(), 0, 0)
