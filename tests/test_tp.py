"""A head that tensor parallelism shards, in attach() and in the linear functions: every rank has rows of it, none all.

Whatever plan shards it, loss and gradients are those of one process, log-probs have the same bits on every rank, and no
rank makes a tensor of the size of the whole weight or of the logits.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from distributed import mesh, pool
from test_fsdp import assert_close_to, backward, mean_of_ranks, micro_batch, policy, shard
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import hf, linear_grpo_loss, linear_token_log_probs

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed"),
]


def columns(model: torch.nn.Module, tp, **options) -> None:
    """PyTorch's plan, of the head alone: logits that stay sharded."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    parallelize_module(model, tp, {"lm_head": ColwiseParallel(**options)})


def gathered(model: torch.nn.Module, tp, **options) -> None:
    from torch.distributed.tensor import Replicate

    columns(model, tp, output_layouts=Replicate(), **options)


def gathered_dtensor(model: torch.nn.Module, tp) -> None:
    gathered(model, tp, use_local_output=False)


def columns_dtensor(model: torch.nn.Module, tp) -> None:
    columns(model, tp, use_local_output=False)


def sequence(model: torch.nn.Module, tp) -> None:
    """The norm before the head has a part of every sequence, as in sequence parallelism, and the head gathers it."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, parallelize_module

    def cut(module, args):
        return DTensor.from_local(args[0], tp, [Replicate()], run_check=False).redistribute(placements=[Shard(1)])

    head = ColwiseParallel(input_layouts=Shard(1))
    parallelize_module(model, tp, {"model.norm": SequenceParallel(), "lm_head": head})
    model.model.norm.register_forward_pre_hook(cut, prepend=True)


def with_embedding(model: torch.nn.Module, tp) -> None:
    """Each style makes parameters of its own, so that what was tied is tied again."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"lm_head": ColwiseParallel(), "model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(model, tp, plan)
    model.lm_head.weight = model.model.embed_tokens.weight


def plan_of_transformers(model: torch.nn.Module, tp, parts: str = "") -> None:
    """What ``tp_plan="auto"`` applies to a checkpoint: every layer, and a head whose logits are gathered."""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    plan, *_ = model._resolve_parallel_plans(DistributedConfig(tp_size=tp.size(), tp_plan="auto"))
    assert plan["lm_head"] == "colwise_gather_output"
    apply_tensor_parallelism(model, tp, {name: style for name, style in plan.items() if name.startswith(parts)})


def head_of_transformers(model: torch.nn.Module, tp) -> None:
    """Its hooks on parameters of layers do not survive ``fully_shard``."""
    plan_of_transformers(model, tp, "lm_head")


def add_a_vector(model: torch.nn.Module) -> None:
    """Of one number for each column, whole on every rank."""
    model.extra = torch.nn.Parameter(torch.linspace(-1, 1, 97))
    model.lm_head.register_forward_hook(lambda module, args, output: output * 0.5 + model.extra)


def ban_a_column(model: torch.nn.Module) -> None:
    banned = torch.arange(97) == 96
    model.lm_head.register_forward_hook(lambda module, args, output: output.masked_fill(banned, -torch.inf))


def freeze_head(model: torch.nn.Module) -> None:
    model.lm_head.requires_grad_(False)


CASES: list[tuple[Callable, bool, Callable | None, dict]] = [
    *((style, late, None, {}) for style in (gathered, columns, plan_of_transformers) for late in (False, True)),
    (gathered_dtensor, False, None, {}),
    (columns_dtensor, False, None, {}),
    (sequence, False, None, {}),
    (with_embedding, False, None, {"tied": True}),
    (columns, False, None, {"biased": True}),
    (plan_of_transformers, False, None, {"biased": True}),
    (gathered, False, add_a_vector, {}),
    (gathered, False, add_a_vector, {"biased": True}),
    (plan_of_transformers, True, add_a_vector, {"biased": True}),
    (gathered, False, ban_a_column, {"biased": True}),
    (gathered, False, freeze_head, {}),
    (columns, False, None, {"config": "gspo"}),
    (columns, False, None, {"chunk_bytes": 4000}),
    (columns, False, None, {"head_dtype": torch.float64}),
    (gathered, False, None, {"from_logits": True}),
    (columns_dtensor, False, None, {"from_logits": True}),
]
"""How it is sharded, whether ``attach`` comes after, what is done to the model behind it, and options."""


