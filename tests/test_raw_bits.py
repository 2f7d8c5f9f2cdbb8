"""Any bits in any tensor of a call, on every backend and instruction set, against float64: values and gradients.

Each property takes a recipe (``raw_bits.recipes``) and a backend. CI draws a few of each, the same ones every time, and
replays tests/corpus/raw_bits, the recipes that once failed: the text after "recipe:" in a failure is such a file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import raw_bits
import torch
from cases import Case
from conftest import DEVICE
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from grpo_kernels import KL, Clip, grpo_loss, token_log_probs
from grpo_kernels.backends import cpu
from grpo_kernels.calls import batch as reading
from grpo_kernels.objectives.kl import ESTIMATORS
from grpo_kernels.verification.tolerance import OUTPUT_UNIT, UNIT, C, compare, smallest, truth_of

CORPUS = Path(__file__).parent / "corpus" / "raw_bits"


def variants(backend: str) -> tuple[str | None, ...]:
    """The instruction sets of a backend that run here; None where there is one."""
    return cpu.available_instruction_sets() if backend == "cpu" else (None,)


@contextmanager
def instruction_set(name: str | None) -> Iterator[None]:
    if name is None:
        yield
        return
    before = os.environ.get("GRPO_KERNELS_CPU_ISA")
    os.environ["GRPO_KERNELS_CPU_ISA"] = name
    try:
        yield
    finally:
        del os.environ["GRPO_KERNELS_CPU_ISA"]
        if before is not None:
            os.environ["GRPO_KERNELS_CPU_ISA"] = before


class Answer(NamedTuple):
    """A call's results, on the CPU."""

    loss: Tensor
    log_probs: Tensor
    entropy: Tensor
    metrics: Tensor
    gradient: Tensor


def run(case: Case, backend: str, recipe: dict[str, Any]) -> Answer:
    """Loss and gradient, however the logits lie in memory and whatever the mask is made of."""
    leaf = leaf_of(case, recipe)
    tensors = (case.token_ids, case.advantages, raw_bits.as_mask(case.mask, recipe["mask"]))
    out = grpo_loss(leaf, *map(there, tensors), backend=backend, **{k: there(v) for k, v in case.options.items()})
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    return Answer(*(x.detach().cpu() for x in (out.loss, out.log_probs, out.entropy, out.metrics.vector, gradient)))


def leaf_of(case: Case, recipe: dict[str, Any]) -> Tensor:
    """The logits as the recipe lays them out, where the backend is."""
    return raw_bits.laid_out(there(case.logits), recipe["gaps"]).detach().requires_grad_()


def there(value: Any) -> Any:
    """A tensor on the device of the tests; batches and what is expected of them are the CPU's."""
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def dead_tokens(recipe: dict[str, Any], backend: str) -> bool:
    """What is masked, or belongs to no sequence, may hold any bits and any id: nothing changes, and its gradient is 0.

    Neither does where the rows lie in memory, nor the dtype of the mask.
    """
    case = raw_bits.batch_of(recipe)
    plain = {**recipe, "gaps": [0, 0, 0], "mask": "bool"}
    again = raw_bits.poked(case, recipe, ~case.mask)
    again.token_ids = case.token_ids.masked_fill(~case.mask, (-1) ** recipe["seed"] * (recipe["seed"] << 40))
    expected, out = run(case, backend, plain), run(again, backend, recipe)
    assert expected.loss.isfinite()
    for name, values in out._asdict().items():
        assert torch.equal(values, getattr(expected, name)), name
    assert (raw_bits.rows_of(case, out.gradient)[~case.mask.flatten()] == 0).all()
    return bool((~case.mask).any())


