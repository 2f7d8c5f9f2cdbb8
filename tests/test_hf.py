"""attach(): each known architecture's own logits, wrappers, and what is refused by name."""

from __future__ import annotations

import copy
import inspect
import pickle
import types

import pytest
import torch

from grpo_kernels import LossOutput, TokenLogProbs, align, grpo_loss, hf, token_log_probs

transformers = pytest.importorskip("transformers")

TINY = {
    **dict(hidden_size=32, n_embd=32, num_hidden_layers=1, n_layer=1, num_attention_heads=2, n_head=2, head_dim=16),
    **dict(num_key_value_heads=2, intermediate_size=64, vocab_size=99, max_position_embeddings=64, pad_token_id=0),
    **dict(eos_token_id=1, bos_token_id=2, num_local_experts=2, num_experts=2, num_experts_per_tok=1),
    **dict(moe_intermediate_size=32, shared_expert_intermediate_size=32),
}
LATENT = {
    **dict(n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8),
    **dict(qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, head_dim=8),
}
HEADS = {"logit_scale": 0.3, "logits_scaling": 4.0, "final_logit_softcapping": 5.0}


def tiny(kind: str = "qwen3", **changes) -> torch.nn.Module:
    transformers.logging.set_verbosity_error()
    sizes = {**TINY, **(LATENT if kind == "deepseek_v3" else {}), **changes}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    for name, value in HEADS.items():
        if hasattr(config, name):
            setattr(config, name, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 99, (3, 9))
    attention = torch.ones_like(ids)
    attention[1, :3] = 0
    return {"input_ids": ids, "attention_mask": attention}


