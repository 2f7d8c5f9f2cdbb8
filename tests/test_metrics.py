"""Metrics: what each means, merging, and the same sums in C++ and PyTorch."""

from __future__ import annotations

import rlcompleter

import numpy as np
import pytest
import torch
from cases import make
from threads import errors_of
from torch.utils._pytree import tree_map_only

from grpo_kernels import (
    KL,
    Clip,
    Divergence,
    LossConfig,
    MaskedIS,
    Metrics,
    Teacher,
    backends,
    grpo_loss,
    reference,
)
from grpo_kernels.backends.contract import TokenInputs, TokenRecords, TokenValues
from grpo_kernels.objectives.metrics import FIELDS, REPORTED


@pytest.mark.parametrize("scheme", [False, True])
def test_against_their_definitions(backend, scheme):
    """By hand, from the outputs of the call."""
    case = make(batch=16, length=12)
    old, ref = case.options["old_log_probs"], case.options["ref_log_probs"]
    rollout = old + 0.1 * torch.randn(old.shape)
    rollout[0, 1] = float("nan")
    rho = MaskedIS(0.9, 1.1) if scheme else ()
    kls = {"kl": KL(0.1), "rollout_kl": KL(0.2, "k2")}
    config = LossConfig(Clip(0.2, 0.28), aggregation="token_mean", entropy_coef=0.05, rollout=rho, **kls)
    out, _ = case.run(backend, config=config, rollout_log_probs=rollout)
    m, live = out.metrics, case.mask
    log_probs, entropy = out.log_probs.double(), out.entropy.double()
    ratio = (log_probs - old).exp()[live]
    A = case.advantages[:, None].expand(live.shape)[live].double()
    u = (ref - log_probs)[live]
    k3 = u.exp() - u - 1
    policy = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A)
    if scheme:
        factor = (old - rollout).double().exp()[live].nan_to_num(nan=1.0)
        policy = policy * torch.where((factor < 0.9) | (factor > 1.1), 0.0, factor)
    expected = {
        "tokens": live.sum(),
        "sequences": 16,
        "policy_loss": policy.mean(),
        "kl_loss": 0.1 * k3.mean(),
        "entropy_loss": -0.05 * entropy[live].mean(),
        "kl": k3.mean(),
        "k1_old": ratio.log().mean(),
        "k3_old": (1 / ratio - 1 + ratio.log()).mean(),
        "entropy": entropy[live].mean(),
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "clip_low": ((ratio < 0.8) & (A < 0)).double().mean(),
        "clip_high": ((ratio > 1.28) & (A > 0)).double().mean(),
        "clip_dual": 0.0,
        "skipped_tokens": 0,
        "impossible_tokens": 0,
        "outside_support": 0,
        **dict.fromkeys(("divergence_loss", "divergence", "infinite_divergences", "teacher_entropy"), 0),
    }
    known = live & ~rollout.isnan()
    x = (log_probs - rollout)[known]
    weight = (old - rollout).double().exp()[known]
    expected["rollout_kl_loss"], expected["rollout_unknown"] = 0.1 * (x * x).sum() / live.sum(), (live & ~known).sum()
    expected["k1_rollout"] = x.mean()
    expected["k3_rollout"] = ((-x).exp() + x - 1).mean()
    expected["rollout_ratio_mean"], expected["rollout_ratio_max"] = weight.mean(), weight.max()
    expected["rollout_effective_sample_size"] = weight.sum() ** 2 / (known.sum() * (weight**2).sum())
    applied = torch.where((weight < 0.9) | (weight > 1.1), 0.0, weight) if scheme else torch.ones_like(weight)
    expected["rollout_weight_mean"], expected["rollout_weight_max"] = applied.mean(), applied.max()
    ess = applied.sum() ** 2 / (known.sum() * (applied**2).sum())
    expected["rollout_weight_effective_sample_size"] = ess
    expected["rollout_rejected"] = (applied == 0).double().mean()
    expected["clip_fraction"] = expected["clip_low"] + expected["clip_high"]
    got = m.as_dict()
    assert got.keys() == REPORTED.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].item() == pytest.approx(float(value), rel=2e-6, abs=1e-6), name
    torch.testing.assert_close(
        m.policy_loss + m.kl_loss + m.rollout_kl_loss + m.entropy_loss, out.loss.double(), rtol=1e-6, atol=1e-7
    )


