"""Levels of prefixes: "prefix_product" and "prefix_min", whose ratio of a token follows from those up to it."""

from __future__ import annotations

import math

import pytest
import torch
from cases import RUNNING, SURROGATES, make, sampler
from test_oracle import assert_same, problem_of, small

from grpo_kernels import (
    KL,
    Cispo,
    Clip,
    LossConfig,
    MaskedIS,
    Unclipped,
    grpo_loss,
    linear_grpo_loss,
    match,
    policy_loss,
)
from grpo_kernels.objectives.running import backward_scan, forward_scan, running_least
from grpo_kernels.objectives.sequences import Packed
from grpo_kernels.verification import reference

SUM = {"aggregation": "sequence_sum", "normalizer": 1.0, "log_ratio_limit": None}
levels = pytest.mark.parametrize("level", RUNNING)


def config_of(level: str, **fields) -> LossConfig:
    return LossConfig(**{"surrogate": Unclipped(), "level": level, "aggregation": "sequence_sum", **fields})


def slopes(log_ratio, level: str, advantages=None, mask=None, **options):
    """Loss and slopes of log-probs whose old ones are 0 nats above them by these."""
    log_ratio = torch.as_tensor(log_ratio, dtype=torch.float64)
    log_probs = (log_ratio - 3).requires_grad_()
    advantages = torch.ones(len(log_ratio), dtype=torch.float64) if advantages is None else advantages
    config = options.pop("config", config_of(level))
    old = torch.full_like(log_ratio, -3)
    out = policy_loss(log_probs, advantages, mask, config=config, old_log_probs=old, normalizer=1.0, **options)
    out.loss.backward()
    return out, log_probs.grad


# Numbers by hand


def test_products_by_hand():
    """r = 2, 1, 3 of ratios 2, 1/2, 3: the first token is part of all three, the last of one."""
    ratios = torch.tensor([[2.0, 0.5, 3.0]], dtype=torch.float64)
    out, slope = slopes(ratios.log(), "prefix_product", torch.tensor([2.0], dtype=torch.float64))
    assert out.loss.item() == pytest.approx(-2 * (2 + 1 + 3))
    assert slope.tolist()[0] == pytest.approx([-2 * 6, -2 * 4, -2 * 3])
    m = out.metrics
    assert (float(m.ratio_mean), float(m.ratio_min), float(m.ratio_max)) == pytest.approx((2.0, 1.0, 3.0))
    assert m.ratio_count == 3


