"""A minimal GRPO loop, run by ``python -m grpo_kernels train``. Read ``loop.py`` first."""
