"""Calls of the package whose results are known to the bit, from several threads, after a fork, and without memory."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import (
    Divergence,
    LossConfig,
    Teacher,
    empty_cache,
    grpo_loss,
    linear_grpo_loss,
    linear_token_log_probs,
    policy_loss,
    token_divergence,
    token_log_probs,
)

from .processes import Fault, resident, start, wait

BATCH, LENGTH, VOCAB, WIDTH = 4, 6, 1031, 16
THREADS = 3
"""Of Python; each call has two of its own."""
LARGE = (48, 200_000)
"""Rows and columns of what memory runs out for."""

Call = Callable[[], list[Tensor]]


def configs() -> dict[str, LossConfig]:
    """Every preset, with what it cannot know."""
    found = {}
    for name in LossConfig.presets():
        config, changes = LossConfig.preset(name), {}
        if config.aggregation == "constant":
            changes["constant_length"] = LENGTH
        if config.aggregation == "group_mean":
            changes["group_size"] = 2
        found[name] = dataclasses.replace(config, **changes)
    return found


def calls(seed: int) -> dict[str, Call]:
    """Calls by function and what is asked of it."""
    g = torch.Generator(device="cpu").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=g)
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 2, LENGTH - 1, 1])[:, None]
    advantages = normal(BATCH)
    hidden, weight = normal(BATCH, LENGTH + 1, WIDTH), normal(VOCAB, WIDTH) / 4
    logits, other = hidden @ weight.T, normal(BATCH, LENGTH + 1, VOCAB)
    log_probs = torch.log_softmax(logits[:, :LENGTH], -1).gather(-1, ids[..., None]).squeeze(-1)
    old = log_probs + 0.2 * normal(BATCH, LENGTH)
    rest = (ids, advantages, mask)

    def with_gradient(function: Callable[..., Any], *operands: Tensor, **options: Any) -> list[Tensor]:
        leaves = [operand.clone().requires_grad_() for operand in operands]
        out = function(*leaves, **options)
        values = next(v for v in (getattr(out, n, None) for n in ("loss", "log_probs", "divergence")) if v is not None)
        values.sum().backward()
        metrics = getattr(out, "metrics", None)
        found = [values.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
        return found if metrics is None else [*found, metrics.vector]

    def bind(function: Callable[..., Any], *operands: Tensor, **options: Any) -> Call:
        return lambda: with_gradient(function, *operands, **options)

    found: dict[str, Call] = {}
    for name, config in configs().items():
        options = {"old_log_probs": old, "config": config}
        for dtype in (torch.float32, torch.bfloat16):
            label = str(dtype).removeprefix("torch.")
            found[f"grpo_loss {name} {label}"] = bind(lambda x, o=options: grpo_loss(x, *rest, **o), logits.to(dtype))
        found[f"grpo_loss {name} in place"] = bind(
            lambda x, o=options: grpo_loss(x * 1.0, *rest, inplace=True, **o), logits
        )
        found[f"linear_grpo_loss {name}"] = bind(
            lambda h, w, o=options: linear_grpo_loss(h, w, *rest, **o), hidden, weight
        )
        found[f"policy_loss {name}"] = bind(lambda p, o=options: policy_loss(p, advantages, mask, **o), log_probs)
    found["grpo_loss torch"] = bind(lambda x: grpo_loss(x, *rest, old_log_probs=old, backend="torch"), logits)
    distilled = LossConfig(divergence=Divergence("jsd", 0.5))
    found["grpo_loss teacher"] = bind(
        lambda x: grpo_loss(x, *rest, old_log_probs=old, teacher=Teacher(logits=other), config=distilled), logits
    )
    found["token_log_probs"] = bind(lambda x: token_log_probs(x, ids, mask), logits)
    found["linear_token_log_probs"] = bind(lambda h, w: linear_token_log_probs(h, w, ids, mask), hidden, weight)
    found["token_divergence"] = bind(lambda x: token_divergence(x, Teacher(logits=other), ids, mask), logits)
    return found


def digest(tensors: list[Tensor]) -> str:
    """Of every bit."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Worker:
    """A process that calls, for as long as it is told to."""

    def __init__(self, seed: int, folder: Path) -> None:
        torch.set_num_threads(2)
        self.rng, self.folder = random.Random(seed), folder
        self.calls = calls(0)
        self.known = {name: digest(call()) for name, call in self.calls.items()}
        self._large(LARGE[0])  # every thread that a call begins is there

    def burst(self, seconds: float) -> Counter[str]:
        """Random calls on several threads; a bit that differs is a fault."""
        deadline, done, wrong = time.monotonic() + seconds, Counter[str](), []

        def work(rng: random.Random) -> None:
            own = Counter[str]()
            while time.monotonic() < deadline and not wrong:
                name = rng.choice(list(self.calls))
                try:
                    if digest(self.calls[name]()) != self.known[name]:
                        wrong.append(f"{name}: other bits than alone")
                except Exception as error:
                    wrong.append(f"{name}: {type(error).__name__}: {error}")
                own[name.split()[0]] += 1
            done.update(own)

        seeds = [self.rng.random() for _ in range(THREADS)]
        threads = [threading.Thread(target=work, args=(random.Random(seed),)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if wrong:
            raise Fault("; ".join(wrong))
        return done

    def after_fork(self) -> None:
        """A child of a process that has used everything calls with one thread, and without GEMMs: else PyTorch itself
        hangs (torch.bmm alone, that three threads have used: in one of 140 children)."""
        names = self.rng.sample([name for name in self.calls if not name.startswith("linear")], 5)

        def work() -> int:
            torch.set_num_threads(1)
            return sum(digest(self.calls[name]()) != self.known[name] for name in names)

        output = self.folder / f"forked-{os.getpid()}.txt"
        if status := wait(start(work, output)):
            raise Fault(f"a forked child ended with {status}, of {names}: {output.read_text()[-500:]}")
        output.unlink()

    def without_memory(self) -> bool:
        """A large call with little memory left: it raises, or is right; small ones are right after it."""
        rows = LARGE[0]
        before, used = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
        room = self.rng.randrange(rows * LARGE[1] * 4 * 3)
        failed = False
        resource.setrlimit(resource.RLIMIT_AS, (used * os.sysconf("SC_PAGE_SIZE") + room, before[1]))
        try:
            self._large(rows)
        except MemoryError:
            failed = True
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            failed = True
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
            empty_cache()
        for name in self.rng.sample(list(self.calls), 3):
            if digest(self.calls[name]()) != self.known[name]:
                raise Fault(f"{name}: other bits after memory ran out")
        return failed

    def _large(self, rows: int) -> None:
        logits = torch.ones(1, rows, LARGE[1], requires_grad=True)
        out = grpo_loss(logits, torch.zeros(1, rows, dtype=torch.int64), torch.ones(1), torch.ones(1, rows))
        out.loss.backward()


def serve(seed: int, folder: Path, pipe: Connection) -> int:
    """Answer every number of seconds with what was done in them; None ends it."""
    worker = Worker(seed, folder)
    pipe.send(worker.known)
    while (seconds := pipe.recv()) is not None:
        try:
            counts = worker.burst(seconds)
            worker.after_fork()
            faults = Counter({"fork after use": 1})
            faults["out of memory" if worker.without_memory() else "little memory"] += 1
            pipe.send({"calls": counts, "faults": faults, "resident": resident()})
        except Exception as error:
            pipe.send({"fault": f"{type(error).__name__}: {error}"})
            return 1
    return 0
