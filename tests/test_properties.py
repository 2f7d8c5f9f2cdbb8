"""What must hold for every batch: properties of the objective, in float64 on the fastest backend."""

from __future__ import annotations

import pytest
import torch
from cases import LEVELS, RUNNING, exact_log_probs, make
from hypothesis import given
from hypothesis import strategies as st

from grpo_kernels import KL, Clip, LossConfig, Reinforce, Unclipped, token_log_probs

cases = st.builds(
    make,
    batch=st.integers(1, 5),
    length=st.integers(1, 6),
    vocab=st.sampled_from([1, 2, 5, 33, 70]),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.1, 2.0, 8.0]),
    noise=st.sampled_from([0.05, 0.4, 3.0]),
    dtype=st.just(torch.float64),
)
configs = st.builds(
    LossConfig,
    st.sampled_from([Clip(0.2, 0.28), Clip(0.1, 0.3, dual=2.0), Unclipped()]),
    level=st.sampled_from(["token", "sequence", "sequence_token", "sequence_product"]),
    aggregation=st.sampled_from(["token_mean", "sequence_mean", "sequence_sum"]),
    kl=st.sampled_from([KL(), KL(0.1), KL(0.1, "k2", ratio_weighted=True)]),
    entropy_coef=st.sampled_from([0.0, 0.1]),
)
token_configs = configs.filter(lambda config: config.level == "token")
TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, **TIGHT)


def reindexed(case, index):
    """Some of a case's sequences, in another order."""
    case.logits, case.token_ids = case.logits[index], case.token_ids[index]
    case.advantages, case.mask = case.advantages[index], case.mask[index]
    case.options = {name: value[index] for name, value in case.options.items()}
    return case


def plain(case):
    """Without a reference policy."""
    case.options = {"old_log_probs": case.options["old_log_probs"]}
    return case


@given(cases, configs, st.floats(-50, 50))
def test_shift_of_the_logits(case, config, shift):
    out, gradient = case.run(config=config)
    case.logits = case.logits + shift
    shifted, shifted_gradient = case.run(config=config)
    close(shifted.loss, out.loss)
    close(shifted_gradient, gradient)


@given(cases, configs, st.randoms(use_true_random=False))
def test_permutation_of_the_vocabulary(case, config, random):
    out, gradient = case.run(config=config)
    order = list(range(case.logits.shape[-1]))
    random.shuffle(order)
    order = torch.tensor(order)
    case.logits, case.token_ids = case.logits[..., order], order.argsort()[case.token_ids]
    permuted, permuted_gradient = case.run(config=config)
    close(permuted.loss, out.loss)
    close(permuted_gradient, gradient[..., order])


@given(cases, configs)
def test_order_of_the_sequences(case, config):
    out, gradient = case.run(config=config)
    index = torch.arange(len(case.mask)).flip(0)
    turned, turned_gradient = reindexed(case, index).run(config=config)
    close(turned.loss, out.loss)
    assert torch.equal(turned.log_probs, out.log_probs[index])
    close(turned_gradient, gradient[index])


@given(cases, configs)
def test_rows_of_the_gradient_sum_to_zero(case, config):
    """Softmax does not see a common shift."""
    _, gradient = case.run(config=config)
    assert (gradient.sum(-1).abs() <= 1e-13 * (1 + gradient.abs().sum(-1)) * gradient.shape[-1]).all()


@given(cases, token_configs)
def test_off_target_gradients_have_the_slopes_sign(case, config):
    """d loss / d logit_j = -g·p_j: all of one sign beside the sampled token."""
    _, gradient = case.run(config=LossConfig(config.surrogate, kl=config.kl))
    rows = gradient[:, : case.mask.shape[1]]
    others = rows.masked_fill(torch.arange(rows.shape[-1]) == case.token_ids[..., None], 0.0)
    signs = others.sign()
    assert ((signs.amax(-1) - signs.amin(-1)) <= 1).all()


@given(cases, configs, st.integers(1, 4))
def test_padding_changes_nothing(case, config, more):
    out, gradient = case.run(config=config)

    def pad(x: torch.Tensor, dim: int) -> torch.Tensor:
        shape = [*x.shape]
        shape[dim] = more
        return torch.cat([x, torch.zeros(shape, dtype=x.dtype)], dim)

    case.logits, case.token_ids, case.mask = pad(case.logits, 1), pad(case.token_ids, 1), pad(case.mask, 1)
    case.options = {name: pad(value, 1) for name, value in case.options.items()}
    padded, padded_gradient = case.run(config=config)
    close(padded.loss, out.loss)
    length = gradient.shape[1] - 1
    close(padded_gradient[:, :length], gradient[:, :length])


