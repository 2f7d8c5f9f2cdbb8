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


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
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
        said = captured.err
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
