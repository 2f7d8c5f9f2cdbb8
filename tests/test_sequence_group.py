"""Sequences whose tokens lie on several ranks: the shares of a loss are the loss of whole sequences.

Ranks are threads of this process (threads.py); what only processes show runs on gloo at the end.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from cases import KLS, LEVELS, ROLLOUTS, RUNNING, SURROGATES, configs, make
from conftest import usable_backends
from distributed import mesh, pool
from threads import errors_of, run_threads
from torch import Tensor

from grpo_kernels import (
    KL,
    Clip,
    Divergence,
    Gmpo,
    GroupMean,
    LossConfig,
    MaskedIS,
    Metrics,
    OffPolicyMask,
    Recorded,
    Rejection,
    Teacher,
    TruncatedIS,
    Unclipped,
    align,
    grpo_loss,
    hf,
    linear_grpo_loss,
    normalizer,
    policy_loss,
    split_context,
)
from grpo_kernels.calls.over_ranks import NUMBERS
from grpo_kernels.objectives.metrics import FIELDS

S, T, V, H, RANKS = 6, 13, 23, 5, 3
FUNCTIONS = ("logits", "hidden", "log_probs")
BACKEND = "cpu" if "cpu" in usable_backends() else "torch"
"""Said, since Triton's interpreter, the choice where there is no library, does not run on several threads."""
SPLITS = ("zigzag", "random", "on the last rank")


class Batch(NamedTuple):
    """Whole sequences, float64: what every function needs of them."""

    states: dict[str, Tensor]
    """By what the loss is computed from, (S, T, ...)."""
    weight: Tensor
    token_ids: Tensor
    advantages: Tensor
    mask: Tensor
    options: dict[str, Any]


def batch_of(seed: int, per_token: bool, on_policy: bool, dtype: torch.dtype = torch.float64) -> Batch:
    """Sequence 1 is empty, the others are ragged with holes."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(S, T, H, generator=g, dtype=torch.float64)
    weight = torch.randn(V, H, generator=g, dtype=torch.float64)
    case = make(S, T, V, dtype=torch.float64, seed=seed, extra_row=False)
    logits = (hidden @ weight.T).to(dtype)
    log_probs = logits.double().log_softmax(-1).gather(-1, case.token_ids[..., None])[..., 0]

    def near(noise: float) -> Tensor:
        return (log_probs + noise * torch.randn(S, T, generator=g, dtype=torch.float64)).clamp(max=0).to(dtype)

    rollout = near(0.3)
    rollout[0, 2] = torch.nan  # unknown
    options = {"ref_log_probs": near(0.3), "rollout_log_probs": rollout}
    options |= {"token_weights": torch.rand(S, T, generator=g, dtype=torch.float64).to(dtype)} if per_token else {}
    options |= {} if on_policy else {"old_log_probs": near(0.1)}
    advantages = torch.randn(S, T, generator=g, dtype=torch.float64) if per_token else case.advantages.double()
    states = {"logits": logits, "hidden": hidden.to(dtype), "log_probs": log_probs.to(dtype)}
    return Batch(states, weight.to(dtype), case.token_ids, advantages.to(dtype), case.mask, options)


def columns_of(split: str, seed: int, ranks: int = RANKS) -> list[Tensor]:
    """Of every rank, (S, T_rank): the column of each of its tokens, -1 for what is padded."""
    if split == "contiguous":  # each sequence at other places, into parts that may be empty
        ends = torch.randint(T + 1, (S, ranks - 1), generator=torch.Generator().manual_seed(seed)).sort(-1).values
        ends = torch.cat([torch.zeros(S, 1, dtype=torch.int64), ends, torch.full((S, 1), T)], -1)
        rows = [[torch.arange(*ends[s, r : r + 2]) for s in range(S)] for r in range(ranks)]
        return [torch.nn.utils.rnn.pad_sequence(row, batch_first=True, padding_value=-1) for row in rows]
    if split == "on the last rank":
        return [torch.full((S, 0 if rank + 1 < ranks else T), -1) for rank in range(ranks - 1)] + [
            torch.arange(T).expand(S, T)
        ]
    if split == "zigzag":
        ids, mask = torch.ones(S, T, dtype=torch.int64), torch.ones(S, T)
        parts = [split_context(ids, mask, rank, ranks).index for rank in range(ranks)]
        return [torch.where(index < T, index, -1).expand(S, -1) for index in parts]
    g = torch.Generator().manual_seed(seed)
    owner = torch.randint(ranks, (S, T), generator=g)
    order = torch.rand(S, T, generator=g).argsort(-1)
    owner = owner.gather(-1, order)
    parts = []
    for rank in range(ranks):
        rows = [order[s][owner[s] == rank] for s in range(S)]
        parts.append(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1))
    return parts


def part_of(batch: Batch, columns: Tensor) -> Batch:
    """The tokens of one rank. What is padded is masked, and holds NaN and ids that are none."""
    padding = columns < 0

    def take(values: Any, fill: float = torch.nan) -> Any:
        if not isinstance(values, Tensor) or values.shape[:2] != (S, T):
            return values
        taken = values[torch.arange(S)[:, None], columns.clamp(min=0)].clone()
        taken[padding] = fill
        return taken

    options = {name: take(values) for name, values in batch.options.items()}
    states = {name: take(values) for name, values in batch.states.items()}
    ids, mask = take(batch.token_ids, -7), take(batch.mask, False)
    return Batch(states, batch.weight, ids, take(batch.advantages), mask, options)


def packed(batch: Batch, columns: Tensor, padded: bool) -> Batch:
    """The same part as (1, N) tokens with bounds, in a batch whose sequences may have none; with what was padded?"""
    here = (columns >= 0) | padded

    def pack(values: Any) -> Any:
        return values[here][None] if isinstance(values, Tensor) and values.shape[:2] == here.shape else values

    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), here.sum(-1).cumsum(0)])
    options = {name: pack(values) for name, values in batch.options.items()} | {"cu_seqlens": bounds}
    states = {name: pack(values) for name, values in batch.states.items()}
    advantages = batch.advantages if batch.advantages.dim() == 1 else pack(batch.advantages)
    return Batch(states, batch.weight, pack(batch.token_ids), advantages, pack(batch.mask), options)


class Result(NamedTuple):
    loss: Tensor
    states: Tensor
    """Gradient in logits, hidden states or log-probs."""
    weight: Tensor
    metrics: Tensor


def run(function: str, batch: Batch, config: LossConfig, group: Any = None, **more: Any) -> Result:
    states = batch.states[function].detach().clone().requires_grad_()
    weight = batch.weight.detach().clone().requires_grad_()
    options = {**batch.options, "config": config, "sequence_group": group, "backend": BACKEND, **more}
    if config.kl.coef == 0 and "kl_coef" not in more:
        options.pop("ref_log_probs")
    if function == "logits":
        out = grpo_loss(states, batch.token_ids, batch.advantages, batch.mask, **options)
    elif function == "hidden":
        out = linear_grpo_loss(states, weight, batch.token_ids, batch.advantages, batch.mask, **options)
    else:
        if config.entropy_coef:
            options["entropy"] = -states.detach()
        out = policy_loss(states, batch.advantages, batch.mask, **options)
    out.loss.backward()
    metrics = out.metrics if group is None else out.metrics.all_reduce(group)
    of_weight = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return Result(out.loss.detach(), states.grad, of_weight, metrics.vector)


class Case(NamedTuple):
    name: str
    function: str
    config: LossConfig
    split: str
    pack: bool = False
    per_token: bool = False
    on_policy: bool = False
    dtype: torch.dtype = torch.float64
    more: Mapping[str, Any] = MappingProxyType({})
    over: Mapping[str, Any] = MappingProxyType({})
    """Options of the ranks alone."""

    def batch(self) -> Batch:
        return batch_of(sum(map(ord, self.name)) % 97, self.per_token, self.on_policy, self.dtype)

    def columns(self, ranks: int = RANKS) -> list[Tensor]:
        return columns_of(self.split, sum(map(ord, self.name)), ranks)

    def of_rank(self, rank: int, ranks: int = RANKS) -> Result:
        columns = self.columns(ranks)[rank]
        part = part_of(self.batch(), columns)
        part = packed(part, columns, self.split == "zigzag") if self.pack else part
        return run(self.function, part, self.config, torch.distributed.group.WORLD, **self.over, **self.more)

    def joined(self, results: list[Result], ranks: int = RANKS) -> Result:
        """What the ranks' shares come to, in the places of the whole."""
        width = results[0].states.shape[2:]  # of logits that are cut, fewer columns
        whole = torch.zeros(S, T, *width, dtype=results[0].states.dtype)
        for columns, result in zip(self.columns(ranks), results, strict=True):
            rows, places = (columns >= 0).nonzero(as_tuple=True)
            gradient = result.states.view(*columns.shape, *width) if self.split == "zigzag" else result.states
            gradient = gradient[rows, places] if gradient.shape[:2] == columns.shape else gradient[0]
            whole[rows, columns[rows, places]] += gradient
        loss, weight = (torch.stack([getattr(r, name) for r in results]).sum(0) for name in ("loss", "weight"))
        assert all(torch.equal(r.metrics, results[0].metrics) for r in results)
        return Result(loss, whole, weight, results[0].metrics)

    def whole(self) -> Result:
        return run(self.function, self.batch(), self.config, **self.more)


