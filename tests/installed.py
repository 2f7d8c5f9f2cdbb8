"""Every public name of an installed package, used once: copied beside an environment without the sources, and run.

    python installed.py BACKEND        # of calls on a CPU: cpu, or torch where nothing could be compiled

Prints where the package is and how many names it used; an assertion or a traceback is a fault of the package.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import warnings
from collections.abc import Callable

import torch

import grpo_kernels as gk

OPTIONAL = {
    *(
        "triton",
        "transformers",
        "numpy",
        "safetensors",
        "tqdm",
        "matplotlib",
        "trl",
        "verl",
        "openrlhf",
        "skyrl",
        "ray",
    ),
    *("skyrl_train", "accelerate", "peft", "megatron", "reasoning_gym"),
}
"""Packages that a module may want: those of the extras, and of what is patched."""

B, T, V, H = 4, 6, 50, 8


def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(T) < torch.tensor([[T], [3], [T], [1]])
    ids = torch.randint(V, (B, T), generator=g)
    return {"token_ids": ids, "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]), "mask": mask}


def logits() -> torch.Tensor:
    return torch.randn(B, T, V, generator=torch.Generator().manual_seed(1)).requires_grad_()


def old_log_probs() -> torch.Tensor:
    with torch.no_grad():
        found = gk.token_log_probs(logits(), batch()["token_ids"]).log_probs
    return found + 0.3 * torch.randn(B, T, generator=torch.Generator().manual_seed(2))


def states() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(B, T, H, generator=g).requires_grad_(), torch.randn(V, H, generator=g).requires_grad_()]


def of_config(config: gk.LossConfig, **tensors: torch.Tensor) -> None:
    """A loss and its gradient are those of the reference; a config survives being stored."""
    known = {**batch(), "old_log_probs": old_log_probs(), "ref_log_probs": old_log_probs() * 1.01, **tensors}
    found = []
    for loss in (gk.grpo_loss, gk.reference.grpo_loss):
        leaf = logits()
        out = loss(leaf, **known, config=config)
        out.loss.backward()
        found.append((out.loss.detach(), leaf.grad))
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)  # of sums that cancel
    assert gk.LossConfig.from_dict(config.to_dict()) == config


def surrogate(made: gk.Surrogate, level: str = "token") -> Callable[[], None]:
    return lambda: of_config(gk.LossConfig(made, level=level))


def aggregation(made: object) -> Callable[[], None]:
    return lambda: of_config(gk.LossConfig(gk.Clip(), aggregation=made))


def scheme(made: object) -> Callable[[], None]:
    return lambda: of_config(gk.LossConfig(gk.Clip(), rollout=made), rollout_log_probs=old_log_probs() + 0.1)


def support(*made: object) -> Callable[[], None]:
    def run() -> None:
        out = gk.token_log_probs(logits(), batch()["token_ids"], batch()["mask"], support=made)
        assert out.log_probs.shape == (B, T)

    return run


def module(made: Callable[..., torch.nn.Module], *leaves: torch.Tensor) -> None:
    out = made("grpo")(*leaves, *batch().values(), old_log_probs=old_log_probs())
    out.loss.backward()
    assert all(leaf.grad is not None for leaf in leaves)


def aligned() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, mask = torch.arange(2 * T).view(2, T) % V, torch.ones(2, T)
    mask[:, :2] = 0
    return ids, mask, torch.ones(2, T)


def use_advantages() -> None:
    rewards, mask = torch.tensor([1.0, 0.0, 0.5, 0.5]), torch.ones(4, 3)
    for estimate in (gk.advantages.group_centered, gk.advantages.group_normalized, gk.advantages.leave_one_out):
        assert estimate(rewards, 2).shape == (4,)
    assert gk.advantages.gae(torch.ones(4, 3), torch.zeros(4, 3), mask, 1.0, 1.0)[0].tolist() == [[3.0, 2.0, 1.0]] * 4
    assert gk.advantages.reward_to_go(torch.ones(4, 3), mask)[0].tolist() == [3.0, 2.0, 1.0]


def use_align() -> None:
    ids, mask = gk.align(*aligned()[:2])
    assert ids.shape == mask.shape == (2, T - 1)


def use_collate() -> None:
    samples = [{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1], "advantages": 1.0}] * 2
    inputs, tokens = gk.collate(samples)
    assert inputs["input_ids"].shape == (2, 3)
    assert tokens["mask"].shape == (2, 2)


def use_pack() -> None:
    inputs, tokens = gk.pack(*aligned())
    assert inputs["input_ids"].shape == (1, 2 * T)
    assert gk.unpack(tokens["token_ids"], tokens["cu_seqlens"]).shape[0] == 2


def use_split_context() -> None:
    part = gk.split_context(*aligned()[:2], 0, 2)
    assert isinstance(part, gk.ContextPart)
    assert part.token_ids.shape == part.mask.shape


def use_divergence() -> None:
    kept = logits()
    out = gk.token_divergence(kept, gk.Teacher(logits=logits().detach().roll(1, -1)), batch()["token_ids"])
    assert isinstance(out, gk.TokenDivergence)
    out.divergence.sum().backward()
    assert kept.grad.abs().sum() > 0
    known = {**batch(), "old_log_probs": old_log_probs(), "teacher": gk.Teacher(logits=logits().detach())}
    config = gk.LossConfig(gk.Clip(), divergence=gk.Divergence("forward_kl", 0.5))
    assert gk.grpo_loss(logits(), **known, config=config).loss.isfinite()


def use_linear_divergence() -> None:
    leaves = states()
    teacher = gk.Teacher(logits=logits().detach())
    gk.linear_token_divergence(*leaves, teacher, batch()["token_ids"]).divergence.sum().backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)


def use_grpo_loss() -> None:
    out = gk.grpo_loss(logits(), **batch(), old_log_probs=old_log_probs(), config="grpo")
    assert isinstance(out, gk.LossOutput)
    assert isinstance(out.metrics, gk.Metrics)
    assert isinstance(out.route, gk.Route)
    assert out.route.backend == EXPECTED, out.route
    assert out.metrics.as_dict()


def use_linear() -> None:
    leaves = states()
    gk.linear_grpo_loss(*leaves, **batch(), old_log_probs=old_log_probs(), config="dapo").loss.backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)


def use_log_probs() -> None:
    out = gk.token_log_probs(logits(), batch()["token_ids"])
    truth = logits().log_softmax(-1).gather(-1, batch()["token_ids"][..., None]).squeeze(-1)
    torch.testing.assert_close(out.log_probs, truth)
    assert isinstance(out, gk.TokenLogProbs)


def use_linear_log_probs() -> None:
    hidden, weight = states()
    out = gk.linear_token_log_probs(hidden, weight, batch()["token_ids"])
    torch.testing.assert_close(out.log_probs, gk.token_log_probs(hidden @ weight.T, batch()["token_ids"]).log_probs)


def use_policy_loss() -> None:
    log_probs = (old_log_probs() + 0.1).requires_grad_()
    known = {name: value for name, value in batch().items() if name != "token_ids"}
    gk.policy_loss(log_probs, **known, old_log_probs=old_log_probs()).loss.backward()
    assert log_probs.grad.abs().sum() > 0


def loss_of_a_user(log_probs, old_log_probs, advantages, mask):
    ratio, A = (log_probs - old_log_probs).exp(), advantages[:, None]
    return (-torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A) * mask).sum() / mask.sum()


def use_match() -> None:
    report = gk.match(loss_of_a_user)
    assert isinstance(report, gk.MatchReport)
    assert report.matched, report
    assert report.config.aggregation == "token_mean"


def use_shadow() -> None:
    watched = gk.shadow(loss_of_a_user, gk.LossConfig(gk.Clip(), aggregation="token_mean"), log=lambda line: None)
    watched(logits(), **batch(), old_log_probs=old_log_probs()).loss.backward()
    assert not watched.history[0].differs, watched.history


def use_hf() -> None:
    assert gk.hf.batch(**batch())["mask"].shape == (B, T)
    if importlib.util.find_spec("transformers") is None:
        return
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"vocab_size": V, "hidden_size": H, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    model = gk.hf.attach(Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1)))
    ids = torch.randint(V, (B, T + 1))
    model(
        input_ids=ids, grpo=dict(**{**batch(), "token_ids": ids[:, 1:]}, old_log_probs=old_log_probs())
    ).loss.backward()
    assert model.lm_head.weight.grad is not None


def use_normalizer() -> None:
    config = gk.LossConfig(gk.Clip(), aggregation=gk.TokenMean())
    counted = gk.normalizer(batch()["mask"], config)
    assert isinstance(counted, gk.Normalizer)
    known = {**batch(), "old_log_probs": old_log_probs(), "config": config}
    assert gk.grpo_loss(logits(), **known, normalizer=counted).loss == gk.grpo_loss(logits(), **known).loss


def use_recorded() -> None:
    ids = batch()["token_ids"]
    sets = gk.Recorded.from_counts(torch.stack([ids, (ids + 1) % V], -1).flatten(), torch.full_like(ids, 2))
    out = gk.grpo_loss(logits(), **batch(), support=sets)
    assert out.loss.isfinite()


def use_register_surrogate() -> None:
    @gk.register_surrogate
    class Halved(gk.Surrogate):
        """-A·r/2."""

        def value(self, t):
            return -t.advantage * t.ratio / 2

    out = gk.grpo_loss(logits(), **batch(), old_log_probs=old_log_probs(), config=gk.LossConfig(Halved()))
    assert out.loss.isfinite()


def use_reference() -> None:
    assert set(gk.reference.VALUES) >= {"clip", "cispo"}
    of_config(gk.LossConfig.preset("grpo", kl=gk.KL(0.04)))


def use_value_loss() -> None:
    assert gk.value_loss(*torch.ones(3, B, T), batch()["mask"]) == 0


def use_empty_cache() -> None:
    gk.empty_cache()


PROVEN_BY = {
    **dict.fromkeys(("LossOutput", "Metrics", "Route", "grpo_loss"), use_grpo_loss),
    **dict.fromkeys(("LossConfig", "KL", "reference"), use_reference),
    **dict.fromkeys(("Surrogate", "register_surrogate"), use_register_surrogate),
    **dict.fromkeys(("Divergence", "Teacher", "TokenDivergence", "token_divergence"), use_divergence),
    **dict.fromkeys(("TokenLogProbs", "token_log_probs"), use_log_probs),
    **dict.fromkeys(("Normalizer", "normalizer"), use_normalizer),
    **dict.fromkeys(("ContextPart", "split_context"), use_split_context),
    **dict.fromkeys(("MatchReport", "match"), use_match),
    **dict.fromkeys(("pack", "unpack"), use_pack),
    "GRPOLoss": lambda: module(gk.GRPOLoss, logits()),
    "LinearGRPOLoss": lambda: module(gk.LinearGRPOLoss, *states()),
    "Clip": surrogate(gk.Clip(0.2, 0.28)),
    "Unclipped": surrogate(gk.Unclipped()),
    "Reinforce": surrogate(gk.Reinforce()),
    "Cispo": surrogate(gk.Cispo(cap=1.1)),
    "Sapo": surrogate(gk.Sapo()),
    "DppoTV": surrogate(gk.DppoTV(0.01, 0.02)),
    "DppoKL": surrogate(gk.DppoKL(2e-3, 1e-3)),
    "Dro": surrogate(gk.Dro(0.3)),
    "Vespo": surrogate(gk.Vespo(), "sequence_product"),
    "Gmpo": surrogate(gk.Gmpo(), "sequence"),
    "TokenMean": aggregation(gk.TokenMean()),
    "SequenceMean": aggregation(gk.SequenceMean()),
    "SequenceSum": aggregation(gk.SequenceSum()),
    "Constant": aggregation(gk.Constant(7)),
    "GroupMean": aggregation(gk.GroupMean(2)),
    "TruncatedIS": scheme(gk.TruncatedIS(1.1)),
    "MaskedIS": scheme(gk.MaskedIS(0.8, 1.2)),
    "Rejection": scheme(gk.Rejection(0.8, 1.2)),
    "OffPolicyMask": scheme(gk.OffPolicyMask(0.02)),
    "TopK": support(gk.TopK(5)),
    "TopP": support(gk.TopP(0.9)),
    "MinP": support(gk.TopK(20), gk.MinP(0.01)),
    "Recorded": use_recorded,
    "advantages": use_advantages,
    "align": use_align,
    "collate": use_collate,
    "empty_cache": use_empty_cache,
    "hf": use_hf,
    "linear_grpo_loss": use_linear,
    "linear_token_divergence": use_linear_divergence,
    "linear_token_log_probs": use_linear_log_probs,
    "policy_loss": use_policy_loss,
    "shadow": use_shadow,
    "value_loss": use_value_loss,
}
"""What uses a public name."""


def import_everything() -> int:
    """Import every module of the package; one may lack a package of an extra, and nothing else."""
    names = [found.name for found in pkgutil.walk_packages(gk.__path__, "grpo_kernels.", onerror=lambda name: None)]
    for name in names:
        try:
            if not name.endswith("__main__"):
                importlib.import_module(name)
        except ImportError as error:
            if (error.name or "").partition(".")[0] not in OPTIONAL and "pip install" not in str(error):
                raise
    return len(names)


def main(expected: str) -> None:
    global EXPECTED
    EXPECTED = expected
    assert set(PROVEN_BY) == set(gk.__all__), set(PROVEN_BY) ^ set(gk.__all__)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for use in dict.fromkeys(PROVEN_BY.values()):
            use()
    fallback = [str(warning.message) for warning in told if "plain PyTorch backend" in str(warning.message)]
    assert len(fallback) == (expected == "torch"), fallback
    print(f"{gk.__file__}: {len(PROVEN_BY)} names, {import_everything()} modules", *fallback, sep="\n")


EXPECTED = ""
"""The backend that calls on a CPU must take."""

if __name__ == "__main__":
    main(sys.argv[1])
