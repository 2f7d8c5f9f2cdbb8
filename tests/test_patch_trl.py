"""What ``patch_trl`` does to TRL: every trainer of TRL's with it and without, and each operator beside TRL's own."""

from __future__ import annotations

import ast
import contextlib
import importlib
import itertools
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

import trl_cases  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402
from trl_cases import assert_same, batch, compute, run_of, trainer, with_log_probs  # noqa: E402
from trl_trainers import CASES, OURS, counted, make, without_a_gpu  # noqa: E402

from grpo_kernels.bench import report  # noqa: E402
from grpo_kernels.bench.measure import peak_bytes  # noqa: E402
from grpo_kernels.integrations import patching  # noqa: E402
from grpo_kernels.integrations.trl import FusedGRPOTrainer, patch_trl  # noqa: E402

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")]
folder = trl_cases.folder
UTILS = trl.trainer.utils
N, V, H = 12, 130, 16


@pytest.fixture(autouse=True)
def undone():
    """Whatever a test leaves patched."""
    yield
    if "trl" in patching._patches:
        patching._patches["trl"].undo()


LONG = ("A2PO", "RLOO", "OnlineDPO", "Distillation, forward KL", "Distillation, JSD")
"""Seconds each, of functions that others' cases call too: nightly."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly if name in LONG else ()) for name in CASES]
)
def test_two_steps(folder, tmp_path, monkeypatch, name):
    """Logs, weights, and what was called. Sums are in another order: fp32 rounding, of differences near 0 as well."""
    case, runs = CASES[name], []
    without_a_gpu(monkeypatch)
    calls = counted(monkeypatch)
    for patched in (False, True):
        patch = patch_trl(experimental=case.experimental) if patched else None
        assert not calls
        transformers.set_seed(3)  # some trainers generate where they are made
        subject = make(case, folder, tmp_path)
        start = {name: value.detach().clone() for name, value in subject.model.named_parameters()}
        runs.append(run_of(subject))
        if patch is not None:
            patch.undo()
    assert set(calls) == set(case.calls)
    assert len(runs[0][0]) == len(runs[1][0]) == 2
    rounding = {"rel": 1e-5, "abs": 3e-6} if case.calls else {"rel": 0, "abs": 0}
    for row, wanted in zip(runs[1][0], runs[0][0], strict=True):
        assert set(row) == set(wanted)
        for key, value in wanted.items():
            if not key.startswith("perf/") and "second" not in key:
                assert row[key] == pytest.approx(value, **rounding, nan_ok=True), key
    moved = {key: float((value - start[key]).abs().max()) for key, value in runs[0][1].items()}
    assert max(moved.values()) > 1e-4
    for key, value in runs[1][1].items():
        assert float((value - runs[0][1][key]).abs().max()) <= 1e-3 * moved[key] + 1e-7, key


@pytest.fixture(scope="module")
def table():
    """SWITCHING's rows: of each trainer, the functions of TRL's that it is said to take, and ours in their place."""
    text = (Path(__file__).parent.parent / "SWITCHING.md").read_text()
    rows = text.split("| trainer | takes | with `patch_trl()` |\n| --- | --- | --- |\n")[1].split("\n\n")[0]
    found = {}
    for row in rows.splitlines():
        names, takes, verdict = row.strip("| ").split(" | ")
        for kind in re.findall(r"`(\w+Trainer)`", names):
            ours = set(re.findall(r"`(\w+)`", verdict)) & set(OURS)
            found[kind] = set(re.findall(r"`(\w+)`", takes)), ours
    return found


def names_in(tree):
    """Every name that code mentions; comments and docstrings are none."""
    for node in ast.walk(tree):
        yield from (getattr(node, field, None) for field in ("id", "attr", "name"))


def test_every_trainer_has_a_row(table):
    """All that TRL defines, with the functions that its module calls; one that is a GRPOTrainer has GRPO's."""
    taken, of_grpo, folder = {}, set(), Path(trl.__file__).parent
    hooks = {"add_fused_lm_head", *CHANGED, *OF_EXPERIMENTS} - {"_ChunkedLogProbFunction"}
    for path in itertools.chain(folder.glob("trainer/*.py"), folder.glob("experimental/*/*.py")):
        tree = ast.parse(path.read_text())
        kinds = [each for each in ast.walk(tree) if isinstance(each, ast.ClassDef) and each.name.endswith("Trainer")]
        for kind in kinds:
            bases = {ast.unparse(base) for base in kind.bases}
            if kind.name != "_BaseTrainer" and f"_{kind.name}" not in bases:  # whose base is imported under that name
                taken[kind.name] = hooks & set(names_in(tree))
                of_grpo |= {kind.name} if "GRPOTrainer" in bases else set()
    taken |= dict.fromkeys(of_grpo, taken["GRPOTrainer"])
    assert {name: takes for name, (takes, _) in table.items()} == taken
    text = (Path(__file__).parent.parent / "SWITCHING.md").read_text()
    assert {name for name in taken if f"class Mine({name}, FusedGRPOTrainer)" in text} == of_grpo


