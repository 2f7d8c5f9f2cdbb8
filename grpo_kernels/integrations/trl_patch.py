"""``patch_trl``: TRL 1.16's operators on these kernels, every loss of its trainers staying its own code."""

from __future__ import annotations

from ..objectives.checks import check_flag
from . import trl_operators as ours
from .patching import Hook, Patch, Target, changes_of, patch

TARGET = Target("trl", "patch_trl", ("1.16",))
_SELECTED = ("temperature", "row_mask")
_JSD = ("student_logits", "teacher_logits", "labels", "beta", "temperature", "reduction")
_HOOKS = (
    Hook(
        *("trl.trainer.utils", "_ChunkedLogProbFunction"),
        (
            *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
            *("final_logit_softcapping", "logit_scale", "outputs"),
        ),
        ours.HeadLogProbs,
        signature="_ChunkedLogProbFunction.forward",
    ),
    *(
        Hook("trl.trainer.dpo_trainer", f"DPOTrainer.{name}", arguments, ours.with_trls_head)
        for name, arguments in (
            ("compute_ref_log_probs", ("self", "model", "inputs")),
            ("_compute_loss", ("self", "model", "inputs", "return_outputs")),
        )
    ),
    Hook(
        *("trl.trainer.utils", "selective_log_softmax", ("logits", "index", *_SELECTED)),
        ours.selective_log_softmax_or,
    ),
    Hook(
        *("trl.trainer.utils", "selective_log_softmax_and_entropy"),
        ("logits", "index", "entropy_requires_grad", *_SELECTED),
        ours.selective_log_softmax_and_entropy_or,
    ),
    Hook(
        *("trl.trainer.distillation_trainer", "_chunked_divergence_loss"),
        (
            *("student_hidden_states", "teacher_hidden_states", "student_lm_head_weight", "teacher_lm_head_weight"),
            *("completion_mask", "beta", "num_items_in_batch", "student_lm_head_bias", "teacher_lm_head_bias"),
            *("student_logit_scale", "teacher_logit_scale", "student_final_logit_softcapping"),
            *("teacher_final_logit_softcapping", "temperature"),
        ),
        ours.divergence_loss_or,
    ),
)
_EXPERIMENTAL = (
    Hook(
        *("trl.experimental.gkd.gkd_trainer", "GKDTrainer.generalized_jsd_loss", (*_JSD, "num_items_in_batch")),
        ours.generalized_jsd_or,
    ),
    Hook(
        *("trl.experimental.gold.gold_trainer", "GOLDTrainer.generalized_jsd_loss"),
        (*_JSD, "logits_are_probs", "num_items_in_batch"),
        ours.generalized_jsd_or,
    ),
    Hook(
        *("trl.experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer.generalized_jsd_loss"),
        (*_JSD, "top_k", "add_tail", "num_items_in_batch"),
        ours.generalized_jsd_or,
    ),
    *(
        Hook(
            *(f"trl.experimental.{name}.loss_utils", "compute_full_logit_self_distillation_loss"),
            ("student_logits", "teacher_logits", "distillation_alpha"),
            ours.full_logit_loss_or,
        )
        for name in ("sdft", "sdpo")
    ),
)


def patch_trl(experimental: bool = False) -> Patch:
    """Put TRL's trainers on these kernels, in this process. Nothing is changed unless every hook is what it is known
    to be.

    Operators alone are replaced: the fused head's log-probs and entropies (GRPO, RLOO, KTO),
    those of logits on a CPU (CPO, ORPO, TPO, A2PO, SDFT, SDPO), and the loss of ``DistillationTrainer``. Losses,
    options and metrics stay TRL's own. SWITCHING.md has a row for every trainer, and which calls stay with TRL.

    Args:
        experimental: the divergences of whole logits, too, of GKD, GOLD, IWOPD, SDFT and SDPO, whose modules are
            imported.

    Returns:
        Patch, whose ``undo()`` gives TRL its own back: ``with patch_trl(): ...`` patches a block.

    Raises:
        TypeError: ``experimental`` that is neither on nor off.
        ImportError: no TRL.
        RuntimeError: another version; a hook that moved, has other arguments or was replaced; a patch that is on.
    """
    check_flag("patch_trl", "experimental", experimental)
    return patch(TARGET, lambda: changes_of(TARGET, (*_HOOKS, *(_EXPERIMENTAL if experimental else ()))))
