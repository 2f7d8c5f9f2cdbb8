"""Weights and normalizers: micro-batches and ranks add up to the batch."""

from __future__ import annotations

import dataclasses
import typing

import numpy as np
import pytest
import torch
from cases import make
from distributed import pool, world

import grpo_kernels
from grpo_kernels import (  # fmt: skip
    KL,
    Clip,
    Constant,
    GroupMean,
    LossConfig,
    SequenceMean,
    SequenceSum,
    TokenMean,
    grpo_loss,
    linear_grpo_loss,
    normalizer,
    policy_loss,
)
from grpo_kernels.objectives.aggregation import Aggregation, AggregationName
from grpo_kernels.objectives.config import AGGREGATIONS


def config_of(aggregation: str, level: str = "token", **changes) -> LossConfig:
    options = {"kl": KL(0.1), "entropy_coef": 0.02, "constant_length": 13, "group_size": 2, **changes}
    return LossConfig(Clip(), level, aggregation, **options)


def batch(size: int = 16, **options):
    """Ragged sequences, one of them empty."""
    return make(batch=size, length=7, vocab=31, seed=3, **options)


def part(case, index, **options) -> tuple[torch.Tensor, torch.Tensor, object]:
    """Loss, gradient and metrics of some of the sequences."""
    leaf = case.logits[index].clone().requires_grad_()
    per_token = {name: value[index] for name, value in case.options.items()}
    out = grpo_loss(leaf, *(x[index] for x in case.arguments), **per_token, **options)
    out.loss.backward()
    return out.loss.detach(), leaf.grad, out.metrics


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("splits", [(4, 4, 4, 4), (2, 6, 8), (16,)])
def test_micro_batches_add_up(backend, aggregation, level, splits):
    """1 x 16 = 4 x 4 = 2 + 6 + 8: loss, gradient and metrics."""
    case, config = batch(), config_of(aggregation, level)
    whole, gradient, metrics = part(case, slice(None), config=config, backend=backend)
    pieces = torch.arange(16).split(splits)
    denominator = normalizer([case.mask[index] for index in pieces], config)
    losses, gradients, merged = zip(
        *(part(case, index, config=config, normalizer=denominator, backend=backend) for index in pieces), strict=True
    )
    torch.testing.assert_close(sum(losses), whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-5, atol=1e-9)
    for name, value in sum(merged).as_dict().items():
        torch.testing.assert_close(value, metrics.as_dict()[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_frameworks_that_divide_themselves(aggregation):
    """accelerate and DeepSpeed divide each loss by k: normalizer / k and grad_scale=1/k give the same gradient."""
    case, config, k = batch(), config_of(aggregation), 4
    _, gradient, _ = part(case, slice(None), config=config)
    pieces = torch.arange(16).split(16 // k)
    denominator = normalizer([case.mask[index] for index in pieces], config) / k
    gradients = []
    for index in pieces:
        leaf = case.logits[index].clone().requires_grad_()
        per_token = {name: value[index] for name, value in case.options.items()}
        arguments = [x[index] for x in case.arguments]
        out = grpo_loss(leaf, *arguments, **per_token, config=config, normalizer=denominator, grad_scale=1 / k)
        (out.loss / k).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_entropy_of_its_own(backend, aggregation):
    """entropy_aggregation="token_mean": mean entropy over the tokens of the call, whatever the aggregation."""
    case = batch()
    config = config_of(aggregation, kl=KL(), entropy_coef=0.5, entropy_aggregation="token_mean")
    out, _ = case.run(backend, config=config)
    torch.testing.assert_close(out.metrics.entropy_loss, -0.5 * out.metrics.entropy, rtol=1e-6, atol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_equal_lengths_make_means_agree(backend, aggregation):
    """With sequences of one length every aggregation is a multiple of the token mean."""
    case = batch()
    case.mask[:] = True
    loss = case.run(backend, config=config_of(aggregation))[0].loss
    mean = case.run(backend, config=config_of("token_mean"))[0].loss
    factor = {"sequence_sum": 7.0, "constant": 7 / 13}.get(aggregation, 1.0)
    torch.testing.assert_close(loss, mean * factor, rtol=1e-5, atol=1e-7)


def test_normalizer_values():
    masks = [torch.tensor([[1, 1, 0], [0, 0, 0]]), torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])]
    assert float(normalizer(masks, "token_mean")) == 6
    assert float(normalizer(masks, "dapo")) == 6
    assert float(normalizer(masks[0], "grpo")) == 2
    assert float(normalizer(masks, "sequence_sum")) == 4
    assert float(normalizer(masks, LossConfig(aggregation="group_mean", group_size=2))) == 2
    assert float(normalizer(masks, "token_mean", world_size=2)) == 3
    packed = [torch.ones(9), torch.ones(4)]
    bounds = [torch.tensor([0, 4, 9]), torch.tensor([0, 4])]
    assert float(normalizer(packed, "grpo", cu_seqlens=bounds)) == 3
    assert float(normalizer(packed[0], "grpo", cu_seqlens=bounds[0])) == 2


def test_normalizer_needs_a_config():
    """Tokens or sequences: no default could be that of every loss."""
    with pytest.raises(TypeError, match=r"the config of the loss, normalizer\(masks, config\); got none(.|\n)*hint"):
        normalizer(torch.ones(2, 2))


def test_normalizer_is_a_value():
    count = normalizer(torch.ones(4, 2), LossConfig(aggregation="group_mean", group_size=2))
    for other, value in ((count, 2.0), (count / 4, 0.5), (count * 3, 6.0), (3 * count, 6.0)):
        assert (float(other), other.unit, other.group_size) == (value, "groups", 2)
        assert "groups of 2" in repr(other)
        assert other.value.dim() == 0
    with pytest.raises(AttributeError):
        count.unit = "tokens"
    assert not hasattr(count, "__dataclass_fields__")  # FSDP would round what is in one


@pytest.mark.parametrize(
    "given", ["token_mean", "sequence_mean", "constant", LossConfig(aggregation="group_mean", group_size=4)]
)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_normalizer_of_another_unit(aggregation, given):
    """Refused by name wherever the loss divides by something else, or by groups of another size."""
    case, config = batch(), config_of(aggregation)
    denominator = normalizer(case.mask, given) / 2
    unit = {"token_mean": "tokens", "group_mean": "groups of 2"}.get(aggregation, "sequences")
    head = (torch.randn(16, 7, 5), torch.randn(31, 5))
    calls = [
        lambda: case.run(config=config, normalizer=denominator)[0],
        lambda: case.reference(config=config, normalizer=denominator)[0],
        lambda: linear_grpo_loss(*head, *case.arguments, **case.options, config=config, normalizer=denominator),
    ]
    for call in calls:
        if unit == denominator.unit:
            assert call().loss.isfinite()
            continue
        message = (
            rf'a normalizer in {unit}, which aggregation="{aggregation}" divides by; got one in {denominator.unit}'
        )
        with pytest.raises(ValueError, match=message):
            call()


def test_bare_denominators():
    """A number and a 0-d tensor are what the aggregation divides by."""
    case, config = batch(), config_of("token_mean")
    count = normalizer(case.mask, config)
    losses = [case.run(config=config, normalizer=given)[0].loss for given in (count, count.value, float(count))]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def test_normalizer_refusals():
    with pytest.raises(ValueError, match=r"normalizer: config must be one of .*Did you mean 'token_mean'"):
        normalizer(torch.ones(2, 2), "tokens_mean")
    with pytest.raises(ValueError, match="at least one mask"):
        normalizer([], "grpo")
    with pytest.raises(ValueError, match=r"cu_seqlens with packed masks \(N,\); got none"):
        normalizer(torch.ones(12), "grpo")
    with pytest.raises(ValueError, match="cu_seqlens of each of the 2 micro-batches; got 1"):
        normalizer([torch.ones(12), torch.ones(12)], "grpo", cu_seqlens=torch.tensor([0, 12]))
    with pytest.raises(ValueError, match="world_size to be an integer, at least 1; got 0"):
        normalizer(torch.ones(2, 2), "grpo", world_size=0)
    with pytest.raises(ValueError, match="world_size to be an integer, at least 1; got True"):
        normalizer(torch.ones(2, 2), "grpo", world_size=True)
    with pytest.raises(TypeError, match="micro-batch 0: expected mask to be a tensor; got int"):
        normalizer([1, 2], "grpo")
    with pytest.raises(TypeError, match="micro-batch 1: expected mask to be a tensor; got None"):
        normalizer([torch.ones(2, 2), None], "grpo")
    with pytest.raises(TypeError, match="normalizer: expected mask to be a dense tensor; got torch.sparse_coo"):
        normalizer(torch.ones(2, 2).to_sparse(), "grpo")
    for bounds, got in (([0, 12], "tensor; got list"), (torch.tensor([0, 12]).to_sparse(), "dense tensor; got")):
        with pytest.raises(TypeError, match=f"cu_seqlens to be a {got}"):
            normalizer([torch.ones(12)], "grpo", cu_seqlens=[bounds])
    with pytest.raises(TypeError, match="cu_seqlens to be a tensor; got int"):
        normalizer(torch.ones(12), "grpo", cu_seqlens=[0])
    with pytest.raises(ValueError, match=r'a LossConfig with group_size for "group_mean"'):
        normalizer(torch.ones(2, 2), "dapo_paper")
    with pytest.raises(ValueError, match=r"whole groups of 4 sequences in every micro-batch; got \[4, 6\] sequences"):
        normalizer([torch.ones(4, 2), torch.ones(6, 2)], LossConfig.preset("dapo_paper", group_size=4))


def test_aggregations_that_need_numbers():
    case = batch()
    with pytest.raises(ValueError, match="divides by a constant length: give constant_length"):
        case.run(config=LossConfig(aggregation="constant"))
    with pytest.raises(ValueError, match="needs group_size, a divisor of the 16 sequences.*; got None"):
        case.run(config=LossConfig(aggregation="group_mean"))
    with pytest.raises(ValueError, match="; got 3"):
        case.run(config=LossConfig(aggregation="group_mean", group_size=3))


INSTANCES = (
    (TokenMean(), "token_mean", {}),
    (SequenceMean(), "sequence_mean", {}),
    (SequenceSum(), "sequence_sum", {}),
    (Constant(13), "constant", {"constant_length": 13}),
    (Constant(), "constant", {}),
    (GroupMean(2), "group_mean", {"group_size": 2}),
    (GroupMean(), "group_mean", {}),
)


def test_every_aggregation_has_an_instance_here():
    assert {name for _, name, _ in INSTANCES} == set(AGGREGATIONS)
    assert typing.get_args(AggregationName) == tuple(AGGREGATIONS)


@pytest.mark.parametrize(("instance", "name", "numbers"), INSTANCES, ids=str)
def test_an_instance_is_its_name_and_number(instance, name, numbers):
    ours, named = LossConfig(aggregation=instance), LossConfig(aggregation=name, **numbers)
    assert ours == named
    assert (hash(ours), repr(ours), ours.equation()) == (hash(named), repr(named), named.equation())
    assert ours.aggregation == name
    assert ours.weighting == named.weighting == instance
    assert LossConfig(aggregation=instance, **numbers) == named
    assert dataclasses.replace(ours, aggregation="token_mean").aggregation == "token_mean"
    mask = torch.ones(4, 2)
    if numbers or not instance.options:
        assert repr(normalizer(mask, instance)) == repr(normalizer(mask, named))


def test_numbers_of_an_instance_and_beside_it():
    with pytest.raises(ValueError, match=r"Constant\(length=8\) has its own constant_length; got constant_length=9"):
        LossConfig(aggregation=Constant(8), constant_length=9)
    with pytest.raises(ValueError, match=r"GroupMean\(size=8\) has its own group_size; got group_size=4"):
        LossConfig(aggregation=GroupMean(8), group_size=4)
    assert LossConfig(aggregation=Constant(), constant_length=9).weighting == Constant(9)
    longer = dataclasses.replace(LossConfig(aggregation=Constant(8)), constant_length=16)
    assert longer.weighting == Constant(16)
    with pytest.raises(ValueError, match=r"Constant\(length=...\) must be a positive integer, .*; got 0"):
        Constant(0)
    with pytest.raises(ValueError, match=r"GroupMean\(size=...\) must be a positive integer, .*; got 2.5"):
        GroupMean(2.5)


def test_an_aggregation_with_a_number_of_its_own():
    """One class is all that it takes: no field of the config, no branch of a call."""

    @dataclasses.dataclass(frozen=True)
    class LengthPower(Aggregation):
        """Between the sum (0) and the mean (1) over the tokens of a sequence."""

        power: float = 0.5

        name = "length_power"
        equation = "Σ_i (Σ_t m·f / max(Σ_t m, 1)^power) / B"

        def weights(self, mask, sequences, normalizer=None):
            mean, total = (kind().weights(mask, sequences, normalizer) for kind in (SequenceMean, SequenceSum))
            return mean**self.power * total ** (1 - self.power)

    case = batch()
    config = LossConfig(aggregation=LengthPower(0.25))
    assert config == LossConfig(aggregation=LengthPower(0.25)) != LossConfig(aggregation=LengthPower(0.5))
    assert "max(Σ_t m, 1)^power" in config.equation()
    count = normalizer(case.mask, config)
    assert (count.unit, float(count)) == ("sequences", 16)
    for power, name in ((0.0, "sequence_sum"), (1.0, "sequence_mean")):
        loss = case.run(config=LossConfig(aggregation=LengthPower(power)), normalizer=count)[0].loss
        torch.testing.assert_close(loss, case.run(config=LossConfig(aggregation=name))[0].loss, rtol=1e-6, atol=0)


def _rank_part(aggregation: str) -> tuple:
    """What a rank of a data-parallel run computes: its share of the sequences, the global normalizer."""
    case, config = batch(), config_of(aggregation)
    index = torch.arange(16)[:6] if torch.distributed.get_rank() == 0 else torch.arange(16)[6:]
    denominator = normalizer(case.mask[index], config, world_size=2, group=world())
    loss, gradient, metrics = part(case, index, config=config, normalizer=denominator)
    return loss, gradient, metrics.all_reduce(world()).vector


@pytest.mark.ranks
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "group_mean"])
def test_ranks_add_up(aggregation):
    """Two ranks with 6 and 10 sequences; gradients averaged over ranks are the whole batch's."""
    case, config = batch(), config_of(aggregation)
    whole, gradient, metrics = part(case, slice(None), config=config)
    results = pool(2).run(_rank_part, aggregation)
    losses, gradients, vectors = zip(*results, strict=True)
    torch.testing.assert_close(sum(losses) / 2, whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient, rtol=1e-5, atol=1e-9)
    assert torch.equal(vectors[0], vectors[1])
    # the terms of the loss are scaled like it
    scaled = vectors[0].clone()
    scaled[:3] /= 2
    torch.testing.assert_close(scaled, metrics.vector, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("aggregation", [Constant(1024), TokenMean(), SequenceMean(), SequenceSum()], ids=repr)
def test_numpys_normalizers_are_numbers(aggregation):
    """They would be multiplied in their own dtype: int16 turned the sign of Dr. GRPO's loss."""
    logits, ids = torch.randn(2, 3, 11), torch.randint(11, (2, 3))
    config = LossConfig(aggregation=aggregation)

    def loss(normalizer: object) -> torch.Tensor:
        return grpo_loss(logits, ids, torch.tensor([1.0, -0.5]), config=config, normalizer=normalizer).loss

    for number in (np.int8(100), np.int16(100), np.int32(100), np.float16(100), np.float64(100), torch.tensor(100)):
        torch.testing.assert_close(loss(number), loss(100))


@pytest.mark.parametrize("config", ["grpo", "dapo"])
def test_masks_that_are_stacked_are_no_micro_batch(config):
    """Their first dimension was taken for the sequences."""
    masks = torch.ones(4, 2, 8)
    assert float(normalizer(list(masks), config)) == (8 if config == "grpo" else 64)
    with pytest.raises(
        ValueError, match=r"masks \(B, T\), or packed \(N,\) or \(1, N\); got shape \(4, 2, 8\)(.|\n)*list\("
    ):
        normalizer(masks, config)
    with pytest.raises(ValueError, match=r"got shape \(\)"):
        normalizer(torch.tensor(1.0), config)
    with pytest.raises(ValueError, match=r"cu_seqlens \(S\+1,\) of int32 or int64, of two numbers or more"):
        normalizer(torch.ones(16), config, cu_seqlens=torch.tensor([[0, 3, 16]]))


def test_a_normalizer_of_sums():
    """Counted as a mask of that shape: one token, or one of each sequence."""
    mask = torch.ones(4, 6)
    for sums in (mask.sum(), torch.tensor(14), [mask.sum(), mask.sum()]):
        with pytest.raises(ValueError, match=r"masks \(B, T\), or packed .*; got shape \(\)"):
            normalizer(sums, "dapo")
    with pytest.raises(ValueError, match=r"a packed mask \(N,\) of 0 and 1(.|\n)*the mask itself, not its sums"):
        normalizer(mask.sum(-1), "dapo")
    assert float(normalizer(torch.ones(6), "dapo")) == 6
    for nothing, kind in ((None, "NoneType"), (14, "int")):
        with pytest.raises(TypeError, match=f"a mask, or a list of the micro-batches' masks; got {kind}"):
            normalizer(nothing, "dapo")


@pytest.mark.parametrize("number", [0, -2, float("inf")])
def test_a_denominator_stays_one(number):
    count = normalizer(torch.ones(4, 6), "dapo")
    with pytest.raises(ValueError, match="normalizer: expected divisor to be a finite number > 0"):
        count / number
    with pytest.raises(ValueError, match="normalizer: expected factor to be a finite number > 0"):
        number * count


@dataclasses.dataclass(frozen=True)
class Given(SequenceMean):
    """Weights of any kind."""

    given: typing.Any = None

    def weights(self, mask, sequences, normalizer=None):
        return self.given


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("function", ["grpo_loss", "linear_grpo_loss", "policy_loss"])
def test_weights_of_an_aggregation_of_ones_own(function, packed):
    """One a sequence, or one for all: of another shape they were spread wrong in silence."""
    case = make(batch=2, length=4, vocab=11, empty=False)
    rows, ids, advantages, options = case.logits, case.token_ids, case.advantages, {"mask": case.mask}
    if packed:
        rows, ids, options = rows[:, :4].flatten(0, 1), ids.flatten(), {"mask": case.mask.flatten()}
        options["cu_seqlens"] = torch.tensor([0, 4, 8])
    log_probs = grpo_kernels.token_log_probs(rows, ids, options["mask"]).log_probs

    def loss(weights):
        given = {**options, "config": LossConfig(aggregation=Given(weights))}
        if function == "policy_loss":
            return policy_loss(log_probs, advantages, **given).loss
        if function == "grpo_loss":
            return grpo_loss(rows, ids, advantages, **given).loss
        eye = torch.eye(11)  # hidden states that are the logits
        return linear_grpo_loss(rows, eye, ids, advantages, **given).loss

    wanted = -(torch.tensor([0.1, 0.9]) * advantages * case.mask.sum(-1)).sum()  # ratios of 1
    for weights in (torch.tensor([0.1, 0.9], dtype=torch.float64), torch.tensor([0.1, 0.9])):
        torch.testing.assert_close(loss(weights), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss(torch.tensor([0.1, 0.9], requires_grad=True)), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss(torch.tensor(0.5)), -0.5 * (advantages * case.mask.sum(-1)).sum())
    for weights in (
        torch.ones(2) * 1j,
        torch.ones(2, 1),
        torch.ones(2, 4),
        torch.ones(2, 2),
        torch.ones(3),
        torch.ones(1),
        0.5,
        [0.1, 0.9],
    ):
        with pytest.raises(ValueError, match=rf"{function}: expected Given.weights\(...\) to return a tensor \(2,\)"):
            loss(weights)
