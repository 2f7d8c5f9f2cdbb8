"""A temperature for each sequence or token: every row is that of a call with its number, bit for bit.

Where the mask is 0 a temperature is NaN, 0 or anything else, in every test here.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from cases import LEVELS, Case, make, sampler
from conftest import usable_backends
from test_layout import packed_of
from test_linear import Problem
from test_vocabulary import CUTS
from threads import errors_of, run_threads
from torch import Tensor

from grpo_kernels import (
    KL,
    Divergence,
    LossConfig,
    MinP,
    Recorded,
    Teacher,
    TokenLogProbs,
    TopK,
    TopP,
    TruncatedIS,
    grpo_loss,
    linear_grpo_loss,
    linear_token_divergence,
    linear_token_log_probs,
    token_divergence,
    token_log_probs,
)
from grpo_kernels.calls import provenance
from grpo_kernels.verification.tolerance import compare, truth_of

NUMBERS = tuple(torch.tensor([0.5, 0.9, 1.0, 1.7]).tolist())
NOWHERE = (math.nan, 0.0, -1.0, math.inf)
"""What stands where the mask is 0."""
BACKEND = "cpu" if "cpu" in usable_backends() else "torch"
"""Of threads (test_sequence_group.py says why), and where no test asks for another."""
SHAPES = ("(B,)", "(B, 1)", "(B, T)")


def of_rows(mask: Tensor, shape: str = "(B, T)", seed: int = 0) -> Tensor:
    """Temperatures of a (B, T) mask's rows."""
    g = torch.Generator().manual_seed(seed)
    size = {"(B,)": mask.shape[:1], "(B, 1)": (len(mask), 1), "(B, T)": mask.shape}[shape]
    values = torch.tensor(NUMBERS)[torch.randint(len(NUMBERS), size, generator=g)]
    live = mask if shape == "(B, T)" else mask.any(-1).view(size)
    dead = torch.tensor(NOWHERE)[torch.randint(len(NOWHERE), size, generator=g)]
    return torch.where(live, values, dead)


def wide(temperature: Tensor, mask: Tensor) -> Tensor:
    """(B, T) of any shape."""
    return (temperature if temperature.dim() == 2 else temperature[:, None]).expand(mask.shape)


def rows_with(temperature: Tensor, mask: Tensor, number: float) -> Tensor:
    return mask & (wide(temperature, mask) == torch.tensor(number))


def check_rows(case: Case, temperature: Tensor, run) -> None:
    """``run(temperature)`` gives (B, T, ...) tensors; rows of each number are those of the number alone."""
    found, seen = run(temperature), 0
    for number in NUMBERS:
        rows = rows_with(temperature, case.mask, number)
        seen += int(rows.sum())
        for tensor, wanted in zip(found, run(number), strict=True):
            assert torch.equal(tensor[rows], wanted[rows])
    assert seen == int(case.mask.sum()) > 10
    for tensor in found:
        assert (tensor[~case.mask] == 0).all()


PASSES = {
    "one pass": {"config": LossConfig(kl=KL(0.1), entropy_coef=0.05)},
    "two passes": {"config": LossConfig(kl=KL(0.1), entropy_coef=0.05), "grad_scale": None, "token_losses": True},
    "scale and softcap": {"logit_scale": 0.7, "logit_softcap": 3.0, "config": LossConfig(entropy_coef=0.05)},
}


@pytest.mark.sample(triton=3)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("passes", PASSES)
def test_rows_have_the_bits_of_their_number(backend, passes, dtype, shape):
    case = make(dtype=dtype)
    temperature = of_rows(case.mask, shape)
    options = {"grad_scale": 1.0, **PASSES[passes], "backend": backend}

    def run(temperature):
        leaf = case.logits.clone().requires_grad_()
        out = grpo_loss(leaf, *case.arguments, **case.options, **options, temperature=temperature)
        loss = out.token_losses.sum() if options.get("token_losses") else out.loss
        loss.backward()
        return out.log_probs, out.entropy, leaf.grad[:, :-1]

    check_rows(case, temperature, run)


def test_log_probs_in_place_and_without_gradient(backend):
    case = make(logit_softcap=4.0)
    temperature = of_rows(case.mask)
    g = torch.randn(2, *case.mask.shape)

    def run(temperature):
        options = {"temperature": temperature, "logit_softcap": 4.0, "backend": backend}
        leaf = case.logits.clone().requires_grad_()
        out = token_log_probs(leaf * 1, case.token_ids, case.mask, inplace=True, **options)
        (g[0] * out.log_probs + g[1] * out.entropy).sum().backward()
        alone = token_log_probs(case.logits, case.token_ids, case.mask, **options)
        assert torch.equal(alone.log_probs, out.log_probs)
        return out.log_probs.detach(), out.entropy.detach(), leaf.grad[:, :-1]

    check_rows(case, temperature, run)


SUPPORTS = (TopK(7), TopP(0.8), MinP(0.05), (TopK(30), TopP(0.9)), "mask", "recorded")


