"""What a call must not take in silence: masks that are none, numbers that are none, tensors of another kind."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from cases import make

from grpo_kernels import (
    KL,
    Clip,
    Divergence,
    GRPOLoss,
    LossConfig,
    MaskedIS,
    OffPolicyMask,
    Recorded,
    Rejection,
    Teacher,
    TopK,
    TruncatedIS,
    align,
    collate,
    grpo_loss,
    linear_grpo_loss,
    linear_token_log_probs,
    match,
    normalizer,
    pack,
    policy_loss,
    split_context,
    token_log_probs,
    unpack,
    value_loss,
)
from grpo_kernels.objectives import advantages, names
from grpo_kernels.objectives.checks import checks_enabled
from grpo_kernels.objectives.names import keywords_of
from grpo_kernels.verification import reference

INF, NAN = math.inf, math.nan


def batch(shape: tuple[int, int] = (2, 3), vocab: int = 7) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(*shape, vocab, generator=g, device="cpu").to(torch.get_default_device()),
        "token_ids": torch.randint(vocab, shape, generator=g, device="cpu").to(torch.get_default_device()),
        "advantages": torch.tensor([0.5, -0.5])[: shape[0]],
    }


def _losses(call):
    def with_mask(mask, **options):
        b = batch()
        return call(b["logits"].requires_grad_(), b["token_ids"], b["advantages"], mask, **options)

    return with_mask


def _hidden(call):
    def with_mask(mask, **options):
        b, head = batch(), (torch.randn(2, 3, 5), torch.randn(7, 5).requires_grad_())
        rest = (b["advantages"],) if call is linear_grpo_loss else ()
        return call(*head, b["token_ids"], *rest, mask, **options)

    return with_mask


ONES = torch.ones(2, 3)
READERS = {
    "grpo_loss": _losses(grpo_loss),
    "reference": _losses(reference.grpo_loss),
    "token_log_probs": lambda mask, **o: token_log_probs(batch()["logits"], batch()["token_ids"], mask, **o),
    "linear_grpo_loss": _hidden(linear_grpo_loss),
    "linear_token_log_probs": _hidden(linear_token_log_probs),
    "align": lambda mask: align(batch()["token_ids"], mask),
    "normalizer": lambda mask: normalizer(mask, "dapo"),
    "reward_to_go": lambda mask: advantages.reward_to_go(ONES, mask),
    "n_step": lambda mask: advantages.n_step(ONES, ONES, mask, 0.9, 1),
    "gae": lambda mask: advantages.gae(ONES, ONES, mask),
    "value_loss": lambda mask: value_loss(ONES, ONES, ONES, mask),
    "match": lambda mask: match(lambda log_probs, mask: (log_probs * mask).sum(), batch={"mask": mask}),
}
"""Everything that reads a mask."""
NO_MASKS = {
    "additive": ([[0, 0, -INF], [0, 0, 0]], "-inf", "mask == 0"),
    "additive, lowest": ([[0, 0, torch.finfo(torch.bfloat16).min], [0, 0, 0]], "-3.38953e.38", "mask == 0"),
    "NaN": ([[1, NAN, 0], [1, 1, 1]], "nan", "whatever is not 0 counts|advantages come first"),
    "infinite": ([[1, INF, 0], [1, 1, 1]], "inf", "whatever is not 0 counts|advantages come first"),
    "advantages": ([[0.5, 0.5, 0.5], [-0.5, -0.5, -0.5]], "-0.5", "whatever is not 0 counts|advantages come first"),
    "labels": ([[5, 4, -100], [3, 2, 1]], "-100", r"labels != -100"),
}


@pytest.mark.parametrize("name", NO_MASKS)
@pytest.mark.parametrize("reader", READERS)
def test_what_no_mask_can_be(reader, name):
    values, found, hint = NO_MASKS[name]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match=rf"mask to be finite and >= 0; got \w*mask\[\d, \d\] = {found}") as caught:
            READERS[reader](torch.tensor(values, dtype=dtype))
        assert any(text in str(caught.value) for text in hint.split("|"))


def test_negative_integers_are_no_mask():
    with pytest.raises(ValueError, match=r"mask\[0, 1\] = -1"):
        READERS["grpo_loss"](torch.tensor([[1, -1, 1], [1, 1, 1]]))


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader != "match"])
def test_masks_of_fractions_are_weights(reader, monkeypatch):
    """Where checks are on: a fraction is live, which somebody who wrote one did not mean."""
    mask = torch.tensor([[1, 0.5, 0], [1, 1, 1]])
    READERS[reader](mask)
    monkeypatch.setenv("GRPO_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match=r"mask of whole numbers; got \w*mask\[0, 1\] = 0.5(.|\n)*token_weights="):
        READERS[reader](mask)
    READERS[reader](torch.tensor([[1, 3, 0], [1, 1, 1.0]]))


def test_fractions_with_check_of_the_call():
    with pytest.raises(ValueError, match="mask of whole numbers"):
        READERS["linear_grpo_loss"](torch.tensor([[1, 0.5, 0], [1, 1, 1]]), check=True)


def test_swapped_advantages_and_mask():
    b = batch()
    per_token = b["advantages"][:, None].expand(2, 3)
    with pytest.raises(ValueError, match=r"grpo_loss(.|\n)*hint: the advantages come first"):
        grpo_loss(b["logits"], b["token_ids"], torch.ones(2, 3), per_token)


def test_additive_support():
    support = torch.zeros(2, 3, 7)
    support[..., 3:] = -INF
    with pytest.raises(ValueError, match=r"support to be finite(.|\n)*support == 0"):
        token_log_probs(batch()["logits"], batch()["token_ids"], support=support)


def call(backend, **changes):
    case = make(batch=3, length=4, vocab=11, empty=False)
    case.mask[:] = True
    case.mask[1, 2:] = False
    for name in ("advantages", "mask"):
        if name in changes:
            setattr(case, name, changes.pop(name))
    return case.run(backend, **changes)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_that_are_no_numbers(backend, value):
    """At a live token they raise; a masked one may have any."""
    weights = torch.ones(3, 4)
    weights[1, 2] = value
    out, gradient = call(backend, token_weights=weights)
    assert out.loss.isfinite()
    assert gradient.isfinite().all()
    weights[2, 1] = value
    with pytest.raises(ValueError, match=r"token_weights to be finite where they count; got token_weights\[2, 1\] = "):
        call(backend, token_weights=weights)


def test_negative_weights(backend):
    weights = torch.ones(3, 4)
    weights[1, 2] = -1.0
    call(backend, token_weights=weights, check=True)
    weights[2, 1] = -1.0
    call(backend, token_weights=weights)
    with pytest.raises(ValueError, match="token_weights >= 0; got negative ones"):
        call(backend, token_weights=weights, check=True)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_advantages_that_are_no_numbers(backend, value):
    """Of a live token with a weight they raise; of a masked or rejected sequence they have no part."""
    per_token = torch.ones(3, 4)
    per_token[1, 2] = value
    assert call(backend, advantages=per_token)[0].loss.isfinite()
    whole = torch.tensor([1.0, value, -1.0])
    with pytest.raises(ValueError, match=r"advantages to be finite where they count; got advantages\[1, 0\] = "):
        call(backend, advantages=whole)
    call(backend, advantages=whole, token_weights=torch.tensor([1.0, 0.0, 1.0])[:, None].expand(3, 4))
    mask = torch.ones(3, 4)
    mask[1] = 0
    assert call(backend, advantages=whole, mask=mask)[0].loss.isfinite()


def test_rejected_advantages():
    """Known factors of 0 are weights of 0."""
    config = LossConfig(rollout=(MaskedIS(0.5, 2.0), MaskedIS(0, 3, "sequence")))
    old = torch.full((3, 4), -2.0)
    sampled = old.clone()
    sampled[1] = -9.0
    options = {"old_log_probs": old, "rollout_log_probs": sampled, "config": config}
    call(None, advantages=torch.tensor([1.0, NAN, -1.0]), **options)


LAYOUTS = {
    "COO": (lambda x: x.to_sparse(), "torch.sparse_coo", "to_dense()"),
    "CSR": (lambda x: x.to_sparse_csr(), "torch.sparse_csr", "to_dense()"),
    "oneDNN": (lambda x: x.to_mkldnn(), "torch._mkldnn", "to_dense()"),
    "nested": (lambda x: torch.nested.as_nested_tensor(list(x)), "a nested one", "to_padded_tensor("),
    "jagged": (lambda x: torch.nested.as_nested_tensor(list(x), layout=torch.jagged), "a nested one", "to_padded_"),
}


def _beside(**changed):
    given = {"advantages": torch.ones(2, 3), "mask": torch.ones(2, 3), **changed}
    for name in ("old_log_probs", "ref_log_probs", "rollout_log_probs", "token_weights"):
        given.setdefault(name, torch.full((2, 3), -2.0))
    return given


def _taught(**given):
    return grpo_loss(torch.randn(2, 3, 7), **_ids(_beside(teacher=Teacher(**given))), config=_DIVERGED)


def _ids(given):
    return {"token_ids": torch.zeros(2, 3, dtype=torch.int64), **given}


_DIVERGED = LossConfig(divergence=Divergence("reverse_kl"))
DENSE = {
    "grpo_loss": (lambda **x: grpo_loss(**_ids({"logits": torch.randn(2, 3, 7), **_beside(**x)})), {"logits": 3}),
    "linear_grpo_loss": (
        lambda **x: linear_grpo_loss(
            **_ids({"hidden": torch.randn(2, 3, 4), "weight": torch.randn(7, 4), **_beside(**x)})
        ),
        {"hidden": 3, "weight": 2},
    ),
    "policy_loss": (lambda **x: policy_loss(**{"log_probs": torch.full((2, 3), -2.0), **_beside(**x)}), {}),
    "token_log_probs": (lambda **x: token_log_probs(**_ids({"logits": torch.randn(2, 3, 7), **x})), {"logits": 3}),
    "Teacher": (_taught, {"logits": 3}),
}
OF_TOKENS = ("advantages", "mask", "old_log_probs", "ref_log_probs", "rollout_log_probs", "token_weights")
DENSE_ARGUMENTS = [
    *((function, name, dim) for function, (_, names) in DENSE.items() for name, dim in names.items()),
    *((function, name, 2) for function in ("grpo_loss", "linear_grpo_loss", "policy_loss") for name in OF_TOKENS),
    *(("grpo_loss", "temperature", 2), ("policy_loss", "log_probs", 2), ("token_log_probs", "mask", 2)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("function", "name", "dim"), DENSE_ARGUMENTS)
def test_tensors_that_no_strides_read(function, name, dim, layout):
    change, got, hint = LAYOUTS[layout]
    with pytest.raises(TypeError) as raised:
        DENSE[function][0](**{name: change(torch.full((2, 3, 7) if dim == 3 else (2, 3), 0.5))})
    assert f"{function}: expected {name} to be a dense tensor; got {got}" in str(raised.value)
    assert hint in str(raised.value)


@pytest.mark.parametrize("beside", [{}, {"config": _DIVERGED, "teacher": Teacher(logits=torch.randn(2, 3, 7))}])
@pytest.mark.parametrize(
    ("function", "name", "given"),
    [
        ("grpo_loss", "logits", torch.nested.as_nested_tensor([torch.randn(3, 7)] * 2)),
        ("grpo_loss", "logits", [0.5]),
        ("grpo_loss", "logits", None),
        ("linear_grpo_loss", "weight", torch.nested.as_nested_tensor([torch.randn(7, 4)])),
        ("linear_grpo_loss", "weight", None),
    ],
)
def test_columns_of_what_is_no_dense_tensor(function, name, given, beside):
    """The columns that count are asked for before anything else."""
    with pytest.raises(TypeError, match=f"{function}: expected {name} to be a (dense )?tensor; got"):
        DENSE[function][0](vocab_size=5, **beside, **{name: given})


@pytest.mark.parametrize("beside", [{}, {"config": _DIVERGED, "teacher": Teacher(logits=torch.randn(2, 3, 7))}])
@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        ("grpo_loss", {"logits": torch.tensor(1.0)}, "logits .*got 0 dimensions"),
        ("linear_grpo_loss", {"weight": torch.tensor(1.0)}, r"weight .*got .*\(\)"),
        ("linear_grpo_loss", {"bias": torch.tensor(1.0)}, r"bias .*got .*\(\)"),
        ("linear_grpo_loss", {"adapter": (torch.randn(2, 3, 2), [1.0])}, r"adapter .*got \(Tensor, list\)"),
    ],
)
def test_columns_of_what_has_none(function, given, message, beside):
    with pytest.raises((TypeError, ValueError), match=message):
        DENSE[function][0](vocab_size=5, **beside, **given)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: align(x.long(), torch.ones(2, 3)),
        lambda x: align(torch.ones(2, 3).long(), x),
        lambda x: pack(torch.ones(2, 3).long(), torch.ones(2, 3), x),
        lambda x: advantages.centered(x),
        lambda x: advantages.gae(torch.ones(2, 3), x, torch.ones(2, 3)),
        lambda x: Recorded.from_counts(torch.ones(6).long(), torch.ones(2, 3).long(), x),
        lambda x: collate([{"input_ids": x[0].long(), "loss_mask": torch.ones(3)}]),
        lambda x: split_context(torch.ones(2, 4).long(), torch.ones(2, 4), 0, 2).take(x),
        lambda x: grpo_loss(**_ids({"logits": torch.randn(2, 3, 7), **_beside(kl_coef=x.sum().to_sparse())})),
    ],
)
def test_sparse_tensors_of_others(call):
    with pytest.raises(TypeError, match=r"to be a dense tensor; got torch.sparse_coo.\n  hint: \w+.to_dense\(\)"):
        call(torch.ones(2, 3).to_sparse())


@pytest.mark.parametrize("bounds", [[0, 6], torch.tensor([0, 6]).to_sparse()], ids=["list", "sparse"])
def test_bounds_that_are_no_dense_tensor(bounds):
    for call in (
        lambda: align(torch.ones(6).long(), torch.ones(6), bounds),
        lambda: unpack(torch.ones(6), bounds),
        lambda: advantages.reward_to_go(torch.ones(6), torch.ones(6), cu_seqlens=bounds),
    ):
        with pytest.raises(TypeError, match=r"cu_seqlens to be a (dense )?tensor; got"):
            call()


@pytest.mark.parametrize("values", [[0.5, -0.5], np.array([0.5, -0.5])], ids=["list", "numpy"])
def test_numbers_that_are_no_tensors(values):
    b = batch()
    with pytest.raises(TypeError, match=r"advantages to be a tensor; got (list|ndarray)(.|\n)*torch.as_tensor\(adv"):
        grpo_loss(b["logits"], b["token_ids"], values)


@pytest.mark.parametrize("name", ["ref_log_probs", "rollout_log_probs"])
def test_log_probs_in_what_returned_them(name):
    b = batch()
    whole = token_log_probs(b["logits"], b["token_ids"])
    with pytest.raises(TypeError, match=rf"{name} to be a tensor; got TokenLogProbs(.|\n)*hint: {name}\.log_probs"):
        grpo_loss(b["logits"], b["token_ids"], torch.ones(2), **{name: whole})


def test_contents_that_cannot_be_seen():
    """Under fake tensors, on the meta device and in vmap nothing is looked at."""
    rewards = torch.ones(4, 2, 3)
    torch.vmap(advantages.reward_to_go)(rewards, rewards)
    with torch._subclasses.FakeTensorMode() as mode:
        mask = mode.from_tensor(torch.full((2, 3), -1.0))
        normalizer(mask, "dapo")
    with pytest.raises(ValueError, match="finite and >= 0"):
        normalizer(torch.full((2, 3), -1.0), "dapo")
    assert align(*(torch.ones(2, 3, dtype=torch.int64, device="meta"),) * 2)[1].device.type == "meta"


TRANSFORM = ("temperature", "logit_scale", "logit_softcap")
SCORERS = {
    "token_log_probs": lambda **o: token_log_probs(batch()["logits"], batch()["token_ids"], **o),
    "grpo_loss": lambda **o: grpo_loss(batch()["logits"], batch()["token_ids"], batch()["advantages"], **o),
    "linear_token_log_probs": lambda **o: _hidden(linear_token_log_probs)(None, **o),
    "linear_grpo_loss": lambda **o: _hidden(linear_grpo_loss)(None, **o),
}


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", TRANSFORM)
@pytest.mark.parametrize("scorer", SCORERS)
def test_numbers_that_make_no_log_probs(backend, scorer, name, as_tensor):
    """Alike as a number and as a 0-d tensor, on every backend."""
    refused = {0.0: "> 0", -1.0: "> 0", NAN: "finite number", INF: "finite number", 1e-40: r"as fp32 holds it"}
    for value, message in refused.items():
        given = torch.tensor(value, dtype=torch.float64) if as_tensor else value
        with pytest.raises(ValueError, match=rf"{scorer}: expected {name} .*{message}.*; got {value}"):
            SCORERS[scorer](backend=backend, **{name: given})
    smallest = torch.finfo(torch.float32).tiny
    SCORERS[scorer](backend=backend, **{name: torch.tensor(2 * smallest) if as_tensor else 2 * smallest})


QUOTIENTS = [
    ({"temperature": 1e-20, "logit_scale": 1e20}, "logit_scale / temperature"),
    ({"temperature": 1e20, "logit_scale": 1e-20}, "logit_scale / temperature"),
    ({"logit_softcap": 1e-20, "logit_scale": 1e20, "temperature": 1e10}, "logit_scale / logit_softcap"),
    ({"logit_softcap": 1e20, "temperature": 1e-20}, "logit_softcap / temperature"),
]


@pytest.mark.parametrize(("numbers", "quotient"), QUOTIENTS)
def test_quotients_that_fp32_cannot_hold(backend, numbers, quotient):
    for given in (numbers, {name: torch.tensor(value) for name, value in numbers.items()}):
        with pytest.raises(ValueError, match=rf"expected {quotient} in \[1.175e-38, 3.403e\+38\]"):
            SCORERS["token_log_probs"](backend=backend, **given)


@pytest.mark.parametrize("scorer", ["grpo_loss", "linear_grpo_loss"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grad_scale", 0.0, "grad_scale to be a finite number > 0; got 0.0"),
        ("grad_scale", -2.0, "grad_scale to be a finite number > 0; got -2.0"),
        ("grad_scale", 1e-40, "grad_scale in .* as fp32 holds it"),
        ("normalizer", -3.0, "normalizer >= 0; got -3.0"),
        ("normalizer", 1e-320, "normalizer in .* as fp32 holds it"),
        ("normalizer", 1e300, "normalizer to be a finite number .*; got 1e\\+300, beyond fp32"),
        ("normalizer", NAN, "normalizer to be a finite number"),
        ("kl_coef", INF, "kl_coef to be a finite number .*; got inf."),
        ("kl_coef", -1e39, "kl_coef to be a finite number .*; got -1e\\+39, beyond fp32"),
        ("entropy_coef", NAN, "entropy_coef to be a finite number"),
        ("entropy_threshold", NAN, "entropy_threshold to be a finite number"),
    ],
)
def test_numbers_as_tensors(scorer, name, value, message):
    """A 0-d tensor is refused where the number is."""
    for given in (value, torch.tensor(value, dtype=torch.float64)):
        with pytest.raises(ValueError, match=message):
            SCORERS[scorer](**{name: given})


@pytest.mark.parametrize("name", ["kl_coef", "normalizer", "grad_scale"])
def test_integers_that_no_float_holds(name):
    with pytest.raises(ValueError, match=f"{name} to be a finite number"):
        SCORERS["grpo_loss"](**{name: 10**400})


@pytest.mark.parametrize("name", ["kl_coef", "normalizer", "grad_scale"])
def test_no_flag_is_a_number(name):
    with pytest.raises(ValueError, match=f"{name} to be a finite number.*; got True"):
        SCORERS["grpo_loss"](**{name: True})


@pytest.mark.parametrize("missing", [0, 1])
def test_alignment_of_nothing(missing):
    given = [torch.ones(2, 3, dtype=torch.int64)] * 2
    given[missing] = None
    with pytest.raises(TypeError, match=r"align: expected (input_ids|loss_mask) to be a tensor; got None"):
        align(*given)


def test_compiled_calls_take_any_temperature():
    """A number that changes from call to call becomes symbolic, and a tensor is not looked at."""
    b = batch()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def score(logits, temperature):
        return token_log_probs(logits, b["token_ids"], temperature=temperature).log_probs

    for temperature in (0.5, 0.6, 0.7, torch.tensor(0.8), torch.tensor(0.9)):
        expected = token_log_probs(b["logits"], b["token_ids"], temperature=temperature).log_probs
        torch.testing.assert_close(score(b["logits"], temperature), expected)


def _made_in_inference(value):
    with torch.inference_mode():
        return value.clone() if isinstance(value, torch.Tensor) else value


def _everything() -> dict:
    """Every tensor that a loss takes, packed."""
    case = make(batch=1, length=12, vocab=11, extra_row=False, empty=False)
    given = {name: case.options[name] for name in ("old_log_probs", "ref_log_probs")}
    given |= {"rollout_log_probs": given["old_log_probs"] + 0.1, "token_weights": torch.linspace(0.1, 2, 12)[None]}
    given |= {"cu_seqlens": torch.tensor([0, 5, 12]), "advantages": torch.tensor([1.0, -1.0])}
    numbers = {"normalizer": 3.0, "grad_scale": 0.5, "kl_coef": 0.1, "entropy_coef": 0.01, "entropy_threshold": 0.1}
    numbers |= {"temperature": 0.7, "logit_scale": 1.2, "logit_softcap": 9.0}
    given |= {name: torch.tensor(value) for name, value in numbers.items()}
    return {"logits": case.logits, "token_ids": case.token_ids, "mask": case.mask, **given}


ROUTES = {
    "one pass": {"config": LossConfig()},
    "two passes": {"config": LossConfig(level="sequence_product")},
    "support": {"support": TopK(7)},
}
ARGUMENTS = [name for name in _everything() if name != "logits"]
LOG_PROBS = ("token_ids", "mask", "temperature", "logit_scale", "logit_softcap")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_tensors_made_in_inference_mode(backend, route, name):
    """Autograd cannot save them: each is taken as if it were an ordinary one."""
    found = []
    for make_it in (lambda value: value, _made_in_inference):
        given = _everything() | ROUTES[route]
        given[name] = make_it(given[name])
        leaf = given.pop("logits").requires_grad_()
        loss = grpo_loss(leaf, backend=backend, **given).loss
        (loss * 0.5).backward()
        found.append((loss.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("name", LOG_PROBS)
@pytest.mark.parametrize("support", [None, TopK(7), "mask"])
def test_log_probs_of_tensors_made_in_inference_mode(backend, name, support):
    given = {key: value for key, value in _everything().items() if key in ("logits", *LOG_PROBS)}
    given["support"] = _made_in_inference(torch.rand(1, 12, 11) < 0.7) if support == "mask" else support
    given[name] = _made_in_inference(given[name])
    leaf = given.pop("logits").requires_grad_()
    out = token_log_probs(leaf, backend=backend, **given)
    (out.log_probs.sum() + out.entropy.sum()).backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("config", [ROUTES["one pass"]["config"], ROUTES["two passes"]["config"]], ids=str)
@pytest.mark.parametrize("name", [*ARGUMENTS, "hidden", "weight", "bias"])
def test_hidden_states_made_in_inference_mode(config, name):
    """One of the three that gradients may flow to, too: the others have theirs."""
    given = _everything()
    given |= {"hidden": torch.randn(1, 12, 5), "weight": torch.randn(11, 5), "bias": torch.randn(11)}
    del given["logits"]
    given[name] = _made_in_inference(given[name])
    leaves = [given[key].requires_grad_() for key in ("hidden", "weight", "bias") if key != name]
    linear_grpo_loss(config=config, **given).loss.backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    kept = {key: given[key] for key in ("hidden", "weight", "bias", *LOG_PROBS)}
    out = linear_token_log_probs(**kept)
    (out.log_probs.sum() + out.entropy.sum()).backward()


def test_masks_made_in_inference_mode():
    """Of what is not a loss of logits."""
    mask, bounds = (
        _made_in_inference(torch.tensor([[True, True, False], [True, False, False]])),
        torch.tensor([0, 2, 3]),
    )
    values = torch.randn(2, 3, requires_grad=True)
    value_loss(values, values.detach(), torch.zeros(2, 3), mask).backward()
    assert (values.grad != 0).tolist() == mask.tolist()
    packed = torch.randn(1, 3, requires_grad=True)
    unpack(packed, bounds, mask).sum().backward()
    assert torch.equal(packed.grad, torch.ones(1, 3))


def test_calls_inside_inference_mode():
    """Nothing is copied, nothing raises."""
    given = _everything()
    expected = grpo_loss(**given).loss
    with torch.inference_mode():
        assert torch.equal(grpo_loss(**given).loss, expected)
        inside = {name: value.clone() for name, value in given.items()}
        assert torch.equal(grpo_loss(**inside).loss, expected)


GEOMETRIC = LossConfig(rollout=Rejection(0.9, 1.1, "geometric"))
POOLED = {
    "gspo": (LossConfig.preset("gspo"), {"old_log_probs"}),
    "sequence_token": (LossConfig(level="sequence_token"), {"old_log_probs"}),
    "sequence_product": (LossConfig(level="sequence_product"), {"old_log_probs"}),
    "the KL's ratio": (LossConfig(kl=KL(0.1, ratio_weighted=True, level="sequence")), {"old_log_probs"}),
    "a scheme": (GEOMETRIC, {"old_log_probs", "rollout_log_probs"}),
    "a scheme of the policy": (LossConfig(rollout=OffPolicyMask(0.1)), {"rollout_log_probs"}),
    "token": (LossConfig(kl=KL(0.1, ratio_weighted=True), rollout=MaskedIS(0.5, 5.0)), set()),
}
"""A config, and which log-probs are summed over a sequence there."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", ["old_log_probs", "ref_log_probs", "rollout_log_probs"])
@pytest.mark.parametrize("name", POOLED)
def test_rounded_log_probs(name, given, dtype):
    """bf16 has three digits: enough for one token's ratio, not for that of a sequence."""
    config, refused = POOLED[name]
    case = make(batch=3, length=4, vocab=11, empty=False)
    case.options["rollout_log_probs"] = case.options["old_log_probs"] + 0.01
    case.options[given] = case.options[given].to(dtype)
    head = (torch.randn(3, 4, 5), torch.randn(11, 5))
    calls = {
        "grpo_loss": lambda: case.run(config=config)[0],
        "reference.grpo_loss": lambda: case.reference(config=config)[0],
        "linear_grpo_loss": lambda: linear_grpo_loss(*head, *case.arguments, **case.options, config=config),
    }
    for function, loss in calls.items():
        if given not in refused:
            assert loss().loss.isfinite()
            continue
        message = rf"{function}: expected {given} in float32 with .*; got {dtype}"
        with pytest.raises(ValueError, match=message) as caught:
            loss()
        assert "store them in float32" in str(caught.value)


