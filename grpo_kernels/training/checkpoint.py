"""A checkpoint is one safetensors file: tensors, and beside them as JSON what else the state holds. Nothing of it is a
pickle, so that reading one runs nothing; a SHA-256 of its contents is checked when it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import replaced
from .sharding import whole

KEY, DIGEST = "grpo_kernels", "sha256"
"""Of the file's metadata: the JSON, and what proves all bytes."""
_TENSOR = "tensor:"


def flatten(state: dict[str, Any], keep: bool = True) -> tuple[dict[str, Tensor], Any]:
    """Return a state's tensors by path, each whole and on the CPU, and the state with their names in their places.

    Every rank must ask; one that does not write need not ``keep`` the tensors. Names of one memory (tied weights) stand
    for one tensor.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            memory = (
                (value.data_ptr(), value.shape, value.stride()) if type(value) is Tensor and value.numel() else (path,)
            )
            if memory not in names:
                names[memory] = path
                found = whole(value.detach())
                if keep:
                    tensors[path] = found.cpu().contiguous()
            return _TENSOR + names[memory]
        if isinstance(value, dict):
            return {str(key): walk(each, f"{path}/{key}") for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [walk(each, f"{path}/{i}") for i, each in enumerate(value)]
        return value

    skeleton = {key: walk(value, key) for key, value in state.items()}
    return tensors, skeleton


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return the SHA-256 of a text and of every tensor's name, dtype, shape and bytes, on whatever device they lie."""
    found = hashlib.sha256(text.encode())
    for name, values in tensors.items():
        found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        numbers: Any = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found.update(memoryview(numbers))
    return found.hexdigest()


def write(path: Path, tensors: dict[str, Tensor], skeleton: Any) -> None:
    """Write a flattened state, whole or not at all.

    Raises:
        OSError: the file cannot be written; an earlier one is as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    text = json.dumps(skeleton)
    metadata = {KEY: text, DIGEST: digest(dict(sorted(tensors.items())), text)}
    with replaced(path) as file:
        try:
            save_file(tensors, file, metadata)
        except SafetensorError as error:  # a full disk too
            raise OSError(str(error)) from error


def read(path: Path) -> dict[str, Any]:
    """Return a state as it was flattened: keys are strings, tuples are lists.

    Raises:
        OSError: the file cannot be read.
        ValueError: other bytes than those that were written.
    """
    from safetensors import safe_open

    with path.open("rb"):
        pass  # safetensors says of one that may not be read that it is not there
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        text = metadata.get(KEY, "{}")
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    if digest(tensors, text) != metadata.get(DIGEST):
        raise ValueError("its bytes are not those that were written: their SHA-256 is another")
    skeleton = json.loads(text)

    def walk(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(_TENSOR):
            return tensors[value.removeprefix(_TENSOR)]
        if isinstance(value, dict):
            return {key: walk(each) for key, each in value.items()}
        return [walk(each) for each in value] if isinstance(value, list) else value

    state: dict[str, Any] = walk(skeleton)
    return state