def test_the_table_says_what_is_called(table):
    """As ``test_two_steps`` finds it; of those that it does not train, nothing."""
    called = {}
    for case in CASES.values():
        called.setdefault(case.trainer.rpartition(".")[2], set()).update(case.calls)
    assert {name: called.get(name, set()) for name in table} == {name: ours for name, (_, ours) in table.items()}


def operands(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(N, H).to(dtype).requires_grad_(), (0.5 * torch.randn(V, H)).to(dtype).requires_grad_()
    return hidden, weight, torch.randn(V).to(dtype).requires_grad_(), torch.randint(V, (N,))


FORMS = {"plain": (1.0, None, 1.0), "scaled": (0.7, None, 0.3), "capped": (0.7, 5.0, 1.4)}
"""Temperature, softcap, scale."""
SERVED = [("log_probs",), ("log_probs", "entropy"), ("log_probs", "entropy", "mean_logits")]


def assert_close_to_trl(found, wanted, inputs, rtol=1e-4, atol=1e-5):
    """Two results, tensors or None in the same places, and their gradients."""
    assert [one is None for one in found] == [one is None for one in wanted]
    pairs = [(one, other) for one, other in zip(found, wanted, strict=True) if one is not None]
    for one, other in pairs:
        assert one.requires_grad == other.requires_grad
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, check_dtype=False)
    pairs = [pair for pair in pairs if pair[0].requires_grad]
    upstream = [torch.randn(one.shape) for one, _ in pairs]
    gradients = [
        torch.autograd.grad(sum((one * up).sum() for one, up in zip(each, upstream, strict=True)), inputs)
        for each in zip(*pairs, strict=True)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=max(atol, atol * float(other.abs().max())))


@pytest.mark.parametrize("outputs", SERVED, ids=lambda outputs: outputs[-1])
@pytest.mark.parametrize("form", FORMS)
def test_head(monkeypatch, form, outputs):
    hidden, weight, bias, targets = operands()
    temperature, cap, scale = FORMS[form]
    arguments = (hidden, weight, bias, targets, temperature, 64, cap, scale, outputs)
    wanted = UTILS._ChunkedLogProbFunction.apply(*arguments)
    calls = counted(monkeypatch)
    with patch_trl():
        found = UTILS._ChunkedLogProbFunction.apply(*arguments)
    assert bool(calls) == (form != "capped" or "mean_logits" not in outputs)  # of tanh a mean is no product
    assert_close_to_trl(found, wanted, (hidden, weight, bias))


@pytest.mark.parametrize("autocast", [False, True])
def test_head_in_half_precision(monkeypatch, autocast):
    """TRL rounds logits to bf16, and so do we, but once where there is a bias: log-probs may differ by a rounding of a
    logit between 4 and 8. Of the mean neither rounds the sum."""
    hidden, weight, bias, targets = operands(torch.float32 if autocast else torch.bfloat16)
    arguments = (hidden, weight if autocast else weight.float(), bias, targets, 0.7, 64, None, 1.0, SERVED[-1])
    with torch.autocast("cpu", enabled=autocast):
        wanted = UTILS._ChunkedLogProbFunction.apply(*arguments)
        calls = counted(monkeypatch)
        with patch_trl():
            found = UTILS._ChunkedLogProbFunction.apply(*arguments)
    assert calls
    for one, other in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2**-6)
    # two roundings of such logits, over the root of 130 columns
    torch.testing.assert_close(found[3], wanted[3], rtol=0, atol=4e-3)


