"""Times the policy-loss step of training systems, with their own functions and with ours in their place.

    make nightly PART="verl openrlhf skyrl"        # installs the systems, each in a folder of its own
    python benchmarks/system_steps.py                   # about five minutes on two cores
    python benchmarks/system_steps.py --rounds 3 --out DIR

From hidden states and a head to the gradients of both, through the functions that each system's worker calls: log-probs
and entropies of 512 tokens over a vocabulary of 151,936 in fp32, then its PPO loss with an entropy bonus. Own and
patched take turns inside each round, medians; memory is what PyTorch's allocator hands out beyond the inputs, gradients
included. TRL has a benchmark of whole steps, trl_step.py.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from outputs import Outputs
from tqdm import tqdm

from grpo_kernels.bench import report
from grpo_kernels.bench.measure import peak_bytes, quiet

ROOT = Path(__file__).resolve().parent.parent
SEQUENCES, LENGTH, WIDTH, VOCAB = 8, 64, 256, 151936
ENTROPY = 0.01
Step = Callable[["Batch"], torch.Tensor]


class Batch:
    """What a worker has when the model's last layer has run."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(SEQUENCES, LENGTH, WIDTH, requires_grad=True)
        self.weight = (torch.randn(VOCAB, WIDTH) / WIDTH**0.5).requires_grad_()
        self.ids = torch.randint(VOCAB, (SEQUENCES, LENGTH))
        self.mask = (torch.arange(LENGTH) < torch.linspace(20, LENGTH, SEQUENCES)[:, None]).float()
        self.old = -12 + 0.3 * torch.randn(SEQUENCES, LENGTH)
        self.advantages = torch.randn(SEQUENCES, 1).expand(SEQUENCES, LENGTH).contiguous()

    def logits(self) -> torch.Tensor:
        return self.hidden @ self.weight.T

    def bonus(self, entropy: torch.Tensor) -> torch.Tensor:
        return ENTROPY * (entropy.view(SEQUENCES, LENGTH) * self.mask).sum() / self.mask.sum()

    def restore(self) -> None:
        self.hidden.grad = self.weight.grad = None


