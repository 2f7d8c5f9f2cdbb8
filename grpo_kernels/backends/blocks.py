"""Memory for what is large on a CPU, in blocks of the system's pages: the last one that died is kept for the next.

A gradient of the logits' size is made at every step, and PyTorch's allocator takes fresh pages for whatever is larger
than 32 MB: the system clears them and maps them one by one, which takes longer than the kernel that writes them
(docs/design/cpu.md has the figures). A block comes back when the last tensor of its storage dies, views, NumPy arrays
and DLPack's among them, on whichever thread. At most one of each kind is kept, of at most twice the last one's size,
and the system takes its pages where memory runs short.
"""

from __future__ import annotations

import ctypes
import enum
import os

import torch
from torch import Tensor

from ..objectives.checks import OFF
from . import cpu, native


class Kind(enum.IntEnum):
    """What a block holds. A step has one of each, so that neither takes the other's place."""

    LOGITS = 0
    """Tokens × vocabulary: logits of a chunk, or the gradient of logits."""
    WEIGHT = 1
    """Vocabulary × hidden size: the gradient of a head."""


LARGE = 8 << 20
"""Bytes from which on memory is a block."""
SWITCH = "GRPO_KERNELS_KEEP_MEMORY"
"""The environment's variable that, if it is 0, leaves all memory to PyTorch's allocator."""
poisoned = False
"""Whether blocks that come back are filled with NaN, so that whoever still reads one sees it: for tests."""


def keeps() -> bool:
    """Whether memory is kept at all."""
    return (os.environ.get(SWITCH) or "1").lower() not in OFF


class OutOfMemory(MemoryError, RuntimeError):
    """Raised where the system has no room. PyTorch raises a RuntimeError there, which callers look for who try again
    with a smaller batch: its words are in the message."""


def empty(count: int, dtype: torch.dtype, kind: Kind) -> Tensor:
    """Return ``count`` elements of uninitialised memory on the CPU, in a block where they are large.

    Raises:
        OutOfMemory: the system has no room for them.
    """
    size = count * dtype.itemsize
    if size >= LARGE and _serves() and (block := _block(size, kind)) is not None:
        tensor = block.view(dtype)
        if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
            tensor.fill_(torch.nan)  # as torch.empty does
        return tensor
    try:
        return torch.empty(count, dtype=dtype, device="cpu")
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise OutOfMemory(
            f"grpo_kernels expected {size / 1e9:.3g} GB of free memory for a tensor of the vocabulary's size, and the "
            "system gave none: inplace=True needs no second tensor of the logits' size, a smaller chunk_bytes= less "
            f"from hidden states. ({error})"
        ) from error


def _serves() -> bool:
    """Whether a block may take the place of PyTorch's memory: it is wanted, and no mode follows what is allocated."""
    return keeps() and torch._C._len_torch_dispatch_stack() == 0


def _block(size: int, kind: Kind) -> Tensor | None:
    """Return ``size`` bytes; None where there is no library, or no room."""
    try:
        library = cpu.library()
    except native.Unavailable:
        return None
    if size >= 1 << 62:
        return None
    block, capsule = ctypes.c_void_p(), None
    try:
        library.grpo_cpu_new_block(size, kind, poisoned, block)
        if not block:
            return None
        capsule = _new_capsule(block, _UNTAKEN, None)
        tensor: Tensor = torch.utils.dlpack.from_dlpack(capsule)
    except BaseException:  # Ctrl-C among them, which may come when either call has ended
        if block and (capsule is None or _is_capsule(capsule, _UNTAKEN)):
            library.grpo_cpu_give_back(block)
        raise
    return tensor


_UNTAKEN = b"dltensor"
"""The name of a capsule whose tensor is nobody's. Whoever takes the tensor, and with it the duty to call its deleter,
gives the capsule another one (DLPack's protocol)."""
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_is_capsule = ctypes.pythonapi.PyCapsule_IsValid
_is_capsule.argtypes = (ctypes.py_object, ctypes.c_char_p)


def count() -> cpu.BlockBytes:
    """Return how many bytes are kept, and in use."""
    try:
        counted: cpu.BlockBytes = cpu.library().grpo_cpu_block_bytes()
    except native.Unavailable:
        return cpu.BlockBytes()
    return counted


def empty_cache() -> int:
    """Give the memory that is kept for the next gradient back to the system; return its bytes.

    It is what ``torch.cuda.empty_cache()`` is on a GPU, for the blocks of grpo_kernels on a CPU. Tensors stay as they
    are. ``GRPO_KERNELS_KEEP_MEMORY=0`` in the environment keeps nothing in the first place.
    """
    return int(cpu.library().grpo_cpu_drop_kept()) if count().kept else 0
