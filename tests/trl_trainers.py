"""Every trainer of TRL that a CPU can train, on a tiny model: how it is made, and which of our functions it calls."""

from __future__ import annotations

import importlib
import queue
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import transformers
import trl
import trl_step
from trl_cases import SIZES

from grpo_kernels.integrations import trl_operators

OURS = ("linear_token_log_probs", "token_log_probs", "linear_grpo_loss", "grpo_loss", "token_divergence")
"""What ``trl_operators`` calls."""
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
PROMPTS = ["ABC", "HELLO", "Q", "XYZW", "AB", "LM", "PQRS", "T"]
GOOD = ["ABCABA", "AA", "ABACAB", "CAB", "AAB", "BACA", "ABA", "AACB"]
BAD = ["XYZ", "ZZYX", "YX", "XZYXZ", "ZY", "YYX", "XXZ", "Z"]
PAIRS = {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}
FIXED = {"use_cpu": True, "report_to": [], "save_strategy": "no", "bf16": False, "disable_tqdm": True}
FIXED |= {"dataloader_pin_memory": False, "logging_steps": 1, "seed": 3, "max_steps": 2, "optim": "sgd"}
FIXED |= {"learning_rate": 0.03, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4}


class Case(NamedTuple):
    """A trainer with options, and what it is for."""

    trainer: str
    """Of trl, or of a module of trl.experimental: "gkd.GKDTrainer"."""
    data: dict[str, list[Any]]
    calls: tuple[str, ...]
    """Which of ``OURS`` it calls when TRL is patched."""
    options: Mapping[str, Any] = MappingProxyType({})
    keywords: tuple[str, ...] = ()
    """What else its constructor takes: reward_funcs, teacher_model, ref_model."""
    experimental: bool = False
    """Whether its own divergence is patched."""


_ONLY = {"prompt": PROMPTS}
_TALKS = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": good}]
    for prompt, good in zip(PROMPTS, GOOD, strict=True)
]
_HINTED = {"prompt": PROMPTS, "privileged_context": GOOD}
_ONLINE = {"max_completion_length": 9}
_GROUPS = {**_ONLINE, "num_generations": 4}
_LINEAR, _ROWS, _WHOLE = ("linear_token_log_probs",), ("token_log_probs",), ("grpo_loss",)
_RATED, _TAUGHT = ("reward_funcs",), ("teacher_model",)
_OFFLINE = {"max_length": None}
_SDPO = {**_GROUPS, "success_reward_threshold": -10.0}
_LABELLED = {"prompt": PROMPTS * 2, "completion": GOOD + BAD, "label": [True] * 8 + [False] * 8}
CASES = {
    "GRPO": Case("GRPOTrainer", _ONLY, _LINEAR, {**_GROUPS, "beta": 0.04, "entropy_coef": 0.05}, _RATED),
    "RLOO": Case("RLOOTrainer", _ONLY, _LINEAR, {**_GROUPS, "beta": 0.04}, _RATED),
    "SFT": Case("SFTTrainer", {"prompt": PROMPTS, "completion": GOOD}, ()),
    "DPO": Case("DPOTrainer", PAIRS, ()),
    "KTO": Case("KTOTrainer", _LABELLED, _LINEAR),
    "Distillation": Case("DistillationTrainer", _ONLY, ("linear_grpo_loss",), _ONLINE, _TAUGHT),
    "Distillation, forward KL": Case(
        "DistillationTrainer", _ONLY, ("linear_grpo_loss",), {**_ONLINE, "beta": 0.0, "temperature": 0.7}, _TAUGHT
    ),
    "Distillation, JSD": Case("DistillationTrainer", _ONLY, ("linear_grpo_loss",), {**_ONLINE, "beta": 0.3}, _TAUGHT),
    "AsyncGRPO": Case(
        "async_grpo.AsyncGRPOTrainer",
        _ONLY,
        _LINEAR,
        {"token_budget": 0},
        ("model", "rollout_worker", "weight_transfer"),
    ),
    "GMPO": Case("gmpo.GMPOTrainer", _ONLY, _LINEAR, _GROUPS, _RATED),
    "BEMA": Case("bema_for_ref_model.DPOTrainer", PAIRS, ()),
    "A2PO": Case("a2po.A2POTrainer", _ONLY, _ROWS, _ONLINE, ("reward_funcs",)),
    "CPO": Case("cpo.CPOTrainer", PAIRS, _ROWS),
    "ORPO": Case("orpo.ORPOTrainer", PAIRS, _ROWS),
    "TPO": Case("tpo.TPOTrainer", {**PAIRS, "reference": GOOD[::-1]}, _ROWS),
    "OnlineDPO": Case("online_dpo.OnlineDPOTrainer", _ONLY, (), {"max_new_tokens": 9, "max_length": 32}, _RATED),
    "SDFT": Case("sdft.SDFTTrainer", _HINTED, (), {**_GROUPS, "distillation_topk": 8}),
    "SDFT, sampled": Case(
        "sdft.SDFTTrainer", _HINTED, _ROWS, {**_GROUPS, "distillation_mode": "sampled_token", "distillation_alpha": 1.0}
    ),
    "SDFT, whole": Case(
        "sdft.SDFTTrainer", _HINTED, ("token_divergence",), {**_GROUPS, "distillation_mode": "full_logits"}, (), True
    ),
    "SDPO": Case("sdpo.SDPOTrainer", _ONLY, _ROWS, _SDPO, _RATED),
    "SDPO, whole": Case(
        "sdpo.SDPOTrainer", _ONLY, ("token_divergence",), {**_SDPO, "distillation_mode": "full_logits"}, _RATED, True
    ),
    "GKD": Case("gkd.GKDTrainer", {"messages": _TALKS}, _WHOLE, {"max_new_tokens": 9}, _TAUGHT, True),
    "GOLD": Case(
        "gold.GOLDTrainer", {"messages": _TALKS}, _WHOLE, {**_ONLINE, "use_extended_uld": False}, _TAUGHT, True
    ),
    "IWOPD": Case("iw_opd.IWOPDTrainer", {"messages": _TALKS}, (), _ONLINE, _TAUGHT, True),
    "IWOPD, JSD": Case(
        "iw_opd.IWOPDTrainer",
        {"messages": _TALKS},
        _WHOLE,
        {**_ONLINE, "distillation_objective": "jsd", "loss_top_k": 0, "beta": 0.5},
        _TAUGHT,
        True,
    ),
}


