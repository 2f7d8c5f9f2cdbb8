"""attach(): each known architecture's own logits, wrappers, and what is refused by name."""

from __future__ import annotations

import copy
import inspect
import pickle
import types

import pytest
import torch

from grpo_kernels import LossOutput, TokenLogProbs, TopK, align, grpo_loss, hf, token_log_probs

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
        got = model(**given, grpo={"token_ids": tokens["token_ids"], "mask": tokens["mask"], "output": "log_probs"})
        assert torch.equal(model(**given).logits, logits)
    assert isinstance(got, TokenLogProbs)
    assert got.log_probs.std() > 0.01
    torch.testing.assert_close(got.log_probs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", hf.MODEL_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_rounding_of_an_architecture_is_a_difference(kind, dtype):
    model, given = tiny(kind, initializer_range=0.3).to(dtype), inputs()
    assert hf.attach(model)(**given, grpo=tokens_of(given)).loss.isfinite()


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
    values = weights(model(**given, grpo={**tokens, "output": "log_probs"})).detach()
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
    labels = ids.roll(-1, 1)
    labels[:, 9:] = -100
    grpo = {"token_ids": labels, "cu_seqlens": torch.tensor([0, 4, 9])}
    old = model(input_ids=ids, grpo={**grpo, "output": "log_probs"}).log_probs
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
    assert calls == [twin, model]  # each proven once
    calls.clear()
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
    for of_the_model in ("adapter", "bias", "weight"):
        with pytest.raises(ValueError, match=f"attach: the option must be one of .*; got '{of_the_model}'"):
            hf.attach(tiny(), **{of_the_model: None})
        with pytest.raises(ValueError, match=f"the name must be one of .*; got '{of_the_model}'"):
            model(**inputs(), grpo=tokens_of(inputs()) | {of_the_model: None})
    with pytest.raises(ValueError, match="causal model"):
        hf.attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="token_ids"):
        model(**inputs(), grpo={"advantages": torch.ones(3)})
    for unsaid in ({}, {"advantages": None}, {"output": "loss"}):  # once the log-probs, in silence
        tokens = {name: value for name, value in tokens_of(inputs()).items() if name != "advantages"}
        with pytest.raises(ValueError, match='(?s)no advantages.*output="log_probs"'):
            model(**inputs(), grpo=tokens | unsaid)
    with pytest.raises(ValueError, match="one of loss, log_probs; got 'logprobs'"):
        model(**inputs(), grpo={**tokens_of(inputs()), "output": "logprobs"})
    with pytest.raises(ValueError, match="old_log_probs"):
        model(**inputs(), grpo={**tokens_of(inputs()), "old_logprobs": torch.ones(3)})
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


@pytest.mark.parametrize(
    ("from_logits", "name", "value"),
    [(False, "support", TopK(5)), (False, "inplace", True), (True, "chunk_bytes", 1 << 20), (True, "live_tokens", 3)],
)
def test_a_keyword_of_the_other_loss(from_logits, name, value):
    """Not a misspelling of one that is known: which way of attaching takes it is said."""
    message = f"(?s)^attach: .* got {name}=, which .* alone has.*hint: attach.*from_logits=True.* takes {name}="
    with pytest.raises(ValueError, match=message):
        hf.attach(tiny(), from_logits=from_logits, **{name: value})
    model = hf.attach(tiny(), from_logits=from_logits)
    with pytest.raises(ValueError, match=message):
        model(**inputs(), grpo={**tokens_of(inputs()), name: value})
    hf.attach(tiny(), from_logits=not from_logits, **{name: value})
    with pytest.raises(ValueError, match="the option must be one of"):
        hf.attach(tiny(), from_logits=from_logits, token_ids=torch.ones(3))


def own_log_probs(model, given, token_ids):
    """By the model's own logits, in double precision."""
    with torch.no_grad():
        log_probs = model(**given).logits.double().log_softmax(-1)[:, : token_ids.shape[1]]
    return log_probs.gather(-1, token_ids[..., None]).squeeze(-1)