def partitioned(arguments):
    arguments[1].ds_id = 0


def of_no_scale(arguments):
    arguments[7] = 0.0


@pytest.mark.parametrize("extra", [("is_top1",), ("log_sum_sq_probs",), partitioned, of_no_scale])
def test_calls_that_stay_with_trl(monkeypatch, extra):
    """More outputs; a weight that ZeRO-3 would have to gather once more; logits that are all 0."""
    arguments = [*operands(), 1.0, 64, None, 1.0, SERVED[1]]
    if callable(extra):
        extra(arguments)
    else:
        arguments[-1] = (*SERVED[-1], *extra)
    wanted = UTILS._ChunkedLogProbFunction.apply(*arguments)
    calls = counted(monkeypatch)
    with patch_trl():
        found = UTILS._ChunkedLogProbFunction.apply(*arguments)
    assert not calls
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


LAYOUTS = {"rows": (N,), "batch": (3, 5), "a slice": (3, 5), "of a batch that is longer": (3, 5)}


def logits_in(layout):
    """Logits, whole and as a trainer cuts them."""
    torch.manual_seed(0)
    if layout == "a slice":
        whole = torch.randn(3, 8, V, requires_grad=True)
        return whole, whole[:, :-1][:, -5:]
    if layout == "of a batch that is longer":
        whole = torch.randn(5, 5, V, requires_grad=True)
        return whole, whole[:3]
    whole = torch.randn(*LAYOUTS[layout], V, requires_grad=True)
    return whole, whole


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits(monkeypatch, layout, temperature, masked):
    whole, logits = logits_in(layout)
    index = torch.randint(V, logits.shape[:-1])
    mask = torch.arange(index.numel()).view(index.shape) % 3 if masked else None
    options = {"temperature": temperature, "row_mask": mask}
    wanted = UTILS.selective_log_softmax_and_entropy(logits, index, **options)
    silent = UTILS.selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=False, **options)
    alone = UTILS.selective_log_softmax(logits, index, **options)
    calls = counted(monkeypatch)
    with patch_trl():
        assert_close_to_trl(UTILS.selective_log_softmax_and_entropy(logits, index, **options), wanted, (whole,))
        found = UTILS.selective_log_softmax_and_entropy(logits, index, False, **options)
        assert_close_to_trl(found, silent, (whole,))
        assert_close_to_trl([UTILS.selective_log_softmax(logits, index, **options)], [alone], (whole,))
    assert calls["token_log_probs"] == 3


def test_logits_in_half_precision(monkeypatch):
    """fp32 of bf16 logits, as TRL's kernel has them on a GPU; on a CPU TRL rounds to bf16."""
    logits, index = torch.randn(3, 5, V).bfloat16(), torch.randint(V, (3, 5))
    theirs = UTILS.selective_log_softmax(logits, index)
    exact = UTILS.selective_log_softmax(logits.double(), index)
    with patch_trl():
        ours = UTILS.selective_log_softmax(logits, index)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
    assert float((theirs.double() - exact).abs().max()) > 1e-3


@pytest.mark.parametrize("what", ["several tokens of a row", "four dimensions", "no rows", "a GPU"])
def test_logits_that_stay_with_trl(monkeypatch, what):
    logits, index = torch.randn(3, 5, V), torch.randint(V, (3, 5))
    if what == "several tokens of a row":
        index = torch.randint(V, (3, 5, 4))
    elif what == "four dimensions":
        logits, index = logits[None], index[None]
    elif what == "no rows":
        logits, index = logits[:, :0], index[:, :0]
    else:
        logits, index = logits.to("meta"), index.to("meta")
    calls = counted(monkeypatch)
    plain = [UTILS.selective_log_softmax]
    plain += [] if index.dim() == logits.dim() else [UTILS.selective_log_softmax_and_entropy]
    wanted = [each(logits, index) for each in plain]
    with patch_trl():
        found = [getattr(UTILS, each.__name__)(logits, index) for each in plain]
    assert not calls
    flat = [[*one] if isinstance(one, tuple) else [one] for one in (*wanted, *found)]
    for one, other in zip(itertools.chain(*flat[: len(plain)]), itertools.chain(*flat[len(plain) :]), strict=True):
        assert one.shape == other.shape
        assert one.device.type == "meta" or torch.equal(one, other)


