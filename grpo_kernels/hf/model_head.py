"""The head of a Hugging Face causal model: which layer it is now, what becomes of its logits, the FSDP2 units that it
lies in; and the proof, on one live row, that the model's own way from hidden states to log-probs is this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..objectives.checks import fail, may_look

_PLAIN = (
    *("llama", "mistral", "mixtral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "phi", "phi3"),
    *("olmo", "olmo2", "olmo3", "smollm3", "starcoder2", "stablelm", "gpt2", "gpt_neox", "glm", "glm4", "helium"),
    *("deepseek_v3", "gpt_oss", "nemotron", "seed_oss", "ernie4_5", "exaone4"),
)
_SOFTCAPPED = ("gemma2", "gemma3_text")
_SCALED: Mapping[str, Callable[[Any], Any]] = {
    "cohere": lambda model: model.logit_scale,
    "cohere2": lambda model: model.logit_scale,
    "granite": lambda model: 1 / model.config.logits_scaling,
    "granitemoe": lambda model: 1 / model.config.logits_scaling,
}
"""Each reads where the model's own forward does."""
MODEL_TYPES = tuple(sorted((*_PLAIN, *_SOFTCAPPED, *_SCALED)))
"""``model.config.model_type`` whose head is known; a test compares each with the model's own logits."""
FROM_LOGITS = "attach(..., from_logits=True) runs the model's own head"
_REMEMBERED = 64
"""States of a head; beyond them the first is forgotten, and measured anew."""


class Head(NamedTuple):
    """Of a model, now: FSDP, PEFT and users may change it between calls."""

    outer: nn.Module
    """What the model calls."""
    layer: nn.Linear
    """Whose weight that comes to: PEFT's copy or the original."""
    transform: dict[str, float | Tensor]
    """logit_scale or logit_softcap of this architecture."""


def head_of(model: Any) -> Head:
    """Return the head and its constants. Raise a ValueError that names what is not served."""
    outer = model.get_output_embeddings()
    if outer is None:
        fail("attach", "a causal model of transformers", f"{type(model).__name__}, which has no head")
    layer = _chosen(outer)
    if type(layer) is not nn.Linear and type(layer).__name__ != "FSDPLinear":
        hint = f"exclude it from LoRA's target modules; or {FROM_LOGITS}"
        fail(
            "attach", "a head that is a plain nn.Linear", f"{type(layer).__module__}.{type(layer).__name__}", hint=hint
        )
    _check_backward_hooks(outer, layer)
    return Head(outer, layer, _transform(model))


def _check_backward_hooks(*modules: nn.Module) -> None:
    """Raise where there are any: they change gradients, which no comparison of log-probs sees, and belong to a forward
    that does not run."""
    for module in dict.fromkeys(modules):
        for hook in (*module._backward_hooks.values(), *module._backward_pre_hooks.values()):
            fail("attach", "a head without backward hooks", _named(hook), hint=FROM_LOGITS)


def _chosen(outer: Any) -> Any:
    """Return the layer that PEFT's ``modules_to_save`` wrapper forwards to."""
    copies = getattr(outer, "modules_to_save", None)
    if copies is None:
        return outer
    active = outer.active_adapters
    if outer.disable_adapters or not active or any(name not in copies for name in active):
        return outer.original_module
    return copies[active[0]]


def _transform(model: Any) -> dict[str, float | Tensor]:
    """Return how this model's logits follow from its head."""
    kind = model.config.model_type
    if kind not in MODEL_TYPES:
        expected = f"one of the architectures {', '.join(MODEL_TYPES)}"
        hint = (
            f"{FROM_LOGITS}; linear_grpo_loss(hidden, head.weight, ...) serves any model, given its logit_scale and "
            "logit_softcap"
        )
        fail("attach", expected, f"{kind} ({type(model).__name__})", hint=hint)
    if kind in _SCALED:
        scale = _SCALED[kind](model)
        return {"logit_scale": scale if isinstance(scale, Tensor) else float(scale)}
    cap = model.config.final_logit_softcapping if kind in _SOFTCAPPED else None
    return {} if cap is None else {"logit_softcap": float(cap)}


