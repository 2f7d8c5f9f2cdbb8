"""verl 0.9.1 patched beside itself: its losses, metrics, operators and fused head. make nightly PART=verl
installs verl for it."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from systems import (
    KINDS,
    assert_shadow_sees_rounding,
    batch,
    cast,
    close_losses,
    gradient_of,
    model,
    rows,
    tolerance_of,
    with_garbage,
)

pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)

from tensordict import TensorDict
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.utils import torch_functional as verl_F
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from grpo_kernels import Clip, LossConfig, match, policy_loss
from grpo_kernels.integrations.verl import loss_config, patch_verl
from grpo_kernels.integrations.verl_losses import LOSSES, MISSING, MODES

pytestmark = [pytest.mark.peers, pytest.mark.nightly]
OPTIONS = {
    "vanilla": dict(clip_ratio_low=0.2, clip_ratio_high=0.28),
    "dppo_tv": dict(clip_ratio_low=0.02, clip_ratio_high=0.03),
    "dppo_kl": dict(clip_ratio_low=0.02, clip_ratio_high=0.03, clip_ratio_c=1.3),
    "gspo": dict(clip_ratio_low=0.1, clip_ratio_high=0.15),
    "sapo": dict(tau_pos=0.8, tau_neg=1.3),
    "gpg": {},
    "geo_mean": dict(clip_ratio_low=0.3, clip_ratio_high=0.4),
    "dro": dict(dro_beta=0.3),
    "cispo": dict(clip_ratio_low=0.1, clip_ratio_high=0.2),
}
WHOLE = {"dp_size": 4, "batch_num_tokens": 77, "global_batch_size": 13, "loss_scale_factor": 32}
INFOS = ({}, WHOLE, {**WHOLE, "dp_size": 1, "loss_scale_factor": None})


def actor(mode: str, info: dict | None = None, **options) -> ActorConfig:
    options = {**OPTIONS[mode], **options}
    loss = PolicyLossConfig(loss_mode=mode, dro_beta=options.pop("dro_beta", None))
    fixed = dict(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, global_batch_info=dict(info or {}))
    return ActorConfig(policy_loss=loss, **fixed, **options)


def evaluated(mode, known, agg_mode, config, weighted, dtype):
    """Return loss, gradient and metrics of what is registered under ``mode`` now."""
    given = cast(known, dtype)
    log_prob = given["log_prob"].requires_grad_()
    loss, metrics = get_policy_loss_fn(mode)(
        old_log_prob=given["old"],
        log_prob=log_prob,
        advantages=given["advantages"],
        response_mask=given["mask"],
        loss_agg_mode=agg_mode,
        config=config,
        rollout_is_weights=given["weights"] if weighted else None,
    )
    return loss.detach(), torch.autograd.grad(loss, log_prob)[0], metrics


def compare(mode, known, agg_mode, info, weighted):
    """Ours in fp32 beside verl's own in fp64."""
    config = actor(mode, info)
    theirs = evaluated(mode, known, agg_mode, config, weighted, torch.float64)
    with patch_verl(operators=False):
        mine = evaluated(mode, known, agg_mode, config, weighted, torch.float32)
    close_losses(mine, theirs)
    assert set(mine[2]) == set(theirs[2])
    for name, value in theirs[2].items():
        assert mine[2][name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def divides_by_nothing(mode, agg_mode, info) -> bool:
    """Whether verl's loss of a batch without a token is 0/0: a listed fault, ours is 0."""
    unit = "batch_num_tokens" if agg_mode == "token-mean" and mode != "sapo" else "global_batch_size"
    return info.get(unit) is None and mode != "geo_mean" and (agg_mode != "token-sum" or mode == "sapo")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", OPTIONS)
def test_losses(mode, kind):
    """Every loss in every mode of aggregation, of the global batch and of its own, weighed and not."""
    if mode == "geo_mean" and kind == "per-token advantages":
        pytest.skip("refused by name")
    for seed in range(3):
        known = batch(kind, seed)
        for agg_mode in MODES:
            for info in INFOS:
                for weighted in (False, True):
                    if kind == "nothing" and divides_by_nothing(mode, agg_mode, info):
                        continue
                    compare(mode, known, agg_mode, info, weighted)


def test_every_mode_is_compared():
    assert set(OPTIONS) == set(LOSSES)


@pytest.mark.parametrize("mode", [*LOSSES, *MISSING])
def test_signatures(mode):
    """Names, order and defaults are verl's."""
    theirs = inspect.signature(get_policy_loss_fn(mode)).parameters.values()
    with patch_verl(operators=False):
        mine = inspect.signature(get_policy_loss_fn(mode)).parameters.values()
    assert [(p.name, p.default, p.kind) for p in mine] == [(p.name, p.default, p.kind) for p in theirs]


@pytest.mark.parametrize("mode", OPTIONS)
def test_a_batch_without_a_token(mode):
    """verl's 0/0 is NaN where it counts the tokens itself; ours is 0."""
    known, config = batch("nothing"), actor(mode)
    if divides_by_nothing(mode, "token-mean", {}):
        assert math.isnan(evaluated(mode, known, "token-mean", config, False, torch.float64)[0])
    with patch_verl(operators=False):
        loss, gradient, _ = evaluated(mode, known, "token-mean", config, False, torch.float32)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("mode", OPTIONS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_what_is_masked_is_not_read(mode, garbage):
    """verl multiplies by the mask in the modes of sequences, where NaN stays (a listed fault)."""
    known = batch("holes")
    clean, dirty = with_garbage(known, 0.0), with_garbage(known, garbage)
    with patch_verl(operators=False):
        for agg_mode in MODES:
            loss, gradient, metrics = evaluated(mode, clean, agg_mode, actor(mode), True, torch.float32)
            again = evaluated(mode, dirty, agg_mode, actor(mode), True, torch.float32)
            assert (loss, metrics) == (again[0], again[2])
            assert torch.equal(gradient, again[1])


@pytest.mark.parametrize("kind", ["packed", "padded", "one row", "masked columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_operators_of_logits(kind, dtype):
    """Beside verl's own in fp64, on the same logits."""
    logits, labels = rows(kind, dtype)
    exact = logits.double()
    theirs = gradient_of(lambda x: verl_F.logprobs_from_logits(x, labels), exact)
    their_entropy = gradient_of(verl_F.entropy_from_logits, exact)
    tolerance = tolerance_of(dtype)
    with patch_verl(losses=False):
        for inplace in (False, True):
            mine = gradient_of(lambda x, inplace=inplace: verl_F.logprobs_from_logits(x, labels, inplace), logits)
            for found, wanted in zip(mine, theirs, strict=True):
                torch.testing.assert_close(found.double(), wanted, **tolerance)
        functions = [verl_F.entropy_from_logits]
        if logits.dim() == 2:
            functions.append(lambda x: verl_F.entropy_from_logits_with_chunking(x, chunk_size=4))
        for function in functions:
            values, gradient = gradient_of(function, logits)
            assert values.isfinite().all()
            assert gradient.isfinite().all()
            if kind == "masked columns":  # verl's is 0 · -inf there, NaN: a listed fault
                assert their_entropy[0].isnan().all()
                possible = exact[:, exact[0].isfinite()]
                wanted, of_possible = gradient_of(verl_entropy, possible)
                torch.testing.assert_close(values.double(), wanted, **tolerance)
                torch.testing.assert_close(gradient[:, exact[0].isfinite()].double(), of_possible, **tolerance)
                continue
            torch.testing.assert_close(values.double(), their_entropy[0], **tolerance)
            torch.testing.assert_close(gradient.double(), their_entropy[1], **tolerance)


verl_entropy = verl_F.entropy_from_logits
"""verl's own, whatever is patched."""


def test_entropy_is_compiled_as_verl_compiles_it():
    """Its engine compiles the function that it finds, with dynamic shapes."""
    with patch_verl(losses=False):
        compiled = torch.compile(verl_F.entropy_from_logits, dynamic=True)
        for count in (5, 17, 30):
            logits = 3 * torch.randn(count, 90, generator=torch.Generator("cpu").manual_seed(count))
            for found, wanted in zip(gradient_of(compiled, logits), gradient_of(verl_entropy, logits), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def head(dtype=torch.float32, batched=True):
    draw = torch.Generator("cpu").manual_seed(2)
    hidden, weight = torch.randn(2, 19, 32, generator=draw), torch.randn(90, 32, generator=draw) / 4
    labels = torch.randint(90, (2, 19), generator=draw)
    if not batched:
        hidden, labels = hidden.view(-1, 32), labels.view(-1)
    return hidden.to(dtype), weight.to(dtype), labels


def of_head(hidden, weight, labels, temperature, wants_entropy=True):
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    log_probs, entropy = FusedLinearForPPO(chunk_size=8).forward(hidden, weight, labels, temperature)
    weights = torch.linspace(-1, 2, labels.numel()).view(labels.shape)
    loss = (log_probs * weights).sum() + (0.3 * (entropy * weights).sum() if wants_entropy else 0)
    return log_probs.detach(), entropy.detach(), *torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("wants_entropy", [True, False])
def test_fused_head(batched, temperature, wants_entropy):
    given = head(batched=batched)
    theirs = of_head(*given, temperature, wants_entropy)
    with patch_verl(losses=False):
        mine = of_head(*given, temperature, wants_entropy)
    for found, wanted in zip(mine, theirs, strict=True):
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


def test_fused_head_in_half_precision():
    """No further from the exact numbers than verl's, in the mean of squares: a largest error is one rounding."""
    given = head(torch.bfloat16)
    exact = of_head(given[0].float(), given[1].float(), given[2], 1.0)
    theirs = of_head(*given, 1.0)
    with patch_verl(losses=False):
        mine = of_head(*given, 1.0)
    for found, other, wanted in zip(mine, theirs, exact, strict=True):
        error, their_error = ((x.float() - wanted).square().mean().sqrt() for x in (found, other))
        assert error <= 1.2 * their_error


def test_use_fused_kernels():
    """verl's own forward of a model with ``use_fused_kernels``, patched and not, to every parameter's gradient."""
    from verl.models.transformers.dense_common import forward_with_torch_backend

    policy, draw = model(), torch.Generator("cpu").manual_seed(3)
    ids = torch.randint(120, (1, 24), generator=draw)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]

    def gradients():
        policy.zero_grad()
        out = forward_with_torch_backend(
            policy, input_ids=ids, position_ids=positions, temperature=0.8, return_dict=True, use_cache=False
        )
        (out.log_probs.sum() + 0.2 * out.entropy.sum()).backward()
        return [out.log_probs.detach(), out.entropy.detach(), *(p.grad.clone() for p in policy.parameters())]

    theirs = gradients()
    with patch_verl(losses=False):
        mine = gradients()
    for found, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


PROMPTS, RESPONSES = (3, 2, 4), (5, 1, 7)
LENGTHS = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]


def nested(values: torch.Tensor, lengths) -> torch.Tensor:
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return torch.nested.nested_tensor_from_jagged(values, bounds, min_seqlen=min(lengths), max_seqlen=max(lengths))


def micro_batch(ids: torch.Tensor, old: torch.Tensor, ref: torch.Tensor, info: dict) -> TensorDict:
    """A batch as verl's engine hands it to its loss; ``old`` and ``ref`` are of response tokens, end to end."""
    draw, ids = torch.Generator("cpu").manual_seed(4), ids.split(LENGTHS)
    prompts = torch.cat([row[:length] for row, length in zip(ids, PROMPTS, strict=True)])
    responses = torch.cat([row[length:] for row, length in zip(ids, PROMPTS, strict=True)])
    advantages = torch.randn(3, generator=draw).repeat_interleave(torch.tensor(RESPONSES))
    mask = torch.rand(sum(RESPONSES), generator=draw) < 0.8
    of_responses = {"old_log_probs": old, "ref_log_prob": ref, "advantages": advantages, "response_mask": mask}
    tensors = {name: nested(value, RESPONSES) for name, value in {**of_responses, "responses": responses}.items()}
    data = TensorDict({**tensors, "prompts": nested(prompts, PROMPTS)}, batch_size=[3])
    whole = dict(dp_size=1, batch_num_tokens=None, global_batch_size=None)
    tu.assign_non_tensor(data, **{**whole, **{key: info[key] for key in whole if key in info}})
    return data


def of_responses(values: torch.Tensor) -> torch.Tensor:
    """The packed values that predict response tokens, end to end."""
    parts = zip(values.split(LENGTHS), PROMPTS, strict=True)
    return torch.cat([part[prompt - 1 : -1] for part, prompt in parts])


@pytest.mark.parametrize("kind", ["low_var_kl", "k3+", "kl", "abs", "mse"])
@pytest.mark.parametrize("mode", ["vanilla", "gspo", "cispo"])
@pytest.mark.parametrize("info", [{}, WHOLE], ids=["own", "global"])
def test_ppo_loss(mode, kind, info):
    """verl's whole loss, KL and entropy bonus behind the policy term: patched, not, and of ``loss_config`` alone."""
    draw = torch.Generator("cpu").manual_seed(5)
    packed = -6 * torch.rand(sum(LENGTHS), generator=draw)
    old = of_responses(packed) + 0.3 * torch.randn(sum(RESPONSES), generator=draw)
    ref = of_responses(packed) + 4 * torch.randn(sum(RESPONSES), generator=draw)
    data = micro_batch(torch.randint(120, (sum(LENGTHS),), generator=draw), old, ref, info)
    options = actor(mode, use_kl_loss=True, kl_loss_type=kind, kl_loss_coef=0.2, entropy_coeff=0.05)

    def found():
        log_probs, entropy = packed.clone().requires_grad_(), (packed.abs() / 3).requires_grad_()
        output = {"log_probs": nested(log_probs, LENGTHS), "entropy": nested(entropy, LENGTHS)}
        loss, metrics = ppo_loss(options, output, data)
        values = {name: getattr(metric, "values", metric) for name, metric in metrics.items()}
        return loss.detach(), torch.autograd.grad(loss, (log_probs, entropy)), values

    theirs = found()
    with patch_verl(operators=False):
        mine = found()
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=1e-6)
    for own, wanted in zip(mine[1], theirs[1], strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-7)
    assert set(mine[2]) == set(theirs[2])
    for name, value in theirs[2].items():
        assert mine[2][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    if info:
        return
    padded = data.select("old_log_probs", "ref_log_prob", "advantages", "response_mask").to_padded_tensor()
    rows = [nested(of_responses(values), RESPONSES).to_padded_tensor(0.0) for values in (packed, packed.abs() / 3)]
    out = policy_loss(
        rows[0],
        padded["advantages"],
        padded["response_mask"],
        entropy=rows[1],
        old_log_probs=padded["old_log_probs"],
        ref_log_probs=padded["ref_log_prob"],
        config=loss_config(options),
    )
    torch.testing.assert_close(out.loss, theirs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wants_entropy", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_outputs_of_the_fsdp_engine(wants_entropy, temperature):
    """The step of verl's FSDP engine that makes log-probs and entropies of a model's logits, without an engine."""
    from verl.workers.engine.fsdp import transformer_impl

    draw, count = torch.Generator("cpu").manual_seed(7), sum(LENGTHS)
    logits, labels = 2 * torch.randn(1, count, 90, generator=draw), torch.randint(90, (count,), generator=draw)
    options = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
    batch = TensorDict({"input_ids": nested(labels, LENGTHS)}, batch_size=[3])
    tu.assign_non_tensor(batch, calculate_entropy=wants_entropy)
    given = {"input_ids_rmpad_rolled": labels, "temperature_rmpad": torch.full((count,), temperature), "pad_size": 0}

    def found():
        leaf = logits.clone().requires_grad_()
        engine = SimpleNamespace(engine_config=options, compute_entropy_from_logits=verl_F.entropy_from_logits)
        engine._gather_and_unpad_packed = lambda values, pad_size: values
        output = SimpleNamespace(logits=leaf * 1.0)
        arguments = {**given, "temperature_is_one": temperature == 1.0}
        outputs = transformer_impl.FSDPEngineWithLMHead.prepare_model_outputs(engine, output, arguments, batch, None)
        values = {name: nested_values.values() for name, nested_values in outputs.items()}
        loss = sum((part * torch.linspace(-1, 2, count)).sum() for part in values.values())
        return values, torch.autograd.grad(loss, leaf)[0]

    theirs = found()
    with patch_verl():
        assert transformer_impl.logprobs_from_logits.__module__ == "grpo_kernels.integrations.operators"
        mine = found()
    assert set(mine[0]) == set(theirs[0]) == ({"log_probs", "entropy"} if wants_entropy else {"log_probs"})
    for name, wanted in theirs[0].items():
        torch.testing.assert_close(mine[0][name], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-5, atol=1e-6)


def test_ten_steps():
    """A model trained by verl's fused forward and loss, patched and not: the same weights."""
    from verl.models.transformers.dense_common import forward_with_torch_backend

    ids = torch.randint(120, (1, sum(LENGTHS)), generator=torch.Generator("cpu").manual_seed(6))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    options = actor("vanilla", use_kl_loss=True, kl_loss_coef=0.1, entropy_coeff=0.01)

    def trained():
        policy = model()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        losses = []
        for _ in range(10):
            out = forward_with_torch_backend(
                policy, input_ids=ids, position_ids=positions, return_dict=True, use_cache=False
            )
            output = {"log_probs": nested(out.log_probs[0], LENGTHS), "entropy": nested(out.entropy[0], LENGTHS)}
            if not losses:
                old = of_responses(out.log_probs[0].detach())
                data = micro_batch(ids[0], old, old - 0.1, {})
            loss, _ = ppo_loss(options, output, data)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return torch.tensor(losses), [parameter.detach().clone() for parameter in policy.parameters()]

    theirs = trained()
    with patch_verl():
        mine = trained()
    assert theirs[0][-1] < theirs[0][0] - 0.05
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-5)
    for own, wanted in zip(mine[1], theirs[1], strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-5)


IMPORTED = """
import verl
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.engine.fsdp import transformer_impl
print(get_policy_loss_fn("gspo").__name__, transformer_impl.logprobs_from_logits.__module__)
"""


def test_verl_imports_the_plugin():
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "grpo_kernels.integrations.verl_plugin"}
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORTED], capture_output=True, env=environment, check=True, text=True
    )
    assert found.stdout.splitlines()[-1] == "grpo_kernels_gspo grpo_kernels.integrations.operators"