def run_case(model: torch.nn.Module) -> tuple:
    """Old log-probs, loss, log-probs, gradients."""
    ids, grpo = micro_batch(0, 0)
    with torch.no_grad():
        asked = {name: grpo[name] for name in ("token_ids", "mask")} | {"output": "log_probs"}
        old = model(input_ids=ids, grpo=asked).log_probs
    out = model(input_ids=ids, grpo=grpo)
    out.loss.backward()
    named = [(name, each.grad) for name, each in model.named_parameters() if each.grad is not None]
    gradients = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in named}
    return old, out.loss.detach(), out.log_probs.detach(), gradients


def results_of(cases: list) -> list:
    found = []
    for style, late, change, options in cases:
        model = policy(**options)
        if late:
            hf.detach(model)
        style(model, mesh(2))
        if late:
            attached = {name: value for name, value in options.items() if name not in ("tied", "biased")}
            hf.attach(model, **attached)
        if change is not None:
            change(model)
        found.append(run_case(model))
        head = model.lm_head.weight
        assert head.grad is None or head.grad.placements == head.placements
        assert head.to_local().shape[0] < 97
    return found


def test_every_plan_is_one_process():
    """attach() before and after it: loss, every gradient, the old pass, and log-probs bit for bit on every rank."""
    ranks = pool(2).run(results_of, CASES)
    for i, (style, late, change, options) in enumerate(CASES):
        model = policy(**options)
        if change is not None:
            change(model)
        old, loss, log_probs, gradients = run_case(model)
        what = f"{style.__name__} {late} {change} {options}"
        for found in ranks:
            if not options.get("from_logits"):
                assert torch.equal(found[i][0], ranks[0][i][0]), what
                assert torch.equal(found[i][2], ranks[0][i][2]), what
            torch.testing.assert_close(found[i][0], old, rtol=5e-6, atol=5e-6)
            torch.testing.assert_close(found[i][1], loss, rtol=5e-6, atol=5e-6)
            torch.testing.assert_close(found[i][2], log_probs, rtol=5e-6, atol=5e-6)
            assert_close_to(found[i][3], gradients, 4e-6, what)


