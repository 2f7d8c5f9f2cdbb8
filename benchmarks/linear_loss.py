"""Loss and gradients from hidden states on a CPU, beside the three GEMMs that bound it and beside the peers.

    python benchmarks/linear_loss.py              # about a quarter of an hour on two cores
    python benchmarks/linear_loss.py --rounds 3 --out DIR

gpu_check.py times the same providers on a GPU, where the GEMMs are in the row's dtype.

GRPO with k3 KL, forward and backward, gradients of hidden states and weight. "three GEMMs" are fp32, whatever the dtype
of the row: logits, hidden states' gradient, weight's gradient, each a fresh tensor as in any training step; "into kept
memory" writes over the tensors of the round before. Providers take turns inside each round, medians; one that has had
a minute and a half is left out of further rounds. Peers that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import cpu_loss
import torch
from baselines import eager_loss, loss_of_log_probs
from torch import Tensor

from grpo_kernels import KL, LossConfig, linear_grpo_loss, linear_token_log_probs

CASES = (("fp32", 1024, 512, 32000), ("fp32", 256, 1024, 151936), ("bf16", 128, 1024, 151936))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BETA = 0.04
CONFIG = LossConfig.preset("grpo", kl=KL(BETA))
SEQUENCES = 8
GEMMS = "three GEMMs"
TRL, LIGER = "TRL ChunkedLogProbFunction + eager loss", "Liger LigerFusedLinearGRPOLoss"


class Batch:
    """One workload. Logits have the spread of a trained model's."""

    def __init__(self, dtype: str, tokens: int, hidden: int, vocab: int, device: str = "cpu") -> None:
        torch.manual_seed(0)
        shape = (SEQUENCES, tokens // SEQUENCES)
        where = {"device": device}
        self.hidden = torch.randn(*shape, hidden, **where).to(DTYPES[dtype]).requires_grad_()
        self.weight = (3 * hidden**-0.5 * torch.randn(vocab, hidden, **where)).to(DTYPES[dtype]).requires_grad_()
        self.ids = torch.randint(vocab, shape, **where)
        self.advantages = torch.randn(SEQUENCES, **where)
        self.mask = torch.ones(shape, dtype=torch.bool, **where)
        self.half = torch.rand(shape, **where) < 0.5
        self.bytes = tokens * vocab * DTYPES[dtype].itemsize
        with torch.no_grad():
            log_probs = linear_token_log_probs(self.hidden, self.weight, self.ids).log_probs
        self.old = log_probs + 0.2 * torch.randn(shape, **where)
        self.ref = log_probs + 0.2 * torch.randn(shape, **where)

    def restore(self) -> None:
        self.hidden.grad = self.weight.grad = None


def three_gemms(batch: Batch, kept: bool) -> Callable[[Batch], object]:
    hidden, weight = batch.hidden.detach().flatten(0, 1), batch.weight.detach()
    if hidden.device.type == "cpu":
        hidden, weight = hidden.float(), weight.float()
    outputs = [torch.empty(0)] * 3
    if kept:
        logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
        outputs = [logits, torch.empty_like(hidden), torch.empty_like(weight)]

    def run(batch: Batch) -> None:
        into = [{"out": output} if kept else {} for output in outputs]
        logits = torch.mm(hidden, weight.t(), **into[0])
        gradients = torch.mm(logits, weight, **into[1]), torch.mm(logits.t(), hidden, **into[2])
        del logits, gradients

    return run


def ours(batch: Batch, mask: Tensor) -> None:
    out = linear_grpo_loss(
        batch.hidden, batch.weight, batch.ids, batch.advantages, mask, old_log_probs=batch.old,
        ref_log_probs=batch.ref, config=CONFIG,
    )  # fmt: skip
    out.loss.backward()


def eager(batch: Batch) -> None:
    logits = torch.nn.functional.linear(batch.hidden, batch.weight)
    eager_loss(logits, batch.ids, batch.advantages, batch.mask, batch.old, batch.ref, BETA, True)[0].backward()


def trl() -> Callable[[Batch], object] | None:
    try:
        import trl.trainer.utils  # noqa: F401  its backward needs it
        from trl.kernels import ChunkedLogProbFunction
    except ImportError:
        return None

    def run(batch: Batch) -> None:
        hidden = batch.hidden.flatten(0, 1)
        tile = min(32768, batch.weight.shape[0])
        arguments = (batch.weight, None, batch.ids.flatten(), 1.0, tile, None, 1.0, ("entropy",))
        log_probs = ChunkedLogProbFunction.apply(hidden, *arguments)[0].view(batch.ids.shape)
        loss_of_log_probs(log_probs, batch.advantages, batch.mask, batch.old, batch.ref, BETA)[0].backward()

    return run


def liger() -> Callable[[Batch], object] | None:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    except ImportError:
        return None
    loss = LigerFusedLinearGRPOLoss(beta=BETA, compiled=False, epsilon_low=0.2, epsilon_high=0.2, loss_type="grpo")

    def run(batch: Batch) -> None:
        known = {"ref_per_token_logps": batch.ref, "old_per_token_logps": batch.old}
        value = loss(batch.hidden, batch.weight, batch.ids, batch.mask, batch.advantages, **known)
        (value[0] if isinstance(value, tuple) else value).backward()

    return run


def providers(batch: Batch) -> dict[str, Callable[[Batch], object]]:
    found: dict[str, Callable[[Batch], object]] = {GEMMS: three_gemms(batch, kept=False)}
    found[f"{GEMMS}, into kept memory"] = three_gemms(batch, kept=True)
    found["ours"] = lambda b: ours(b, b.mask)
    found["ours, half masked"] = lambda b: ours(b, b.half)
    found["eager, fp32 upcast"] = eager
    for name, peer in ((TRL, trl()), (LIGER, liger())):
        if peer is not None:
            found[name] = peer
    return found


def table(results: list[dict]) -> str:
    lines = ["| dtype tokens×hidden×vocab | | ms | × three GEMMs | × ours |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        gemms, mine = result["ms"][GEMMS], result["ms"]["ours"]
        for name, ms in result["ms"].items():
            lines.append(f"| {result['case']} | {name} | {ms:.0f} | {ms / gemms:.2f} | {ms / mine:.2f} |")
    missing = [name for name in (TRL, LIGER) if name not in results[0]["ms"]]
    return "\n".join(lines + ([f"\nNot installed: {', '.join(missing)}."] if missing else []))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="which of them, from 0")
    parser.add_argument("--out", type=Path, help="folder for linear_loss.json and linear_loss.md")
    arguments = parser.parse_args()
    results = []
    for index in arguments.cases:
        dtype, tokens, hidden, vocab = CASES[index]
        batch = Batch(dtype, tokens, hidden, vocab)
        case = f"{dtype} {tokens}×{hidden}×{vocab}"
        print(f"{case}, {arguments.rounds} rounds", flush=True)
        results.append({"case": case, "ms": cpu_loss.measure(batch, providers(batch), arguments.rounds)})
        del batch
        print(table(results[-1:]), flush=True)
    if arguments.out:
        write({**cpu_loss.environment(), "results": results}, arguments.out)
    return 0


def write(found: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "linear_loss.json").write_text(json.dumps(found, indent=1) + "\n")
    caption = "{cpu}, {threads} threads, {instruction_set}, torch {torch}; median ms".format(**found)
    (folder / "linear_loss.md").write_text(f"{caption}\n\n{table(found['results'])}\n")


if __name__ == "__main__":
    raise SystemExit(main())