def weightless_tokens(recipe: dict[str, Any], backend: str) -> bool:
    """The same of what weighs 0 by the user's factor, where there is no other term: of tokens, or of a whole sequence
    where ratios are pooled."""
    case = raw_bits.batch_of(recipe)
    case.options |= {"kl_coef": 0.0, "rollout_kl_coef": 0.0, "entropy_coef": 0.0}
    config = case.options["config"]
    where = torch.arange(case.mask.numel()).view(case.mask.shape) % 3 == recipe["seed"] % 3
    if config.level != "token" or any(scheme.pooled for scheme in config.schemes):
        first = case.options["cu_seqlens"][1] if recipe["packed"] else case.mask.shape[1]
        where = torch.arange(case.mask.numel()).view(case.mask.shape) < first
    case.options["token_weights"] = case.options["token_weights"].masked_fill(where, 0.0)
    # A temperature is looked at where a token is live, whatever it weighs.
    names = tuple(name for name in raw_bits.POKED if name not in ("token_weights", "temperature"))
    again = raw_bits.poked(case, recipe, where & case.mask, names)
    expected, out = run(case, backend, recipe), run(again, backend, recipe)
    assert expected.loss.isfinite()
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.gradient, expected.gradient)
    assert (raw_bits.rows_of(case, out.gradient)[(where & case.mask).flatten()] == 0).all()
    return bool((where & case.mask).any())


@contextmanager
def unseen() -> Iterator[None]:
    """As on a device, where contents are not looked at: what a CPU call refuses is computed with."""
    patched = pytest.MonkeyPatch()
    try:
        patched.setattr(reading, "_check_advantages", lambda *_: None)
        patched.setattr(reading, "check_finite", lambda *_, **__: None)
        yield
    finally:
        patched.undo()


def live_tokens(recipe: dict[str, Any]) -> Case:
    """Patterns where they count. Temperatures stay: of a call they are numbers of fp32, and the batch has some."""
    case = raw_bits.batch_of(recipe)
    names = tuple(name for name in raw_bits.POKED if name != "temperature")
    return raw_bits.poked(case, recipe, case.mask, names)


def a_finite_loss(recipe: dict[str, Any], backend: str) -> bool:
    """has a finite gradient, whatever the inputs hold; but elements, and the slopes of rows, may be too large for their
    dtype."""
    case = live_tokens(recipe)
    with unseen():
        out = run(case, backend, recipe)
        if not bool(out.loss.isfinite()):
            return False
        if bool(out.gradient.isfinite().all()):
            return True
        truth = truth_of(case.logits, case.token_ids, case.advantages, case.mask, **case.options)
    elements = truth.gradient.flatten(0, -2).abs() > torch.finfo(out.gradient.dtype).max / 2
    slopes = truth.coefficient.flatten() > torch.finfo(out.log_probs.dtype).max / 2
    assert (raw_bits.rows_of(case, out.gradient).isfinite() | elements | slopes[:, None]).all()
    return True


def the_loss(recipe: dict[str, Any], backend: str) -> bool:
    """obeys the ULP rule beside the reference in float64, value and gradient; it is NaN where that is."""
    case = live_tokens(recipe)
    weights = case.options["token_weights"]
    if bool(((weights != 0) & (weights.abs() < 1e-30)).any()):
        return False  # times an aggregation's it may be 0 in fp32, which wins over a NaN
    if beyond_the_reference(case):
        return False
    with unseen():
        truth = truth_of(case.logits, case.token_ids, case.advantages, case.mask, **case.options)
        out = run(case, backend, recipe)
    if bool(truth.loss.isnan()):
        assert out.loss.isnan()
        return True
    sizes = torch.cat([truth.scale.flatten(), truth.gradient.abs().flatten(), truth.term[None], truth.loss.abs()[None]])
    if not float(sizes.max()) < 1e4 or bool(truth.edge.any()):
        return False  # not a number of fp32, or too steep for it to tell
    found = compare(truth, out.loss, out.log_probs, out.entropy, out.gradient)
    assert max(found.log_prob, found.entropy, found.loss, found.gradient) <= 1, found
    return True