def weight_and_bias(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Return both whole: what tensor parallelism has sharded is gathered. What FSDP shards is whole inside its unit."""
    weight, bias = (
        tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in (layer.weight, layer.bias)
    )
    return weight, bias


def in_fsdp_units(model: nn.Module, layer: nn.Module, run: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """Call ``run(hidden)`` as a forward of every FSDP2 unit between the model and its head: weights are whole in it,
    and their gradients are reduced after it. Tensors that ``run`` holds are not cast by the units' mixed precision.

    The method lives for the call alone: ``fully_shard`` may come after ``attach``, and copies keep nothing of it.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return run(hidden)
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    def forward_of(unit: nn.Module, inside: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def forward(states: Tensor) -> Any:
            setattr(unit, _METHOD, inside)
            try:
                register_fsdp_forward_method(unit, _METHOD)
                return getattr(unit, _METHOD)(states)
            finally:
                delattr(unit, _METHOD)

        return forward

    for unit in reversed([module for module in model.modules() if isinstance(module, FSDPModule)]):
        if unit is not model and any(module is layer for module in unit.modules()):
            run = forward_of(unit, run)
    return run(hidden)


_METHOD = "grpo_kernels_forward"


class Row(NamedTuple):
    """What a proof is made on."""

    state: tuple[object, ...]
    """Of the head."""
    place: tuple[Tensor, Tensor]
    """Of a live row among hidden states (B, T, H)."""


class Proof:
    """That a model's own forward makes the log-probs which its head's weight, scale and softcap make.

    Measured on one live row at the first call in each state of the head: another layer, hook, patched forward, constant
    or mode is another state. The forward runs with its backbone replaced by what the backbone has just returned, for
    that row alone: no layer but the head runs twice, nothing is drawn, and dropout cannot tell the two apart. Waits for
    the device once per state. Which calls measure follows from the state alone, so ranks agree if they have the same
    hooks: under FSDP2 a hook on the head of one rank alone would gather it there and wait for the others.
    """

    def __init__(self, original: Callable[..., Any], before: Callable[..., Any]) -> None:
        self._original = original
        self._before = before  # by its name
        self._proven: dict[tuple[object, ...], None] = {}

    def row(self, model: Any, head: Head, hidden: Tensor, mask: object) -> Row | None:
        """Return the row to compare; None where this state is proven, or contents cannot be looked at."""
        state = _state(model, head)
        return None if state in self._proven or not _has_row(hidden) else Row(state, _live_place(hidden, mask))

    def compare(
        self, model: Any, head: Head, row: Row, mine: Tensor, inputs: Mapping[str, Any], output: Any, hidden: Tensor
    ) -> None:
        """Compare ``mine`` with the model's own logits of the row, by its forward from its backbone's ``inputs`` and
        ``output``. After the loss: a call of the head ends what FSDP counts as one pass of a group of modules."""
        found = self._unlike(model, row, mine, inputs, output, hidden)
        if found:
            fail(
                "attach",
                "a model whose log-probs follow from its backbone and its head as its architecture's do",
                f"one where {found}; found: {_suspects(model, head, self._before)}",
                hint=f"{FROM_LOGITS}, and whatever was put around it",
            )
        while len(self._proven) >= _REMEMBERED:
            self._proven.pop(next(iter(self._proven)))
        self._proven[row.state] = None

    def _unlike(
        self, model: Any, row: Row, mine: Tensor, inputs: Mapping[str, Any], output: Any, hidden: Tensor
    ) -> str | None:
        """Return what differs, in words."""
        name, device = model.base_model_prefix, hidden.device.type
        if name not in model._modules:
            return "its backbone is no module of its own"
        states = hidden.detach()[row.place][None]
        known = _Backbone(model.base_model, type(output)(**{**output, "last_hidden_state": states}))
        model._modules[name] = known
        devices = [hidden.device] if device == "cuda" else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices), without_cache(device):
                theirs = self._original(model, **inputs).logits
                if not known.was_given(inputs):
                    return "its forward gives the backbone other inputs than it gets"
                return _difference(mine, theirs, hasattr(model, "_original_forward"))
        except Exception as error:
            return f"its forward cannot be followed ({type(error).__name__}: {str(error)[:200]})"
        finally:
            model._modules[name] = known.backbone[0]


class _Backbone(nn.Module):
    """In the place of a backbone that has run: returns ``output`` and keeps what it was called with."""

    def __init__(self, backbone: nn.Module, output: Any) -> None:
        super().__init__()
        self.backbone = (backbone,)  # not a submodule
        self.output = output
        self.given: list[Tensor] | None = None

    def forward(self, *args: Any, **inputs: Any) -> Any:
        self.given = [value for value in (*args, *inputs.values()) if isinstance(value, Tensor)]
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["backbone"][0], name)

    def was_given(self, inputs: Mapping[str, Any]) -> bool:
        """Whether it was called with exactly the tensors of ``inputs``."""
        wanted = [value for value in inputs.values() if isinstance(value, Tensor)]
        given = self.given
        return given is not None and all(
            any(a is b or (a.shape == b.shape and bool((a == b).all())) for b in others)
            for mine, others in ((wanted, given), (given, wanted))
            for a in mine
        )


