"""The proof, on one live row, that a model's own way from hidden states to log-probs is the one that was traced.

A trace follows what is done to logits that are not made. Code that looks at what it was given could do something else
to real ones, so the model's own forward makes those of one row, and they are compared: at the first call in each state,
waiting for the device, and every ``every`` calls, without.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..calls.sharding import is_dtensor
from ..objectives.checks import fail, may_look
from .form import Autocast, Untraceable
from .head import ATTACH, Caller, TracedHead, columns_of, named, on_mesh, rows_of, trace, whole
from .parts import Parts

_REMEMBERED = 64
"""States of a model; beyond them the first is forgotten, and measured anew."""
EVERY = 100
"""Calls between two looks at a state that is known."""
_LATER = 8
"""Calls after which the result of a look that did not wait is read: a device is not that far behind."""


_GLOBAL_HOOKS = torch.nn.modules.module._global_forward_hooks
_MAKING = threading.Lock()
"""Held while a model's memory or lock is made."""
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
"""Of each model, held for a call: what is put into its places meanwhile is one thread's."""


class Row(NamedTuple):
    """What a proof is made on: one row, traced by itself."""

    state: tuple[object, ...]
    known: bool
    """Seen before: nothing waits."""
    place: tuple[Tensor, ...]
    """Among the states that the head was called with, (B, ..., T)."""
    traced: TracedHead | None
    problem: str | None
    """Why it cannot be traced."""
    real: bool
    """Whether this rank's batch has it; otherwise it is zeros, for ranks whose batches do to be met."""


@dataclass
class _Memory:
    """Of one model."""

    proven: dict[tuple[object, ...], None] = field(default_factory=dict)
    calls: int = 0
    late: tuple[Tensor, torch.cuda.Event, int] | None = None
    """What a look that did not wait will have found, and the call that asks."""


Memories = weakref.WeakKeyDictionary[nn.Module, _Memory]


def alone(model: nn.Module, memories: Memories) -> threading.RLock:
    """Return the lock of a model: a second thread's call waits."""
    with _MAKING:
        memories.setdefault(model, _Memory())
        return _LOCKS.setdefault(model, threading.RLock())


