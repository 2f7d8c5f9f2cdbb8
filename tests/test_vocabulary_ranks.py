"""A vocabulary over processes: DTensors, meshes, checkpointing and what ranks need not have in common."""

from __future__ import annotations

import re

import cases
import pytest
import torch
from distributed import mesh, pool, subgroup, world
from torch import Tensor

from grpo_kernels import (
    KL,
    LossConfig,
    grpo_loss,
    linear_grpo_loss,
    linear_token_log_probs,
    normalizer,
    token_log_probs,
)
from grpo_kernels.calls.head import head_kind

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed"),
]
VOCAB, HIDDEN = 97, 16


def batch(seed: int = 0) -> cases.Case:
    return cases.make(vocab=VOCAB, seed=seed, config=LossConfig.preset("gspo", entropy_coef=0.05))


def head(seed: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(6, 10, HIDDEN, generator=g)
    return {
        "hidden": hidden,
        "weight": torch.randn(VOCAB, HIDDEN, generator=g),
        "bias": torch.randn(VOCAB, generator=g),
    }


def gradients_of(function, leaves: dict, case: cases.Case, **options):
    out = function(leaves["hidden"], leaves["weight"], *case.arguments, bias=leaves["bias"], **case.options, **options)
    out.loss.backward()
    return out, {name: leaf.grad for name, leaf in leaves.items()}


def whole(seed: int = 0):
    leaves = {name: part.requires_grad_() for name, part in head().items()}
    return gradients_of(linear_grpo_loss, leaves, batch(seed))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=float(b.abs().max()) * 4e-6)


def distributed(tensor: Tensor, over, *placements):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.detach().clone(), over, placements).requires_grad_()


def dtensor_logits(shape: tuple[int, ...], token_tensors: bool) -> None:
    """On one mesh dimension or beside a data-parallel one, where every rank has its own sequences."""
    from torch.distributed.tensor import Replicate, Shard

    case, over = batch(), mesh(*shape)
    expected, gradient = case.run()
    leaf = distributed(case.logits, over, *[Replicate()] * (len(shape) - 1), Shard(-1))
    arguments = list(case.arguments)
    if token_tensors:
        arguments[0] = distributed_ids(arguments[0], over)
    out = grpo_loss(leaf, *arguments, **case.options)
    out.loss.backward()
    close(out.loss, expected.loss)
    close(leaf.grad.full_tensor(), gradient)
    assert leaf.grad.placements == leaf.placements
    assert out.route.reason.startswith("vocab_group=")
    log_probs = token_log_probs(leaf.detach(), case.token_ids, case.mask).log_probs
    assert torch.equal(log_probs, out.log_probs)


def distributed_ids(ids: Tensor, over):
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(ids, over, [Replicate()] * over.ndim)


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=str)
@pytest.mark.parametrize("token_tensors", [False, True])
def test_dtensor_logits(shape, token_tensors):
    pool(4).run(dtensor_logits, shape, token_tensors)


