"""Checks of a call's tensors and numbers, and the one format of their messages.

Shapes, dtypes and devices are always checked; contents where that waits for nothing (CPU) or with
``check=True`` / ``GRPO_KERNELS_CHECK=1`` (``may_look``).
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .settings import HELD, LARGEST, SMALLEST, as_float, is_finite, is_number, plain, shown

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_NUMBERS = frozenset((*FLOAT_DTYPES, *INTEGER_DTYPES))
"""What PyTorch compares and reduces: not complex numbers, unsigned ones of more than a byte, nor eight-bit floats."""


def describe(tensor: Tensor) -> str:
    """Return a tensor's dtype, shape and device in one line."""
    shape = "nested" if tensor.is_nested else tuple(tensor.shape)  # a nested one has no shape to ask for
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape} on {tensor.device}"


def fail(
    function: str,
    expected: str,
    got: str,
    tensors: Mapping[str, object] | None = None,
    hint: str | None = None,
    error: type[Exception] = ValueError,
) -> NoReturn:
    """Raise ``error`` with what was expected, what came, every tensor of the call, and a hint."""
    lines = [f"{function}: expected {expected}; got {got}."]
    for name, value in (tensors or {}).items():
        if isinstance(value, Tensor):
            lines.append(f"  {name:<18} {describe(value)}")
    if hint:
        lines.append(f"  hint: {hint}")
    raise error("\n".join(lines))


def warn_caller(message: str) -> None:
    """Warn at the line that called the package: PyTorch's frames are those of a module's call, and dataclasses have
    frames of no file."""
    folders = tuple(f"{folder}{os.sep}" for folder in (Path(__file__).parent.parent, Path(torch.__file__).parent))
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*folders, "<string>")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def checks_enabled(check: bool | None) -> bool:
    """Whether checks of contents are on: by ``check=`` of the call, else by the environment's GRPO_KERNELS_CHECK."""
    if check is True or check is False:
        return check
    if check is not None:
        check_flag("check", "check=", check)
        return bool(check)
    return (os.environ.get("GRPO_KERNELS_CHECK") or "0").lower() not in OFF


OFF = ("0", "false", "no", "off")
"""What switches an option off that the environment has."""


_WITHOUT_CONTENTS = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))
"""Modes whose tensors stand for others; one that counts FLOPs or chooses what to save changes no contents."""


def may_look(tensor: Tensor, check: bool | None = None) -> bool:
    """Whether contents may be looked at: of CPU tensors always, elsewhere with checks on, since that waits for the
    device; never in a graph that is traced or captured, nor where there are none to see (fake, meta, vmap)."""
    if torch.compiler.is_compiling() or any(
        torch._C._get_dispatch_mode(mode) is not None for mode in _WITHOUT_CONTENTS
    ):
        return False
    if isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    if tensor.is_cpu:
        return True
    if tensor.is_meta or not checks_enabled(check):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def check_flag(function: str, name: str, value: object) -> None:
    """Raise where an option that is on or off is given something else that Python would take for on."""
    value = plain(value)
    right = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, int) and value in (False, True)
    if not right:
        fail(function, f"{name} to be True or False", shown(value), error=TypeError)


def check_no_transforms(function: str, tensors: Iterable[object]) -> None:
    """Raise inside forward mode and torch.func for a tensor that these follow: its derivative would be dropped or
    misread in silence, whether it is differentiable otherwise or not."""
    if torch.compiler.is_compiling():
        return
    forward_ad = torch.autograd.forward_ad
    if torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise RuntimeError(
                f"{function}: torch.func transforms (grad, vmap, jvp) are not supported. Call it outside the transform "
                "and use loss.backward() or torch.autograd.grad."
            )
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"{function}: forward-mode differentiation is not supported; use loss.backward().")


def check_positive(function: str, name: str, value: float | Tensor, check: bool | None = None) -> float | None:
    """Return the number of a ``check_scalar``. Raise unless it is > 0 and inside of what fp32 holds."""
    wanted = "a finite number > 0"
    number = check_scalar(function, name, value, check, wanted)
    if number is not None and not number > 0:
        fail(function, f"{name} to be {wanted}", repr(number))
    if number is not None:
        check_held(function, name, number)
    return number


def check_held(function: str, name: str, number: float, *of: float) -> None:
    """Raise unless a number > 0, perhaps the quotient ``of`` two, is a normal one of fp32, in which kernels compute."""
    if not SMALLEST <= number <= LARGEST:
        fail(function, f"{name} {HELD}", " / ".join(map(repr, of or (number,))))


