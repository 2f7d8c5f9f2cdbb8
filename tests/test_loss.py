"""grpo_loss on every backend against the float64 reference, by the ULP rule."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cases import DTYPES, ROLLOUTS, SURROGATES, configs, label, make, one_of_each, sampler

from grpo_kernels import (
    KL,
    Cispo,
    Clip,
    GRPOLoss,
    LossConfig,
    MaskedIS,
    OffPolicyMask,
    Reinforce,
    Rejection,
    TruncatedIS,
    Unclipped,
    grpo_loss,
    token_log_probs,
)
from grpo_kernels.backends import ops
from grpo_kernels.verification.tolerance import compare, truth_of
from grpo_kernels.verification.verify import complete

VOCABULARIES = (1, 2, 31, 32, 33, 97, 1000, 4096, 4097, 32000, 50257)


def check(case, backend: str, announced: bool = True, **options) -> None:
    """Loss, log-probs, entropy, gradient and metrics of a case obey the rule; its clip is exercised."""
    scale = 2.0**12 if case.logits.dtype == torch.float16 else 1.0
    given = {**case.options, **options}
    truth = truth_of(case.logits, *case.arguments, **given)
    out, gradient = case.run(backend, scale, grad_scale=scale if announced else None, **options)
    comparison = compare(truth, out.loss, out.log_probs, out.entropy, gradient, scale)
    assert comparison.holds, comparison
    rows = gradient.reshape(case.mask.shape[0], -1, gradient.shape[-1])[:, : case.mask.shape[1]]
    assert (rows[~case.mask] == 0).all()
    assert (out.log_probs[~case.mask] == 0).all()
    assert (out.entropy[~case.mask] == 0).all()
    for name, value in out.metrics.as_dict().items():
        # metrics of fp32 log-probs: the ratio's own sensitivity to them, times their size
        tolerance = 1e-12 if case.logits.dtype == torch.float64 else 2e-4
        if not (comparison.edges and name.startswith("clip")):
            assert value.item() == pytest.approx(truth.metrics[name].item(), rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("config", configs(), ids=label)
def test_every_config(backend, config, dtype):
    noise = 0.3 if config.level == "token" else 0.2
    check(make(dtype=dtype, noise=noise), backend, config=config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", one_of_each(), ids=label)
def test_half_precision(backend, config, dtype):
    """The maths of tokens is in fp32 as well; what differs is what is read and written."""
    case = make(dtype=dtype, noise=0.2)
    check(case, backend, config=config, rollout_log_probs=sampler(case))


@pytest.mark.parametrize("config", one_of_each(), ids=label)
def test_on_policy(backend, config):
    case = make(old_log_probs=None)
    check(case, backend, config=config, rollout_log_probs=sampler(case))


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("scheme", ROLLOUTS, ids=str)
@pytest.mark.parametrize("surrogate", [Clip(0.2, 0.28), Cispo(cap=1.1)], ids=str)
def test_rollout_correction(backend, surrogate, scheme, old):
    """Every scheme and several at once, with old log-probs and strictly on-policy; factors are not all the same."""
    case = make(batch=12, noise=0.3, entropy_coef=0.02, kl_coef=0.05)
    options = {"config": LossConfig(surrogate, rollout=scheme), "rollout_log_probs": sampler(case)}
    options |= {} if old else {"old_log_probs": None}
    check(case, backend, **options)
    out, gradient = case.run(backend=backend, **options)
    _, plain = case.run(backend=backend, **options | {"config": LossConfig(surrogate)})
    assert (gradient - plain).abs().max() > 1e-3 * plain.abs().max()
    if not isinstance(scheme, TruncatedIS):
        assert 0 < float(out.metrics.rollout_rejected) < 1


@pytest.mark.parametrize("level", ["sequence", "sequence_token", "sequence_product"])
@pytest.mark.parametrize("scheme", [TruncatedIS(1.1), MaskedIS(0, 1.3, "sequence"), OffPolicyMask(0.02)], ids=str)
def test_rollout_correction_of_pooled_ratios(backend, scheme, level):
    for old in (True, False):
        case = make(noise=0.2, **({} if old else {"old_log_probs": None}))
        check(case, backend, config=LossConfig(level=level, rollout=scheme), rollout_log_probs=sampler(case))


def test_unknown_samplers_weigh_one(backend):
    case = make()
    unknown = torch.full(case.token_ids.shape, math.nan)
    plain, expected = case.run(backend=backend)
    for scheme in (*ROLLOUTS, MaskedIS(1.1, 1.5), Rejection(1.1, 1.5)):  # the last two would drop a ratio of 1
        if not isinstance(scheme, tuple):
            out, gradient = case.run(backend=backend, config=LossConfig(rollout=scheme), rollout_log_probs=unknown)
            torch.testing.assert_close(out.loss, plain.loss)
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("config", [LossConfig(), LossConfig(Cispo()), LossConfig(level="sequence")], ids=label)
def test_entropy_threshold(backend, config):
    """High-entropy tokens alone have a policy term; a number and a tensor are the same."""
    case = make(kl_coef=0.05, noise=0.1)
    threshold = float(case.run()[0].entropy[case.mask].quantile(0.7))
    check(case, backend, config=config, entropy_threshold=threshold)
    out, gradient = case.run(backend=backend, config=config, entropy_threshold=torch.tensor(threshold))
    number, same = case.run(backend=backend, config=config, entropy_threshold=threshold)
    assert torch.equal(gradient, same)
    assert torch.equal(out.loss, number.loss)
    assert (gradient - case.run(backend=backend, config=config)[1]).abs().max() > 0


def test_one_pass_serves_what_needs_no_other_token(monkeypatch):
    """Surrogates with an arm, a token's own rollout factor, and factors that follow from old log-probs."""
    calls = []
    original = ops.fused_loss
    monkeypatch.setattr(ops, "fused_loss", lambda *rest: calls.append(1) or original(*rest))
    case = make()
    rollout = sampler(case)

    def passes(config, **options) -> bool:
        calls.clear()
        case.run(backend="cpu", config=config, rollout_log_probs=rollout, **options)
        return bool(calls)

    for surrogate in SURROGATES:
        assert passes(LossConfig(surrogate)) == (surrogate.kernel_id is not None)
    assert passes(LossConfig(rollout=TruncatedIS(2.0)), old_log_probs=None)
    assert passes(LossConfig(rollout=MaskedIS(0, 3, "sequence")))
    assert not passes(LossConfig(rollout=MaskedIS(0, 3, "sequence")), old_log_probs=None)
    assert not passes(LossConfig(rollout=OffPolicyMask(0.1)))
    assert passes(LossConfig(), entropy_threshold=1.0)