def dtensor_temperatures() -> None:
    """One for each sequence, on every rank; from logits and from hidden states."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    case, over = batch(), mesh(4)
    temperature = torch.tensor([0.5, 0.0, 1.0, 1.3, 0.9, 2.0])  # sequence 1 is empty
    expected, gradient = case.run(temperature=temperature)
    given = distribute_tensor(temperature, over, [Replicate()])
    leaf = distributed(case.logits, over, Shard(-1))
    out = grpo_loss(leaf, *case.arguments, **case.options, temperature=given)
    out.loss.backward()
    close(out.loss, expected.loss)
    close(leaf.grad.full_tensor(), gradient)
    log_probs = token_log_probs(leaf.detach(), case.token_ids, case.mask, temperature=given).log_probs
    assert torch.equal(log_probs, out.log_probs)
    parts = {name: distributed(part, over, Shard(0)) for name, part in head().items() if name != "hidden"}
    tokens = (head()["hidden"], parts["weight"], case.token_ids, case.mask)
    found = linear_token_log_probs(*tokens, bias=parts["bias"], temperature=given).log_probs
    logits = torch.nn.functional.linear(*head().values())
    close(found, token_log_probs(logits, case.token_ids, case.mask, temperature=temperature).log_probs)


def test_dtensor_temperatures():
    pool(4).run(dtensor_temperatures)


def dtensor_sequences() -> None:
    """(Shard(0), Shard(-1)): this rank's sequences, and its columns of them; the loss is these sequences' own."""
    from torch.distributed.tensor import Shard

    case, over = batch(), mesh(2, 2)
    rows = slice(3 * over.get_local_rank("dp"), 3 * over.get_local_rank("dp") + 3)
    options = {name: value[rows] if isinstance(value, Tensor) else value for name, value in case.options.items()}
    mine = cases.Case(case.logits[rows], *(x[rows] for x in case.arguments), options)
    expected, gradient = mine.run()
    leaf = distributed(case.logits, over, Shard(0), Shard(2))
    out = grpo_loss(leaf, *mine.arguments, **options)
    out.loss.backward()
    close(out.loss, expected.loss)
    own = leaf.grad.to_local()
    first = over.get_local_rank("tp") * 49
    close(own, gradient[..., first : first + 49])


def test_dtensor_logits_of_sequences():
    pool(4).run(dtensor_sequences)


def dtensor_head(bias: str) -> None:
    from torch.distributed.tensor import Replicate, Shard

    expected, gradients = whole()
    over = mesh(4)
    leaves = {name: distributed(part, over, Shard(0)) for name, part in head().items() if name != "hidden"}
    leaves["hidden"] = distributed(head()["hidden"], over, Replicate()) if bias == "all" else head()["hidden"]
    leaves["hidden"].requires_grad_()
    out, own = gradients_of(linear_grpo_loss, leaves, batch())
    close(out.loss, expected.loss)
    for name in ("weight", "bias"):
        assert own[name].placements == leaves[name].placements
        close(own[name].full_tensor(), gradients[name])
    states = own["hidden"].to_local() if bias == "all" else own["hidden"]
    close(states, gradients["hidden"])


@pytest.mark.parametrize("which", ["weight and bias", "all"])
def test_dtensor_heads(which):
    pool(4).run(dtensor_head, which)


def refused(what: str) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    case, over, parts = batch(), mesh(2, 2), head()
    if what == "logits":
        leaf = distributed(case.logits, over, Replicate(), Shard(1))
        grpo_loss(leaf, *case.arguments, **case.options)
    elif what == "two dimensions":
        grpo_loss(distributed(case.logits, over, Shard(2), Shard(2)), *case.arguments, **case.options)
    elif what == "beside a group":
        grpo_loss(distributed(case.logits, over, Replicate(), Shard(2)), *case.arguments, vocab_group=over["tp"])
    elif what == "bias":
        weight = distribute_tensor(parts["weight"], mesh(4), [Shard(0)])
        linear_grpo_loss(parts["hidden"], weight, *case.arguments, bias=parts["bias"], **case.options)
    elif what == "vocab_size":
        grpo_loss(distributed(case.logits, over, Replicate(), Shard(2)), *case.arguments, vocab_size=98, **case.options)
    elif what == "in place":
        grpo_loss(distributed(case.logits, over, Replicate(), Shard(2)), *case.arguments, inplace=True, **case.options)
    elif what == "mesh":
        grpo_loss(case.logits[..., :49], *case.arguments, vocab_group=over, **case.options)
    elif what == "FSDP":  # its shards of a head, and the tokens of each rank
        first = distribute_tensor(parts["weight"], mesh(4), [Shard(0)])
        own = batch(torch.distributed.get_rank())
        linear_grpo_loss(parts["hidden"], first, *own.arguments, check=True, **own.options)


REFUSALS = {
    "logits": "expected a DTensor in plain shards of the vocabulary or replicated",
    "two dimensions": "expected a DTensor in plain shards of the vocabulary|a vocabulary cut by one dimension",
    "beside a group": "no vocab_group= and vocab_start= beside a DTensor",
    "bias": "bias in the shards of the weight",
    "vocab_size": "vocab_size <= 97, the columns of the DTensor; got 98",
    "in place": "expected inplace=False with a DTensor",
    "mesh": 'vocab_group= of one dimension; got a mesh of 2.*\n.*mesh\\["tp"\\]',
    "FSDP": "the same token_ids and mask on every rank of vocab_group(.|\n)*hf.attach computes the loss inside",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_no_vocabulary_is_refused_on_every_rank(what):

    assert re.search(REFUSALS[what], pool(4).refusal_of(refused, what))


def a_group_of_others() -> str:
    group = subgroup(0, 1)
    case = batch()
    if torch.distributed.get_rank() < 2:
        return "member"
    with pytest.raises(ValueError, match="vocab_group= that this process is in; got a group of other ranks") as error:
        grpo_loss(case.logits, *case.arguments, vocab_group=group, **case.options)
    return str(error.value)


def test_a_group_that_this_rank_is_not_in():
    assert pool(4).run(a_group_of_others)[:2] == ["member", "member"]


def checkpointed(reentrant: bool) -> None:
    """Its recomputation replays the collectives of forward, on every rank alike."""
    from torch.utils.checkpoint import checkpoint

    _, gradients = whole()
    case, rank = batch(), torch.distributed.get_rank()
    parts = head()
    leaves = {name: part if name == "hidden" else part.tensor_split([49])[rank] for name, part in parts.items()}
    leaves = {name: part.clone().requires_grad_() for name, part in leaves.items()}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options = {"bias": bias, "vocab_group": world(), **case.options}
        return linear_grpo_loss(hidden * 1, weight, *case.arguments, **options).loss

    checkpoint(loss, *leaves.values(), use_reentrant=reentrant).backward()
    close(leaves["hidden"].grad, gradients["hidden"])
    for name in ("weight", "bias"):
        close(leaves[name].grad, gradients[name].tensor_split([49])[rank])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    pool(2).run(checkpointed, reentrant)


def without_backward() -> None:
    """A scalar loss has no collective in backward: a rank may skip it, or do it in another order."""
    case, rank = batch(), torch.distributed.get_rank()
    options = {"vocab_group": world(), **case.options}
    leaf = case.logits.tensor_split([49], -1)[rank].clone().requires_grad_()
    outs = [grpo_loss(leaf, *case.arguments, **options), grpo_loss(leaf * 2, *case.arguments, **options)]
    for out in outs if rank == 0 else ():
        out.loss.backward()


def test_a_rank_without_backward():
    pool(2).run(without_backward)


def upstream_of_one() -> None:
    """Log-probs from hidden states: backward joins the gradients of states, zeros from a rank whose upstream is 0, and
    where a rank's outputs have none in log-probs, or none in entropies."""
    case, rank, parts = batch(), torch.distributed.get_rank(), head()
    weight = parts["weight"].tensor_split([49])[rank].clone().requires_grad_()
    hidden = parts["hidden"].clone().requires_grad_()
    out = linear_token_log_probs(hidden, weight, case.token_ids, case.mask, vocab_group=world())
    (out.log_probs.sum() if rank == 0 else 0 * out.entropy.sum()).backward()
    leaves = [parts["hidden"].clone().requires_grad_(), parts["weight"].clone().requires_grad_()]
    linear_token_log_probs(*leaves, case.token_ids, case.mask).log_probs.sum().backward()
    if rank == 0:
        close(weight.grad, leaves[1].grad[:49])
    else:
        assert bool((weight.grad == 0).all())
    everyones = [torch.empty_like(hidden.grad) for _ in range(2)]
    torch.distributed.all_gather(everyones, hidden.grad)
    assert torch.equal(*everyones)