def check_scalar(
    function: str,
    name: str,
    value: float | Tensor,
    check: bool | None = None,
    wanted: str = "a finite number or a 0-d tensor",
) -> float | None:
    """Return a finite number, given as one or as a 0-d tensor; None where the tensor may not be looked at."""
    number: float | None = None
    if isinstance(value, Tensor):
        check_no_transforms(function, (value,))
    if not isinstance(value, Tensor):
        number = value if isinstance(value, (int, float)) else plain(value)
    elif value.layout is not torch.strided or value.is_nested:
        refuse_layout(function, name, value)
    elif value.dim() != 0:
        fail(function, f"{name} to be a number or a 0-d tensor", f"shape {tuple(value.shape)}")
    elif value.requires_grad and torch.is_grad_enabled():
        fail(function, f"{name} without requires_grad: it gets no gradient", "one with", hint=f"{name}.detach()")
    elif may_look(value, check):
        number = value.item()
    else:
        return None
    if not (is_number(number) and is_finite(number)):  # a symbolic one too
        fail(function, f"{name} to be {wanted}", shown(number))
    return number


def read_scalar(function: str, name: str, value: float | Tensor, check: bool | None = None) -> float | Tensor:
    """Return what to compute with (``as_float``) of a ``check_scalar``."""
    check_scalar(function, name, value, check)
    return as_float(value)


def check_device(function: str, tensors: Mapping[str, object]) -> None:
    """Raise unless all tensors but 0-d ones are on the device of the first."""
    what, first = next(iter(tensors.items()))
    assert isinstance(first, Tensor)
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.device != first.device and tensor.dim() > 0:
            hint = f"{name}.to({what}.device)"
            fail(function, f"{name} on the device of {what}, {first.device}", str(tensor.device), tensors, hint)


_NEEDED = ("token_ids", "log_probs", "input_ids", "loss_mask")


def check_tensors(function: str, named: Mapping[str, object], needed: Container[str] = _NEEDED) -> None:
    """Raise unless all arguments are dense tensors, or None where a call may leave them out."""
    for name, value in named.items():
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.is_nested:
                refuse_layout(function, name, value)
            continue
        if value is None and name in needed:
            fail(function, f"{name} to be a tensor", "None", error=TypeError)
        if value is not None:
            numbers = isinstance(value, (list, tuple)) or hasattr(value, "__array__")
            hint = f"torch.as_tensor({name})" if numbers else None
            if isinstance(getattr(value, "log_probs", None), Tensor):  # what token_log_probs returns, whole
                hint = f"{name}.log_probs"
            fail(function, f"{name} to be a tensor", type(value).__name__, hint=hint, error=TypeError)


def check_ids_dtype(
    function: str, ids: Tensor, tensors: Mapping[str, object] | None = None, name: str = "input_ids"
) -> None:
    """Raise unless ids are integers."""
    if ids.dtype not in INTEGER_DTYPES:
        fail(function, f"{name} of integers", str(ids.dtype), tensors, error=TypeError)


def refuse_layout(function: str, name: str, tensor: Tensor) -> NoReturn:
    """Raise for a tensor that no kernel can read by its strides: a sparse one, oneDNN's, a nested one."""
    got, hint = str(tensor.layout), f"{name}.to_dense()"
    if tensor.is_nested:
        got, hint = "a nested one", f"torch.nested.to_padded_tensor({name}, 0.0)"
    fail(function, f"{name} to be a dense tensor", got, hint=hint, error=TypeError)


