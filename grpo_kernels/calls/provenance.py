"""How log-probs were made, and whether a loss compares the policy with old ones that were made otherwise.

A ratio is exactly 1 on the policy that the old log-probs come from only where both are computed alike: their bits
depend on the kernels, the dtype of the logits and on how many ranks hold the vocabulary, and their values on the
temperature and the support.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from ..backends.spec import LogitArgs
from ..objectives.checks import warn_caller
from .recorded import Recorded
from .tokens import RowTokens


@dataclass(frozen=True)
class Made:
    """How log-probs were made. Tensors, temperatures of tokens among them, are not looked at: they are ``UNKNOWN``."""

    backend: str
    dtype: str
    """Of the logits."""
    vocabulary: int
    """Columns that count."""
    vocabulary_ranks: int
    temperature: float | str | None
    logit_scale: float | str | None
    logit_softcap: float | str | None
    support: str

    @classmethod
    def of(cls, tokens: RowTokens, backend: str, logit_args: LogitArgs, support: object) -> Made:
        temperature, scale, softcap = (UNKNOWN if isinstance(value, Tensor) else value for value in logit_args)
        temperature = temperature if tokens.temperature is None else UNKNOWN
        dtype = str(tokens.dtype).removeprefix("torch.")
        ranks = 1 if tokens.shard is None else tokens.shard.ranks
        kept = "a mask" if isinstance(support, Tensor) else "everything" if support is None else repr(support)
        kept = "recorded sets" if isinstance(support, Recorded) else kept
        return cls(backend, dtype, tokens.vocab, ranks, temperature, scale, softcap, kept)

    def warn_of(self, function: str, now: Made) -> None:
        """Warn, once for each kind of difference, where old log-probs were made otherwise than a loss is ``now``."""
        for field in dataclasses.fields(self):
            before, after = getattr(self, field.name), getattr(now, field.name)
            if before != after and UNKNOWN not in (before, after) and (function, field.name) not in _SAID:
                _SAID.add((function, field.name))
                _warn(function, field.name, repr(before), repr(after))


UNKNOWN = "on a device"
_SAID: set[tuple[str, str]] = set()
"""Functions, and the field that was not the same."""


def _warn(function: str, name: str, before: str, after: str) -> None:
    what = name.replace("_", " ") if name == "vocabulary_ranks" else name
    warn_caller(
        f"{function}: expected old_log_probs made as the policy's are here; got {what} {before} there and {after} "
        "here.\n  hint: ratios are then not exactly 1 on the policy that they come from; give both calls the same "
        f"{what}, or old_log_probs.log_probs if the difference is meant."
    )