def support_of(case: Case, support):
    """A filter, or the 40 likeliest columns of each row and its token, as a mask or recorded."""
    if not isinstance(support, str):
        return support
    rows = case.logits[:, : case.token_ids.shape[1]]
    kept = torch.zeros_like(rows, dtype=torch.bool).scatter(-1, rows.topk(40, -1).indices, True)
    kept = kept.scatter(-1, case.token_ids[..., None], True)
    return kept if support == "mask" else Recorded.from_counts(kept.nonzero()[:, -1], kept.sum(-1))


@pytest.mark.sample(triton=2, cuda=2)
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_truncated_supports(backend, support, cap, monkeypatch):
    """Filters take each row's own z."""
    monkeypatch.setattr("grpo_kernels.calls.support.CHUNK_ELEMENTS", 1000)
    case = make(spread=1.0)
    kept, temperature = support_of(case, support), of_rows(case.mask)

    def run(temperature):
        leaf = case.logits.clone().requires_grad_()
        options = {"config": LossConfig(entropy_coef=0.05), "support": kept, "logit_softcap": cap}
        out = grpo_loss(leaf, *case.arguments, **case.options, **options, temperature=temperature, backend=backend)
        out.loss.backward()
        return out.log_probs, out.entropy, leaf.grad[:, :-1]

    check_rows(case, temperature, run)


# Beside the reference


def judged(case: Case, temperature: Tensor, backend: str | None, told: dict | None = None, **options) -> None:
    """The loss's own numbers, by the rule; ``told``: what the reference is told otherwise."""
    given = {**case.options, **options}
    leaf = case.logits.clone().requires_grad_()
    out = grpo_loss(leaf, *case.arguments, **given, temperature=temperature, backend=backend)
    out.loss.backward()
    truth = truth_of(case.logits, *case.arguments, **{**given, "temperature": temperature, **(told or {})})
    result = compare(truth, out.loss, out.log_probs, out.entropy, leaf.grad)
    assert result.holds, result


