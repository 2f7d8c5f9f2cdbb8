"""``patch_trl``: the operator that TRL's GRPO and RLOO take log-probs and entropies from, on these kernels."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import trl
from torch import Tensor
from trl.trainer import utils as trl_utils

from ..linear import linear_token_log_probs

_VERSION = "1.16."
_ORIGINAL = "ChunkedLogProbFunction"
_OPERATOR = "_ChunkedLogProbFunction"
"""Its name in trl.trainer.utils, looked up at every call."""
_OUTPUTS = ("log_probs", "entropy")
_ARGUMENTS = (
    *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)


class _LogProbs:
    """In the place of TRL's ``ChunkedLogProbFunction``: the same call, through ``linear_token_log_probs``."""

    original: Any = None

    @classmethod
    def apply(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        gathered = hasattr(weight, "ds_id")  # ZeRO-3: TRL's backward gathers the weight again, ours cannot
        if gathered or not set(outputs) <= set(_OUTPUTS) or logit_scale <= 0:
            options = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
            found: tuple[Tensor | None, ...] = cls.original.apply(hidden, weight, bias, targets, *options)
            return found
        if not torch.is_autocast_enabled(hidden.device.type):  # TRL computes in the hidden states' dtype
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        log_probs, entropy = linear_token_log_probs(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            logit_scale=logit_scale,
            logit_softcap=final_logit_softcapping,
        )
        return log_probs, entropy if "entropy" in outputs else None, None, None, None


def patch_trl() -> None:
    """Take the log-probs and entropies of TRL's GRPO and RLOO trainers from these kernels.

    Only the operator is swapped: every loss option stays TRL's own. Calls that ask for more (SFT's top-1 accuracy, the
    mean logits of DPO and KTO) and weights that DeepSpeed ZeRO-3 partitions stay with TRL's operator. ``unpatch_trl``
    undoes it.

    Raises:
        RuntimeError: a TRL whose internals are not those that this was written for.
    """
    check_version("patch_trl")
    present = getattr(trl_utils, _OPERATOR, None)
    if _is_patched():
        return
    found = getattr(getattr(present, "forward", None), "__code__", None)
    names = found.co_varnames[: found.co_argcount] if found else ()
    name = getattr(present, "__name__", "nothing")
    if name != _ORIGINAL or names != _ARGUMENTS:
        raise RuntimeError(
            f"patch_trl: expected trl.trainer.utils.{_OPERATOR} to be {_ORIGINAL}"
            f"({', '.join(_ARGUMENTS)}); got {name}({', '.join(names)}). Something else has patched "
            f"TRL {trl.__version__}."
        )
    _LogProbs.original = present
    setattr(trl_utils, _OPERATOR, _LogProbs)


def unpatch_trl() -> None:
    """Undo ``patch_trl``; nothing happens where it was not called."""
    if _is_patched():
        setattr(trl_utils, _OPERATOR, _LogProbs.original)


@contextlib.contextmanager
def patched_trl() -> Any:
    """Do what ``patch_trl`` does for a ``with`` block; a patch from before stays."""
    before = _is_patched()
    patch_trl()
    try:
        yield
    finally:
        if not before:
            unpatch_trl()


def _is_patched() -> bool:
    return getattr(trl_utils, _OPERATOR, None) is _LogProbs


def check_version(what: str) -> None:
    """Raise unless TRL is the version whose internals are known."""
    if not trl.__version__.startswith(_VERSION):
        raise RuntimeError(f"{what}: written for TRL {_VERSION}x and its internals; {trl.__version__} is installed.")