def test_contents_are_looked_at_in_modes_that_change_none():
    """One that counts FLOPs, or chooses what checkpointing saves, is no reason to train on any mask."""
    from torch.utils.flop_counter import FlopCounterMode

    case = make()
    with FlopCounterMode(display=False), pytest.raises(ValueError, match="mask to be finite and >= 0"):
        grpo_loss(case.logits, case.token_ids, case.advantages, torch.full(case.mask.shape, math.nan))


def test_no_contents_of_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        logits, ids = torch.randn(2, 3, 7), torch.zeros(2, 3, dtype=torch.int64)
        assert grpo_loss(logits, ids, torch.zeros(2), torch.ones(2, 3)).loss.shape == ()
        hidden, weight = torch.randn(2, 3, 8), torch.randn(7, 8)
        assert linear_grpo_loss(hidden, weight, ids, torch.zeros(2), torch.ones(2, 3), live_tokens=6).loss.shape == ()


def test_advantages_that_overflow_the_working_precision():
    case = make()
    with pytest.raises(ValueError, match=r"advantages to be finite.*|advantages.*inf"):
        grpo_loss(case.logits, case.token_ids, torch.full((6,), 1e300, dtype=torch.float64), case.mask)


def test_checks_leave_a_weight_of_zero_alone():
    """NaN stands for a log-prob that nobody reported."""
    case = make(token_weights=torch.ones(6, 9))
    case.options["token_weights"][0, 0], case.options["old_log_probs"][0, 0] = 0.0, math.nan
    assert case.run("cpu", check=True)[0].loss.isfinite()
    case.options["token_weights"][0, 0] = 1.0
    with pytest.raises(ValueError, match="old_log_probs <= 0"):
        case.run("cpu", check=True)


