"""Why to believe the kernels: the reference in plain PyTorch, the rule of tolerance, ``verify``, and what goes with
what."""
