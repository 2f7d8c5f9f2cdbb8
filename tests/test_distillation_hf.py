"""hf.teacher(): what it gives stands for the model's own logits, and attach() learns from it."""

from __future__ import annotations

import concurrent.futures
import copy
import gc
import time
import weakref

import pytest
import torch
from distributed import pool
from test_fsdp import micro_batch, policy, shard
from test_hf import asks_the_type, inputs, looks_at_contents, scale_columns, tiny, tokens_of
from test_tp import Sizes, columns

from grpo_kernels import Divergence, LossConfig, Teacher, grpo_loss, hf

transformers = pytest.importorskip("transformers")
ranks = [
    pytest.mark.ranks,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed"),
]

WIDE = dict(hidden_size=48, n_embd=48, num_attention_heads=3, n_head=3, num_key_value_heads=3)
BY = {
    "forward_kl": lambda p, q: (q.exp() * (q - p)).sum(-1),
    "reverse_kl": lambda p, q: (p.exp() * (p - q)).sum(-1),
    "tvd": lambda p, q: (p.exp() - q.exp()).abs().sum(-1) / 2,
}
"""By definition, of log-probs over the vocabulary."""


def distilled(kind: str = "reverse_kl") -> LossConfig:
    return LossConfig(surrogate=None, divergence=Divergence(kind))


def logits_of(teacher: Teacher) -> torch.Tensor:
    """As the contract of Teacher has them."""
    logits = torch.nn.functional.linear(teacher.hidden, teacher.weight, teacher.bias) * teacher.logit_scale
    cap = teacher.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def defined(kind: str, logits: torch.Tensor, teacher: torch.Tensor, tokens: dict) -> torch.Tensor:
    """The divergence of every token (B, T), of whole logits."""
    length = tokens["token_ids"].shape[1]
    return BY[kind](logits[:, :length].log_softmax(-1), teacher[:, :length].log_softmax(-1))


def mean_over_sequences(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (torch.where(mask != 0, values, 0.0).sum(-1) / (mask != 0).sum(-1)).mean()


def without_advantages(given: dict, keep: int = 0) -> dict:
    tokens = {name: value for name, value in tokens_of(given).items() if name != "advantages"}
    return {name: value[:, 1 - keep :] for name, value in tokens.items()} if keep else tokens


def test_a_teacher_of_several_threads():
    """One call after the other, each with the model's own forward, though all began before the first had ended."""
    model, given = tiny(), inputs()
    model.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    ask = hf.teacher(model)
    wanted = ask(**given).hidden

    def asked(_):
        time.sleep(0.005)  # the other thread's call has begun
        return ask(**given).hidden

    with concurrent.futures.ThreadPoolExecutor(2) as pool_of_threads:
        found = list(pool_of_threads.map(asked, range(8)))
    assert all(torch.equal(hidden, wanted) for hidden in found)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("keep", [0, 5])
@pytest.mark.parametrize(
    ("teacher", "kind"),
    [
        *(("qwen3", "reverse_kl"), ("gemma2", "forward_kl"), ("cohere", "reverse_kl"), ("granite", "tvd")),
        *(("gpt2", "forward_kl"), ("phi", "reverse_kl")),
    ],
)
def test_loss_and_gradients_are_those_of_both_models_logits(teacher, kind, keep):
    """In double precision: a scale, a softcap, a bias, tied embeddings, another width, rows that are left out."""
    student, big = tiny().double(), tiny(teacher, **WIDE).double().train()
    whole = {"input_ids": inputs()["input_ids"]}
    tokens = without_advantages(inputs(), keep)
    plain = copy.deepcopy(student)
    with torch.no_grad():
        wanted = copy.deepcopy(big).eval()(**whole).logits[:, -keep:]
    logits = plain(**whole).logits[:, -keep:]
    expected = mean_over_sequences(defined(kind, logits, wanted, tokens), tokens["mask"])
    expected.backward()

    given = whole | ({"logits_to_keep": keep} if keep else {})
    found = hf.teacher(big)(**given)
    assert found.hidden.shape == (*wanted.shape[:2], 48)
    torch.testing.assert_close(logits_of(found), wanted, rtol=1e-9, atol=1e-9)
    out = hf.attach(student, distilled(kind))(**given, grpo={**tokens, "teacher": found})
    out.loss.backward()
    assert expected > 0.02
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=1e-12)
    for mine, other in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-7, atol=1e-10)
    assert all(parameter.grad is None for parameter in big.parameters())
    assert big.training
    assert "forward" not in vars(big)