def test_normalizers_add_up():
    first, second = (normalizer(torch.ones(2, n), "dapo") for n in (3, 5))
    assert float(first + second) == float(sum([first, second])) == 16
    with pytest.raises(ValueError, match="in tokens to add; got one in sequences"):
        first + normalizer(torch.ones(2, 3), "grpo")


def test_shapes_agree_where_one_is_a_symbol():
    """One tensor's length is dynamic for torch.compile, another's is a number: the call is one graph all the same."""
    case = make(vocab=31, ref_log_probs=None)
    torch._dynamo.maybe_mark_dynamic(case.token_ids, 1)
    for config in ("grpo", "gspo"):
        loss = lambda *tensors, c=config: grpo_loss(*tensors, config=c).loss  # noqa: E731
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        expected = grpo_loss(case.logits, *case.arguments, config=config).loss
        assert torch.equal(compiled(case.logits, *case.arguments), expected)


def test_dtypes_of_mask_and_advantages():
    case = make()
    for dtype in (torch.complex64, torch.uint16, torch.uint64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=rf"(?s)mask of bool or numbers that compare; got {dtype}.*mask.bool\(\)"):
            grpo_loss(case.logits, case.token_ids, case.advantages, case.mask.to(dtype))
    for name in ("advantages", "token_weights"):
        given = {"advantages": case.advantages, name: torch.ones(case.mask.shape, dtype=torch.complex64)}
        with pytest.raises(TypeError, match=f"{name} of real numbers; got torch.complex64"):
            grpo_loss(case.logits, case.token_ids, mask=case.mask, **given)
    with pytest.raises(
        TypeError, match=r"(?s)advantages that are numbers; got torch.bool.*\(token_ids, advantages, mask\)"
    ):
        grpo_loss(case.logits, case.token_ids, case.mask, case.mask)


