"""What is learnt: a task samples prompts and scores completions, both as text.

A new task is a class with ``sample`` and ``score`` and a line in ``make_task``.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

from ..objectives.settings import check_name, first_line
from ..streams import say


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: Any
    """What ``score`` needs to know; its form is the task's own."""


class Task(Protocol):
    alphabet: bytes
    """Every byte that prompts and good answers are made of: what a tokenizer must know."""

    def sample(self, count: int, rng: random.Random) -> list[Problem]:
        """Return ``count`` new problems."""

    def score(self, problem: Problem, completion: str) -> float:
        """Return the reward of one completion, in [0, 1]."""


class Sort:
    """A list of numbers must come back sorted: "3120>" -> "0123" (with spaces if a number has two digits).

    reward "positions": share of positions that hold the right number. reward "order": half for the share of numbers
    that came back, half for the share of neighbours in order.
    """

    def __init__(self, numbers: int = 4, largest: int = 9, reward: str = "positions") -> None:
        check_name("--reward", reward, ("positions", "order"))
        self.numbers, self.largest, self.reward = numbers, largest, reward
        self.separator = "" if largest < 10 else " "
        self.alphabet = b"0123456789>" + self.separator.encode()

    def sample(self, count: int, rng: random.Random) -> list[Problem]:
        lists = [[rng.randint(0, self.largest) for _ in range(self.numbers)] for _ in range(count)]
        return [Problem(self._text(numbers) + ">", sorted(numbers)) for numbers in lists]

    def score(self, problem: Problem, completion: str) -> float:
        given = self._parse(completion)
        if given is None:
            return 0.0
        if self.reward == "positions":
            right = sum(a == b for a, b in zip(given, problem.answer, strict=False))
            return right / max(len(given), self.numbers)
        returned = sum((Counter(given) & Counter(problem.answer)).values()) / max(len(given), self.numbers)
        pairs = list(itertools.pairwise(given))
        most = max(len(pairs), self.numbers - 1)
        ordered = sum(a <= b for a, b in pairs) / most if most else 1.0
        return (returned + ordered) / 2

    def _text(self, numbers: list[int]) -> str:
        return self.separator.join(map(str, numbers))

    def _parse(self, text: str) -> list[int] | None:
        parts = text.split(self.separator) if self.separator else list(text)
        return [int(part) for part in parts] if parts and all(map(_is_short_number, parts)) else None


def _is_short_number(text: str) -> bool:
    """Whether ``int`` takes it, whatever a policy has written: other scripts have digits too, and it may be long."""
    return text.isascii() and text.isdigit() and len(text) <= 18


class ReasoningGym:
    """A dataset of the reasoning-gym package: procedurally generated questions with a verifier."""

    alphabet = bytes(range(256))

    def __init__(self, dataset: str) -> None:
        try:
            import reasoning_gym
        except ImportError as error:
            raise SystemExit(
                f"--task reasoning_gym:{dataset} needs the reasoning-gym package: pip install 'grpo-kernels[reasoning]'"
            ) from error
        check_name("--task reasoning_gym: the dataset", dataset, reasoning_gym.factory.DATASETS)
        self._create, self._name, self._told = reasoning_gym.create_dataset, dataset, False
        try:
            self._create(dataset, size=1, seed=0)
        except Exception as error:  # of a dataset that asks for options
            raise SystemExit(
                f"--task reasoning_gym:{dataset} cannot be made without options of its own ({first_line(error)}): "
                "choose another dataset."
            ) from error

    def sample(self, count: int, rng: random.Random) -> list[Problem]:
        dataset = self._create(self._name, size=count, seed=rng.randrange(2**31))
        return [Problem(f"{entry['question']}\nAnswer: ", (dataset, entry)) for entry in dataset]

    def score(self, problem: Problem, completion: str) -> float:
        dataset, entry = problem.answer
        try:
            return float(dataset.score_answer(answer=completion.strip(), entry=entry))
        except Exception as error:  # of a verifier that takes well-formed answers alone
            if not self._told:
                say(f"note: reasoning_gym:{self._name} cannot score every completion ({first_line(error)}): reward 0")
            self._told = True
            return 0.0


def make_task(name: str, numbers: int, largest: int, reward: str) -> Task:
    """Return the task of ``--task``: "sort" or "reasoning_gym:<dataset>"."""
    kind, _, dataset = name.partition(":")
    check_name("--task", kind, ("sort", "reasoning_gym"))
    if kind == "sort":
        if name != kind:
            raise ValueError(f"--task sort has no datasets; got {name!r}.")
        return Sort(numbers, largest, reward)
    if not dataset:
        raise ValueError(f"--task must name a dataset, as reasoning_gym:basic_arithmetic does; got {name!r}.")
    return ReasoningGym(dataset)