class Sizes(TorchDispatchMode):
    """The sizes of all plain tensors that are made; what a DTensor does comes as what its local parts do."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch.distributed.tensor import DTensor

        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            fake = isinstance(each, FakeTensor)  # DTensor asks for shapes alone
            if isinstance(each, torch.Tensor) and each.device.type == "cpu" and not fake:
                self.largest = max(self.largest, each.numel())
        return out


WIDE = dict(vocab_size=2001, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
WIDE |= dict(num_key_value_heads=2, head_dim=16, pad_token_id=0, attn_implementation="eager")


def largest_of(styles: tuple) -> list[int]:
    transformers.logging.set_verbosity_error()
    found = []
    ids = torch.randint(3, 2001, (2, 41))
    grpo = {"token_ids": ids[:, 1:], "advantages": torch.tensor([1.0, -1.0])}
    for style in styles:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**WIDE, tie_word_embeddings=False))
        model.model.embed_tokens.requires_grad_(False)  # PyTorch makes the gradient of the whole of it
        style(model, mesh(2))
        hf.attach(model, chunk_bytes=100_000, backend="torch")
        with Sizes() as sizes:
            with torch.no_grad():
                model(input_ids=ids, grpo={**grpo, "output": "log_probs"})
            model(input_ids=ids, grpo=grpo).loss.backward()
        found.append(sizes.largest)
    return found


def test_no_rank_makes_the_whole_weight_or_all_logits():
    """The largest tensor is a rank's own rows of the weight, or their gradient, in the proof's passes too."""
    for rank, largest in enumerate(pool(2).run(largest_of, (columns, gathered, plan_of_transformers))):
        assert largest == [(1001 - rank) * 32] * 3


def both_kinds(cases: list) -> list:
    """FSDP2 over the rows of a mesh of 2 × 2, tensor parallelism within a row."""
    groups = mesh(2, 2)
    found = []
    for style, grouping, options in cases:
        model = policy(**options)
        style(model, groups["tp"])
        shard(model, grouping, mesh=groups["dp"])
        ids, grpo = micro_batch(groups["dp"].get_local_rank(), 0)
        with torch.no_grad():
            asked = {name: grpo[name] for name in ("token_ids", "mask")} | {"output": "log_probs"}
            model(input_ids=ids, grpo=asked)
        backward(model, groups["dp"].get_local_rank())
        found.append({name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()})
    return found


BOTH = [
    *((columns, grouping, {}) for grouping in ("root", "head", "norm and head")),
    (head_of_transformers, "head", {}),
    (with_embedding, "norm, embedding and head", {"tied": True}),
    (gathered, "norm and head", {"biased": True}),
]


def test_sharded_by_fsdp_as_well():
    """Each rank of FSDP's has tokens of its own, and the gradient is their mean; its shards are no vocabulary."""
    ranks = pool(4).run(both_kinds, BOTH)
    for i, (style, grouping, options) in enumerate(BOTH):
        wanted = mean_of_ranks(2, **options)
        for found in ranks:
            assert_close_to(found[i], wanted, 4e-6, f"{style.__name__} {grouping} {options}")


def rounded(groupings: tuple) -> list:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    groups, found = mesh(2, 2), []
    for grouping in groupings:
        model = policy()
        columns(model, groups["tp"])
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        shard(model, grouping, mesh=groups["dp"], mp_policy=precision)
        ids, grpo = micro_batch(groups["dp"].get_local_rank(), 0)
        seen: list = []
        model(input_ids=ids, grpo=hf.batch(**grpo, receive=seen.append)).loss.backward()
        gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
        found.append((seen[0].log_probs.detach(), gradients))
    return found


def test_mixed_precision():
    """The head in bf16, the caller's numbers in fp32: log-probs have the same bits on the ranks of a vocabulary."""
    wanted = mean_of_ranks(2, steps=1)
    ranks = pool(4).run(rounded, ("root", "head"))
    for i in range(2):
        for rank, found in enumerate(ranks):
            assert torch.equal(found[i][0], ranks[rank - rank % 2][i][0])
            assert found[i][1]["lm_head.weight"].dtype == torch.float32
            of_head = {"lm_head.weight": found[i][1]["lm_head.weight"]}
            assert_close_to(of_head, {"lm_head.weight": wanted["lm_head.weight"]}, 3e-2, "rounded")


class Head(torch.nn.Linear):
    """One whose own method computes the loss, as FSDP2's ``register_fsdp_forward_method`` makes a forward of it."""

    def loss(self, states: torch.Tensor, ids: torch.Tensor, grpo: dict) -> torch.Tensor:
        assert self.weight.placements == (torch.distributed.tensor.Shard(0),)
        assert self.weight.device_mesh.ndim == 1
        return linear_grpo_loss(states, self.weight, ids, grpo["advantages"], grpo["mask"], bias=self.bias).loss


class Policy(torch.nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = torch.nn.Embedding(vocab, 16), torch.nn.LayerNorm(16)
        self.lm_head = Head(16, vocab)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.embedding(ids))


