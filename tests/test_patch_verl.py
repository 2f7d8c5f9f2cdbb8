"""verl's options, and calls of its losses and operators that are patched, on a stand-in; test_patches.py has the patch,
test_verl_parity.py verl itself."""

from __future__ import annotations

import importlib
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from stand_ins import changed, functions
from stand_ins.verl import CORE, KERNEL, LOSS, MEGATRON, VERL

from grpo_kernels import KL, Clip, LossConfig
from grpo_kernels.integrations.operators import entropy_from_logits, logprobs_from_logits
from grpo_kernels.integrations.verl import loss_config, patch_verl
from grpo_kernels.integrations.verl_losses import MISSING


@pytest.fixture
def verl(monkeypatch):
    yield from VERL.installed(monkeypatch)


def test_the_plugin_patches_where_it_is_imported(verl, monkeypatch):
    name = "grpo_kernels.integrations.verl_plugin"
    monkeypatch.delitem(sys.modules, name, raising=False)
    before = functions(verl)
    plugin = importlib.import_module(name)
    assert changed(before, functions(verl)) == VERL.operators | VERL.losses
    plugin.patch.undo()
    assert changed(before, functions(verl)) == set()
    del sys.modules[name]


@pytest.mark.parametrize("missing", ["megatron.core", "megatron"])
def test_operators_over_ranks_are_left_out_without_megatron(verl, monkeypatch, missing):
    """Where it is not installed, or nothing of that name is, verl's module of them does not import."""
    monkeypatch.delitem(sys.modules, "megatron.core")
    monkeypatch.delitem(sys.modules, MEGATRON)
    monkeypatch.setitem(sys.modules, missing, None)
    before = functions(verl)
    with patch_verl():
        over_ranks = {path for path in VERL.operators if path.startswith(MEGATRON)}
        assert changed(before, functions(verl)) == VERL.operators - over_ranks | VERL.losses


def test_operators_over_ranks_that_moved_are_no_missing_megatron(verl, monkeypatch):
    monkeypatch.delitem(sys.modules, MEGATRON)
    before = functions(verl)
    with pytest.raises(ImportError, match="verl"):
        patch_verl()
    assert changed(before, functions(verl)) == set()


def test_operators_over_ranks_are_left_out_beside_a_megatron_that_verl_cannot_import(verl, monkeypatch):
    def fail(name: str):
        if name == MEGATRON:
            raise ModuleNotFoundError(
                "No module named 'megatron.core.tensor_parallel'", name="megatron.core.tensor_parallel"
            )
        return sys.modules[name]

    monkeypatch.setattr(importlib, "import_module", fail)
    before = functions(verl)
    with patch_verl():
        assert not {path for path in changed(before, functions(verl)) if path.startswith(MEGATRON)}
        assert changed(before, functions(verl))


def actor(loss_mode="vanilla", **options):
    """verl's ActorConfig, its defaults, as far as a loss reads it."""
    return SimpleNamespace(
        **{
            **dict(
                clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_c=3.0, tau_pos=1.0, tau_neg=1.05
            ),
            **dict(loss_agg_mode="token-mean", loss_scale_factor=None, entropy_coeff=0.0, use_kl_loss=False),
            **dict(kl_loss_coef=0.001, kl_loss_type="low_var_kl", global_batch_info={}),
            **options,
        },
        policy_loss=SimpleNamespace(loss_mode=loss_mode, dro_beta=options.get("dro_beta")),
    )


def test_options_make_a_config():
    options = actor(
        clip_ratio_high=0.28, loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=512, use_kl_loss=True,
        entropy_coeff=0.01,
    )  # fmt: skip
    assert loss_config(options) == LossConfig(
        Clip(0.2, 0.28, dual=3.0),
        aggregation="constant",
        constant_length=512,
        kl=KL(0.001, limit=(20.0, 10.0)),
        entropy_coef=0.01,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *((dict(loss_mode=mode), f'do not have loss_mode="{mode}"; supported: vanilla') for mode in MISSING),
        (dict(loss_mode="gsp"), "Did you mean 'gspo'"),
        (dict(loss_agg_mode="token_mean"), "verl: loss_agg_mode must be one of .* got 'token_mean'"),
        (dict(clip_ratio_c=1.1), r"do not have clip_ratio_c=1\.1 with an upper bound of 1 \+ 0\.2"),
        (dict(loss_mode="dro"), r"dro with policy_loss\.dro_beta=None"),
        (dict(use_kl_loss=True, kl_loss_type="full"), 'do not have kl_loss_type="full"'),
        (dict(loss_mode="sapo", use_kl_loss=True), 'loss_mode="sapo" beside a KL or entropy in loss_agg_mode'),
    ],
)
def test_what_has_no_counterpart_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        loss_config(actor(**options))


def call(verl, mode, mask=None, **options):
    torch.manual_seed(0)
    log_prob = -torch.rand(3, 4)
    given = actor(mode, **options)
    mask = torch.ones(3, 4, dtype=torch.bool) if mask is None else mask
    arguments = {"old_log_prob": log_prob - 0.1, "log_prob": log_prob, "advantages": torch.randn(3, 4)}
    return verl[CORE].POLICY_LOSS_REGISTRY[mode](
        **arguments, response_mask=mask, loss_agg_mode="token-mean", config=given
    )