def asked(given):
    """The log-prob pass over every token."""
    return {"token_ids": given["input_ids"][:, 1:], "output": "log_probs"}


def scale_output(module, args, output):
    return output * 30


def ban_a_token(module, args, output):
    return output.index_fill(-1, torch.tensor([0]), -torch.inf)


def scale_states(module, args):
    return (args[0] * 30,)


def scale_states_by_name(module, args, kwargs):
    return (args[0] * 30,), kwargs


def tilt(module, args, kwargs, output):
    return output + torch.arange(99) / 99


def patch_head(model):
    head = model.lm_head
    head.forward = lambda states: torch.nn.functional.linear(states, head.weight) * 30


def patch_model(model):
    plain = model.forward

    def colder(*args, **inputs):
        out = plain(*args, **inputs)
        out.logits = out.logits * 30
        return out

    model.forward = colder


def subclass_of_logits(model):
    class Mup(type(model)):
        def forward(self, *args, **inputs):
            out = super().forward(*args, **inputs)
            out.logits = out.logits / 4
            return out

    model.__class__ = Mup


def subclass_of_inputs(model):
    class Noisy(type(model)):
        def forward(self, input_ids, **inputs):
            return super().forward(input_ids=(input_ids + 1) % 99, **inputs)

    model.__class__ = Noisy


def subclass_that_fails(model):
    class Strict(type(model)):
        def forward(self, *args, **inputs):
            raise RuntimeError("call me by another name")

    model.__class__ = Strict


AROUND = {
    "a forward hook on lm_head .*scale_output": lambda model: model.lm_head.register_forward_hook(scale_output),
    "a forward hook on lm_head .*ban_a_token": lambda model: model.lm_head.register_forward_hook(ban_a_token),
    "a forward hook on lm_head .*tilt": lambda model: model.lm_head.register_forward_hook(tilt, with_kwargs=True),
    "a forward pre-hook on lm_head .*scale_states": lambda model: model.lm_head.register_forward_pre_hook(scale_states),
    "a forward pre-hook on lm_head .*scale_states_by_name": lambda model: model.lm_head.register_forward_pre_hook(
        scale_states_by_name, with_kwargs=True
    ),
    "a patched forward of lm_head": patch_head,
    "a patched forward of the model .*colder": patch_model,
    "nats; found: Mup, a class": subclass_of_logits,
    "other inputs than it gets; found: Noisy, a class": subclass_of_inputs,
    "cannot be followed .*another name.*Strict": subclass_that_fails,
}


@pytest.mark.parametrize("message", AROUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_around_the_head_is_refused(message, dtype):
    """At the first call with it, before attach or after; never once it is gone; and from_logits serves it."""
    model, given = tiny().to(dtype), inputs()
    AROUND[message](model)
    hf.attach(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"(?s){message}.*from_logits=True"):
            model(**given, grpo=asked(given))
    if "cannot be followed" in message:
        return
    hf.detach(model)
    hf.attach(model, from_logits=True)
    got = model(**given, grpo=asked(given)).log_probs
    torch.testing.assert_close(got.double(), own_log_probs(model, given, asked(given)["token_ids"]), rtol=0, atol=1e-5)


def test_what_comes_to_the_head_after_attach():
    model, given = hf.attach(tiny()), inputs()
    wanted = own_log_probs(model, given, asked(given)["token_ids"])

    def check():
        got = model(**given, grpo=asked(given)).log_probs
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)

    check()
    handle = model.lm_head.register_forward_hook(scale_output)
    with pytest.raises(ValueError, match="scale_output"):
        model(**given, grpo=asked(given))
    handle.remove()
    check()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))  # changes nothing
    check()
    assert seen == [(1, 1, 99)]  # the proof's row, once
    check()
    assert len(seen) == 1
    model.train()
    model(**given, grpo=tokens_of(given))
    assert len(seen) == 2
    model.lm_head.register_forward_hook(lambda module, args, output: output * 30 if module.training else output)
    with pytest.raises(ValueError, match="differ by up to"):
        model(**given, grpo=tokens_of(given))
    model.eval()
    check()
    model.lm_head.train()
    with pytest.raises(ValueError, match="differ by up to"):
        model(**given, grpo=tokens_of(given))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("cohere", lambda model: setattr(model, "logit_scale", 0.5)),
        ("cohere", lambda model: setattr(model, "logit_scale", torch.nn.Parameter(torch.tensor(0.5)))),
        ("granite", lambda model: setattr(model.config, "logits_scaling", 0.5)),
        ("gemma2", lambda model: setattr(model.config, "final_logit_softcapping", None)),
        ("gemma2", lambda model: setattr(model.config, "final_logit_softcapping", 0.1)),
    ],
)
def test_constants_are_read_at_every_call(kind, change):
    model, given = hf.attach(tiny(kind)), inputs()
    ids = asked(given)["token_ids"]
    before = own_log_probs(model, given, ids)
    with torch.no_grad():
        model(**given, grpo=asked(given))
        change(model)
        wanted = own_log_probs(model, given, ids)
        assert (wanted - before).abs().max() > 1e-3
        torch.testing.assert_close(model(**given, grpo=asked(given)).log_probs.double(), wanted, rtol=0, atol=1e-5)


