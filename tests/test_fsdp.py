"""attach() under FSDP2, on gloo ranks: whatever the head is sharded with, its gradient is the mean over ranks."""

from __future__ import annotations

import pytest
import torch
from distributed import mesh, pool

from grpo_kernels import hf

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed"),
]

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=2, head_dim=16, pad_token_id=0)


def policy(tied: bool = False, biased: bool = False, **options) -> torch.nn.Module:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if biased:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 97))
    return hf.attach(model, **options)


def micro_batch(rank: int, step: int) -> tuple[torch.Tensor, dict]:
    """Ragged: of rank 1's second one nothing is live."""
    torch.manual_seed(10 + rank + 7 * step)
    ids = torch.randint(3, 97, (2, 8))
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    old = -4.5 + 0.1 * torch.randn(2, 7)
    grpo = {"token_ids": ids[:, 1:], "advantages": torch.tensor([1.0, -1.0]) * (1 + rank), "old_log_probs": old}
    return ids, grpo | {"mask": mask & ((rank, step) != (1, 1))}


def backward(model: torch.nn.Module, rank: int, steps: int = 2, old_pass: bool = False) -> None:
    """Gradients accumulated over micro-batches, reduced with the last; old log-probs between the two, or first."""
    for step in range(steps):
        ids, grpo = micro_batch(rank, step)
        if old_pass or step > 0:
            with torch.no_grad():
                asked = {name: grpo[name] for name in ("token_ids", "mask")} | {"output": "log_probs"}
                old = model(input_ids=ids, grpo=asked).log_probs
            assert (old.min() < -3) or not grpo["mask"].any()
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(step == steps - 1)
        model(input_ids=ids, grpo=hf.batch(**grpo)).loss.backward()


def shard(model: torch.nn.Module, grouping: str, **options) -> torch.nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, **options)
    groups = {
        "root": [],
        "head": [model.lm_head],
        "norm and head": [model.model.norm, model.lm_head],
        "embedding and head": [model.model.embed_tokens, model.lm_head],
        "norm, embedding and head": [model.model.norm, model.model.embed_tokens, model.lm_head],
    }[grouping]
    if groups:
        fully_shard(groups if len(groups) > 1 else groups[0], **options)
    return fully_shard(model, **options)


def mean_of_ranks(ranks: int, prepare=lambda model: None, steps: int = 2, **options) -> dict[str, torch.Tensor]:
    """One process for each rank's micro-batches, one after the other, on a model of its own."""
    totals: dict[str, torch.Tensor] = {}
    for rank in range(ranks):
        model = policy(**options)
        prepare(model)
        backward(model, rank, steps)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                totals[name] = totals.get(name, 0) + parameter.grad.double() / ranks
    return totals


def freeze_head(model: torch.nn.Module) -> None:
    model.lm_head.requires_grad_(False)


def freeze_backbone(model: torch.nn.Module) -> None:
    model.model.requires_grad_(False)


CASES = [
    ("root", {}),
    ("head", {}),
    ("head", {"reshard_after_forward": True}),
    ("head", {"reshard_after_forward": False}),
    ("norm and head", {"reshard_after_forward": True}),
    ("norm and head", {"reshard_after_forward": False}),
    ("embedding and head", {"tied": True}),
    ("norm, embedding and head", {"tied": True, "reshard_after_forward": True}),
    ("head", {"freeze": freeze_head}),
    ("head", {"freeze": freeze_backbone}),
    ("norm and head", {"freeze": freeze_head}),
    ("head", {"config": "gspo"}),  # two passes over the vocabulary
    ("head", {"chunk_bytes": 4000}),
    ("head", {"from_logits": True}),
    ("head", {"biased": True}),
    ("norm and head", {"biased": True, "reshard_after_forward": True}),
]


def gradients_of(cases: list) -> list[dict[str, torch.Tensor]]:
    found = []
    for grouping, case in cases:
        options = dict(case)
        freeze = options.pop("freeze", None)
        reshard = {"reshard_after_forward": options.pop("reshard_after_forward", None)}
        model = policy(**options)
        if freeze is not None:
            freeze(model)
        shard(model, grouping, **reshard)
        backward(model, torch.distributed.get_rank(), old_pass=grouping == "head" and not case)
        assert "grpo_kernels_forward" not in vars(model.lm_head)
        gradients = ((name, parameter.grad) for name, parameter in model.named_parameters())
        found.append({name: gradient.full_tensor() for name, gradient in gradients if gradient is not None})
    return found


def assert_close_to(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], limit: float, what: str) -> None:
    assert found.keys() == wanted.keys(), what
    assert found, what
    for name, gradient in found.items():
        error = (gradient.double() - wanted[name]).abs().max() / wanted[name].abs().max()
        assert error <= limit, (what, name, float(error))


def test_gradients_are_the_mean_over_ranks():
    """However the head is grouped: accumulation without sync, an old pass before each, a rank without live tokens."""
    ranks = pool(2).run(gradients_of, CASES)
    for i, (grouping, case) in enumerate(CASES):
        options = {name: value for name, value in case.items() if name not in ("freeze", "reshard_after_forward")}
        wanted = mean_of_ranks(2, case.get("freeze", lambda model: None), **options)
        for found in ranks:
            assert_close_to(found[i], wanted, 2e-6, f"{grouping} {case}")