@pytest.mark.parametrize("mode", LOSSES)
def test_shadow_finds_no_difference(mode, caplog):
    """On a batch where verl's own loss is defined: its line is one of rounding."""
    caplog.set_level("INFO", "grpo_kernels.shadow")
    with patch_verl(shadow=1):
        evaluated(mode, batch("ragged"), "seq-mean-token-mean", actor(mode), False, torch.float32)
    assert_shadow_sees_rounding(caplog, "verl")


@pytest.mark.parametrize("mode", ["vanilla", "gspo"])
def test_match_names_the_config(mode):
    """As SWITCHING.md has it: gspo's clamp from above alone is a dual bound."""
    registered, config = get_policy_loss_fn(mode), actor(mode, clip_ratio_low=0.2, clip_ratio_high=0.28)
    aggregation = {"vanilla": "token-mean", "gspo": "seq-mean-token-mean"}[mode]

    def loss(old_log_prob, log_prob, advantages, response_mask):
        return registered(old_log_prob, log_prob, advantages, response_mask, aggregation, config)

    wanted = LossConfig(Clip(0.2, 0.28, dual=3.0), aggregation="token_mean")
    if mode == "gspo":
        wanted = LossConfig(Clip(0.2, 0.28, dual=math.exp(10)), level="sequence_token", log_ratio_limit=None)
    report = match(loss)
    assert report, str(report)
    assert report.config == wanted
    assert report.gradient_difference < 1e-6