def test_least_ratios_by_hand():
    """r = 2, 1/2, 1/2, 1/4: the second token has the slopes of two."""
    ratios = torch.tensor([[2.0, 0.5, 3.0, 0.25]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    out, slope = slopes(ratios.log(), "prefix_min", advantages)
    assert out.loss.item() == pytest.approx(-(2 + 1 + 1.5 + 1))
    assert slope.tolist()[0] == pytest.approx([-2, -2.5, 0, -1])
    m = out.metrics
    assert (float(m.ratio_mean), float(m.ratio_min), float(m.ratio_max)) == pytest.approx((3.25 / 4, 0.25, 2.0))


def test_of_equal_ones_the_last_has_the_slope():
    """On the policy itself each token has its own."""
    _, slope = slopes([[0.0, -1.0, -1.0, 0.5]], "prefix_min")
    assert slope.tolist()[0] == pytest.approx([-1, -math.exp(-1), -2 * math.exp(-1), 0])
    _, slope = slopes([[0.0, 0.0, 0.0]], "prefix_min", mask=torch.tensor([[0, 1, 1]]))
    assert slope.tolist()[0] == [0, -1, -1]


def test_bounds_and_metrics_are_of_tokens():
    """r = 1.5, 0.6, 1.5 under A = 1: two of three tokens are clipped, and give nothing."""
    out, slope = slopes(
        torch.tensor([[1.5, 0.4, 2.5]]).log(), "prefix_product", config=config_of("prefix_product", surrogate=Clip())
    )
    assert out.loss.item() == pytest.approx(-(1.2 + 0.6 + 1.2), rel=1e-6)
    assert slope.tolist()[0] == pytest.approx([-0.6, -0.6, 0], rel=1e-6)
    assert float(out.metrics.clip_high) == pytest.approx(2 / 3)


@levels
def test_saturation_is_of_what_is_pooled(level):
    """Three times 0.4 nats: the product passes the limit at the second token, the least never does."""
    config = config_of(level, log_ratio_limit=0.5)
    out, slope = slopes([[0.4, 0.4, 0.4]], level, config=config)
    r = math.exp(0.4)
    if level == "prefix_min":
        assert slope.tolist()[0] == pytest.approx([-r, -r, -r])
        return
    assert out.loss.item() == pytest.approx(-(r + 2 * math.exp(0.5)))
    assert slope.tolist()[0] == pytest.approx([-r, 0, 0])
    assert float(out.metrics.ratio_max) == pytest.approx(math.exp(1.2))  # metrics have it as it is


# Against the loops of 40 digits


@levels
def test_on_policy(level):
    """Ratios are all 1: of prefix_min each token has its own slope."""
    config, case = config_of(level, surrogate=Clip()), small(old_log_probs=None)
    assert_same(case, config, problem_of(case, config))


@levels
@pytest.mark.parametrize("surrogate", [one for one in SURROGATES if one.uses_ratio], ids=repr)
def test_every_surrogate(level, surrogate):
    case = small(seed=3)
    case.options["old_log_probs"].clamp_(max=-0.01)
    config = LossConfig(surrogate, level=level, aggregation="token_mean", log_ratio_limit=0.4)
    assert_same(case, config, problem_of(case, config))


@levels
def test_a_kl_of_every_level(level):
    case = small(seed=1)
    for other in ("token", "sequence", "prefix_product", "prefix_min"):
        for policy, of_kl in ((level, other), (other, level)):
            config = LossConfig(level=policy, kl=KL(0.2, ratio_weighted=True, level=of_kl))
            assert_same(case, config, problem_of(case, config))


# Scans


def by_loops(values, live, sequence, least: bool):
    """What a running level makes of one row, token by token."""
    out, columns = [], []
    for t in range(len(values)):
        before = [s for s in range(t + 1) if sequence[s] == sequence[t]]
        if not least:
            out.append(
                math.fsum(values[s] for s in before)
                if all(map(math.isfinite, values))
                else sum(values[s] for s in before)
            )
            continue
        known = [s for s in before if live[s]]
        bad = [s for s in known if math.isnan(values[s])]
        place = bad[0] if bad else min(reversed(known), key=values.__getitem__, default=-1)
        columns.append(place)
        out.append(values[place] if place >= 0 else math.inf)
    return out, columns


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 9, 33])
def test_scans_are_the_loops(length):
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        values = torch.randint(-3, 4, (length,), generator=g).double()  # many are equal; sums are exact
        if seed % 4 == 3 and length:
            values[torch.randint(length, (1,), generator=g)] = (math.nan, math.inf, -math.inf)[seed % 3]
        live = torch.rand(length, generator=g) < 0.7
        bounds = torch.cat(
            [torch.zeros(1), torch.randint(length + 1, (3,), generator=g).sort().values, torch.tensor([length])]
        )
        packed = Packed.of(bounds.long(), length)
        row, sequence = values[None], packed.sequence_of.tolist()
        links = packed.links(row)
        assert links.shape == (1, max(length - 1, 0))
        expected, _ = by_loops(values.tolist(), live.tolist(), sequence, least=False)
        torch.testing.assert_close(
            forward_scan(row, links)[0], torch.tensor(expected).double(), rtol=0, atol=0, equal_nan=True
        )
        backwards, _ = by_loops(values.flip(0).tolist(), live.tolist(), sequence[::-1], least=False)
        torch.testing.assert_close(
            backward_scan(row, links)[0].flip(0), torch.tensor(backwards).double(), rtol=0, atol=0, equal_nan=True
        )
        expected, columns = by_loops(values.tolist(), live.tolist(), sequence, least=True)
        least = running_least(row, live[None], links)
        torch.testing.assert_close(least.value[0], torch.tensor(expected).double(), rtol=0, atol=0, equal_nan=True)
        assert least.column[0].tolist() == columns