def check(cases: list[Case], tolerance: float, ranks: int = RANKS) -> None:
    """All of them in one start of the ranks."""
    shares = run_threads(ranks, lambda rank: [case.of_rank(rank, ranks) for case in cases], deadline=120)
    wrong = []
    for case, results in zip(cases, zip(*shares, strict=True), strict=True):
        got, expected = case.joined(list(results), ranks), case.whole()
        for name, a, b in zip(Result._fields, got, expected, strict=True):
            size = b[b.isfinite()].abs().max().item() if b.numel() else 0.0
            try:
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True)
            except AssertionError as error:
                wrong.append(f"{case.name} {case.function} {case.split}: {name}: {error}")
        assert expected.states.abs().max() > 0, case
    assert not wrong, "\n".join(wrong[:5])


def varied(name: str, config: LossConfig, i: int, **more: Any) -> Case:
    """A case whose other properties follow from ``i``: each meets each."""
    picks = {"split": SPLITS[i % 3], "pack": i // 3 % 2 == 1, "per_token": i // 2 % 2 == 1}
    return Case(name, FUNCTIONS[(i + i // 3) % 3], config, **picks, **more)


def test_every_objective_level_aggregation_and_kl():
    joined = [config for config in configs() if not (config.pooling.running or config.kl_pooling.running)]
    every = [varied(f"{i} {config!r}", config, i) for i, config in enumerate(joined)]
    assert len(every) > 100
    check(every, 1e-12)


def running_cases(ranks: int) -> list[Case]:
    """Levels of prefixes x surrogates x KLs x rollouts, each pair at least once: parts that follow one another, and
    the chunks of a zigzag."""
    surrogates = [surrogate for surrogate in SURROGATES if surrogate.uses_ratio]
    cases = []
    for i, (surrogate, level) in enumerate(itertools.product(surrogates, RUNNING)):
        for j in range(ranks):
            n = i + j * len(surrogates)
            folds = surrogate.name == "vespo"
            schemes = (TruncatedIS(1.1), (), MaskedIS(0.8, 1.2))[n % 3] if folds else (*ROLLOUTS, (), ())[n * 5 % 12]
            kl, of_kl = KLS[n * 7 % len(KLS)], (None, *LEVELS, *RUNNING)[n % 7]
            kl = kl if not kl.ratio_weighted else dataclasses.replace(kl, level=of_kl)
            limits = {"log_ratio_limit": (20.0, 0.2)[n % 2], "entropy_coef": 0.1 * (n % 3 == 0)}
            config = LossConfig(surrogate, level=level, kl=kl, rollout=schemes, rollout_kl=KLS[n * 4 % 9], **limits)
            split = ("contiguous", "zigzag")[(n + j) % 2]
            picks = {"pack": n % 4 < 2, "per_token": n % 3 == 1, "on_policy": n % 5 == 0}
            over = {"sequence_layout": split}
            cases.append(Case(f"{n} {config!r}", FUNCTIONS[n % 3], config, split, **picks, over=over))
    for config in (config for config in configs() if config.pooling.running or config.kl_pooling.running):
        cases.append(Case(f"{config!r}", "logits", config, "contiguous", over={"sequence_layout": "contiguous"}))
    return cases


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_levels_of_prefixes(ranks):
    """What ranks hold of a sequence before a token, and behind it."""
    check(running_cases(ranks), 1e-12, ranks)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_rollout_scheme_at_every_level(function):
    cases = []
    for i, (schemes, level) in enumerate(itertools.product(ROLLOUTS, LEVELS)):
        config = LossConfig(Clip(0.2, 0.28), level=level, rollout=schemes, kl=KL(0.1, ratio_weighted=i % 2 == 0))
        for on_policy in (False, True):
            case = varied(f"{i} {config!r}", config, i + on_policy, on_policy=on_policy)
            cases.append(case._replace(function=function))
    check(cases, 1e-12)


def test_presets_in_fp32():
    cases = []
    for i, (name, preset) in enumerate(LossConfig.presets().items()):
        lengths = {"constant_length": 17} if preset.config.aggregation == "constant" else {}
        lengths |= {"group_size": 2} if preset.config.aggregation == "group_mean" else {}
        config = dataclasses.replace(preset.config, **lengths)
        for function in FUNCTIONS:
            cases.append(varied(name, config, i, dtype=torch.float32)._replace(function=function))
    assert len(cases) > 50
    check(cases, 5e-6)


def test_options_of_a_call():
    gspo, dapo = LossConfig.preset("gspo", surrogate=Clip(0.2, 0.28)), LossConfig.preset("dapo")
    rejecting = dataclasses.replace(dapo, rollout=Rejection(0.9, 1.1, "geometric"))
    cases = [
        Case("threshold", "logits", gspo, "random", more={"entropy_threshold": 1.5}),
        Case("skipped", "logits", gspo, "zigzag", more={"skip_zero_advantage": True}),
        Case("skipped tokens", "hidden", dapo, "random", per_token=True, more={"skip_zero_advantage": True}),
        Case("normalizer", "hidden", rejecting, "random", more={"normalizer": 31.0}),
        Case("coefficient", "logits", gspo, "random", more={"kl_coef": torch.tensor(0.2)}),
        Case("checked", "hidden", rejecting, "zigzag", more={"check": True}),
        Case("scaled", "hidden", gspo, "zigzag", more={"temperature": 0.7, "grad_scale": 2.0, "chunk_bytes": 6000}),
    ]
    check(cases, 1e-12)


COLLECTIVES = {
    "dr_grpo": 0,
    "dapo": 1,
    "dapo with a normalizer": 0,
    "dapo, old rejected": 1,
    "grpo": 1,
    "gspo": 3,
    "gspo with a normalizer": 3,
    "gspo, on-policy": 2,
    "gspo, old rejected": 3,
    "gmpo, all schemes": 3,
    "vespo": 3,
    "vespo, on-policy, off-policy mask": 3,
    "sequence_product, ratio-weighted KL of another level": 3,
    "prefix_product": 3,
    "prefix_product over a constant, on-policy": 2,
    "prefix_min, ratio-weighted KL of another level, all schemes": 3,
}


def configured(name: str) -> tuple[LossConfig, bool, dict[str, Any]]:
    """A row of COLLECTIVES: config, whether on-policy, options."""
    rejection = Rejection(0.9, 1.1, "sequence")
    more = {"normalizer": 4.0} if "normalizer" in name else {}
    if name.startswith("sequence_product"):
        kl = KL(0.1, ratio_weighted=True, level="sequence")
        return LossConfig(Clip(), level="sequence_product", kl=kl), False, more
    if name.startswith("prefix"):
        kl = KL(0.1 * ("KL" in name), ratio_weighted=True, level="prefix_product")
        schemes = (rejection, TruncatedIS(1.1, level="geometric"), OffPolicyMask(0.1)) if "schemes" in name else ()
        level = name.split(",")[0].split(" ")[0]
        lengths = {"aggregation": "constant", "constant_length": 9} if "constant" in name else {}
        return LossConfig(Gmpo(0.1, 0.1), level=level, kl=kl, rollout=schemes, **lengths), "on-policy" in name, more
    config = dataclasses.replace(LossConfig.presets()[name.split(",")[0].split(" ")[0]].config, constant_length=9)
    if "rejected" in name:
        config = dataclasses.replace(config, rollout=rejection)
    if "all schemes" in name:
        config = dataclasses.replace(
            config, rollout=(rejection, TruncatedIS(1.1, level="geometric"), OffPolicyMask(0.1))
        )
    if "off-policy mask" in name:
        config = dataclasses.replace(config, rollout=(TruncatedIS(1.1), OffPolicyMask(0.1)))
    return config, "on-policy" in name, more


@pytest.fixture
def collectives(monkeypatch) -> Callable[[], int]:
    """How many collectives this thread has run: all of PyTorch's, in a call of the function that is returned."""
    counts: Counter[int] = Counter()
    for name in dir(torch.distributed):
        if name.startswith(("all_", "broadcast", "reduce", "gather", "scatter", "send", "isend", "barrier")):
            known = getattr(torch.distributed, name)

            def counted(*args, known=known, **kwargs):
                counts[threading.get_ident()] += 1
                return known(*args, **kwargs)

            monkeypatch.setattr(torch.distributed, name, counted)
    return lambda: counts[threading.get_ident()]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives_of_a_call(collectives, name, function):
    """At most three, all in forward: a rank whose backward does not run keeps nobody waiting."""
    config, on_policy, more = configured(name)
    over = {"sequence_layout": "contiguous"} if name.startswith("prefix") else {}
    case = Case(name, function, config, "contiguous" if over else "random", on_policy=on_policy, more=more)

    def of_rank(rank):
        group, part = torch.distributed.group.WORLD, part_of(case.batch(), case.columns()[rank])
        run(function, part, config, **more)  # no group
        assert collectives() == 0
        run(function, part, config, group, **over, **more)  # agrees first
        states = part.states[function].clone().requires_grad_()
        before = collectives()
        options = {**part.options, **more, **over, "config": config, "sequence_group": group, "backend": BACKEND}
        if function == "hidden":
            out = linear_grpo_loss(states, part.weight, part.token_ids, part.advantages, part.mask, **options)
        elif function == "logits":
            out = grpo_loss(states, part.token_ids, part.advantages, part.mask, **options)
        else:
            out = policy_loss(states, part.advantages, part.mask, **options)
        forward = collectives()
        out.loss.backward()
        return forward - before, collectives() - forward

    expected = COLLECTIVES[name]
    if function == "log_probs" and name == "gspo, on-policy":
        expected = 3  # it has no route of one pass
    assert run_threads(RANKS, of_rank) == [(expected, 0)] * RANKS


# What ranks do not agree on: one error, on all of them, before anybody waits.


def loss_of(rank: int, part: Batch | None = None, **changes: Any) -> None:
    """A call whose arguments are changed."""
    case = Case("errors", "logits", LossConfig.preset("gspo"), "random")
    part = part_of(case.batch(), case.columns()[rank]) if part is None else part
    arguments = {
        "logits": part.states["logits"].clone().requires_grad_(),
        "token_ids": part.token_ids,
        "advantages": part.advantages,
        "mask": part.mask,
        "old_log_probs": part.options["old_log_probs"],
        "config": case.config,
        "sequence_group": torch.distributed.group.WORLD,
        "backend": BACKEND,
    }
    grpo_loss(**{**arguments, **changes})


def other_ids(rank: int) -> dict[str, Any]:
    case = Case("errors", "logits", LossConfig.preset("gspo"), "random")
    part = part_of(case.batch(), case.columns()[rank])
    return {"token_ids": torch.where(part.mask, 10_000, part.token_ids)}


def fewer_sequences(rank: int) -> dict[str, Any]:
    case = Case("errors", "logits", LossConfig.preset("gspo"), "random")
    part = part_of(case.batch(), case.columns()[rank])
    logits = part.states["logits"][1:].clone().requires_grad_()
    return {
        "logits": logits,
        "token_ids": part.token_ids[1:],
        "advantages": part.advantages[1:],
        "mask": part.mask[1:],
        "old_log_probs": part.options["old_log_probs"][1:],
    }


def frozen(rank: int) -> dict[str, Any]:
    case = Case("errors", "logits", LossConfig.preset("gspo"), "random")
    return {"logits": part_of(case.batch(), case.columns()[rank]).states["logits"].detach()}


FAULTS = {
    "another config": (lambda rank: {"config": "dapo"}, "expected the same config on every rank of sequence_group"),
    "another level": (
        lambda rank: {"config": LossConfig.preset("gspo", level="sequence_token")},
        "expected the same config on every rank of sequence_group",
    ),
    "no old log-probs": (lambda rank: {"old_log_probs": None}, "the same keywords on every rank of sequence_group"),
    "a penalty": (lambda rank: {"entropy_coef": 0.1}, "got None on rank 0, 0.1 on rank 1, None on rank 2"),
    "a normalizer": (lambda rank: {"normalizer": 3.0}, "the same normalizer on every rank of sequence_group; got None"),
    "other sequences": (
        fewer_sequences,
        "the same number of sequences on every rank of sequence_group; got 6 on rank 0",
    ),
    "no gradient": (frozen, "the same gradients on every rank of sequence_group; got wanted on rank 0, not wanted on"),
    "ids": (other_ids, "token_ids[0, 0] = 10000 at a live position"),
    "no tensor": (lambda rank: {"advantages": torch.ones(5)}, "rank 1 of 3: grpo_loss: expected advantages"),
    "a name": (lambda rank: {"config": "gpso"}, "rank 1 of 3: preset must be one of"),
    "backend": (lambda rank: {"backend": "torch"}, "the same backend on every rank of sequence_group"),
}


TAUGHT = {
    "another divergence": ({"config": LossConfig.preset("gspo", divergence=Divergence("tvd"))}, {}, "the same config"),
    "a scaled teacher": ({}, {"logit_scale": 0.5}, "the same teacher on every rank of sequence_group; got logits of "),
    "a capped teacher": ({}, {"logit_softcap": 30.0}, "logit_softcap=30.0, temperature=None on rank 1"),
    "a recorded teacher": ({}, None, "got logits of torch.float64, 23 columns, logit_scale=1.0"),
    "another temperature": ({"temperature": 0.5}, {}, "the same temperature on every rank of sequence_group; got 1.0"),
    "another scale": ({"logit_scale": 0.5}, {}, "the same logit_scale on every rank"),
    "fewer columns": ({"vocab_size": 20}, {}, "the same vocab_size on every rank of sequence_group; got None on"),
}
"""What rank 1 changes of the call, and of the teacher (None: recorded); the words."""


@pytest.mark.parametrize("name", TAUGHT)
def test_one_rank_has_another_teacher(name):
    """Or other logits of the same one: its part of D would be of another distribution."""
    changes, form, words = TAUGHT[name]
    case = Case("errors", "logits", LossConfig.preset("gspo"), "random")
    config = LossConfig.preset("gspo", divergence=Divergence("jsd"))

    def call(rank):
        part = part_of(case.batch(), case.columns()[rank])
        logits = part.states["logits"]
        own = Teacher(logits=logits, **(form or {} if rank == 1 else {}))
        if form is None and rank == 1:
            log_probs, ids = logits.log_softmax(-1).topk(3)
            own = Teacher(token_ids=ids, log_probs=log_probs, temperature=1.0)
        given = {"config": config, "teacher": own, "token_ids": part.token_ids.clamp(max=19)}
        loss_of(rank, **{**given, **(changes if rank == 1 else {})})

    (text,) = set(errors_of(RANKS, call, deadline=20))
    assert text is not None
    assert words in text


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("name", [*NUMBERS, "grad_scale"])
def test_numbers_of_ranks_differ(name, kind):
    """Each would compute its part with its own."""

    def call(rank):
        case = Case("errors", "logits", LossConfig.preset("gspo"), "random")
        part = part_of(case.batch(), case.columns()[rank])
        changes = {name: kind(5.0 if rank == 1 else 4.0)}
        if name == "divergence_coef":
            changes["config"] = LossConfig.preset("gspo", divergence=Divergence("tvd"))
            changes["teacher"] = Teacher(logits=part.states["logits"])
        beside = {"kl_coef": "ref_log_probs", "rollout_kl_coef": "rollout_log_probs"}.get(name)
        loss_of(rank, **changes, **({beside: part.options["old_log_probs"]} if beside else {}))

    (text,) = set(errors_of(RANKS, call, deadline=20))
    assert f"the same {name} on every rank of sequence_group; got 4.0 on rank 0, 5.0 on rank 1, 4.0 on" in str(text)


@pytest.mark.parametrize("name", [*NUMBERS[:4], "temperature", "grad_scale"])
def test_equal_numbers_of_other_types(name):
    """An integer, a float, a tensor: a literal on one rank and a schedule's value on another."""

    def call(rank):
        case = Case("errors", "logits", LossConfig.preset("gspo"), "random")
        part = part_of(case.batch(), case.columns()[rank])
        beside = {"kl_coef": "ref_log_probs", "rollout_kl_coef": "rollout_log_probs"}.get(name)
        changes = {name: (1, 1.0, torch.tensor(1))[rank]}
        loss_of(rank, check=True, **changes, **({beside: part.options["old_log_probs"]} if beside else {}))

    assert errors_of(RANKS, call, deadline=20) == [None] * RANKS


@pytest.mark.parametrize("lengths", [(1, 1), (1, 2)])
def test_a_rank_with_one_token_has_temperatures_of_tokens(lengths):
    """Which are no number that all ranks share."""

    def call(rank):
        torch.manual_seed(rank)
        count = lengths[rank]
        given = {"cu_seqlens": torch.tensor([0, count]), "temperature": 0.5 + torch.rand(1, count), "backend": BACKEND}
        given |= {"old_log_probs": -torch.rand(1, count), "sequence_group": torch.distributed.group.WORLD}
        grpo_loss(torch.randn(1, count, 7), torch.randint(7, (1, count)), torch.ones(1), config="gspo", **given)

    assert errors_of(2, call, deadline=20) == [None, None]


@pytest.mark.parametrize("name", FAULTS)
def test_one_rank_is_wrong(name):
    """The same words on all ranks; the group is good for the next call."""
    if name == "backend" and BACKEND == "torch":
        pytest.skip("there is one backend here")
    change, words = FAULTS[name]

    def call(rank):
        loss_of(rank, **(change(rank) if rank == 1 else {}))

    texts = errors_of(RANKS, call, deadline=20)
    assert None not in texts
    assert len(set(texts)) == 1
    assert words in texts[0]

    def twice(rank):
        with pytest.raises(Exception, match="rank"):
            call(rank)
        loss_of(rank)  # as if nothing had been
        try:
            loss_of(rank, check=True, **(change(rank) if rank == 1 else {}))
        except Exception as error:
            return str(error)

    (text,) = set(run_threads(RANKS, twice, deadline=20))
    assert words in text


def test_packed_advantages_of_tokens_are_told_from_those_of_sequences():
    """(N,) is one a sequence on the rank that holds as many tokens as there are sequences: refused."""
    bounds, ids = torch.tensor([0, 1, 3]), torch.zeros(3, dtype=torch.int64)

    def call(rank):
        n = 3 - rank
        bounds = torch.tensor([0, 1, n])
        logits, advantages = torch.zeros(n, 5, requires_grad=True), torch.ones(n)
        group = torch.distributed.group.WORLD
        grpo_loss(logits, ids[:n], advantages, cu_seqlens=bounds, sequence_group=group)

    first, second = errors_of(2, call)
    assert first == second
    assert "rank 0 of 2: grpo_loss: expected advantages (2,), one a sequence, or (1, N)" in first
    assert "advantages[None]" in first
    assert bounds[-1] == 3


def test_losses_of_tokens():
    """Refused where their backward would need the other ranks; what follows from a token alone is served."""

    def pooled(rank):
        loss_of(rank, token_losses=True)

    texts = errors_of(RANKS, pooled)
    assert len({text.split("\n")[0] for text in texts}) == 1
    assert "no token_losses=True with sequence_group= where slopes are shared over a sequence" in texts[0]
    case = Case("tokens", "logits", LossConfig.preset("dapo"), "random")
    batch = case.batch()
    more = {"config": "dapo", "token_losses": True}

    def of_rank(rank):
        part = part_of(batch, case.columns()[rank])
        options = {
            **more,
            "sequence_group": torch.distributed.group.WORLD,
            "old_log_probs": part.options["old_log_probs"],
        }
        states = part.states["logits"].clone().requires_grad_()
        out = grpo_loss(states, part.token_ids, part.advantages, part.mask, **options)
        out.token_losses.sum().backward()
        return Result(out.token_losses.detach().sum(), states.grad, torch.zeros(()), torch.zeros(()))

    got = case.joined(run_threads(RANKS, of_rank))
    states = batch.states["logits"].clone().requires_grad_()
    options = {**more, "old_log_probs": batch.options["old_log_probs"]}
    out = grpo_loss(states, batch.token_ids, batch.advantages, batch.mask, **options)
    out.token_losses.sum().backward()
    torch.testing.assert_close(got.states, states.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got.loss, out.token_losses.detach().sum(), rtol=1e-12, atol=0)


def test_a_group_that_excludes_the_rank():
    def call(rank):
        group = torch.distributed.new_group([0, 1])
        if rank == 2:
            group = torch.distributed.GroupMember.NON_GROUP_MEMBER
        loss_of(rank, sequence_group=group)

    first, second, third = errors_of(RANKS, call)
    assert first is second is None
    assert "expected sequence_group= that this process is in; got a group of other ranks" in third


def test_a_group_of_one_and_no_group_are_the_same_bits():
    for config in (LossConfig.preset("gspo", surrogate=Clip(0.2, 0.28)), LossConfig(level="prefix_min")):
        case = Case("alone", "logits", config, "random")
        (got,) = run_threads(
            1, lambda rank, of=case: run("logits", of.batch(), of.config, torch.distributed.group.WORLD)
        )
        for a, b in zip(got, case.whole(), strict=True):
            assert torch.equal(a, b)


def test_a_mesh_of_one_dimension_is_a_group():
    case = Case("mesh", "hidden", LossConfig.preset("gspo", surrogate=Clip(0.2, 0.28)), "random")

    def of_rank(rank):
        group = mesh(RANKS, names=("cp",))
        return run("hidden", part_of(case.batch(), case.columns()[rank]), case.config, group)

    for a, b in zip(case.joined(run_threads(RANKS, of_rank)), case.whole(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_advantages_of_tokens_on_a_rank_with_one_token():
    """(S, 1) there, and (S, T) on the others: all take one way, though on-policy one of a sequence could be shorter."""
    config = LossConfig(Clip(), level="sequence")
    batch = batch_of(5, per_token=True, on_policy=True)
    batch.options.pop("token_weights")
    columns = [torch.zeros(S, 1, dtype=torch.int64), *(torch.arange(*ends).expand(S, -1) for ends in ((1, 6), (6, T)))]

    def of_rank(rank):
        return run("logits", part_of(batch, columns[rank]), config, torch.distributed.group.WORLD)

    whole = run("logits", batch, config)
    got = torch.cat([result.states for result in run_threads(RANKS, of_rank)], 1)
    torch.testing.assert_close(got, whole.states, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["grpo", "gspo", "vespo"])
def test_beside_a_vocabulary_over_ranks(name):
    """Two halves of the columns times two parts of the sequences; old log-probs know how they were made."""
    config = dataclasses.replace(LossConfig.presets()[name].config, entropy_coef=0.1)
    case = Case("both", "logits", config, "zigzag")
    batch, whole, columns = case.batch(), case.whole(), case.columns(2)

    def of_rank(rank):
        ranks = mesh(2, 2, names=("cp", "tp"))
        context, shard = divmod(rank, 2)
        part = part_of(batch, columns[context])
        halves = {"logits": part.states["logits"].tensor_split(2, -1)[shard].contiguous()}
        return run("logits", part._replace(states=halves), config, ranks["cp"], vocab_group=ranks["tp"])

    results = run_threads(4, of_rank)
    halves = [case.joined([results[i] for i in ends], 2) for ends in ((0, 2), (1, 3))]
    got = torch.cat([half.states for half in halves], -1)
    torch.testing.assert_close(got, whole.states, rtol=1e-11, atol=1e-12)
    for half in halves:
        torch.testing.assert_close(half.loss, whole.loss, rtol=1e-11, atol=0)
        torch.testing.assert_close(half.metrics, whole.metrics, rtol=1e-11, atol=1e-12)


def test_an_attached_model():
    """Beside the model's own logits of both parts, one after the other: a loss does not ask for the order of tokens."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"head_dim": 8, "intermediate_size": 32, "vocab_size": V, "tie_word_embeddings": True}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("qwen3", **sizes)).double()
    g = torch.Generator().manual_seed(2)
    ids, advantages = torch.randint(V, (4, 10), generator=g), torch.randn(4, generator=g, dtype=torch.float64)
    loss_mask = torch.rand(4, 10, generator=g) < 0.7
    parts = [split_context(ids, loss_mask, rank, 2) for rank in range(2)]
    options = {"config": LossConfig.preset("gspo", surrogate=Clip(0.2, 0.28)), "entropy_coef": 0.1}
    whole = copy.deepcopy(model)
    logits = torch.cat([whole(p.input_ids, position_ids=p.position_ids).logits for p in parts], 1)
    token_ids, mask = (torch.cat([getattr(p, name) for p in parts], 1) for name in ("token_ids", "mask"))
    log_probs = logits.detach().log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
    old = (log_probs + 0.2 * torch.randn(log_probs.shape, generator=g, dtype=torch.float64)).split(6, 1)
    expected = grpo_loss(logits, token_ids, advantages, mask, old_log_probs=torch.cat(old, 1), **options)
    expected.loss.backward()

    def of_rank(rank):
        own, part, group = hf.attach(copy.deepcopy(model)), parts[rank], torch.distributed.group.WORLD
        grpo = {"token_ids": part.token_ids, "advantages": advantages, "mask": part.mask, "old_log_probs": old[rank]}
        grpo |= {**options, "sequence_group": group}
        out = own(part.input_ids, position_ids=part.position_ids, grpo=grpo)
        out.loss.backward()
        return out.loss.detach(), [parameter.grad for parameter in own.parameters()]

    (first, of_first), (second, of_second) = run_threads(2, of_rank)
    torch.testing.assert_close(first + second, expected.loss.detach(), rtol=1e-10, atol=0)
    for one, other, parameter in zip(of_first, of_second, whole.parameters(), strict=True):
        torch.testing.assert_close(one + other, parameter.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["prefix_product", "prefix_min", "the KL's"])
def test_levels_that_need_an_order_ask_for_it(name):
    """What ranks hold has none."""
    kl = KL(0.1, ratio_weighted=True, level="prefix_min")
    config = LossConfig(kl=kl) if name == "the KL's" else LossConfig(level=name)

    def of_rank(rank, length=3, **over):
        log_probs, values = -torch.rand(2, length).requires_grad_(), -torch.rand(2, length)
        options = {"config": config, "old_log_probs": values, "ref_log_probs": values, "backend": BACKEND, **over}
        policy_loss(log_probs, torch.ones(2), sequence_group=torch.distributed.group.WORLD, kl_coef=0.1, **options)

    level = "KL(level=...)='prefix_min'" if name == "the KL's" else f"level='{name}'"
    for error in errors_of(2, of_rank):
        assert f"expected sequence_layout= beside sequence_group= and {level}, which asks for the order" in error
        assert "part.layout" in error
    for error in errors_of(2, lambda rank: of_rank(rank, 4, sequence_layout=("contiguous", "zigzag")[rank])):
        assert "the same sequence_layout on every rank of sequence_group; got 'contiguous' on rank 0" in error
    for error in errors_of(2, lambda rank: of_rank(rank, sequence_layout="ring")):
        assert "policy_loss: sequence_layout must be one of zigzag, contiguous; got 'ring'" in error
    for error in errors_of(2, lambda rank: of_rank(rank, sequence_layout="zigzag")):
        assert "expected parts of an even length with sequence_layout='zigzag'; got [3]" in error
    bounds = {"cu_seqlens": torch.tensor([0, 2, 3])}
    packed = {**bounds, "old_log_probs": -torch.rand(1, 3), "ref_log_probs": -torch.rand(1, 3)}

    def of_packed(rank):
        options = {**packed, "config": config, "backend": BACKEND, "kl_coef": 0.1, "sequence_layout": "zigzag"}
        group = torch.distributed.group.WORLD
        policy_loss(-torch.rand(1, 3), torch.ones(2), sequence_group=group, **options)

    for error in errors_of(2, of_packed):
        assert "even length with sequence_layout='zigzag'; got [2, 1]" in error


def test_a_layout_without_its_group():
    """Parts would be taken as whole sequences."""
    x, ids = torch.randn(2, 4, 7), torch.randint(7, (2, 4))
    calls = {
        "grpo_loss": lambda **o: grpo_loss(x, ids, torch.ones(2), **o),
        "linear_grpo_loss": lambda **o: linear_grpo_loss(x, torch.randn(5, 7), ids % 5, torch.ones(2), **o),
        "policy_loss": lambda **o: policy_loss(-torch.rand(2, 4), torch.ones(2), **o),
    }
    for name, loss in calls.items():
        with pytest.raises(ValueError, match=f"{name}: expected sequence_group= beside sequence_layout=; got .*zigzag"):
            loss(sequence_layout="zigzag")


def test_losses_of_tokens_at_levels_of_prefixes():
    """Refused as all whose backward would need the other ranks."""
    config = LossConfig(level="prefix_product")
    more = {"config": config, "token_losses": True, "sequence_layout": "contiguous"}
    for error in errors_of(RANKS, lambda rank: loss_of(rank, **more)):
        assert "no token_losses=True with sequence_group= where slopes are shared over a sequence" in error


@pytest.mark.parametrize("level", RUNNING)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_infinities_and_equal_ratios_over_ranks(level, layout):
    """Of equal ones the last has the slopes, on whichever rank; what is impossible or unknown stays behind itself."""
    config = LossConfig(Unclipped(), level=level, aggregation="sequence_sum", log_ratio_limit=None)
    log_ratio = torch.tensor(
        [[0.0, -1, -1, 0.5, -1, 0.5, 0, 2], [0.0] * 8, [0.1, -torch.inf, 0.2, 0, 0, 0, 0, 0.0], [0.0, 1, 2, 3] * 2]
    ).double()
    log_ratio[3, 5] = torch.nan
    mask = torch.ones(4, 8)
    mask[0, 4] = mask[1, 3] = mask[1, 6] = 0

    def slopes(rank=None):
        part = None
        if rank is not None:
            part = split_context(torch.ones(4, 8, dtype=torch.int64), mask, rank, 2, layout=layout)
        own = slice(None) if part is None else part.index
        leaf = (log_ratio[:, own] - 3).requires_grad_()
        over = {} if part is None else {"sequence_group": torch.distributed.group.WORLD, "sequence_layout": part.layout}
        old = torch.full_like(leaf.detach(), -3.0)
        policy_loss(leaf, torch.ones(4), mask[:, own], config=config, old_log_probs=old, **over).loss.backward()
        return own, leaf.grad

    _, expected = slopes()
    got = torch.zeros_like(expected)
    for own, part in run_threads(2, slopes):
        got[:, own] = part
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0, equal_nan=True)
    assert expected[:3].isfinite().all()
    assert expected[3].isnan().any()


# The denominator of a step, and its metrics.


@pytest.mark.parametrize(("config", "count"), [("token_mean", None), ("grpo", 4.0), (GroupMean(2), 2.0)])
def test_a_normalizer_counts_each_sequence_once(config, count):
    """Four ranks, 2 of data times 2 of context: halves of two sequences each."""
    mask = torch.ones(4, 6)
    mask[1, 3:] = 0
    expected = float(mask.sum()) if count is None else count

    def of_rank(rank):
        ranks = mesh(2, 2, names=("dp", "cp"))
        data, context = divmod(rank, 2)
        own = mask[2 * data : 2 * data + 2, 3 * context : 3 * context + 3]
        world, along = torch.distributed.group.WORLD, ranks["cp"]
        of_all = normalizer(own, config, world_size=4, group=world, sequence_group=along)
        of_two = normalizer(own, config, sequence_group=ranks.get_group("cp"))
        return float(of_all), float(of_two)

    of_all, of_two = zip(*run_threads(4, of_rank), strict=True)
    assert set(of_all) == {expected / 4}
    halves = [expected / 2] * 4 if count is not None else [9.0, 9.0, 12.0, 12.0]
    assert list(of_two) == halves


def test_shares_with_a_normalizer_average_to_the_whole_step():
    """As DDP reduces gradients: the mean over data and context parallel ranks."""
    case = Case("step", "hidden", LossConfig.preset("gspo", surrogate=Clip(0.2, 0.28)), "zigzag")
    batch, columns = case.batch(), columns_of("zigzag", 0, 2)

    def of_rank(rank):
        ranks = mesh(2, 2, names=("dp", "cp"))
        part = part_of(batch, columns[rank % 2])
        rows = slice(0, 2) if rank < 2 else slice(2, S)
        options = {name: values[rows] for name, values in part.options.items()}
        states = {name: values[rows] for name, values in part.states.items()}
        part = Batch(states, part.weight, part.token_ids[rows], part.advantages[rows], part.mask[rows], options)
        world, along = torch.distributed.group.WORLD, ranks["cp"]
        count = normalizer(part.mask, case.config, world_size=4, group=world, sequence_group=along)
        result = run("hidden", part, case.config, along, normalizer=count)
        weight = result.weight.clone()
        torch.distributed.all_reduce(weight)
        return weight / 4, Metrics(result.metrics).all_reduce(ranks["dp"]).vector

    whole = case.whole()
    for weight, metrics in run_threads(4, of_rank):
        torch.testing.assert_close(weight, whole.weight, rtol=1e-12, atol=1e-12)
        metrics[: FIELDS.index("tokens")] /= 4  # the terms of the loss
        torch.testing.assert_close(metrics, whole.metrics, rtol=1e-12, atol=1e-12)


def test_metrics_need_a_group():
    metrics = Metrics(torch.zeros(len(FIELDS)))

    def one_rank(rank):
        with pytest.raises(TypeError, match="Metrics.all_reduce: expected a group; got None"):
            metrics.all_reduce(None)
        return metrics.all_reduce(torch.distributed.group.WORLD) is metrics

    assert run_threads(1, one_rank) == [True]


# Cutting sequences.


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_split_context(layout, pack, size):
    """Every token on one rank, its row's target beside it, in places that say where it was."""
    lengths = [7, 0, 1, 12] if pack else [11] * 3
    total = sum(lengths)
    ids = torch.arange(100, 100 + total)
    mask = torch.rand(total, generator=torch.Generator().manual_seed(1)) < 0.7
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) if pack else None
    if not pack:
        ids, mask = ids.view(3, 11), mask.view(3, 11)
    parts = [split_context(ids, mask, rank, size, cu_seqlens=bounds, layout=layout) for rank in range(size)]
    shifted, counts = align(ids, mask, bounds)
    if not pack:
        shifted, counts = torch.nn.functional.pad(shifted, (0, 1)), torch.nn.functional.pad(counts, (0, 1))
    seen = []
    for rank, part in enumerate(parts):
        assert part.layout == layout
        assert part.input_ids.shape == part.token_ids.shape == part.mask.shape == part.position_ids.shape
        real = part.index < ids.shape[-1]
        if pack:
            assert part.cu_seqlens.dtype == torch.int32
            assert len(part.cu_seqlens) == 5
            assert part.cu_seqlens[-1] == part.input_ids.shape[-1]
            owner = torch.repeat_interleave(torch.arange(4), part.cu_seqlens.diff().long())
            assert torch.equal(part.position_ids[real], (part.index - bounds[owner])[real])
        else:
            assert torch.equal(part.position_ids[0], part.index)
        for whole, cut in ((ids, part.input_ids), (shifted, part.token_ids), (counts, part.mask)):
            assert torch.equal(cut[..., real], whole[..., part.index[real]])
            assert not cut[..., ~real].any()
        seen += part.index[real].tolist()
        places = part.position_ids if pack else part.position_ids[0]
        if layout == "zigzag" and not pack:
            chunk = len(places) // 2
            first, second = rank * chunk, (2 * size - 1 - rank) * chunk
            assert places.tolist() == [*range(first, first + chunk), *range(second, second + chunk)]
    assert sorted(seen) == list(range(total if pack else 11))


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("shape", [(3, 11), (3, 10), (20,), (1, 20)], ids=str)
def test_recorded_sets_are_cut(layout, shape):
    """As tensors of tokens are; padding has no set."""
    packed, tokens = shape[0] != 3, math.prod(shape)
    bounds = torch.tensor([0, 7, 7, 8, 20]) if packed else None
    whole = torch.arange(20).view(shape) if packed else torch.arange(33).view(3, 11)
    sets = [[10 * token + i for i in range(token % 4)] for token in range(tokens)]
    recorded = Recorded.from_lists(sets)
    recorded = Recorded(recorded.ids, recorded.offsets, shape)
    padding = 0
    for rank in range(3):
        part = split_context(whole, torch.ones_like(whole), rank, 3, cu_seqlens=bounds, layout=layout)
        cut, of_tokens = part.take(recorded), part.take(torch.arange(tokens).view(shape) + 1)
        assert cut.shape == tuple(of_tokens.shape) == tuple(part.token_ids.shape)
        wanted = [sets[number - 1] if number else [] for number in of_tokens.flatten().tolist()]
        assert [cut.ids[a:b].tolist() for a, b in itertools.pairwise(cut.offsets.tolist())] == wanted
        padding += int((of_tokens == 0).sum())
    assert padding > 0
    with pytest.raises(ValueError, match=r"ContextPart.take: expected values"):
        part.take(recorded[..., :5])


def test_what_is_cut():
    """Leading and trailing dimensions, values of rows and of predicted tokens; gradients come back."""
    part = split_context(torch.arange(10).view(2, 5), torch.ones(2, 5), 1, 2)
    assert part.index.tolist() == [2, 3, 4, 5]
    values = torch.arange(8.0).view(2, 4).requires_grad_()
    part.take(values).sum().backward()
    assert part.take(values).tolist() == [[2.0, 3.0, 0.0, 0.0], [6.0, 7.0, 0.0, 0.0]]
    assert values.grad.tolist() == [[0.0, 0.0, 1.0, 1.0]] * 2
    assert part.take(torch.ones(2, 5, 3)).shape == (2, 4, 3)
    with pytest.raises(ValueError, match=r"expected values \(2, 5, ...\) or \(2, 4, ...\); got \(2, 6\)"):
        part.take(torch.ones(2, 6))
    bounds = torch.tensor([0, 5])
    one, two = (
        split_context(torch.arange(5).view(shape), torch.ones(shape), 0, 2, cu_seqlens=bounds)
        for shape in ((5,), (1, 5))
    )
    assert one.input_ids.shape == (4,)
    assert two.input_ids.shape == (1, 4)
    for part in (one, two):
        assert part.take(torch.ones(5, 3)).shape == (4, 3)
        assert part.take(torch.ones(1, 5, 3)).shape == (1, 4, 3)


def test_bad_splits():
    ids, mask = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4)
    with pytest.raises(ValueError, match="0 <= rank < size, or a group of ranks; got rank=2, size=2"):
        split_context(ids, mask, 2, 2)
    with pytest.raises(ValueError, match="0 <= rank < size, or a group of ranks; got rank=None"):
        split_context(ids, mask)
    with pytest.raises(ValueError, match=r"group=None\.\n  hint: .*WORLD is None before .*init_process_group"):
        split_context(ids, mask, group=torch.distributed.group.WORLD)
    with pytest.raises(ValueError, match="layout must be one of zigzag, contiguous"):
        split_context(ids, mask, 0, 2, layout="ring")
    got = run_threads(2, lambda rank: split_context(ids, mask, group=torch.distributed.group.WORLD).index.tolist())
    assert got == [[0, 3], [1, 2]]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_preset_of_split_sequences(function, pack):
    """From whole ids, hidden states or logits of the whole, and the parts that split_context cuts of them."""
    g = torch.Generator().manual_seed(3)
    lengths = torch.tensor([9, 4, 0, 13]) if pack else torch.tensor([11] * 4)
    shape, width = ((int(lengths.sum()),), 16) if pack else ((4, 11), 16)
    ids = torch.randint(V, shape, generator=g)
    loss_mask = torch.rand(shape, generator=g) < 0.8
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]) if pack else None
    token_ids, mask = align(ids, loss_mask, bounds)
    hidden = torch.randn(*shape, width, generator=g, dtype=torch.float64)
    weight = torch.randn(V, width, generator=g, dtype=torch.float64) / 4
    logits = hidden @ weight.T
    rows = logits if pack else logits[:, :-1]
    known = rows.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
    old = known + 0.2 * torch.randn(known.shape, generator=g, dtype=torch.float64)
    advantages = torch.randn(4, generator=g, dtype=torch.float64)
    presets = {
        name: dataclasses.replace(preset.config, constant_length=16, group_size=2)
        for name, preset in LossConfig.presets().items()
    }

    def loss(config, values, ids, mask, old, **options):
        options |= {"config": config, "old_log_probs": old, "backend": BACKEND}
        if function == "logits":
            return grpo_loss(values, ids, advantages, mask, **options).loss
        if function == "hidden":
            return linear_grpo_loss(values, weight, ids, advantages, mask, **options).loss
        return policy_loss(values, advantages, mask, **options).loss

    whole = {"logits": logits, "hidden": hidden, "log_probs": known}[function]

    def of_rank(rank):
        part = split_context(ids, loss_mask, group=torch.distributed.group.WORLD, cu_seqlens=bounds)
        results = []
        for config in presets.values():
            leaf = whole.clone().requires_grad_()
            options = {"cu_seqlens": part.cu_seqlens, "sequence_group": torch.distributed.group.WORLD}
            share = loss(config, part.take(leaf), part.token_ids, part.mask, part.take(old), **options)
            share.backward()
            results.append((share.detach(), leaf.grad))
        return results

    shares = run_threads(2, of_rank)
    for config, (one, other) in zip(presets.values(), zip(*shares, strict=True), strict=True):
        leaf = whole.clone().requires_grad_()
        expected = loss(config, leaf, token_ids, mask, old, cu_seqlens=bounds)
        expected.backward()
        torch.testing.assert_close(one[0] + other[0], expected.detach(), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(one[1] + other[1], leaf.grad, rtol=1e-12, atol=1e-13)


# Processes.


def _gloo_rank() -> tuple[list[tuple[Tensor, ...]], str]:
    rank, group, results = torch.distributed.get_rank(), torch.distributed.group.WORLD, []
    for case in GLOO:
        part = part_of(case.batch(), case.columns(2)[rank])
        results.append(tuple(run(case.function, part, case.config, group)))
    results.append((_compiled(part_of(GLOO[0].batch(), GLOO[0].columns(2)[rank]), GLOO[0].config),))
    try:
        loss_of(rank, config="dapo" if rank == 1 else "gspo", check=True)
    except ValueError as error:
        return results, str(error)
    return results, ""


def _compiled(part: Batch, config: LossConfig) -> Tensor:
    """The gradient of a call inside of torch.compile: it leaves the graph."""

    @torch.compile(backend="eager")
    def loss(states: Tensor, group: Any) -> Tensor:
        old = part.options["old_log_probs"]
        options = {"old_log_probs": old, "token_weights": None, "config": config, "sequence_group": group}
        return grpo_loss(states * 2.0, part.token_ids, part.advantages, part.mask, **options).loss * 0.5

    half = (part.states["logits"] / 2).requires_grad_()
    loss(half, torch.distributed.group.WORLD).backward()
    return half.grad


GLOO = [
    Case("gloo", "logits", LossConfig.preset("gspo", surrogate=Clip(0.2, 0.28)), "zigzag"),
    Case("gloo", "hidden", LossConfig(Clip(), rollout=Rejection(0.9, 1.1, "geometric")), "random"),
]


@pytest.mark.ranks
def test_two_processes():
    shares, errors = zip(*pool(2).run(_gloo_rank), strict=True)
    for case, *results in zip(GLOO, *shares, strict=False):
        got, expected = case.joined([Result(*result) for result in results], 2), case.whole()
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for share in shares:  # compiled beside as it is
        torch.testing.assert_close(share[2][0].nan_to_num(), share[0][1].nan_to_num(), rtol=1e-12, atol=1e-12)
    assert errors[0] == errors[1]
    assert "the same config on every rank of sequence_group" in errors[0]
