"""The recipes of docs/systems.md beside the losses that they stand for, written plainly, on inputs as the systems make
them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from distributed import pool
from systems import batch, cast, close_losses
from test_docs import ROOT, run_blocks


@pytest.fixture(scope="module")
def recipes():
    return [namespace for _, namespace in run_blocks(ROOT / "docs" / "systems.md")][-1]


def with_gradient(loss, leaf):
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


# NeMo-RL

NEMO = dict(
    disable_ppo_ratio=False,
    use_cispo=False,
    ratio_clip_min=0.2,
    ratio_clip_max=0.28,
    ratio_clip_c=None,
    reference_policy_kl_penalty=0.0,
    reference_policy_kl_type="k3",
    kl_input_clamp_value=20.0,
    kl_output_clamp_value=10.0,
    use_importance_sampling_correction=False,
    truncated_importance_sampling_type=None,
    truncated_importance_sampling_ratio=None,
    truncated_importance_sampling_ratio_min=None,
    use_on_policy_kl_approximation=False,
    force_on_policy_ratio=False,
    sequence_level_importance_ratios=False,
    positive_example_nll_weight=0.0,
    loss_type=SimpleNamespace(value="token_level"),
)
CORRECTED = dict(use_importance_sampling_correction=True, truncated_importance_sampling_ratio=1.5)
CORRECTED |= dict(truncated_importance_sampling_ratio_min=0.7)
BY_SEQUENCES = dict(loss_type=SimpleNamespace(value="sequence_level"))
NEMO_LOSSES = {
    "ppo": {},
    "dual": dict(ratio_clip_c=2.0),
    "reinforce": dict(disable_ppo_ratio=True),
    "cispo": dict(use_cispo=True),
    "on-policy": dict(force_on_policy_ratio=True),
    "sequences": BY_SEQUENCES,
    "gspo": dict(sequence_level_importance_ratios=True, ratio_clip_min=0.05, ratio_clip_max=0.08, **BY_SEQUENCES),
    "kl": dict(reference_policy_kl_penalty=0.3),
    "corrected": dict(use_importance_sampling_correction=True),
    **{kind: dict(truncated_importance_sampling_type=kind, **CORRECTED) for kind in ("tis", "icepop", "seq-mask-tis")},
}


def nemo_data(kind, dtype):
    """A batch in NeMo-RL's names: one column more than log-probs, the last sample masked."""
    known = cast(batch(kind), torch.float32)
    shifted = {name: torch.nn.functional.pad(value.to(dtype), (1, 0)) for name, value in known.items()}
    reference = shifted["log_prob"] + 0.7 * (shifted["rollout"] - shifted["old"])
    data = dict(prev_logprobs=shifted["old"], generation_logprobs=shifted["rollout"], advantages=shifted["advantages"])
    data |= dict(reference_policy_logprobs=reference, token_mask=shifted["mask"])
    data["sample_mask"] = (torch.arange(len(reference)) < len(reference) - 1).to(dtype)
    return known["log_prob"].to(dtype).requires_grad_(), data


def nemo_plain(self, log_prob, data, sequences, tokens):
    """The loss of NeMo-RL's options."""
    old, rollout, ref, A, token_mask = (
        data[name][:, 1:]
        for name in ("prev_logprobs", "generation_logprobs", "reference_policy_logprobs", "advantages", "token_mask")
    )
    mask = token_mask * data["sample_mask"][:, None]
    means = lambda x: (x * token_mask).sum(-1) / token_mask.sum(-1).clamp(min=1)  # noqa: E731
    log_ratio = log_prob - (log_prob.detach() if self.force_on_policy_ratio else old)
    ratio = means(log_ratio).exp()[:, None] if self.sequence_level_importance_ratios else log_ratio.exp()
    clipped = ratio.clamp(1 - self.ratio_clip_min, 1 + self.ratio_clip_max)
    losses = torch.maximum(-A * ratio, -A * clipped)
    if self.use_cispo:
        losses = -A * clipped.detach() * log_prob
    if self.disable_ppo_ratio:
        losses = -A * log_prob
    if self.ratio_clip_c is not None:
        losses = torch.where(A < 0, torch.minimum(losses, -A * self.ratio_clip_c), losses)
    if self.use_importance_sampling_correction:
        low, high = self.truncated_importance_sampling_ratio_min, self.truncated_importance_sampling_ratio
        weight, inside = (old - rollout).exp(), lambda x: (x >= low) & (x <= high)
        kind = self.truncated_importance_sampling_type
        weight = weight.clamp(low, high) if kind == "tis" else weight
        weight = weight * inside(weight) if kind == "icepop" else weight
        weight = weight * inside(means(old - rollout).exp())[:, None] if kind == "seq-mask-tis" else weight
        losses = losses * weight
    if self.reference_policy_kl_penalty:
        x = ref - log_prob
        k3 = (x.exp() - x - 1).clamp(max=self.kl_output_clamp_value)
        losses = losses + self.reference_policy_kl_penalty * k3 * (log_prob - log_prob.detach()).exp()
    if self.loss_type.value == "token_level":
        return (losses * mask).sum() / tokens
    return (means(losses) * data["sample_mask"]).sum() / sequences