def impossible_tokens(recipe: dict[str, Any], backend: str) -> bool:
    """A token of probability 0 has no slope through a ratio or a KL, whatever it is compared with, -inf too."""
    if recipe["vocab"] == 1 or recipe["form"][2] is not None:  # a capped -inf is a number
        return False
    case = raw_bits.batch_of(recipe)
    surrogate = case.options["config"].policy_term
    if surrogate.name not in ("clip", "unclipped", "sapo"):  # others have a slope by the log-prob itself
        surrogate = Clip(0.2, 0.28)
    kl = KL(0.1, ESTIMATORS[recipe["seed"] % len(ESTIMATORS)])
    case.options["config"] = dataclasses.replace(case.options["config"], surrogate=surrogate, kl=kl, entropy_coef=0.0)
    compared = ("old_log_probs", "ref_log_probs", "rollout_log_probs")
    case = raw_bits.poked(case, recipe, case.mask, ("logits", *compared)[recipe["seed"] % 2 :])
    places = case.mask.flatten().nonzero().flatten()[:: 1 + recipe["seed"] % 3]
    for i, place in enumerate(places.tolist()):
        raw_bits.put(
            case, place, case.token_ids.flatten()[place : place + 1], torch.tensor(-math.inf, dtype=case.logits.dtype)
        )
        for j, name in enumerate(compared):
            if (recipe["seed"] + i) >> j & 1:
                case.options[name].view(-1)[place] = -math.inf
    out = run(case, backend, recipe)
    if not bool(out.loss.isfinite()):
        return False
    assert (raw_bits.rows_of(case, out.gradient)[places] == 0).all()
    return True


def beyond_the_reference(case: Case) -> bool:
    """Whether float64 has lost it: 1 - tanh² of a softcap far from linear, or logits that are divided by a temperature
    before they are subtracted, beside which those of float64 have no digits to spare."""
    scale, cap = case.options["logit_scale"], case.options["logit_softcap"]
    size = case.logits.double().abs()
    size = size[size.isfinite()].amax() * scale if size.isfinite().any() else torch.zeros(())
    most = 200 if case.logits.dtype == torch.float64 else 1e300
    return bool(size / case.options["temperature"].min() > most) or (cap is not None and bool(size / cap > 8))


def rows(recipe: dict[str, Any], backend: str) -> bool:
    """of any bits have the log-probs, entropies and gradients of float64, within the rule taken row by row; a row with
    NaN or +inf among its values, or without a possible column, is NaN, and no other."""
    case = live_tokens(recipe)
    names = ("temperature", "logit_scale", "logit_softcap")
    form = {name: there(case.options[name]) for name in names}
    leaf = leaf_of(case, recipe)
    out = token_log_probs(leaf, there(case.token_ids), there(case.mask), backend=backend, **form)
    g = torch.Generator(device="cpu").manual_seed(recipe["seed"])
    upstream = [torch.randn(case.mask.shape, generator=g).to(out.entropy.dtype) for _ in range(2)]
    (gradient,) = torch.autograd.grad(list(out), leaf, [there(x) for x in upstream])

    live = case.mask.flatten()
    found = [x.detach().cpu().flatten()[live].double() for x in out]
    slopes = [x.flatten()[live].double() for x in upstream]
    logits, ids = raw_bits.rows_of(case, case.logits)[live].double(), case.token_ids.flatten()[live]
    exact = Exact(logits, ids, *recipe["form"], *slopes)
    got = raw_bits.rows_of(case, gradient.cpu())[live].double()
    spoiled = exact.log_prob.isnan()
    nans = got.isnan()
    for spoilt in (*(values.isnan() for values in found), nans.any(-1), nans.all(-1)):
        assert torch.equal(spoilt, spoiled)
    unit = 64 * 2.0**-53 if gradient.dtype == torch.float64 else UNIT
    bound = C * unit * (exact.size.amax(-1) + exact.log_prob.abs())
    whole = ~spoiled
    beyond = exact.log_prob < -torch.finfo(out.log_probs.dtype).max / 2  # -inf, or nearly
    off = torch.where(beyond & (found[0] <= exact.log_prob / 2), 0.0, (found[0] - exact.log_prob).abs())
    assert (off <= bound)[whole].all(), (found[0], exact.log_prob)
    assert ((found[1] - exact.entropy).abs() <= bound)[whole].all(), (found[1], exact.entropy)
    floor = smallest(gradient.dtype) * (1 + 4 * exact.coefficient)
    bound = OUTPUT_UNIT[gradient.dtype] * exact.gradient.abs() + C * unit * exact.size * exact.element + floor
    held = exact.gradient.abs() < torch.finfo(gradient.dtype).max / 2
    assert ((got - exact.gradient).abs() <= bound)[whole[:, None] & held].all(), (got, exact.gradient)
    return True


