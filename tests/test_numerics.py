"""Adversarial numbers: the expected results are part of the API."""

from __future__ import annotations

import math

import pytest
import torch
from cases import INTERPRETED, exact_log_probs, make

from grpo_kernels import KL, Clip, LossConfig, Reinforce, Unclipped, grpo_loss, token_log_probs
from grpo_kernels.calls import tokens as reading
from grpo_kernels.verification.tolerance import compare, truth_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def assert_rule(case, backend, **options) -> torch.Tensor:
    truth = truth_of(case.logits, *case.arguments, **{**case.options, **options})
    out, gradient = case.run(backend, grad_scale=1.0, **options)
    comparison = compare(truth, out.loss, out.log_probs, out.entropy, gradient)
    assert comparison.holds, comparison
    return gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [slice(3, 4), slice(0, 5000), slice(5000, 9000), slice(1, None)])
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_masked_vocabulary(backend, dtype, columns, entropy):
    """-inf logits have probability 0 and gradient exactly 0, a leading block and all columns but one too."""
    case = make(batch=2, length=3, vocab=9001, dtype=dtype, empty=False)
    if columns == slice(1, None):
        case.token_ids[:] = 0
    else:
        case.token_ids[(case.token_ids >= columns.start) & (case.token_ids < columns.stop)] = 9000
    case.logits[..., columns] = -math.inf
    exact = truth_of(case.logits, *case.arguments, old_log_probs=None, config="grpo").log_probs
    case.options["old_log_probs"] = (exact + 0.1).to(case.options["old_log_probs"].dtype)
    gradient = assert_rule(case, backend, entropy_coef=entropy, ref_log_probs=None)
    assert (gradient[..., columns] == 0).all()
    out, _ = case.run(backend)
    assert out.entropy.isfinite().all()
    assert (out.entropy >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [-math.inf, "lowest", -1e37, -1e9])
@pytest.mark.parametrize("level", [0.0, -100.0, 60.0])
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_any_finite_mask_value(backend, dtype, masked, level, entropy):
    """A leading block of columns masked with whatever number; the others may all be low themselves."""
    lowest = torch.finfo(dtype).min
    masked = lowest if masked == "lowest" else max(masked, lowest) if masked > -math.inf else masked
    case = make(batch=1, length=3, vocab=8300, dtype=dtype, shift=level, ref_log_probs=None, old_log_probs=None)
    case.token_ids[:] = case.token_ids % 100 + 8200
    case.logits[..., :8200] = masked
    gradient = assert_rule(case, backend, entropy_coef=entropy)
    assert (gradient[..., :8200] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_rows_of_the_lowest_number(backend, dtype, entropy):
    """All columns equal: uniform, however low; the gradient is at most that of a certain row."""
    logits = torch.full((1, 2, 8), torch.finfo(dtype).min, dtype=dtype, requires_grad=True)
    out = grpo_loss(logits, torch.tensor([[1, 7]]), torch.ones(1), entropy_coef=entropy, backend=backend)
    out.loss.backward()
    torch.testing.assert_close(out.log_probs, torch.full((1, 2), -math.log(8), dtype=out.log_probs.dtype))
    assert (logits.grad.abs() <= 1 + entropy * math.log(8)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_of_infinity(backend, dtype):
    """A capped -inf is -cap, a capped +inf is cap."""
    case = make(batch=1, length=2, vocab=40, dtype=dtype, logit_softcap=8.0, empty=False)
    case.logits[0, 0, :5], case.logits[0, 1, 7] = -math.inf, math.inf
    assert_rule(case, backend)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("limit", [(20.0, None), (None, None)])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_kl_of_an_impossible_token(backend, estimator, weighted, limit, level):
    """Its KL has no slope, whatever ref is; unlimited, its k3 is infinite and not NaN."""
    kl = KL(0.1, estimator, ratio_weighted=weighted, limit=limit)
    for ref_too in (False, True):
        case = impossible()
        if ref_too:
            case.options["ref_log_probs"][0, 0] = -math.inf
        config = LossConfig(Clip(), level=level, kl=kl)
        (out, gradient), (expected, truth) = case.run(backend, config=config), case.reference(config=config)
        assert torch.equal(out.loss.isnan(), expected.loss.isnan())
        torch.testing.assert_close(out.loss, expected.loss, equal_nan=True)
        torch.testing.assert_close(gradient, truth, atol=1e-6, rtol=1e-4)
        if not ref_too and estimator == "k3":
            assert out.metrics.kl == math.inf


def impossible(dtype=torch.float32, **options):
    """A case whose first token has logit -inf."""
    case = make(dtype=dtype, **options)
    case.logits[0, 0, case.token_ids[0, 0]] = -math.inf
    return case


@pytest.mark.parametrize("surrogate", [Clip(), Unclipped()], ids=str)
@pytest.mark.parametrize("old", ["given", "none", "impossible too"])
@pytest.mark.parametrize("limit", [20.0, None])
def test_impossible_token(backend, surrogate, old, limit):
    """log-prob -inf: counted, saturated, without a direction; everything else stays finite."""
    case = impossible()
    if old == "none":
        case.options["old_log_probs"] = None
    elif old == "impossible too":
        case.options["old_log_probs"][0, 0] = -math.inf
    out, gradient = case.run(backend, config=LossConfig(surrogate, log_ratio_limit=limit), ref_log_probs=None)
    assert out.log_probs[0, 0] == -math.inf
    assert out.metrics.impossible_tokens == 1
    assert out.loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[0, 0] == 0).all()
    if old == "impossible too":
        without = impossible()
        without.mask[0, 0] = False
        assert torch.equal(gradient[1:], gradient[1:])


def test_impossible_token_of_reinforce(backend):
    out, _ = impossible().run(backend, config=LossConfig(Reinforce()))
    assert out.loss.isinf()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 40, 96])
