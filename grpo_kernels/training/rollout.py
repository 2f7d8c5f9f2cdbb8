"""Sampling: prompts in, G responses to each out, as padded tensors."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .policy import Tokenizer
from .ranks import Ranks
from .sharding import is_sharded
from .tasks import Problem, Task


@dataclass(frozen=True)
class Samples:
    """Responses to prompts; sequences of one prompt lie next to each other. B = prompts * group."""

    ids: Tensor
    """(B, P+R): prompts left-padded, responses right-padded."""
    attention_mask: Tensor
    """(B, P+R)"""
    response_ids: Tensor
    """(B, R): what row t of ``response_logits`` predicts."""
    mask: Tensor
    """(B, R) bool: response tokens up to the end token, which counts."""
    rewards: Tensor
    """(B,)"""

    @property
    def prompt_length(self) -> int:
        return self.ids.shape[1] - self.response_ids.shape[1]

    def joined(self, ranks: Ranks, rows: int, group: int) -> Samples:
        """Return the samples of all ranks."""
        return Samples(*(ranks.join(getattr(self, field.name), rows, group) for field in fields(self)))

    def __getitem__(self, index: Tensor) -> Samples:
        return Samples(*(getattr(self, field.name)[index] for field in fields(self)))


class Diverged(RuntimeError):
    """The policy's numbers are none any more: nothing can be sampled or learnt."""


class _Watch:
    """A step of ``generate`` that notices logits of no model that works, and puts 0 in their place."""

    spoilt: Tensor | bool = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wrong = ~(scores < 1e30)
        self.spoilt = wrong.any() | self.spoilt
        return scores.masked_fill(wrong, 0.0)


class _Noise:
    """A step of ``generate`` that samples as its own sampling does, with noise that is drawn for the rows of all ranks
    on each: a row's tokens are those that one process would sample, and the generators stay in one state."""

    def __init__(self, rows: Tensor, count: int, temperature: float) -> None:
        self.draws = 0
        self._rows, self._count, self._temperature = rows, count, temperature
        self._like = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._like = scores
        chances = (scores / self._temperature).softmax(-1)
        tokens = (chances / self._draw()[self._rows]).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens, 0.0)

    def _draw(self) -> Tensor:
        """Return exponential noise (rows of all ranks, V): p / noise is largest at a sample of p, and is how
        torch.multinomial samples."""
        self.draws += 1
        return self._like.new_empty(self._count, self._like.shape[-1]).exponential_()

    def catch_up(self, draws: int) -> None:
        """Draw what ranks with longer responses have drawn."""
        while self.draws < draws:
            self._draw()


@torch.no_grad()
def roll_out(
    model: Any,
    tokenizer: Tokenizer,
    task: Task,
    rng: random.Random,
    prompts: int,
    group: int,
    max_new_tokens: int,
    temperature: float,
    ranks: Ranks | None = None,
) -> Samples:
    """Sample ``prompts`` problems and ``group`` responses to each, and score them. A rank samples whole groups of its
    own and gets everyone's."""
    ranks = ranks or Ranks()
    problems = [problem for problem in task.sample(prompts, rng) for _ in range(group)]
    device = next(model.parameters()).device
    prompt_ids, prompt_mask = _left_padded([tokenizer.encode(p.prompt) for p in problems], tokenizer.pad_token_id)
    rows = ranks.own(torch.arange(len(problems)), group)
    prompt_ids, prompt_mask = prompt_ids[rows].to(device), prompt_mask[rows].to(device)
    noise, watch = _Noise(rows, len(problems), temperature), _Watch()
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    sampling["logits_processor"] = [watch]
    if ranks.several:
        sampling = {"do_sample": False, "logits_processor": [watch, noise], "synced_gpus": is_sharded(model)}
    model.eval()
    with _drawn_as_it_is(model):
        ids = model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    model.train()
    if ranks.largest(int(watch.spoilt)):
        raise Diverged("the policy's logits are not finite")
    noise.catch_up(ranks.largest(noise.draws))
    response = ids[:, prompt_ids.shape[1] :]
    missing = ranks.largest(response.shape[1]) - response.shape[1]
    response = torch.nn.functional.pad(response, (0, missing), value=tokenizer.pad_token_id)
    ended = (response == tokenizer.eos_token_id).int()
    mask = ended.cumsum(-1) - ended == 0  # nothing ended before this token
    rewards = _score(task, tokenizer, [problems[row] for row in rows], response, mask).to(device)
    attention_mask = torch.cat([prompt_mask, mask.to(prompt_mask.dtype)], -1)
    own = Samples(torch.cat([prompt_ids, response], -1), attention_mask, response, mask, rewards)
    return own.joined(ranks, len(problems), group)


@contextlib.contextmanager
def _drawn_as_it_is(model: Any) -> Iterator[None]:
    """Let a model have no options of generation, which a file beside its weights may set: with a repetition penalty,
    beams or min-p, responses would be of another distribution than the log-probs that learn from them."""
    own = model.generation_config
    model.generation_config = type(own)()
    try:
        yield
    finally:
        model.generation_config = own


def _left_padded(sequences: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    length = max(map(len, sequences))
    ids = torch.tensor([[pad] * (length - len(ids)) + ids for ids in sequences])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in sequences])
    return ids, mask


def _score(task: Task, tokenizer: Tokenizer, problems: list[Problem], response: Tensor, mask: Tensor) -> Tensor:
    rewards = []
    for problem, ids, live in zip(problems, response.tolist(), mask.tolist(), strict=True):
        kept = [i for i, counts in zip(ids, live, strict=True) if counts and i != tokenizer.eos_token_id]
        rewards.append(task.score(problem, tokenizer.decode(kept)))
    return torch.tensor(rewards)