BETAS = (0.0, 0.3, 1.0)


def distillation(beta, biased=True, form="plain", dtype=torch.float32, items=None):
    """Arguments of the loss of TRL's DistillationTrainer; the teacher is wider."""
    torch.manual_seed(0)
    temperature, cap, scale = FORMS[form]
    bias = torch.randn(2, V) if biased else (None, None)
    return {
        "student_hidden_states": torch.randn(3, 5, H).to(dtype).requires_grad_(),
        "teacher_hidden_states": torch.randn(3, 5, 2 * H).to(dtype),
        "student_lm_head_weight": (0.5 * torch.randn(V, H)).requires_grad_(),
        "teacher_lm_head_weight": torch.nn.Parameter(0.4 * torch.randn(V, 2 * H)),
        "completion_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]]),
        "beta": beta,
        "num_items_in_batch": items,
        "student_lm_head_bias": bias[0],
        "teacher_lm_head_bias": bias[1],
        "student_logit_scale": scale,
        "teacher_logit_scale": 1.2,
        "student_final_logit_softcapping": cap,
        "teacher_final_logit_softcapping": 7.0,
        "temperature": temperature,
    }


@contextlib.contextmanager
def one_rank():
    """A mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield torch.distributed.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def loss_and_gradients(arguments):
    """Of the loss as it is in TRL's module now: value, gradients of states and head, entropy and count."""
    loss, entropy, count = distillation_trainer._chunked_divergence_loss(**arguments)
    inputs = [arguments[f"student_{name}"] for name in ("hidden_states", "lm_head_weight")]
    return loss, *torch.autograd.grad(loss, inputs), entropy, count


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7.5)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beta", BETAS)
def test_distillation(monkeypatch, beta, form, items):
    arguments = distillation(beta, items is not None, form, items=items)
    wanted = loss_and_gradients(arguments)
    calls = counted(monkeypatch)
    with patch_trl():
        found = loss_and_gradients(arguments)
    assert calls == {"linear_grpo_loss": 1}
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.detach().abs().max()))


@pytest.mark.parametrize("autocast", [False, True])
def test_distillation_in_half_precision(autocast):
    """Logits are fp32 of bf16 factors, there and here; gradients are rounded to bf16."""
    arguments = distillation(0.3, biased=False, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", enabled=autocast):
        wanted = loss_and_gradients(arguments)
        with patch_trl():
            found = loss_and_gradients(arguments)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=0)
    for one, other in zip(found[1:3], wanted[1:3], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2**-7 * float(other.abs().max()))


def test_distillation_without_a_token():
    arguments = distillation(1.0)
    arguments["completion_mask"] = torch.zeros(3, 5)
    with patch_trl():
        found = loss_and_gradients(arguments)
    assert all(float(each.detach().abs().max()) == 0 for each in found)


def test_distillation_of_heads_in_shards(monkeypatch):
    """FSDP2's heads are gathered once, and their gradient comes back as a shard; ZeRO-3's stay with TRL."""
    wanted = loss_and_gradients(distillation(1.0))
    calls = counted(monkeypatch)
    with one_rank() as mesh, patch_trl():
        arguments = distillation(1.0)
        for name in ("student_lm_head_weight", "teacher_lm_head_weight"):
            whole = arguments[name].detach()
            arguments[name] = torch.distributed.tensor.distribute_tensor(whole, mesh, [Shard(0)]).requires_grad_()
        for name in ("student_lm_head_bias", "teacher_lm_head_bias"):
            arguments[name] = torch.distributed.tensor.distribute_tensor(arguments[name], mesh, [Shard(0)])
        found = loss_and_gradients(arguments)
        assert isinstance(found[2], DTensor)
        found = [each.full_tensor() if isinstance(each, DTensor) else each for each in found]
    assert calls == {"linear_grpo_loss": 1}
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.detach().abs().max()))
    arguments = distillation(1.0)
    arguments["teacher_lm_head_weight"].ds_id = 0
    with patch_trl():
        loss_and_gradients(arguments)
    assert calls == {"linear_grpo_loss": 1}