# Layouts


@levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_is_padded_bit_for_bit(level, dtype):
    """A sequence has its bits wherever it lies, beside whatever, and on every run."""
    g = torch.Generator().manual_seed(2)
    lengths = [5, 1, 70, 33]
    shape, mask = (4, 70), torch.arange(70) < torch.tensor(lengths)[:, None]
    mask &= torch.rand(shape, generator=g) < 0.8  # dead ones in the middle too
    log_probs, old = (-torch.rand(shape, generator=g, dtype=dtype) for _ in range(2))
    advantages = torch.randn(4, generator=g, dtype=dtype)
    config = config_of(level, surrogate=Clip(), kl=KL(0.1, ratio_weighted=True))

    def run(log_probs, advantages, mask, **more):
        leaf = log_probs.clone().requires_grad_()
        out = policy_loss(leaf, advantages, mask, config=config, normalizer=1.0, **more)
        out.loss.backward()
        return leaf.grad

    padded = run(log_probs, advantages, mask, old_log_probs=old, ref_log_probs=old)
    assert torch.equal(padded, run(log_probs, advantages, mask, old_log_probs=old, ref_log_probs=old))
    cut = [torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)]) for x in (log_probs, old, mask)]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packed = run(cut[0], advantages, cut[2], old_log_probs=cut[1], ref_log_probs=cut[1], cu_seqlens=bounds)
    for i, n in enumerate(lengths):
        assert torch.equal(packed[bounds[i] : bounds[i + 1]], padded[i, :n])
        alone = run(
            log_probs[i : i + 1],
            advantages[i : i + 1],
            mask[i : i + 1],
            old_log_probs=old[i : i + 1],
            ref_log_probs=old[i : i + 1],
        )
        assert torch.equal(alone[0], padded[i])


@levels
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_dead_tokens_have_no_part(level, bad):
    ratios = [[0.2, -0.3, 0.5, -0.1]]
    _, expected = slopes(ratios, level)
    mask = torch.tensor([[0, 1, 0, 1, 1, 0, 1, 0]])
    wide = torch.full((1, 8), bad, dtype=torch.float64)
    wide[mask != 0] = torch.tensor(ratios[0], dtype=torch.float64)
    out, slope = slopes(wide, level, mask=mask)
    torch.testing.assert_close(slope[mask != 0], expected[0], rtol=1e-15, atol=0)
    assert (slope[mask == 0] == 0).all()
    assert out.metrics.ratio_count == 4


@levels
def test_a_nan_stays_behind_itself(level):
    """In its sequence, from its token on."""
    given = torch.tensor([[0.1, math.nan, -0.2], [0.3, -0.1, 0.2]])
    old, log_probs = torch.full((2, 3), -3.0), given - 3
    options = {"config": config_of(level), "old_log_probs": old, "token_losses": True}
    losses = policy_loss(log_probs, torch.ones(2), **options).token_losses
    assert losses.isnan().tolist() == [[False, True, True], [False] * 3]
    clean = policy_loss(log_probs.nan_to_num(-1.0), torch.ones(2), **options).token_losses
    assert torch.equal(losses[~losses.isnan()], clean[~losses.isnan()])