def test_sequence_levels_count_sequences(backend):
    case = make(batch=12, noise=0.5)
    for level, pooled in (("sequence", torch.mean), ("sequence_product", torch.sum)):
        out, _ = case.run(backend, config=LossConfig(Clip(), level=level))
        ratios = []
        for i in range(12):
            live = case.mask[i]
            if live.any():
                difference = (out.log_probs[i] - case.options["old_log_probs"][i])[live].double()
                ratios.append(pooled(difference).exp())
        ratios = torch.stack(ratios)
        A = case.advantages[case.mask.any(-1)]
        clipped = ((ratios < 0.8) & (A < 0)) | ((ratios > 1.2) & (A > 0))
        m = out.metrics
        u = (case.options["ref_log_probs"] - out.log_probs)[case.mask].double()
        assert m.kl.item() == pytest.approx(
            (u.exp() - u - 1).mean().item(), rel=1e-5
        )  # tokens are still what it counts
        assert m.tokens.item() == case.mask.sum()
        assert m.ratio_mean.item() == pytest.approx(ratios.mean().item(), rel=1e-5)
        assert m.ratio_max.item() == pytest.approx(ratios.max().item(), rel=1e-5)
        assert m.clip_fraction.item() == pytest.approx(clipped.double().mean().item())
        assert m.clip_fraction.item() > 0


def test_metrics_use_raw_ratios(backend):
    case = make(noise=2.0)
    limited, _ = case.run(backend, config=LossConfig(Clip(), log_ratio_limit=0.5))
    free, _ = case.run(backend, config=LossConfig(Clip(), log_ratio_limit=None))
    for name in ("ratio_mean", "ratio_min", "ratio_max", "k3_old"):
        assert getattr(limited.metrics, name) == getattr(free.metrics, name)
    assert free.metrics.ratio_max > 2


def test_an_impossible_token_has_a_rollout_weight(backend):
    """w = exp(old - rollout), so the log-prob itself does not matter."""
    case = make(rollout_log_probs=torch.full((6, 9), -2.1))
    case.logits[0, 0, case.token_ids[0, 0]] = float("-inf")
    case.options["old_log_probs"][:] = -2.0
    out, _ = case.run(backend)
    torch.testing.assert_close(out.metrics.rollout_effective_sample_size.float(), torch.tensor(1.0))
    assert out.metrics.k3_old == float("inf")


@pytest.mark.parametrize("position", [0, -1])
def test_nan_ratios_are_both_extremes(backend, position):
    case = make()
    row = case.mask.nonzero()[position]
    case.logits[row[0], row[1]] = float("nan")
    out, _ = case.run(backend)
    assert out.metrics.ratio_min.isnan()
    assert out.metrics.ratio_max.isnan()


def test_merging_extremes():
    """A part that counted nothing must not lend its zeros to minima and maxima."""
    case = make()
    whole, _ = case.run()
    case.mask[:] = False
    nothing, _ = case.run()
    for merged in (whole.metrics + nothing.metrics, nothing.metrics + whole.metrics, sum([whole.metrics])):
        assert merged.ratio_min == whole.metrics.ratio_min
        assert merged.ratio_max == whole.metrics.ratio_max
    assert nothing.metrics.ratio_min == 0


def test_are_detached_and_on_the_device():
    out, _ = make().run()
    for value in out.metrics.as_dict().values():
        assert value.dim() == 0
        assert not value.requires_grad
    assert not out.log_probs.requires_grad
    assert not out.entropy.requires_grad
    assert "clip_fraction=" in repr(out.metrics)


def test_numbers_of_several_dtypes_keep_all_digits():
    third = torch.tensor(1 / 3, dtype=torch.float64)
    values = {name: torch.tensor(2.0) for name in FIELDS} | {FIELDS[3]: third, FIELDS[5]: 1.5}
    vector = Metrics.of(**values).vector
    assert vector.dtype == torch.float64
    assert vector[3] == third
    assert vector[5] == 1.5