@pytest.mark.parametrize("from_logits", [False, True])
def test_beside_a_policy_term(from_logits):
    """attach gives what grpo_loss gives on the two models' own logits."""
    student, big, given = tiny(), tiny("gemma2", **WIDE), inputs()
    tokens = {**tokens_of(given), "divergence_coef": 0.3}
    config = LossConfig.preset("dapo", divergence=Divergence("jsd", mix=0.2))
    plain = copy.deepcopy(student)
    with torch.no_grad():
        logits = big(**given).logits
    expected = grpo_loss(plain(**given).logits, **tokens, teacher=Teacher(logits=logits), config=config)
    expected.loss.backward()
    teacher = Teacher(logits=logits) if from_logits else hf.teacher(big)(**given)
    out = hf.attach(student, config, from_logits=from_logits)(**given, grpo={**tokens, "teacher": teacher})
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out.metrics.divergence, expected.metrics.divergence, rtol=1e-5, atol=1e-7)
    for mine, other in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="no advantages"):
        student(**given, grpo={**without_advantages(given), "teacher": teacher})
    with pytest.raises(ValueError, match="teacher= for Divergence"):
        student(**given, grpo=tokens)
    given["labels"] = given["input_ids"]
    with pytest.raises(ValueError, match="hf.teacher: expected inputs of the model alone; got labels="):
        hf.teacher(big)(**given)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "cohere"])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(kind, autocast):
    """States and weight are those that the model's own head multiplies; cast, autocast or not, by who asks."""
    model, given = tiny(kind, **WIDE), inputs()
    if not autocast:
        model = model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = hf.teacher(model)(**given)
        with torch.no_grad():
            wanted = model(**given).logits
    assert found.hidden.dtype == found.weight.dtype == torch.bfloat16
    assert wanted.dtype == torch.bfloat16
    assert (found.weight.data_ptr() == model.lm_head.weight.data_ptr()) != autocast
    torch.testing.assert_close(logits_of(found).float(), wanted.float(), rtol=2**-7, atol=2**-7)
    student = hf.attach(tiny(), distilled())
    tokens = without_advantages(given)
    out = student(**given, grpo={**tokens, "teacher": found})
    values = defined("reverse_kl", student(**given).logits.double(), wanted.double(), tokens)
    torch.testing.assert_close(out.loss.double(), mean_over_sequences(values, tokens["mask"]), rtol=0.02, atol=1e-3)


def test_a_head_that_both_share():
    """One weight, of the policy and in the teacher: its gradient is of the policy's use alone."""
    model, given = tiny(tie_word_embeddings=True), inputs()
    tokens, twin = without_advantages(given), copy.deepcopy(model)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.model.norm.weight.mul_(1.5)
        wanted = moved(**given).logits
    mean_over_sequences(defined("reverse_kl", twin(**given).logits, wanted, tokens), tokens["mask"]).backward()
    moved.lm_head.weight = moved.model.embed_tokens.weight = model.lm_head.weight
    found = hf.teacher(moved)(**given)
    assert found.weight.data_ptr() == model.lm_head.weight.data_ptr()
    hf.attach(model, distilled())(**given, grpo={**tokens, "teacher": found}).loss.backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-6)
    assert moved.model.norm.weight.grad is None


