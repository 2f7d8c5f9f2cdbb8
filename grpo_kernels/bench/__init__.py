"""Measures time and memory of the loss step beside what people write today: ``python -m grpo_kernels bench``."""