@pytest.mark.parametrize("kind", ["ragged", "holes", "empty sequences"])
@pytest.mark.parametrize("name", NEMO_LOSSES)
def test_nemo_rl(recipes, name, kind):
    """NeMo-RL's own call, which is asked for what has no advantages, stays: its KL and its metrics."""
    self = SimpleNamespace(**{**NEMO, **NEMO_LOSSES[name]})
    counts = torch.tensor(9.0), torch.tensor(41.0)

    def original(self, log_prob, data, *counts):
        assert not data["advantages"].any()
        return nemo_plain(self, log_prob, data, *counts), {"probs_ratio": 1.0, "loss": 0.0}

    log_prob, data = nemo_data(kind, torch.float64)
    theirs = with_gradient(nemo_plain(self, log_prob, data, *counts), log_prob)
    log_prob, data = nemo_data(kind, torch.float32)
    loss, metrics = recipes["clipped_pg_loss"](original)(self, log_prob, data, *counts)
    close_losses(with_gradient(loss, log_prob), theirs)
    assert metrics == {"probs_ratio": 1.0, "loss": loss.item()}


def test_what_the_recipe_for_nemo_rl_lacks(recipes):
    options = dict(sequence_level_importance_ratios=True, **CORRECTED)
    with pytest.raises(ValueError, match="a correction of sequences stays with NeMo-RL"):
        recipes["nemo_config"](SimpleNamespace(**{**NEMO, **options}))
    options = dict(CORRECTED, truncated_importance_sampling_type="nope")
    with pytest.raises(ValueError, match="truncated_importance_sampling_type: expected one of .*; got 'nope'"):
        recipes["nemo_config"](SimpleNamespace(**{**NEMO, **options}))


# slime

TOTALS, RESPONSES, TAIL, V = (7, 5, 9, 4), (4, 1, 6, 3), 3, 40
SLIME = dict(eps_clip=0.2, eps_clip_high=0.28, eps_clip_c=None, advantage_estimator="grpo", use_kl_loss=False)
SLIME |= dict(kl_loss_coef=0.2, kl_loss_type="low_var_kl", entropy_coef=0.0, rollout_temperature=1.0)
SLIME_LOSSES = {
    "ppo": {},
    "dual": dict(eps_clip_c=2.0),
    "gspo": dict(advantage_estimator="gspo", eps_clip=0.05, eps_clip_high=0.08),
    "cispo": dict(advantage_estimator="cispo"),
    "kl": dict(use_kl_loss=True),
    "k2": dict(use_kl_loss=True, kl_loss_type="k2"),
    "bonus": dict(entropy_coef=0.1, rollout_temperature=0.7),
}


def slime_batch(dtype):
    """Logits of sequences one after another with padding behind them, and what slime's batch has of them."""
    draw = torch.Generator("cpu").manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).float().to(dtype)  # noqa: E731
    logits = 2 * randn(1, sum(TOTALS) + TAIL, V)
    tokens = [torch.randint(V, (length,), generator=draw) for length in TOTALS]
    found = slime_log_probs(logits, tokens, 1.0)[0]
    noise = [[part + 0.4 * randn(*part.shape) for part in found] for _ in range(2)]
    masks = [(torch.rand(count, generator=draw) < 0.8).to(dtype) for count in RESPONSES]
    advantages = [randn(1).expand(count) for count in RESPONSES]
    batch = dict(unconcat_tokens=tokens, total_lengths=TOTALS, response_lengths=RESPONSES, loss_masks=masks)
    return logits.requires_grad_(), batch | dict(log_probs=noise[0], ref_log_probs=noise[1], advantages=advantages)


