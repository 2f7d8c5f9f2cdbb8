"""GRPO in one file: snapshot, roll out, reward, advantages, old log-probs, inner epochs of the fused loss, repeat."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import time
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, hf
from ..calls.outputs import LossOutput
from ..calls.teacher import Teacher
from ..log_probs import token_log_probs
from ..loss import grpo_loss
from ..objectives import advantages as estimators
from ..objectives.metrics import Metrics
from ..objectives.normalizer import normalizer
from ..verification import reference
from . import checkpoint, sharding
from .options import Options
from .policy import load_policy, response_inputs, response_logits
from .ranks import Ranks, Several
from .report import OPTIONS, RunFolder
from .rollout import Diverged, Samples, roll_out
from .stopping import Interrupt
from .tasks import make_task
from .teacher import load_teacher
from .trackers import check_trackers, start_trackers


class Trainer:
    """The state of a run, and one step of it."""

    def __init__(self, options: Options, ranks: Ranks | None = None) -> None:
        self.options = options
        self.config = options.loss_config()
        self.ranks = Ranks(options.device) if ranks is None else ranks
        self.device = self.ranks.device
        if options.prompts % self.ranks.count:
            rule = f"a multiple of the {self.ranks.count} ranks that share them"
            raise ValueError(f"--prompts must be {rule}; got {options.prompts}.")
        if options.backend is not None:
            backends.check_serves("--backend", options.backend, str(self.device))
        check_trackers(options)
        torch.manual_seed(options.seed)
        self.rng = random.Random(options.seed)  # draws problems and shuffles
        self.task = make_task(options.task, options.numbers, options.largest, options.reward)
        self.model, self.tokenizer = load_policy(options.model, self.task, options.hidden, options.layers, self.device)
        self.reference = copy.deepcopy(self.model).eval() if options.kl else None
        self.teacher, self.teacher_checksum = None, None
        if options.teacher is not None:
            self.teacher = load_teacher(options.teacher, self.task, self.model, self.tokenizer, self.device)
            self.teacher_checksum = checkpoint.digest(self.teacher.state_dict())
        if options.linear_loss:
            for model in (self.model, self.reference):
                if model is not None:
                    hf.attach(model, self.config, temperature=options.temperature, backend=options.backend)
        self.policy = self._spread()
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}
        parameters = [{"params": unit} for unit in sharding.by_mesh(self.names)]
        self.optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)
        self.step = 0
        self.updates = 0

    def _spread(self) -> nn.Module:
        """Spread the model over the ranks, and return what a training step calls in its place."""
        if not isinstance(self.ranks, Several) or not (self.options.fsdp or self.options.tp > 1):
            return sharding.replicate(self.model, self.ranks)
        for model in (self.model, self.reference, self.teacher):
            if model is not None:
                (sharding.shard if self.options.fsdp else sharding.cut_vocabulary)(model, self.ranks)
        return self.model

    def _set_learning_rate(self, done: int) -> None:
        """Set the rate of the optimizer step after ``done`` ones of this rollout: linear warm-up over the optimizer
        steps of the run, then linear decay to zero by the place in it, where groups that were dropped count, too."""
        o = self.options
        of_rollout = o.epochs * -(-o.prompts * o.group // o.minibatch)
        place = (self.step * of_rollout + done) / (o.steps * of_rollout)
        factor = min((self.updates + 1) / max(o.warmup, 1), max(0.0, 1 - place))
        for group in self.optimizer.param_groups:
            group["lr"] = o.lr * factor

    def train_step(self) -> dict[str, Any]:
        """Run one rollout and its inner epochs, and return what the log records of it."""
        o, start = self.options, time.perf_counter()
        if self.reference is not None and o.ref_every and self.step % o.ref_every == 0:
            self.reference.load_state_dict(self.model.state_dict())
        samples = roll_out(
            *(self.model, self.tokenizer, self.task, self.rng, o.prompts, o.group),
            *(o.response_limit(), o.temperature, self.ranks),
        )
        reward, length = samples.rewards.mean().item(), samples.mask.sum(-1).float().mean().item()
        record: dict[str, Any] = {"step": self.step, "reward": reward, "length": length}
        record |= {"sample": self._text_of(samples, 0), "sample_reward": samples.rewards[0].item()}
        samples, advantages = self._advantages(samples)
        if len(samples.rewards):
            old = self._log_probs(self.model, samples)
            ref = None if self.reference is None else self._log_probs(self.reference, samples)
            record |= self._inner_epochs(samples, advantages, old, ref)
        self.step += 1
        seconds = time.perf_counter() - start
        return record | {"tokens_per_second": length * o.prompts * o.group / seconds, "seconds": seconds}

    def _text_of(self, samples: Samples, row: int) -> str:
        """Return a prompt and what the policy wrote after it."""
        return self.tokenizer.decode(samples.ids[row][samples.attention_mask[row].bool()].tolist())

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
        rows = torch.arange(len(samples.rewards), device=self.device)
        parts = [samples.mask.new_empty(0, samples.mask.shape[1], dtype=torch.float32)]
        for index, live in self.ranks.micro_batches(rows, self._micro_batch()):
            part = samples[index]
            sequences = (part.ids, part.attention_mask, part.prompt_length)
            if self.options.linear_loss:
                tokens: dict[str, Any] = {"token_ids": part.response_ids, "mask": part.mask, "output": "log_probs"}
                out = model(**response_inputs(*sequences), grpo=MappingProxyType(tokens))
            else:
                options: dict[str, Any] = {"temperature": self.options.temperature, "backend": self.options.backend}
                out = token_log_probs(response_logits(model, *sequences), part.response_ids, part.mask, **options)
            if live:
                parts.append(out.log_probs)
        return self.ranks.join(torch.cat(parts), len(rows))

    def _inner_epochs(self, samples: Samples, advantages: Tensor, old: Tensor, ref: Tensor | None) -> dict[str, float]:
        o = self.options
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        metrics: list[Metrics] = []
        for _ in range(o.epochs):
            for minibatch in self._shuffled(len(advantages)).split(o.minibatch):
                loss, merged = self._backward(samples, advantages, old, ref, minibatch)
                norms.append(sharding.clip_gradients(self.model.parameters(), o.max_grad_norm))
                self._set_learning_rate(len(norms) - 1)
                self.optimizer.step()
                self.updates += 1
                self.optimizer.zero_grad(set_to_none=True)
                losses.append(loss)
                metrics.append(merged)
        total = self.ranks.merge(sum(metrics[1:], start=metrics[0]))
        names = ("entropy", "k3_old", "clip_fraction", "ratio_mean", "ratio_max")
        loss = self.ranks.mean(torch.stack(losses)).mean()
        record = {"loss": loss.item(), "grad_norm": torch.stack(norms).mean().item()}
        for name, value in record.items():
            if not math.isfinite(value):
                raise Diverged(f"{name} is {value}")
        if ref is not None:
            record["kl"] = total.kl.item()
        if self.teacher is not None:
            record["divergence"] = total.divergence.item()
        return record | {name: getattr(total, name).item() for name in names}

    def _shuffled(self, count: int) -> Tensor:
        """Return a random order of sequences; of whole groups where the loss averages inside groups."""
        block = self._block()
        blocks = list(range(count // block))
        self.rng.shuffle(blocks)
        return torch.tensor([b * block + i for b in blocks for i in range(block)], device=self.device)

    def _backward(
        self, samples: Samples, advantages: Tensor, old: Tensor, ref: Tensor | None, minibatch: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Accumulate the gradients of one optimizer step over micro-batches; return this rank's part of its loss and
        metrics."""
        ranks = self.ranks
        mask = samples.mask[ranks.own(minibatch, self._block())]
        denominator = normalizer(mask, self.config, world_size=ranks.count, group=ranks.group)
        micro_batches = ranks.micro_batches(minibatch, self._micro_batch(), self._block())
        losses, metrics = [], []
        for i, (index, live) in enumerate(micro_batches, 1):
            part = samples[index]
            tokens: dict[str, Any] = {
                "token_ids": part.response_ids,
                "advantages": advantages[index],
                "mask": part.mask & live,
            }
            tokens |= {"old_log_probs": old[index], "ref_log_probs": None if ref is None else ref[index]}
            tokens |= {"normalizer": denominator, "teacher": self._teacher_of(part)}
            with sharding.accumulation(self.policy, last=i == len(micro_batches)):
                out = self._loss(part, tokens)
                out.loss.backward()
            losses.append(out.loss.detach())
            metrics.append(out.metrics)
        if self.options.tp > 1:
            sharding.average_gradients(self.model.parameters(), ranks)
        return torch.stack(losses).sum(), sum(metrics[1:], start=metrics[0])

    def _teacher_of(self, part: Samples) -> Teacher | None:
        """Return the teacher of a micro-batch: its logits, or what they are made of."""
        if self.teacher is None:
            return None
        sequences = (part.ids, part.attention_mask, part.prompt_length)
        if self.options.linear_loss:
            return hf.teacher(self.teacher)(**response_inputs(*sequences))
        with torch.no_grad():
            return Teacher(logits=response_logits(self.teacher, *sequences))

    def _loss(self, part: Samples, tokens: dict[str, Any]) -> LossOutput:
        """Return the loss of a micro-batch, of the policy's logits or inside its forward."""
        o = self.options
        sequences = (part.ids, part.attention_mask, part.prompt_length)
        if o.linear_loss:
            out: LossOutput = self.policy(**response_inputs(*sequences), grpo=MappingProxyType(tokens))
            return out
        options: dict[str, Any] = {"temperature": o.temperature, "backend": o.backend, "inplace": True}
        loss_function = reference.grpo_loss if o.reference_loss else grpo_loss
        return loss_function(response_logits(self.policy, *sequences), **tokens, config=self.config, **options)

    def _micro_batch(self) -> int:
        return self.options.micro_batch or self.options.minibatch

    def _block(self) -> int:
        """Return how many sequences are not to be parted: a group, where the loss averages inside groups."""
        return self.options.group if self.config.aggregation == "group_mean" else 1

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on; the generators' states with a row for each rank."""
        version, words, gauss = self.rng.getstate()
        rng: dict[str, Any] = {"python": [version, list(words), gauss]}
        for name, generator in self._generators().items():
            rng[name] = self.ranks.gather(generator.get_state().to(self.device))
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer_state(),
            "schedule": self.updates,
            "reference": None if self.reference is None else self.reference.state_dict(),
            "teacher": self.teacher_checksum,
            "rng": rng,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state that ``state`` has returned and a checkpoint kept.

        Raises:
            SystemExit: the teacher is another than that of the steps before.
            ValueError, KeyError, RuntimeError, TypeError: the state is of a run of other options; what of it fitted is
                in place.
        """
        if state["teacher"] != self.teacher_checksum:
            raise SystemExit(
                f"--teacher {self.options.teacher} has other weights than at the steps before (SHA-256 "
                f"{str(self.teacher_checksum)[:12]}, it was {str(state['teacher'])[:12]}): the run would go on towards "
                "another distribution. Put the first one there again, or start a run of its own with --out."
            )
        if (state["reference"] is None) != (self.reference is None):
            raise ValueError("one of the two has a reference policy, which --kl compares with")
        self.step = state["step"]
        for name, model in (("model", self.model), ("reference", self.reference)):
            if model is not None:
                held = model.state_dict()
                model.load_state_dict({key: sharding.cut_as(value, held[key]) for key, value in state[name].items()})
        self._load_optimizer_state(state["optimizer"])
        self.updates = state["schedule"]
        version, words, gauss = state["rng"]["python"]
        self.rng.setstate((version, tuple(words), gauss))
        for name, generator in self._generators().items():
            if name in state["rng"]:
                states = state["rng"][name]
                generator.set_state(states[self.ranks.index % len(states)].clone())  # a view is misread

    def _optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state by the names of weights, however they are grouped."""
        options = {key: value for key, value in self.optimizer.param_groups[0].items() if key != "params"}
        return {"options": options, "weights": {self.names[each]: held for each, held in self.optimizer.state.items()}}

    def _load_optimizer_state(self, saved: dict[str, Any]) -> None:
        state = self.optimizer.state_dict()
        for group, keys in zip(self.optimizer.param_groups, state["param_groups"], strict=True):
            keys.update(saved["options"])
            for key, parameter in zip(keys["params"], group["params"], strict=True):
                held = saved["weights"].get(self.names[parameter], {})
                state["state"][key] = {
                    name: sharding.cut_as(value, parameter) if value.shape == parameter.shape else value
                    for name, value in held.items()
                }
        self.optimizer.load_state_dict(state)

    def _generators(self) -> dict[str, torch.Generator]:
        """Return the generators that sampling and dropout draw from: the CPU's, and a GPU's."""
        if self.device.type != "cuda":
            return {"torch": torch.default_generator}
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        return {"torch": torch.default_generator, "cuda": torch.cuda.default_generators[index]}