def tokens_of(rank: int, vocab: int) -> tuple[torch.Tensor, dict]:
    torch.manual_seed(20 + rank)
    mask = torch.arange(9) < torch.tensor([[9], [4 + rank]])
    return torch.randint(vocab, (2, 9)), {"advantages": torch.tensor([1.0, -0.5 - rank]), "mask": mask}


def by_a_registered_method(vocabularies: tuple) -> list:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    groups = mesh(2, 2)
    found = []
    for vocab in vocabularies:
        for units in ([], ["lm_head"], ["norm", "lm_head"]):
            model = Policy(vocab)
            columns(model, groups["tp"])
            if units:
                fully_shard([getattr(model, name) for name in units], mesh=groups["dp"])
            fully_shard(model, mesh=groups["dp"])
            register_fsdp_forward_method(model.lm_head, "loss")
            ids, grpo = tokens_of(groups["dp"].get_local_rank(), vocab)
            model.lm_head.loss(model(ids), ids, grpo).backward()
            found.append({name: each.grad.full_tensor() for name, each in model.named_parameters()})
    return found


def test_a_registered_method_of_the_head():
    """Inside of it FSDP has gathered its own shards, and the weight is a DTensor of tensor parallelism alone."""
    vocabularies = (96, 97)
    ranks = pool(4).run(by_a_registered_method, vocabularies)
    for i, vocab in enumerate(vocabularies):
        model = Policy(vocab)
        for rank in range(2):
            ids, grpo = tokens_of(rank, vocab)
            head = model.lm_head
            out = linear_grpo_loss(model(ids), head.weight, ids, grpo["advantages"], grpo["mask"], bias=head.bias)
            (out.loss / 2).backward()
        wanted = {name: each.grad.double() for name, each in model.named_parameters()}
        for found in ranks:
            for gradients in found[3 * i : 3 * i + 3]:
                assert_close_to(gradients, wanted, 2e-6, str(vocab))