def test_upstream_of_one_rank():
    pool(2).run(upstream_of_one)


def in_two_dimensions() -> None:
    """dp × tp: two ranks share a vocabulary, twice; with accumulation, each dp rank has its own tokens."""
    over = mesh(2, 2)
    dp, tp = over.get_local_rank("dp"), over.get_local_rank("tp")
    parts = head()
    weight = parts["weight"].tensor_split([49])[tp].clone().requires_grad_()
    bias = parts["bias"].tensor_split([49])[tp]
    for seed in (2 * dp, 2 * dp + 1):
        case = batch(seed)
        options = {"bias": bias, "vocab_group": over["tp"], **case.options}
        linear_grpo_loss(parts["hidden"], weight, *case.arguments, **options).loss.backward()
    torch.distributed.all_reduce(weight.grad, group=over.get_group("dp"))
    leaf = parts["weight"].clone().requires_grad_()
    for seed in range(4):
        case = batch(seed)
        options = {"bias": parts["bias"], **case.options}
        linear_grpo_loss(parts["hidden"], leaf, *case.arguments, **options).loss.backward()
    close(weight.grad, leaf.grad.tensor_split([49])[tp])


def test_a_mesh_of_data_and_vocabulary():
    pool(4).run(in_two_dimensions)


def compiled() -> None:
    """The loss leaves the graph of a compiled caller, at the first call on a group as at others."""
    from grpo_kernels.objectives import groups

    groups._AGREED.clear()
    case, rank = batch(), torch.distributed.get_rank()
    own = case.logits.tensor_split([49], -1)[rank]
    group, options = world(), case.options

    @torch.compile(backend="aot_eager")
    def loss(leaf: Tensor) -> Tensor:
        log_probs = token_log_probs(leaf, case.token_ids, case.mask, vocab_group=group).log_probs
        return grpo_loss(leaf * 2, *case.arguments, vocab_group=group, **options).loss * 3 + log_probs.sum()

    leaf, plain = (own.clone().requires_grad_() for _ in range(2))
    for _ in range(2):
        loss(leaf).backward()
        log_probs = token_log_probs(plain, case.token_ids, case.mask, vocab_group=group).log_probs.sum()
        (grpo_loss(plain * 2, *case.arguments, vocab_group=group, **options).loss * 3 + log_probs).backward()
    assert torch.equal(leaf.grad, plain.grad)


