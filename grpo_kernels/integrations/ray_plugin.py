"""Patches a system in its Ray workers: ``RAY_RUNTIME_ENV_HOOK=grpo_kernels.integrations.ray_plugin.openrlhf``, or
``.skyrl``, in the driver's environment makes ``ray.init`` tell every worker to patch the system where it imports it."""

from __future__ import annotations

from typing import Any

_SETUP = "worker_process_setup_hook"


def openrlhf(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """Return the runtime environment with workers that patch OpenRLHF."""
    return _with_setup(runtime_env, "grpo_kernels.integrations.openrlhf.patch_when_imported")


def skyrl(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """Return the runtime environment with workers that patch SkyRL."""
    return _with_setup(runtime_env, "grpo_kernels.integrations.skyrl.patch_when_imported")


def _with_setup(runtime_env: dict[str, Any] | None, setup: str) -> dict[str, Any]:
    other = (runtime_env or {}).get(_SETUP)
    if other is not None:
        raise ValueError(f"ray.init: expected a runtime_env without {_SETUP}; got {other!r}. Call {setup} in that.")
    return {**(runtime_env or {}), _SETUP: setup}
