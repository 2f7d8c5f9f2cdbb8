"""What stands between a backbone's last hidden state and the logits, as measured in one forward of the model itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook


class Watch:
    """Remembers what a model's output embeddings and its base model are given and return, while it is open."""

    def __init__(self, model: Any) -> None:
        self._model, self._head = model, model.get_output_embeddings()
        self._calls: list[tuple[Any, Any]] = []
        self._outputs: list[Any] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        if isinstance(self._head, nn.Module):
            self._handles.append(self._head.register_forward_hook(self._call))
        if self._model.base_model is not self._model:
            self._handles.append(self._model.base_model.register_forward_hook(self._output))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _call(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._calls.append((inputs[0].detach().clone(), output.detach().clone()))

    def _output(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._outputs.append(output)

    def describe(self, logits: Tensor) -> str:
        """Return the head's place and what is before and after it; ``logits`` are what the model returned."""
        if not self._calls:
            return "no output embeddings that it calls"
        names = {id(module): name for name, module in self._model.named_modules(remove_duplicate=False)}
        given, made = self._calls[-1]
        if not given.is_floating_point():
            return f"no output embeddings: `{names[id(self._head)]}` looks ids up"
        kind = "" if type(self._head) is nn.Linear else f" ({type(self._head).__name__})"
        bias = " with bias" if isinstance(getattr(self._head, "bias", None), Tensor) else ""
        return f"{self._before(given)}`{names[id(self._head)]}`{kind}{bias}{_after(made, logits.detach())}"

    def _before(self, given: Tensor) -> str:
        states = getattr(self._outputs[-1], "last_hidden_state", None) if self._outputs else None
        if not isinstance(states, Tensor):
            return ""
        states = states.detach()
        if given.shape != states.shape:
            return "of rows of another shape: "
        if torch.equal(given, states):
            return ""
        factor = _factor(given, states)
        return "of transformed rows: " if factor is None else f"of rows × {factor:.3g}: "


class LinearCalls:
    """Remembers each call of a linear layer while it is open, by a hook that no layer shows."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._calls: list[tuple[str, torch.Size]] = []

    def __enter__(self) -> LinearCalls:
        self._handle = register_module_forward_hook(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _call(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        made = type(output) is Tensor and output.device.type != "meta"  # what stands for a tensor takes no memory
        if made and isinstance(module, nn.Linear) and module in self._names:
            self._calls.append((self._names[module], output.shape))

    def last(self, columns: int) -> str:
        """Return the name of the last layer that made as many columns or more; empty if none did."""
        return next((name for name, shape in reversed(self._calls) if shape[-1] >= columns), "")

    def most_rows(self, name: str) -> int:
        """Return how many rows the layer of that name was applied to at once."""
        return max((shape[:-1].numel() for called, shape in self._calls if called == name), default=0)


def _after(made: Tensor, logits: Tensor) -> str:
    if made.dim() == logits.dim() and made.shape[:-1] == logits.shape[:-1] and made.shape[-1] > logits.shape[-1]:
        cut = made[..., : logits.shape[-1]]
        return f", {logits.shape[-1]} of its {made.shape[-1]} columns{_after(cut, logits)}"
    if made.shape != logits.shape:
        return ", other shapes"
    if torch.equal(made, logits):
        return ""
    factor = _factor(logits, made)
    if factor is not None:
        return f" × {factor:.3g}"
    apart = logits - made
    if bool(((apart == 0) | (logits < -1e30)).all()):
        return ", some columns masked"
    if torch.allclose(apart, apart[:1, :1].expand_as(apart), atol=1e-5):
        return " + one row"
    return ", then a function of each logit"


def _factor(scaled: Tensor, values: Tensor) -> float | None:
    """Return the number that ``values`` are multiplied by, if it is one."""
    factor = (scaled / values).nanmedian()
    return float(factor) if torch.allclose(scaled, factor * values, rtol=1e-4, atol=1e-5) else None
