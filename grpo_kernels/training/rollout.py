"""Sampling: prompts in, G responses to each out, as padded tensors."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .policy import Tokenizer
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

    def __getitem__(self, index: Tensor) -> Samples:
        return Samples(*(getattr(self, field.name)[index] for field in fields(self)))


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
) -> Samples:
    """Sample ``prompts`` problems and ``group`` responses to each, and score them."""
    problems = [problem for problem in task.sample(prompts, rng) for _ in range(group)]
    device = next(model.parameters()).device
    prompt_ids, prompt_mask = _left_padded([tokenizer.encode(p.prompt) for p in problems], tokenizer.pad_token_id)
    model.eval()
    ids = model.generate(
        input_ids=prompt_ids.to(device),
        attention_mask=prompt_mask.to(device),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.train()
    response = ids[:, prompt_ids.shape[1] :]
    ended = (response == tokenizer.eos_token_id).int()
    mask = ended.cumsum(-1) - ended == 0  # nothing ended before this token
    rewards = _score(task, tokenizer, problems, response, mask)
    attention_mask = torch.cat([prompt_mask.to(device), mask.to(prompt_mask.dtype)], -1)
    return Samples(ids, attention_mask, response, mask, rewards.to(device))


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
