"""What ``GRPOLoss`` and ``LinearGRPOLoss`` share: a loss function with its configuration and options fixed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from ..objectives.config import LossConfig, resolve_config
from ..objectives.names import check_options


class LossModule(nn.Module):
    """Keeps a resolved configuration and keywords of ``function``, which the subclass's ``forward`` calls."""

    function: ClassVar[Callable[..., Any]]

    def __init__(self, config: LossConfig | str = "grpo", **options: Any) -> None:
        super().__init__()
        self.config = resolve_config(config)
        parameters = inspect.signature(self.function).parameters.values()
        keywords = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        check_options(f"{type(self).__name__}: the option", options, keywords)
        self.options = options

    def keywords(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of one call: what it is given stands in place of what is fixed."""
        return {"config": self.config, **self.options, **options}

    def extra_repr(self) -> str:
        return repr(self.config)