def test_nan_stays_in_its_row(backend, dtype, bad, where):
    """NaN or +inf in a live row: that row's outputs and gradient are NaN, the loss is NaN, other rows are untouched."""
    case = make(dtype=dtype, old_log_probs=None)
    _, clean = case.run(backend)
    case.logits[0, 0, where] = bad
    out, gradient = case.run(backend)
    assert out.loss.isnan()
    assert out.log_probs[0, 0].isnan()
    assert out.entropy[0, 0].isnan()
    assert gradient[0, 0].isnan().all()
    rest = torch.ones(case.logits.shape[:2], dtype=torch.bool)
    rest[0, 0] = False
    assert torch.equal(gradient[rest], clean[rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nan_of_any_payload(backend, dtype):
    """A NaN whose payload bits are all set must not turn into a number on its way through integer arithmetic."""
    case = make(dtype=dtype)
    bits = case.logits[0, 0].view(torch.int32 if dtype == torch.float32 else torch.int64)
    bits[7] = torch.iinfo(bits.dtype).max
    out, gradient = case.run(backend)
    assert out.log_probs[0, 0].isnan()
    assert gradient[0, 0].isnan().all()


def test_row_without_a_possible_column(backend):
    case = make()
    case.logits[0, 0] = -math.inf
    out, gradient = case.run(backend)
    assert out.log_probs[0, 0].isnan()
    assert gradient[0, 0].isnan().all()
    assert gradient[0, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_rows_may_hold_anything(backend, dtype):
    case = make(dtype=dtype)
    out, gradient = case.run(backend)
    dead = ~case.mask
    case.logits[:, :9][dead] = math.nan
    case.logits[:, 9:] = math.nan
    case.token_ids[dead] = -100
    for name in ("old_log_probs", "ref_log_probs"):
        case.options[name][dead] = math.nan
    again, again_gradient = case.run(backend)
    assert torch.equal(out.loss, again.loss)
    assert torch.equal(gradient, again_gradient)
    assert torch.equal(out.metrics.vector, again.metrics.vector)


def test_padding_columns_may_hold_nan(backend):
    """Row stride > V: what lies between the rows is neither read nor written."""
    case = make(vocab=97)
    storage = torch.full((6, 10, 128), math.nan)
    storage[..., :97] = case.logits
    out, gradient = case.run(backend)
    leaf = storage.clone().requires_grad_()
    padded = grpo_loss(leaf[..., :97], *case.arguments, backend=backend, **case.options)
    padded.loss.backward()
    assert torch.equal(padded.loss, out.loss)
    assert torch.equal(leaf.grad[..., :97], gradient)
    assert (leaf.grad[..., 97:] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("offset", [-20_000.0, 20_000.0])
def test_log_probs_do_not_see_an_offset(backend, offset, temperature):
    """Logits that all are large and close: their differences are exact, and so are the log-probs."""
    logits = (torch.randn(1, 4, 500) * 16).round() / 16 + offset
    ids = torch.randint(500, (1, 4))
    out = token_log_probs(logits, ids, temperature=temperature, backend=backend)
    exact = torch.log_softmax(logits.double() / temperature, -1)
    expected = exact.gather(-1, ids[..., None]).squeeze(-1)
    torch.testing.assert_close(out.log_probs.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.entropy.double(), -(exact.exp() * exact).sum(-1), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("offset", "temperature"), [(1e3, 1.0), (1e5, 0.7), (2.0**20, 1.0), (-(2.0**20), 1.0), (0.0, 0.01)]
)
@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.1}, {"config": "gspo"}], ids=str)
def test_gradients_do_not_see_an_offset(backend, offset, temperature, options):
    """One log-sum-exp in fp32 would lose 3e-3 of a gradient at an offset of 1e5, and 8 % at 2^20; it is kept as an
    anchor and a sum."""
    case = make(vocab=61, temperature=temperature, ref_log_probs=None)
    case.logits = ((case.logits * 16).round() / 16) * temperature + offset  # differences are exact at temperature 1
    exact = exact_log_probs(case.logits[:, :9], case.token_ids, temperature)
    case.options["old_log_probs"] = (exact + 0.3 * torch.randn(exact.shape)).float()
    truth = truth_of(case.logits, *case.arguments, **case.options, **options)
    assert float(truth.scale.amax()) < 40
    assert_rule(case, backend, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e4, 6e4])