@pytest.mark.parametrize("mode", MISSING)
def test_a_mode_without_a_counterpart_raises_where_it_is_called(verl, mode):
    with patch_verl(), pytest.raises(ValueError, match=rf'"{mode}".*patch_verl\(losses=False\) keeps verl\'s own'):
        call(verl, mode)
    assert call(verl, mode) == "verl's"


@pytest.mark.parametrize(("value", "check"), [(math.nan, "0"), (-1.0, "0"), (0.5, "1")])
def test_a_mask_of_other_numbers_is_refused(verl, monkeypatch, value, check):
    """As every mask of this package: fractions where contents are checked."""
    monkeypatch.setenv("GRPO_KERNELS_CHECK", check)
    with patch_verl(), pytest.raises(ValueError, match=r'verl: loss_mode="vanilla": .*response_mask'):
        call(verl, "vanilla", mask=torch.tensor([1.0, value, 1.0, 0.0]).expand(3, 4))


def test_several_ranks_need_the_global_batch(verl):
    with patch_verl(), pytest.raises(ValueError, match="batch_num_tokens of the global batch with dp_size=2"):
        call(verl, "vanilla", global_batch_info={"dp_size": 2})


def test_advantages_of_a_geometric_mean_are_one_for_each_sequence(verl):
    with patch_verl(), pytest.raises(ValueError, match="advantages that differ within a sequence"):
        call(verl, "geo_mean")


def test_a_head_over_ranks_stays_verls(verl):
    hidden, weight, labels = torch.randn(1, 5, 8), torch.randn(16, 8), torch.randint(16, (1, 5))
    group = object()
    with patch_verl():
        kernel = verl[KERNEL].linear_cross_entropy
        assert kernel(hidden, weight, labels, 1.0, "none", group) == (
            "verl's",
            (hidden, weight, labels, 1.0, "none", group),
        )
        assert kernel(hidden, weight, labels, 1.0, "sum")[0] == "verl's"
        log_probs, entropy = kernel(hidden, weight, labels, 1.0)
        assert log_probs.shape == entropy.shape == (5,)
        wanted = (hidden @ weight.T).log_softmax(-1).gather(-1, labels[..., None]).flatten()
        torch.testing.assert_close(log_probs, wanted)


GPG = f"""
def gpg{LOSS}:
    return -factor * (log_prob * advantages * response_mask).sum() / response_mask.sum(), {{}}
POLICY_LOSS_REGISTRY["gpg"] = gpg
"""


@pytest.mark.parametrize(("factor", "level"), [(1.0, "INFO"), (1.01, "WARNING")])
def test_shadow_compares_with_verls_own(verl, caplog, factor, level):
    """Every third call, of whatever mode; what trains is ours, once, and what verl's changes is seen."""
    verl[CORE].factor = factor
    exec(GPG, vars(verl[CORE]))
    caplog.set_level("INFO", "grpo_kernels.shadow")
    with patch_verl(shadow=3):
        losses = [call(verl, "gpg")[0] for _ in range(6)]
    lines = [record for record in caplog.records if record.name == "grpo_kernels.shadow"]
    assert [record.levelname for record in lines] == [level] * 2
    assert [record.message.split(":")[0] for record in lines] == ["shadow, call 0", "shadow, call 3"]
    assert f"{factor * losses[0].item():.5g}"[:6] in lines[0].message.split("(verl)")[0]
    with patch_verl():
        assert all(torch.equal(loss, call(verl, "gpg")[0]) for loss in losses)
    assert len(caplog.records) == 2


def test_a_shadow_that_fails_does_not_stop_training(verl, caplog):
    """The stand-in's own loss is a text."""
    with patch_verl(shadow=1):
        call(verl, "vanilla")
    assert "shadow, call 0: not compared: " in caplog.text


@pytest.mark.parametrize(("rows", "labels"), [((2, 3), (3, 2)), ((6,), (5,)), ((2, 3), (3,))])
def test_labels_are_one_for_each_row(rows, labels):
    """Rows that are as many in another shape would be paired with others' labels."""
    logits, ids = torch.randn(*rows, 7), torch.zeros(labels, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logprobs_from_logits: expected labels .* one for each row; got"):
        logprobs_from_logits(logits, ids)


def test_a_dimension_of_one_is_no_difference():
    logits, ids = torch.randn(1, 5, 7), torch.arange(5)
    torch.testing.assert_close(
        logprobs_from_logits(logits, ids), logits[0].log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    )


def test_columns_that_are_apart():
    """Of logits whose last stride is not 1 the rows are copied."""
    logits, ids = torch.randn(7, 5, requires_grad=True), torch.arange(5)
    doubled = 2 * logits
    log_p = doubled.T.log_softmax(-1)
    found = logprobs_from_logits(doubled.T, ids), entropy_from_logits(doubled.T)
    wanted = log_p.gather(-1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(found, wanted)
    gradients = [
        torch.autograd.grad(one.sum() + other.square().sum(), logits, retain_graph=True)[0]
        for one, other in (found, wanted)
    ]
    torch.testing.assert_close(*gradients)