def test_a_rejected_token_has_no_part_whatever_its_ratio(backend):
    """An infinite ratio that is rejected: 0 wins."""
    case = make()
    options = {"rollout_log_probs": case.options["old_log_probs"] - 100.0, "old_log_probs": None}
    for schemes in ((TruncatedIS(math.inf), Rejection(0.9, 1.1, "geometric")), (MaskedIS(0, 3, "sequence"),)):
        config = LossConfig(rollout=schemes, log_ratio_limit=None)
        out, gradient = case.run(backend=backend, config=config, **options)
        assert out.loss == 0
        assert (gradient == 0).all()
        assert case.reference(config=config, **options)[0].loss == 0


def test_a_threshold_hides_no_nan(backend):
    case = make(entropy_threshold=0.1)
    b, t = case.mask.nonzero()[0].tolist()
    case.logits[b, t, 3] = math.nan
    assert case.run(backend=backend)[0].loss.isnan()
    assert case.reference()[0].loss.isnan()


def test_rollout_correction_needs_a_sampler():
    case = make()
    with pytest.raises(ValueError, match=r"expected rollout_log_probs \(the sampler's\) for TruncatedIS"):
        case.run(config=LossConfig(rollout=TruncatedIS(2.0)))
    with pytest.raises(ValueError, match="pooled over sequences with an advantage per token"):
        per_token = case.advantages[:, None].expand(6, 9)
        options = {"config": LossConfig(rollout=MaskedIS(0, 3, "sequence")), "rollout_log_probs": sampler(case)}
        grpo_loss(
            case.logits, case.token_ids, per_token, case.mask, skip_zero_advantage=True,
            old_log_probs=case.options["old_log_probs"], **options,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_every_vocabulary(backend, vocab, dtype):
    """Around the vector (32), the segment (4096) and real sizes; odd ones leave every row misaligned."""
    check(make(batch=2, length=3, vocab=vocab, dtype=dtype, empty=False), backend, config=complete("dapo"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_vocabulary(backend, dtype):
    check(make(batch=1, length=2, vocab=151936, dtype=dtype), backend, config=complete("grpo"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_scales_and_shifts(backend, spread, shift, dtype):
    check(make(spread=spread, shift=shift, dtype=dtype), backend, config=complete("dapo", entropy_coef=0.02))


@pytest.mark.parametrize(
    "transform",
    [
        {"temperature": 0.7},
        {"temperature": 1.9, "logit_scale": 0.3},
        {"logit_softcap": 30.0},
        {"logit_softcap": 3.0, "temperature": 0.8, "logit_scale": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("entropy", [0.0, 0.1])
@pytest.mark.parametrize("vocab", [97, 4999])
def test_logit_arguments(backend, transform, entropy, vocab):
    check(make(batch=3, length=5, vocab=vocab, **transform), backend, config=complete("grpo", entropy_coef=entropy))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unannounced_scale(backend, dtype):
    """Without grad_scale: fp16 takes two passes, the others rescale what they wrote."""
    check(make(dtype=dtype), backend, announced=False, config=complete("grpo"))


def test_clip_is_exercised():
    """Old log-probs near the policy's, so that a share of tokens is clipped: else a test of the clip tests nothing."""
    for config in (LossConfig(Clip(0.2, 0.28)), LossConfig(Clip(0.2, 0.2, dual=1.3))):
        out, _ = make(batch=16, length=32).run(config=config)
        assert 0.1 < out.metrics.clip_fraction.item() < 0.6
        assert out.metrics.clip_low.item() > 0.05
        assert out.metrics.clip_high.item() > 0.05
    assert out.metrics.clip_dual.item() > 0.02


def test_token_advantages(backend):
    case = make()
    case.advantages = torch.randn(case.mask.shape)
    for level in ("token", "sequence", "sequence_token", "sequence_product"):
        check(case, backend, config=LossConfig(Clip(), level=level, kl=KL(0.05)))


def test_token_weights(backend):
    case = make(token_weights=torch.rand(6, 9) * 2)
    for level in ("token", "sequence", "sequence_token"):
        check(case, backend, config=LossConfig(Clip(), level=level, kl=KL(0.05)))


def test_rollout_metrics(backend):
    case = make()
    rollout = case.options["old_log_probs"] + 0.1 * torch.randn(6, 9)
    rollout[0, 2] = rollout[3, 0] = float("nan")
    check(case, backend, rollout_log_probs=rollout, config="grpo")
    out, _ = case.run(backend, rollout_log_probs=rollout, config="grpo")
    assert 0 < out.metrics.rollout_effective_sample_size.item() < 1
    assert 0 < abs(out.metrics.k1_rollout.item()) < 1


@pytest.mark.parametrize("surrogate", [Unclipped(), Clip(), Reinforce()], ids=str)
def test_skip_zero_advantage(backend, surrogate):
    case = make()
    config = LossConfig(surrogate)
    check_options = {"config": config, "skip_zero_advantage": True}
    out, gradient = case.run(backend, **check_options)
    expected, expected_gradient = case.run(backend, config=config)
    torch.testing.assert_close(out.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)
    assert out.metrics.skipped_tokens == case.mask[2].sum()
    assert (out.log_probs[2] == 0).all()
    case.logits[2] = float("nan")  # never read
    out, again = case.run(backend, **check_options)
    torch.testing.assert_close(out.loss, expected.loss)
    assert torch.equal(again, gradient)


def test_annealed_coefficients(backend):
    """Per-call coefficients, as numbers and as device tensors, replace the config's."""
    case = make()
    config = LossConfig(Clip(), kl=KL(0.3), entropy_coef=0.2)
    expected, expected_gradient = case.run(backend, config=config)
    bare = LossConfig(Clip())
    for coefficients in ((0.3, 0.2), (torch.tensor(0.3), torch.tensor(0.2))):
        out, gradient = case.run(backend, config=bare, kl_coef=coefficients[0], entropy_coef=coefficients[1])
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(gradient, expected_gradient)
    out, _ = case.run(backend, config=config, kl_coef=0.0, entropy_coef=0.0, ref_log_probs=None)
    assert torch.equal(out.loss, case.run(backend, config=bare)[0].loss)
    tensors = {"temperature": torch.tensor(0.7), "logit_scale": torch.tensor(1.5)}
    numbers = {name: value.item() for name, value in tensors.items()}
    assert torch.equal(case.run(backend, **tensors)[1], case.run(backend, **numbers)[1])


def test_grad_scale(backend):
    case = make()
    out, gradient = case.run(backend, scale=0.25)
    for announced in (0.25, torch.tensor(0.25)):
        scaled, scaled_gradient = case.run(backend, scale=0.25, grad_scale=announced)
        assert torch.equal(scaled.loss, out.loss)
        assert torch.equal(scaled_gradient, gradient)  # a power of two: no rounding
    wrong, wrong_gradient = case.run(backend, scale=0.25, grad_scale=8.0)
    assert torch.equal(wrong_gradient, gradient)


def test_module_is_the_function(backend):
    case = make()
    module = GRPOLoss("dapo", temperature=0.7, backend=backend)
    out = module(case.logits, *case.arguments, old_log_probs=case.options["old_log_probs"])
    expected = grpo_loss(
        case.logits, *case.arguments, old_log_probs=case.options["old_log_probs"], config="dapo", temperature=0.7
    )
    torch.testing.assert_close(out.loss, expected.loss)
    assert "clip(r, 0.8, 1.28)" in repr(module)
    given = {"old_log_probs": case.options["old_log_probs"], "config": "gspo", "temperature": 0.5}
    out, expected = module(case.logits, *case.arguments, **given), grpo_loss(case.logits, *case.arguments, **given)
    torch.testing.assert_close(out.loss, expected.loss)  # a call's own stand in place of what is fixed


def test_log_probs_are_the_losss(backend):
    case = make(temperature=0.8)
    out, _ = case.run(backend)
    again = token_log_probs(case.logits, case.token_ids, case.mask, temperature=0.8, backend=backend)
    assert torch.equal(out.log_probs, again.log_probs)
    assert torch.equal(out.entropy, again.entropy)


def test_own_loss_on_log_probs(backend):
    """Any loss written on token_log_probs gets the gradient of plain PyTorch, through both outputs."""
    case = make(dtype=torch.float64)
    leaf, plain = (case.logits.clone().requires_grad_() for _ in range(2))
    out = token_log_probs(leaf, case.token_ids, case.mask, temperature=0.9, backend=backend)
    (out.log_probs.square() * 0.3 + torch.sin(out.entropy)).sum().backward()
    log_p = torch.log_softmax(plain[:, :9] / 0.9, -1)
    log_probs = log_p.gather(-1, case.token_ids[..., None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    ((log_probs.square() * 0.3 + torch.sin(entropy)) * case.mask).sum().backward()
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-11, atol=1e-13)


def test_gradient_is_unbiased(backend):
    """Signed relative errors average out over 1e6 elements: to 3e-8 inside a row, to 4 standard errors over rows.

    What is allowed beside that is one fp32 rounding of log2(e)/temperature, half a unit, which acts as a temperature
    off by 3e-8: element and ratio each move by it times z - E[z]. Measured on the CPU kernels at temperature 1: 5e-8
    for each of the two, and 1e-8 where the rounding happens to be exact (temperature log2(e)).
    """
    case = make(batch=10, length=12, vocab=20000, empty=False)
    case.mask[:] = True
    truth = truth_of(case.logits, *case.arguments, **case.options)
    _, gradient = case.run(backend)
    live = (truth.gradient.abs().amax(-1) > 0) & ~truth.edge
    relative = gradient[:, :12].double()[live] / truth.gradient[live] - 1
    target = torch.arange(20000) == case.token_ids[live][:, None]
    relative = relative.masked_fill(target, 0.0)
    assert relative.numel() > 10**6
    row_means = relative.mean(-1)
    spread = row_means.std().item() / len(row_means) ** 0.5
    z = case.logits[:, :12].double()[live]
    off_centre = (z.mean(-1) - (z.softmax(-1) * z).sum(-1)).abs().mean().item()
    assert abs(row_means.mean().item()) < 4 * spread + 2 * 2.0**-25 * off_centre
    inside = relative - relative.sort(-1).values[:, relative.shape[-1] // 2, None]  # CUDA refuses median(-1)
    assert abs(inside.mean().item()) < 3e-8


@pytest.mark.parametrize("wrong", [1e3, 1e-30, math.nan])
def test_the_rule_reads_what_predicts_nothing(wrong):
    """The row behind the last token has no gradient; what a kernel leaves there is a fault."""
    case = make()
    truth = truth_of(case.logits, *case.arguments, **case.options)
    out, gradient = case.run("torch")
    found = (out.loss, out.log_probs, out.entropy)
    assert gradient.shape[1] == truth.log_probs.shape[1] + 1
    assert compare(truth, *found, gradient).holds
    changed = gradient.clone()
    changed[1, -1, 3] = wrong
    assert not compare(truth, *found, changed).holds


def test_rows_at_an_edge_are_numbers():
    """Which side of a clip they are on fp32 does not tell, but that they are numbers."""
    case = make()
    truth = truth_of(case.logits, *case.arguments, **case.options)
    edge = torch.zeros_like(truth.edge)
    edge[0, 0] = True
    truth = dataclasses.replace(truth, edge=edge)
    out, gradient = case.run("torch")
    assert compare(truth, out.loss, out.log_probs, out.entropy, gradient).gradient <= 1
    changed = gradient.clone()
    changed[0, 0, 0] = math.nan
    assert compare(truth, out.loss, out.log_probs, out.entropy, changed).gradient == math.inf
    assert compare(truth, out.loss * math.nan, out.log_probs, out.entropy, gradient).loss == math.inf
