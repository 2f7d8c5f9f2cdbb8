"""match on the losses of others: every verdict is the truth, no answer is long, and what is to be pasted runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from losses_of_others import Truth, broken, seen, unseen
from test_losses_of_others import batch_of, theirs

from grpo_kernels import LossConfig, match
from grpo_kernels.__main__ import main
from grpo_kernels.matching.report import LINES

LOSSES: dict[Callable[..., Any], Truth] = seen.LOSSES | unseen.LOSSES


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


SOME = [*LOSSES][::3]


@pytest.mark.parametrize(
    "loss",
    [loss if loss in SOME else pytest.param(loss, marks=pytest.mark.nightly) for loss in LOSSES],
    ids=lambda loss: loss.__name__,
)
def test_every_verdict_is_right(loss):
    truth, report = LOSSES[loss], None
    try:
        report = match(loss)
        text = str(report)
    except ValueError as error:  # it draws random numbers
        text = str(error)
    assert bool(report) == truth.is_config, text
    assert len(text.splitlines()) <= LINES, text
    for words in (truth.say, truth.fault_words):
        assert not words or any(word in text.lower() for word in words), text
    if report and truth.config is not None:
        assert_same(report.config, truth.config, text)
    if report is not None and report.lines and not truth.rounds > 1e-8:
        assert_pasted_lines_compute(report, loss, truth)


def assert_same(found: LossConfig, config: LossConfig, text: str) -> None:
    """Compare what both reproduce; levels that are one with an advantage a sequence, limits behind a cap are not."""
    assert type(found.surrogate) is type(config.surrogate), text
    assert found.surrogate.parameters() == pytest.approx(config.surrogate.parameters(), rel=1e-2), text
    assert found.kl.coef == pytest.approx(config.kl.coef, rel=1e-2), text
    assert found.entropy_coef == pytest.approx(config.entropy_coef, rel=1e-2), text


def assert_pasted_lines_compute(report, loss, truth) -> None:
    """The lines as they are printed, on a batch of ours: the loss, or the loss without its fault."""
    assert "..." not in "".join(report.lines)
    batch = batch_of(0.4, truth.advantages)
    T = batch.mask.shape[1]
    rows = batch.logits[:, :T].clone().requires_grad_()
    names: dict[str, Any] = {
        "logits": rows, "token_ids": batch.token_ids, "advantages": batch.advantages, "mask": batch.mask,
        "old_log_probs": batch.old, "ref_log_probs": batch.ref, "rollout_log_probs": batch.rollout,
        "num_items_in_batch": batch.items, "temperature": 1.0,
    }  # fmt: skip
    exec("\n".join(report.lines), names)
    names["loss"].backward()
    assert bool(rows.grad.isfinite().all())
    if not report:
        return
    value, gradient = theirs(loss, truth, batch)
    assert float(names["loss"].detach()) == pytest.approx(float(value), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(rows.grad, gradient[:, :T], rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_a_fault_is_not_pasted():
    """Signs as they should be, tokens divided by tokens, nothing of the probe's sizes."""
    for loss in (seen.objective_for_ascent, seen.mean_over_positions, unseen.rewards_distance):
        report = match(loss)
        assert report.faults
        assert report.lines
        assert report.factor > 0
        assert report.config.kl.coef >= 0
        assert not re.search(r"constant_length|numel|-1|= -", "".join(report.lines)), report.lines


@pytest.mark.parametrize("name", broken.GIVEN)
def test_what_is_no_loss_is_told_in_a_sentence(name, tmp_path, capsys, monkeypatch):
    """In Python where it is a function, on the command line where it is a file."""
    given = broken.GIVEN[name]
    monkeypatch.chdir(tmp_path)
    if isinstance(given.loss, str):
        path = tmp_path / f"given_{name}.py"
        path.write_text(given.loss)
        status = main(["match", f"{path}:loss"])
        captured = capsys.readouterr()
        if given.does == "works":
            assert status == 0, captured
            assert captured.out.startswith("your loss is LossConfig(Clip(0.2, 0.2)")
            return
        assert status == 2
        announced, _, said = captured.err.partition("\n")
        assert announced.startswith(f"match runs {path}")
    else:
        if given.does == "works":
            assert_same(match(given.loss).config, given.config, name)
            assert match(given.loss)
            return
        with pytest.raises(ValueError, match="(?i)" + re.escape(given.words[0])) as raised:
            match(given.loss)
        said = str(raised.value)
    assert all(word in said.lower() for word in given.words), said
    assert len(said.strip().splitlines()) == 1, said