class Exact:
    """Rows in float64: log-prob of the token, entropy, and the gradient of their sum with these slopes.

    ``size`` is what an element's error grows with: powers and their sum, relative to the largest column or the sampled
    one, and the slope of a softcap; ``element`` the size of what is added up in it.
    """

    def __init__(
        self,
        logits: Tensor,
        ids: Tensor,
        temperature: float,
        scale: float,
        cap: float | None,
        of_log_prob: Tensor,
        of_entropy: Tensor,
    ) -> None:
        within, derivative = torch.zeros_like(logits), torch.full_like(logits, scale / temperature)
        z = logits * scale
        if cap is None:  # of differences: a common offset costs float64 digits as well
            z = (logits - logits.amax(-1, keepdim=True)) * scale
        else:
            within = 2 * (z / cap).abs() + cap / temperature
            derivative, z = derivative / torch.cosh(z / cap) ** 2, cap * torch.tanh(z / cap)
        z = z / temperature
        log_p = torch.log_softmax(z, -1)
        p, finite = log_p.exp(), log_p.clamp(min=-_UNDERFLOW)
        chosen = torch.zeros_like(p).scatter(-1, ids[:, None], 1.0) == 1
        self.log_prob = log_p.gather(-1, ids[:, None]).squeeze(-1)
        self.entropy = -(p * finite).sum(-1)
        own, entropy, g, h = (x[:, None] for x in (self.log_prob, self.entropy, of_log_prob, of_entropy))
        self.gradient = (g * (chosen.double() - p) - h * p * (finite + entropy)) * derivative
        largest = z.amax(-1, keepdim=True)
        below = torch.where(z.isinf(), 0.0, largest - z).clamp(max=_UNDERFLOW)
        log_sum = (torch.logsumexp(z, -1, keepdim=True) - largest).abs()
        self.size = 1 + below + log_sum + own.abs().clamp(max=_UNDERFLOW) + within.clamp(max=_UNDERFLOW)
        others = p * (g.abs() + h.abs() * (finite.abs() + entropy + 1))
        sampled = g.abs() + h.abs() * own.exp() * (1 + own.abs().clamp(max=_UNDERFLOW) + entropy)
        self.element = torch.where(chosen, sampled, others) * derivative.abs()
        self.coefficient = (g.abs() + h.abs() * (_UNDERFLOW + entropy)) * derivative.abs().amax(-1, keepdim=True)


_UNDERFLOW = 746.0
"""Nats below the largest at which a probability is 0 in float64."""

PROPERTIES: dict[str, Callable[[dict[str, Any], str], bool]] = {
    check.__name__: check
    for check in (rows, the_loss, a_finite_loss, impossible_tokens, dead_tokens, weightless_tokens)
}
EXAMPLES = {"cpu": 40, "torch": 40, "cuda": 20, "triton": 8}
"""Of each property, for every change; nightly NIGHTLY times as many, others every night."""
NIGHTLY = 50


def check(name: str, backend: str, examples: int, always: bool) -> int:
    """Run a property on so many recipes, on each instruction set; return how many it could judge."""
    judged = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=always,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(raw_bits.recipes())
    def of_any(recipe: dict[str, Any]) -> None:
        nonlocal judged
        for variant in variants(backend):
            with instruction_set(variant):
                judged += tell(name, backend, recipe)

    of_any()
    assert judged >= examples // 40  # a quarter on average; Hypothesis draws others where other modules are loaded
    return judged


def tell(name: str, backend: str, recipe: dict[str, Any]) -> bool:
    """As the property says; a failure names its recipe."""
    try:
        with torch.device("cpu"):
            return PROPERTIES[name](recipe, backend)
    except Exception as error:
        error.add_note(f"recipe: {json.dumps(recipe | {'property': name})}")
        raise


@pytest.mark.parametrize("name", PROPERTIES)
def test_any_bits(backend, name):
    check(name, backend, EXAMPLES[backend], always=True)


@pytest.mark.nightly
@pytest.mark.parametrize("name", PROPERTIES)
def test_any_bits_every_night(backend, name, record_property):
    record_property("examples", check(name, backend, NIGHTLY * EXAMPLES[backend], always=False))


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.json")), ids=lambda path: path.stem)
def test_what_once_failed(backend, path):
    recipe = json.loads(path.read_text())
    for variant in variants(backend):
        with instruction_set(variant):
            tell(recipe["property"], backend, recipe)