@pytest.mark.peers
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["lm_head"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_the_reference_of_an_adapted_model(options):
    """The same model with its adapters off, attached or not, in training; with them on it is a teacher as well."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False, **options)
    model, given = peft.get_peft_model(tiny(), config).train(), inputs()
    tokens = without_advantages(given)
    with torch.no_grad():
        if "modules_to_save" in options:
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
        adapted = copy.deepcopy(model).eval()(**given).logits
        with model.disable_adapter():
            plain = model(**given).logits
    assert (adapted - plain).abs().max() > 0.1
    torch.testing.assert_close(logits_of(hf.teacher(model)(**given)), adapted, rtol=1e-5, atol=1e-5)
    hf.attach(model, distilled())
    with model.disable_adapter():
        reference = hf.teacher(model)(**given)
    torch.testing.assert_close(logits_of(reference), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(hf.teacher(model)(**given)), adapted, rtol=1e-5, atol=1e-5)
    model.eval()
    out = model(**given, grpo={**tokens, "teacher": reference})
    values = defined("reverse_kl", adapted.double(), plain.double(), tokens)
    torch.testing.assert_close(out.loss.double(), mean_over_sequences(values, tokens["mask"]), rtol=1e-4, atol=1e-6)
    out.loss.backward()
    trained = {name for name, each in model.named_parameters() if each.grad is not None}
    assert trained == {name for name, each in model.named_parameters() if each.requires_grad}


def test_what_stands_around_the_head():
    """A hook of columns is in the weight; the scale of each is the teacher's own."""
    model, given = tiny(**WIDE), inputs()
    model.lm_head.register_forward_hook(scale_columns)
    with torch.no_grad():
        wanted = model(**given).logits
    torch.testing.assert_close(logits_of(hf.teacher(model)(**given)), wanted, rtol=1e-5, atol=1e-5)


def test_of_inference_mode():
    """Autograd may need it once more: losses of tokens."""
    model, given = tiny(), inputs()
    with torch.inference_mode():
        found = hf.teacher(tiny(**WIDE))(**given)
    config = LossConfig(divergence=Divergence())
    tokens = {**tokens_of(given), "token_losses": True, "teacher": found}
    hf.attach(model, config)(**given, grpo=tokens).token_losses.sum().backward()
    assert model.lm_head.weight.grad.abs().max() > 0


def test_a_batch_moves_its_teacher():
    teacher = hf.teacher(tiny())(**inputs())
    batch = hf.batch(token_ids=inputs()["input_ids"][:, 1:], teacher=teacher)
    moved = batch.to("meta")["teacher"]
    assert {moved.hidden.device.type, moved.weight.device.type} == {"meta"}
    assert moved.hidden.shape == teacher.hidden.shape
    with pytest.raises(ValueError, match="the option must be one of"):
        hf.attach(tiny(), distilled(), teacher=teacher)  # its rows are those of a call


def test_nothing_of_the_logits_size_is_made():
    """Of the student's, the teacher's and their proofs: the largest tensor is the teacher's head itself."""
    sizes = dict(vocab_size=1001, max_position_embeddings=128)
    student, big = hf.attach(tiny(**sizes), distilled(), chunk_bytes=16 * 1001 * 4), tiny(**sizes, **WIDE)
    ids = torch.randint(3, 1001, (2, 30))
    with Sizes() as made:
        teacher = hf.teacher(big)(input_ids=ids)
        student(input_ids=ids, grpo={"token_ids": ids[:, 1:], "teacher": teacher}).loss.backward()
    assert made.largest == 1001 * 48 < ids[:, 1:].numel() * 1001
    assert teacher.weight.data_ptr() == big.lm_head.weight.data_ptr()


def test_a_proof_is_remembered():
    """By model, which it does not keep alive: the second call runs the model once."""
    model, given, calls = tiny(), inputs(), []
    model.model.norm.register_forward_hook(lambda *_: calls.append("norm"))
    head = model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    hf.teacher(model)(**given)
    assert calls == ["norm", "head", "head", "head"]
    calls.clear()
    hf.teacher(model)(**given)
    assert calls == ["norm", "head"]
    head.remove()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Packed(torch.nn.Linear):
    """A head that multiplies by code of its own."""

    def forward(self, states):
        return states.double().mul(2).matmul(self.weight.double().t()[:, :50])


def test_refused_by_name():
    """Each by who was asked, with the way around it."""
    given = inputs()
    with pytest.raises(ValueError, match="^hf.teacher: expected a causal model"):
        hf.teacher(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="^hf.teacher: .* no head"):
        hf.teacher(transformers.Qwen3Model(tiny().config))
    with pytest.raises(ValueError, match="got nn.DataParallel"):
        hf.teacher(torch.nn.DataParallel(tiny()))
    packed, asks, looks = tiny(), tiny(), tiny()
    packed.set_output_embeddings(Packed(32, 99, bias=False))
    asks.lm_head.register_forward_hook(asks_the_type)
    looks.lm_head.register_forward_hook(looks_at_contents)
    for model, reason in (
        (packed, "Packed makes them without a linear layer"),
        (asks, "differ by up to .* nats; found: a forward hook on lm_head .*asks_the_type"),
        (looks, "norm is called with them; found: a forward hook on lm_head"),
    ):
        with pytest.raises(ValueError, match=rf"(?s)^hf.teacher: .*{reason}.*Teacher\(logits="):
            hf.teacher(model)(**given)
        assert "forward" not in vars(model)
    mixed = tiny()
    mixed.lm_head.bfloat16()
    with pytest.raises(ValueError, match="(?s)^hf.teacher: expected hidden states of the head's dtype.*autocast"):
        hf.teacher(mixed)(**given)
    with pytest.raises(ValueError, match="hf.teacher: expected inputs of the model alone; got grpo="):
        hf.teacher(hf.attach(tiny()))(**given, grpo=tokens_of(given))


GROUPINGS = ("root", "head", "norm, embedding and head")


def big_one(tied: bool = False) -> torch.nn.Module:
    """The policy, of other weights."""
    model = hf.detach(policy(tied=tied))
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def sharded_teachers(groupings: tuple[str, ...]) -> list:
    rank, found = torch.distributed.get_rank(), []
    for grouping in groupings:
        model = shard(big_one("embedding" in grouping), grouping, reshard_after_forward=True)
        (first, grpo), (second, _) = micro_batch(rank, 0), micro_batch(rank, 1)
        teacher = hf.teacher(model)(input_ids=first)
        later = hf.teacher(model)(input_ids=second)
        model(input_ids=second)
        student = shard(policy(config=distilled()), grouping if grouping != GROUPINGS[-1] else "head")
        tokens = {name: grpo[name] for name in ("token_ids", "mask")}
        student(input_ids=first, grpo=hf.batch(**tokens, teacher=teacher)).loss.backward()
        gradients = {name: each.grad.full_tensor() for name, each in student.named_parameters()}
        found.append((logits_of(teacher), logits_of(later), gradients))
    return found


@pytest.mark.ranks
def test_sharded_by_fsdp():
    """However the head is grouped: what was given stays, and the student's gradients are the mean over ranks."""
    found = pool(2).run(sharded_teachers, GROUPINGS)
    for i, grouping in enumerate(GROUPINGS):
        totals: dict[str, torch.Tensor] = {}
        for rank in range(2):
            model, student = big_one("embedding" in grouping), hf.detach(policy())
            for step in range(2):
                with torch.no_grad():
                    wanted = model(input_ids=micro_batch(rank, step)[0]).logits
                torch.testing.assert_close(found[rank][i][step], wanted, rtol=1e-5, atol=1e-5)
            ids, grpo = micro_batch(rank, 0)
            with torch.no_grad():
                wanted = model(input_ids=ids).logits
            values = defined("reverse_kl", student(input_ids=ids).logits, wanted, grpo)
            mean_over_sequences(values, grpo["mask"]).backward()
            for name, each in student.named_parameters():
                totals[name] = totals.get(name, 0) + each.grad / 2
        for rank in range(2):
            for name, gradient in found[rank][i][2].items():
                torch.testing.assert_close(gradient, totals[name], rtol=1e-3, atol=1e-6, msg=f"{grouping} {name}")


def sharded_by_vocabulary() -> list[str]:
    from distributed import mesh

    ids, grpo = micro_batch(0, 0)
    tokens, said = {name: grpo[name] for name in ("token_ids", "mask")}, []
    whole = hf.teacher(big_one())(input_ids=ids)
    student, teacher = policy(config=distilled()), big_one()
    for model in (student, teacher):
        columns(model, mesh(2))
    calls = (
        lambda: hf.teacher(teacher)(input_ids=ids),
        lambda: student(input_ids=ids, grpo={**tokens, "teacher": whole}),
    )
    for call in calls:
        with pytest.raises(ValueError, match="whole") as error:
            call()
        said.append(str(error.value))
    return said


@pytest.mark.ranks
def test_a_head_that_tensor_parallelism_shards():
    """Of the teacher, and of the policy: refused by every rank."""
    for of_teacher, of_policy in pool(2).run(sharded_by_vocabulary):
        assert of_teacher.startswith("hf.teacher: expected a head that is whole on every rank")
        assert of_policy.startswith("attach: expected a whole head beside teacher=")