def test_large_logits(backend, dtype, size):
    """One-hot rows, rows of equal large logits, and both signs."""
    case = make(batch=3, length=2, vocab=50, dtype=dtype, empty=False)
    case.mask[:] = True
    case.logits[0] = 0
    case.logits[0, :, 3] = size
    case.logits[1] = -size
    case.logits[2] = size
    exact = truth_of(case.logits, *case.arguments, config="grpo").log_probs
    case.options["old_log_probs"] = (exact + 0.05).to(case.options["old_log_probs"].dtype)
    # no clip: rounding of the logits alone moves a ratio by more than its band
    assert_rule(case, backend, ref_log_probs=None, config=LossConfig(Unclipped()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.sample(triton=21, cuda=21)  # a size of one dtype shows what no other does, and all take five seconds
@pytest.mark.parametrize("size", [1e7, 2e9, 1e10, 1e12, 1e30, 1.5e38, 3e38])
def test_logits_of_any_finite_size(backend, dtype, size):
    """Powers relative to a value of 2e9 are off by hundreds from the rounding of that value times the slope alone."""
    rows = [[size, 0, 0, 0], [0, size, 0, 0], [size] * 4, [-size] * 4, [-size, 0, 1, -size], [size, -size, 0, size]]
    logits = torch.tensor(rows, dtype=dtype)[None].requires_grad_()
    exact = torch.log_softmax(logits.detach().double() * 0.9 / 1.3, -1)
    for column in range(4):
        ids = torch.full((1, len(rows)), column)
        out = token_log_probs(logits, ids, logit_scale=0.9, temperature=1.3, backend=backend)
        expected = exact[..., column].to(out.log_probs.dtype).double()  # a difference of 6e38 is infinite in fp32
        torch.testing.assert_close(out.log_probs.double(), expected, rtol=3e-7, atol=3e-7)
        entropy = -torch.where(exact.exp() == 0, 0.0, exact.exp() * exact).sum(-1)
        torch.testing.assert_close(out.entropy.double(), entropy, rtol=3e-7, atol=3e-7)
        (gradient,) = torch.autograd.grad(out.log_probs.sum() + out.entropy.sum(), logits)
        assert gradient.isfinite().all()
        p, one = exact.exp(), torch.eye(4, dtype=torch.float64)[column]
        inner = torch.where(p == 0, 0.0, p * (exact + entropy[..., None]))
        rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(gradient.double(), (one - p - inner) * 0.9 / 1.3, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("margin", [5.0, 20.0, 40.0, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_confident_token_keeps_its_precision(backend, dtype, margin):
    """x - lse is 0 in fp32 past 17 nats; log-prob and target gradient keep relative precision, and ℓ is never > 0."""
    case = make(batch=1, length=1, vocab=1000, dtype=dtype, spread=1.0, old_log_probs=None)
    case.logits[0, 0, case.token_ids[0, 0]] = margin
    log_probs = token_log_probs(case.logits, case.token_ids, backend=backend).log_probs
    row = case.logits[0, 0].double()
    rest = torch.cat([row[: case.token_ids[0, 0]], row[case.token_ids[0, 0] + 1 :]])
    exact = -torch.log1p((rest - margin).exp().sum())
    assert log_probs.item() <= 0
    assert log_probs.item() == pytest.approx(exact.item(), rel=2e-6 if dtype == torch.float32 else 1e-13)
    _, gradient = case.run(backend, config=LossConfig(Reinforce()), ref_log_probs=None)
    expected = case.advantages[0].double() * torch.expm1(exact)
    assert gradient[0, 0, case.token_ids[0, 0]].item() == pytest.approx(expected.item(), rel=3e-6)


@pytest.mark.parametrize("backend_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probs_are_never_positive(backend, backend_dtype):
    logits = (torch.randn(64, 333) * 30).to(backend_dtype)
    ids = logits.argmax(-1)[None]
    out = token_log_probs(logits[None], ids, backend=backend)
    assert (out.log_probs <= 0).all()
    assert (out.entropy >= 0).all()


def test_exploding_ratio(backend):
    """log-ratio +196: a clipped token has its bound's loss and gradient 0; an unclipped one saturates or is inf."""
    case = make(batch=2, length=1, vocab=9, empty=False)
    case.mask[:] = True
    exact = truth_of(case.logits, *case.arguments, config="grpo").log_probs
    case.options = {"old_log_probs": (exact - 196).float()}
    case.advantages = torch.tensor([1.0, -1.0])
    for limit in (20.0, None):
        out, gradient = case.run(backend, config=LossConfig(Clip(), aggregation="sequence_sum", log_ratio_limit=limit))
        assert (gradient[0] == 0).all()
        if limit:
            assert out.loss.item() == pytest.approx((math.exp(20) - 1.2) / 2, rel=1e-5)
            assert (gradient[1] == 0).all()  # saturated
        else:
            assert out.loss.isinf()
            assert not gradient[1, 0].isfinite().all()
    dual = LossConfig(Clip(dual=3.0), aggregation="sequence_sum", log_ratio_limit=None)
    out, gradient = case.run(backend, config=dual)
    assert out.loss.item() == pytest.approx((3.0 - 1.2) / 2)
    assert (gradient == 0).all()


@pytest.mark.parametrize("advantage", [0.0, -0.0, 1e30, math.nan])
def test_extreme_advantages(backend, advantage, monkeypatch):
    """NaN is refused where contents are looked at; on a device it stays in its row."""
    monkeypatch.setattr(reading, "may_look", lambda *_: False)
    case = make(batch=3, empty=False)
    case.mask[:] = True
    _, clean = case.run(backend)
    case.advantages[0] = advantage
    out, gradient = case.run(backend, ref_log_probs=None)
    assert torch.equal(gradient[1:], clean[1:])
    if math.isnan(advantage):
        assert out.loss.isnan()
        assert gradient[0, :9].isnan().all()
    else:
        assert gradient.isfinite().all()
        assert (gradient[0] == 0).all() == (advantage == 0)


def test_a_term_of_zero_under_an_infinite_weight(backend):
    """A coefficient over a denominator that fp32 has no room for: a KL of exactly 0 stays 0, as its gradient does."""
    logits, ids = torch.randn(1, 3, 11, requires_grad=True), torch.tensor([[1, 2, 3]])
    ref = token_log_probs(logits.detach(), ids, backend=backend).log_probs
    config = LossConfig.preset("grpo", kl=KL(1e38))
    out = grpo_loss(logits, ids, torch.ones(1), ref_log_probs=ref, config=config, normalizer=1e-3, backend=backend)
    out.loss.backward()
    assert out.loss.item() == -1000
    assert out.metrics.kl_loss.item() == 0
    assert logits.grad.isfinite().all()


def test_all_masked(backend):
    case = make()
    case.mask[:] = False
    for config in ("grpo", "dapo", "gspo", LossConfig(Clip(), aggregation="group_mean", group_size=2)):
        out, gradient = case.run(backend, config=config)
        assert out.loss.item() == 0
        assert out.loss.requires_grad
        assert (gradient == 0).all()
        assert all(value == 0 for name, value in out.metrics.as_dict().items() if name != "sequences")


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("config", ["grpo", "dapo", "gspo"])
def test_empty_and_tiny_batches(backend, shape, config):
    logits = torch.randn(*shape, 11, requires_grad=True)
    ids = torch.zeros(shape, dtype=torch.int64)
    old = torch.full(shape, -2.0)
    out = grpo_loss(logits, ids, torch.randn(shape[0]), old_log_probs=old, config=config, backend=backend)
    out.loss.backward()
    assert out.loss.isfinite()
    assert logits.grad.shape == logits.shape
    assert out.log_probs.shape == shape
    if not math.prod(shape):
        assert out.loss.item() == 0


def test_ids_outside_the_vocabulary(backend):
    case = make()
    for bad in (-1, 97, 10**9):
        case.token_ids[0, 0] = bad
        if backend in ("triton", "cuda"):  # a GPU cannot raise without waiting: that row alone is NaN
            out, gradient = case.run(backend)
            assert out.loss.isnan()
            assert torch.equal(out.log_probs.isnan().nonzero(), torch.tensor([[0, 0]]))
            assert gradient[0, 0].isnan().all()
            assert not gradient[0, 1:].isnan().any()
            with pytest.raises(IndexError, match=f"= {bad} at a live position"):
                case.run(backend, check=True)
            continue
        with pytest.raises(IndexError, match=rf"token_ids\[0, 0\] = {bad} .*\[0, 97\)"):
            case.run(backend)
        with pytest.raises(IndexError, match=f"{bad}"):
            token_log_probs(case.logits, case.token_ids, case.mask, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_denormals_and_tiny_probabilities(backend, dtype):
    """A spread of 100 nats: most probabilities underflow; the rule's smallest normal number covers them."""
    case = make(batch=2, length=3, vocab=4999, dtype=dtype, spread=25.0, empty=False)
    assert_rule(case, backend, entropy_coef=0.01)


def test_long_sequences(backend):
    """More rows than a GPU grid's second dimension holds."""
    if backend in ("triton", "cuda") and INTERPRETED:
        pytest.skip("70,000 simulated rows take minutes; benchmarks/gpu_check.py runs this on a GPU")
    length = 70_000
    logits = torch.randn(1, length, 3)
    ids = torch.randint(3, (1, length))
    out = token_log_probs(logits, ids, backend=backend)
    exact = torch.log_softmax(logits.double(), -1).gather(-1, ids[..., None]).squeeze(-1)
    torch.testing.assert_close(out.log_probs.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.nightly
def test_more_than_2_31_elements(backend):
    """Offsets past 2^31: the last of 4.6 GB of logits. Two rows count: all are ten minutes of an interpreter."""
    rows, vocab = 15_000, 151_936
    assert rows * vocab > 2**31
    logits = torch.zeros(1, rows, vocab, dtype=torch.bfloat16)
    logits[0, -1] = torch.randn(vocab).bfloat16()
    ids = torch.randint(vocab, (1, rows))
    mask = torch.zeros(1, rows, dtype=torch.bool)
    mask[0, 5] = mask[0, -1] = True
    out = token_log_probs(logits, ids, mask, backend=backend)
    exact = torch.log_softmax(logits[0, -1].double(), -1)[ids[0, -1]]
    assert out.log_probs[0, -1].item() == pytest.approx(exact.item(), rel=1e-6)
    assert out.log_probs[0, 5].item() == pytest.approx(-math.log(vocab), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_are_rounded_to_nearest(backend, dtype):
    """To even where two are as near; past the largest number they are infinite, below the smallest normal one exact to
    its last digit, and an infinite one stays that. Of two equal logits the gradient is half of what comes."""
    limits = torch.finfo(dtype)
    step, largest, tiny = limits.eps, limits.max, limits.smallest_normal
    odd, even, last = 1 + 1.5 * step, 1 + 0.5 * step, largest * (1 + step / 4)
    sizes = [odd, even, 1 + 0.500001 * step, math.inf, 0.0, tiny]
    if dtype == torch.float16:  # those of bf16 are as large and as small as fp32's own
        sizes += [largest, last, largest * (1 + step / 5)]
        sizes += [tiny * part for part in (step, step / 2, step * 1.5, step * 0.51, 1 - step / 4, 1 / 3)]
    values = torch.tensor([*sizes, *(-x for x in sizes)])
    logits = torch.zeros(1, len(values), 2, dtype=dtype, requires_grad=True)
    out = token_log_probs(logits, torch.zeros(1, len(values), dtype=torch.long), backend=backend)
    out.log_probs.backward(2 * values[None])
    assert logits.grad[0, :, 0].tolist() == values.to(dtype).tolist()
    assert logits.grad[0, :, 1].tolist() == (-values).to(dtype).tolist()