@levels
@pytest.mark.parametrize("limit", [None, 20.0])
def test_impossible_tokens(backend, level, limit):
    """ℓ = -inf: the ratio is 0 from it on, no slope goes to it, those before keep what they have of theirs."""
    case = make(batch=1, length=4, vocab=7, empty=False, extra_row=False, dtype=torch.float64)
    case.mask[:] = True
    case.logits[0, 1, case.token_ids[0, 1]] = -math.inf
    config = config_of(level, log_ratio_limit=limit)
    out, gradient = case.run(backend, config=config)
    expected, wanted = case.reference(config=config)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
    assert gradient.isfinite().all()
    assert (gradient[0, 1:] == 0).all()
    assert (gradient[0, 0] != 0).any()


# From hidden states


@levels
@pytest.mark.parametrize("chunk_bytes", [1 << 30, 6000, 2500])
def test_hidden_states(level, chunk_bytes):
    """One chunk, chunks of whole sequences, and the logits twice where the longest does not fit one."""
    case = make(batch=5, length=11, vocab=23, dtype=torch.float64, noise=0.2)
    weight = torch.eye(23, dtype=torch.float64)
    config = config_of(level, surrogate=Clip(), kl=KL(0.1, ratio_weighted=True))
    options = {**case.options, "config": config, "rollout_log_probs": sampler(case)}
    expected, wanted = case.reference(config=config)
    leaf = case.logits.clone().requires_grad_()
    out = linear_grpo_loss(leaf, weight, *case.arguments, chunk_bytes=chunk_bytes, **options)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(leaf.grad, wanted, rtol=1e-9, atol=1e-13)
    for name in ("ratio_mean", "ratio_min", "ratio_max", "clip_fraction"):
        torch.testing.assert_close(getattr(out.metrics, name), getattr(expected.metrics, name))


# What goes with it


@levels
def test_the_route_says_why(level):
    case = make()
    out, _ = case.run("cpu", config=LossConfig(level=level))
    assert (out.route.passes, f"level '{level}' pools the ratios of a sequence" in out.route.reason) == (2, True)
    out, _ = case.run("cpu", config=LossConfig(level=level), old_log_probs=None)
    assert (out.route.passes, f"level '{level}' spreads the slopes of a sequence" in out.route.reason) == (2, True)


@levels
def test_half_precision_log_probs_are_refused(level):
    case = make()
    case.options["old_log_probs"] = case.options["old_log_probs"].bfloat16()
    with pytest.raises(ValueError, match=f'old_log_probs in float32 with level="{level}"'):
        case.run("cpu", config=LossConfig(level=level))


def test_in_a_compiled_graph():
    case = make(vocab=31, dtype=torch.float64)
    kl = KL(0.1, ratio_weighted=True, level="prefix_min")
    config = LossConfig(level="prefix_product", kl=kl, rollout=MaskedIS(0.5, 5.0))
    options = {**case.options, "config": config, "rollout_log_probs": sampler(case)}
    compiled = torch.compile(
        lambda logits: grpo_loss(logits, *case.arguments, **options).loss, fullgraph=True, backend="aot_eager"
    )
    leaf = case.logits.clone().requires_grad_()
    compiled(leaf).backward()
    _, wanted = case.reference(config=config, rollout_log_probs=options["rollout_log_probs"])
    torch.testing.assert_close(leaf.grad, wanted, rtol=1e-8, atol=1e-13)


def up_to(log_ratio, mask, level):
    """Log-ratios of prefixes as they are written by hand; 0 where the mask is."""
    if level == "prefix_product":
        return (log_ratio * mask).cumsum(-1) * mask
    return torch.where(mask > 0, torch.where(mask > 0, log_ratio, torch.inf).cummin(-1).values, 0.0)


def clipped(log_ratio, advantages):
    return -torch.minimum(log_ratio.exp() * advantages, log_ratio.exp().clamp(0.8, 1.3) * advantages)