def tokens_of(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    loss_mask = given["attention_mask"].clone()
    loss_mask[:, :5] = 0
    ids, mask = align(given["input_ids"], loss_mask)
    return {"token_ids": ids, "mask": mask, "advantages": torch.tensor([1.0, -0.5, 0.3])}


@pytest.mark.parametrize("kind", hf.MODEL_TYPES)
def test_heads_are_the_models_own(kind):
    model, given = tiny(kind), inputs()
    tokens = tokens_of(given)
    with torch.no_grad():
        logits = model(**given).logits
        expected = token_log_probs(logits.float(), tokens["token_ids"], tokens["mask"]).log_probs
        hf.attach(model)
        got = model(**given, grpo={"token_ids": tokens["token_ids"], "mask": tokens["mask"]})
        assert torch.equal(model(**given).logits, logits)
    assert isinstance(got, TokenLogProbs)
    assert got.log_probs.std() > 0.01
    torch.testing.assert_close(got.log_probs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [0, 5])
def test_loss_and_every_gradient(keep):
    model, given = tiny(tie_word_embeddings=True), inputs()
    tokens = tokens_of(given)
    options = {"config": "dapo", "temperature": 0.8}
    plain = copy.deepcopy(model)
    expected = grpo_loss(plain(**given).logits, tokens["token_ids"], tokens["advantages"], tokens["mask"], **options)
    expected.loss.backward()
    hf.attach(model, **options)
    if keep:
        tokens |= {name: tokens[name][:, 1 - keep :] for name in ("token_ids", "mask")}
        given["logits_to_keep"] = keep
    out = model(**given, grpo=tokens)
    assert isinstance(out, LossOutput)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    for (name, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_hooks_fire_and_signature_stays():
    model, given = tiny(), inputs()
    before = inspect.signature(model.forward)
    hf.attach(model)
    assert inspect.signature(model.forward) == before  # trainers choose columns, generate checks arguments by it
    fired = []
    model.register_forward_hook(lambda *_: fired.append("forward"))
    out = model(*given.values(), grpo=tokens_of(given))  # positions mean what they mean without grpo
    assert fired == ["forward"]
    assert out.loss.requires_grad
    model.gradient_checkpointing_enable()
    model.train()(**given, grpo=tokens_of(given)).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    hf.detach(model)
    assert "forward" not in vars(model)
    with pytest.raises(ValueError, match="attach\\(\\) was called"):
        hf.detach(model)


@pytest.mark.parametrize("from_logits", [False, True])
def test_weights_from_the_policy(from_logits):
    """token_weights as a function of the current log-probs: the same as with their values."""
    model, given = hf.attach(tiny(), from_logits=from_logits), inputs()
    tokens = tokens_of(given)
    tokens["advantages"][1] = 0
    seen = []

    def weights(policy):
        seen.append(policy)
        return (policy.entropy > policy.entropy.mean()) + 0.5

    skipping = {} if from_logits else {"live_tokens": int(tokens["mask"][[0, 2]].sum())}
    skipping["skip_zero_advantage"] = True
    got = model(**given, grpo={**tokens, "token_weights": weights, **skipping})
    assert not seen[0].log_probs.requires_grad
    values = weights(model(**given, grpo={name: tokens[name] for name in ("token_ids", "mask")})).detach()
    wanted = model(**given, grpo={**tokens, "token_weights": values, **skipping})
    assert 0.5 in values
    assert 1.5 in values
    torch.testing.assert_close(got.loss, wanted.loss)


def test_from_logits_serves_any_head():
    """An architecture that is not known and a head that is no plain linear layer; softcap and scale are the model's."""
    for kind in ("bloom", "gemma2", "cohere"):
        model, given = tiny(kind), inputs()
        tokens = tokens_of(given)
        logits = model(**given).logits
        expected = grpo_loss(logits, tokens["token_ids"], tokens["advantages"], tokens["mask"], temperature=0.7)
        hf.attach(model, temperature=0.7, from_logits=True, inplace=True)
        out = model(**given, grpo=tokens)
        torch.testing.assert_close(out.loss, expected.loss)
        a, b = (torch.autograd.grad(x.loss, model.get_input_embeddings().weight)[0] for x in (out, expected))
        torch.testing.assert_close(a, b)


def test_packed_with_a_tail():
    """Ids after the last bound are nobody's: in the old pass, in the loss, with weights from the policy."""
    model = hf.attach(tiny())
    ids = torch.randint(3, 99, (1, 12))
    labels = ids.clone()
    labels[:, 9:] = -100
    grpo = {"token_ids": labels, "cu_seqlens": torch.tensor([0, 4, 9])}
    old = model(input_ids=ids, grpo=grpo).log_probs
    assert (old[:, 9:] == 0).all()
    grpo |= {"advantages": torch.tensor([1.0, -1.0]), "old_log_probs": old.detach()}
    plain = model(input_ids=ids, grpo=grpo)
    weighted = model(input_ids=ids, grpo={**grpo, "token_weights": lambda policy: torch.ones_like(policy.entropy)})
    assert plain.metrics.ratio_max == 1
    assert torch.equal(plain.loss, weighted.loss)


def test_copies_and_what_was_there_before():
    model, given = tiny(), inputs()
    tokens = tokens_of(given)
    calls = []

    def mine(self, *args, **inputs):
        calls.append(self)
        return type(self).forward(self, *args, **inputs)

    model.forward = types.MethodType(mine, model)
    hf.attach(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.zero_()
        assert twin(**given, grpo=tokens).entropy.max() > 4.59 > model(**given, grpo=tokens).entropy.max()
    twin(**given)
    assert calls == [twin]
    hf.detach(model)(**given)
    assert calls == [twin, model]
    assert not hasattr(model.forward, "__wrapped__")
    loaded = pickle.loads(pickle.dumps(hf.attach(tiny())))
    assert hf.attach(loaded)(**given, grpo=tokens).loss.requires_grad


def test_generates_while_attached():
    model, given = tiny(), inputs()
    expected = model.generate(**given, max_new_tokens=3, do_sample=False)
    hf.attach(model)
    assert torch.equal(model.generate(**given, max_new_tokens=3, do_sample=False), expected)


def test_refused_by_name():
    class Lora(torch.nn.Linear):
        pass

    model = tiny()
    model.set_output_embeddings(Lora(32, 99, bias=False))
    with pytest.raises(ValueError, match=r"plain nn.Linear; got .*Lora"):
        hf.attach(model)
    model = tiny()
    model.config.model_type = "mystery"
    with pytest.raises(ValueError, match="mystery"):
        hf.attach(model)
    model = hf.attach(tiny())
    with pytest.raises(ValueError, match="detach"):
        hf.attach(model)
    with pytest.raises(ValueError, match="temperature"):
        hf.attach(tiny(), temprature=2.0)
    with pytest.raises(ValueError, match="causal model"):
        hf.attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="token_ids"):
        model(**inputs(), grpo={"advantages": torch.ones(3)})
    with pytest.raises(ValueError, match="old_log_probs"):
        model(**inputs(), grpo={**tokens_of(inputs()), "old_logprobs": torch.ones(3)})
    with pytest.raises(ValueError, match="MappingProxyType"):
        model(**inputs(), grpo={**tokens_of(inputs()), "old_log_probs": torch.ones(3, 8, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match="labels"):
        model(**inputs(), labels=inputs()["input_ids"], grpo=tokens_of(inputs()))
    with pytest.raises(TypeError, match="got bool"):
        model(**inputs(), grpo=True)
    with pytest.raises(ValueError, match="advantages"):
        hf.attach(tiny(), advantages=torch.ones(3))
    with pytest.raises(ValueError, match="no head"):
        hf.attach(transformers.Qwen3Model(tiny().config))
    with pytest.raises(ValueError, match="^detach: "):
        hf.detach(torch.nn.Linear(2, 2))
    prepared = tiny()
    prepared._original_forward = prepared.forward
    for function in (hf.attach, hf.detach):
        with pytest.raises(ValueError, match="accelerator.prepare"):
            function(prepared)