def slime_log_probs(logits, tokens, temperature):
    """Log-probs and entropies of every response's tokens."""
    rows = (logits[0] / temperature).log_softmax(-1)
    values, entropies, end = [], [], 0
    for ids, length, count in zip(tokens, TOTALS, RESPONSES, strict=True):
        end += length
        picked = rows[end - count - 1 : end - 1]
        values.append(picked.gather(-1, ids[-count:, None]).squeeze(-1))
        entropies.append(-(picked.exp() * picked).sum(-1))
    return values, entropies


def slime_reduction(masks):
    """slime's ``sum_of_sample_mean`` where a rollout has two samples, whose tokens are counted together."""
    counts = [mask.sum() for mask in masks]
    shared = [counts[i] + counts[i ^ 1] for i in range(len(counts))]

    def reduce(x):
        parts = zip(x.split(RESPONSES), masks, shared, strict=True)
        return sum((part * mask).sum() / count.clamp(min=1) for part, mask, count in parts)

    return reduce


def slime_plain(args, batch, logits, reduction):
    log_probs, entropies = slime_log_probs(logits, batch["unconcat_tokens"], args.rollout_temperature)
    log_ratios = [new - old for new, old in zip(log_probs, batch["log_probs"], strict=True)]
    if args.advantage_estimator == "gspo":
        masked = zip(log_ratios, batch["loss_masks"], strict=True)
        log_ratios = [((x * m).sum() / m.sum().clamp(min=1)).expand_as(x) for x, m in masked]
    log_prob, A, ratio = torch.cat(log_probs), torch.cat(batch["advantages"]), torch.cat(log_ratios).exp()
    clipped = ratio.clamp(1 - args.eps_clip, 1 + args.eps_clip_high)
    losses = torch.maximum(-A * ratio, -A * clipped)
    if args.eps_clip_c is not None:
        losses = torch.where(A < 0, torch.minimum(losses, -A * args.eps_clip_c), losses)
    if args.advantage_estimator == "cispo":
        losses = -clipped.detach() * A * log_prob
    loss = reduction(losses) - args.entropy_coef * reduction(torch.cat(entropies))
    if args.use_kl_loss:
        x = torch.cat(batch["ref_log_probs"]) - log_prob
        kl = x**2 / 2 if args.kl_loss_type == "k2" else (x.exp() - 1 - x).clamp(-10, 10)
        loss = loss + args.kl_loss_coef * reduction(kl)
    return loss


@pytest.mark.parametrize("name", SLIME_LOSSES)
def test_slime(recipes, name):
    args = SimpleNamespace(**{**SLIME, **SLIME_LOSSES[name]})
    logits, batch = slime_batch(torch.float64)
    theirs = with_gradient(slime_plain(args, batch, logits, slime_reduction(batch["loss_masks"])), logits)
    logits, batch = slime_batch(torch.float32)
    reduction = slime_reduction(batch["loss_masks"])
    loss, logged = recipes["slime_loss"](args, batch, logits, reduction)
    close_losses(with_gradient(loss, logits), theirs)
    log_probs, entropies = slime_log_probs(logits.detach(), batch["unconcat_tokens"], args.rollout_temperature)
    torch.testing.assert_close(logged["loss"], loss.detach())
    torch.testing.assert_close(logged["entropy_loss"], reduction(torch.cat(entropies)), rtol=1e-5, atol=1e-6)
    fallen = reduction(torch.cat(batch["log_probs"]) - torch.cat(log_probs))
    torch.testing.assert_close(logged["ppo_kl"], fallen, rtol=1e-5, atol=1e-6)


def slime_on_a_rank(name):
    """Loss and gradient of this rank's columns."""
    args = SimpleNamespace(**{**SLIME, **SLIME_LOSSES[name]})
    logits, batch = slime_batch(torch.float32)
    group = torch.distributed.group.WORLD
    own = logits.detach().chunk(group.size(), -1)[group.rank()].clone().requires_grad_()
    loss = [namespace for _, namespace in run_blocks(ROOT / "docs" / "systems.md")][-1]["slime_loss"]
    return with_gradient(loss(args, batch, own, slime_reduction(batch["loss_masks"]), vocab_group=group)[0], own)


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["ppo", "gspo", "bonus"])
def test_slime_over_ranks(name):
    """Tensor parallelism: a vocabulary over two ranks."""
    args = SimpleNamespace(**{**SLIME, **SLIME_LOSSES[name]})
    logits, batch = slime_batch(torch.float64)
    theirs = with_gradient(slime_plain(args, batch, logits, slime_reduction(batch["loss_masks"])), logits)
    (loss, first), (same, second) = pool(2).run(slime_on_a_rank, name)
    assert loss == same
    close_losses((loss, torch.cat([first, second], -1)), theirs)