def ordinary(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors, copied if they were made under ``torch.inference_mode()``: autograd saves no such ones for
    backward."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return tensors
    return tuple(tensor.clone() if tensor.is_inference() else tensor for tensor in tensors)


def read_mask(
    function: str, mask: Tensor, tensors: Mapping[str, object], check: bool | None = None, name: str = "mask"
) -> Tensor:
    """Return, as bool, where a mask is not 0, for a backward to keep. Every mask is read here; raise on numbers that no
    mask can hold."""
    if mask.dtype == torch.bool:
        return ordinary(mask)[0]
    if mask.dtype not in _NUMBERS:
        hint = f"{name}.bool()"
        fail(function, f"{name} of bool or numbers that compare", str(mask.dtype), tensors, hint, TypeError)
    if mask.dtype != torch.uint8 and mask.numel() > 0 and may_look(mask, check):
        _check_mask(function, name, mask, tensors, check)
    return mask.bool()


def read_token_mask(
    function: str,
    mask: Tensor | None,
    like: Tensor,
    tensors: Mapping[str, object],
    check: bool,
    hint: Callable[[str, Tensor], str | None],
) -> Tensor:
    """Return bool (B, T), contiguous: where a mask of the shape of ``like`` is not 0; packed (N,) gives (1, N)."""
    if mask is None:
        return torch.ones((1, *like.shape)[-2:], dtype=torch.bool, device=like.device)
    check_shape(function, "mask", mask, (tuple(like.shape),), tensors, hint)
    return of_tokens(read_mask(function, mask, tensors, check), torch.bool)


def of_tokens(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return one number a token, (B, T) or packed (N,), as detached, contiguous (B, T) or (1, N) of that dtype: the
    tensor itself where it is this already, which costs no operation."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)
    return (tensor.unsqueeze(0) if tensor.dim() == 1 else tensor).contiguous()


def _check_mask(function: str, name: str, mask: Tensor, tensors: Mapping[str, object], check: bool | None) -> None:
    """Raise on NaN, infinities, negative numbers and the ids themselves; with checks on, on fractions too."""
    low, high = map(float, torch.aminmax(mask.detach()))
    if low >= 0 and high < math.inf:  # NaN is neither
        if mask.is_floating_point() and checks_enabled(check) and bool((fractions := mask != mask.round()).any()):
            hint = "factors of tokens are token_weights="
            fail(function, f"{name} of whole numbers", _first(name, mask, fractions), tensors, hint)
        if high > 1:
            _refuse_ids(function, name, mask, tensors)
        return
    hint = f"whatever is not 0 counts; {name} > 0 where a token does"
    if high <= 0 and low <= _ADDITIVE:
        hint = f"an additive mask is 0 where tokens count: {name} == 0"
    elif low == _IGNORED:
        hint = f"labels say by {_IGNORED} what does not count: labels != {_IGNORED}"
    elif mask.is_floating_point() and -math.inf < low and high < math.inf and "advantages" in tensors:
        first = "log_probs" if "log_probs" in tensors else "token_ids"
        hint = f"the advantages come first: ({first}, advantages, mask)"
    wrong = ~((mask >= 0) & (mask < math.inf))
    fail(function, f"{name} to be finite and >= 0", _first(name, mask, wrong), tensors, hint)


def _refuse_ids(function: str, name: str, mask: Tensor, tensors: Mapping[str, object]) -> None:
    for what in ("token_ids", "input_ids"):
        ids = tensors.get(what)
        if isinstance(ids, Tensor) and fits(mask, tuple(ids.shape)) and bool((mask == ids).all()):
            hint = f"whatever is not 0 counts; without padding alone: {what} != the tokenizer's pad_token_id"
            fail(function, f"{name} that says which tokens count", f"the {what} again", tensors, hint)


_ADDITIVE = -1e3
"""The bound below which a mask is an additive one: models add -inf, the dtype's lowest, or -1e4 and beyond."""
_IGNORED = -100


def _first(name: str, values: Tensor, wrong: Tensor) -> str:
    """Return the first of the wrong values, and where it is, as text."""
    position = wrong.nonzero()[0].tolist()
    return f"{name}[{', '.join(map(str, position))}] = {values[tuple(position)].item():.6g}"


def check_finite(
    function: str, name: str, values: Tensor, counts: Tensor, tensors: Mapping[str, object], hint: str | None = None
) -> None:
    """Raise unless ``values`` are finite where ``counts`` (bool) is; elsewhere they may be anything."""
    wrong = counts & ~values.isfinite()
    if bool(wrong.any()):
        fail(function, f"{name} to be finite where they count", _first(name, values, wrong), tensors, hint)


def check_bounds(
    function: str, cu_seqlens: Tensor, tokens: int, tensors: Mapping[str, object], check: bool | None = None
) -> None:
    """Raise unless ``cu_seqlens`` can bound packed sequences. Its values are looked at where that waits for nothing, or
    with checks on."""
    check_tensors(function, {"cu_seqlens": cu_seqlens})
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = f"{str(cu_seqlens.dtype).removeprefix('torch.')} {tuple(cu_seqlens.shape)}"
        fail(function, "cu_seqlens (S+1,) of int32 or int64, of two numbers or more", got, tensors)
    if may_look(cu_seqlens, check):
        bounds = cu_seqlens.tolist()
        if bounds[0] < 0 or bounds[-1] > tokens or bounds != sorted(bounds):
            fail(function, f"cu_seqlens that never fall, within [0, {tokens}]", str(bounds)[:60], tensors)


def fits(tensor: Tensor, *shapes: tuple[int, ...]) -> bool:
    """Whether a tensor has one of these shapes, dimension by dimension: for torch.compile a tuple that holds a symbol
    is in no tuple of tuples."""
    if tensor.shape in shapes:
        return True
    for shape in shapes:
        if tensor.dim() == len(shape):
            for extent, wanted in zip(tensor.shape, shape, strict=True):
                if extent != wanted:
                    break
            else:
                return True
    return False


def check_shape(
    function: str,
    name: str,
    tensor: Tensor,
    allowed: tuple[tuple[int, ...], ...],
    tensors: Mapping[str, object],
    hint: Callable[[str, Tensor], str | None] | None = None,
) -> None:
    """Raise unless a tensor has one of the ``allowed`` shapes; ``hint`` makes one of the name and the tensor."""
    if not fits(tensor, *allowed):
        wanted = " or ".join(str(shape) for shape in dict.fromkeys(allowed))
        advice = None if hint is None else hint(name, tensor)
        fail(function, f"{name} of shape {wanted}", str(tuple(tensor.shape)), tensors, advice)