def test_memory_of_distillation():
    """TRL holds two tiles of logits that are 32,768 columns wide, and on a CPU others of what it makes of them; ours
    hold as much as the logits are, at most as much as the two."""
    tokens, vocab, width = 2048, 16384, 8
    torch.manual_seed(0)
    arguments = distillation(1.0, biased=False)
    arguments |= {"completion_mask": torch.ones(1, tokens, dtype=torch.int64)}
    for name, sizes in (("hidden_states", (1, tokens, width)), ("lm_head_weight", (vocab, width))):
        arguments[f"student_{name}"] = torch.randn(sizes).requires_grad_()
        arguments[f"teacher_{name}"] = torch.randn(sizes)
    theirs = peak_bytes(lambda: loss_and_gradients(arguments), "cpu")
    with patch_trl():
        ours = peak_bytes(lambda: loss_and_gradients(arguments), "cpu")
    both = 2 * tokens * 4
    assert theirs > both * 32768
    assert both * vocab < ours < 1.1 * both * vocab


def test_memory_of_logits():
    """Beyond the logits: ours their gradient, TRL's several tensors more of that size."""
    rows, vocab = 64, 50000
    logits, teacher = torch.randn(1, rows, vocab, requires_grad=True), torch.randn(1, rows, vocab)
    index, size = torch.zeros(1, rows, dtype=torch.int64), rows * vocab * 4
    selected = lambda: UTILS.selective_log_softmax(logits, index).sum()  # noqa: E731
    gkd = kind_of("gkd.GKDTrainer")
    for loss, least in ((selected, 3), (lambda: gkd.generalized_jsd_loss(logits, teacher, index), 7)):
        theirs = peak_bytes(lambda loss=loss: torch.autograd.grad(loss(), logits), "cpu")
        with patch_trl(experimental=True):
            ours = peak_bytes(lambda loss=loss: torch.autograd.grad(loss(), logits), "cpu")
        assert theirs >= least * size
        assert ours < 1.2 * size


def pairs_of_logits():
    torch.manual_seed(0)
    whole = torch.randn(3, 6, V, requires_grad=True)
    labels = torch.randint(V, (3, 5))
    labels[0, :2] = labels[2] = -100
    return whole, whole[:, :-1], torch.randn(3, 6, V)[:, :-1], labels


TRAINERS = {"gkd.GKDTrainer": {}, "gold.GOLDTrainer": {}, "iw_opd.IWOPDTrainer": {"top_k": 0}}


def kind_of(name):
    module, _, kind = name.rpartition(".")
    return getattr(importlib.import_module(f"trl.experimental.{module}"), kind)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7.0)}, {"reduction": "sum"}, {"labels": None}],
    ids=["mean", "number", "tensor", "sum", "no labels"],
)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", TRAINERS)
def test_whole_logits(monkeypatch, name, beta, options):
    kind, (whole, student, teacher, labels) = kind_of(name), pairs_of_logits()
    options = {"labels": labels, "beta": beta, "temperature": 0.7, **TRAINERS[name], **options}
    wanted = kind.generalized_jsd_loss(student, teacher, **options)
    calls = counted(monkeypatch)
    with patch_trl(experimental=True):
        found = kind.generalized_jsd_loss(student, teacher, **options)
    assert calls == {"grpo_loss": 1}
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    one, other = (torch.autograd.grad(loss, whole)[0] for loss in (found, wanted))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.detach().abs().max()))


