"""The registered operators, torch.compile, and messages for bad input."""

from __future__ import annotations

import re
import subprocess
import sys
import types

import pytest
import torch
from cases import make
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd.profiler import profile
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import (
    Cispo,
    Clip,
    GRPOLoss,
    LossConfig,
    MaskedIS,
    OffPolicyMask,
    Sapo,
    TruncatedIS,
    grpo_loss,
    linear_token_log_probs,
    normalizer,
    token_log_probs,
)
from grpo_kernels.backends import ops, spec
from grpo_kernels.backends.contract import Rows, TokenInputs, TokenRecords
from grpo_kernels.backends.spec import LogitArgs, numbers_vector, objective_spec
from grpo_kernels.objectives.metrics import FIELDS
from grpo_kernels.objectives.sequences import sequence_sum
from grpo_kernels.verification.verify import complete


def rows_of(case, config=None) -> tuple[torch.Tensor, ...]:
    numbers = numbers_vector(LogitArgs(), 1.0, config, torch.float32, torch.device("cpu"))
    return case.token_ids, case.mask, numbers, False, None


def op_calls(backend: str) -> dict:
    case, config = make(batch=3, length=4, vocab=37), complete("dapo", rollout=TruncatedIS(2.0))
    rows = rows_of(case, config)
    per_row = [torch.randn(3, 4) for _ in range(5)]
    stats = ops.log_probs(Rows(case.logits, *rows), backend)
    old, ref = case.options["old_log_probs"], case.options["ref_log_probs"]
    inputs = TokenInputs(per_row[0], per_row[1].abs(), old, ref, old, per_row[2].abs(), None, per_row[3].abs())
    compared = TokenInputs(per_row[0], per_row[4], old, ref, None, None, None, None)
    flags = torch.zeros(3, 4, dtype=torch.uint8)
    records = TokenRecords(per_row[2], per_row[3], flags, torch.empty(0), torch.empty(0))
    pairs = torch.stack([case.token_ids, (case.token_ids + 1) % 37], -1).flatten(0, 1)
    recorded = pairs[[0, 3, 7]].flatten(), torch.tensor([0, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6, 6])
    calls = {
        "set_log_probs": (case.logits, *rows, *recorded, backend),
        "set_log_probs_backward": (case.logits, *rows, *recorded, *stats, per_row[3], per_row[4], backend),
        "log_probs": (case.logits, *rows, backend),
        "log_probs_backward": (case.logits, *rows, *stats, per_row[3], None, backend),
        "log_probs_backward_": (case.logits.clone(), *rows, *stats, per_row[3], per_row[4], backend),
        "token_sums": (per_row[0], per_row[1], case.mask, case.mask, *compared, *records, 3, 3, backend),
    }
    if backend != "torch":
        spec = objective_spec(config, True, config.schemes, True)
        calls["token_terms"] = (stats[0], stats[1], case.mask, rows[2], *inputs, *spec, backend)
        calls["fused_loss"] = (case.logits, *rows, *inputs, *spec, backend)
        calls["fused_loss_"] = (case.logits.clone(), *rows, *inputs, *spec, backend)
    return calls


NAMES = (
    "log_probs",
    "log_probs_backward",
    "log_probs_backward_",
    "set_log_probs",
    "set_log_probs_backward",
    "fused_loss",
    "fused_loss_",
    "token_terms",
    "token_sums",
)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(backend, name):
    calls = op_calls(backend)
    if name not in calls:
        pytest.skip("the torch backend has no one-pass loss")
    # They register no autograd formula: the public functions attach gradients themselves.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(ops, name).operator, calls[name], test_utils=checks)


def test_opcheck_of_helpers():
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        ops.rescale_.operator,
        (torch.randn(5, 7), torch.zeros(5), torch.tensor(2.0), torch.tensor(1.0), "torch"),
        test_utils=checks,
    )
    torch.library.opcheck(sequence_sum, (torch.randn(5), torch.tensor([0, 2, 5])), test_utils=checks)


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("follow", [profile, Functions, Dispatched, lambda: torch.device("cpu")])
def test_who_follows_operators_sees_ours(follow, monkeypatch):
    """Where nobody does, an operator is its function alone; where somebody does, PyTorch dispatches it."""
    function, seen = ops.log_probs.operator, []
    cells = dict(zip(ops.log_probs.__code__.co_freevars, ops.log_probs.__closure__, strict=True))
    monkeypatch.setattr(cells["registered"], "cell_contents", lambda *flat: seen.append(flat) or function(*flat))
    case = make(batch=2, length=3, vocab=7)
    rows = Rows(case.logits, *rows_of(case))
    alone = ops.log_probs(rows, "torch")
    assert not seen
    with follow():
        followed = ops.log_probs(rows, "torch")
    assert len(seen) == 1
    assert all(torch.equal(a, b) for a, b in zip(alone, followed, strict=True))


