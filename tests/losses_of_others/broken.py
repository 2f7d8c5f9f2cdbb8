"""What people give to ``match`` that is no loss, or a loss in a form that trips whoever calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from grpo_kernels import Clip, LossConfig

from . import masked_mean, plain, ppo_terms


@dataclass(frozen=True)
class Given:
    """A function, or the source of a file with one of the name ``loss``, and what it does.

    Attributes:
        does: "works": it is the loss of ``config`` all the same; "raises": at a call, or a file at its import;
            "no scalar": it returns something else than a differentiable scalar; "not finite"; "differs": from one call
            to the next; "variadic": its parameters have no names.
        words: lower-case words, all of which belong into the one sentence that is said.
    """

    loss: Callable[..., Any] | str
    does: Literal["works", "raises", "no scalar", "not finite", "differs", "variadic"]
    words: tuple[str, ...] = ()
    config: LossConfig | None = None


def raises(lp, old, A, mask):
    raise RuntimeError("the reward model is not loaded")


def misspells(lp, old, A, mask):
    return masked_mean(ppo_terms(lp - old, A[:, None]), maks)  # noqa: F821


def returns_terms(lp, old, A, mask):
    return ppo_terms(lp - old, A[:, None]) * mask


def returns_a_float(lp, old, A, mask):
    return masked_mean(ppo_terms(lp - old, A[:, None]), mask).item()


def returns_nothing(lp, old, A, mask):
    masked_mean(ppo_terms(lp - old, A[:, None]), mask)


def without_gradient(lp, old, A, mask):
    with torch.no_grad():
        return masked_mean(ppo_terms(lp - old, A[:, None]), mask)


def moves_to_the_gpu(lp, old, A, mask):
    """Half of it: where there is a GPU, the two devices do not go together."""
    return masked_mean(ppo_terms(lp.cuda() - old, A[:, None]), mask)


def draws(lp, old, A, mask):
    noise = 0.1 * torch.randn_like(lp)
    return masked_mean(ppo_terms(lp + noise - old, A[:, None]), mask)


def of_four(lp, old, A, mask):
    """One prompt's four answers, and nothing else."""
    assert lp.shape[0] == 4, "one group at a time"
    return masked_mean(ppo_terms(lp - old, (A - A.mean())[:, None]), mask)


def not_finite(lp, old, A, mask):
    return masked_mean(ppo_terms(lp - old, A[:, None]) / lp.detach().clamp(min=0), mask)


def backward_inside(lp, old, A, mask):
    loss = masked_mean(ppo_terms(lp - old, A[:, None]), mask)
    loss.backward()
    return loss


def keywords(**batch):
    return masked_mean(ppo_terms(batch["lp"] - batch["old"], batch["A"][:, None]), batch["mask"])


def places(*args):
    lp, old, A, mask = args
    return masked_mean(ppo_terms(lp - old, A[:, None]), mask)


def writes_into_inputs(lp, old, A, mask):
    """Their copies are its own; the next call must find what this one found."""
    old.neg_()
    A.mul_(mask.sum() / mask.sum())
    mask.mul_(1.0)
    return masked_mean(ppo_terms(lp + old, A[:, None]), mask)


def writes_into_log_probs(lp, old, A, mask):
    """In training log-probs are no leaf of the graph, and this runs."""
    log_ratio = lp.sub_(old)
    return masked_mean(ppo_terms(log_ratio, A[:, None]), mask)


def prints(lp, old, A, mask):
    for row in range(len(lp)):
        print(f"row {row}: {lp[row].tolist()}")
    return masked_mean(ppo_terms(lp - old, A[:, None]), mask)


LOSS = """
def loss(lp, old, A, mask):
    r = (lp - old).exp()
    terms = -torch.minimum(r * A[:, None], r.clamp(0.8, 1.2) * A[:, None])
    return (terms * mask).sum() / mask.sum()
"""

PARSES_ARGUMENTS = f"""
import argparse
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
args = parser.parse_args()
{LOSS}
"""

READS_A_FILE = f"""
import json
import torch
from pathlib import Path

config = json.loads(Path("no_such_training_config.json").read_text())
{LOSS}
"""

DOES_NOT_PARSE = """
def loss(lp, old, A, mask)
    return (lp - old).sum()
"""

WITHOUT_AN_IMPORT = """
import package_that_nobody_has

def loss(lp, old, A, mask):
    return package_that_nobody_has.ppo(lp, old, A, mask)
"""

DATACLASS = f"""
from __future__ import annotations

import dataclasses
import torch


@dataclasses.dataclass
class Options:
    low: float = 0.2
    high: dataclasses.InitVar[float] = 0.2

{LOSS}
"""

TRAINS_AT_THE_END = f"""
import torch
{LOSS}
if __name__ == "__main__":
    raise SystemExit("this would train")
"""

PPO = plain(Clip())


def takes_nothing():
    return torch.zeros((), requires_grad=True)


HAS_NO_FUNCTION = "x = 1\n"

GIVEN: dict[str, Given] = {
    "raises": Given(raises, "raises", ("raised runtimeerror", "the reward model is not loaded")),
    "misspells": Given(misspells, "raises", ("nameerror", "maks")),
    "returns_terms": Given(returns_terms, "no scalar", ("scalar", "shape")),
    "returns_a_float": Given(returns_a_float, "no scalar", ("scalar tensor", "float")),
    "returns_nothing": Given(returns_nothing, "no scalar", ("scalar tensor", "nonetype")),
    "without_gradient": Given(without_gradient, "no scalar", ("no gradient",)),
    "moves_to_the_gpu": Given(moves_to_the_gpu, "raises", ("cuda",)),
    "draws": Given(draws, "differs", ("random",)),
    "of_four": Given(of_four, "raises", ("one group at a time", "batch=")),
    "not_finite": Given(not_finite, "not finite", ("not finite",)),
    "backward_inside": Given(backward_inside, "raises", ("backward",)),
    "keywords": Given(keywords, "variadic", ("**batch", "parameters")),
    "places": Given(places, "variadic", ("*args", "parameters")),
    "writes_into_inputs": Given(writes_into_inputs, "works", config=PPO),
    "writes_into_log_probs": Given(writes_into_log_probs, "works", config=PPO),
    "prints": Given(prints, "works", config=PPO),
    "parses_arguments": Given(PARSES_ARGUMENTS, "raises", ("import", "exit")),
    "reads_a_file": Given(READS_A_FILE, "raises", ("filenotfounderror", "no_such_training_config.json")),
    "takes_nothing": Given(takes_nothing, "raises", ("takes no arguments", "log-probs or logits")),
    "has_no_function": Given(HAS_NO_FUNCTION, "raises", ("has no function", "named 'loss'")),
    "does_not_parse": Given(DOES_NOT_PARSE, "raises", ("syntaxerror", "line 2")),
    "without_an_import": Given(WITHOUT_AN_IMPORT, "raises", ("package_that_nobody_has",)),
    "dataclass": Given(DATACLASS, "works", config=PPO),
    "trains_at_the_end": Given(TRAINS_AT_THE_END, "works", config=PPO),
}
"""What is given, by a name."""