@pytest.mark.parametrize("labels", [None, torch.tensor([3, -100, 2, 1])])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 5}, {"reduction": "sum"}])
def test_logits_of_rows(monkeypatch, options, labels):
    """(N, V), of which N is the batch that TRL divides by."""
    kind, student, teacher = kind_of("gkd.GKDTrainer"), torch.randn(4, V, requires_grad=True), torch.randn(4, V)
    wanted = kind.generalized_jsd_loss(student, teacher, labels, **options)
    calls = counted(monkeypatch)
    with patch_trl(experimental=True):
        found = kind.generalized_jsd_loss(student, teacher, labels, **options)
    assert calls == {"grpo_loss": 1}
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    one, other = (torch.autograd.grad(loss, student)[0] for loss in (found, wanted))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_columns_that_are_apart(monkeypatch):
    """Our kernels read rows: logits whose last stride is not 1 stay with TRL."""
    logits, teacher, index = torch.randn(V, 4).T, torch.randn(4, V), torch.randint(V, (4,))
    gkd = kind_of("gkd.GKDTrainer")
    sdpo = importlib.import_module("trl.experimental.sdpo.loss_utils")

    def everything():
        yield UTILS.selective_log_softmax(logits, index)
        yield from UTILS.selective_log_softmax_and_entropy(logits, index)
        for pair in ((logits, teacher), (teacher, logits)):
            yield gkd.generalized_jsd_loss(*pair, index)
            yield sdpo.compute_full_logit_self_distillation_loss(*pair, distillation_alpha=0.5)

    wanted, calls = list(everything()), counted(monkeypatch)
    with patch_trl(experimental=True):
        found = list(everything())
    assert not calls
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gkd.GKDTrainer", {"reduction": "mean"}),
        ("gkd.GKDTrainer", {"reduction": "none"}),
        ("gold.GOLDTrainer", {"logits_are_probs": True}),
        ("iw_opd.IWOPDTrainer", {"top_k": 4}),
    ],
)
def test_whole_logits_that_stay_with_trl(monkeypatch, name, options):
    kind, (_, student, teacher, labels) = kind_of(name), pairs_of_logits()
    if options.get("logits_are_probs"):
        student, teacher = student.softmax(-1), teacher.softmax(-1)
    wanted = kind.generalized_jsd_loss(student, teacher, labels, **options)
    calls = counted(monkeypatch)
    with patch_trl(experimental=True):
        found = kind.generalized_jsd_loss(student, teacher, labels, **options)
    assert not calls
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("alpha", BETAS)
@pytest.mark.parametrize("package", ["sdft", "sdpo"])
def test_self_distillation(monkeypatch, package, alpha):
    module = importlib.import_module(f"trl.experimental.{package}.loss_utils")
    whole, student, teacher, _ = pairs_of_logits()
    options = {"distillation_alpha": alpha}
    wanted = module.compute_full_logit_self_distillation_loss(student, teacher, **options)
    calls = counted(monkeypatch)
    with patch_trl(experimental=True):
        found = module.compute_full_logit_self_distillation_loss(student, teacher, **options)
    assert calls == {"token_divergence": 1}
    assert_close_to_trl([found], [wanted], (whole,), rtol=1e-5, atol=1e-6)


def test_the_benchmark_compares_equals(monkeypatch):
    """Of benchmarks/trl_functions.py, tiny: the losses that are timed are the same, and the table has all of them."""
    import trl_functions

    for name, size in {"VOCAB": 500, "WIDTH": 16, "FROM_STATES": 24, "FROM_LOGITS": 8}.items():
        monkeypatch.setattr(trl_functions, name, size)
    rows = {}
    for name, prepared in trl_functions.cases().items():
        case, calls = prepared(), counted(monkeypatch)
        wanted, found = (case.loss(each) for each in (case.original, case.ours(case.original)))
        assert sum(calls.values()) == 1
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        rows[name] = {"ms": {"TRL": 3.0, "ours": 2.0}, "bytes": {"TRL": 3e6, "ours": 1e6}}
    sizes = {"vocab": 500, "width": 16, "from_states": 24, "from_logits": 8}
    text = trl_functions.table({"environment": report.environment("cpu"), "trl": "1.16.0", "rows": rows, **sizes})
    assert text.count("| 3 | 2 | 1.5x | 3 | 1 |") == len(rows)