def verl_loss(batch: Batch, log_probs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    options = SimpleNamespace(
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.2,
        clip_ratio_c=3.0,
        global_batch_info={},
        policy_loss=SimpleNamespace(loss_mode="vanilla"),
        get=lambda name, default=None: default,
    )
    arguments = (batch.old, log_probs.view(SEQUENCES, LENGTH), batch.advantages, batch.mask)
    loss, _ = get_policy_loss_fn("vanilla")(*arguments, loss_agg_mode="token-mean", config=options)
    return loss - batch.bonus(entropy)


def verl_logits(batch: Batch) -> torch.Tensor:
    """As its FSDP engine with ``use_remove_padding``."""
    from verl.utils import torch_functional

    logits = batch.logits().view(-1, VOCAB)
    entropy = torch_functional.entropy_from_logits(logits)
    log_probs = torch_functional.logprobs_from_logits(logits, batch.ids.view(-1), inplace_backward=False)
    return verl_loss(batch, log_probs, entropy)


def verl_fused(batch: Batch) -> torch.Tensor:
    """As a model's forward with ``use_fused_kernels`` and impl_backend="torch"."""
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    log_probs, entropy = FusedLinearForPPO()(batch.hidden, batch.weight, batch.ids, temperature=1.0)
    return verl_loss(batch, log_probs, entropy)


def openrlhf(batch: Batch) -> torch.Tensor:
    """As ``Actor.forward`` and the PPO actor's trainer."""
    without_gpu_modules()
    from openrlhf.models import actor, loss

    logits = batch.logits()
    entropy = actor.compute_entropy(logits)
    log_probs = actor.log_probs_from_logits(logits, batch.ids)
    found = loss.PolicyLoss(0.2, 0.2)(log_probs, batch.old, batch.advantages, batch.mask)
    return found[0] - batch.bonus(entropy)


def skyrl(batch: Batch) -> torch.Tensor:
    """As its model wrapper and its policy worker."""
    without_gpu_modules()
    from skyrl.backends.skyrl_train.utils import ppo_utils, torch_utils
    from skyrl.train.config import AlgorithmConfig

    logits = batch.logits()
    entropy = torch_utils.chunked_entropy_from_logits(logits, requires_grad=True)
    log_probs = torch_utils.logprobs_from_logits(logits, batch.ids, inplace_backward=False)
    options = AlgorithmConfig(policy_loss_type="regular")
    of_mean = batch.advantages / batch.mask.sum()  # SkyRL puts the mean into the advantages
    arguments = (log_probs, batch.old, of_mean, options, batch.mask)
    loss, _ = ppo_utils.PolicyLossRegistry.get("regular")(*arguments)
    return loss - batch.bonus(entropy)


def without_gpu_modules() -> None:
    """Put stand-ins where SkyRL's and OpenRLHF's imports want what no CPU has: flash-attn's library, and its Triton
    cross-entropy, in whose absence both compute in PyTorch; and a module of SkyRL's for Python 3.12."""
    sys.modules.setdefault("flash_attn_2_cuda", types.ModuleType("flash_attn_2_cuda"))
    sys.modules["flash_attn.ops.triton.cross_entropy"] = None  # type: ignore[assignment]
    backend = types.ModuleType("skyrl.backends.backend")
    backend.AbstractBackend = object  # type: ignore[attr-defined]
    sys.modules.setdefault(backend.__name__, backend)


STEPS: dict[str, tuple[str, Step]] = {
    "verl, from logits": ("verl", verl_logits),
    "verl, `use_fused_kernels`": ("verl", verl_fused),
    "OpenRLHF": ("openrlhf", openrlhf),
    "SkyRL": ("skyrl", skyrl),
}
"""By their rows in the table: the package, which is in its folder of .venv, and the step."""


def patched(system: str) -> contextlib.AbstractContextManager[Any]:
    """Return the patch of a system."""
    integration = importlib.import_module(f"grpo_kernels.integrations.{system}")
    patch: contextlib.AbstractContextManager[Any] = getattr(integration, f"patch_{system}")()
    return patch


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Return medians of milliseconds and peak bytes, each (own, ours), and how far loss and gradient are apart."""
    system, step = STEPS[name]
    batch = Batch()

    def run(ours: bool) -> tuple[torch.Tensor, float]:
        """Return the loss, and the milliseconds of a step inside of the patch."""
        batch.restore()
        with patched(system) if ours else contextlib.nullcontext():
            start = time.perf_counter()
            loss = step(batch)
            loss.backward()
            return loss.detach(), 1e3 * (time.perf_counter() - start)

    losses, gradients = [], []
    for ours in (False, True):
        losses.append(run(ours)[0])
        gradients.append(batch.weight.grad)
    gradient = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
    gaps = [(losses[0] - losses[1]).abs().item(), gradient]
    del gradients
    memory = []
    for ours in (False, True):
        batch.restore()
        with quiet():
            memory.append(peak_bytes(lambda ours=ours: run(ours), "cpu"))
    samples: tuple[list[float], list[float]] = ([], [])
    for k in tqdm(range(rounds + 1), desc=name, unit="round"):
        for ours in (False, True) if k % 2 else (True, False):
            ms = run(ours)[1]
            if k:
                samples[ours].append(ms)
    return {"ms": [statistics.median(of) for of in samples], "bytes": memory, "gaps": gaps}


def in_its_folder(name: str, rounds: int) -> dict[str, Any]:
    """Return what a process that sees the system measured."""
    folder = STEPS[name][0]
    path = ROOT / ".venv" / folder
    if not path.exists():
        raise SystemExit(f"system_steps.py: expected {folder} in {path}; it is not there: make .venv/{folder}")
    places = os.pathsep.join(filter(None, [str(path), str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, __file__, "--rounds", str(rounds), "--only", name]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": places}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"system_steps.py: {name}: exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, Any]) -> str:
    """Return a row for each system: time and memory of its own and of ours, and how far they are apart."""
    told = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    inputs = 4 * (VOCAB * WIDTH + SEQUENCES * LENGTH * WIDTH) / 1e6
    lines = [
        f"{report.caption(found['environment'])}; {told}. {found['tokens']} tokens, {WIDTH} wide, a vocabulary of "
        f"{VOCAB:,}: from hidden states and head to the gradients of both, which are {inputs:.0f} MB of the memory.",
        "",
        "| system | its own, ms | patched, ms | its own takes | its own, MB | patched, MB | loss, gradient apart |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found["rows"].items():
        (own, ours), (most, least), (loss, gradient) = row["ms"], row["bytes"], row["gaps"]
        lines.append(
            f"| {name} | {own:.0f} | {ours:.0f} | {own / ours:.2f}x | {most / 1e6:.0f} | {least / 1e6:.0f} "
            f"| {loss:.0e}, {gradient:.0e} |"
        )
    return "\n".join(lines) + "\n"


OUTPUTS = Outputs("system_steps", table)


def main() -> int:
    """Measure every system in a process of its own, print the table, and write it."""
    parser = OUTPUTS.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=list(STEPS), help="one system, in this process; prints a line of JSON")
    arguments = parser.parse_args()
    if arguments.only:
        system = STEPS[arguments.only][0]
        row = measure(arguments.only, arguments.rounds)
        print(json.dumps({**row, "versions": {system: importlib.metadata.version(system)}}))
        return 0
    rows = {name: in_its_folder(name, arguments.rounds) for name in STEPS}
    found = {"environment": report.environment("cpu"), "tokens": SEQUENCES * LENGTH, "versions": {}, "rows": rows}
    for row in rows.values():
        found["versions"] |= row.pop("versions")
    OUTPUTS.finish(found, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
