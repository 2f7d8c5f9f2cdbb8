"""Patches verl where it is imported: ``VERL_USE_EXTERNAL_MODULES=grpo_kernels.integrations.verl_plugin`` in the
environment of every worker makes verl import it. ``patch.undo()`` takes it off."""

from .verl import patch_verl

patch = patch_verl()