def test_a_scale_that_is_trained_is_refused():
    """It would get no gradient."""
    model, given = hf.attach(tiny("cohere")), inputs()
    model.logit_scale = torch.nn.Parameter(torch.tensor(0.5))
    with pytest.raises(ValueError, match="logit_scale without requires_grad"):
        model(**given, grpo=tokens_of(given))


def test_the_proof_leaves_no_trace():
    """Gradients, random numbers and routers are those of a model that is proven already."""
    for kind, autocast in (("qwen3", False), ("qwen3", True), ("mixtral", False)):
        given, runs = inputs(), []
        for proven in (False, True):
            model = hf.attach(tiny(kind, attention_dropout=0.3, tie_word_embeddings=True)).train()
            model.lm_head.register_forward_hook(lambda *_: torch.rand(()) and None)
            routed = []
            for module in model.modules():
                if "Router" in type(module).__name__ or "Gate" in type(module).__name__:
                    module.register_forward_hook(lambda *_, routed=routed: routed.append(1))
            if proven:
                model(**given, grpo=tokens_of(given))
                routed.clear()
            torch.manual_seed(5)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**given, grpo=tokens_of(given)).loss + model(**given).logits.float().logsumexp(-1).mean()
            loss.backward()
            state = torch.get_rng_state()
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            runs.append((loss.detach(), gradients, state, len(routed)))
        (loss, gradients, state, routed), (wanted, wanted_gradients, wanted_state, wanted_routed) = runs
        assert torch.equal(loss, wanted)
        assert torch.equal(state, wanted_state)
        assert routed == wanted_routed
        assert bool(routed) == (kind == "mixtral")
        assert gradients["model.embed_tokens.weight"].abs().max() > 0
        for name, gradient in gradients.items():
            assert torch.equal(gradient, wanted_gradients[name]), name


