"""The autograd contract: who gets a gradient, how often, in whose memory, and what is refused."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from cases import make
from conftest import DEVICE
from torch.utils.checkpoint import checkpoint

from grpo_kernels import (
    KL,
    Clip,
    Divergence,
    LossConfig,
    Recorded,
    Reinforce,
    Teacher,
    TopK,
    Unclipped,
    grpo_loss,
    linear_grpo_loss,
    linear_token_divergence,
    linear_token_log_probs,
    policy_loss,
    token_divergence,
    token_log_probs,
)
from grpo_kernels.verification.verify import complete

ROUTES = {
    "one pass": {"config": complete("dapo")},
    "one pass, entropy": {"config": complete("grpo", entropy_coef=0.3)},
    "two passes": {"config": complete("gspo", surrogate=Clip(0.2, 0.2))},
}


@pytest.fixture(params=ROUTES)
def route(request):
    return ROUTES[request.param]


def model_logits(case) -> tuple[torch.Tensor, torch.Tensor]:
    """A leaf, and logits computed from it as a model would."""
    leaf = case.logits.clone().requires_grad_()
    return leaf, leaf * 1.0


def call(logits, case, backend=None, **options):
    return grpo_loss(logits, *case.arguments, backend=backend, **{**case.options, **options})


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(Clip(0.2, 0.28, dual=2.0), kl=KL(0.1), entropy_coef=0.1),
        LossConfig(Unclipped(), level="sequence", kl=KL(0.1, "k2", ratio_weighted=True)),
        LossConfig(Clip(), level="sequence_product", aggregation="token_mean"),
        LossConfig(Reinforce(), kl=KL(0.2, "k1")),
    ],
    ids=str,
)
@pytest.mark.parametrize("transform", [{}, {"logit_softcap": 3.0, "temperature": 0.7}], ids=["plain", "softcap"])
@pytest.mark.sample(triton=1)
def test_gradcheck(backend, config, transform):
    """Numerical derivatives of the real kernels in float64. Straddling a bound of the clip would break any check."""
    case = make(batch=3, length=2, vocab=5, dtype=torch.float64, **transform)

    class Loss(torch.autograd.Function):
        """gradcheck calls backward several times, the one-pass loss allows one: its gradient is taken once and kept."""

        @staticmethod
        def forward(ctx, logits):
            with torch.enable_grad():
                leaf = logits.detach().requires_grad_()
                loss = call(leaf, case, backend, config=config).loss
                ctx.save_for_backward(*torch.autograd.grad(loss, leaf))
            return loss.detach()

        @staticmethod
        def backward(ctx, upstream):
            return upstream * ctx.saved_tensors[0]

    torch.autograd.gradcheck(Loss.apply, case.logits.requires_grad_(), atol=1e-8, rtol=1e-6)


def test_gradcheck_of_token_log_probs(backend):
    case = make(batch=2, length=3, vocab=5, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda x: tuple(token_log_probs(x, case.token_ids, case.mask, logit_softcap=4.0, backend=backend)),
        case.logits.requires_grad_(),
        atol=1e-8,
        rtol=1e-6,
    )


def test_only_the_loss_is_differentiable(backend, route):
    case = make()
    for name in ("old_log_probs", "ref_log_probs"):
        case.options[name].requires_grad_()
    case.advantages.requires_grad_()
    out, _ = case.run(backend, **route, token_weights=torch.ones(6, 9, requires_grad=True))
    assert not out.log_probs.requires_grad
    assert not out.entropy.requires_grad
    assert not out.metrics.vector.requires_grad
    assert case.advantages.grad is None
    assert case.options["old_log_probs"].grad is None


def test_second_backward(backend, route):
    """The one-pass buffer is handed over once and says so; two passes repeat, bit for bit."""
    case = make()
    leaf, logits = model_logits(case)
    out = call(logits, case, backend, **route)
    out.loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    leaf.grad = None
    one_pass = backend != "torch" and route is not ROUTES["two passes"]
    if one_pass:
        with pytest.raises(RuntimeError, match="a second backward through one call(.|\n)*token_log_probs"):
            out.loss.backward()
    else:
        out.loss.backward()
        assert torch.equal(leaf.grad, first)


def test_second_backward_of_log_probs(backend):
    case = make()
    leaf, logits = model_logits(case)
    out = token_log_probs(logits, case.token_ids, case.mask, backend=backend)
    gradients = [
        torch.autograd.grad(out.log_probs.sum() + out.entropy.sum(), leaf, retain_graph=True)[0] for _ in range(2)
    ]
    assert torch.equal(*gradients)


def test_double_backward_raises(backend, route):
    case = make(dtype=torch.float64)
    leaf, logits = model_logits(case)
    loss = call(logits, case, backend, **route).loss
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
    direct = case.logits.clone().requires_grad_()  # nothing but the loss requires grad
    (gradient,) = torch.autograd.grad(call(direct, case, backend, **route).loss, direct, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
        (call(direct, case, backend, **route).loss + gradient.pow(2).sum()).backward()


LEAVES = {"grpo": (2, 3, 7), "log_probs": (2, 3), "hidden": (2, 3, 5), "head": (7, 5)}
IDS, HEAD = torch.arange(6).view(2, 3), torch.linspace(-1, 1, 35).view(7, 5)
SIGNS, HIDDEN = torch.tensor([1.0, -1.0]), torch.linspace(-2, 1, 30).view(2, 3, 5)
TEACHER = {"teacher": Teacher(logits=torch.zeros(2, 3, 7)), "config": LossConfig(divergence=Divergence("jsd"))}
FUNCTIONS = {
    "one pass": ("grpo", lambda x: grpo_loss(x, IDS, SIGNS).loss),
    "two passes": ("grpo", lambda x: grpo_loss(x, IDS, SIGNS, config="gspo").loss),
    "inplace": ("grpo", lambda x: grpo_loss(x * 1, IDS, SIGNS, inplace=True).loss),
    "token losses": ("grpo", lambda x: grpo_loss(x, IDS, SIGNS, token_losses=True).token_losses.sum()),
    "teacher": ("grpo", lambda x: grpo_loss(x, IDS, SIGNS, **TEACHER).loss),
    "support": ("grpo", lambda x: grpo_loss(x, IDS, SIGNS, support=TopK(3)).loss),
    "log-probs": ("grpo", lambda x: token_log_probs(x, IDS).log_probs.sum()),
    "policy_loss": ("log_probs", lambda x: policy_loss(x, SIGNS).loss),
    "hidden": ("hidden", lambda x: linear_grpo_loss(x, HEAD, IDS, SIGNS).loss),
    "head": ("head", lambda x: linear_grpo_loss(HIDDEN, x, IDS, SIGNS).loss),
    "log-probs of hidden": ("hidden", lambda x: linear_token_log_probs(x, HEAD, IDS).log_probs.sum()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_second_derivative_is_silently_zero(name):
    """As allow_unused=True, and torch.autograd.functional with it, makes of one that leads nowhere."""
    leaf, function = FUNCTIONS[name]
    x = torch.linspace(-3, -1, math.prod(LEAVES[leaf])).view(LEAVES[leaf])
    for ask in (torch.autograd.functional.hessian, lambda *given: torch.autograd.functional.hvp(*given, v=x)):
        with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
            ask(function, x)
    factor = torch.tensor(2.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x.requires_grad_()) * factor, x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
        torch.autograd.grad(gradient.sum(), factor, allow_unused=True)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "log-probs" not in name])
def test_a_loss_may_be_overwritten(name):
    """As accumulation and Megatron's schedules do."""
    leaf, function = FUNCTIONS[name]
    x = torch.linspace(-3, -1, math.prod(LEAVES[leaf])).view(LEAVES[leaf]).requires_grad_()
    (expected,) = torch.autograd.grad(function(x), x)
    loss = function(x)
    loss *= 6
    loss /= 3
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], 2 * expected)