@pytest.mark.parametrize(("value", "on"), [("1", True), ("true", True), ("", False), ("0", False), ("False", False)])
def test_the_switch_of_checks(monkeypatch, value, on):
    monkeypatch.setenv("GRPO_KERNELS_CHECK", value)
    assert checks_enabled(None) == on
    assert checks_enabled(True)
    assert not checks_enabled(False)


def test_names_in_capitals_have_a_neighbour():
    with pytest.raises(ValueError, match="Did you mean 'grpo'"):
        LossConfig.preset("GRPOS")


OTHERS = {
    "old_logprobs": (None, "old_log_probs=..."),
    "response_mask": (None, "mask=..."),
    "num_items_in_batch": (12.0, "normalizer=12.0"),
    "beta": (0.04, "config=LossConfig(kl=KL(0.04))"),
    "epsilon": (0.2, "config=LossConfig(surrogate=Clip(0.2, 0.2))"),
    "tis_imp_ratio_cap": (2.0, "config=LossConfig(rollout=TruncatedIS(2.0))"),
    "loss_type": ("dapo", "config=LossConfig.preset('dapo')"),
    "level": ("sequence", "config=LossConfig(level='sequence')"),
    "kl": (KL(0.1), "config=LossConfig(kl=...)"),
    "backends": ("cpu", "'backend'"),
}
"""Keywords of other packages' losses, and of our config, with what they are told."""


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("function", [grpo_loss, linear_grpo_loss, policy_loss], ids=lambda f: f.__name__)
def test_keywords_of_other_packages(function, name):
    value, meant = OTHERS[name]
    arguments = {grpo_loss: (2, 3, 7), linear_grpo_loss: (2, 3, 5), policy_loss: (2, 3)}[function]
    head = (torch.ones(7, 5),) if function is linear_grpo_loss else ()
    ids = () if function is policy_loss else (torch.zeros(2, 3, dtype=torch.int64),)
    with pytest.raises(TypeError) as raised:
        function(torch.zeros(arguments), *head, *ids, torch.ones(2), **{name: value})
    expected = f"{function.__name__}() got an unexpected keyword argument {name!r}\n  hint: did you mean {meant}?"
    assert str(raised.value) == expected


