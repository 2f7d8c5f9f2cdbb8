"""The operators behind the public functions, registered with ``torch.library``.

An operator takes the whole logits tensor (a slice would be cloned by torch.compile), allocates the outputs and hands
them to the backend named in its last argument. None has an autograd formula: the public functions attach gradients with
the small ``autograd.Function``s of ``calls/autograd.py``.

Each is a function of the named tuples of ``contract.py``, called by position. What torch.library takes is flat:
``_operator`` makes the schema of the function's annotations, flattens arguments once and rebuilds them once.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from .. import backends
from ..objectives.compiler import define
from ..objectives.metrics import FIELDS
from ..objectives.sequences import accumulate_dtype
from . import memory
from .contract import DivergenceStats, RowGradients, Rows, RowStats, TokenInputs, TokenRecords, TokenValues
from .sets import Sets, gather, scatter_, set_gradient, set_stats
from .spec import ObjectiveSpec

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", bool: "bool", str: "str"}
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), int, bool, str))


def _operator(
    fake: Callable[_Arguments, _Result], writes: str = ""
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Return a decorator that registers a typed function as an operator of its name.

    Args:
        fake: the same without a backend: it allocates the outputs.
        writes: the name of the tensor that is overwritten.
    """

    def register(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        arguments = typing.get_type_hints(function)
        result = arguments.pop("return")
        parts = typing.get_args(result) if typing.get_origin(result) is tuple else (result,)
        results = [part for part in parts if part is not type(None)]
        taken = ", ".join(
            f"{_SCHEMA[kind].replace('Tensor', 'Tensor(a!)') if name == writes else _SCHEMA[kind]} {name}"
            for name, kind in _flat(arguments)
        )
        schemas = [_SCHEMA[kind] for whole in results for _, kind in _fields(whole)]
        kinds, result_kinds = _counted(arguments.values()), _counted(results)
        nested = len(results) > 1 and len(schemas) > len(results)

        def of_flat(compute: Callable[..., Any]) -> Callable[..., Any]:
            def run(*flat: Any) -> Any:
                values, first = [], 0
                for kind, count in kinds:
                    values.append(kind(*flat[first : first + count]) if count else flat[first])
                    first += count or 1
                result = compute(*values)
                if not nested:
                    return result
                outputs: list[Any] = []
                for part in result:
                    if isinstance(part, tuple):
                        outputs += part
                    else:
                        outputs.append(part)
                return tuple(outputs)

            return run

        returned = schemas[0] if len(schemas) == 1 else f"({', '.join(schemas)})"
        schema = f"{function.__name__}({taken}) -> {returned}"
        registered = define(schema, of_flat(function), of_flat(fake))

        def call(*arguments: Any) -> Any:
            if not _followed():
                each = [argument if isinstance(argument, tuple) else (argument,) for argument in arguments]
                values = list(chain.from_iterable(each))
                # No tensor stands for another, as those of a subclass, of vmap or with a lazy sign do.
                if _PLAIN.issuperset(map(type, values)) and all(
                    torch._C._has_storage(value) and not value.is_neg() for value in values if isinstance(value, Tensor)
                ):
                    return function(*arguments)  # type: ignore[call-arg]
            flat: list[Any] = []
            for argument in arguments:
                if isinstance(argument, tuple):
                    flat.extend(argument)  # PyTorch 2.11 compiles no += of a named tuple
                else:
                    flat.append(argument)
            result = registered(*flat)
            if len(schemas) == len(results):
                return result  # no named tuple is in it
            parts_of_result, first = [], 0
            for kind, count in result_kinds:
                parts_of_result.append(kind(*result[first : first + count]) if count else result[first])
                first += count or 1
            return tuple(parts_of_result) if len(results) > 1 else parts_of_result[0]

        call.operator = registered  # type: ignore[attr-defined]
        return cast(Callable[_Arguments, _Result], call)

    return register


def _followed() -> bool:
    """Whether somebody follows what PyTorch dispatches: a graph that is traced, a mode, a transform, a profiler. Where
    nobody does, an operator is no more than its function, and PyTorch's way to it takes longer than all that the
    function does in a short call. Profilers are asked for on this thread alone, as PyTorch's own is by default."""
    try:
        return (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._is_torch_function_mode_enabled()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._get_tracing_state() is not None
            or torch.autograd._profiler_enabled()
        )
    except AttributeError:  # another PyTorch, that is asked in other words
        return True


def _fields(kind: Any, name: str = "") -> Sequence[tuple[str, Any]]:
    """Return the names and types of a named tuple's fields, or those of one value."""
    return list(typing.get_type_hints(kind).items()) if hasattr(kind, "_fields") else [(name, kind)]


def _flat(arguments: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the names and types of all fields; of a second tuple of a kind after the argument that it is."""
    taken: dict[str, Any] = {}
    for argument, whole in arguments.items():
        for name, kind in _fields(whole, argument):
            taken[f"{argument}_{name}" if name in taken else name] = kind
    return list(taken.items())


def _counted(kinds: typing.Iterable[Any]) -> list[tuple[Any, int]]:
    """Return every kind with the number of its fields; 0 where it is one value."""
    return [(kind, len(getattr(kind, "_fields", ()))) for kind in kinds]


def _new_stats(rows: Rows) -> RowStats:
    first = torch.empty_like(rows.token_ids, dtype=rows.numbers.dtype)
    return RowStats(first, *[torch.empty_like(first) for _ in RowStats._fields[1:]])


def _new_records(like: Tensor, spec: ObjectiveSpec) -> TokenRecords:
    """Return records of the shape of ``like``, one of a token's real numbers."""
    flags = torch.empty_like(like, dtype=torch.uint8)
    weight, of_sampler = (
        torch.empty_like(like) if used else like.new_empty(0)
        for used in (spec.rollout_scheme, spec.rollout_kl_estimator)
    )
    return TokenRecords(torch.empty_like(like), torch.empty_like(like), flags, weight, of_sampler)


def _fake_gradient(logits: Tensor) -> Tensor:
    """Return a gradient without the offset of the real one, which follows from an address."""
    return logits.new_empty_strided(logits.shape, memory.row_strides(logits))


def note_write(tensor: Tensor) -> None:
    """Tell autograd of a write: kernels write behind its back, and nodes that saved the tensor would not notice."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def _zero_unused_rows(rows: Rows) -> None:
    """Write the gradient, 0, of the row after the last token of (B, T+1, V) logits, which predicts nothing."""
    length = rows.token_ids.shape[1]
    if length < rows.logits.shape[-2]:
        rows.logits.narrow(-2, length, rows.logits.shape[-2] - length).zero_()


@_operator(fake=lambda rows, backend: _new_stats(rows))
def log_probs(rows: Rows, backend: str) -> RowStats:
    """Return the statistics of every row."""
    stats = _new_stats(rows)
    backends.get(backend).log_probs(rows, stats)
    return stats


@_operator(fake=lambda rows, stats, gradients, backend: _fake_gradient(rows.logits))
def log_probs_backward(rows: Rows, stats: RowStats, gradients: RowGradients, backend: str) -> Tensor:
    """Return the logits' gradient."""
    out = memory.gradient_like(rows.logits, rows.token_ids.shape[1])
    backends.get(backend).log_probs_backward(rows, stats, gradients, out)
    return out


@_operator(fake=lambda rows, stats, gradients, backend: None, writes="logits")
def log_probs_backward_(rows: Rows, stats: RowStats, gradients: RowGradients, backend: str) -> None:
    """Write the gradient over the logits."""
    backends.get(backend).log_probs_backward(rows, stats, gradients, rows.logits)
    _zero_unused_rows(rows)
    note_write(rows.logits)


def _new_divergence(
    rows: Rows, stats: RowStats, teacher: Rows, teacher_stats: RowStats, kind: int, backend: str
) -> DivergenceStats:
    return DivergenceStats(*[torch.empty_like(stats.log_prob) for _ in DivergenceStats._fields])


@_operator(fake=_new_divergence)
def divergence(
    rows: Rows, stats: RowStats, teacher: Rows, teacher_stats: RowStats, kind: int, backend: str
) -> DivergenceStats:
    """Return every row's divergence from the teacher's."""
    out = _new_divergence(rows, stats, teacher, teacher_stats, kind, backend)
    backends.get(backend).divergence(rows, stats, teacher, teacher_stats, kind, out)
    return out


def _fake_divergence_backward(
    rows: Rows,
    stats: RowStats,
    teacher: Rows,
    teacher_stats: RowStats,
    kind: int,
    divergence: DivergenceStats,
    gradients: RowGradients,
    grad_divergence: Tensor,
    backend: str,
) -> Tensor:
    return _fake_gradient(rows.logits)


@_operator(fake=_fake_divergence_backward)
def divergence_backward(
    rows: Rows,
    stats: RowStats,
    teacher: Rows,
    teacher_stats: RowStats,
    kind: int,
    divergence: DivergenceStats,
    gradients: RowGradients,
    grad_divergence: Tensor,
    backend: str,
) -> Tensor:
    """Return the logits' gradient, by log-probs, entropies and divergences."""
    out = memory.gradient_like(rows.logits, rows.token_ids.shape[1])
    known = (rows, stats, teacher, teacher_stats, kind, divergence, gradients, grad_divergence)
    backends.get(backend).divergence_backward(*known, out)
    return out


@_operator(fake=lambda *arguments: None, writes="logits")
def divergence_backward_(
    rows: Rows,
    stats: RowStats,
    teacher: Rows,
    teacher_stats: RowStats,
    kind: int,
    divergence: DivergenceStats,
    gradients: RowGradients,
    grad_divergence: Tensor,
    backend: str,
) -> None:
    """Write the gradient over the logits."""
    known = (rows, stats, teacher, teacher_stats, kind, divergence, gradients, grad_divergence)
    backends.get(backend).divergence_backward(*known, rows.logits)
    _zero_unused_rows(rows)
    note_write(rows.logits)


def _new_pair(
    rows: Rows, teacher: Rows, kind: int, inputs: TokenInputs, weight: Tensor, spec: ObjectiveSpec, backend: str
) -> tuple[RowStats, RowStats, DivergenceStats, TokenRecords]:
    stats, teacher_stats = _new_stats(rows), _new_stats(rows)
    divergences = _new_divergence(rows, stats, teacher, teacher_stats, kind, backend)
    return stats, teacher_stats, divergences, _new_records(stats.log_prob, spec)


def _fake_fused_divergence(
    rows: Rows, teacher: Rows, kind: int, inputs: TokenInputs, weight: Tensor, spec: ObjectiveSpec, backend: str
) -> tuple[RowStats, RowStats, DivergenceStats, TokenRecords, Tensor]:
    return *_new_pair(rows, teacher, kind, inputs, weight, spec, backend), _fake_gradient(rows.logits)


@_operator(fake=_fake_fused_divergence)
def fused_divergence(
    rows: Rows, teacher: Rows, kind: int, inputs: TokenInputs, weight: Tensor, spec: ObjectiveSpec, backend: str
) -> tuple[RowStats, RowStats, DivergenceStats, TokenRecords, Tensor]:
    """Return the statistics of both rows, divergences, records and the logits' gradient."""
    made = _new_pair(rows, teacher, kind, inputs, weight, spec, backend)
    out = memory.gradient_like(rows.logits, rows.token_ids.shape[1])
    backends.get_pair(backend).fused_divergence(rows, teacher, kind, inputs, weight, spec, *made, out)
    return *made, out


@_operator(fake=_new_pair, writes="logits")
def fused_divergence_(
    rows: Rows, teacher: Rows, kind: int, inputs: TokenInputs, weight: Tensor, spec: ObjectiveSpec, backend: str
) -> tuple[RowStats, RowStats, DivergenceStats, TokenRecords]:
    """Return the same without the gradient, which is written over the logits."""
    made = _new_pair(rows, teacher, kind, inputs, weight, spec, backend)
    backends.get_pair(backend).fused_divergence(rows, teacher, kind, inputs, weight, spec, *made, rows.logits)
    _zero_unused_rows(rows)
    note_write(rows.logits)
    return made


@_operator(fake=lambda rows, sets, backend: _new_stats(rows))
def set_log_probs(rows: Rows, sets: Sets, backend: str) -> RowStats:
    """Return the statistics of every row over its set, over the whole vocabulary where that is empty."""
    filled = sets.filled.view_as(rows.live)
    whole = rows._replace(live=rows.live & ~filled)
    stats = _new_stats(rows)
    backends.get(backend).log_probs(whole, stats)
    of_sets = set_stats(rows, sets, gather(rows, sets))
    return RowStats(*(torch.where(filled, a, b) for a, b in zip(of_sets, stats, strict=True)))


@_operator(fake=lambda rows, sets, stats, gradients, backend: _fake_gradient(rows.logits))
def set_log_probs_backward(rows: Rows, sets: Sets, stats: RowStats, gradients: RowGradients, backend: str) -> Tensor:
    """Return the logits' gradient: a kernel's where a row has no set, and its zeros elsewhere, with the sets' in it."""
    out = memory.gradient_like(rows.logits, rows.token_ids.shape[1])
    whole = rows._replace(live=rows.live & ~sets.filled.view_as(rows.live))
    backends.get(backend).log_probs_backward(whole, stats, gradients, out)
    at = gather(rows, sets)
    scatter_(out, rows, at, set_gradient(rows, sets, at, stats, gradients))
    return out


def _fake_fused_loss_(
    rows: Rows, inputs: TokenInputs, spec: ObjectiveSpec, backend: str
) -> tuple[Tensor, Tensor, TokenRecords]:
    log_prob, entropy, *_ = _new_stats(rows)
    return log_prob, entropy, _new_records(log_prob, spec)


def _fake_fused_loss(
    rows: Rows, inputs: TokenInputs, spec: ObjectiveSpec, backend: str
) -> tuple[Tensor, Tensor, TokenRecords, Tensor]:
    return *_fake_fused_loss_(rows, inputs, spec, backend), _fake_gradient(rows.logits)


@_operator(fake=_fake_fused_loss)
def fused_loss(
    rows: Rows, inputs: TokenInputs, spec: ObjectiveSpec, backend: str
) -> tuple[Tensor, Tensor, TokenRecords, Tensor]:
    """Return log-probs, entropies, records and the logits' gradient."""
    stats = _new_stats(rows)
    records = _new_records(stats.log_prob, spec)
    out = memory.gradient_like(rows.logits, rows.token_ids.shape[1])
    backends.get_fused(backend).fused_loss(rows, inputs, spec, stats, records, out)
    return stats.log_prob, stats.entropy, records, out


@_operator(fake=_fake_fused_loss_, writes="logits")
def fused_loss_(
    rows: Rows, inputs: TokenInputs, spec: ObjectiveSpec, backend: str
) -> tuple[Tensor, Tensor, TokenRecords]:
    """Return log-probs, entropies and records; write the gradient over the logits."""
    stats = _new_stats(rows)
    records = _new_records(stats.log_prob, spec)
    backends.get_fused(backend).fused_loss(rows, inputs, spec, stats, records, rows.logits)
    _zero_unused_rows(rows)
    note_write(rows.logits)
    return stats.log_prob, stats.entropy, records


def _new_terms(
    values: TokenValues, numbers: Tensor, inputs: TokenInputs, spec: ObjectiveSpec, backend: str
) -> tuple[TokenRecords, Tensor]:
    return _new_records(values.log_prob, spec), torch.empty_like(values.log_prob)


@_operator(fake=_new_terms)
def token_terms(
    values: TokenValues, numbers: Tensor, inputs: TokenInputs, spec: ObjectiveSpec, backend: str
) -> tuple[TokenRecords, Tensor]:
    """Return the records of tokens whose log-probs are known, and ∂loss/∂ℓ."""
    records, grad_log_prob = _new_terms(values, numbers, inputs, spec, backend)
    backends.get_fused(backend).token_terms(values, numbers, inputs, spec, records, grad_log_prob)
    return records, grad_log_prob


def _new_sums(
    values: TokenValues,
    masked_in: Tensor,
    inputs: TokenInputs,
    records: TokenRecords,
    kl_estimator: int,
    sequences: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    like = values.log_prob
    sums = torch.zeros(len(FIELDS), dtype=accumulate_dtype(like.device), device=like.device)
    return torch.empty((), dtype=like.dtype, device=like.device), sums


@_operator(fake=_new_sums)
def token_sums(
    values: TokenValues,
    masked_in: Tensor,
    inputs: TokenInputs,
    records: TokenRecords,
    kl_estimator: int,
    sequences: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the sums behind its metrics."""
    loss, sums = _new_sums(values, masked_in, inputs, records, kl_estimator, sequences, backend)
    backends.get(backend).token_sums(values, masked_in, inputs, records, kl_estimator, sequences, loss, sums)
    return loss, sums


@_operator(fake=lambda gradient, token_ids, upstream, announced, backend: None, writes="gradient")
def rescale_(gradient: Tensor, token_ids: Tensor, upstream: Tensor, announced: Tensor, backend: str) -> None:
    """Multiply a gradient by upstream / announced, unless they are equal: then nothing is read or written.

    ``token_ids`` is here for its shape: a compiled backward that saw T only as the T + 1 rows of the gradient would
    not compile (inductor of torch 2.13: "For s + 1, expected [s] to have been codegen-ed").
    """
    note_write(gradient)
    backends.get(backend).rescale(gradient, upstream, announced)