def test_the_proof_keeps_no_cast_weight():
    model, given, kept = tiny(), inputs(), []
    model.lm_head.register_forward_hook(lambda *_: kept.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("cpu", torch.bfloat16):
        hf.attach(model)(**given, grpo=tokens_of(given))
        assert torch.is_autocast_cache_enabled()
    assert kept == [False]


def test_dropout_and_masked_rows_do_not_matter():
    """What is compared is one pair of hidden states; rows that nobody computes may hold anything."""
    model, given = hf.attach(tiny("gpt2", embd_pdrop=0.5, resid_pdrop=0.5)).train(), inputs()
    assert model(**given, grpo=tokens_of(given)).loss.isfinite()
    model, given = tiny(), inputs()

    def spoil(module, args, output):
        output.last_hidden_state[:, :4] = torch.nan

    model.model.register_forward_hook(spoil)
    assert hf.attach(model)(**given, grpo=tokens_of(given)).loss.isfinite()
    model.lm_head.register_forward_hook(scale_output)
    with pytest.raises(ValueError, match="scale_output"):  # of a row that is live
        model(**given, grpo=tokens_of(given))


def test_a_budget_of_one_proof(monkeypatch):
    """Contents of device tensors are looked at once per state: no comparison in later calls, on any rank."""
    from grpo_kernels.hf import model_head

    compared = []
    plain = model_head._difference
    monkeypatch.setattr(model_head, "_difference", lambda *logits: compared.append(1) or plain(*logits))
    model, given = hf.attach(tiny()), inputs()
    for _ in range(3):
        model(**given, grpo=tokens_of(given)).loss.backward()
        model(**given, grpo=asked(given))
    assert len(compared) == 1
    model(**given, grpo={**tokens_of(given), "mask": torch.zeros(3, 8)})
    for _ in range(3):  # a hook that comes and goes around each call
        hook = model.lm_head.register_forward_hook(looks_only)
        model(**given, grpo=asked(given))
        hook.remove()
        model(**given, grpo=asked(given))
    assert len(compared) == 2
    hf.detach(model)
    hf.attach(model)(**given, grpo={**tokens_of(given), "mask": torch.zeros(3, 8)})  # no live row: of the first one
    assert len(compared) == 3


def looks_only(module, inputs, output):
    """A hook that changes nothing."""


@pytest.mark.parametrize("from_logits", [False, True])
def test_router_loss_is_not_dropped(from_logits):
    """transformers adds it where labels are given; here nobody would."""
    given = inputs()
    model = hf.attach(tiny("qwen3_moe", router_aux_loss_coef=0.5), from_logits=from_logits)
    model(**given, grpo=tokens_of(given)).loss.backward()
    with pytest.raises(ValueError, match="(?s)router's auxiliary loss.*output_router_logits=False"):
        model(**given, output_router_logits=True, grpo=tokens_of(given))
    model.config.output_router_logits = True
    assert model(**given).aux_loss > 0
    with pytest.raises(ValueError, match="auxiliary"):
        model(**given, grpo=tokens_of(given))
    model(**given, grpo=asked(given))  # log-probs alone drop no loss
    model(**given, output_router_logits=False, grpo=tokens_of(given)).loss.backward()
    model.config.router_aux_loss_coef = 0.0
    model(**given, grpo=tokens_of(given)).loss.backward()


UNSHIFTED = {
    "themselves": lambda ids: ({"token_ids": ids}, {}),
    "a copy": lambda ids: ({"token_ids": ids.clone()}, {}),
    "as many": lambda ids: ({"token_ids": ids.roll(-1, 1)}, {}),
    "the last ones": lambda ids: ({"token_ids": ids[:, -5:]}, {"logits_to_keep": 5}),
    "a copy of the last ones": lambda ids: ({"token_ids": ids[:, -5:].clone()}, {"logits_to_keep": 5}),
    "labels": lambda ids: ({"token_ids": ids.where(torch.arange(9) > 4, -100)[:, -6:]}, {"logits_to_keep": 6}),
}


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("name", UNSHIFTED)
def test_ids_that_are_not_shifted(name, from_logits):
    model, given = hf.attach(tiny(), from_logits=from_logits), inputs()
    grpo, more = UNSHIFTED[name](given["input_ids"])
    with pytest.raises(ValueError, match="(?s)(shifted by one|whose last row predicts none).*align\\(input_ids"):
        model(**given, **more, grpo=grpo | {"advantages": torch.ones(3)})
    for mask in (torch.ones(3, 4), [1] * 6):  # of another shape, or no tensor: the loss says what is wrong with it
        with pytest.raises((ValueError, TypeError), match="expected mask"):
            kept = {"token_ids": given["input_ids"][:, -6:].roll(-1, 1), "mask": mask, "advantages": torch.ones(3)}
            model(**given, logits_to_keep=6, grpo=kept)
    packed = given["input_ids"].view(1, -1)
    grpo = {"cu_seqlens": torch.tensor([0, 9, 18, 27]), "advantages": torch.ones(3)}
    with pytest.raises(ValueError, match="shifted by one"):
        model(input_ids=packed, grpo={**grpo, "token_ids": packed.clone()})
    ids, mask = align(packed, torch.ones_like(packed), cu_seqlens=grpo["cu_seqlens"])
    model(input_ids=packed, grpo={**grpo, "token_ids": ids, "mask": mask})
    constant = torch.full((2, 6), 7)  # shifted or not, they are the same
    ids, mask = align(constant.view(1, -1), torch.ones(1, 12), cu_seqlens=torch.tensor([0, 6, 12]))
    grpo = {"token_ids": ids, "mask": mask, "cu_seqlens": torch.tensor([0, 6, 12]), "advantages": torch.ones(2)}
    model(input_ids=constant.view(1, -1), grpo=grpo)


def test_rounded_old_log_probs_at_token_level():
    """grpo_loss takes them, so does the model."""
    model, given = hf.attach(tiny()), inputs()
    tokens = tokens_of(given)
    old = model(**given, grpo=asked(given)).log_probs.detach().bfloat16()
    wanted = grpo_loss(model(**given).logits, **tokens, old_log_probs=old).loss
    torch.testing.assert_close(model(**given, grpo={**tokens, "old_log_probs": old}).loss, wanted)


def adapted(**options):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny(), peft.LoraConfig(init_lora_weights=False, **{"target_modules": ["q_proj"], **options})
    )
    return peft, hf.attach(model)