@pytest.mark.parametrize("function", [token_log_probs, linear_token_log_probs], ids=lambda f: f.__name__)
def test_keywords_of_functions_without_a_config(function):
    """Nothing is suggested that they would not take either."""
    told = {"completion_mask": "did you mean mask=...?", "beta": "it takes logits, ", "level": "it takes logits, "}
    if function is linear_token_log_probs:
        told |= dict.fromkeys(("beta", "level"), "it takes hidden, ")
    for name, advice in told.items():
        with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'\n  hint: {re.escape(advice)}"):
            SCORERS[function.__name__](**{name: torch.ones(2, 3) if name == "completion_mask" else "?"})


def test_keywords_of_normalizer():
    with pytest.raises(TypeError, match=r"normalizer\(\) .*'loss_type'\n  hint: did you mean config=LossConfig.preset"):
        normalizer(torch.ones(2, 3), loss_type="dapo")
    taken = "masks, config, world_size, group, cu_seqlens, sequence_group"
    with pytest.raises(TypeError, match=rf"'k'\n  hint: it takes {taken}$"):
        normalizer(torch.ones(2, 3), "grpo", k=2)


def test_arguments_of_others_are_none_of_ours():
    taken = {name for f in (grpo_loss, linear_grpo_loss, policy_loss, normalizer) for name in keywords_of(f)}
    assert set(names.ARGUMENTS).isdisjoint(taken)
    assert set(names.ARGUMENTS.values()) <= taken
    assert [field.name for field in dataclasses.fields(LossConfig)] == list(names.FIELDS)
    with pytest.raises(ValueError, match="GRPOLoss: the option.*; got .old_logprobs.. Did you mean old_log_probs=...?"):
        GRPOLoss(old_logprobs=ONES)