def make(case: Case, folder: Path, tmp_path: Path, **options: Any) -> Any:
    module, _, name = f"trl.{'experimental.' if '.' in case.trainer else ''}{case.trainer}".rpartition(".")
    module = importlib.import_module(module)
    kind, config = getattr(module, name), name.replace("Trainer", "Config")
    config = getattr(module if hasattr(module, config) else trl, config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    keywords = {"model": transformers.AutoModelForCausalLM.from_pretrained(folder)}
    keywords |= {name: _KEYWORDS[name](folder) for name in case.keywords}
    return kind(
        processing_class=tokenizer,
        args=config(**{**FIXED, "output_dir": str(tmp_path), **case.options, **options}),
        train_dataset=datasets.Dataset.from_dict(case.data),
        **keywords,
    )


def _teacher(folder: Path) -> Any:
    torch.manual_seed(7)
    sizes = {**SIZES, "hidden_size": 48}
    config = transformers.Qwen3Config(pad_token_id=0, eos_token_id=1, **sizes)
    config._name_or_path = str(folder)  # where its tokenizer is looked for
    return transformers.Qwen3ForCausalLM(config).eval()


class Worker:
    """In the place of AsyncGRPO's worker: its rollouts are there from the start, two completions of every prompt."""

    def __init__(self, folder: Path) -> None:
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.rollout_buffer: queue.Queue[Any] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        for group, (prompt, *completions) in enumerate(zip(PROMPTS, GOOD, BAD, strict=True)):
            for completion, advantage in zip(completions, (1.0, -0.7), strict=True):
                ids = np.array(tokenizer(prompt + completion).input_ids)
                wrote = (np.arange(len(ids)) >= len(prompt)).astype(np.int64)
                about = {"input_ids": ids, "completion_mask": wrote, "old_log_probs": -4.0 * wrote.astype(np.float32)}
                about |= {"prompt": [], "completion": [], "metrics": {}, "group_id": group}
                self.rollout_buffer.put(RolloutSample(**about, advantage=advantage, model_version=0))

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def update_model_version(self, model_version: int) -> None: ...
    def check_health(self, stale_after_s: float) -> None: ...


class Nowhere:
    """In the place of AsyncGRPO's transfer of weights to a server."""

    def init_weight_transfer(self) -> None: ...
    def pause(self) -> None: ...
    def send_weights(self, iterator: Any) -> None: ...
    def resume(self) -> None: ...
    def destroy(self) -> None: ...


def attend(q: Any, k: Any, v: Any, q_bounds: Any, k_bounds: Any, *_: Any, softmax_scale: float, **__: Any) -> Any:
    """In the place of the GPU kernel that AsyncGRPO attends with: each segment's last rows, causally."""
    found = []
    for first, last, start, end in zip(q_bounds[:-1], q_bounds[1:], k_bounds[:-1], k_bounds[1:], strict=True):
        seen = torch.ones(last - first, end - start, dtype=torch.bool).tril(int((end - start) - (last - first)))
        rows = (each.transpose(0, 1) for each in (q[first:last], k[start:end], v[start:end]))
        found.append(torch.nn.functional.scaled_dot_product_attention(*rows, seen, scale=softmax_scale).transpose(0, 1))
    return torch.cat(found)


_KEYWORDS = {
    "reward_funcs": lambda folder: trl_step.reward,
    "teacher_model": _teacher,
    "model": str,
    "rollout_worker": Worker,
    "weight_transfer": lambda folder: Nowhere(),
}


def without_a_gpu(monkeypatch: Any) -> None:
    """What AsyncGRPO asks of a GPU and of a server when it is made, and its attention."""
    from trl.experimental.async_grpo import async_grpo_trainer, packing

    for name in ("get_peak_flops_per_device", "VLLMClient"):
        monkeypatch.setattr(async_grpo_trainer, name, lambda *_: None)
    monkeypatch.setattr(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=attend))


def counted(monkeypatch: Any) -> Counter[str]:
    """Return how often each of ``OURS`` is called from here on."""
    calls: Counter[str] = Counter()
    for name in OURS:
        original = getattr(trl_operators, name)

        def call(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(trl_operators, name, call)
    return calls