@given(cases, configs, st.floats(0.1, 10))
def test_scaled_advantages_scale_the_policy_term(case, config, factor):
    config = LossConfig(config.surrogate, config.level, config.aggregation)
    out, gradient = case.run(config=config)
    case.advantages = case.advantages * factor
    scaled, scaled_gradient = case.run(config=config)
    torch.testing.assert_close(scaled.loss, out.loss * factor, rtol=1e-5, atol=1e-6)  # advantages are fp32
    torch.testing.assert_close(scaled_gradient, gradient * factor, rtol=1e-5, atol=1e-7)


@given(cases, configs)
def test_zero_advantages_leave_the_kl(case, config):
    case.advantages = torch.zeros_like(case.advantages)
    out, gradient = case.run(config=LossConfig(config.surrogate, config.level, kl=KL(0.3)))
    assert out.metrics.policy_loss == 0
    close(out.loss, 0.3 * sequence_mean(k3(case, out), case.mask))
    _, none = plain(case).run(config=LossConfig(config.surrogate, config.level))
    assert (none == 0).all()
    assert gradient.shape == none.shape


def k3(case, out) -> torch.Tensor:
    x = torch.where(case.mask, out.log_probs - case.options["ref_log_probs"], 0.0).clamp(-20, 20)
    return torch.expm1(-x) + x