def test_messages_speak_the_language_of_the_command_line(tmp_path, capsys):
    path = tmp_path / "names.py"
    path.write_text(
        broken.LOSS.replace("def", "import torch\ndef", 1)
        + "def unknown(x, old, A, mask, clip):\n    return loss(x, old, A, mask) * clip\n"
    )
    assert main(["match", f"{path}:unknown"]) == 2
    assert "--argument x=old_log_probs" in capsys.readouterr().err
    assert main(["match", f"{path}:unknown", "--argument", "x=log_probs"]) == 2
    error = capsys.readouterr().err
    assert "--set clip=VALUE" in error
    assert "functools" not in error
    assert main(["match", f"{path}:unknown", "--argument", "x=log_probs", "--set", "clip=0.5"]) == 0
    assert "divided by 2" in capsys.readouterr().out
    assert main(["match", f"{path}:lost"]) == 2
    assert "'loss'" in (error := capsys.readouterr().err)
    assert "torch" not in error


# What a second reader broke, each with the smallest loss that shows it


def ppo(x, A):
    return -torch.minimum(x.exp() * A, x.exp().clamp(0.8, 1.2) * A)


def packed_by_sequence(logps, old_logps, advantages, cu_seqlens):
    lengths = cu_seqlens.diff()
    terms = ppo(logps - old_logps, advantages.repeat_interleave(lengths))
    rows = torch.arange(len(lengths)).repeat_interleave(lengths)
    sums = torch.zeros(len(lengths), dtype=terms.dtype).index_add(0, rows, terms)
    return (sums / lengths.clamp(min=1)).mean()


def whitened_by_group(lp, old, A, mask):
    groups = A.view(-1, 2)
    A = ((groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-4)).flatten()
    return (ppo(lp - old, A[:, None]) * mask).sum() / mask.sum()


def of_the_sampler(lp, rollout_log_probs, A, mask):
    weight = (lp - rollout_log_probs).exp().detach().clamp(max=2)
    return -(weight * A[:, None] * lp * mask).sum() / mask.sum()


def low_var_kl_plus(lp, old, ref, A, mask):
    """verl's: the value of a clamped k3, the slope of k2."""
    x = (lp - ref).clamp(-20, 20)
    value = (torch.exp(-x) + x - 1).clamp(-10, 10)
    k2 = 0.5 * (lp - ref) ** 2
    terms = ppo(lp - old, A[:, None]) + 0.01 * (k2 - k2.detach() + value.detach())
    return (terms * mask).sum() / mask.sum()


def rloo_with_empty_rows(lp, old, A, mask):
    ratio = ((lp - old) * mask).sum(-1).exp()
    return -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A).mean()