class Proof:
    """Measured in each state of a model: training or not, which products, bias and cap the head has, in which dtypes.

    Of what is called as a module nothing runs twice but the head and what stands around it; nothing is drawn, no cast
    weight is kept. Which calls measure follows from the state and from the count of calls alone, so that ranks agree.
    """

    def __init__(
        self, before: Callable[..., Any], every: int, caller: Caller = ATTACH, memories: Memories | None = None
    ) -> None:
        self._before = before  # by its name
        self._every, self._caller = every, caller
        self._memories: Memories = weakref.WeakKeyDictionary() if memories is None else memories
        """Of each model that has this forward: a copy is a model of its own."""

    def alone(self, model: nn.Module) -> threading.RLock:
        """As the function of that name."""
        return alone(model, self._memories)

    def traced(self, parts: Parts, call: Callable[[], Any], compiled: Any, kept: Any) -> TracedHead:
        """Return the head of the model's own forward, ``call()``, of the rows that are ``kept`` if given."""
        with parts.recorded(compiled):
            traced = trace(parts.model, parts.head, call)
        return traced if kept is None else traced._replace(form=traced.form.cut((slice(None), kept)))

    @contextlib.contextmanager
    def refusing(self, parts: Parts) -> Iterator[None]:
        """Raise a ValueError that says what may be the cause where a head cannot be traced."""
        try:
            yield
        except Untraceable as error:
            fail(
                self._caller.function,
                "logits that come of a linear head, scaled, capped or with a bias",
                f"{type(parts.model).__name__}, where {error}; found: "
                f"{suspects(parts.model, parts.head, self._before)}",
                hint=self._caller.around,
            )

    def row(
        self, traced: TracedHead, parts: Parts, call: Callable[[], Any], hidden: Tensor, mask: object
    ) -> Row | None:
        """Return the row to compare, traced; None where this state is proven, or contents cannot be looked at."""
        memory = self._memories[parts.model]
        memory.calls += 1
        self._read(memory, parts.model, traced)
        state = _state(parts.model, traced)
        known = state in memory.proven
        waits = self._every == 0 or memory.calls % self._every or memory.late is not None
        real = hidden.numel() > 0
        if (known and waits) or not may_look(hidden, check=True) or not (real or _groups(parts.model)):
            return None
        place = _live_place(traced.rows, hidden, mask)
        try:
            with torch.no_grad(), parts.replayed(), _random_numbers_kept(hidden), _without_cache(hidden):
                found = trace(parts.model, parts.head, call, place)
        except Untraceable as error:
            return Row(state, known, place, None, f"its forward cannot be followed ({error})", real)
        unlike = _shape(found) != _shape(traced)
        return Row(state, known, place, found, "its head is another for one row" if unlike else None, real)

    def compare(
        self,
        row: Row,
        mine: Tensor | None,
        traced: TracedHead,
        parts: Parts,
        call: Callable[[], Any],
        dtype: torch.dtype | None,
    ) -> Tensor | None:
        """Compare ``mine`` with the model's own logits of the row. After the loss: a call of the head ends what FSDP
        counts as one pass of a group of modules. ``dtype``: of the states that the model's head takes, where they come
        in another. Of a known state return a factor of the loss, 1 or NaN."""
        hidden, found, own = traced.main.states, row.problem, None
        theirs: Any = None
        try:  # whatever was found before: a head that FSDP shards is gathered by all ranks, or by none
            with torch.no_grad(), parts.replayed(), _random_numbers_kept(hidden), _without_cache(hidden):
                theirs = whole(rows_of(parts.head, call, row.place, traced.form.autocast, dtype))
        except Exception as error:
            found = found or f"its forward cannot be followed ({type(error).__name__}: {str(error)[:200]})"
        if found is None and mine is not None:
            found = _other_shape(mine, theirs, traced.form.spread)
            accelerated = hasattr(parts.model, "_original_forward")
            form = traced.form
            own = None if found else _alike(mine, theirs, accelerated, form.eps, form.roundings)
        same = torch.zeros((), dtype=torch.bool, device=hidden.device) if own is None else own
        same, real = _on_every_rank(parts.model, same, row.real)
        if row.known and not may_look(same):
            self._keep(parts.model, same)
            return torch.where(same, 1.0, torch.nan)
        if not bool(same):
            if mine is not None and own is not None:
                found = "another rank's log-probs are others" if bool(own) else _words(mine, theirs)
            self._fail(parts.model, traced, str(found))
        if not real:
            return None
        proven = self._memories[parts.model].proven
        while len(proven) >= _REMEMBERED:
            proven.pop(next(iter(proven)))
        proven[row.state] = None
        return None

    def _keep(self, model: nn.Module, same: Tensor) -> None:
        late = torch.empty((), dtype=torch.bool, pin_memory=True)
        late.copy_(same, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        memory = self._memories[model]
        memory.late = (late, done, memory.calls + _LATER)

    def _read(self, memory: _Memory, model: Any, traced: TracedHead) -> None:
        """Say what an earlier look has found, some calls later, when it is there: on every rank at the same call."""
        if memory.late is None or memory.calls < memory.late[2]:
            return
        (same, done, _), memory.late = memory.late, None
        done.synchronize()
        if not bool(same):
            memory.proven.clear()
            self._fail(model, traced, "its own log-probs of a live row differed, at a call whose loss was NaN")

    def _fail(self, model: Any, traced: TracedHead, found: str) -> None:
        fail(
            self._caller.function,
            "a model whose log-probs are those of its traced head",
            f"one where {found}; found: {suspects(model, traced.head, self._before)}",
            hint=f"{self._caller.around}, and whatever was put around it",
        )


def row_logits(row: Row) -> Tensor | None:
    """Return the logits (..., V) of a row by its form, where the head's weight is whole."""
    if row.traced is None or row.problem is not None:
        return None
    form = row.traced.form
    with torch.no_grad(), form.autocast.around(form.products[0].states.device.type, cache_enabled=False):
        total: Any = 0
        for product in form.products:
            weight = row.traced.current(product.weight)
            states = product.states if form.autocast.enabled else product.states.to(weight.dtype)
            part = whole(nn.functional.linear(on_mesh(states, weight), weight))
            total = total + (part if product.columns is None else part * product.columns)
        if form.bias is not None:
            total = total + whole(row.traced.current(form.bias))
        total = total * form.scale
        logits: Tensor = total if form.cap is None else form.cap * torch.tanh(total)
        if form.spread:
            logits = columns_of(logits, row.traced.current(row.traced.main.weight))
        return logits.to(form.dtype)


def suspects(model: Any, head: nn.Module, before: Callable[..., Any]) -> str:
    """Return what may have made a difference, by name."""
    found = [f"a global forward hook ({named(hook)})" for hook in _GLOBAL_HOOKS.values()]
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    for module in head.modules():
        name = names.get(id(module), "the head")
        kinds = (("forward hook", module._forward_hooks), ("forward pre-hook", module._forward_pre_hooks))
        found += [f"a {kind} on {name} ({named(hook)})" for kind, hooks in kinds for hook in hooks.values()]
        if "forward" in module.__dict__:
            found.append(f"a patched forward of {name} ({named(module.forward)})")
    own = type(model).forward
    if not named(own).startswith("transformers."):
        found.append(f"{type(model).__name__}, a class with a forward of its own ({named(own)})")
    if before is not own:
        found.append(f"a patched forward of the model ({named(before)})")
    return ", ".join(found) or "nothing known by name"


def _shape(traced: TracedHead) -> tuple[object, ...]:
    """Return what a head's form is, without the numbers in it."""
    form = traced.form
    products = tuple(
        (product.weight.shape, product.weight.dtype, product.states.dtype, product.columns is None)
        for product in form.products
    )
    return products, form.bias is None, form.cap is None, form.dtype, form.autocast


def _state(model: Any, traced: TracedHead) -> tuple[object, ...]:
    """Return what a proof holds for."""
    return model.training, traced.head.training, _shape(traced)


def _groups(model: nn.Module) -> list[Any]:
    """Return the process groups that a sharded model is spread over, in one order on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    meshes = dict.fromkeys(each.device_mesh for each in model.parameters() if is_dtensor(each))
    return list(dict.fromkeys(mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)))


def _on_every_rank(model: nn.Module, same: Tensor, real: bool) -> tuple[Tensor, bool | Tensor]:
    """Return whether all ranks found so that a sharded model is spread over, and whether one had a row of its batch;
    they all look, or none."""
    groups = _groups(model)
    if not groups:
        return same, real
    least = torch.stack([same.to(torch.int32), torch.full_like(same, -int(real), dtype=torch.int32)])
    for group in groups:
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group)
    return least[0] > 0, least[1] < 0


def _random_numbers_kept(hidden: Tensor) -> Any:
    return torch.random.fork_rng([hidden.device] if hidden.is_cuda else [])


def _without_cache(hidden: Tensor) -> Any:
    """Return autocast as it is, but a whole weight that is cast for one row is not kept."""
    device = hidden.device.type
    return Autocast.now(device).around(device, cache_enabled=False)


def _live_place(rows: torch.Size, hidden: Tensor, mask: object) -> tuple[Tensor, ...]:
    """Return the place of the first row that the mask leaves, among ``rows`` (B, ..., T) of which ``hidden`` has the
    last, found without waiting; of the first of all where it leaves none."""
    live = mask if isinstance(mask, Tensor) and mask.numel() > 0 else hidden.new_ones(1)
    first = (live.to(hidden.device) != 0).flatten().to(torch.uint8).argmax(0, keepdim=True)
    width = live.shape[-1] if live.dim() > 0 else 1
    column = (first % width + (rows[-1] - hidden.shape[-2])).clamp(min=0, max=rows[-1] - 1)
    batch = (first // width).clamp(max=rows[0] - 1)
    return (column,) if len(rows) == 1 else (batch, *[torch.zeros_like(batch)] * (len(rows) - 2), column)


def _other_shape(mine: Tensor, theirs: Any, spread: bool = False) -> str | None:
    """Say where shapes differ; a rank may have none of columns that are ``spread``."""
    if isinstance(theirs, Tensor) and theirs.shape == mine.shape and (theirs.numel() > 0 or spread):
        return None
    shape = tuple(theirs.shape) if isinstance(theirs, Tensor) else type(theirs).__name__
    return f"its own logits of a row are {shape}, not {tuple(mine.shape)}"


def _alike(mine: Tensor, theirs: Tensor, autocast: bool, eps: float, roundings: int) -> Tensor:
    """Return whether logits differ by no more than their rounding, without waiting: two units of the coarsest of their
    dtypes, of the largest of them and of their root mean square, and one for each step behind the head after the third
    (a cap is three). ``autocast``: accelerate has put one around the model, and converts its outputs."""
    dtypes = (mine.dtype, theirs.dtype, *([torch.bfloat16] if autocast else []))
    unit = max(2**-16, eps, *(torch.finfo(dtype).eps for dtype in dtypes)) * (2 + max(0, roundings - 3))
    a, b = (logits.float() for logits in (mine, theirs))
    if a.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=a.device)
    same = (a == b) | (a.isnan() & b.isnan())
    banned = torch.finfo(torch.float16).min  # -inf, or what stands for it
    same |= (a < banned) & (b < banned)
    apart = torch.where(same, 0.0, b - a)
    apart = apart - apart.median()  # what all columns have in common is in no log-prob
    a = torch.where(same & ~a.isfinite() | (a < banned), 0.0, a)
    within = same.all() | (apart.abs().amax() <= unit * a.abs().amax() + 1e-5)
    return within & (same.all() | (apart.square().mean().sqrt() <= unit * a.std(correction=0) + 1e-5))


def _words(mine: Tensor, theirs: Tensor) -> str:
    log_probs, own = (logits.float().log_softmax(-1) for logits in (mine, theirs))
    return f"its own log-probs of a live row differ by up to {float((own - log_probs).abs().amax()):.3g} nats"
