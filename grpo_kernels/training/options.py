"""The options of a training run: one frozen dataclass, and the command line that fills it."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import backends
from ..objectives.config import LossConfig
from ..objectives.divergence import ELSEWHERE, KINDS, Divergence
from ..objectives.kl import KL
from ..objectives.settings import HELD, LARGEST, SMALLEST, check_name, check_seed, read_device, settle_name

NO_LOSS = "none"
"""Of --loss: distillation alone."""
MOST_NUMBERS, MOST_LAYERS, MOST_RESPONSES = 10_000, 1_000, 1_000_000
"""Of a list that is sorted, a tiny model, a rollout: more would be made one by one until memory is full."""
_TYPES: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}


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
    teacher: str | None = None
    divergence: str | None = None
    divergence_coef: float = 1.0
    dynamic_sampling: bool = False
    overlong_buffer: int = 0
    seed: int = 0
    checkpoint_every: int = 200
    device: str | None = None
    tensorboard: bool = False
    wandb: str | None = None
    fsdp: bool = False
    tp: int = 1

    def __post_init__(self) -> None:
        self._check_types()
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
        self._require("temperature", 1e-4 <= self.temperature <= 1e4, "between 1e-4 and 1e4")
        self._require("lr", 0 < self.lr <= 100, "> 0 and at most 100")
        self._require("max_grad_norm", 0 < self.max_grad_norm < math.inf, "finite and > 0")
        check_seed("--seed", self.seed)
        for name in ("ref_every", "warmup", "weight_decay", "overlong_buffer", "divergence_coef", "kl"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "finite and >= 0")
        self._check_held()
        for name, most in (("numbers", MOST_NUMBERS), ("layers", MOST_LAYERS), ("group", MOST_RESPONSES)):
            self._require(name, getattr(self, name) <= most, f"at most {most}")
        most = MOST_RESPONSES // self.group
        self._require("prompts", self.prompts <= most, f"at most {most} with --group {self.group}")
        limit = self.response_limit()
        self._require("overlong_buffer", self.overlong_buffer <= limit, f"at most the {limit} tokens of a response")
        self._require("group", self.group > 1 or not self.dynamic_sampling, "at least 2 with --dynamic-sampling")
        alone = self.group == self.prompts == 1 and self.loss != NO_LOSS
        self._require("group", not alone, "at least 2 with --prompts 1: advantages compare responses")
        for name in ("hidden", "layers"):
            self._refuse_unless(name, self.model is None, f"with --model {self.model}, which has its own")
        for name in ("numbers", "largest", "reward"):
            self._refuse_unless(name, not self.task.startswith("reasoning_gym:"), f"with --task {self.task}")
        self._refuse("linear_loss", "reference_loss")
        self._refuse("backend", "reference_loss")
        self._require("ref_every", not self.ref_every or self.kl != 0, "0 without --kl")
        self._require(
            "tp", self.tp == 1 or (self.linear_loss and not self.fsdp), "1 without --linear-loss or with --fsdp"
        )
        settle_name(self, "loss", "--loss", (*LossConfig.presets(), NO_LOSS))
        self._check_teacher()
        if self.backend is not None:
            check_name("--backend", self.backend, backends.names())
        if self.device is not None:
            read_device("--device", self.device)
        if self._objective().aggregation == "group_mean":
            for name in ("minibatch", "micro_batch"):
                whole = (getattr(self, name) or self.group) % self.group == 0
                self._require(
                    name, whole, f"a multiple of --group {self.group}, as --loss {self.loss} keeps groups whole"
                )

    def _check_held(self) -> None:
        """Raise for numbers that the dtypes of a run do not hold: fp32 of coefficients, int64 of counts."""
        for field in dataclasses.fields(self):
            kind, value = str(field.type).split(" |")[0], getattr(self, field.name)
            if kind == "float":
                self._require(field.name, value == 0 or SMALLEST <= abs(value) <= LARGEST, f"0, or of a size {HELD}")
            elif kind == "int" and value is not None:
                self._require(field.name, -(2**63) <= value < 2**63, "a number of 64 bits")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"--{name.replace('_', '-')} must be {rule}; got {getattr(self, name)}.")

    def _refuse(self, name: str, other: str) -> None:
        """Raise where both are given, of which one has no effect then."""
        if getattr(self, name) and getattr(self, other):
            flags = [f"--{each.replace('_', '-')}" for each in (name, other)]
            raise ValueError(f"{flags[0]} has no effect with {flags[1]}: leave one of them out.")

    def _refuse_unless(self, name: str, has_effect: bool, where: str) -> None:
        """Raise where an option is another than its default though it has no effect."""
        value = getattr(self, name)
        default = next(field.default for field in dataclasses.fields(self) if field.name == name)
        if not has_effect and value != default:
            raise ValueError(f"--{name} has no effect {where}: leave it out; got {value!r}.")

    def _check_types(self) -> None:
        """Raise for a value that is not of its field's type, as a file of options may have."""
        for field in dataclasses.fields(self):
            kind, *none = str(field.type).split(" | ")
            value = getattr(self, field.name)
            if value is None and none:
                continue
            right = isinstance(value, _TYPES[kind]) and (kind == "bool" or not isinstance(value, bool))
            if not right:
                raise ValueError(f"--{field.name.replace('_', '-')} must be of type {kind}; got {value!r}.")

    def _check_teacher(self) -> None:
        """Raise where a teacher, what to minimise, or what else there is to learn from is missing."""
        if self.divergence is not None:
            settle_name(self, "divergence", "--divergence", KINDS, ELSEWHERE)
        if self.teacher is not None and self.divergence is None:
            kinds = ", ".join(KINDS)
            raise ValueError(f"--teacher {self.teacher} needs --divergence, what is minimised: one of {kinds}.")
        if self.teacher is None and self.divergence is not None:
            raise ValueError(
                f"--divergence {self.divergence} needs --teacher, the folder of a run or of a model, or a hub name."
            )
        if self.teacher is None and self.loss == NO_LOSS:
            raise ValueError(f"--loss {NO_LOSS} has no policy term: it needs --teacher and --divergence to learn from.")
        self._require("tp", self.tp == 1 or self.teacher is None, "1 with --teacher")
        self._require("divergence_coef", self.divergence_coef == 1.0 or self.teacher is not None, "1 without --teacher")

    def response_limit(self) -> int:
        """Return the length of the longest response in tokens: for sort, the answer and its end token."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.task != "sort":
            return 64
        digits = len(str(self.largest))
        return self.numbers * digits + (self.numbers - 1) * (digits > 1) + 1

    def _objective(self) -> LossConfig:
        """Return the preset of ``--loss``; of "none" no policy term, for distillation alone."""
        return LossConfig(surrogate=None) if self.loss == NO_LOSS else LossConfig.preset(self.loss)

    def loss_config(self) -> LossConfig:
        """Return the objective of ``--loss`` with what it cannot know: lengths, groups, coefficients, a divergence."""
        changes: dict[str, Any] = {"kl": KL(self.kl), "entropy_coef": self.entropy}
        objective = self._objective()
        if objective.aggregation == "constant":
            changes["constant_length"] = self.response_limit()
        if objective.aggregation == "group_mean":
            changes["group_size"] = self.group
        if self.divergence is not None:
            changes["divergence"] = Divergence(self.divergence, self.divergence_coef)  # type: ignore[arg-type]
        return dataclasses.replace(objective, **changes)


HELP = {
    "task": "sort, or reasoning_gym:<dataset>",
    "numbers": "sort: how many numbers",
    "largest": "sort: the largest number",
    "reward": "sort: positions or order",
    "model": "path or hub name of a causal language model; default: a tiny random Qwen3",
    "hidden": "hidden size of the tiny model",
    "layers": "layers of the tiny model",
    "loss": f"preset: {', '.join(LossConfig.presets())}; {NO_LOSS}: no policy term, with --teacher",
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
    "teacher": "folder of a run or of a model, or a hub name: what the policy is distilled from, on its own samples",
    "divergence": "from the teacher, over the whole vocabulary: " + ", ".join(KINDS),
    "divergence_coef": "coefficient of the divergence",
    "dynamic_sampling": "drop groups whose rewards are all equal",
    "overlong_buffer": "tokens over which the soft over-long penalty grows; 0: none",
    "seed": "of everything",
    "checkpoint_every": "steps between checkpoints",
    "device": "cuda, cpu, ...; default: a GPU if there is one",
    "tensorboard": "curves for TensorBoard too, in the run's folder",
    "wandb": "project of Weights & Biases that curves go to too",
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
    """Return the options of the flags that were given, over ``base`` or the defaults. A path is made absolute, so that
    the run goes on with the same from any folder."""
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Options)}
    if given["wandb"] == "":  # a variable of the shell
        raise ValueError("--wandb must name a project; got ''.")
    for name in ("model", "teacher"):
        if given[name] == "":
            raise ValueError(f"--{name} must name a folder, or a model of the hub; got ''.")
        if given[name] is not None and Path(given[name]).exists():  # else a name of the hub
            given[name] = str(Path(given[name]).absolute())
    return dataclasses.replace(base or Options(), **{name: v for name, v in given.items() if v is not None})