def gspo_in_fp32(lp, old, A, mask):
    lp, old, A, mask = lp.float(), old.float(), A.float(), mask.float()
    x = ((lp - old) * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    ratio = x.exp()[:, None]
    terms = -torch.minimum(ratio * A[:, None], ratio.clamp(1 - 3e-4, 1 + 4e-4) * A[:, None])
    return ((terms * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def gspo_of_weighted_tokens(lp, old, rollout_log_probs, A, mask):
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    pooled = ((lp - old) * mask).sum(-1, keepdim=True) / lengths
    x = lp - lp.detach() + pooled.detach()
    weight = (old - rollout_log_probs).exp().clamp(max=2.0)
    return (ppo(x, A[:, None]) * weight * mask).sum() / mask.sum()


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (packed_by_sequence, 'aggregation="sequence_mean"'),
        (whitened_by_group, 'aggregation="token_mean"'),
        (of_the_sampler, "old_log_probs=rollout_log_probs"),
        (low_var_kl_plus, 'KL(0.01, gradient="straight_through_k2", limit=(20.0, 10.0))'),
        (rloo_with_empty_rows, 'level="sequence_product"'),
        (gspo_in_fp32, 'Clip(0.0003, 0.0004), level="sequence"'),
        (gspo_of_weighted_tokens, 'level="sequence_token"'),
    ],
)
def test_configs_that_were_missed(loss, said):
    report = match(loss)
    assert report, str(report)
    assert said in str(report)


def test_lines_whiten_by_group():
    names: dict[str, Any] = {"advantages": torch.randn(6), "mask": torch.ones(6, 3)}
    for line in match(whitened_by_group).lines[1:3]:
        exec(line, names)
    groups = names["each"]
    wanted = ((groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-4)).flatten()
    assert torch.equal(names["advantages"], wanted)


def test_lines_of_a_packed_loss_have_its_bounds():
    assert "cu_seqlens=cu_seqlens" in match(packed_by_sequence).lines[-1]


def at_least_ten(lp, old, A, mask):
    return ((ppo(lp - old, A[:, None]) * mask).sum(-1) / mask.sum(-1).clamp(min=10)).mean()


def short_ones(lp, old, A, mask):
    keep = mask * (mask.sum(-1, keepdim=True) <= 12)
    return (ppo(lp - old, A[:, None]) * keep).sum() / mask.sum()


def likely_ones(lp, old, A, mask):
    return (ppo(lp.clamp(min=-12) - old, A[:, None]) * mask).sum() / mask.sum()


def small_advantages_are_none(lp, old, A, mask):
    A = torch.where(A.abs() < 1e-3, 0.0, A)
    return (ppo(lp - old, A[:, None]) * mask).sum() / mask.sum()


@pytest.mark.parametrize("loss", [at_least_ten, short_ones, likely_ones, small_advantages_are_none])
def test_what_only_long_or_odd_batches_show(loss):
    assert not match(loss)


class Warming:
    """Its bound widens after fifty calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, lp, old, A, mask):
        self.calls += 1
        ratio = (lp - old).exp()
        high = 1.2 if self.calls < 50 else 1.4
        return -(torch.minimum(ratio * A[:, None], ratio.clamp(0.8, high) * A[:, None]) * mask).sum() / mask.sum()


def ends_the_program(lp, old, A, mask):
    raise SystemExit(0)


def fears_far_ratios(lp, old, A, mask):
    assert (lp - old).abs().max() < 3, "too far"
    return (ppo(lp - old, A[:, None]) * mask).sum() / mask.sum()


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (Warming(), "keeps a state"),
        (ends_the_program, "ends the program"),
        (fears_far_ratios, "raised AssertionError: too far"),
    ],
)
def test_losses_that_are_refused(loss, words):
    with pytest.raises(ValueError, match=words) as raised:
        match(loss)
    assert len(str(raised.value).splitlines()) == 1


def test_an_optional_tensor_is_not_dropped_in_silence():
    def loss(lp, old, A, masks=None):
        return ppo(lp - old, A[:, None]).mean()

    assert any("left at their defaults: masks" in note for note in match(loss).notes)


def test_a_squared_distance_is_no_missing_exp():
    def loss(lp, old, A, mask):
        return (0.5 * (A[:, None] - 0.1 * (lp - old)) ** 2 * mask).sum() / mask.sum()

    report = match(loss)
    assert not report
    assert not any("exp" in fault for fault in report.faults)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batch": [1]}, TypeError),
        ({"device": "tpu"}, ValueError),
        ({"device": "meta"}, ValueError),
        ({"temperature": "x"}, ValueError),
        ({"arguments": 3}, TypeError),
    ],
)
def test_options_of_other_kinds(options, error):
    with pytest.raises(error, match=next(iter(options))):
        match(packed_by_sequence, **options)


def counts_its_tokens(lp, old, A, mask):
    """A term without a gradient, of another size on every batch."""
    return (ppo(lp - old, A[:, None]) * mask).sum() / mask.sum() + 0.01 * mask.sum()


def reports_entropy(lp, old, A, mask, entropy):
    return (ppo(lp - old, A[:, None]) * mask).sum() / mask.sum() - 0.01 * (entropy.detach() * mask).sum() / mask.sum()


@pytest.mark.parametrize("loss", [counts_its_tokens, reports_entropy])
def test_a_value_that_follows_the_batch_is_no_match(loss):
    report = match(loss)
    assert not report, str(report)
    assert report.gradient_difference < 1e-8


def test_a_loss_that_takes_one_batch_alone_is_not_proven():
    seen = []

    def loss(lp, token_ids, old, A, mask):
        seen.append(token_ids)
        assert torch.equal(token_ids, seen[0]), "another batch"
        return (ppo(lp - old, A[:, None]) * mask).sum() / mask.sum()

    report = match(loss)
    assert not report
    assert "takes no other batch" in str(report)


def test_lines_lose_no_digit_and_no_constant():
    def loss(lp, old, A, mask):
        return (ppo(lp - old, A[:, None]) * mask).sum() / mask.sum() / 3 + 2.5

    report = match(loss)
    assert report
    assert report.lines[-1].endswith(".loss * (1 / 3) + 2.5")
    assert "grad_scale=(1 / 3)" in report.lines[-1]


def test_the_temperature_of_a_loss_that_takes_one_dict():
    def loss(batch):
        rows = batch["logits"][:, :-1] / 0.9
        lp = torch.log_softmax(rows, -1).gather(-1, batch["token_ids"][..., None]).squeeze(-1)
        terms = ppo(lp - batch["old_log_probs"], batch["advantages"][:, None])
        return (terms * batch["mask"]).sum() / batch["mask"].sum()

    report = match(loss)
    assert report
    assert "temperature=0.9" in report.lines[-1]


def test_how_often_a_loss_is_called():
    """docs/match.md says some 800 times."""
    calls = []

    def loss(lp, old, ref, A, mask):
        calls.append(0)
        terms = ppo(lp - old, A[:, None]) + 0.04 * ((ref - lp).exp() - (ref - lp) - 1)
        return (terms * mask).sum() / mask.sum()

    assert match(loss)
    assert 500 < len(calls) < 900, len(calls)