class Stop(torch.autograd.Function):
    """A function without a gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_gradient_from_above(name):
    """None, as of PyTorch's own operators; and the call can still be asked for one."""
    leaf, function = FUNCTIONS[name]
    x = torch.linspace(-3, -1, math.prod(LEAVES[leaf])).view(LEAVES[leaf]).requires_grad_()
    loss = function(x)
    Stop.apply(loss).backward(retain_graph=True)
    assert x.grad is None
    loss.backward()
    assert x.grad.abs().sum() > 0


def test_create_graph_under_checkpointing():
    """What is saved is unpacked twice, and the gradient is that without a graph."""
    x = torch.linspace(-3, -1, 42).view(2, 3, 7).requires_grad_()
    made = []
    for create_graph in (False, True):
        loss = checkpoint(lambda x: grpo_loss(x * 1, IDS, SIGNS, config="gspo").loss, x, use_reentrant=False)
        made += torch.autograd.grad(loss, x, create_graph=create_graph)
    assert torch.equal(*made)


def test_transforms_are_refused(backend):
    case = make()
    with pytest.raises(RuntimeError, match=r"grpo_loss: .*torch.func"):
        torch.func.grad(lambda x: call(x, case, backend).loss)(case.logits)
    with pytest.raises(RuntimeError, match="token_log_probs: .*torch.func"):
        torch.func.vmap(lambda x: token_log_probs(x, case.token_ids, backend=backend).log_probs)(case.logits[None])
    for function, given in ((policy_loss, case.options["old_log_probs"]), (grpo_loss, case.logits)):
        ids = () if function is policy_loss else (case.token_ids,)
        with pytest.raises(RuntimeError, match=f"{function.__name__}: .*torch.func"):  # over the mask alone
            torch.func.vmap(lambda mask, f=function, a=(given, *ids): f(*a, case.advantages, mask).loss)(
                case.mask[None]
            )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(case.logits, torch.ones_like(case.logits))
        with pytest.raises(RuntimeError, match="forward"):
            call(dual, case, backend)