@pytest.mark.peers
def test_adapters_with_a_head_of_their_own():
    """PEFT's wrapper chooses: the trained copy, the original while adapters are off or have none."""
    peft, model = adapted(modules_to_save=["lm_head"])
    given = inputs()
    ids = asked(given)["token_ids"]
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)

    def check():
        wanted = own_log_probs(model, given, ids)
        torch.testing.assert_close(model(**given, grpo=asked(given)).log_probs.double(), wanted, rtol=0, atol=1e-5)
        return wanted

    trained = check()
    with model.disable_adapter():
        assert (check() - trained).abs().max() > 0.1
    assert torch.equal(check(), trained)
    model.add_adapter("headless", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("headless")
    assert (check() - trained).abs().max() > 0.1
    model.set_adapter("default")
    model(**given, grpo=tokens_of(given)).loss.backward()
    assert model.base_model.model.lm_head.modules_to_save["default"].weight.grad.abs().max() > 0
    assert model.base_model.model.lm_head.original_module.weight.grad is None


@pytest.mark.peers
def test_adapters_that_differ_by_sample():
    """``adapter_names`` gives samples heads of their own: there is no one weight."""
    _, model = adapted(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    given = inputs() | {"adapter_names": ["default", "__base__", "default"]}
    model.eval()(**given)
    with pytest.raises(ValueError, match="forward pre-hook on lm_head"):
        model(**given, grpo=asked(given))


@pytest.mark.peers
def test_a_head_that_peft_changes_otherwise_is_refused():
    for options in ({"target_modules": ["lm_head"]}, {"trainable_token_indices": {"lm_head": [3, 4]}}):
        with pytest.raises(ValueError, match="(?s)plain nn.Linear; got peft.*from_logits"):
            adapted(**{"target_modules": ["q_proj"], **options})


def test_a_compiled_backbone():
    """The proof looks outside of compiled graphs."""
    model, given = tiny(), inputs()
    tokens = tokens_of(given)
    expected = grpo_loss(model(**given).logits, **tokens).loss
    model.model.compile(backend="eager")
    hf.attach(model)
    torch.testing.assert_close(model(**given, grpo=tokens).loss, expected)
    model.lm_head.register_forward_hook(scale_output)
    whole = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="scale_output"):
        whole(**given, grpo=tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.1, 2.0, 20.0])