@levels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_match_finds_it(level, dtype):
    def loss(log_probs, old_log_probs, ref_log_probs, advantages, mask):
        tensors = (log_probs, old_log_probs, ref_log_probs, advantages[:, None], mask)
        log_probs, old_log_probs, ref_log_probs, advantages, mask = (each.to(dtype) for each in tensors)
        distance = ref_log_probs - log_probs
        terms = clipped(up_to(log_probs - old_log_probs, mask, level), advantages)
        terms = terms + 0.04 * (distance.exp() - distance - 1)
        return (terms * mask).sum() / mask.sum()

    report = match(loss)
    kl = KL(0.04, limit=(None, None))
    assert report.matched, report
    assert report.config == LossConfig(Clip(0.2, 0.3), level, aggregation="token_mean", kl=kl, log_ratio_limit=None)


@levels
def test_match_finds_it_from_logits(level):
    """Equal ratios are so but for rounding, which is not that of match."""

    def loss(logits, token_ids, old_log_probs, advantages, mask):
        scaled = logits[:, :-1] / 0.8
        log_probs = scaled.gather(-1, token_ids[..., None]).squeeze(-1) - scaled.logsumexp(-1)
        terms = clipped(up_to(log_probs - old_log_probs, mask, level), advantages[:, None])
        return (terms * mask).sum(-1).mean() / 40

    report = match(loss)
    assert report.matched, report
    assert (report.config.level, report.config.surrogate, report.temperature) == (level, Clip(0.2, 0.3), 0.8)
    assert report.config.constant_length == 40


@levels
def test_match_finds_weights_of_prefixes(level):
    """Detached: a token's slope is its own."""

    def loss(log_probs, old_log_probs, advantages, mask):
        weight = up_to(log_probs - old_log_probs, mask, level).detach().exp().clamp(max=3.0)
        return -(weight * advantages[:, None] * log_probs * mask).sum() / mask.sum()

    report = match(loss)
    assert report.matched, report
    assert (report.config.surrogate, report.config.level) == (Cispo(cap=3.0), level)


def test_match_knows_which_of_equal_ratios_has_the_slope():
    """On the policy itself the first token alone would learn."""

    def loss(log_probs, old_log_probs, advantages, mask):
        least, leasts = torch.full_like(log_probs[:, 0], 100.0), []
        for live, log_ratio in zip(mask.T > 0, (log_probs - old_log_probs).T, strict=True):
            least = torch.where(live & (log_ratio < least), log_ratio, least)
            leasts.append(least)
        terms = clipped(torch.where(mask > 0, torch.stack(leasts, -1), 0.0), advantages[:, None])
        return (terms * mask).sum() / mask.sum()

    report = match(loss)
    assert not report
    assert report.strange == (
        "of equal ratios of a prefix another than the last has the slope: on the policy itself, where all are 1, "
        "tokens have none (torch.cummin takes the last)",
    )


def test_match_takes_no_other_prefix_for_one_of_ours():
    """The largest ratio of a prefix, and the mean, are no level."""

    def largest(log_probs, old_log_probs, advantages, mask):
        log_ratio = -up_to(old_log_probs - log_probs, mask, "prefix_min")
        return (clipped(log_ratio, advantages[:, None]) * mask).sum() / mask.sum()

    def mean(log_probs, old_log_probs, advantages, mask):
        log_ratio = up_to(log_probs - old_log_probs, mask, "prefix_product") / mask.cumsum(-1).clamp(min=1)
        return (clipped(log_ratio, advantages[:, None]) * mask).sum() / mask.sum()

    for loss in (largest, mean):
        report = match(loss)
        assert not report
        assert "nor the product or the least of those up to it" in report.strange[0]


def test_reference_pools_as_it_says():
    """Its two lines, of numbers whose sums are exact."""
    own = torch.tensor([1.0, -2.0, 0.5, -2.0, 3.0, 1.0])
    sequence = torch.tensor([0, 0, 0, 0, 2, 2])
    assert reference.terms.pool("prefix_product", own, sequence, 3).tolist() == [1, -1, -0.5, -2.5, 3, 4]
    assert reference.terms.pool("prefix_min", own, sequence, 3).tolist() == [1, -2, -2, -2, 3, 1]