def test_of_another_version():
    """A vector that a pickle kept from before there were as many numbers: they have other places."""
    now = Metrics(torch.ones(len(FIELDS)))
    before = Metrics(now.vector[:27])
    for ask in (lambda: before.kl, lambda: before.as_dict(), lambda: now + before, lambda: sum([before, now])):
        with pytest.raises(ValueError, match=r"a vector of \d+ numbers; got \(27,\)(.|\n)*another version"):
            ask()


class ElsewhereTensor(torch.Tensor):
    """A tensor of a device that this machine lacks (called meta): it counts what is copied to the host."""

    copies = 0

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device="meta")

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = {name: "cpu" if name == "device" else value for name, value in (kwargs or {}).items()}
        out = function(*tree_map_only(cls, lambda tensor: tensor.held, args), **kwargs)
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten._local_scalar_dense.default):
            cls.copies += 1
            return out
        return tree_map_only(torch.Tensor, cls, out)


def test_floats_are_one_copy_from_the_device(monkeypatch):
    """Whatever they are formed of; asked for one by one each would be a copy."""
    case = make(rollout_log_probs=torch.full((6, 9), -2.1))
    out, _ = case.run(config=LossConfig(Clip(), kl=KL(0.1)))
    elsewhere = Metrics(ElsewhereTensor(out.metrics.vector))
    monkeypatch.setattr(ElsewhereTensor, "copies", 0)
    found = elsewhere.floats()
    assert ElsewhereTensor.copies == 1
    assert found == {name: float(value) for name, value in out.metrics.as_dict().items()}
    assert {type(value) for value in found.values()} == {float}
    assert float(elsewhere.tokens) + float(elsewhere.kl_loss) == found["tokens"] + found["kl_loss"]
    assert ElsewhereTensor.copies == 3


def test_floats_of_a_logger():
    out, _ = make().run()
    assert list(out.metrics.floats("train/")) == [f"train/{name}" for name in REPORTED]
    assert out.metrics.floats(prefix="a.")["a.kl"] == out.metrics.kl.item()


TYPED = """
from grpo_kernels import Metrics
def kl(metrics: Metrics) -> int:
    metrics.clipfrac
    metrics.kl = metrics.entropy
    return metrics.kl
"""


def test_names_are_known_before_they_are_asked_for(tmp_path):
    """To editors, which look at the class, and to type checkers, which know that each is a tensor."""
    metrics = make().run()[0].metrics
    assert set(REPORTED) <= set(dir(metrics))
    assert rlcompleter.Completer({"m": metrics}).complete("m.clip_fr", 0) == "m.clip_fraction"
    assert Metrics.kl.__doc__ == REPORTED["kl"]
    with pytest.raises(AttributeError):
        metrics.kl = metrics.entropy
    api = pytest.importorskip("mypy.api")
    (tmp_path / "names.py").write_text(TYPED)
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")  # it takes 20 seconds
    report, _, _ = api.run([str(tmp_path / "names.py"), "--config-file", str(tmp_path / "mypy.ini")])
    assert '"Metrics" has no attribute "clipfrac"' in report
    assert report.count("error") == 3, report


def test_no_group_to_reduce_over():
    """Before torch.distributed is initialised, its WORLD is None as well: to name it would be no help."""
    metrics = make().run()[0].metrics
    with pytest.raises(ValueError, match=r"(?s)torch.distributed to be initialised with group=.*init_process_group"):
        metrics.all_reduce(torch.distributed.group.WORLD)

    def without_a_group(rank):
        metrics.all_reduce(None)

    assert all("TypeError: Metrics.all_reduce: expected a group; got None" in e for e in errors_of(2, without_a_group))


def test_unknown_metric():
    out, _ = make().run()
    with pytest.raises(AttributeError, match="no metric 'clipfrac'; there are policy_loss"):
        out.metrics.clipfrac
    with pytest.raises(TypeError):
        out.metrics + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("missing", ["nothing", "old", "ref", "rollout", "all"])