def test_the_proof_tells_rounding_from_a_change(dtype, spread):
    """A head's logits, capped in the dtype and in double precision, differ by rounding; by 2 % or one column do not."""
    from grpo_kernels.hf.model_head import _difference

    torch.manual_seed(2)
    exact = spread * torch.randn(1, 1, 5000, dtype=torch.float64)
    logits = exact.to(dtype)
    for mine, theirs in (
        (logits, logits),
        (logits, exact),
        (30 * torch.tanh(logits / 30), 30 * torch.tanh(exact / 30)),
        (logits * 0.3, exact * 0.3),
        (logits, logits.double() + 5),  # the same log-probs
    ):
        assert _difference(mine, theirs, False) is None
    other = exact.clone()
    other[..., 7] -= 1 if spread < 20 else 4
    for theirs in (logits * 1.02, exact / 1.02, other, other.masked_fill(other < -2 * spread, torch.finfo(dtype).min)):
        assert "differ by up to" in _difference(logits, theirs, False)
    assert "(1, 1, 4999)" in _difference(logits, logits[..., 1:], False)
    assert _difference(logits, logits.float() * 1.005, True) is None  # accelerate's autocast
    assert "nan" in _difference(logits, logits.index_fill(-1, torch.tensor([3]), torch.nan), False)


def test_an_old_pass_in_inference_mode():
    """Proven there, the model trains all the same."""
    model, given = hf.attach(tiny()), inputs()
    with torch.inference_mode():
        old = model(**given, grpo=asked(given)).log_probs
    model(**given, grpo=tokens_of(given) | {"old_log_probs": old.clone()}).loss.backward()
    assert model.lm_head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_head_are_refused(register):
    """They change gradients and no log-prob, and belong to a forward that does not run."""
    model, given = hf.attach(tiny()), inputs()
    handle = getattr(model.lm_head, register)(lambda module, *gradients: None)
    with pytest.raises(ValueError, match="(?s)a head without backward hooks; got .*lambda.*from_logits=True"):
        model(**given, grpo=tokens_of(given))
    handle.remove()
    model(**given, grpo=tokens_of(given)).loss.backward()


OTHERS = {
    "cut at the wrong end": lambda ids: (ids[:, :-1], {}),
    "of another batch": lambda ids: (ids[:, 1:].flip(0), {}),
    "the last ones, late by one": lambda ids: (ids[:, -6:-1], {"logits_to_keep": 6}),
}


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_ids_that_are_not_the_inputs(name, from_logits):
    """The model's call has both; where the mask is 0 they may differ."""
    model, given = hf.attach(tiny(), from_logits=from_logits), inputs()
    ids, more = OTHERS[name](given["input_ids"])
    grpo = {"token_ids": ids, "advantages": torch.ones(3)}
    with pytest.raises(
        ValueError, match="(?s)token_ids that are input_ids shifted by one; got other ids at live places"
    ):
        model(**given, **more, grpo=grpo)
    right = given["input_ids"][:, 1:] if not more else given["input_ids"][:, -5:]
    model(**given, **more, grpo={**grpo, "token_ids": right})
    model(**given, **more, grpo={**grpo, "mask": ids == right})


@pytest.mark.parametrize("positions", [range(10), [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]], ids=["one sequence", "other bounds"])
def test_positions_and_bounds_of_a_packed_batch(positions):
    """The model would attend over bounds that the loss knows of."""
    model, ids = hf.attach(tiny()), torch.randint(3, 40, (1, 10))
    bounds = torch.tensor([0, 5, 10])
    token_ids, mask = align(ids, torch.ones_like(ids), bounds)
    grpo = {"token_ids": token_ids, "mask": mask, "advantages": torch.ones(2), "cu_seqlens": bounds}
    with pytest.raises(ValueError, match=r"position_ids that begin anew at the bounds of cu_seqlens, \[5\]; got ones"):
        model(input_ids=ids, position_ids=torch.tensor([list(positions)]), grpo=grpo)
    right = torch.arange(5).repeat(2)[None]
    model(input_ids=ids, position_ids=right, grpo=grpo).loss.backward()
    padded = {**grpo, "cu_seqlens": torch.tensor([0, 3, 8])}  # two rows of padding behind
    padded["token_ids"], padded["mask"] = align(ids, torch.ones_like(ids), padded["cu_seqlens"])
    model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 0]]), grpo=padded)