def without_cache(device: str) -> Any:
    """Return autocast as it is, but a whole weight that is cast for one row is not kept."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


def _has_row(hidden: Tensor) -> bool:
    """Whether there is a row whose contents can be compared, at the price of waiting once."""
    return hidden.numel() > 0 and may_look(hidden, check=True)


def _live_place(hidden: Tensor, mask: object) -> tuple[Tensor, Tensor]:
    """Return the place of the first row that the mask leaves, in (B, T), found without waiting; of the first of all
    where it leaves none."""
    rows, columns = hidden.shape[:2]
    live = mask if isinstance(mask, Tensor) and mask.numel() > 0 else hidden.new_ones(1)
    first = (live.to(hidden.device) != 0).flatten().to(torch.uint8).argmax(0, keepdim=True)
    width = live.shape[-1] if live.dim() > 0 else 1
    return (first // width).clamp(max=rows - 1), (first % width).clamp(max=columns - 1)


def row_logits(row: Row, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """Return the logits (1, 1, V) of a row, scaled and capped."""
    with torch.no_grad(), without_cache(hidden.device.type):
        logits = nn.functional.linear(hidden[row.place][None], weight, bias)
        logits = logits * head.transform.get("logit_scale", 1.0)
        cap = head.transform.get("logit_softcap")
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _difference(mine: Tensor, theirs: Any, autocast: bool) -> str | None:
    """Return it in words, where it is more than the rounding of logits: two units of their dtypes, of the largest of
    them and of their root mean square. ``autocast``: accelerate has put one around the model, and converts its
    outputs."""
    if not isinstance(theirs, Tensor) or theirs.shape != mine.shape:
        shape = tuple(theirs.shape) if isinstance(theirs, Tensor) else type(theirs).__name__
        return f"its own logits of a row are {shape}, not {tuple(mine.shape)}"
    dtypes = (mine.dtype, theirs.dtype, *([torch.bfloat16] if autocast else []))
    unit = max(2**-16, *(torch.finfo(dtype).eps for dtype in dtypes))
    a, b = (logits.float() for logits in (mine, theirs))
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, b - a)
    apart = apart - apart.median()  # what all columns have in common is in no log-prob
    within = same.all() | (apart.abs().amax() <= 2 * unit * a.abs().amax() + 1e-5)
    within &= same.all() | (apart.square().mean().sqrt() <= 2 * unit * a.std(correction=0) + 1e-5)
    if bool(within):
        return None
    log_probs, own = (logits.log_softmax(-1) for logits in (a, b))
    return f"its own log-probs of a live row differ by up to {float((own - log_probs).abs().amax()):.3g} nats"


def _hooks(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Return kind and function of each, by which one that comes and goes around a call is the same."""
    kinds = (("forward hook", module._forward_hooks), ("forward pre-hook", module._forward_pre_hooks))
    return tuple((kind, hook) for kind, hooks in kinds for hook in hooks.values())


def _state(model: Any, head: Head) -> tuple[object, ...]:
    """Return what the proof depends on; it holds the objects, so that no other comes to have their identity."""
    modules = tuple(
        (module, type(module), module.training, _hooks(module), module.__dict__.get("forward"))
        for module in (head.outer, head.layer)
    )
    return (modules, model.training, tuple(head.transform.items()))


def _suspects(model: Any, head: Head, before: Callable[..., Any]) -> str:
    """Return what may have made the difference, by name."""
    found = []
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    for module in dict.fromkeys((head.outer, head.layer)):
        name = names.get(id(module), "the head")
        found += [f"a {kind} on {name} ({_named(hook)})" for kind, hook in _hooks(module)]
        if "forward" in module.__dict__:
            found.append(f"a patched forward of {name} ({_named(module.forward)})")
    own = type(model).forward
    if not _named(own).startswith("transformers."):
        found.append(f"{type(model).__name__}, a class with a forward of its own ({_named(own)})")
    if before is not own:
        found.append(f"a patched forward of the model ({_named(before)})")
    found += [f"{name} = {value}" for name, value in head.transform.items()]
    return ", ".join(found) or "nothing known by name"


def _named(function: Any) -> str:
    """Return a function's name by where its code is: ``functools.wraps`` gives a patch the name of what it wraps."""
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return f"{type(function).__module__}.{type(function).__qualname__}"
    return f"{function.__globals__['__name__']}.{code.co_name}"
