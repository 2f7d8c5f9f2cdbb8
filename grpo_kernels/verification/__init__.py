"""Why to believe the kernels: the reference in plain PyTorch, the rule of tolerance, and ``verify``."""