def test_slime_on_policy(recipes):
    """Without old log-probs, slime takes the policy's own."""
    logits, batch = slime_batch(torch.float32)
    own = [part.detach() for part in slime_log_probs(logits, batch["unconcat_tokens"], 1.0)[0]]
    reduction, args = slime_reduction(batch["loss_masks"]), SimpleNamespace(**SLIME)
    wanted = with_gradient(slime_plain(args, {**batch, "log_probs": own}, logits, reduction), logits)
    loss, logged = recipes["slime_loss"](args, {**batch, "log_probs": None}, logits, reduction)
    for found, other in zip(with_gradient(loss, logits), wanted, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-6)
    assert logged["ppo_kl"] == 0


def test_what_slime_has_behind_the_mask_is_not_read(recipes):
    logits, batch = slime_batch(torch.float32)
    masks = batch["loss_masks"]
    dead = next(i for i, mask in enumerate(masks) if (mask == 0).any())
    spoilt = [part.clone() for part in batch["log_probs"]]
    spoilt[dead][masks[dead] == 0] = torch.nan
    found = [
        recipes["slime_loss"](SimpleNamespace(**SLIME), {**batch, "log_probs": old}, logits, slime_reduction(masks))
        for old in (batch["log_probs"], spoilt)
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


def test_what_the_recipe_for_slime_lacks(recipes):
    with pytest.raises(ValueError, match="use_opsm, use_tis stay with slime's policy loss"):
        recipes["slime_config"](SimpleNamespace(**SLIME, use_opsm=True, use_tis=True))


# prime-rl


def prime_plain(inputs, low, high, adv_tau, kl_tau):
    log_ratio = inputs.trainer_logprobs - inputs.inference_logprobs
    moved = inputs.trainer_logprobs.exp() - inputs.inference_logprobs.exp()
    left = torch.where(inputs.advantages > 0, moved > high, moved < -low)
    losses = kl_tau * log_ratio**2 - adv_tau * inputs.advantages * log_ratio.exp() * ~left
    losses = losses if inputs.loss_weights is None else losses * inputs.loss_weights
    return (losses * inputs.loss_mask).sum()


@pytest.mark.parametrize(("kind", "weighted"), itertools.product(["ragged", "holes", "on-policy"], [False, True]))
def test_prime_rl(recipes, kind, weighted):
    options = dict(low=0.02, high=0.03, adv_tau=0.9, kl_tau=0.05)
    for row in range(6):

        def inputs(dtype, row=row):
            known = cast(cast(batch(kind), torch.float32), dtype)
            log_prob = known["log_prob"][row].requires_grad_()
            return SimpleNamespace(
                trainer_logprobs=log_prob,
                inference_logprobs=known["old"][row],
                advantages=known["advantages"][row],
                loss_mask=known["mask"][row],
                loss_weights=known["weights"][row] if weighted else None,
                ref_logprobs=None,
            )

        exact, given = inputs(torch.float64), inputs(torch.float32)
        out = recipes["prime_loss"](given, **options)
        theirs = with_gradient(prime_plain(exact, **options), exact.trainer_logprobs)
        close_losses(with_gradient(out.loss, given.trainer_logprobs), theirs)
        assert set(out.metrics) == {"is_masked_low", "is_masked_high"}


def test_what_prime_rl_has_behind_the_mask_is_not_read(recipes):
    known = cast(batch("holes"), torch.float32)
    row = next(i for i in range(6) if not known["mask"][i].all() and known["mask"][i].any())
    losses = []
    for garbage in (0.0, torch.nan):
        weights = known["weights"][row].masked_fill(~known["mask"][row], garbage)
        inputs = SimpleNamespace(
            trainer_logprobs=known["log_prob"][row],
            inference_logprobs=known["old"][row],
            advantages=known["advantages"][row],
            loss_mask=known["mask"][row],
            loss_weights=weights,
        )
        losses.append(recipes["prime_loss"](inputs).loss)
    assert torch.equal(*losses)