TYPED = """
import torch
from grpo_kernels import grpo_loss, linear_grpo_loss, linear_token_log_probs, normalizer, policy_loss, token_log_probs
t = torch.ones(1)
grpo_loss(t, t, t, response_mask=1)
linear_grpo_loss(t, t, t, t, response_mask=1)
policy_loss(t, t, response_mask=1)
token_log_probs(t, t, response_mask=1)
linear_token_log_probs(t, t, t, response_mask=1)
normalizer(t, "grpo", response_mask=1)
loss = grpo_loss if t.numel() else policy_loss
loss(t, t, t, old_log_probs=t)
"""


def test_type_checkers_see_unknown_keywords(tmp_path):
    """And what a choice between two of the functions is."""
    api = pytest.importorskip("mypy.api")
    (tmp_path / "calls.py").write_text(TYPED)
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")  # it takes 20 seconds
    options = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path)]
    report, _, _ = api.run([str(tmp_path / "calls.py"), *options])
    lines = [line.split(": error: ")[0].rpartition(":")[2] for line in report.splitlines() if ": error: " in line]
    assert lines == ["5", "6", "7", "8", "9", "10"], report
    assert report.count('expected "NoKeyword"') == 6


def test_an_unknown_keyword_costs_others_nothing(monkeypatch):
    """A call of the loss without any asks nobody about them, eager or compiled."""
    monkeypatch.setattr(names, "translated", lambda *arguments: pytest.fail("asked"))
    b = batch()
    for call in (grpo_loss, torch.compile(grpo_loss, fullgraph=True)):
        assert call(b["logits"], b["token_ids"], b["advantages"]).loss.isfinite()


