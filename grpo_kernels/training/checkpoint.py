"""A checkpoint is one safetensors file: tensors, and beside them as JSON what else the state holds. Nothing of it is a
pickle, so that reading one runs nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from .sharding import whole

KEY = "grpo_kernels"
"""Of the JSON in the file's metadata."""
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


def write(path: Path, tensors: dict[str, Tensor], skeleton: Any) -> None:
    """Write a flattened state, whole or not at all."""
    from safetensors.torch import save_file

    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, {KEY: json.dumps(skeleton)})
    temporary.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Return a state as it was flattened: keys are strings, tuples are lists."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        skeleton = json.loads((file.metadata() or {}).get(KEY, "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def walk(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(_TENSOR):
            return tensors[value.removeprefix(_TENSOR)]
        if isinstance(value, dict):
            return {key: walk(each) for key, each in value.items()}
        return [walk(each) for each in value] if isinstance(value, list) else value

    state: dict[str, Any] = walk(skeleton)
    return state
