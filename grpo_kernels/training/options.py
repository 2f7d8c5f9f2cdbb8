"""The options of a training run: one frozen dataclass, and the command line that fills it."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from .. import backends
from ..objectives.checks import check_device_name, check_name, settle_name
from ..objectives.config import LossConfig
from ..objectives.kl import KL


@dataclass(frozen=True)
class Options:
    task: str = "sort"
    numbers: int = 4
    largest: int = 9
    reward: str = "positions"
    model: str | None = None
    hidden: int = 64
    layers: int = 2
    loss: str = "grpo"
    reference_loss: bool = False
    linear_loss: bool = False
    backend: str | None = None
    steps: int = 900
    prompts: int = 32
    group: int = 8
    epochs: int = 2
    minibatch: int = 128
    micro_batch: int | None = None
    max_new_tokens: int | None = None
    temperature: float = 1.0
    lr: float = 6e-4
    warmup: int = 20
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    kl: float = 0.0
    ref_every: int = 0
    entropy: float = 0.0
    dynamic_sampling: bool = False
    overlong_buffer: int = 0
    seed: int = 0
    checkpoint_every: int = 200
    device: str | None = None
    fsdp: bool = False
    tp: int = 1

    def __post_init__(self) -> None:
        counts = (
            "steps",
            "prompts",
            "group",
            "epochs",
            "minibatch",
            "micro_batch",
            "checkpoint_every",
            "max_new_tokens",
        )
        for name in (*counts, "numbers", "largest", "hidden", "layers", "tp"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1")
        for name in ("temperature", "lr", "max_grad_norm"):
            self._require(name, 0 < getattr(self, name) < math.inf, "finite and > 0")
        for name in ("ref_every", "warmup", "weight_decay", "overlong_buffer"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "finite and >= 0")
        limit = self.response_limit()
        self._require("overlong_buffer", self.overlong_buffer <= limit, f"at most the {limit} tokens of a response")
        self._require("group", self.group > 1 or not self.dynamic_sampling, "at least 2 with --dynamic-sampling")
        self._require("linear_loss", not (self.linear_loss and self.reference_loss), "given without --reference-loss")
        self._require(
            "tp", self.tp == 1 or (self.linear_loss and not self.fsdp), "1 without --linear-loss or with --fsdp"
        )
        settle_name(self, "loss", "--loss", LossConfig.presets())
        if self.backend is not None:
            check_name("--backend", self.backend, backends.names())
        if self.device is not None:
            check_device_name("--device", self.device)
        if LossConfig.preset(self.loss).aggregation == "group_mean":
            for name in ("minibatch", "micro_batch"):
                whole = (getattr(self, name) or self.group) % self.group == 0
                self._require(
                    name, whole, f"a multiple of --group {self.group}, as --loss {self.loss} keeps groups whole"
                )

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"--{name.replace('_', '-')} must be {rule}; got {getattr(self, name)}.")

    def response_limit(self) -> int:
        """Return the length of the longest response in tokens: for sort, the answer and its end token."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.task != "sort":
            return 64
        digits = len(str(self.largest))
        return self.numbers * digits + (self.numbers - 1) * (digits > 1) + 1

    def loss_config(self) -> LossConfig:
        """Return the preset of ``--loss`` with what it cannot know: lengths, groups, coefficients."""
        changes: dict[str, Any] = {"kl": KL(self.kl), "entropy_coef": self.entropy}
        aggregation = LossConfig.preset(self.loss).aggregation
        if aggregation == "constant":
            changes["constant_length"] = self.response_limit()
        if aggregation == "group_mean":
            changes["group_size"] = self.group
        return LossConfig.preset(self.loss, **changes)


HELP = {
    "task": "sort, or reasoning_gym:<dataset>",
    "numbers": "sort: how many numbers",
    "largest": "sort: the largest number",
    "reward": "sort: positions or order",
    "model": "path or hub name of a causal language model; default: a tiny random Qwen3",
    "hidden": "hidden size of the tiny model",
    "layers": "layers of the tiny model",
    "loss": "preset: " + ", ".join(LossConfig.presets()),
    "reference_loss": "the plain PyTorch loss instead of the fused one",
    "linear_loss": "from hidden states: the logits never exist in full",
    "backend": "backend of the fused loss; default: the fastest that serves",
    "steps": "rollouts",
    "prompts": "prompts in a rollout, of all ranks",
    "group": "responses to each prompt",
    "epochs": "passes over each rollout",
    "minibatch": "sequences in an optimizer step, of all ranks",
    "micro_batch": "sequences in a forward pass of a rank; default: its part of the minibatch",
    "max_new_tokens": "longest response; default: just enough for sort, else 64",
    "temperature": "of sampling, and of the log-probs",
    "lr": "peak learning rate",
    "warmup": "optimizer steps of linear warm-up; linear decay follows",
    "weight_decay": "AdamW's",
    "max_grad_norm": "gradient clipping",
    "kl": "coefficient of the k3 KL to the reference policy",
    "ref_every": "refresh the reference every so many steps; 0: never",
    "entropy": "coefficient of the entropy bonus",
    "dynamic_sampling": "drop groups whose rewards are all equal",
    "overlong_buffer": "tokens over which the soft over-long penalty grows; 0: none",
    "seed": "of everything",
    "checkpoint_every": "steps between checkpoints",
    "device": "cuda, cpu, ...; default: a GPU if there is one",
    "fsdp": "under torchrun: cut the weights over the ranks (FSDP2); default: a copy on each (DDP)",
    "tp": "under torchrun, with --linear-loss: cut the head's vocabulary over so many ranks, all of the same sequences",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of Options."""
    for field in dataclasses.fields(Options):
        flag = "--" + field.name.replace("_", "-")
        if field.type == "bool":
            parser.add_argument(flag, action="store_true", default=None, help=HELP[field.name])
            continue
        kind = {"int": int, "float": float, "str": str}[str(field.type).split(" |")[0]]
        shown = "" if field.default is None else f" (default: {field.default})"
        parser.add_argument(flag, type=kind, default=None, metavar=kind.__name__.upper(), help=HELP[field.name] + shown)


def read_options(arguments: argparse.Namespace, base: Options | None = None) -> Options:
    """Return the options of the flags that were given, over ``base`` or the defaults."""
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Options)}
    return dataclasses.replace(base or Options(), **{name: v for name, v in given.items() if v is not None})
