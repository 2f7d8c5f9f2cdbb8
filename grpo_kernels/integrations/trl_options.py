"""Which options of TRL's ``GRPOConfig`` the fused loss has, and the ``LossConfig`` that they make."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..objectives.checks import fail
from ..objectives.divergence import Divergence
from .objectives import AGGREGATIONS, LEVELS, UNBOUNDED, Objective


def check_arguments(args: Any, from_logits: bool) -> None:
    """Refuse, by name, what the fused loss would not honour."""
    if args.loss_type not in AGGREGATIONS:
        _refuse(f'loss_type="{args.loss_type}"', f"one of {', '.join(AGGREGATIONS)}")
    if args.cast_lm_head_to_fp32 and from_logits:
        _refuse("cast_lm_head_to_fp32=True with from_logits=True", "either of them")
    if args.importance_sampling_level not in LEVELS:
        _refuse(f'importance_sampling_level="{args.importance_sampling_level}"', " and ".join(LEVELS))
    _check_delta(args.delta, args.loss_type)
    bonus = args.entropy_coef != 0 or args.use_adaptive_entropy
    if bonus and args.top_entropy_quantile < 1.0:
        _refuse("an entropy bonus with top_entropy_quantile < 1", "either of them")


def check_teacher(teacher: Any, divergence: Any, from_logits: bool) -> None:
    """Refuse, by name, what is no teacher with a divergence, and no loss that has one."""
    if teacher is None and divergence is None:
        return
    function, learned = "FusedGRPOTrainer", 'Divergence("reverse_kl", coef=0.05)'
    if not isinstance(teacher, nn.Module):
        hint = "AutoModelForCausalLM.from_pretrained(...); divergence= is a distance from it"
        fail(
            function, "teacher= a model of transformers beside divergence=", _named(teacher), hint=hint, error=TypeError
        )
    if not isinstance(divergence, Divergence):
        expected, hint = f"divergence={learned} beside teacher=", "what is minimised between the two"
        fail(function, expected, _named(divergence), hint=hint, error=TypeError)
    if from_logits:
        hint = "without from_logits=True it is made from the hidden states of both"
        fail(function, "teacher= beside hidden states", "from_logits=True", hint=hint)


def _named(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, str) else type(value).__name__


def check_trainer(trainer: Any) -> None:
    """Refuse, by name, what a class behind or a callback has set since, and the fused loss would not honour."""
    if trainer._entropy_bonus_enabled and trainer.top_entropy_quantile < 1.0:
        _refuse("an entropy bonus with top_entropy_quantile < 1", "either of them")
    _check_delta(trainer.args.delta, trainer.loss_type)


def _check_delta(delta: float | None, loss_type: str) -> None:
    if delta is not None and delta < 1 and loss_type not in UNBOUNDED:
        _refuse(f"delta={delta}, which bounds ratios below 1", "delta >= 1")


def _refuse(option: str, supported: str) -> None:
    raise ValueError(
        f"FusedGRPOTrainer does not have {option}; supported: {supported}. trl.GRPOTrainer with "
        "grpo_kernels.integrations.trl.patch_trl() keeps every option of TRL."
    )


def objective_of(trainer: Any) -> Objective:
    """Return the objective that the trainer's attributes describe, now: callbacks may have changed them."""
    args = trainer.args
    clip = (trainer.epsilon_low, trainer.epsilon_high, args.delta)
    options = (trainer.beta, args.use_bias_correction_kl, trainer.max_completion_length)
    sapo = (args.sapo_temperature_pos, args.sapo_temperature_neg)
    vespo = (args.vespo_k_pos, args.vespo_lambda_pos, args.vespo_k_neg, args.vespo_lambda_neg)
    return Objective(trainer.loss_type, trainer.importance_sampling_level, *clip, *options, sapo, vespo)