CALLS = {
    "token": {"config": LossConfig(kl=KL(0.1), entropy_coef=0.05)},
    "softcap": {"logit_softcap": 3.0, "logit_scale": 0.7, "config": LossConfig(entropy_coef=0.05)},
    **{level: {"config": LossConfig(level=level, kl=KL(0.1), entropy_coef=0.05)} for level in LEVELS[1:]},
    "threshold": {"entropy_threshold": 2.5},
    "rollout": {"config": LossConfig(rollout=TruncatedIS(1.1))},
    "skipped": {"skip_zero_advantage": True},
    "support": {"support": TopP(0.9), "config": LossConfig(entropy_coef=0.05)},
    "recorded": {"config": LossConfig(entropy_coef=0.05)},
    "teacher": {"config": LossConfig(divergence=Divergence("forward_kl", coef=0.5))},
    "teacher, own": {"config": LossConfig(divergence=Divergence("jsd", coef=0.5, teacher_temperature=1.3))},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_the_reference(backend, call, dtype):
    case = make(dtype=dtype)
    options, told = {**CALLS[call]}, {}
    if call == "recorded":
        options |= {"support": support_of(case, "recorded")}
        told = {"support": support_of(case, "mask")}
    if call.startswith("teacher"):
        g = torch.Generator().manual_seed(5)
        options |= {"teacher": Teacher(logits=torch.randn(case.logits.shape, generator=g).to(dtype))}
    if call == "rollout":
        options |= {"rollout_log_probs": sampler(case)}
    judged(case, of_rows(case.mask, SHAPES[len(call) % 3]), backend, told, **options)


def test_the_reference_of_a_packed_batch(backend):
    """(S,), (N,) and (1, N), with slack behind the last bound."""
    case = make(extra_row=False, length=8)
    case.mask[4, -1] = False
    bounds, pack, unpack = packed_of(case)
    options = {name: pack(case.options[name]) for name in ("old_log_probs", "ref_log_probs")}
    tokens = (pack(case.token_ids), case.advantages, pack(case.mask, fill=1))
    of_tokens = of_rows(case.mask)
    inside = Case(pack(case.logits), *tokens, {**options, "cu_seqlens": bounds, "config": LossConfig(kl=KL(0.1))})
    for temperature in (of_rows(case.mask, "(B,)"), of_rows(case.mask, "(B, 1)"), pack(of_tokens, fill=math.nan)):
        judged(inside, temperature, backend)
    one = Case(*(x[None] for x in (inside.logits, tokens[0])), case.advantages, tokens[2][None])
    one.options = {name: value[None] if name in options else value for name, value in inside.options.items()}
    judged(one, pack(of_tokens, fill=math.nan)[None], backend)
    packed = token_log_probs(inside.logits, tokens[0], pack(case.mask), temperature=pack(of_tokens), backend=backend)
    padded = token_log_probs(case.logits, case.token_ids, case.mask, temperature=of_tokens, backend=backend)
    assert torch.equal(unpack(packed.log_probs), padded.log_probs * unpack(torch.ones_like(packed.log_probs)))


def test_one_that_is_off_is_seen():
    """By the rule, of a single sequence of the batch, by one part in a thousand; and whose temperatures are others'."""
    case = make()
    temperature = of_rows(case.mask, "(B,)")
    off = temperature.clone()
    off[0] *= 1.001
    for told in (off, temperature.roll(1).nan_to_num(nan=1.0, posinf=1.0).clamp(min=0.5)):
        with pytest.raises(AssertionError):
            judged(case, temperature, BACKEND, {"temperature": told})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_minus_infinity(backend, dtype):
    """Banned columns stay banned, and a token of probability 0 has its -inf, at any temperature."""
    case = make(dtype=dtype)
    case.logits[..., ::5] = -math.inf
    temperature = of_rows(case.mask)
    leaf = case.logits.clone().requires_grad_()
    out = grpo_loss(leaf, *case.arguments, **case.options, temperature=temperature, backend=backend)
    alone = token_log_probs(case.logits, case.token_ids, case.mask, temperature=temperature, backend=backend)
    impossible = case.mask & (case.token_ids % 5 == 0)
    assert impossible.sum() > 3
    assert (alone.log_probs[impossible] == -math.inf).all()
    assert torch.equal(alone.log_probs, out.log_probs)
    assert alone.entropy.isfinite().all()
    out.loss.backward()
    assert (leaf.grad[..., ::5] == 0).all()
    assert leaf.grad.isfinite().all()


# Hidden states


def chunked(problem: Problem) -> dict:
    """Options that make several chunks."""
    return {"chunk_bytes": 12_000 if problem.hidden.dtype == torch.float32 else 300_000, "backend": BACKEND}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_hidden_states(level, dtype):
    """Log-probs and entropies have the bits of a number's rows; the gradients are those of the logits."""
    problem = Problem(dtype=dtype)
    live = problem.mask
    temperature = of_rows(live)
    config = LossConfig(level=level, entropy_coef=0.05)
    options = {"temperature": temperature, "config": config, "old_log_probs": problem.options["old_log_probs"]}
    leaves = (problem.hidden, problem.weight)
    out = linear_grpo_loss(
        *leaves, problem.ids, problem.advantages, live, bias=problem.bias, **options, **chunked(problem)
    )
    gradients = torch.autograd.grad(out.loss, problem.leaves)
    logits = torch.nn.functional.linear(*problem.leaves)
    whole = grpo_loss(logits, problem.ids, problem.advantages, live, **options, backend=BACKEND)
    exact = torch.autograd.grad(whole.loss, problem.leaves)
    torch.testing.assert_close(out.loss, whole.loss, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    for found, wanted in zip(gradients, exact, strict=True):
        size = float(wanted.abs().max())
        torch.testing.assert_close(found / size, wanted / size, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)

    def score(temperature):
        with torch.no_grad():
            found = linear_token_log_probs(
                *leaves, problem.ids, live, bias=problem.bias, temperature=temperature, **chunked(problem)
            )
        return found.log_probs, found.entropy

    found = score(temperature)
    for number in NUMBERS:
        rows = rows_with(temperature, live, number)
        for tensor, wanted in zip(found, score(number), strict=True):
            assert torch.equal(tensor[rows], wanted[rows])
    if level == "token":  # pooled ratios round their GEMMs in other chunks
        assert torch.equal(found[0], out.log_probs)


@pytest.mark.parametrize("support", [TopP(0.8), "mask", "recorded", "sparse"], ids=str)
def test_supports_of_hidden_states(support):
    """Filters and masks of each chunk's rows, sets taken of them, and few sets, gathered beside whole rows."""
    problem = Problem(batch=6, length=9)
    problem.mask[0] = True
    temperature = of_rows(problem.mask)
    logits = torch.nn.functional.linear(*problem.leaves)
    case = Case(logits.detach(), problem.ids, problem.advantages, problem.mask)
    kept = support_of(case, "recorded" if support == "sparse" else support)
    if support == "sparse":
        few = (torch.rand(problem.ids.shape) < 0.3) & problem.mask
        kept = Recorded.from_lists([[token, 3 + (token == 3)] for token in case.token_ids[few].tolist()], few)
    options = {"support": kept, "temperature": temperature, "config": LossConfig(entropy_coef=0.05)}
    found = linear_grpo_loss(
        *(problem.hidden, problem.weight, problem.ids, problem.advantages, problem.mask),
        **options,
        **chunked(problem),
        bias=problem.bias,
    )
    whole = grpo_loss(logits, problem.ids, problem.advantages, problem.mask, **options, backend=BACKEND)
    torch.testing.assert_close(found.log_probs, whole.log_probs, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(out.loss, problem.leaves) for out in (found, whole)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_log_probs_of_hidden_states_are_differentiable():
    problem = Problem()
    temperature, weights = of_rows(problem.mask), torch.randn(problem.mask.shape)
    head = (problem.hidden, problem.weight, problem.ids, problem.mask)
    out = linear_token_log_probs(*head, bias=problem.bias, temperature=temperature, **chunked(problem))
    found = torch.autograd.grad(((out.log_probs + 0.1 * out.entropy) * weights).sum(), problem.leaves)
    logits = torch.nn.functional.linear(*problem.leaves)
    whole = token_log_probs(logits, problem.ids, problem.mask, temperature=temperature, backend=BACKEND)
    exact = torch.autograd.grad(((whole.log_probs + 0.1 * whole.entropy) * weights).sum(), problem.leaves)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_fp16_gradients_are_scaled_by_the_coldest_row():
    """At 1e-8 a slope by a logit is 10⁸ times that by a log-prob, more than fp16 has room for above the others; 0 where
    the mask is would make the factor infinite."""
    problem = Problem(dtype=torch.float16)
    problem.advantages = 1e-4 * torch.tensor([1.0, 1.0, -1.0, 1.0])
    temperature = torch.where(problem.mask, torch.tensor([1e-8, 1.0, 1.0, 1.0])[:, None], 0.0)
    options = {"temperature": temperature, "backend": BACKEND, "config": LossConfig(aggregation="sequence_sum")}
    head = (problem.hidden, problem.weight, problem.ids, problem.advantages, problem.mask)
    found = torch.autograd.grad(linear_grpo_loss(*head, bias=problem.bias, **options).loss, problem.leaves)
    doubles = [leaf.detach().double().requires_grad_() for leaf in problem.leaves]
    logits = torch.nn.functional.linear(*doubles)
    logits = logits + (logits.half().double() - logits).detach()  # rounded as the head rounds them
    exact = torch.autograd.grad(grpo_loss(logits, *head[2:], **options).loss, doubles)
    assert exact[1].abs().max() > 1000
    for one, other in zip(found, exact, strict=True):
        size = float(other.abs().max())
        assert one.isfinite().all()
        torch.testing.assert_close(one.double() / size, other / size, rtol=0, atol=4e-3)


# A teacher


@pytest.mark.sample(triton=1, cuda=2)
@pytest.mark.parametrize("own", [None, 1.3])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_divergences(backend, kind, own):
    """The teacher's rows have the policy's temperatures, or the number that its divergence has."""
    case = make(batch=4, length=6, spread=1.0)
    divergence = Divergence(kind, coef=0.5, teacher_temperature=own)
    teacher = Teacher(logits=torch.randn(case.logits.shape, generator=torch.Generator().manual_seed(5)))
    temperature, g = of_rows(case.mask), torch.randn(case.mask.shape)

    def run(temperature):
        leaf = case.logits.clone().requires_grad_()
        tokens = (case.token_ids, case.mask)
        options = {"divergence": divergence, "temperature": temperature, "backend": backend}
        out = token_divergence(leaf, teacher, *tokens, **options)
        (g * (out.divergence + 0.1 * out.log_probs)).sum().backward()
        of_loss = case.logits.clone().requires_grad_()
        config = LossConfig(divergence=divergence, entropy_coef=0.05)
        given = {"teacher": teacher, "config": config, "old_log_probs": case.options["old_log_probs"]}
        loss = grpo_loss(of_loss, *case.arguments, **given, temperature=temperature, backend=backend)
        loss.loss.backward()
        values = (out.divergence, out.log_probs, out.teacher_entropy)
        return *(value.detach() for value in values), leaf.grad[:, :-1], of_loss.grad[:, :-1]

    check_rows(case, temperature, run)


def recorded(case: Case, temperature: float = 1.0) -> Teacher:
    """The five likeliest tokens of another policy."""
    logits = torch.randn((*case.token_ids.shape, 97), generator=torch.Generator().manual_seed(5))
    log_probs, ids = (logits / temperature).log_softmax(-1).topk(5, -1)
    return Teacher(token_ids=ids, log_probs=log_probs, temperature=temperature)


def test_recorded_teachers_that_are_renormalized(backend):
    """What was recorded at one temperature is brought to each row's."""
    case = make(spread=1.0)
    temperature, teacher = of_rows(case.mask), recorded(case, 0.8)

    def run(temperature):
        leaf = case.logits.clone().requires_grad_()
        options = {"divergence": Divergence("forward_kl", rest="renormalize"), "backend": backend}
        out = token_divergence(leaf, teacher, case.token_ids, case.mask, temperature=temperature, **options)
        out.divergence.sum().backward()
        return out.divergence.detach(), out.teacher_entropy, leaf.grad[:, :-1]

    check_rows(case, temperature, run)


def test_recorded_teachers_have_a_temperature():
    """A bucket for the rest is of one: rows of another are refused, what is not live is not asked."""
    case = make()
    options = {"divergence": Divergence("forward_kl"), "backend": BACKEND}
    teacher, tokens = recorded(case, 0.7), (case.token_ids, case.mask)
    same = torch.where(case.mask, 0.7, math.nan)
    found = token_divergence(case.logits, teacher, *tokens, temperature=same, **options)
    wanted = token_divergence(case.logits, teacher, *tokens, temperature=0.7, **options)
    torch.testing.assert_close(found.divergence, wanted.divergence)
    same[tuple(case.mask.nonzero()[4].tolist())] = 0.5
    with pytest.raises(ValueError, match=r"recorded at the divergence's temperature, 0\.5; got ones at 0\.7"):
        token_divergence(case.logits, teacher, *tokens, temperature=same, **options)
    own = {**options, "divergence": Divergence("forward_kl", teacher_temperature=0.7)}
    token_divergence(case.logits, teacher, *tokens, temperature=same, **own)


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_divergences_of_hidden_states(form):
    problem = Problem()
    states, head = torch.randn(4, 8, 6), torch.randn(97, 6)
    teacher = Teacher(logits=states @ head.T) if form == "logits" else Teacher(hidden=states, weight=head)
    temperature = of_rows(problem.mask)
    options = {"temperature": temperature, "divergence": Divergence("forward_kl")}
    whole = torch.nn.functional.linear(*problem.leaves)
    exact = token_divergence(
        whole, Teacher(logits=states @ head.T), problem.ids, problem.mask, **options, backend=BACKEND
    )
    found = linear_token_divergence(
        *(problem.hidden, problem.weight, teacher, problem.ids, problem.mask),
        **options,
        **{**chunked(problem), "chunk_bytes": 30_000},
        bias=problem.bias,
    )
    torch.testing.assert_close(found.divergence, exact.divergence, rtol=2e-5, atol=1e-5)
    gradients = [torch.autograd.grad(x.divergence.sum(), problem.leaves) for x in (found, exact)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    config = LossConfig(surrogate=None, divergence=options["divergence"], aggregation="sequence_sum")
    loss = linear_grpo_loss(
        *(problem.hidden, problem.weight, problem.ids, None, problem.mask),
        **{**chunked(problem), "chunk_bytes": 30_000},
        bias=problem.bias,
        teacher=teacher,
        temperature=temperature,
        config=config,
    ).loss
    torch.testing.assert_close(loss, exact.divergence.sum() / 4, rtol=2e-5, atol=1e-5)


# What they know of each other


@pytest.fixture
def nothing_said_yet():
    provenance._SAID.clear()


def test_old_log_probs_of_the_same_temperatures(backend, nothing_said_yet):
    """Ratios are exactly 1, and nothing is said: contents are not compared."""
    case = make()
    temperature = of_rows(case.mask)
    old = token_log_probs(case.logits, case.token_ids, case.mask, temperature=temperature, backend=backend)
    assert old.made.temperature == provenance.UNKNOWN
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Triton's interpreter has others
        given = {**case.options, "old_log_probs": old}
        out = grpo_loss(case.logits, *case.arguments, **given, temperature=temperature, backend=backend)
    assert out.metrics.ratio_min == out.metrics.ratio_max == 1


@pytest.mark.parametrize("hidden", [False, True])
def test_ids_that_are_not_shifted_are_seen(hidden):
    """Whatever the temperatures are; where the row before a token is dead, there is none."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 12, 97)
    ids = torch.distributions.Categorical(logits=logits).sample()
    mask = torch.arange(12).expand(4, 12) > 2
    temperature = of_rows(mask)
    function, rows = (linear_token_log_probs, (logits, torch.eye(97))) if hidden else (token_log_probs, (logits,))
    options = {"temperature": temperature, "check": True, "backend": BACKEND}
    function(*rows, ids, mask, **options)
    with pytest.raises(ValueError, match="likelier one row earlier"):
        function(*rows, ids.roll(1, 1), mask, **options)


# Errors


FUNCTIONS = {
    "grpo_loss": lambda b, **o: grpo_loss(b.logits, *b.arguments, **o),
    "linear_grpo_loss": lambda b, **o: linear_grpo_loss(b.logits, torch.eye(97), *b.arguments, **o),
    "token_log_probs": lambda b, **o: token_log_probs(b.logits, b.token_ids, b.mask, **o),
    "linear_token_log_probs": lambda b, **o: linear_token_log_probs(b.logits, torch.eye(97), b.token_ids, b.mask, **o),
    "token_divergence": lambda b, **o: token_divergence(b.logits, Teacher(logits=b.logits), b.token_ids, b.mask, **o),
    "linear_token_divergence": lambda b, **o: linear_token_divergence(
        b.logits, torch.eye(97), Teacher(logits=b.logits), b.token_ids, b.mask, **o
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_no_temperature_is(function):
    case = make()
    call, good = FUNCTIONS[function], of_rows(case.mask)
    call(case, temperature=good, backend=BACKEND)
    refused = [
        (torch.ones(5), ValueError, r"temperature of shape \(6,\) or \(6, 1\) or \(6, 9\); got \(5,\)"),
        (torch.ones(1), ValueError, r"temperature of shape .*got \(1,\)"),
        (torch.ones(6, 10), ValueError, r"got \(6, 10\).*token_ids are shifted and temperature is not"),
        (torch.ones(6, 9, 1), ValueError, r"got \(6, 9, 1\)"),
        (case.mask, TypeError, "temperature of real numbers; got torch.bool"),
        (good.to(torch.complex64), TypeError, "temperature of real numbers; got torch.complex64"),
        (good.clone().requires_grad_(), ValueError, r"without requires_grad.*temperature\.detach\(\)"),
        (torch.ones(6, device="meta"), ValueError, "temperature on the device of"),
    ]
    place = tuple(case.mask.nonzero()[7].tolist())
    for value in (math.nan, math.inf, 0.0, -1.0, 1e-40):
        wrong = good.clone()
        wrong[place] = value
        at = rf"temperature at live tokens > 0 .* as fp32 holds it; got .* at token \[{place[0]}, {place[1]}\]"
        refused.append((wrong, ValueError, at))
    for value, error, message in refused:
        with pytest.raises(error, match=f"(?s)^{function}: expected .*{message}"):  # over lines
            call(case, temperature=value, backend=BACKEND)
    with torch.no_grad():
        call(case, temperature=good.clone().requires_grad_(), backend=BACKEND)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_quotients_that_fp32_cannot_hold(function):
    case = make()
    cold, hot = (of_rows(case.mask).masked_fill(case.mask & (case.token_ids > 60), x) for x in (1e-20, 1e20))
    for temperature, options, quotient in (
        (cold, {"logit_scale": 1e20}, "logit_scale / temperature"),
        (hot, {"logit_scale": torch.tensor(1e-20)}, "logit_scale / temperature"),
        (cold, {"logit_softcap": 1e20}, "logit_softcap / temperature"),
    ):
        with pytest.raises(ValueError, match=rf"expected {quotient} in \[1.175e-38, 3.403e\+38\]"):
            FUNCTIONS[function](case, temperature=temperature, backend=BACKEND, **options)


def test_a_teachers_quotients():
    case = make()
    temperature = of_rows(case.mask).masked_fill(case.mask & (case.token_ids > 60), 1e-20)
    for teacher in (
        Teacher(logits=case.logits, logit_scale=1e20),
        Teacher(hidden=case.logits, weight=torch.eye(97), logit_softcap=1e20),
    ):
        with pytest.raises(ValueError, match="/ temperature in "):
            linear_token_divergence(
                *(case.logits, torch.eye(97), teacher, case.token_ids, case.mask),
                temperature=temperature,
                backend=BACKEND,
            )


def test_packed_ids_without_bounds_have_one_a_token():
    case = make(batch=1, extra_row=False)
    rows, ids = case.logits[0], case.token_ids[0]
    for shape in ((1,), (1, 1), (9, 1)):
        with pytest.raises(ValueError, match=r"temperature of shape \(9,\) or \(1, 9\)"):
            token_log_probs(rows, ids, temperature=torch.ones(shape), backend=BACKEND)
    for shape in ((9,), (1, 9)):
        token_log_probs(rows, ids, temperature=torch.ones(shape), backend=BACKEND)


def test_kinds_of_numbers():
    """Integers, and half precision, are what they are in fp32; a 0-d tensor is one for all."""
    case = make()
    whole = torch.randint(1, 3, (6,), generator=torch.Generator().manual_seed(0))
    expected = token_log_probs(case.logits, case.token_ids, case.mask, temperature=whole.float(), backend=BACKEND)
    for dtype in (torch.int64, torch.bfloat16, torch.float64):
        found = token_log_probs(case.logits, case.token_ids, case.mask, temperature=whole.to(dtype), backend=BACKEND)
        assert torch.equal(found.log_probs, expected.log_probs)
    one = token_log_probs(case.logits, case.token_ids, case.mask, temperature=torch.tensor(2.0), backend=BACKEND)
    same = token_log_probs(case.logits, case.token_ids, case.mask, temperature=torch.full((6,), 2.0), backend=BACKEND)
    assert torch.equal(one.log_probs, same.log_probs)


def test_made_in_inference_mode():
    case = make()
    with torch.inference_mode():
        temperature = of_rows(case.mask)
    for config in (LossConfig(), LossConfig(level="sequence")):
        leaf = case.logits.clone().requires_grad_()
        options = {**case.options, "config": config, "temperature": temperature, "backend": BACKEND}
        grpo_loss(leaf, *case.arguments, **options).loss.backward()
        assert leaf.grad.abs().max() > 0


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_tokens(backend, shape):
    logits, ids = torch.randn(*shape, 7), torch.zeros(shape, dtype=torch.int64)
    for temperature in (torch.zeros(shape[0]), torch.zeros(shape)):
        out = grpo_loss(logits, ids, torch.ones(shape[0]), temperature=temperature, backend=backend)
        assert out.loss == 0
        assert out.log_probs.shape == shape


# torch.compile


def test_compiled():
    """One graph, of any numbers, and of sequences or tokens one each."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, case = CompileCounter(), make()

    @torch.compile(fullgraph=True, backend=counter)
    def score(logits, temperature):
        options = {**case.options, "temperature": temperature, "backend": BACKEND}
        out = grpo_loss(logits, *case.arguments, **options)
        alone = token_log_probs(logits, case.token_ids, case.mask, temperature=temperature, backend=BACKEND)
        return out.loss, alone.log_probs

    for shape in ("(B,)", "(B, T)"):
        before = counter.frame_count
        for seed in range(3):
            temperature = of_rows(case.mask, shape, seed)
            loss, log_probs = score(case.logits, temperature)
            options = {"temperature": temperature, "backend": BACKEND}
            assert torch.equal(loss, grpo_loss(case.logits, *case.arguments, **case.options, **options).loss)
            eager = token_log_probs(case.logits, case.token_ids, case.mask, **options)
            assert torch.equal(log_probs, eager.log_probs)
        assert counter.frame_count == before + 1


# Ranks


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("cuts", ["two", "uneven"])
@pytest.mark.parametrize("support", [None, TopK(7), TopP(0.8)], ids=str)
def test_a_vocabulary_over_ranks(support, cuts, cap):
    bounds, case = CUTS[cuts], make(spread=1.0)
    temperature = of_rows(case.mask)
    given = {**case.options, "config": LossConfig(kl=KL(0.1), entropy_coef=0.05), "logit_softcap": cap}
    given |= {"support": support, "temperature": temperature}
    truth = truth_of(case.logits, *case.arguments, **given)

    def of_rank(rank: int):
        leaf = case.logits[..., bounds[rank] : bounds[rank + 1]].clone().requires_grad_()
        out = grpo_loss(leaf, *case.arguments, **given, vocab_group=torch.distributed.group.WORLD, backend=BACKEND)
        out.loss.backward()
        return out, leaf.grad

    ranks = run_threads(len(bounds) - 1, of_rank)
    out = ranks[0][0]
    gradient = torch.cat([part for _, part in ranks], -1)
    assert compare(truth, out.loss, out.log_probs, out.entropy, gradient).holds
    for other, _ in ranks[1:]:
        assert torch.equal(other.log_probs, out.log_probs)
        assert torch.equal(other.loss, out.loss)


def test_hidden_states_of_a_vocabulary_over_ranks():
    problem = Problem()
    temperature = of_rows(problem.mask)
    tokens = (problem.ids, problem.advantages, problem.mask)
    options = {"temperature": temperature, "backend": BACKEND}
    whole = linear_grpo_loss(problem.hidden, problem.weight, *tokens, bias=problem.bias, **options)
    exact = torch.autograd.grad(whole.loss, problem.leaves)

    def of_rank(rank: int):
        rows = slice(0, 40) if rank == 0 else slice(40, None)
        leaves = [x.detach().clone().requires_grad_() for x in (problem.hidden, problem.weight[rows])]
        over = {"vocab_group": torch.distributed.group.WORLD, "chunk_bytes": 12_000}
        out = linear_grpo_loss(*leaves, *tokens, bias=problem.bias.detach()[rows], **over, **options)
        alone = linear_token_log_probs(
            *leaves, problem.ids, problem.mask, bias=problem.bias.detach()[rows], **over, **options
        )
        assert torch.equal(alone.log_probs, out.log_probs)
        return out.loss.detach(), torch.autograd.grad(out.loss, leaves)

    ranks = run_threads(2, of_rank)
    torch.testing.assert_close(ranks[0][0], whole.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ranks[1][1][0], exact[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([of[1] for _, of in ranks]), exact[1], rtol=1e-4, atol=1e-5)


def test_ranks_of_a_vocabulary_have_the_same():
    """Where tokens are live; anything elsewhere."""
    case = make()
    temperature = of_rows(case.mask)

    def call(rank: int, wrong: bool):
        mine = temperature.clone()
        mine[~case.mask] = float(rank)
        if wrong and rank == 1:
            mine[tuple(case.mask.nonzero()[3].tolist())] = 0.7
        columns = case.logits[..., 40 * rank : 40 + 57 * rank]
        over = {"vocab_group": torch.distributed.group.WORLD, "check": True, "backend": BACKEND}
        for function in (grpo_loss, token_log_probs):
            tokens = case.arguments if function is grpo_loss else (case.token_ids, case.mask)
            function(columns, *tokens, temperature=mine, **over)

    assert errors_of(2, lambda rank: call(rank, wrong=False)) == [None, None]
    for error in errors_of(2, lambda rank: call(rank, wrong=True)):
        assert "expected the same temperature on every rank of vocab_group" in error


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_sequence_over_ranks(level, shape):
    """(B, T) are this rank's tokens', (B,) the sequences'."""
    case = make(length=12, extra_row=False)
    temperature = of_rows(case.mask, shape)
    given = {**case.options, "config": LossConfig(level=level, kl=KL(0.1)), "backend": BACKEND}
    leaf = case.logits.clone().requires_grad_()
    whole = grpo_loss(leaf, *case.arguments, **given, temperature=temperature)
    whole.loss.backward()

    def of_rank(rank: int):
        def own(x):
            return x[:, rank::2] if isinstance(x, Tensor) and x.shape[:2] == case.mask.shape else x

        rows = own(case.logits).clone().requires_grad_()
        out = grpo_loss(
            *(rows, *map(own, case.arguments)),
            **{name: own(value) for name, value in given.items()},
            temperature=own(temperature),
            sequence_group=torch.distributed.group.WORLD,
            check=True,
        )
        out.loss.backward()
        return out, rows.grad

    ranks = run_threads(2, of_rank)
    torch.testing.assert_close(sum(out.loss for out, _ in ranks), whole.loss, rtol=1e-5, atol=1e-6)
    for rank, (out, gradient) in enumerate(ranks):
        assert torch.equal(out.log_probs, whole.log_probs[:, rank::2])
        torch.testing.assert_close(gradient, leaf.grad[:, rank::2], rtol=1e-4, atol=1e-6)


def test_ranks_of_a_sequence_have_the_same():
    case = make(batch=1, length=6, extra_row=False, empty=False)
    bounds, ids = torch.tensor([0, 2, 6]), case.token_ids
    refused = {
        "temperature": lambda rank: torch.tensor([0.5, 0.7 + 0.1 * rank]),
        "kind of temperature": lambda rank: torch.ones(2) if rank else torch.ones(1, 6),
        r"temperature (2,), one a sequence, or (1, N) with sequence_group=": lambda rank: torch.ones(6),
    }
    for said, temperature in refused.items():

        def call(rank: int, temperature=temperature):
            options = {"cu_seqlens": bounds, "sequence_group": torch.distributed.group.WORLD, "check": True}
            advantages = torch.tensor([1.0, -1.0])
            grpo_loss(case.logits, ids, advantages, **options, temperature=temperature(rank), backend=BACKEND)

        for error in errors_of(2, call):
            assert f"expected {said}" in error or f"the same {said} on every rank" in error


# In a model


@pytest.mark.parametrize("from_logits", [False, True])
def test_attached(from_logits):
    """As a keyword of a call or an option, padded and packed; each state's proof is of the model's own logits."""
    pytest.importorskip("transformers")
    from test_hf import inputs, tiny, tokens_of

    from grpo_kernels import hf

    model, given = tiny(), inputs()
    tokens = tokens_of(given)
    temperature = of_rows(tokens["mask"] != 0, "(B,)")
    with torch.no_grad():
        logits = model(**given).logits
    expected = grpo_loss(logits, **tokens, temperature=temperature, backend=BACKEND)
    hf.attach(model, from_logits=from_logits, proof_every=1, backend=BACKEND)
    called = {**tokens, "temperature": temperature}
    loss = model(**given, grpo=called)
    scored = model(**given, grpo=hf.batch(**called, output="log_probs").to("cpu"))
    assert isinstance(scored, TokenLogProbs)
    for out in (loss, scored):
        torch.testing.assert_close(out.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.loss, expected.loss, rtol=1e-5, atol=1e-5)
    hf.attach(hf.detach(model), from_logits=from_logits, temperature=temperature, backend=BACKEND)
    assert torch.equal(model(**given, grpo=tokens).log_probs, loss.log_probs)


@pytest.mark.parametrize("from_logits", [False, True])
def test_attached_to_a_packed_batch(from_logits):
    """Temperatures of sequences are there for log-probs, too, which have no bounds, and for weights made of them."""
    pytest.importorskip("transformers")
    from test_hf import tiny

    from grpo_kernels import align, hf

    torch.manual_seed(1)
    model, bounds = tiny(), torch.tensor([0, 5, 12])
    input_ids = torch.randint(3, 99, (1, 12))
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    ids, mask = align(input_ids, torch.ones(1, 12), bounds)
    temperature = torch.tensor([0.5, 1.7])
    with torch.no_grad():
        logits = model(input_ids=input_ids, position_ids=positions, use_cache=False).logits
    of_tokens = temperature[[0] * 5 + [1] * 7][None]
    wanted = token_log_probs(logits, ids, mask, temperature=of_tokens, backend=BACKEND)
    hf.attach(model, from_logits=from_logits, backend=BACKEND)
    seen = []
    grpo = {"token_ids": ids, "mask": mask, "cu_seqlens": bounds, "temperature": temperature}
    call = {"input_ids": input_ids, "position_ids": positions}
    scored = model(**call, grpo={**grpo, "output": "log_probs"})

    def weights(of_policy: TokenLogProbs) -> Tensor:
        seen.append(of_policy.log_probs)
        return torch.ones_like(of_policy.log_probs)

    loss = model(**call, grpo={**grpo, "advantages": torch.tensor([1.0, -1.0]), "token_weights": weights})
    for log_probs in (scored.log_probs, loss.log_probs, *seen):
        torch.testing.assert_close(log_probs, wanted.log_probs, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1