def with_dtensors(vocabularies: tuple) -> list:
    """A head whose rows lie on a mesh, with states that are plain, or replicated, or cut along the sequence before."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    tp = mesh(torch.distributed.get_world_size())
    found = []
    for vocab in vocabularies:
        for how in ("plain", "replicated", "partial", "sequence"):
            ids, grpo = tokens_of(0, vocab)
            whole = Policy(vocab)
            with torch.no_grad():
                states = whole(ids)
            weight, bias = (
                distribute_tensor(each.detach(), tp, [Shard(0)]).requires_grad_() for each in whole.lm_head.parameters()
            )
            leaf = states[:, :8].clone()
            options = {"hidden_grad": "partial"} if how in ("partial", "sequence") else {}
            if how == "sequence":
                leaf = distribute_tensor(leaf, tp, [Shard(1)]).requires_grad_()
                hidden = leaf.redistribute(placements=[Replicate()])
            else:
                leaf.requires_grad_()
                hidden = leaf if how == "plain" else DTensor.from_local(leaf, tp, [Replicate()], run_check=False)
            arguments = (hidden, weight, ids[:, :8], grpo["advantages"], grpo["mask"][:, :8])
            out = linear_grpo_loss(*arguments, bias=bias, **options)
            out.loss.backward()
            again = linear_token_log_probs(hidden.detach(), weight, ids[:, :8], bias=bias)
            of_states = leaf.grad.full_tensor() if how == "sequence" else leaf.grad
            gradients = {"states": of_states, "weight": weight.grad.full_tensor(), "bias": bias.grad.full_tensor()}
            found.append((out.loss.detach(), again.log_probs.detach(), gradients))
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_dtensors_in_the_linear_functions(ranks):
    """Of 9 columns the last of four ranks has none."""
    vocabularies = (9, 97)
    everyones = pool(ranks).run(with_dtensors, vocabularies)
    for i, vocab in enumerate(vocabularies):
        ids, grpo = tokens_of(0, vocab)
        model = Policy(vocab)
        states = model(ids)[:, :8].detach().requires_grad_()
        head = {"weight": model.lm_head.weight, "bias": model.lm_head.bias}
        out = linear_grpo_loss(
            states, token_ids=ids[:, :8], advantages=grpo["advantages"], mask=grpo["mask"][:, :8], **head
        )
        out.loss.backward()
        log_probs = linear_token_log_probs(states.detach(), token_ids=ids[:, :8], **head).log_probs.detach()
        wanted = {"states": states.grad.double()} | {name: each.grad.double() for name, each in head.items()}
        for found in everyones:
            for loss, theirs, gradients in found[4 * i : 4 * i + 4]:
                torch.testing.assert_close(loss, out.loss.detach(), rtol=2e-6, atol=2e-6)
                torch.testing.assert_close(theirs, log_probs, rtol=2e-6, atol=2e-6)
                assert torch.equal(theirs, everyones[0][4 * i][1])
                assert_close_to(gradients, wanted, 2e-6, f"{ranks} {vocab}")


def rowwise(model: torch.nn.Module, tp) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    parallelize_module(model, tp, {"lm_head": RowwiseParallel(input_layouts=Replicate())})


def sequence_of_logits(model: torch.nn.Module, tp) -> None:
    from torch.distributed.tensor import Shard

    columns(model, tp, output_layouts=Shard(1))


def cut_columns(model: torch.nn.Module, tp) -> None:
    gathered(model, tp)
    model.lm_head.register_forward_hook(lambda module, args, output: output[..., :90])


def added_to_columns(model: torch.nn.Module, tp) -> None:
    columns(model, tp)
    model.lm_head.register_forward_hook(lambda module, args, output: output + torch.zeros(output.shape[-1]))


def refused_call(style: Callable) -> None:
    model = policy()
    style(model, mesh(2))
    ids, grpo = micro_batch(0, 0)
    model(input_ids=ids, grpo=grpo)


def partial_gradients(model: torch.nn.Module, tp) -> None:
    columns(model, tp)
    hf.attach(hf.detach(model), hidden_grad="partial")


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        (partial_gradients, "expected the whole gradient of hidden states"),
        (rowwise, r"not in rows of the vocabulary \(Shard\(0\)\) as ColwiseParallel shards a head"),
        (sequence_of_logits, "neither whole nor some columns of all rows"),
        (cut_columns, "columns of a head are cut that is sharded over ranks by tensor parallelism"),
        (added_to_columns, "while every rank has some of them: ColwiseParallel"),
    ],
)
def test_plans_that_are_refused(style, expected):
    assert re.search(expected, pool(2).refusal_of(refused_call, style))


def some_columns(told: bool) -> float:
    """Logits of the model's own head, of this rank's columns."""
    model = policy(from_logits=True, **({"vocab_group": mesh(2)} if told else {}))
    columns(model, mesh(2))
    ids, grpo = micro_batch(0, 0)
    return model(input_ids=ids, grpo=grpo).loss.item()


def test_sharded_logits_of_the_models_own_head():
    """Each rank's shard may be taken for a whole vocabulary: its size gives it away. Both are odd: 49 and 48 of 97."""
    ids, grpo = micro_batch(0, 0)
    wanted = policy()(input_ids=ids, grpo=grpo).loss.item()
    assert pool(2).run(some_columns, True) == pytest.approx([wanted] * 2, rel=1e-5)
    errors = pool(2).errors_of(some_columns, False)
    for error, own in zip(errors, (49, 48), strict=True):
        assert re.search(f"expected logits of 97 columns; got {own}, those of this rank", str(error))
        assert "vocab_group=tp" in str(error)


def refused_weight(kind: str) -> None:
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    ids, grpo = tokens_of(0, 97)
    whole = Policy(97)
    weight = whole.lm_head.weight.detach()
    sharded = {
        "along the states": lambda: distribute_tensor(weight, mesh(2), [Shard(1)]),
        "sums": lambda: DTensor.from_local(weight, mesh(2), [Partial()], run_check=False),
        "strided": lambda: DTensor.from_local(weight, mesh(2), [_StridedShard(0, split_factor=2)], run_check=False),
    }[kind]()
    linear_grpo_loss(whole(ids).detach(), sharded, ids, grpo["advantages"], grpo["mask"])


