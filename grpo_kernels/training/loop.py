"""GRPO in one file: snapshot, roll out, reward, advantages, old log-probs, inner epochs of the fused loss, repeat.

python -m grpo_kernels train                       # sort 4 digits, a tiny model, about 3 minutes on two cores
python -m grpo_kernels train --loss gspo --reference-loss --task reasoning_gym:basic_arithmetic
"""

from __future__ import annotations

import argparse
import copy
import random
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ..hf import attach
from ..log_probs import token_log_probs
from ..loss import grpo_loss
from ..objectives import advantages as estimators
from ..objectives.metrics import Metrics
from ..objectives.normalizer import normalizer
from ..verification import reference
from ..verification.progress import progress_bar
from .options import Options, add_options, read_options
from .policy import load_policy, response_inputs, response_logits
from .report import RunFolder, read_saved_options
from .rollout import Samples, roll_out
from .tasks import make_task


class Trainer:
    """The state of a run, and one step of it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.config = options.loss_config()
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.manual_seed(options.seed)
        self.rng = random.Random(options.seed)  # draws problems and shuffles
        self.task = make_task(options.task, options.numbers, options.largest, options.reward)
        self.model, self.tokenizer = load_policy(options.model, self.task, options.hidden, options.layers, self.device)
        self.reference = copy.deepcopy(self.model).eval() if options.kl else None
        if options.linear_loss:
            for model in (self.model, self.reference):
                if model is not None:
                    attach(model, self.config, temperature=options.temperature, backend=options.backend)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._learning_rate)
        self.step = 0

    def _learning_rate(self, update: int) -> float:
        """Return a step's factor of the learning rate: linear warm-up, then linear decay to zero over the run."""
        o = self.options
        updates = o.steps * o.epochs * -(-o.prompts * o.group // o.minibatch)
        return min((update + 1) / max(o.warmup, 1), max(0.0, 1 - update / updates))

    def train_step(self) -> dict[str, Any]:
        """Run one rollout and its inner epochs, and return what the log records of it."""
        o, start = self.options, time.perf_counter()
        if self.reference is not None and o.ref_every and self.step % o.ref_every == 0:
            self.reference.load_state_dict(self.model.state_dict())
        samples = roll_out(
            *(self.model, self.tokenizer, self.task, self.rng, o.prompts, o.group),
            *(o.response_limit(), o.temperature),
        )
        reward, length = samples.rewards.mean().item(), samples.mask.sum(-1).float().mean().item()
        samples, advantages = self._advantages(samples)
        record: dict[str, Any] = {"step": self.step, "reward": reward, "length": length}
        if len(samples.rewards):
            old = self._log_probs(self.model, samples)
            ref = None if self.reference is None else self._log_probs(self.reference, samples)
            record |= self._inner_epochs(samples, advantages, old, ref)
        self.step += 1
        seconds = time.perf_counter() - start
        return record | {"tokens_per_second": length * o.prompts * o.group / seconds, "seconds": seconds}

    def _advantages(self, samples: Samples) -> tuple[Samples, Tensor]:
        """Return the samples without the groups that have nothing to say, and their advantages (B,): rewards normalised
        by group, centred only for Dr. GRPO."""
        o, rewards = self.options, samples.rewards
        if o.overlong_buffer:
            lengths = samples.mask.sum(-1)
            rewards = rewards + estimators.overlong_penalty(lengths, o.response_limit(), o.overlong_buffer)
        centered = o.loss == "dr_grpo" or o.group < 2
        scale = estimators.group_centered if centered else estimators.group_normalized
        advantages = scale(rewards, o.group)
        if o.group < 2:
            advantages = estimators.centered(rewards)
        if o.dynamic_sampling:
            keep = estimators.has_signal(rewards, o.group).nonzero().squeeze(-1)
            samples, advantages = samples[keep], advantages[keep]
        return samples, advantages

    @torch.no_grad()
    def _log_probs(self, model: Any, samples: Samples) -> Tensor:
        """Return log-probs (B, R) of the responses under a frozen model; nothing of the vocabulary's size is kept."""
        parts = []
        for index in torch.arange(len(samples.rewards), device=self.device).split(self._micro_batch()):
            part = samples[index]
            sequences = (part.ids, part.attention_mask, part.prompt_length)
            if self.options.linear_loss:
                tokens: dict[str, Any] = {"token_ids": part.response_ids, "mask": part.mask, "output": "log_probs"}
                out = model(**response_inputs(*sequences), grpo=tokens)
            else:
                options: dict[str, Any] = {"temperature": self.options.temperature, "backend": self.options.backend}
                out = token_log_probs(response_logits(model, *sequences), part.response_ids, part.mask, **options)
            parts.append(out.log_probs)
        return torch.cat(parts)

    def _inner_epochs(self, samples: Samples, advantages: Tensor, old: Tensor, ref: Tensor | None) -> dict[str, float]:
        o = self.options
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        metrics: list[Metrics] = []
        for _ in range(o.epochs):
            for minibatch in self._shuffled(len(advantages)).split(o.minibatch):
                loss, merged = self._backward(samples, advantages, old, ref, minibatch)
                norms.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), o.max_grad_norm))
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad(set_to_none=True)
                losses.append(loss)
                metrics.append(merged)
        total = sum(metrics[1:], start=metrics[0])
        names = ("entropy", "k3_old", "clip_fraction", "ratio_mean", "ratio_max")
        record = {"loss": torch.stack(losses).mean().item(), "grad_norm": torch.stack(norms).mean().item()}
        if ref is not None:
            record["kl"] = total.kl.item()
        return record | {name: getattr(total, name).item() for name in names}

    def _shuffled(self, count: int) -> Tensor:
        """Return a random order of sequences; of whole groups where the loss averages inside groups."""
        block = self.options.group if self.config.aggregation == "group_mean" else 1
        blocks = list(range(count // block))
        self.rng.shuffle(blocks)
        return torch.tensor([b * block + i for b in blocks for i in range(block)], device=self.device)

    def _backward(
        self, samples: Samples, advantages: Tensor, old: Tensor, ref: Tensor | None, minibatch: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Accumulate the gradients of one optimizer step over micro-batches; return its loss and metrics."""
        o = self.options
        loss_function = reference.grpo_loss if o.reference_loss else grpo_loss
        denominator = normalizer(samples.mask[minibatch], self.config)
        losses, metrics = [], []
        for index in minibatch.split(self._micro_batch()):
            part = samples[index]
            sequences = (part.ids, part.attention_mask, part.prompt_length)
            tokens: dict[str, Any] = {
                "token_ids": part.response_ids,
                "advantages": advantages[index],
                "mask": part.mask,
            }
            tokens |= {"old_log_probs": old[index], "ref_log_probs": None if ref is None else ref[index]}
            tokens["normalizer"] = denominator
            if o.linear_loss:
                out = self.model(**response_inputs(*sequences), grpo=tokens)
            else:
                options: dict[str, Any] = {
                    "config": self.config,
                    "temperature": o.temperature,
                    "backend": o.backend,
                    "inplace": True,
                }
                out = loss_function(response_logits(self.model, *sequences), **tokens, **options)
            out.loss.backward()
            losses.append(out.loss.detach())
            metrics.append(out.metrics)
        return torch.stack(losses).sum(), sum(metrics[1:], start=metrics[0])

    def _micro_batch(self) -> int:
        return self.options.micro_batch or self.options.minibatch

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        version, words, gauss = self.rng.getstate()
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "reference": None if self.reference is None else self.reference.state_dict(),
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda, "python": [version, list(words), gauss]},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])
        torch.set_rng_state(state["rng"]["torch"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        version, words, gauss = state["rng"]["python"]
        self.rng.setstate((version, tuple(words), gauss))


class _Interrupt:
    """The first Ctrl-C asks the loop to stop after its step; the second stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._previous = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfinishing this step, then saving (Ctrl-C again: stop at once, unsaved)", file=sys.stderr)

    def restore(self) -> None:
        signal.signal(signal.SIGINT, self._previous)


def train(trainer: Trainer, folder: RunFolder, resume: bool = False) -> Trainer:
    """Run the loop to its end (or to Ctrl-C), logging, plotting and saving into ``folder``."""
    options = trainer.options
    if resume:
        trainer.load_state(folder.load_checkpoint())
        folder.rewind(trainer.step)
    interrupt = _Interrupt()
    progress = progress_bar(options.steps, folder.path.name, "step", trainer.step, leave=True)
    try:
        while trainer.step < options.steps and not interrupt.asked:
            record = trainer.train_step()
            folder.log(record)
            shown = {name: f"{record[name]:.3f}" for name in ("reward", "loss", "entropy") if name in record}
            progress.set_postfix(shown)
            progress.update()
            if trainer.step % options.checkpoint_every == 0:
                folder.save_checkpoint(trainer.state())
    finally:
        progress.close()
        interrupt.restore()
    folder.save_checkpoint(trainer.state())
    folder.plot()
    return trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument("--out", type=Path, help="the run's folder (default: the next free runs/<task>-<loss>-<n>)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="continue the run in this folder, bit for bit")


def main(arguments: argparse.Namespace) -> int:
    """Run ``train`` from the command line and return the exit status."""
    if arguments.resume is not None:
        saved = read_saved_options(arguments.resume)
        options = read_options(arguments, saved)
        if options != saved:
            raise SystemExit("--resume continues a run as it was started: give no other options with it.")
        folder = RunFolder(arguments.resume, options, resume=True)
        trainer = Trainer(options)
    else:
        options = read_options(arguments)
        trainer = Trainer(options)  # first: what cannot be trained leaves no folder behind
        folder = RunFolder(arguments.out, options, resume=False) if arguments.out else RunFolder.fresh(options)
    config = options.loss_config()
    print(f"{config!r}\nrun folder: {folder.path}", flush=True)
    if not config.surrogate.uses_ratio and options.epochs > 1:
        print(f"note: --loss {options.loss} has no ratio to correct for a moved policy; --epochs 1 learns better")
    train(trainer, folder, resume=arguments.resume is not None)
    records = folder.records()
    rewards = [record["reward"] for record in records[-50:]]
    seconds = sum(record["seconds"] for record in records)
    if rewards:
        mean = sum(rewards) / len(rewards)
        print(f"step {trainer.step}, {seconds:.0f} s: mean reward of the last {len(rewards)} steps {mean:.3f}")
    print(f"log, curves and checkpoint: {folder.path}")
    if trainer.step < options.steps:
        print(f"interrupted; continue with: python -m grpo_kernels train --resume {folder.path}")
        return 130
    return 0