def train(trainer: Trainer, folder: RunFolder, resume: bool = False) -> Trainer:
    """Run the loop to its end (or to Ctrl-C), logging, plotting and saving into ``folder``."""
    options, ranks = trainer.options, trainer.ranks
    if resume:
        _go_on(trainer, folder)
    saved = trainer.step
    with contextlib.ExitStack() as until:
        interrupt = Interrupt(ranks)
        until.callback(interrupt.restore)
        trackers = start_trackers(options, folder, trainer.step, until) if ranks.writes else []
        while trainer.step < options.steps and not interrupt.stops():
            try:
                record = trainer.train_step()
            except Diverged as error:
                raise SystemExit(_end_of_diverged(trainer, folder, saved, error)) from error
            folder.log(record)
            for tracker in trackers:
                tracker.log(record)
            if trainer.step % options.checkpoint_every == 0:
                folder.save_checkpoint(trainer.state())
                saved = trainer.step
            folder.plot_now_and_then()
        if trainer.step != saved:
            folder.save_checkpoint(trainer.state())
        if trainer.step:
            folder.plot()
        ranks.wait()
    return trainer


def _end_of_diverged(trainer: Trainer, folder: RunFolder, saved: int, error: Diverged) -> str:
    """Return what happened, what is left, and what to change."""
    left = f"The last checkpoint is of step {saved}, in {folder.path}" if saved else "There was no checkpoint yet"
    return f"step {trainer.step}: {error}: the run has diverged. {left}. Start anew with a lower --lr."


def _go_on(trainer: Trainer, folder: RunFolder) -> None:
    """Continue from the folder's checkpoint, as if the run had not been stopped."""
    state = folder.load_checkpoint()
    try:
        trainer.load_state(state)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise SystemExit(
            f"{folder.checkpoint_path} is of a run of other options than {folder.path / OPTIONS} has ({reason}). "
            "Nothing was changed."
        ) from error
    folder.rewind(trainer.step)
    saved, count = len(state["rng"]["torch"]), trainer.ranks.count
    if trainer.ranks.writes and saved != count:
        print(f"note: the checkpoint is of {saved} ranks; {count} go on within rounding, not bit for bit")