def test_gradients_at_once(backend):
    """What is computed once cannot be had for several losses; what was not handed over is there still."""
    if backend == "torch":
        pytest.skip("two passes, which repeat")
    case = make(batch=2, length=3, vocab=11)
    leaf, given = case.logits.requires_grad_(), {"backend": backend, "config": complete("dapo")}
    loss = call(leaf, case, **given).loss
    with pytest.raises(RuntimeError, match="grpo_loss: several gradients at once.*token_log_probs"):
        torch.autograd.grad(loss, leaf, torch.ones(3), retain_graph=True, is_grads_batched=True)
    (gradient,) = torch.autograd.grad(loss, leaf)
    (wanted,) = torch.autograd.grad(call(leaf, case, **given).loss, leaf)
    assert torch.equal(gradient, wanted)


LOGITS = torch.linspace(-3, -1, 42).view(2, 3, 7)
DISTILLED = LossConfig(surrogate=None, divergence=Divergence("reverse_kl"))
FOLLOWED = {
    "advantages": ((2,), {}),
    "old_log_probs": ((2, 3), {}),
    "token_weights": ((2, 3), {}),
    "temperature": ((), {}),
    "temperature of sequences": ((2,), {}),
    "kl_coef": ((), {"ref_log_probs": torch.zeros(2, 3)}),
}


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_transforms_of_any_argument_are_refused(name, transform):
    """Their derivative would be 0 in silence."""
    shape, options = FOLLOWED[name]

    def loss(value):
        given = {"advantages": SIGNS, **options, name.split()[0]: value}
        return grpo_loss(LOGITS, IDS, given.pop("advantages"), **given).loss

    x = torch.ones(shape)
    runs = {
        "grad": lambda: torch.func.grad(loss)(x),
        "jvp": lambda: torch.func.jvp(loss, (x,), (x,)),
        "vmap": lambda: torch.func.vmap(loss)(x[None]),
    }
    with pytest.raises(RuntimeError, match=r"grpo_loss: torch.func transforms \(grad, vmap, jvp\) are not supported"):
        runs[transform]()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="grpo_loss: forward-mode"):
        loss(torch.autograd.forward_ad.make_dual(x, x))