@pytest.mark.sample(triton=1)
def test_sums_are_pytorchs(backend, missing, dtype):
    """token_sums of C++ and Triton against backends/eager.py: fp64 sums of the same terms in another order."""
    for tokens in (0, 1, 511, 512, 513, 40_000):
        for estimator in (1, 2, 3, 4):
            inputs = token_records(tokens, missing, dtype)
            (loss_a, sums_a), (loss_b, sums_b) = (
                sums_of(backends.get(name), inputs, estimator, dtype) for name in (backend, "torch")
            )
            for name, a, b in zip(FIELDS, sums_a.tolist(), sums_b.tolist(), strict=True):
                assert a == pytest.approx(b, rel=1e-12, abs=1e-12, nan_ok=True), (name, tokens, estimator)
            torch.testing.assert_close(loss_a, loss_b)
            assert len(Metrics(sums_a).as_dict()) == len(REPORTED)


def token_records(tokens: int, missing: str, dtype: torch.dtype) -> list:
    """What a backend's token_sums takes before the KL estimator, with some of the optional tensors missing."""

    def real() -> torch.Tensor:
        return torch.randn(1, tokens, dtype=dtype)

    log_prob = -real().abs()
    flags = torch.randint(0, 5, (1, tokens)).to(torch.uint8)
    records = [log_prob, real().abs(), real(), real().abs(), flags]
    masked_in = torch.rand(1, tokens) < 0.8
    live = masked_in & (torch.rand(1, tokens) < 0.9)
    weights = [real(), *(None if missing in absent else real() for absent in (("ref", "all"), "all", "all"))]
    others = [log_prob + 0.3 * real() for _ in range(3)]
    for i, name in enumerate(("old", "ref", "rollout")):
        if missing in (name, "all"):
            others[i] = None
    factors = real().abs() * (torch.rand(1, tokens) < 0.7)
    if others[2] is not None and tokens:
        others[2][0, 0] = float("nan")
    if tokens > 5:
        records[0][0, 5] = float("-inf")
        if others[0] is not None:
            others[0][0, 5] = float("-inf")
    for record in records:
        record[~live] = 0
    values = TokenValues(records[0], records[1], live)
    inputs = TokenInputs(real(), weights[0], *others, *weights[1:])
    factors = torch.empty(0, dtype=dtype) if missing in ("old", "all") else factors
    of_sampler = torch.empty(0, dtype=dtype) if missing == "all" else torch.where(live, real(), 0.0)
    return [values, masked_in, inputs, TokenRecords(*records[2:], factors, of_sampler)]


def sums_of(backend, inputs: list, estimator: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    loss = torch.empty((), dtype=dtype)
    sums = torch.zeros(len(FIELDS), dtype=torch.float64)
    backend.token_sums(*inputs, estimator, 7, loss, sums)
    return loss, sums


def test_without_a_policy_term_ratios_are_still_those_there_are():
    """Of distillation alone: the reference had k3_old = 0."""
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 3, 11), torch.randint(11, (2, 3))
    options = {"old_log_probs": -3 * torch.rand(2, 3), "teacher": Teacher(logits=torch.randn(2, 3, 11))}
    config = LossConfig(surrogate=None, divergence=Divergence())
    ours, wanted = (f(logits, ids, None, config=config, **options).metrics for f in (grpo_loss, reference.grpo_loss))
    assert float(ours.k3_old) > 0.1
    for name, value in wanted.as_dict().items():
        torch.testing.assert_close(getattr(ours, name).double(), value.double(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("byte", [2, 255])
def test_a_mask_of_any_bytes(byte):
    """A bool of numpy's or C's may be any byte but 0."""
    raw = np.array([[byte, byte, 0, byte], [byte, 0, 0, byte]], dtype=np.uint8)
    mask = torch.from_numpy(raw.view(np.bool_))
    logits, ids = torch.randn(2, 4, 8), torch.zeros(2, 4, dtype=torch.int64)
    for options in ({}, {"skip_zero_advantage": True}):
        found, expected = (
            grpo_loss(logits, ids, torch.tensor([1.0, 0.0]), m, old_log_probs=torch.full((2, 4), -2.0), **options)
            for m in (mask, torch.from_numpy(raw != 0))
        )
        assert torch.equal(found.metrics.vector, expected.metrics.vector)
        assert found.metrics.tokens == 5
        assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("prefix", [None, 3])
def test_a_prefix_that_is_no_text(prefix):
    metrics = grpo_loss(torch.randn(1, 2, 5), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1)).metrics
    with pytest.raises(TypeError, match=f"Metrics.floats: expected a prefix that is text; got {prefix}"):
        metrics.floats(prefix)