@pytest.mark.parametrize("kind", ["along the states", "sums", "strided"])
def test_weights_that_are_refused(kind):
    assert "in plain shards of the vocabulary or replicated" in pool(2).refusal_of(refused_weight, kind)


def without_rows_on_one_rank(groupings: tuple) -> list:
    """Rank 1 has no row for the head at the first call, when the others look at one of theirs; then rank 0 has none."""
    found = []
    for grouping in groupings:
        model = shard(policy(), grouping)
        for step in range(2):
            rank = torch.distributed.get_rank()
            ids, grpo = micro_batch(rank, 0)
            keep = torch.arange(8 if rank == step else 0)
            if rank != step:
                grpo = {name: value[:, :0] if value.dim() == 2 else value for name, value in grpo.items()}
            model(input_ids=ids, logits_to_keep=keep, grpo=hf.batch(**grpo)).loss.backward()
        found.append({name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()})
    return found


def test_a_rank_without_rows_keeps_nobody_waiting():
    """FSDP2's ranks look at a row together, where one of them has none, too."""
    wanted = mean_of_ranks(2, steps=1)
    for found in pool(2).run(without_rows_on_one_rank, ("head", "norm and head")):
        for gradients in found:
            assert_close_to(gradients, wanted, 2e-6, "without rows")


def adapted(style: Callable | None) -> tuple:
    """LoRA on a head whose own weight is sharded: its parts are whole on every rank, and so are their gradients."""
    peft = pytest.importorskip("peft")
    model = policy()
    hf.detach(model)
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    if style is not None:
        style(model, mesh(2))
    return run_case(hf.attach(model))


def gathered_base(model: torch.nn.Module, tp) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    plan = {"base_model.model.lm_head.base_layer": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(model, tp, plan)


@pytest.mark.peers
def test_an_adapter_on_a_sharded_head():
    old, loss, log_probs, gradients = adapted(None)
    assert sum("lora" in name for name in gradients) == 2
    ranks = pool(2).run(adapted, gathered_base)
    for found in ranks:
        assert torch.equal(found[2], ranks[0][2])
        torch.testing.assert_close(found[0], old, rtol=5e-6, atol=5e-6)
        torch.testing.assert_close(found[1], loss, rtol=5e-6, atol=5e-6)
        assert_close_to(found[3], gradients, 4e-6, "adapter")


def outside_of_a_forward() -> None:
    """FSDP's shards of a head, taken for a vocabulary's."""
    from torch.distributed.fsdp import fully_shard

    model = Policy(97)
    fully_shard(model)
    ids, grpo = tokens_of(torch.distributed.get_rank(), 97)
    states = torch.randn(2, 9, 16)
    linear_grpo_loss(states, model.lm_head.weight, ids, grpo["advantages"], grpo["mask"], check=True)


def test_shards_of_fsdp_are_no_vocabulary():
    assert "grpo_kernels.hf.attach computes the loss inside" in pool(2).refusal_of(outside_of_a_forward)


def whole_head(from_logits: bool) -> None:
    """vocab_group= for a head that no plan has cut."""
    model = policy(from_logits=from_logits, vocab_group=mesh(2))
    ids = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, grpo=hf.batch(token_ids=ids[:, 1:], advantages=torch.ones(2)))


@pytest.mark.parametrize("from_logits", [False, True])
def test_a_whole_head_is_no_part_of_a_vocabulary(from_logits):
    said = pool(2).refusal_of(whole_head, from_logits)
    assert "expected each rank of vocab_group to hold a part of the vocabulary" in said
    assert "need no vocab_group=" in said