def hybrid() -> dict[str, torch.Tensor]:
    model = shard(policy(), "head", mesh=mesh(2, 2, names=("replicate", "shard")))
    backward(model, torch.distributed.get_rank())
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def test_hybrid_sharding():
    """Two replicas of two shards each: replicas stay equal."""
    wanted = mean_of_ranks(4)
    for found in pool(4).run(hybrid):
        assert_close_to(found, wanted, 2e-6, "hybrid")


def rounded(groupings: tuple[str, ...]) -> list:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    found = []
    for grouping in groupings:
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = shard(policy(), grouping, mp_policy=precision)
        seen: list = []
        ids, grpo = micro_batch(torch.distributed.get_rank(), 0)
        out = model(input_ids=ids, grpo=hf.batch(**grpo, receive=seen.append))
        out.loss.backward()
        gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
        found.append((seen[0].log_probs, seen[0].loss.dtype, gradients))
    return found


def test_mixed_precision():
    """The head in bf16, whatever it is grouped with, the caller's numbers in fp32: as in the root's group, bit for
    bit."""
    groupings = ("root", "head", "norm and head")
    wanted = mean_of_ranks(2)
    for ranks in pool(2).run(rounded, groupings):
        for log_probs, dtype, gradients in ranks:
            assert dtype == torch.float32
            assert torch.equal(log_probs, ranks[0][0])
            torch.testing.assert_close(gradients["lm_head.weight"], ranks[0][2]["lm_head.weight"], rtol=0, atol=0)
            assert gradients.keys() == wanted.keys()
            assert gradients["lm_head.weight"].abs().max() > 0


def scale_output(module, args, output):
    return output * 30


def asks_the_type(module, args, output):
    return output * 30 if type(output) is torch.Tensor else output


def asks_the_type_on_rank_1(module, args, output):
    return asks_the_type(module, args, output) if torch.distributed.get_rank() == 1 else output


def multiplies_itself(model: torch.nn.Module) -> None:
    model.lm_head.forward = lambda states: states @ model.lm_head.weight.T


def doubles_its_weight(model: torch.nn.Module) -> None:
    model.lm_head.forward = lambda states: torch.nn.functional.linear(states, model.lm_head.weight * 2)


def cuts_its_columns(model: torch.nn.Module) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output[..., :96])


def derived(changes: tuple) -> list[str]:
    found = []
    for change in changes:
        for grouping in ("head", "norm and head"):
            model = policy()
            change(model)
            shard(model, grouping)
            ids, grpo = micro_batch(0, 0)
            try:
                model(input_ids=ids, grpo=grpo).loss.backward()
                found.append("nothing")
            except ValueError as error:
                found.append(str(error))
    return found


def test_a_weight_that_is_made_in_a_unit_of_its_own_is_refused():
    """Its gradient would be each rank's own: only parameters are reduced."""
    changes = (multiplies_itself, doubles_its_weight, cuts_its_columns)
    for found in pool(2).run(derived, changes):
        assert len(found) == 6
        for message in found:
            assert "in an FSDP2 unit of its own" in message


def hooked(hooks: tuple) -> list:
    found = []
    for hook in hooks:
        model = shard(policy(), "head")
        model.lm_head.register_forward_hook(hook)
        ids, grpo = micro_batch(0, 0)
        try:
            found.append(model(input_ids=ids, grpo=grpo).log_probs)
        except ValueError as error:
            found.append(str(error))
    return found


def test_hooks_of_a_sharded_head():
    """FSDP's own change nothing; somebody's are traced, or refused: by every rank where one has found something."""
    model = policy()
    model.lm_head.register_forward_hook(scale_output)
    ids, grpo = micro_batch(0, 0)
    wanted = model(input_ids=ids, grpo=grpo).log_probs
    hooks = (scale_output, asks_the_type, asks_the_type_on_rank_1)
    ranks = pool(2).run(hooked, hooks)
    for rank, (scaled, refused, by_one) in enumerate(ranks):
        torch.testing.assert_close(scaled, wanted)
        assert "a forward hook on lm_head (test_fsdp.asks_the_type)" in refused
        assert ("another rank's log-probs are others" if rank == 0 else "differ by up to") in by_one


def adapted_policy() -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    model = policy()
    hf.detach(model)
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    return hf.attach(peft.get_peft_model(model, config))


def adapted_gradients() -> tuple[dict, str]:
    from torch.distributed.fsdp import fully_shard

    rank = torch.distributed.get_rank()
    model = adapted_policy()
    fully_shard(model)
    backward(model, rank)
    gradients = {name: each.grad.full_tensor() for name, each in model.named_parameters() if each.grad is not None}
    alone = adapted_policy()
    fully_shard(alone.base_model.model.lm_head)
    fully_shard(alone)
    ids, grpo = micro_batch(rank, 0)
    try:
        alone(input_ids=ids, grpo=hf.batch(**grpo))
    except ValueError as error:
        return gradients, str(error)
    return gradients, "nothing"


@pytest.mark.peers
def test_an_adapter_on_a_sharded_head():
    """In the root's unit; in one of its own its weights are not whole when hidden states meet them."""
    totals: dict[str, torch.Tensor] = {}
    for rank in range(2):
        model = adapted_policy()
        backward(model, rank)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                totals[name] = totals.get(name, 0) + parameter.grad.double() / 2
    for found, message in pool(2).run(adapted_gradients):
        assert_close_to(found, totals, 2e-6, "adapter")
        assert "sharded, in an FSDP2 unit of its own" in message