def sequence_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return ((values * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


@given(cases, st.sampled_from(["token", "sequence", "sequence_token"]))
def test_on_policy_is_reinforce(case, level):
    """With old = none the gradient of every ratio objective is the policy gradient."""
    case.options = {"old_log_probs": None}
    _, expected = case.run(config=LossConfig(Reinforce()))
    for surrogate in (Clip(), Unclipped()):
        _, gradient = case.run(config=LossConfig(surrogate, level=level))
        close(gradient, expected)


@given(cases)
def test_on_policy_is_old_equal_to_new(case):
    """Log-probs of the same kernels as old: the same numbers as without, at every level."""
    for level in (*LEVELS, *RUNNING):
        config = LossConfig(Clip(), level=level)
        case.options = {"old_log_probs": None}
        out, gradient = case.run(config=config)
        with torch.no_grad():
            old = token_log_probs(case.logits, case.token_ids, case.mask).log_probs
        case.options = {"old_log_probs": old}
        again, again_gradient = case.run(config=config)
        close(again.loss, out.loss)
        close(again_gradient, gradient)
        assert again.metrics.clip_fraction == 0


@given(cases)
def test_on_policy_gspo_is_grpo(case):
    case.options = {"old_log_probs": None}
    close(case.run(config="gspo")[1], case.run(config="grpo")[1])


@given(cases)
def test_equal_lengths_make_means_agree(case):
    case.mask[:] = True
    a = case.run(config=LossConfig(Clip(), aggregation="token_mean"))
    b = case.run(config=LossConfig(Clip(), aggregation="sequence_mean"))
    close(a[0].loss, b[0].loss)
    close(a[1], b[1])


@given(cases)
def test_clip_is_pessimistic(case):
    """The clipped loss is never below the unclipped one, and equal to it where every ratio is inside."""
    clipped, gradient = plain(case).run(config=LossConfig(Clip(0.2, 0.28)))
    free, free_gradient = case.run(config=LossConfig(Unclipped()))
    assert clipped.loss >= free.loss - 1e-12
    if free.metrics.ratio_min >= 0.8 and free.metrics.ratio_max <= 1.28:
        close(clipped.loss, free.loss)
        close(gradient, free_gradient)


@given(cases)
def test_large_dual_is_none(case):
    a = plain(case).run(config=LossConfig(Clip()))
    b = case.run(config=LossConfig(Clip(dual=1e30)))
    assert torch.equal(a[1], b[1])
    assert torch.equal(a[0].loss, b[0].loss)


@given(cases)
def test_kl_is_positive(case):
    """k2 and k3 are >= 0, and 0 iff the log-probs are equal."""
    for estimator in ("k2", "k3"):
        config = LossConfig(Clip(), kl=KL(1.0, estimator))
        out, _ = case.run(config=config)
        assert out.metrics.kl >= 0
        assert (out.metrics.kl > 0) == bool((k3(case, out)[case.mask] > 0).any())
    out, _ = case.run(config=config, ref_log_probs=out.log_probs)
    assert out.metrics.kl == 0


@given(cases)
def test_one_token_makes_levels_agree(case):
    case.mask[:] = False
    case.mask[:, 0] = True
    expected = case.run(config=LossConfig(Clip(), kl=KL(0.1, ratio_weighted=True)))
    for level in (*LEVELS[1:], *RUNNING):
        got = case.run(config=LossConfig(Clip(), level=level, kl=KL(0.1, ratio_weighted=True)))
        close(got[0].loss, expected[0].loss)
        close(got[1], expected[1])


@given(cases)
def test_sequence_level_gives_its_tokens_one_slope(case):
    """GSPO: d loss / d log-prob is the same at every live token of a sequence."""
    case = plain(case)
    _, gradient = case.run(config=LossConfig(Clip(), level="sequence"))
    log_probs = exact_log_probs(case.logits[:, : case.mask.shape[1]], case.token_ids)
    own = gradient[:, : case.mask.shape[1]].gather(-1, case.token_ids[..., None]).squeeze(-1)
    slope = own / -torch.expm1(log_probs)
    for i in range(len(case.mask)):
        live = case.mask[i] & (log_probs[i] < -1e-6)
        if live.any():
            torch.testing.assert_close(
                slope[i][live], slope[i][live][:1].expand(int(live.sum())), rtol=1e-6, atol=1e-12
            )


@given(cases, st.sampled_from([0.5, 0.7, 1.3, 2.0]))
def test_temperature_is_division(case, temperature):
    out = token_log_probs(case.logits, case.token_ids, case.mask, temperature=temperature)
    divided = token_log_probs(case.logits / temperature, case.token_ids, case.mask)
    close(out.log_probs, divided.log_probs)
    close(out.entropy, divided.entropy)


@given(cases, configs, st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_is_fp32_of_its_values(case, config, dtype):
    """The same arithmetic after the load: the gradient is the fp32 one, rounded."""
    half = case.logits.to(dtype)
    case.logits = half.float()
    expected, expected_gradient = case.run(config=config, grad_scale=1.0)
    case.logits = half
    out, gradient = case.run(config=config, grad_scale=1.0)
    torch.testing.assert_close(out.log_probs, expected.log_probs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.float(), expected_gradient, rtol=rounding, atol=6e-8)


@given(cases, configs)
def test_backends_agree(case, config):
    a, b = (case.run(backend, config=config) for backend in ("cpu", "torch"))
    close(a[0].loss, b[0].loss)
    close(a[1], b[1])
    close(a[0].log_probs, b[0].log_probs)


@given(cases, configs)
def test_is_the_reference(case, config):
    out, gradient = case.run(config=config)
    expected, expected_gradient = case.reference(config=config)
    close(out.loss, expected.loss.detach())
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-11)


@given(cases, token_configs)
def test_descent(case, config):
    """A small step against the gradient lowers the loss."""
    out, gradient = case.run(config=config)
    norm = gradient.norm()
    if norm < 1e-4 or out.metrics.ratio_max > 5:
        return
    case.logits = case.logits - 1e-6 * gradient / norm
    again, _ = case.run(config=config)
    assert again.loss < out.loss


@pytest.mark.parametrize("level", ["sequence", "sequence_product"])
def test_pooled_slopes_by_hand(level):
    """Two tokens, one sequence: the formula of design's §4 with numbers."""
    case = make(batch=1, length=2, vocab=4, dtype=torch.float64, empty=False, noise=0.05)
    case.mask[:] = True
    case.advantages = torch.tensor([[1.0, 3.0]])
    out, gradient = plain(case).run(config=LossConfig(Unclipped(), level=level, aggregation="sequence_sum"))
    difference = (out.log_probs - case.options["old_log_probs"]).sum()
    length = 2 if level == "sequence" else 1
    ratio = (difference / length).exp()
    slope = -ratio * (1.0 + 3.0) / length
    own = gradient[:, :2].gather(-1, case.token_ids[..., None]).squeeze(-1)
    close(own, -slope * torch.expm1(out.log_probs))