def functions():
    """Everything in the modules of TRL that are imported, and the methods that a patch may change."""
    found = {(name, "generalized_jsd_loss"): kind_of(name).generalized_jsd_loss for name in TRAINERS}
    for module in ("trainer.dpo_trainer", *(f"experimental.{name}.{name}_trainer" for name in ("sdft", "sdpo", "tpo"))):
        importlib.import_module(f"trl.{module}")
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "trl" and isinstance(module, types.ModuleType):
            found |= {(name, key): value for key, value in vars(module).items() if isinstance(key, str)}
    return found


CHANGED = {"_ChunkedLogProbFunction", "selective_log_softmax", "selective_log_softmax_and_entropy"}
CHANGED |= {"_chunked_divergence_loss"}
OF_EXPERIMENTS = {"generalized_jsd_loss", "compute_full_logit_self_distillation_loss"}


@pytest.mark.parametrize("experimental", [False, True])
def test_patch_and_undo(experimental):
    """In every module that has imported a function by name, and in one that imports it while it is patched."""
    before = functions()
    patch = patch_trl(experimental=experimental)
    changed = {key for key, value in functions().items() if before[key] is not value}
    assert {name for _, name in changed} == CHANGED | (OF_EXPERIMENTS if experimental else set())
    assert ("trl.experimental.tpo.tpo_trainer", "selective_log_softmax_and_entropy") in changed
    late = types.ModuleType("trl.late")
    late.selective_log_softmax = UTILS.selective_log_softmax
    sys.modules["trl.late"] = late
    try:
        with pytest.raises(RuntimeError, match="expected trl as it was installed; got one that is patched"):
            patch_trl()
        patch.undo()
        assert late.selective_log_softmax is before["trl.trainer.utils", "selective_log_softmax"]
    finally:
        del sys.modules["trl.late"]
    assert functions() == before
    patch.undo()


def other_arguments(monkeypatch):
    class ChunkedLogProbFunction:
        @staticmethod
        def forward(ctx, hidden, weight): ...

    monkeypatch.setattr(UTILS, "_ChunkedLogProbFunction", ChunkedLogProbFunction)
    return r"_ChunkedLogProbFunction to be trl's \(ctx, .* got .*\(ctx, hidden, weight\)\. Something else has patched"


def gone(monkeypatch):
    monkeypatch.delattr(UTILS, "_ChunkedLogProbFunction")
    return "_ChunkedLogProbFunction; got nothing"


def somebody_elses(monkeypatch):
    def selective_log_softmax(logits, index, temperature=1.0, row_mask=None): ...

    monkeypatch.setattr(UTILS, "selective_log_softmax", selective_log_softmax)
    return "selective_log_softmax to be trl's"


def another_version(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    return r"patch_trl: written for trl 1\.16 and its internals; got 1\.17\.0"


@pytest.mark.parametrize("move", [other_arguments, gone, somebody_elses, another_version])
def test_a_hook_that_moved_is_refused_before_anything_is_changed(monkeypatch, move):
    message = move(monkeypatch)
    before = functions()
    with pytest.raises(RuntimeError, match=message):
        patch_trl()
    assert functions() == before
    assert not patching._patches


def test_the_trainer_says_what_version_it_knows(folder, tmp_path, monkeypatch):
    another_version(monkeypatch)
    with pytest.raises(RuntimeError, match=r"FusedGRPOTrainer: written for trl 1\.16 and its internals"):
        trainer(FusedGRPOTrainer, folder, tmp_path)


def test_the_fused_trainer_where_trl_is_patched(folder, tmp_path):
    """Made and run inside a patch, and beside TRL's own there: the same loss, gradients and metrics."""
    plain = trainer(trl.GRPOTrainer, folder, tmp_path, options={"beta": 0.04})
    with patch_trl():
        subject = trainer(FusedGRPOTrainer, folder, tmp_path, options={"beta": 0.04})
        assert_same(subject, plain, batch())
    assert_same(subject, plain, batch())
    inputs = with_log_probs(batch(), plain)
    wanted = compute(plain, inputs)
    with patch_trl():
        found = compute(plain, inputs)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    assert found[2] == pytest.approx(wanted[2], rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("experimental", ["no", None, 0.5])
def test_the_option_is_on_or_off(experimental):
    with pytest.raises(TypeError, match="patch_trl: expected experimental to be True or False; got"):
        patch_trl(experimental)