TEACHERS = {
    "token_divergence": lambda x: token_divergence(LOGITS, Teacher(logits=x), IDS).divergence,
    "grpo_loss": lambda x: grpo_loss(LOGITS, IDS, SIGNS, teacher=Teacher(logits=x), config=DISTILLED).loss,
    "linear_token_divergence": lambda x: (
        linear_token_divergence(LOGITS, torch.ones(7, 7), Teacher(hidden=x, weight=torch.ones(7, 7)), IDS).divergence
    ),
}
SETS = {
    "a mask": lambda x: token_log_probs(LOGITS, IDS, support=x).log_probs,
    "recorded": lambda x: token_log_probs(LOGITS, IDS, support=Recorded.from_counts(x, torch.ones_like(IDS))).log_probs,
}


@pytest.mark.parametrize("name", TEACHERS)
def test_transforms_of_a_teacher_are_refused(name):
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"{name}: forward-mode"):
        TEACHERS[name](torch.autograd.forward_ad.make_dual(LOGITS + 1, LOGITS))
    with pytest.raises(RuntimeError, match=rf"{name}: torch.func transforms \(grad, vmap, jvp\) are not supported"):
        torch.func.vmap(TEACHERS[name])(torch.stack([LOGITS, LOGITS]))


@pytest.mark.parametrize("name", SETS)
def test_transforms_of_a_support_are_refused(name):
    given = torch.ones(2, *LOGITS.shape, dtype=torch.bool) if name == "a mask" else torch.stack([IDS.flatten()] * 2)
    with pytest.raises(RuntimeError, match=r"token_log_probs: torch.func transforms \(grad, vmap, jvp\) are not"):
        torch.func.vmap(SETS[name])(given)


@pytest.mark.parametrize("inplace", [False, True])
def test_no_grad_writes_nothing(backend, route, inplace):
    case = make()
    leaf, logits = model_logits(case)
    kept = logits.detach().clone()
    version = logits._version
    expected, _ = case.run(backend, **route)
    with torch.no_grad():
        out = call(logits, case, backend, inplace=inplace, **route)
    assert not out.loss.requires_grad
    assert torch.equal(logits, kept)
    assert logits._version == version
    # without old log-probs' noise the same kernels ran: equal outputs, loss up to the order of its terms
    assert torch.equal(out.log_probs, expected.log_probs)
    torch.testing.assert_close(out.loss, expected.loss.detach(), rtol=1e-6, atol=1e-7)


def test_inference_mode(backend):
    case = make()
    with torch.inference_mode():
        out = call(case.logits, case, backend)
        log_probs = token_log_probs(case.logits, case.token_ids, case.mask, backend=backend).log_probs
    assert torch.equal(out.log_probs, log_probs)
    again, _ = case.run(backend)  # nothing cached in inference mode may poison a later training call
    assert torch.equal(again.log_probs, log_probs)


def test_logits_that_need_no_gradient(backend, route):
    out = call(make().logits, make(), backend, **route)
    assert not out.loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("extra_row", [True, False])
def test_inplace_is_out_of_place(backend, route, dtype, announced, extra_row):
    case = make(dtype=dtype, extra_row=extra_row)
    scale = {"grad_scale": 1.0} if announced else {}
    leaf, logits = model_logits(case)
    expected = call(logits, case, backend, **route, **scale)
    expected.loss.backward()
    other, logits = model_logits(case)
    storage, version = logits.data_ptr(), logits._version
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    out = call(logits, case, backend, inplace=True, **route, **scale)
    out.loss.backward()
    assert torch.equal(other.grad, leaf.grad)
    assert torch.equal(out.loss, expected.loss)
    assert seen == [storage]  # the gradient lies where the logits were
    assert logits._version > version


