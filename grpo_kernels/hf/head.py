"""The head of a Hugging Face model, traced in the model's own forward; and the FSDP2 units that it lies in."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..calls.sharding import is_dtensor
from ..objectives.checks import fail
from ..objectives.compiler import outside_graphs
from .form import IN_A_UNIT, Autocast, Form, Product, Untraceable
from .traced import HeadTrace, TracedLogits


class Caller(NamedTuple):
    """Who is served, in messages."""

    function: str
    around: str
    """What takes the logits of the model's own head instead."""


ATTACH = Caller("attach", "attach(..., from_logits=True) runs the model's own head")


def head_of(model: Any, caller: Caller = ATTACH) -> nn.Module:
    """Return the module that makes a model's logits: its own word for it, a part's, or the one layer over its
    vocabulary. Raise a ValueError where there is none."""
    vocab = getattr(model.config.get_text_config(), "vocab_size", None)
    for part in _with_embeddings(model):
        head = _named_head(part)
        if head is not None and (part is model or getattr(head, "out_features", None) == vocab):
            return head
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.out_features == vocab]
    if len(layers) != 1:
        found = f" but {len(layers)} layers like one" if layers else ""
        expected = "a model of transformers with a head over its vocabulary"
        fail(caller.function, expected, f"{type(model).__name__}, which has no head{found}")
    return layers[0]


def _with_embeddings(model: Any) -> Iterator[Any]:
    """Give the model first; then, if that has no word for its head, what is inside."""
    yield model
    yield from (part for part in model.modules() if part is not model and hasattr(part, "get_output_embeddings"))


def _named_head(model: Any) -> nn.Module | None:
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) and not isinstance(head, (nn.Embedding, nn.ModuleList)) else None


def check_backward_hooks(head: nn.Module) -> None:
    """Raise where there are any: they change gradients, and belong to logits that are not made."""
    for module in head.modules():
        for hook in (*module._backward_hooks.values(), *module._backward_pre_hooks.values()):
            fail("attach", "a head without backward hooks", named(hook), hint=ATTACH.around)


def named(function: Any) -> str:
    """Return a function's name by where its code is: ``functools.wraps`` gives a patch the name of what it wraps."""
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return f"{type(function).__module__}.{type(function).__qualname__}"
    return f"{function.__globals__['__name__']}.{code.co_name}"


class Operands(NamedTuple):
    """What the linear functions take for a form."""

    weight: Tensor
    bias: Tensor | None
    adapter: tuple[Tensor, Tensor] | None
    transform: dict[str, Any]
    """logit_scale, logit_softcap, logits_dtype"""

    def logits(self, states: Tensor, weight: Tensor) -> Tensor:
        """Return the head's products (..., V) of states and of a weight in its weight's place, untransformed."""
        total: Tensor = nn.functional.linear(states, weight, self.bias)
        return total if self.adapter is None else total + nn.functional.linear(*self.adapter).to(total.dtype)


class TracedHead(NamedTuple):
    """What a model's own forward made of a head's states."""

    head: nn.Module
    output: Any
    """The model's, with ``TracedLogits``."""
    form: Form
    rows: torch.Size
    """Of the states that the head was called with."""
    owners: Mapping[int, tuple[nn.Module, str]]
    """Of the head's parameters, by identity: FSDP has others in their places inside its units."""
    sharded: bool
    """Whether FSDP2 units other than the model hold the head: its parameters are whole inside them alone."""

    @property
    def main(self) -> Product:
        """The widest product; what else there is goes with ``adapter``."""
        return max(self.form.products, key=lambda product: product.weight.shape[1])

    @property
    def layer(self) -> nn.Module | None:
        """Whose weight the main product has; None of a weight that was made."""
        owner = self.owners.get(id(self.main.weight))
        return None if owner is None else owner[0]

    def operands(self, dtype: torch.dtype | None = None) -> Operands:
        """Return what is to be called, with whole weights, in ``dtype`` if given."""
        form, main = self.form, self.main
        rest = [product for product in form.products if product is not main]
        weight = self._weight(main, dtype)
        bias = None if form.bias is None else rows_like(self.current(form.bias), weight)
        widened = bias is not None and dtype is None and form.wide_bias
        if bias is not None and widened and not form.autocast.enabled:
            raise Untraceable(f"a bias in {bias.dtype} is added to logits of less precision: head_dtype={bias.dtype}")
        bias = None if bias is None else bias.to(weight.dtype)
        adapter = None
        if rest:
            states = [product.states for product in rest]
            weights = [rows_like(self._weight(product), weight) for product in rest]
            adapter = (states[0], weights[0]) if len(rest) == 1 else (torch.cat(states, -1), torch.cat(weights, -1))
        transform: dict[str, Any] = {"logit_scale": form.logit_scale}
        if widened:  # as the model's own are
            transform["logits_dtype"] = torch.float32
        if form.cap is not None:
            transform["logit_softcap"] = form.cap
        return Operands(weight, bias, adapter, transform)

    def _weight(self, product: Product, dtype: torch.dtype | None = None) -> Tensor:
        if self.sharded and id(product.weight) not in self.owners:
            raise Untraceable(IN_A_UNIT)
        weight = self.current(product.weight)
        dtype = dtype or weight.dtype
        if product.columns is not None:
            weight = rows_like(self.current(product.columns), weight)[:, None] * weight
        return weight.to(dtype)

    def current(self, tensor: Tensor) -> Tensor:
        """Return what is in a parameter's place now: inside its FSDP2 units a DTensor is one of tensor parallelism's,
        rows of which each rank has."""
        owner = self.owners.get(id(tensor))
        if owner is None and self.sharded and (tensor.requires_grad or is_dtensor(tensor)):
            raise Untraceable(IN_A_UNIT)
        current: Any = tensor if owner is None else getattr(*owner)
        if is_dtensor(current):
            check_rows(current)
        return current