def test_in_a_compiled_caller():
    pool(2).run(compiled)


def memory_of_a_shard() -> list[int]:
    """The memory behind every operation's tensors, in elements."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(
                each.untyped_storage().nbytes() // each.element_size()
                for each in (out if isinstance(out, tuple) else (out,))
                if isinstance(each, Tensor)
            )
            return out

    g = torch.Generator().manual_seed(0)
    vocab, rows, width = 4096, 64, 32
    ids, advantages = torch.randint(vocab, (1, rows), generator=g), torch.ones(1)
    weight = torch.randn(vocab // 4, width, generator=g).requires_grad_()
    hidden = torch.randn(1, rows, width, generator=g).requires_grad_()
    with Watch():
        linear_grpo_loss(hidden, weight, ids, advantages, vocab_group=world(), chunk_bytes=1 << 18).loss.backward()
    return sizes


def test_nothing_has_the_size_of_the_vocabulary():
    """A rank's largest tensor is its part of the head or its chunk of logits, a quarter of the whole."""
    for sizes in pool(4).run(memory_of_a_shard):
        assert max(sizes) <= max(1024 * 32, (1 << 18) // 4)
        assert len(sizes) > 50


def in_context_and_vocabulary(config: str) -> tuple:
    """cp × tp: every rank has every other token of each sequence, and some rows of the head."""
    over, case, parts = mesh(2, 2, names=("cp", "tp")), batch(), head()
    cp, tp = over.get_local_rank("cp"), over.get_local_rank("tp")
    tokens, rows = slice(cp, None, 2), (slice(0, 49), slice(49, None))[tp]
    options = {
        name: value[:, tokens] if isinstance(value, Tensor) else value
        for name, value in {**case.options, "config": config}.items()
    }
    leaves = {
        "hidden": parts["hidden"][:, :9][:, tokens].clone().requires_grad_(),
        "weight": parts["weight"][rows].clone().requires_grad_(),
    }
    arguments = (case.token_ids[:, tokens], case.advantages, case.mask[:, tokens])
    groups = {"vocab_group": over["tp"], "sequence_group": over["cp"]}
    out = linear_grpo_loss(
        *leaves.values(), *arguments, bias=parts["bias"][rows], chunk_bytes=4000, **groups, **options
    )
    out.loss.backward()
    torch.distributed.all_reduce(leaves["weight"].grad, group=over.get_group("cp"))
    loss = out.loss.detach().clone()
    torch.distributed.all_reduce(loss, group=over.get_group("cp"))
    return loss, out.metrics.all_reduce(over["cp"]).vector, leaves["hidden"].grad, leaves["weight"].grad


@pytest.mark.parametrize("config", ["grpo", "gspo", "vespo"])
def test_a_mesh_of_context_and_vocabulary(config):
    case, parts = batch(), head()
    leaves = [parts[name].requires_grad_() for name in ("hidden", "weight")]
    expected = linear_grpo_loss(*leaves, *case.arguments, bias=parts["bias"], **{**case.options, "config": config})
    expected.loss.backward()
    for rank, (loss, metrics, hidden, weight) in enumerate(pool(4).run(in_context_and_vocabulary, config)):
        cp, tp = divmod(rank, 2)
        close(loss, expected.loss.detach())
        torch.testing.assert_close(metrics, expected.metrics.vector, rtol=2e-6, atol=2e-6)
        close(hidden, leaves[0].grad[:, :9][:, cp::2])
        close(weight, leaves[1].grad[(slice(0, 49), slice(49, None))[tp]])


def overlapped(dtype: torch.dtype) -> None:
    """Slices travel beside the weight's GEMM: the same bits, chunk by chunk."""
    case, rank = batch(), torch.distributed.get_rank()
    fixed, row = head_kind("cpu", dtype, dtype).bytes(16, 49, dtype, dtype)  # half precision differs from CPU to CPU
    results = []
    for way in ("all_reduce", "overlapped"):
        leaves = {name: part.to(dtype).requires_grad_() for name, part in head().items()}
        own = {name: leaf if name == "hidden" else leaf.tensor_split([49])[rank] for name, leaf in leaves.items()}
        options = {"vocab_group": world(), "hidden_grad": way, "chunk_bytes": fixed + 12 * row, **case.options}
        linear_grpo_loss(own["hidden"], own["weight"], *case.arguments, bias=own["bias"], **options).loss.backward()
        results.append([leaf.grad for leaf in leaves.values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert results[0][0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_overlapped_sum_has_the_same_bits(dtype):
    pool(2).run(overlapped, dtype)


def of_one_rank(what: str) -> None:
    """Something that rank 1 alone is given."""
    case, rank, parts = batch(), torch.distributed.get_rank(), head()
    weight, bias = (parts[name].tensor_split([49])[rank] for name in ("weight", "bias"))
    hidden, options = parts["hidden"], {"check": True, **case.options}
    if rank == 1:
        changed = {"hidden_grad": "sum", "temperature": -1.0, "config": "x", "adapter": (1, 2), "grad_scale": -1.0}
        options |= {name: value for name, value in changed.items() if name == what}
        weight = None if what == "no tensor" else weight[:, :8] if what == "narrow" else weight
    linear_grpo_loss(hidden, weight, *case.arguments, bias=bias, vocab_group=world(), **options)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("no tensor", "rank 1 of 2: .*rows \\(V, H\\) of the vocabulary; got NoneType"),
        ("narrow", "rank 1 of 2: .*expected weight \\(V, 16\\) for these hidden states; got \\(48, 8\\)"),
        ("hidden_grad", "rank 1 of 2: .*hidden_grad must be one of"),
        ("temperature", "rank 1 of 2: .*expected temperature"),
        ("config", "rank 1 of 2: .*preset must be one of"),
        ("adapter", "rank 1 of 2: .*adapter to be two tensors"),
        ("grad_scale", "rank 1 of 2: .*expected grad_scale"),
    ],
)
def test_what_one_rank_is_given(what, text):

    assert re.search(text, pool(2).refusal_of(of_one_rank, what))


def every_preset() -> list:
    """Loss, metrics and gradients of each, from logits and from hidden states, of uneven shards."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    bounds = [0, *([40] if ranks == 2 else [40, 40, 90]), VOCAB]
    mine, results = slice(*bounds[rank : rank + 2]), []
    for case, config in presets():
        leaf = case.logits[..., mine].clone().requires_grad_()
        out = grpo_loss(leaf, *case.arguments, vocab_group=world(), config=config, **case.options)
        out.loss.backward()
        parts = head()
        leaves = {
            name: (part if name == "hidden" else part[mine]).clone().requires_grad_() for name, part in parts.items()
        }
        given = {"config": config, "vocab_group": world(), **case.options}
        linear = linear_grpo_loss(leaves["hidden"], leaves["weight"], *case.arguments, bias=leaves["bias"], **given)
        linear.loss.backward()
        gradients = [leaf.grad, *(each.grad for each in leaves.values())]
        results.append((out.loss, out.metrics.vector, linear.loss, linear.metrics.vector, *gradients))
    return results


def presets():
    sizes = {"constant": {"constant_length": 9}, "group_mean": {"group_size": 2}}
    for name in LossConfig.presets():
        case = cases.make(vocab=VOCAB)
        aggregation = LossConfig.preset(name).aggregation
        yield case, LossConfig.preset(name, entropy_coef=0.05, kl=KL(0.1), **sizes.get(aggregation, {}))


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_preset_over_processes(ranks):
    results = pool(ranks).run(every_preset)
    for i, (case, config) in enumerate(presets()):
        leaf = case.logits.clone().requires_grad_()
        out = grpo_loss(leaf, *case.arguments, config=config, **case.options)
        out.loss.backward()
        leaves = [part.clone().requires_grad_() for part in head().values()]
        linear = linear_grpo_loss(leaves[0], leaves[1], *case.arguments, bias=leaves[2], config=config, **case.options)
        linear.loss.backward()
        of_ranks = [result[i] for result in results]
        for loss, metrics, of_linear, of_linear_metrics, *_ in of_ranks:
            torch.testing.assert_close(loss, out.loss, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(of_linear, linear.loss, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(metrics, out.metrics.vector, rtol=5e-6, atol=2e-6)
            torch.testing.assert_close(of_linear_metrics, linear.metrics.vector, rtol=5e-6, atol=2e-6)
            assert torch.equal(loss, of_ranks[0][0])
        close(torch.cat([result[4] for result in of_ranks], -1), leaf.grad)
        for result in of_ranks:
            close(result[5], leaves[0].grad)
        close(torch.cat([result[6] for result in of_ranks]), leaves[1].grad)
        close(torch.cat([result[7] for result in of_ranks]), leaves[2].grad)


def parts_of_states() -> list:
    """hidden_grad="partial" with states that are DTensors: their mesh sums them, whoever made its ranks' group."""
    from torch.distributed.tensor import Replicate

    case, parts, rank = batch(), head(), torch.distributed.get_rank()
    weight = parts["weight"].tensor_split([49])[rank]
    found = []
    for group in (mesh(2).get_group(), subgroup(0, 1)):
        hidden = distributed(parts["hidden"], mesh(2), Replicate())
        options = {"vocab_group": group, "hidden_grad": "partial", **case.options}
        linear_grpo_loss(hidden, weight, *case.arguments, **options).loss.backward()
        found.append(hidden.grad.full_tensor())
    return found


def test_states_that_are_dtensors_sum_their_parts():
    case, parts = batch(), head()
    hidden = parts["hidden"].requires_grad_()
    linear_grpo_loss(hidden, parts["weight"], *case.arguments, **case.options).loss.backward()
    for found in pool(2).run(parts_of_states):
        for gradient in found:
            close(gradient, hidden.grad)


def head_beside_data() -> tuple:
    """dp × tp with states that are DTensors: the weight's gradient is a part on each dp rank, and says so."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    over, parts = mesh(2, 2), head()
    dp = over.get_local_rank("dp")
    case = batch(dp)
    hidden = DTensor.from_local(parts["hidden"].clone(), over, [Shard(0), Replicate()]).requires_grad_()
    weight = distributed(parts["weight"], over, Replicate(), Shard(0))
    bias = distributed(parts["bias"], over, Replicate(), Shard(0))
    linear_grpo_loss(hidden, weight, *case.arguments, bias=bias, **case.options).loss.backward()
    assert weight.grad.placements[0].is_partial()
    assert bias.grad.placements[0].is_partial()
    with pytest.raises(ValueError, match="hidden states on the mesh of a weight that is replicated"):
        linear_grpo_loss(parts["hidden"], weight, *case.arguments, bias=bias, **case.options)
    return weight.grad.full_tensor(), bias.grad.full_tensor(), hidden.grad.to_local()


def test_a_head_on_a_mesh_of_data_and_vocabulary():
    parts = head()
    leaves = {name: parts[name].requires_grad_() for name in ("weight", "bias")}
    states = []
    for seed in range(2):
        case, hidden = batch(seed), head()["hidden"].requires_grad_()
        options = {"bias": leaves["bias"], **case.options}
        linear_grpo_loss(hidden, leaves["weight"], *case.arguments, **options).loss.backward()
        states.append(hidden.grad)
    for rank, (weight, bias, hidden) in enumerate(pool(4).run(head_beside_data)):
        close(weight, leaves["weight"].grad)
        close(bias, leaves["bias"].grad)
        close(hidden, states[rank // 2])


def mask_of_sequences() -> None:
    from torch.distributed.tensor import Shard

    normalizer(distributed(batch().mask.float(), mesh(2), Shard(0)), "dapo", group=world())


def test_a_mask_that_is_cut_over_ranks_is_not_counted():
    assert "masks that are plain tensors; got a DTensor" in pool(2).refusal_of(mask_of_sequences)