@pytest.mark.parametrize("function", [grpo_loss, linear_grpo_loss, policy_loss], ids=lambda f: f.__name__)
def test_options_that_are_on_or_off(function):
    """A word out of a file of settings is none: "False" would be on."""
    case = make()
    head = (torch.randn(*case.token_ids.shape, 5), torch.randn(case.logits.shape[-1], 5))
    rows = {grpo_loss: (case.logits,), linear_grpo_loss: head, policy_loss: (torch.randn(case.token_ids.shape),)}
    ids = () if function is policy_loss else (case.token_ids,)
    arguments = (*rows[function], *ids, case.advantages, case.mask)
    for option in ("token_losses", "skip_zero_advantage"):
        with pytest.raises(TypeError, match=f"{function.__name__}: expected {option} to be True or False; got 'False'"):
            function(*arguments, **{option: "False"})
        assert function(*arguments, **{option: np.True_}).log_probs.isfinite().all()
    with pytest.raises(TypeError, match="expected check= to be True or False; got 'no'"):
        function(*arguments, check="no")
    if function is grpo_loss:
        with pytest.raises(TypeError, match="expected inplace to be True or False; got 'False'"):
            grpo_loss(case.logits.clone().requires_grad_() * 1, *arguments[1:], inplace="False")


@pytest.mark.parametrize("value", ["no", "False", 2, -1, 10**400, [], torch.tensor([True, False]), 0.5])
@pytest.mark.parametrize("name", ["packed", "discount_from_start", "ratio_weighted"])
def test_what_is_neither_on_nor_off(name, value):
    sample, ones = {"input_ids": [1, 2], "loss_mask": [0, 1]}, torch.ones(1, 3)
    call = {
        "packed": lambda: collate([sample], packed=value),
        "discount_from_start": lambda: advantages.reward_to_go(ones, ones, 0.5, discount_from_start=value),
        "ratio_weighted": lambda: KL(0.1, ratio_weighted=value),
    }[name]
    with pytest.raises(TypeError, match=f"expected {name} to be True or False; got "):
        call()


@pytest.mark.parametrize("name", ["vocab_size", "vocab_start"])
def test_a_layout_of_arrays(name):
    b = batch()
    for call in (grpo_loss, token_log_probs):
        given = (b["logits"], b["token_ids"], *([torch.ones(2)] if call is grpo_loss else []))
        with pytest.raises(TypeError, match=rf"{name} to be an int >= [01]; got array\(\[11, 11\]\)"):
            call(*given, **{name: np.array([11, 11])})


COEFFICIENTS = {"kl_coef": 0.125, "rollout_kl_coef": 0.375, "entropy_coef": 0.25, "entropy_threshold": 0.5}
TRANSFORM = {"temperature": 0.75, "logit_scale": 1.25, "logit_softcap": 8.0, "divergence_coef": 0.625}
NUMBERS = {
    grpo_loss: {**COEFFICIENTS, **TRANSFORM, "normalizer": 3.0, "grad_scale": 0.5},
    linear_grpo_loss: {**COEFFICIENTS, **TRANSFORM, "normalizer": 3.0, "grad_scale": 0.5},
    policy_loss: {**COEFFICIENTS, "normalizer": 3.0},
}


def with_numbers(function, backend, numbers):
    """Return the loss and its gradient."""
    case, g = make(), torch.Generator().manual_seed(0)
    width, vocab = 5, case.logits.shape[-1]
    drawn = torch.randn(*case.logits.shape[:2], width, generator=g), torch.randn(vocab, width, generator=g)
    first, rest = {
        grpo_loss: (case.logits, ()),
        linear_grpo_loss: (drawn[0], drawn[1:]),
        policy_loss: (-drawn[0][:, : case.token_ids.shape[1], 0].abs(), ()),
    }[function]
    options = {"config": "grpo", "entropy": torch.ones(case.token_ids.shape)}
    if function is not policy_loss:
        rest = (*rest, case.token_ids)
        teacher = Teacher(logits=torch.randn(case.logits.shape, generator=g))
        options = {"config": LossConfig(divergence=Divergence("forward_kl")), "teacher": teacher, "backend": backend}
    first = first.clone().requires_grad_()
    loss = function(first, *rest, case.advantages, case.mask, **options, **case.options, **numbers).loss
    return loss.detach(), *torch.autograd.grad(loss, first)


@pytest.mark.parametrize("on", ["cpu", "torch"])
@pytest.mark.parametrize("function", NUMBERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array])
def test_numbers_of_numpy(kind, function, on):
    """The same bits as of Python's floats of the same value; each alone, and all together."""
    numbers = NUMBERS[function]
    for chosen in (*({name: value} for name, value in numbers.items()), numbers):
        expected = with_numbers(function, on, chosen)
        got = with_numbers(function, on, {name: kind(value) for name, value in chosen.items()})
        assert all(map(torch.equal, got, expected)), chosen


