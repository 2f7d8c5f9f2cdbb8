"""match on the losses of the packages themselves: TRL's trainer, Liger's module, verl where it is installed."""

from __future__ import annotations

import collections
import types

import pytest
import torch

from grpo_kernels import KL, Clip, LossConfig, match

pytestmark = pytest.mark.peers
FREE = (None, None)
NO_LIMIT = {"log_ratio_limit": None}


# TRL: GRPOTrainer._compute_loss as it is, its forward pass replaced by log-probs


class Model:
    training = True


def _same(value, *args, **kwargs):
    return value


def trl_loss(**options):
    trl = pytest.importorskip("trl")
    fields = {"temperature": 1.0, "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "loss_type": "dapo"}
    fields |= {"importance_sampling_level": "token", "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None}
    fields |= {"use_vllm": False, "vllm_importance_sampling_correction": False, "tools": None, "entropy_coef": 0.0}
    fields |= {"use_adaptive_entropy": False, "_entropy_bonus_enabled": False, "aux_loss_enabled": False}
    fields |= {"max_completion_length": 64, "current_gradient_accumulation_steps": 1, "model": Model()}
    own = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1}
    own |= {name: options.pop(name) for name in list(options) if name in own}
    stub = types.SimpleNamespace(**{**fields, **options}, args=types.SimpleNamespace(**own))
    stub.accelerator = types.SimpleNamespace(num_processes=1, gather=_same, reduce=_same, device="cpu")
    stub._metrics = {mode: collections.defaultdict(list) for mode in ("train", "eval")}

    def loss(
        per_token_logps, old_per_token_logps, ref_per_token_logps, advantages, completion_mask, num_items_in_batch
    ):
        B, T = per_token_logps.shape
        ids = torch.zeros(B, T, dtype=torch.long)
        inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids}
        inputs |= {
            "completion_mask": completion_mask,
            "advantages": advantages,
            "num_items_in_batch": num_items_in_batch,
        }
        inputs |= {"old_per_token_logps": old_per_token_logps, "ref_per_token_logps": ref_per_token_logps}
        found = per_token_logps, torch.zeros(B, T, dtype=torch.float64), None
        stub._get_per_token_logps_and_entropies = lambda *args, **kwargs: found
        return trl.GRPOTrainer._compute_loss(stub, stub.model, inputs)

    return loss


TRL = {
    "dapo": ({}, {"aggregation": "token_mean"}, "num_items_in_batch"),
    "grpo": ({"beta": 0.04, "loss_type": "grpo"}, {"kl": KL(0.04, limit=FREE)}, None),
    "bias-corrected KL": (
        {"beta": 0.04, "loss_type": "grpo", "use_bias_correction_kl": True},
        {"kl": KL(0.04, ratio_weighted=True, limit=FREE)},
        None,
    ),
    "bnpo": ({"loss_type": "bnpo"}, {"aggregation": "token_mean"}, None),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"aggregation": "constant", "constant_length": 64}, None),
    "luspo": ({"loss_type": "luspo"}, {"aggregation": "sequence_sum"}, None),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
        {"level": "sequence", "surrogate": Clip(3e-4, 4e-4)},
        None,
    ),
    "delta": ({"loss_type": "grpo", "delta": 4.0}, {"surrogate": Clip(dual=4.0)}, None),
    "accumulation": ({"loss_type": "grpo", "current_gradient_accumulation_steps": 8}, {}, None),
}


@pytest.mark.parametrize("name", TRL)
def test_trl(name):
    options, wanted, normalizer = TRL[name]
    report = match(trl_loss(**options))
    assert report, str(report)
    assert report.config == LossConfig(**{"surrogate": Clip(), **wanted, **NO_LIMIT})
    assert report.normalizer == normalizer
    assert report.factor == (1 / 8 if name == "accumulation" else 1)
    assert report.gradient_difference < 1e-6  # TRL counts tokens in fp32


# Liger: the loss from hidden states, the head an identity, so that its hidden states are logits


def liger_loss(**options):
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    module = chunked.LigerFusedLinearGRPOLoss(compiled=False, **options)

    def loss(logits, completion_ids, old_per_token_logps, ref_per_token_logps, advantages, attention_mask, num_items):
        length = completion_ids.shape[1]
        head = torch.eye(logits.shape[-1], dtype=logits.dtype)
        known = {"ref_per_token_logps": ref_per_token_logps, "old_per_token_logps": old_per_token_logps}
        found = module(
            logits[:, :length], head, completion_ids, attention_mask, advantages, **known, num_items_in_batch=num_items
        )
        return found[0] if isinstance(found, tuple) else found

    return loss


LIGER = {
    "grpo": ({"beta": 0.04, "loss_type": "grpo"}, {"kl": KL(0.04, limit=FREE)}, None, 1.0),
    "dapo": ({"beta": 0.0, "loss_type": "dapo"}, {"aggregation": "token_mean"}, "num_items_in_batch", 1.0),
    "temperature": ({"beta": 0.0, "loss_type": "bnpo", "temperature": 0.6}, {"aggregation": "token_mean"}, None, 0.6),
    "dr_grpo": (
        {"beta": 0.0, "loss_type": "dr_grpo", "max_completion_length": 64},
        {"aggregation": "constant", "constant_length": 64},
        None,
        1.0,
    ),
    "gspo": (
        {"beta": 0.0, "loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"level": "sequence"},
        None,
        1.0,
    ),
}


SOME = ("grpo",)


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.nightly) for name in LIGER]
)
def test_liger(name):
    options, wanted, normalizer, temperature = LIGER[name]
    report = match(liger_loss(**options))
    assert report, str(report)
    assert report.config == LossConfig(**{"surrogate": Clip(), **wanted, **NO_LIMIT})
    assert report.normalizer == normalizer
    assert report.temperature == temperature
