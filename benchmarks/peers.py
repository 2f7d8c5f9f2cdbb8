"""The packages that ours is timed beside, each through its own public entry, as providers of the engine.

What is not installed, or does not run on a device, is left out and named. Versions are pinned in constraints.txt where
they run on a CPU; figures name those they were measured with.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import torch
from torch import Tensor

from grpo_kernels.bench.providers import Provider, loss_of_log_probs
from grpo_kernels.bench.providers import providers as own_providers
from grpo_kernels.bench.workload import CLIP, Spec, Workload

Loss = Callable[[Workload], Tensor]


def copies(count: float) -> Callable[[Spec], float]:
    return lambda spec: 4 * count * spec.tokens * spec.vocab


# From logits


def trl_eager() -> Loss:
    """Do what TRL up to 1.15 did, and still does where its kernel cannot: selective_log_softmax and chunked entropy."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def loss(work: Workload) -> Tensor:
        logits = work.logits()
        log_probs = selective_log_softmax(logits, work.ids)
        with torch.no_grad():
            entropy_from_logits(logits)
        return loss_of_log_probs(log_probs.float(), *work.rest())[0]

    return loss


def trl_kernel() -> Loss:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    def loss(work: Workload) -> Tensor:
        return loss_of_log_probs(selective_log_softmax_and_entropy(work.logits(), work.ids)[0], *work.rest())[0]

    return loss


def liger_triton() -> Loss:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def loss(work: Workload) -> Tensor:
        logits = work.logits(extra_row=True)  # it wants (B, L+1, V), as a causal model returns it
        options = {"temperature": 1.0, "beta": work.beta, "eps_low": CLIP, "eps_high": CLIP, "inplace": False}
        arguments = (work.old, work.ref, work.ids, work.advantages, work.mask)
        return triton_grpo_loss(logits, *arguments, **options, loss_type="grpo", reduce=True)[0]

    return loss


def quack_yardstick() -> Loss:
    """Compute cross-entropy alone, without ratio, KL and metrics: what a single-purpose kernel reaches."""
    from quack.cross_entropy import cross_entropy

    def loss(work: Workload) -> Tensor:
        return cross_entropy(work.logits().flatten(0, 1), work.ids.flatten()).mean()

    return loss


# From hidden states


def trl_chunked() -> Loss:
    import trl.trainer.utils  # noqa: F401  its backward needs it
    from trl.kernels import ChunkedLogProbFunction

    def loss(work: Workload) -> Tensor:
        hidden, weight = work.operands()
        tile = min(32768, weight.shape[0])
        arguments = (weight, None, work.ids.flatten(), 1.0, tile, None, 1.0, ("entropy",))
        log_probs = ChunkedLogProbFunction.apply(hidden.flatten(0, 1), *arguments)[0].view(work.ids.shape)
        return loss_of_log_probs(log_probs, *work.rest())[0]

    return loss


def liger_linear() -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def loss(work: Workload) -> Tensor:
        options = {"compiled": False, "epsilon_low": CLIP, "epsilon_high": CLIP, "loss_type": "grpo"}
        module = LigerFusedLinearGRPOLoss(beta=work.beta, **options)
        known = {"ref_per_token_logps": work.ref, "old_per_token_logps": work.old}
        value = module(*work.operands(), work.ids, work.mask, work.advantages, **known)
        return value[0] if isinstance(value, tuple) else value

    return loss


def torch_linear() -> Loss:
    linear_cross_entropy = torch.nn.functional.linear_cross_entropy
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(work: Workload) -> Tensor:
        hidden, weight = work.operands()
        nll = linear_cross_entropy(hidden.flatten(0, 1), weight, work.ids.flatten(), reduction="none", options=options)
        return loss_of_log_probs(-nll.view(work.ids.shape), *work.rest())[0]

    return loss


def cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    def loss(work: Workload) -> Tensor:
        hidden, weight = work.operands()
        return loss_of_log_probs(
            -linear_cross_entropy(hidden, weight, work.ids, reduction="none").float(), *work.rest()
        )[0]

    return loss


PEERS: dict[str, tuple[str, str, tuple[str, ...], Callable[[], Loss], float, bool]] = {
    "TRL selective_log_softmax + eager loss": ("trl", "logits", ("cpu", "cuda"), trl_eager, 2, True),
    "TRL logprob kernel + eager loss": ("trl", "logits", ("cuda",), trl_kernel, 1, True),
    "Liger triton_grpo_loss": ("liger-kernel", "logits", ("cuda",), liger_triton, 2, False),
    "quack cross_entropy (yardstick)": ("quack-kernels", "logits", ("cuda",), quack_yardstick, 1, False),
    "TRL ChunkedLogProbFunction + eager loss": ("trl", "hidden", ("cpu", "cuda"), trl_chunked, 1, True),
    "Liger LigerFusedLinearGRPOLoss, not compiled": ("liger-kernel", "hidden", ("cpu", "cuda"), liger_linear, 2, False),
    "PyTorch linear_cross_entropy + eager loss": ("torch", "hidden", ("cpu", "cuda"), torch_linear, 2, False),
    "cut-cross-entropy + eager loss": ("cut-cross-entropy", "hidden", ("cuda",), cut_cross_entropy, 1, False),
}
"""Package, what from, where it runs, how it is made, fp32 tensors of the logits' size that it may hold, and whether it
gives log-probs and entropy too."""


def providers(spec: Spec) -> list[Provider]:
    """Return ours, PyTorch's and every peer that is installed and runs on the workload's device."""
    source = "logits" if spec.hidden is None else "hidden"
    found = own_providers(spec)
    for name, (_, takes, devices, make, tensors, same) in PEERS.items():
        if takes != source or torch.device(spec.device).type not in devices:
            continue
        try:
            found.append(Provider(name, make(), copies(tensors), same_outputs=same))
        except (ImportError, AttributeError):
            continue
    return found


def versions() -> dict[str, str | None]:
    """Return the version of every peer's package; None where it is not installed."""
    found = {}
    for package, *_ in PEERS.values():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def missing(device: str) -> list[str]:
    """Return what should run on this device and is not installed."""
    kind = torch.device(device).type
    return [name for name, (package, _, devices, *_) in PEERS.items() if kind in devices and not versions()[package]]