@pytest.mark.parametrize("extra_row", [True, False])
def test_inplace_is_noticed_by_other_users_of_the_logits(backend, route, extra_row):
    """A node that saved the logits must raise, not compute with the gradient."""
    case = make(extra_row=extra_row)
    leaf, logits = model_logits(case)
    other = logits.square().sum()  # saves logits
    out = call(logits, case, backend, inplace=True, **route)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.loss + other).backward()
        torch.autograd.grad(other, leaf)  # where two passes write only now


@pytest.mark.parametrize("extra_row", [True, False])
def test_inplace_with_model_saved_output(backend, extra_row):
    """tanh saves its output, the logits: autograd must raise."""
    case = make(extra_row=extra_row)
    leaf = case.logits.clone().requires_grad_()
    logits = torch.tanh(leaf)
    out = call(logits, case, backend, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_inplace_refusals(backend, route):
    case = make()
    leaf = case.logits.clone().requires_grad_()
    with pytest.raises(ValueError, match="a leaf that requires grad(.|\n)*hint: "):
        call(leaf, case, backend, inplace=True, **route)
    row = torch.randn(1, 1, 97, requires_grad=True) * 1.0
    with pytest.raises(ValueError, match=r"without internal overlap with inplace=True(.|\n)*logits.contiguous\(\)"):
        call(row.expand(6, 10, 97), case, backend, inplace=True, **route)
    strided = (torch.randn(6 * 97 + 9 * 50, requires_grad=True) * 1.0).as_strided((6, 10, 97), (97, 50, 1))
    with pytest.raises(ValueError, match="without internal overlap"):
        call(strided, case, backend, inplace=True, **route)
    with pytest.raises(ValueError, match="a leaf that requires grad"):
        token_log_probs(leaf, case.token_ids, inplace=True, backend=backend)
    before = leaf.detach().clone()
    with pytest.raises(ValueError, match="a view of a leaf that requires grad(.|\n)*hint: "):
        call(leaf[:], case, backend, inplace=True, **route)
    with pytest.raises(ValueError, match="a view of a leaf that requires grad"):
        token_log_probs(leaf.view(1, *leaf.shape)[0], case.token_ids, inplace=True, backend=backend)
    assert torch.equal(leaf, before)


def test_inplace_leaf_under_no_grad_is_fine(backend):
    case = make()
    leaf = case.logits.clone().requires_grad_()
    with torch.no_grad():
        assert call(leaf, case, backend, inplace=True).loss.isfinite()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_inplace_is_refused(backend, reentrant):
    from torch.utils.checkpoint import checkpoint

    case = make()
    leaf = case.logits.clone().requires_grad_()

    def step(x):
        return call(x * 1.0, case, backend, inplace=True).loss

    with pytest.raises(RuntimeError, match="inside activation checkpointing's recomputation"):
        checkpoint(step, leaf, use_reentrant=reentrant).backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_out_of_place(backend, route, reentrant):
    from torch.utils.checkpoint import checkpoint

    case = make()
    _, expected = case.run(backend, **route)
    leaf = case.logits.clone().requires_grad_()
    checkpoint(lambda x: call(x * 1.0, case, backend, **route).loss, leaf, use_reentrant=reentrant).backward()
    assert torch.equal(leaf.grad, expected)


def test_inplace_log_probs(backend):
    """Written during backward, not before: the outputs can be used first."""
    case = make()
    leaf, logits = model_logits(case)
    expected = token_log_probs(logits, case.token_ids, case.mask, backend=backend)
    (gradient,) = torch.autograd.grad(expected.log_probs.sum() - expected.entropy.sum(), leaf)
    leaf, logits = model_logits(case)
    kept = logits.detach().clone()
    out = token_log_probs(logits, case.token_ids, case.mask, inplace=True, backend=backend)
    assert torch.equal(logits, kept)
    (inplace,) = torch.autograd.grad(out.log_probs.sum() - out.entropy.sum(), leaf)
    assert torch.equal(inplace, gradient)
    assert not torch.equal(logits, kept)


def test_inplace_log_probs_backward_twice(backend):
    case = make(extra_row=False)
    _, logits = model_logits(case)
    out = token_log_probs(logits, case.token_ids, case.mask, inplace=True, backend=backend)
    torch.autograd.grad(out.log_probs.sum(), logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.entropy.sum(), logits)


def test_one_output_alone(backend):
    """Nothing is done for the output without a gradient, and it counts as zero."""
    case = make(dtype=torch.float64)
    leaf = case.logits.clone().requires_grad_()
    out = token_log_probs(leaf, case.token_ids, case.mask, backend=backend)
    (of_log_probs,) = torch.autograd.grad(out.log_probs.sum(), leaf, retain_graph=True)
    (of_entropy,) = torch.autograd.grad(out.entropy.sum(), leaf, retain_graph=True)
    (of_both,) = torch.autograd.grad(out.log_probs.sum() + out.entropy.sum(), leaf)
    torch.testing.assert_close(of_log_probs + of_entropy, of_both, rtol=1e-12, atol=1e-14)
    for expanded in (torch.ones(()).double().expand(6, 9), torch.ones(9, 6).double().t()):
        leaf.grad = None
        out = token_log_probs(leaf, case.token_ids, case.mask, backend=backend)
        out.log_probs.backward(expanded)
        torch.testing.assert_close(leaf.grad, of_log_probs)


def test_gradient_buffer_is_not_kept(backend, route):
    """After backward nothing of the logits' size hangs on the loss."""
    case = make()
    _, logits = model_logits(case)
    out = call(logits, case, backend, **route)
    buffers: list = []
    logits.register_hook(lambda gradient: buffers.append(weakref.ref(gradient)))
    out.loss.backward()
    gc.collect()
    assert buffers[0]() is None


@pytest.mark.parametrize("upstream", [1.0, 0.5, -3.0, 0.0])
def test_upstream_factor(backend, route, upstream):
    case = make(dtype=torch.float64)
    _, unit = case.run(backend, **route)
    _, scaled = case.run(backend, scale=upstream, **route)
    torch.testing.assert_close(scaled, upstream * unit, rtol=1e-13, atol=1e-16)


def test_losses_may_be_summed(backend, route):
    a, b = make(seed=1), make(seed=2)
    leaves = [case.logits.clone().requires_grad_() for case in (a, b)]
    losses = [call(leaf, case, backend, **route).loss for leaf, case in zip(leaves, (a, b), strict=True)]
    sum(losses).backward()
    for leaf, case in zip(leaves, (a, b), strict=True):
        assert torch.equal(leaf.grad, case.run(backend, **route)[1])


def test_logits_with_a_second_use(backend, route):
    """An auxiliary loss on the same logits, out of place: gradients add."""
    case = make(dtype=torch.float64)
    leaf, logits = model_logits(case)
    (call(logits, case, backend, **route).loss + 1e-3 * logits.square().sum()).backward()
    _, expected = case.run(backend, **route)
    torch.testing.assert_close(leaf.grad, expected + 2e-3 * case.logits)


def test_amp_and_module_hooks(backend):
    """Under autocast the loss computes in fp32, whatever the surrounding dtype."""
    case = make()
    expected, _ = case.run(backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, _ = case.run(backend)
    assert torch.equal(out.loss, expected.loss)


def test_a_call_that_fails_leaves_the_logits():
    """In place, an id that a CPU refuses is found before anything is written, and before the write is noted."""
    logits = torch.randn(1, 3, 4, requires_grad=True)
    inner = logits * 1
    before, version = inner.detach().clone(), inner._version
    with pytest.raises(IndexError):
        grpo_loss(inner, torch.tensor([[0, 9]]), torch.ones(1), inplace=True, backend="cpu")
    assert torch.equal(inner.detach(), before)
    assert inner._version == version