LARGE = 10**20
"""An integer beyond 64 bits, which fp32 holds."""


@pytest.mark.parametrize("on", ["cpu", "torch"])
@pytest.mark.parametrize("function", NUMBERS, ids=lambda f: f.__name__)
def test_integers_beyond_64_bits(function, on):
    for name in set(NUMBERS[function]) - set(TRANSFORM) - {"grad_scale"}:
        expected = with_numbers(function, on, {name: float(LARGE)})
        assert all(map(torch.equal, with_numbers(function, on, {name: LARGE}), expected)), name


@pytest.mark.parametrize(
    "config",
    [
        lambda x: LossConfig(kl=KL(x)),
        lambda x: LossConfig(rollout_kl=KL(x)),
        lambda x: LossConfig(entropy_coef=x),
        lambda x: LossConfig(kl=KL(0.5, limit=(x, x), ratio_weighted=True, ratio_cap=x)),
        lambda x: LossConfig(log_ratio_limit=x),
        lambda x: LossConfig(Clip(0.2, x)),
        lambda x: LossConfig(rollout=TruncatedIS(x)),
    ],
)
def test_large_integers_of_a_config(config):
    case = make()
    case.options["rollout_log_probs"] = case.options["ref_log_probs"]
    for backend in ("cpu", "torch"):
        (out, gradient), (expected, slopes) = (case.run(backend, config=config(x)) for x in (LARGE, float(LARGE)))
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(gradient, slopes)


@pytest.mark.parametrize("scorer", ["grpo_loss", "linear_grpo_loss"])
@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0), np.float32(0)], ids=repr)
def test_a_normalizer_of_nothing(scorer, zero):
    """Tokens that count are averaged over something; where none does, 0 is what was counted."""
    with pytest.raises(ValueError, match=f"{scorer}: expected normalizer > 0 where tokens count; got 0"):
        SCORERS[scorer](normalizer=zero)
    assert READERS[scorer](torch.zeros(2, 3), normalizer=zero).loss == 0


@pytest.mark.parametrize("reader", ["grpo_loss", "token_log_probs", "linear_grpo_loss", "align"])
def test_ids_are_no_mask(reader):
    ids = batch()["token_ids"]
    for mask in (ids, ids.float(), ids.to(torch.int32)):
        with pytest.raises(ValueError, match=r"mask that says which tokens count; got the \w+_ids again"):
            READERS[reader](mask)
    READERS[reader](ids + 1)  # segments, say


@pytest.mark.parametrize("bad", [-1, 97])
def test_ids_outside_the_vocabulary_are_refused(bad):
    """At a live position: a negative one would count from the other end."""
    case = make()
    row, column = case.mask.nonzero()[0].tolist()
    case.token_ids[row, column] = bad
    states, weight = torch.randn(*case.token_ids.shape, 5), torch.randn(case.logits.shape[-1], 5)
    rest = (case.token_ids, case.advantages, case.mask)
    message = rf"token ids in \[0, 97\); got token_ids\[{row}, {column}\] = {bad} at a live position"
    for call in (
        lambda: linear_grpo_loss(states, weight, *rest),
        lambda: grpo_loss(case.logits, *rest, check=True),
        lambda: grpo_loss(case.logits, *rest, support=TopK(3)),
    ):
        with pytest.raises(IndexError, match=message):
            call()


@pytest.mark.parametrize("bounds", [torch.tensor([3]), torch.tensor([0.0, 3.0]), torch.zeros(2, 2, dtype=torch.int32)])
def test_bounds_that_are_none_are_described(bounds):
    b = batch()
    got = f"{str(bounds.dtype).removeprefix('torch.')} {tuple(bounds.shape)}"
    message = f"cu_seqlens (S+1,) of int32 or int64, of two numbers or more; got {got}."
    with pytest.raises(ValueError, match=re.escape(message)):
        grpo_loss(b["logits"], b["token_ids"], b["advantages"], cu_seqlens=bounds)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
@pytest.mark.parametrize("function", [grpo_loss, reference.grpo_loss], ids=["ours", "reference"])
def test_whatever_is_not_0_in_a_mask_counts(function, dtype):
    """Numbers of segments, say."""
    b = batch()
    rest = (b["logits"], b["token_ids"], b["advantages"])
    expected = function(*rest, torch.tensor([[True, False, True], [True, True, False]]))
    out = function(*rest, torch.tensor([[3, 0, 2], [7, 1, 0]]).to(dtype))
    assert out.loss == expected.loss
    assert out.log_probs.equal(expected.log_probs)


FREED = ("logits", "token_ids", "old_log_probs", "ref_log_probs", "rollout_log_probs")


@pytest.mark.parametrize("name", FREED)
def test_a_tensor_whose_memory_was_freed(backend, name):
    """As FSDP frees a parameter: to a compiled library its address is that of a tensor that was not given. PyTorch's
    own operators, as those of pooled ratios, read the address, which no process survives."""
    if backend != "cpu":
        pytest.skip("native.py takes the addresses, for CUDA's library as well")
    b = batch()
    known = {n: torch.full((2, 3), -2.0) for n in ("old_log_probs", "ref_log_probs", "rollout_log_probs")}
    given = {**b, "mask": torch.ones(2, 3), **known}
    given[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=rf"^{name}: the memory of this \(2, 3.* tensor was freed"):
        grpo_loss(**given, config=LossConfig.preset("grpo", kl=KL(0.1)), backend=backend)


def test_empty_tensors_have_no_memory_to_miss():
    """Their address is null as well."""
    empty = torch.empty(0, 3)
    ids = torch.empty(0, 3, dtype=torch.int64)
    loss = grpo_loss(torch.empty(0, 3, 7), ids, torch.empty(0), empty, old_log_probs=empty, backend="cpu").loss
    assert loss == 0