def check_rows(tensor: Any) -> None:
    """Raise ``Untraceable`` unless each rank has some rows of a DTensor, in rank order, or all."""
    from torch.distributed.tensor import Replicate, Shard

    for placement in tensor.placements:
        if type(placement) is not Replicate and not (type(placement) is Shard and placement.dim == 0):
            raise Untraceable(
                f"its parameters are in shards {tensor.placements}, not in rows of the vocabulary (Shard(0)) as "
                "ColwiseParallel shards a head"
            )


def rows_like(values: Any, weight: Any) -> Any:
    """Return (V, ...) in the shards of a weight, which each rank has its rows of. Of what is whole on every rank the
    gradient is gathered, so that it is whole as well."""
    if not is_dtensor(weight):
        return values.full_tensor() if is_dtensor(values) else values
    return on_mesh(values, weight).redistribute(placements=weight.placements)


def on_mesh(values: Any, weight: Any) -> Any:
    """Return what is whole on every rank as a DTensor beside a weight that is one."""
    if not is_dtensor(weight) or is_dtensor(values):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(values, weight.device_mesh, [Replicate()] * weight.device_mesh.ndim, run_check=False)


def whole(tensor: Any) -> Any:
    """Return a DTensor gathered, without a gradient of its own; anything else as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def columns_of(logits: Tensor, weight: Any) -> Tensor:
    """Return the columns of (..., V) that this rank has of a sharded weight."""
    from torch.distributed.tensor import Shard

    placements = [Shard(logits.dim() - 1) if each.is_shard() else each for each in weight.placements]
    here: Tensor = on_mesh(logits, weight).redistribute(placements=placements).to_local()
    return here


def trace(model: Any, head: nn.Module, call: Callable[[], Any], row: tuple[Tensor, ...] | None = None) -> TracedHead:
    """Run the model's own forward, ``call()``, with logits that are not made; for one ``row`` of the head's states if
    given. Raise ``Untraceable`` where the logits that it returns are not of the form."""
    if any(hasattr(weight, "ds_id") for weight in head.parameters()):
        raise Untraceable("DeepSpeed's ZeRO-3 has partitioned the head")
    vocab = max((weight.shape[0] for weight in head.parameters() if weight.dim() == 2), default=0)
    rows: list[torch.Size] = []
    owners: dict[int, tuple[nn.Module, str]] = {}

    own, around = fsdp_units(head.modules()), fsdp_units(way_to(model, head)[1:])

    def traced(plain: Callable[..., Any], states: Tensor, *args: Any, **kwargs: Any) -> Any:
        states = states if row is None else _row(states, row)
        rows.append(states.shape[:-1])
        owners.update((id(each), (part, name)) for part in head.modules() for name, each in part._parameters.items())
        with HeadTrace(head, vocab, states.shape[:-1], bool(own or around)):
            return plain(states, *args, **kwargs)

    with _without_fsdp_hooks(own), head_forward(head, traced):
        output = call()
    logits = _logits_of(output)
    if isinstance(logits, TracedLogits) and _history(logits) is not None:
        raise Untraceable("a function with a backward of its own is applied to them")
    if isinstance(logits, TracedLogits) and logits.form.trained != torch.is_grad_enabled():
        raise Untraceable("its head runs with autograd switched off")
    if not isinstance(logits, TracedLogits):
        kind = f"{type(head).__module__}.{type(head).__name__}"
        raise Untraceable(f"{kind} makes them without a linear layer of PyTorch" if rows else "its head is not called")
    if not all(product.current for product in logits.form.products):
        raise Untraceable("its head's states are written to behind it")
    return TracedHead(head, output, logits.form, rows[-1], owners, bool(own or around))


def _logits_of(output: Any) -> Any:
    return output.logits if hasattr(output, "logits") else output[0]


def _history(logits: TracedLogits) -> object:
    with torch._C.DisableTorchFunctionSubclass():
        return logits.grad_fn


def rows_of(
    head: nn.Module,
    call: Callable[[], Any],
    row: tuple[Tensor, ...],
    autocast: Autocast,
    dtype: torch.dtype | None = None,
) -> Any:
    """Return the logits of one ``row`` of the head's states, in ``dtype`` if given, as the model's own forward,
    ``call()``, makes them."""

    def one_row(plain: Callable[..., Any], states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with autocast.around(states.device.type, cache_enabled=False):
            return plain(_row(states, row).to(dtype or states.dtype), *args, **kwargs)

    with head_forward(head, one_row):
        output = call()
    return _logits_of(output)


def _row(states: Any, row: tuple[Tensor, ...]) -> Any:
    if is_dtensor(states):
        return on_mesh(_row(states.full_tensor(), row), states).redistribute(placements=states.placements)
    if states.numel() == 0:  # this rank's batch is empty, and others look at a row of theirs
        return states.new_zeros(*(1,) * len(row), states.shape[-1])
    return states.detach()[row].reshape(*(1,) * len(row), -1)


@contextlib.contextmanager
def head_forward(head: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let calls of ``head`` from this thread run ``forward(plain, *args, **kwargs)``, inside the head's hooks."""
    thread, plain = threading.get_ident(), head.forward

    @outside_graphs
    def patched(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return plain(*args, **kwargs)
        if not args and kwargs:
            name = next(iter(kwargs))  # a head's first argument has many names
            return forward(lambda states, **rest: plain(**{name: states}, **rest), kwargs.pop(name), **kwargs)
        return forward(plain, *args, **kwargs)

    with with_forward(head, patched):
        yield


@contextlib.contextmanager
def with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module's forward be another function."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def way_to(model: nn.Module, part: nn.Module) -> tuple[nn.Module, ...]:
    """Return the modules from a model to one of its parts, both included, by the shortest way."""
    ways: list[tuple[nn.Module, ...]] = [(model,)]
    for way in ways:
        if way[-1] is part:
            return way
        ways.extend((*way, child) for child in way[-1].children())
    return (model,)


def fsdp_units(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return those that are FSDP2 units."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [unit for unit in modules if isinstance(unit, FSDPModule)]


@contextlib.contextmanager
def _without_fsdp_hooks(units: list[nn.Module]) -> Iterator[None]:
    """Leave a head's own FSDP2 units as they are, sharded: nothing is computed with weights while they are traced."""
    before = [(hooks, dict(hooks)) for unit in units for hooks in (unit._forward_pre_hooks, unit._forward_hooks)]
    for hooks, known in before:
        for key, hook in known.items():
            if str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp"):
                del hooks[key]
    try:
        yield
    finally:
        for hooks, known in before:
            added = {key: hook for key, hook in hooks.items() if key not in known}
            hooks.clear()
            hooks.update({**known, **added})


def in_fsdp_units(model: nn.Module, layer: nn.Module | None, run: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """Call ``run(hidden)`` as a forward of every FSDP2 unit between the model and its head: weights are whole in it,
    and their gradients are reduced after it. Tensors that ``run`` holds are not cast by the units' mixed precision.

    The method lives for the call alone: ``fully_shard`` may come after ``attach``, and copies keep nothing of it.
    """
    units = [] if layer is None else fsdp_units(way_to(model, layer)[1:])
    if not units:
        return run(hidden)
    from torch.distributed.fsdp import register_fsdp_forward_method

    def forward_of(unit: nn.Module, inside: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def forward(states: Tensor) -> Any:
            setattr(unit, _METHOD, inside)
            try:
                register_fsdp_forward_method(unit, _METHOD)
                return getattr(unit, _METHOD)(states)
            finally:
                delattr(unit, _METHOD)

        return forward

    for unit in reversed(units):
        run = forward_of(unit, run)
    return run(hidden)


_METHOD = "grpo_kernels_forward"