def test_tensors_that_stand_for_others_are_dispatched():
    """A fake tensor outside of its mode has no memory to hand to a kernel."""
    case = make(batch=2, length=3, vocab=7)
    rows = Rows(case.logits, *rows_of(case))
    with FakeTensorMode() as mode:
        fake = Rows(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in rows))
    assert all(isinstance(x, FakeTensor) and x.shape == (2, 3) for x in ops.log_probs(fake, "torch"))


def compiled(function, engine="inductor"):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=engine)


@pytest.fixture(autouse=True)
def _nondeterministic_fill():
    """Inductor's own buffers need no poison; filling them is what makes it break graphs."""
    torch.use_deterministic_algorithms(False)


COMPILED = ("dapo", "gspo", complete("grpo", entropy_coef=0.1))
"""With what Inductor makes of it: the first out of place in every run, the others nightly."""


@pytest.mark.parametrize(
    ("config", "inplace"),
    [
        pytest.param(config, inplace, marks=() if config == "dapo" and not inplace else pytest.mark.nightly)
        for config in COMPILED
        for inplace in (False, True)
    ],
    ids=str,
)
def test_compile(backend, config, inplace):
    """One graph, the same bits as eager."""
    case = make()

    def step(leaf, ids, advantages, mask, old, ref):
        out = grpo_loss(
            leaf * 1.0, ids, advantages, mask, old_log_probs=old, ref_log_probs=ref, config=config, inplace=inplace,
            backend=backend,
        )  # fmt: skip
        return out.loss, out.log_probs, out.metrics.vector

    arguments = (*case.arguments, case.options["old_log_probs"], case.options["ref_log_probs"])
    results = []
    for function in (step, compiled(step)):
        leaf = case.logits.clone().requires_grad_()
        loss, log_probs, vector = function(leaf, *arguments)
        loss.backward()
        results.append((loss.detach(), log_probs, vector, leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


CALLS = {
    "packed": {"packed": True},
    "packed gspo": {"packed": True, "config": "gspo"},
    "numbers": {"temperature": 0.7, "logit_softcap": 5.0, "grad_scale": 0.5, "kl_coef": 0.1, "entropy_coef": 0.02},
    "weights": {"token_weights": torch.full((6, 9), 0.5), "normalizer": torch.tensor(3.0), "config": "dapo"},
    "normalizer": {"normalizer": normalizer(torch.ones(6, 9), "dapo") / 2, "config": "dapo"},
    "skipping": {"skip_zero_advantage": True, "ref_log_probs": None},
    "group mean": {"config": LossConfig(Clip(), aggregation="group_mean", group_size=2)},
    "pooled correction": {
        "rollout_log_probs": torch.full((6, 9), -4.0),
        "config": LossConfig(Cispo(), level="sequence", rollout=(MaskedIS(0, 3, "sequence"), OffPolicyMask(0.1))),
    },
    "entropy threshold": {
        "rollout_log_probs": torch.full((6, 9), -4.0),
        "entropy_threshold": torch.tensor(3.0),
        "config": LossConfig(Sapo(), rollout=TruncatedIS(1.5)),
    },
    "gmpo": {"config": "gmpo"},
    "rollout": {"rollout_log_probs": torch.full((6, 9), -4.0), "old_log_probs": None},
}


@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", CALLS)
def test_compile_other_calls(name, engine):
    """Traced and made functional in every run; with the C++ that Inductor makes of it, three times as long, nightly."""
    options = dict(CALLS[name])
    case = make(extra_row=False)
    if options.pop("packed", False):
        case = make(batch=1, length=12, extra_row=False)
        case.advantages = torch.tensor([1.0, -1.0, 0.5])
        options["cu_seqlens"] = torch.tensor([0, 4, 9, 12])

    def step(leaf):
        out = grpo_loss(leaf * 1.0, *case.arguments, **{**case.options, **options})
        return out.loss, out.metrics.vector

    results = []
    for function in (step, compiled(step, engine)):
        leaf = case.logits.clone().requires_grad_()
        loss, vector = function(leaf)
        (loss * options.get("grad_scale", 1.0)).backward()
        results.append((loss.detach(), vector, leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_compile_log_probs(backend):
    case = make()

    def step(leaf, ids, mask):
        out = token_log_probs(leaf * 1.0, ids, mask, temperature=0.7, backend=backend)
        return (out.log_probs.square() + out.entropy).sum()

    results = []
    for function in (step, compiled(step)):
        leaf = case.logits.clone().requires_grad_()
        function(leaf, case.token_ids, case.mask).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results)


@pytest.mark.sample(triton=0, torch=0)  # what compiles is above the backends
def test_compile_views_of_an_odd_vocabulary(backend):
    """Their gradient's strides are not those of a dense tensor; of static shapes, then of dynamic ones."""

    def step(leaf, ids, advantages):
        return grpo_loss((leaf * 1.0)[:, :-1], ids, advantages, grad_scale=1.0, backend=backend).loss

    function = compiled(step)
    for length in (3, 5, 6):
        case = make(batch=2, length=length, vocab=97)
        results = []
        for run in (step, function):
            leaf = case.logits.clone().requires_grad_()
            run(leaf, *case.arguments[:2]).backward()
            results.append(leaf.grad)
        torch.testing.assert_close(*results)
        assert results[0].count_nonzero() > 0


def test_compiled_gradients_are_not_copied(backend):
    """Of a view that inductor makes: its strides are those that the gradient's were computed from."""
    if backend == "torch":
        pytest.skip("it makes the gradient in the backward")
    case = make(batch=2, length=5, vocab=97)

    def step(leaf):
        logits = (leaf * 1.5)[:, 1:]  # PyTorch 2.14 knows that a product with 1 is none
        return grpo_loss(logits, *case.arguments[:2], grad_scale=1.0, backend=backend).loss

    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):  # their keys do not hold an operator's tags
        _, codes = run_and_get_code(torch.compile(step, fullgraph=True), case.logits.requires_grad_())
    assert re.search(r"empty_strided_\w+\(\(2, [56], 97\)", "".join(codes))  # the logits
    assert len(re.findall(r"empty_strided_\w+\(\(2, [56], 97\)", "".join(codes))) == 1


@pytest.mark.sample(triton=0, torch=0, cuda=0)
def test_annealing_recompiles_nothing(backend):
    """Numbers as 0-d tensors and new lengths: at most one graph for static and one for dynamic shapes."""
    from torch._dynamo.utils import counters

    def step(leaf, ids, advantages, mask, old, ref, kl_coef, temperature):
        out = grpo_loss(
            leaf * 1.0, ids, advantages, mask, old_log_probs=old, ref_log_probs=ref, config="grpo", kl_coef=kl_coef,
            temperature=temperature, backend=backend,
        )  # fmt: skip
        return out.loss

    function = compiled(step)
    counters.clear()
    for i in range(12):
        case = make(batch=4, length=5 + i, empty=False)
        leaf = case.logits.clone().requires_grad_()
        anneal = torch.tensor(0.1 / (i + 1)), torch.tensor(1.0 - 0.01 * i)
        loss = function(leaf, *case.arguments, *case.options.values(), *anneal)
        loss.backward()
        expected, gradient = case.run(backend, kl_coef=anneal[0], temperature=anneal[1])
        torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-8)
    assert counters["stats"]["unique_graphs"] <= 2


def packed(n: int):
    return torch.zeros(3 * n, 32), torch.ones(n), {"cu_seqlens": torch.arange(0, 3 * n + 1, 3)}


SIZES = {
    "sequences": lambda n: (torch.zeros(n, 5, 32), torch.ones(n), {}),
    "packed sequences": packed,
    "lengths": lambda n: (torch.zeros(4, n, 32), torch.ones(4), {}),
}


@pytest.mark.parametrize("config", ["grpo", "gspo"])
@pytest.mark.parametrize("name", SIZES)
def test_batches_of_every_size_are_one_graph(name, config):
    counter = CompileCounter()

    def step(leaf, ids, advantages, options):
        return grpo_loss(leaf * 1.0, ids, advantages, config=config, backend="torch", **options).loss

    torch.compiler.reset()
    function = torch.compile(step, dynamic=True, fullgraph=True, backend=counter)
    for n in range(2, 14):
        logits, advantages, options = SIZES[name](n)
        loss = function(logits.requires_grad_(), torch.zeros(logits.shape[:-1], dtype=torch.int64), advantages, options)
        torch.testing.assert_close(loss.item(), -1.0)  # on-policy
    assert counter.frame_count == 1


def bad(**changes):
    case = make(batch=3, length=4, vocab=11)
    names = {"logits": case.logits, "token_ids": case.token_ids, "advantages": case.advantages, "mask": case.mask}
    arguments = {**names, **case.options, **changes}
    return lambda: grpo_loss(**arguments)


ids34 = torch.zeros(3, 4, dtype=torch.int64)
BAD = {
    "logits as a list": (bad(logits=[1.0]), TypeError, "logits to be a tensor; got list"),
    "integer logits": (bad(logits=torch.zeros(3, 5, 11, dtype=torch.int64)), TypeError, "float32, bfloat16, float16"),
    "4-d logits": (bad(logits=torch.zeros(1, 3, 5, 11)), ValueError, r"got 4 dimensions(.|\n)*hint: flatten"),
    "transposed logits": (bad(logits=torch.zeros(3, 11, 5).mT), ValueError, "last stride 1(.|\n)*contiguous"),
    "no vocabulary": (bad(logits=torch.zeros(3, 5, 0)), ValueError, "at least one vocabulary column"),
    "float ids": (bad(token_ids=ids34.float()), TypeError, "integer token_ids; got torch.float32"),
    "longer ids": (bad(token_ids=torch.zeros(3, 7, dtype=torch.int64)), ValueError, r"\(3, 4\); got \(3, 7\)"),
    "flat ids": (bad(token_ids=ids34[0]), ValueError, "token_ids of shape"),
    "mask of another shape": (bad(mask=torch.ones(3, 5)), ValueError, r"mask of shape \(3, 4\); got \(3, 5\)"),
    "old of another shape": (bad(old_log_probs=torch.zeros(3, 5)), ValueError, r"old_log_probs of shape \(3, 4\)"),
    "too many advantages": (bad(advantages=torch.zeros(4)), ValueError, r"advantages of shape \(3,\) or \(3, 1\)"),
    "meta tensors": (bad(mask=torch.ones(3, 4, device="meta")), ValueError, "mask on the device of logits, cpu; got"),
    "KL without reference": (bad(ref_log_probs=None, kl_coef=0.1), ValueError, "ref_log_probs for the KL"),
    "unknown preset": (bad(config="grop"), ValueError, "Did you mean 'grpo'"),
    "config of another type": (bad(config=0.2), TypeError, "a LossConfig or the name of a preset; got float"),
    "unknown backend": (bad(backend="tritn"), ValueError, "backend must be one of cpu, cuda, triton, torch"),
    "zero temperature": (bad(temperature=0.0), ValueError, "temperature to be a finite number > 0; got 0.0"),
    "NaN temperature": (bad(temperature=float("nan")), ValueError, "temperature to be a finite number > 0; got nan"),
    "negative softcap": (bad(logit_softcap=-3.0), ValueError, "logit_softcap to be a finite number > 0"),
    "infinite KL": (bad(kl_coef=float("inf")), ValueError, "kl_coef to be a finite number or a 0-d tensor; got inf"),
    "KL per token": (bad(kl_coef=torch.ones(3)), ValueError, r"a number or a 0-d tensor; got shape \(3,\)"),
    "negative grad_scale": (bad(grad_scale=-1.0), ValueError, "grad_scale to be a finite number > 0; got -1.0"),
    "normalizer per sequence": (bad(normalizer=torch.ones(3)), ValueError, "normalizer to be a number or a 0-d tensor"),
    "negative normalizer": (bad(normalizer=-3.0), ValueError, "normalizer >= 0; got -3.0"),
    "advantages in a list": (bad(advantages=[0.0, 1.0, 2.0]), TypeError, r"advantages to be a tensor; got list"),
    "probabilities as old": (
        bad(old_log_probs=torch.full((3, 4), 0.5), check=True), ValueError, "old_log_probs <= 0; got 0.5 .*other live",
    ),
    "NaN as ref": (
        bad(ref_log_probs=torch.full((3, 4), float("nan")), check=True), ValueError, "ref_log_probs <= 0; got nan",
    ),
    "integer old": (bad(old_log_probs=torch.zeros(3, 4).long()), TypeError, "old_log_probs of a floating dtype"),
    "option of the module": (lambda: GRPOLoss("grpo", temprature=0.7), ValueError, "Did you mean 'temperature'"),
    "packed without bounds": (
        bad(logits=torch.zeros(12, 11), token_ids=ids34.view(-1), mask=None, advantages=torch.zeros(1),
            old_log_probs=None, ref_log_probs=None),
        ValueError, r"cu_seqlens with packed logits \(N, ...\)(.|\n)*hint: cu_seqlens=torch.tensor\(\[0, N\]\)",
    ),
    "float bounds": (bad(cu_seqlens=torch.tensor([0.0, 4.0])), ValueError, r"cu_seqlens \(S\+1,\) of int32 or int64"),
    "packed in rows": (bad(cu_seqlens=torch.tensor([0, 4])), ValueError, r"packed tensors \(N,\) or .*got 3 rows"),
    "skipping with KL": (
        bad(skip_zero_advantage=True, kl_coef=0.1), ValueError, "skip_zero_advantage=True .*got a KL term, an",
    ),
    "skipping tokens of a pooled ratio": (
        bad(skip_zero_advantage=True, config="gspo", advantages=torch.zeros(3, 4)), ValueError, "need every token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n  hint" in str(caught.value) or len(str(caught.value)) < 700


def test_fake_tensors_leave_nothing_behind():
    """A call under FakeTensorMode, as memory estimators make them, must not reach the cache of numbers."""
    case = make(temperature=0.77)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in (case.logits, *case.arguments)]
        grpo_loss(*fake, temperature=0.77)
    assert case.run()[0].loss.isfinite()


def test_messages_list_every_tensor():
    with pytest.raises(ValueError, match="mask of shape") as caught:
        bad(mask=torch.ones(3, 5))()
    text = str(caught.value)
    for line in ("logits             float32 (3, 5, 11) on cpu", "token_ids          int64 (3, 4) on cpu"):
        assert line in text
    assert "mask               float32 (3, 5) on cpu" in text


def test_backend_that_cannot_serve(monkeypatch):
    from grpo_kernels import backends

    monkeypatch.setattr(backends.get("cpu"), "unsupported", lambda request: "it is on holiday")
    case = make()
    with pytest.raises(RuntimeError, match=r"backend='cpu' can serve; got 97 columns of float32 .*it is on holiday"):
        case.run("cpu")
    out, _ = case.run()  # automatic choice takes the next one
    assert torch.equal(out.loss, case.run("torch")[0].loss)


def test_fields_fit_the_library():
    """The C++ side writes as many sums as metrics.py names."""
    case = make()
    out, _ = case.run("cpu")
    assert out.metrics.vector.shape == (len(FIELDS),)


def test_checks_of_contents():
    case = make()
    case.token_ids[0, 0] = 97
    with pytest.raises(IndexError, match=r"token ids in \[0, 97\); got token_ids\[0, 0\] = 97 at a live position"):
        case.run(check=True)
    with pytest.raises(ValueError, match="Did you mean 'cpu'"):
        token_log_probs(case.logits, case.token_ids, backend="cpuu")
    assert LossConfig(Clip()).surrogate == Clip()


COLD = """
import torch, grpo_kernels as g
config = {config}
loss = lambda x, ids, A, old: g.grpo_loss(x, ids, A, old_log_probs=old, config=config).loss
torch.compile(loss, backend="eager", fullgraph=True)(
    torch.randn(2, 3, 7, requires_grad=True), torch.randint(0, 7, (2, 3)), torch.randn(2), -torch.rand(2, 3)
)
print("one graph")
"""


@pytest.mark.parametrize(
    "config",
    [pytest.param("'grpo'", marks=pytest.mark.nightly), "g.LossConfig(level='sequence', aggregation=g.Constant(8))"],
)
def test_the_first_call_of_a_process_is_one_graph(config):
    """What a config keeps of itself after an eager call is not needed for a graph."""
    run = subprocess.run([sys.executable, "-c", COLD.format(config=config)], capture_output=True, text=True)
    assert run.stdout == "one graph\n", run.stderr[-2000:]


def test_what_stays_outside_of_graphs_is_not_compiled_again(monkeypatch):
    """The limit of recompilations is of a code object: callers of these functions must not share one that is traced."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    hidden, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(11, 8)
    ids = torch.randint(0, 11, (2, 3))
    for temperature in range(1, 12):
        function = lambda h, t=float(temperature): linear_token_log_probs(2 * h, weight, ids, temperature=t).log_probs  # noqa: E731
        torch.compile(function, backend="eager")(hidden)
    assert counters["frames"]["total"] <= 11
    assert counters["frames"]["ok"] == counters["frames"]["total"]


@pytest.mark.parametrize("config", ["grpo", "gspo", None])
def test_vectorised_backwards(config):
    """autograd's own vmap, which is no transform of functorch: its tensors have no memory."""
    logits, ids = torch.randn(1, 3, 11), torch.randint(11, (1, 3))

    def of(values: torch.Tensor) -> torch.Tensor:
        if config is None:
            return token_log_probs(values, ids, backend="torch").log_probs
        return grpo_loss(values, ids, torch.ones(1), config=config, backend="torch").loss

    plain = torch.autograd.functional.jacobian(of, logits)
    torch.testing.assert_close(torch.autograd.functional.jacobian(of, logits, vectorize=True), plain)


def test_numbers_of_a_transform_are_not_kept():
    """A tensor that is made inside of one is its wrapper, and dies with it."""
    spec._cached.cache_clear()
    spec._vector_of_plain.cache_clear()
    logits, ids = torch.randn(1, 3, 11), torch.randint(11, (1, 3))
    wanted = torch.log_softmax(logits, -1).gather(-1, ids[..., None]).squeeze(-1)
    inside = torch.func.grad(lambda factor: factor * token_log_probs(logits, ids).log_probs.sum())(torch.tensor(1.0))
    torch.testing.assert_close(inside, wanted.sum())
    torch.testing.assert_close(token_log_probs(logits, ids).log_probs, wanted)


def test_each_stream_has_numbers_of_its_own(monkeypatch):
    """A vector is copied in the stream of the call that first needs it, which others do not wait for."""
    stream = [1]
    monkeypatch.setattr(spec, "_stream_of", lambda device: stream[0])
    of_number, of_tensor = ((temperature, 1.0, None) for temperature in (0.75, torch.tensor(0.75)))

    def made(arguments):
        cpu = torch.device("cpu")
        return spec.numbers_vector(spec.LogitArgs(*arguments), 1.0, LossConfig(), torch.float32, cpu)

    first, mixed = made(of_number), made(of_tensor)
    assert made(of_number) is first
    stream[0] = 2
    second = made(of_number)
    assert second is not first
    assert torch.equal(first, second)
    assert torch.equal(first, mixed)


def test_the_stream_of_a_gpu_is_the_current_one(monkeypatch):
    """And none in the capture of a graph, whose memory is not to be kept."""
    capturing, device = [False], torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: types.SimpleNamespace(cuda_stream=40 + where.index))
    assert spec._stream_of(device) == 41
    assert spec._stream_of(torch.device("cpu")) == 0
    capturing[0] = True
    assert spec._stream_of(device) is None


def test_a_lazy_sign_is_resolved():
    logits, ids = torch.randn(1, 3, 11), torch.randint(11, (1, 3))
    found = token_log_probs(torch._neg_view(-logits), ids).log_probs
    assert torch.equal(found, token_log_probs(logits, ids).log_probs)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_lazy_sign_beside_a_cut_vocabulary(inplace):
    """Of the logits and of what comes back to the log-probs."""
    logits, ids, upstream = torch.randn(1, 3, 11), torch.randint(9, (1, 3)), torch.randn(1, 3)
    gradients = []
    for lazy in (lambda x: x, lambda x: torch._neg_view(-x)):
        leaf = logits.clone().requires_grad_()
        found = token_log_probs(lazy(leaf * 1), ids, vocab_size=9, inplace=inplace).log_probs
        assert torch.equal(found.detach(), token_log_probs(logits, ids, vocab_size=9).log_probs)
        gradients += torch.autograd.grad(found, leaf, lazy(upstream))
    assert torch.equal(*gradients)
