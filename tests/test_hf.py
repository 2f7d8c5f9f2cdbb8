"""attach(): each known architecture's own logits, wrappers, and what is refused by name."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import types

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grpo_kernels import LossOutput, TokenLogProbs, align, grpo_loss, hf, token_log_probs
from grpo_kernels.hf.form import Form

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
STATES = {
    **dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8),
}
"""transformers 5.17 would allocate 26 GB for the sizes that FalconH1 has by itself."""
KINDS = (
    *("llama", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "cohere", "cohere2", "phi"),
    *("granite", "granitemoe", "gpt2", "gpt_neox", "bloom", "opt", "glm4", "deepseek_v3", "gpt_oss", "hyperclovax"),
    *("falcon_h1", "roberta", "mamba"),
)
"""A head of every kind; tests/architectures has all there are."""
HEADS = {"logit_scale": 0.3, "logits_scaling": 4.0, "final_logit_softcapping": 5.0}


def tiny(kind: str = "qwen3", **changes) -> torch.nn.Module:
    transformers.logging.set_verbosity_error()
    sizes = {**TINY, **{"deepseek_v3": LATENT, "falcon_h1": STATES}.get(kind, {}), **changes}
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


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
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
    packed = {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in (4, 5, 3)])[None]}
    old = model(**packed, grpo={**grpo, "output": "log_probs"}).log_probs
    assert (old[:, 9:] == 0).all()
    grpo |= {"advantages": torch.tensor([1.0, -1.0]), "old_log_probs": old.detach()}
    plain = model(**packed, grpo=grpo)
    weighted = model(**packed, grpo={**grpo, "token_weights": lambda policy: torch.ones_like(policy.entropy)})
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
    assert calls == [twin] * 3 + [model] * 3  # run, and proven: on one row, traced and real
    calls.clear()
    with torch.no_grad():
        model(**given, grpo=tokens)
    assert calls == [model]
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
    with pytest.raises(ValueError, match="DistributedDataParallel; got nn.DataParallel"):
        hf.attach(torch.nn.DataParallel(tiny()))
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
    [(False, "inplace", True), (True, "chunk_bytes", 1 << 20), (True, "live_tokens", 3)],
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


def ban_in_place(module, args, output):
    output[:, :, [3, 5]] = torch.finfo(output.dtype).min


def scale_states(module, args):
    return (args[0] * 30,)


def scale_states_by_name(module, args, kwargs):
    return (args[0] * 30,), kwargs


def tilt(module, args, kwargs, output):
    return output + (torch.arange(99) / 99).to(output.dtype)


def scale_columns(module, args, output):
    return torch.linspace(0.5, 2, 99).to(output.dtype) * output - 0.5


def negate(module, args, output):
    return np.float32(1.0) - torch.rsub(torch.zeros(99).to(output.dtype), output)


def in_place(module, args, output):
    output *= 3
    output /= 2
    output += torch.linspace(-1, 1, 99).to(output.dtype)
    return output.mul_(0.5).float().contiguous()


def turn(module, args, output):
    return torch.tensor(-0.5) * output - torch.tensor(0.25)


def cap_upside_down(module, args, output):
    return -3 * torch.tanh(output.index_fill(-1, torch.tensor([0]), -torch.inf) / -2)


def close_and_open(module, args, output):
    """A gate that is shut in front of a bias."""
    return output * torch.zeros(1) + torch.linspace(-1, 1, 99).to(output.dtype)


def cap(module, args, output):
    return 3 * torch.tanh((output + 1) / 2)


def looks_at_the_shape(module, args, output):
    return output * 2 if output.shape[-1] == 99 and output.is_floating_point() and len(output) else None


def patch_head(model):
    head = model.lm_head
    head.forward = lambda states: (states @ head.weight.T) * 30


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


def hooked(hook, **options):
    return lambda model: model.lm_head.register_forward_hook(hook, **options)


AROUND = {
    "scale": hooked(scale_output),
    "ban": hooked(ban_a_token),
    "ban in place": hooked(ban_in_place),
    "tilt": hooked(tilt, with_kwargs=True),
    "columns": hooked(scale_columns),
    "negate": hooked(negate),
    "in place": hooked(in_place),
    "cap": hooked(cap),
    "turn": hooked(turn),
    "ban and cap upside down": hooked(cap_upside_down),
    "close and open": hooked(close_and_open),
    "shape": hooked(looks_at_the_shape),
    "states": lambda model: model.lm_head.register_forward_pre_hook(scale_states),
    "states by name": lambda model: model.lm_head.register_forward_pre_hook(scale_states_by_name, with_kwargs=True),
    "patched head": patch_head,
    "patched model": patch_model,
    "subclass of logits": subclass_of_logits,
    "subclass of inputs": subclass_of_inputs,
}


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_around_the_head_is_served(name, dtype):
    """Log-probs and gradients are those of the model's own logits, before attach or after."""
    model, given = tiny().to(dtype), inputs()
    AROUND[name](model)
    ids, tokens = asked(given)["token_ids"], tokens_of(given)
    if "ban" in name:
        ids = tokens["token_ids"] = ids + (ids < 6) * 6  # a token that may be drawn
        given["input_ids"] = torch.cat([given["input_ids"][:, :1], ids], 1)
    wanted = own_log_probs(model, given, ids)
    twin = tiny().to(dtype)
    AROUND[name](twin)
    hf.attach(twin, from_logits=True)(**given, grpo=tokens).loss.backward()
    hf.attach(model)
    for _ in range(2):
        got = model(**given, grpo=asked(given)).log_probs
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.3)
    model(**given, grpo=tokens).loss.backward()
    mine, theirs = (m.get_input_embeddings().weight.grad.float() for m in (model, twin))
    assert bool(theirs.abs().max() > 0) == (name != "close and open")
    assert (mine - theirs).norm() <= (1e-4 if dtype == torch.float32 else 0.1) * theirs.norm()


def test_a_patch_that_takes_anything():
    """Positions mean what they mean to the model's class."""
    model, given = tiny(), inputs()
    plain = type(model).forward
    model.forward = types.MethodType(lambda self, *args, **inputs: plain(self, *args, **inputs), model)
    wanted = own_log_probs(model, given, asked(given)["token_ids"])
    got = hf.attach(model)(given["input_ids"], given["attention_mask"], grpo=asked(given)).log_probs
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)


def test_the_models_own_error_is_its_own():
    class Strict(type(tiny())):
        def forward(self, *args, **inputs):
            raise RuntimeError("call me by another name")

    model, given = tiny(), inputs()
    model.__class__ = Strict
    with pytest.raises(RuntimeError, match="another name"):
        hf.attach(model)(**given, grpo=asked(given))


def looks_at_contents(module, args, output):
    print(output.norm())


def sharpens(module, args, output):
    return output.softmax(-1).log()


def adds_made_logits(module, args, output):
    return output + torch.ones(*output.shape)


def writes_a_row(module, args, output):
    output[:, 0] = 0


def caps_twice(module, args, output):
    return torch.tanh(torch.tanh(output))


def asks_the_type(module, args, output):
    return output * 30 if type(output) is torch.Tensor else output


def writes_a_view(module, args, output):
    output[:, :-1].mul_(2)


def writes_what_is_viewed(module, args, output):
    first = output[:, :5]
    output *= 2
    return torch.cat([first, output[:, 5:]], 1)


@torch.no_grad()
def scales_without_gradient(module, args, output):
    return output * 3


class Quiet(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits

    @staticmethod
    def backward(ctx, upstream):
        return upstream * 0.1


def goes_through_a_function(module, args, output):
    return Quiet.apply(output)


def hooks_the_gradient(module, args, output):
    output.register_hook(lambda gradient: gradient * 2)


def writes_to_the_states(module, args, output):
    args[0].detach().mul_(2)


def adds_a_wider_bias(module, args, output):
    return output + torch.linspace(-9, 9, 99, dtype=torch.float64)


def asks_for_the_graph(module, args, output):
    return output * 2 if output.grad_fn is None else output


def writes_elsewhere(module, args, output):
    return torch.mul(output, 2, out=torch.empty(3, 9, 99))


def cuts_the_vocabulary_oddly(module, args, output):
    return output[..., ::3]


REFUSED = {
    "norm is called with them; found: a forward hook on lm_head .*looks_at_contents": looks_at_contents,
    "softmax is called with them; found: .*sharpens": sharpens,
    "a sum with a tensor .3, 9, 99. is taken; found: .*adds_made_logits": adds_made_logits,
    "rows of them are written; found: .*writes_a_row": writes_a_row,
    "capped twice; found: .*caps_twice": caps_twice,
    "differ by up to .* nats; found: a forward hook on lm_head .*asks_the_type": asks_the_type,
    "some columns of the logits are taken, not a slice": cuts_the_vocabulary_oddly,
    "written in place, and views of them are about; found: .*writes_a_view": writes_a_view,
    "written in place, and views of them are about; found: .*what_is_viewed": writes_what_is_viewed,
    "called with them where autograd is switched off; found: a forward hook": scales_without_gradient,
    "view_as is called with them; found: .*goes_through": goes_through_a_function,
    "a hook is put on their gradient; found: .*hooks_the_gradient": hooks_the_gradient,
    "their grad_fn is read; found: .*asks_for_the_graph": asks_for_the_graph,
    "mul is called with them, and .*out.*; found: .*writes_elsewhere": writes_elsewhere,
    "states are written to behind it; found: .*writes_to_the_states": writes_to_the_states,
    "a bias in torch.float64 is added to logits of less precision: head_dtype=torch.float64": adds_a_wider_bias,
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_traced_is_refused(message):
    """By name, at every call with it, never once it is gone; from_logits serves it."""
    model, given = hf.attach(tiny()), inputs()
    handle = model.lm_head.register_forward_hook(REFUSED[message])
    for _ in range(2):
        with pytest.raises(ValueError, match=f"(?s){message}.*from_logits=True"):
            model(**given, grpo=asked(given))
    assert "forward" not in vars(model.lm_head)
    assert isinstance(model.model, transformers.Qwen3Model)
    handle.remove()
    wanted = own_log_probs(model, given, asked(given)["token_ids"])
    torch.testing.assert_close(model(**given, grpo=asked(given)).log_probs.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_head_whose_forward_runs_without_autograd(reentrant):
    """The loss would have no gradient, and an auxiliary loss hide it."""
    model, given = tiny("mixtral"), inputs()
    plain = model.lm_head.forward
    model.lm_head.forward = lambda states: torch.utils.checkpoint.checkpoint(plain, states, use_reentrant=reentrant)
    grpo = {**tokens_of(given), "aux_loss_coef": 0.1}
    if reentrant:
        with pytest.raises(ValueError, match="a function with a backward of its own is applied"):
            hf.attach(model)(**given, grpo=grpo)
    else:
        hf.attach(model)(**given, grpo=grpo).loss.backward()
        assert model.lm_head.weight.grad.abs().max() > 0


def test_a_model_that_writes_to_its_hidden_states():
    """The proof would do so a second time."""
    model, given = tiny(), inputs()
    plain = type(model).forward

    class Writing(type(model)):
        def forward(self, input_ids, attention_mask=None, **inputs):
            states = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
            states.mul_(2)
            return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(states))

    model.__class__ = Writing
    assert plain is not Writing.forward
    with pytest.raises(ValueError, match="(?s)what its backbone returns is written to in place.*Writing"):
        hf.attach(model)(**given, grpo=tokens_of(given))


def test_a_part_is_itself_to_whoever_looks():
    """A model's forward may ask for its backbone's type, parameters and attributes, and set some."""

    class Asking(type(tiny())):
        def forward(self, *args, **inputs):
            assert isinstance(self.model, transformers.Qwen3Model)
            assert len(list(self.model.parameters())) == len(self.sizes)
            assert [name for name, _ in self.model.named_parameters()] == self.sizes
            self.model.seen = self.model.config.hidden_size
            return super().forward(*args, **inputs)

    model, given = tiny(), inputs()
    model.sizes = [name for name, _ in model.model.named_parameters()]
    model.__class__ = Asking
    hf.attach(model)(**given, grpo=tokens_of(given)).loss.backward()
    assert model.model.seen == 32
    assert type(model._modules["model"]) is transformers.Qwen3Model


def test_calls_in_several_threads():
    """One after the other: what is in the model's places meanwhile is one thread's."""
    model, given = hf.attach(tiny(), proof_every=2), inputs()
    wanted, found = model(**given, grpo=asked(given)).log_probs, []

    def work():
        for _ in range(10):
            found.append(model(**given, grpo=asked(given)).log_probs)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30
    assert all(torch.equal(each, wanted) for each in found)
    assert type(model._modules["model"]) is transformers.Qwen3Model
    assert "forward" not in vars(model.lm_head)


def test_a_global_hook_is_named():
    handle = torch.nn.modules.module.register_module_forward_hook(looks_at_contents_of_all)
    try:
        with pytest.raises(ValueError, match="(?s)norm is called with them; found: a global forward hook .*_of_all"):
            hf.attach(tiny())(**inputs(), grpo=tokens_of(inputs()))
    finally:
        handle.remove()


def looks_at_contents_of_all(module, args, output):
    if isinstance(output, torch.Tensor) and output.shape[-1] == 99:
        output.norm()


def test_a_head_of_another_kind_is_refused():
    """Quantised heads multiply by code of their own: nothing of theirs is a linear layer of PyTorch."""

    class Packed(torch.nn.Linear):
        def forward(self, states):
            return states.double().mul(2).matmul(self.weight.double().t()[:, :50])

    model, given = tiny(), inputs()
    head = Packed(32, 99, bias=False)
    model.set_output_embeddings(head)
    with pytest.raises(ValueError, match=r"(?s)Packed makes them without a linear layer of PyTorch.*from_logits=True"):
        hf.attach(model)(**given, grpo=asked(given))


def test_what_comes_to_the_head_after_attach():
    """Traced at every call: nothing is remembered."""
    model, given = hf.attach(tiny()), inputs()

    def check():
        wanted = own_log_probs(model, given, asked(given)["token_ids"])
        got = model(**given, grpo=asked(given)).log_probs
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)
        return got

    plain = check()
    handle = model.lm_head.register_forward_hook(scale_output)
    assert (check() - plain).abs().max() > 1
    handle.remove()
    assert torch.equal(check(), plain)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 30 if module.training else output)
    assert torch.equal(check(), plain)
    model.lm_head.train()
    assert (check() - plain).abs().max() > 1


def test_a_look_at_a_known_state():
    """Every so many calls: what changes behind the trace's back is found, on a CPU at once."""
    model, given = hf.attach(tiny(), proof_every=3), inputs()
    model(**given, grpo=asked(given))
    model.lm_head.register_forward_hook(asks_the_type)
    model(**given, grpo=asked(given))
    with pytest.raises(ValueError, match="(?s)differ by up to.*asks_the_type"):
        model(**given, grpo=asked(given))
    never = hf.attach(tiny(), proof_every=0)
    never(**given, grpo=asked(given))
    never.lm_head.register_forward_hook(asks_the_type)
    for _ in range(200):
        never(**given, grpo=asked(given))
    with pytest.raises(ValueError, match="proof_every"):
        hf.attach(tiny(), proof_every=-1)


def test_a_look_that_does_not_wait(monkeypatch):
    """On a device the loss is NaN, and a call after it says why."""
    from grpo_kernels.hf import proof as proofs

    class Done:
        def record(self):
            pass

        def synchronize(self):
            pass

    monkeypatch.setattr(proofs.torch.cuda, "Event", Done)
    empty = torch.empty
    monkeypatch.setattr(proofs.torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    model, given = hf.attach(tiny(), proof_every=9), inputs()
    model(**given, grpo=tokens_of(given))
    monkeypatch.setattr(proofs, "may_look", lambda tensor, check=None: bool(check))
    for _ in range(7):
        assert model(**given, grpo=tokens_of(given)).loss.isfinite()
    model.lm_head.register_forward_hook(asks_the_type)
    spoilt = model(**given, grpo=tokens_of(given))
    assert spoilt.loss.isnan()
    spoilt.loss.backward()
    assert model.lm_head.weight.grad.isnan().all()
    model.lm_head._forward_hooks.clear()
    for _ in range(proofs._LATER - 1):
        assert model(**given, grpo=tokens_of(given)).loss.isfinite()
    with pytest.raises(ValueError, match="at a call whose loss was NaN"):
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


def test_a_scale_that_is_trained():
    """It gets its gradient."""
    model, given = tiny("cohere"), inputs()
    model.logit_scale = torch.nn.Parameter(torch.tensor(0.5))
    twin = hf.attach(copy.deepcopy(model), from_logits=True)
    hf.attach(model)
    for one in (model, twin):
        one(**given, grpo=tokens_of(given)).loss.backward()
    assert twin.logit_scale.grad.abs() > 1e-3
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


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
    assert kept == [True, False, False]  # traced, where no product is made; then one row, traced and real


def test_dropout_and_masked_rows_do_not_matter():
    """What is compared is one pair of hidden states; rows that nobody computes may hold anything."""
    model, given = hf.attach(tiny("gpt2", embd_pdrop=0.5, resid_pdrop=0.5)).train(), inputs()
    assert model(**given, grpo=tokens_of(given)).loss.isfinite()
    model, given = tiny(), inputs()

    def spoil(module, args, output):
        output.last_hidden_state[:, :4] = torch.nan

    model.model.register_forward_hook(spoil)
    hf.attach(model).lm_head.register_forward_hook(asks_the_type)
    with pytest.raises(ValueError, match="asks_the_type"):  # of a row that is live
        model(**given, grpo=tokens_of(given))
    model.lm_head._forward_hooks.clear()
    assert model(**given, grpo=tokens_of(given)).loss.isfinite()


def test_a_budget_of_one_proof(monkeypatch):
    """Contents of device tensors are looked at once per state: no comparison in later calls, on any rank."""
    from grpo_kernels.hf import proof

    compared = []
    plain = proof._alike
    monkeypatch.setattr(proof, "_alike", lambda *logits: compared.append(1) or plain(*logits))
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
    assert len(compared) == 1
    model.train()(**given, grpo=tokens_of(given))
    assert len(compared) == 2
    hf.detach(model)
    hf.attach(model)(**given, grpo={**tokens_of(given), "mask": torch.zeros(3, 8)})  # no live row: of the first one
    assert len(compared) == 3


def looks_only(module, inputs, output):
    """A hook that changes nothing."""


@pytest.mark.parametrize("from_logits", [False, True])
def test_router_loss_is_not_dropped(from_logits):
    """It comes beside the loss, as the model's own forward makes it; a coefficient adds it."""
    given, tokens = inputs(), tokens_of(inputs())
    model = hf.attach(tiny("qwen3_moe", router_aux_loss_coef=0.5), from_logits=from_logits)
    plain = model(**given, grpo=tokens)
    assert plain.aux_loss is None
    assert plain.model_output is None
    own = model(**given, output_router_logits=True)
    out = model(**given, output_router_logits=True, grpo=tokens)
    assert torch.equal(out.loss, plain.loss)
    assert torch.equal(out.aux_loss, own.aux_loss)
    assert own.aux_loss > 0.5
    assert all(torch.equal(a, b) for a, b in zip(out.model_output.router_logits, own.router_logits, strict=True))
    assert out.model_output.logits is None
    added = model(**given, grpo={**tokens, "aux_loss_coef": 0.5})
    torch.testing.assert_close(added.loss, plain.loss + 0.5 * own.aux_loss)
    added.loss.backward()
    gates = [p for name, p in model.named_parameters() if "gate.weight" in name or "router" in name]
    assert all(gate.grad.abs().max() > 0 for gate in gates)
    model.config.output_router_logits = True
    asked_by_config = model(**given, grpo=tokens)
    assert torch.equal(asked_by_config.aux_loss, own.aux_loss)
    assert torch.equal(asked_by_config.loss, plain.loss)
    log_probs = model(**given, grpo=asked(given))
    assert isinstance(log_probs, hf.ModelLogProbs)
    assert torch.equal(log_probs.aux_loss, own.aux_loss)
    with pytest.raises(ValueError, match="(?s)returns aux_loss; got Qwen3ForCausalLM.*no mixture of experts"):
        hf.attach(tiny(), from_logits=from_logits)(**given, grpo={**tokens, "aux_loss_coef": 0.5})


@pytest.mark.parametrize("count", [1, 3])
def test_router_loss_over_micro_batches(count):
    """With a normalizer that spans them, each call's share is its mean over their number."""
    given, tokens = inputs(), tokens_of(inputs())
    model = hf.attach(tiny("mixtral"), "dapo", aux_loss_coef=0.3)
    normalizer, total, auxiliary = float(tokens["mask"].sum()), 0.0, []
    for part in torch.arange(3).chunk(count):
        grpo = {name: value[part] for name, value in tokens.items()} | {"normalizer": normalizer}
        own = {**grpo, "micro_batches": np.int64(count)}
        out = model(**{name: value[part] for name, value in given.items()}, grpo=own)
        total, auxiliary = total + out.loss, [*auxiliary, out.aux_loss]
    hf.detach(model)
    wanted = hf.attach(model, "dapo")(**given, grpo={**tokens, "normalizer": normalizer}).loss
    torch.testing.assert_close(total, wanted + 0.3 * torch.stack(auxiliary).mean())
    for wrong, message in (
        ({"normalizer": 3.0, "aux_loss_coef": 0.1}, "micro_batches=, the number of calls"),
        ({"micro_batches": 2, "aux_loss_coef": 0.1}, "divides the whole loss"),
        ({"micro_batches": 0}, "an int >= 1"),
        ({"micro_batches": 2.0}, "an int >= 1"),
        ({"aux_loss_coef": float("nan")}, "aux_loss_coef to be a finite number"),
        ({"token_losses": True, "aux_loss_coef": 0.1}, "add out.aux_loss yourself"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**given, grpo=tokens | wrong)


@pytest.mark.parametrize("from_logits", [False, True])
def test_what_else_is_asked_of_the_model(from_logits):
    """Hidden states, attentions and caches come with the result, and the loss is the same."""
    given, tokens = inputs(), tokens_of(inputs())
    model = hf.attach(tiny(attn_implementation="eager"), from_logits=from_logits)
    plain = model(**given, grpo=tokens)
    asking = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
    own, out = model(**given, **asking), model(**given, **asking, grpo=tokens)
    assert torch.equal(out.loss, plain.loss)
    for mine, theirs in zip(out.model_output.hidden_states, own.hidden_states, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(out.model_output.attentions[0], own.attentions[0])
    assert out.model_output.past_key_values.get_seq_length() == own.past_key_values.get_seq_length() == 9
    seen = []
    old = model(**given, output_hidden_states=True, grpo={**asked(given), "receive": seen.append})
    assert seen == [old]
    assert len(old.model_output.hidden_states) == 2
    assert isinstance(model(**given, grpo=asked(given)), TokenLogProbs)
    with pytest.raises(TypeError, match="receive=...., a function that takes the result; got int"):
        model(**given, grpo={**asked(given), "receive": 3})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_head_in_full_precision(dtype):
    """As hidden states and a weight in fp32 make it; autocast does not reach it."""
    model, given = tiny(initializer_range=0.3).to(dtype), inputs()
    tokens = tokens_of(given)
    states = model.model(**given).last_hidden_state.float()
    wanted = token_log_probs(states @ model.lm_head.weight.float().T, tokens["token_ids"], tokens["mask"]).log_probs
    hf.attach(model, head_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        if dtype == torch.float32:
            states = model.model(**given).last_hidden_state
            wanted = token_log_probs(states @ model.lm_head.weight.T, tokens["token_ids"], tokens["mask"]).log_probs
        out = model(**given, grpo=tokens)
    torch.testing.assert_close(out.log_probs, wanted.float(), rtol=1e-5, atol=1e-5 if dtype == torch.bfloat16 else 0.02)
    out.loss.backward()
    assert model.lm_head.weight.grad.dtype == dtype
    for wrong, error in (("float32", TypeError), (torch.int8, ValueError)):
        with pytest.raises(error, match="a torch.dtype of floats, like torch.float32"):
            hf.attach(tiny(), head_dtype=wrong)
    with pytest.raises(ValueError, match="own scale and cap, which are traced; got logit_scale=0.5"):
        hf.attach(tiny("cohere"), logit_scale=0.5)
    with pytest.raises(ValueError, match="without from_logits"):
        hf.attach(tiny(), head_dtype=torch.float32, from_logits=True)
    with pytest.raises(TypeError, match="attach: expected from_logits to be True or False; got 'no'"):
        hf.attach(tiny(), from_logits="no")


def test_an_encoder_decoder():
    config = transformers.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=99)
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    given, decoder = inputs(), torch.randint(3, 99, (3, 6))
    tokens = {"token_ids": decoder[:, 1:], "advantages": torch.tensor([1.0, -0.5, 0.3])}
    logits = model(**given, decoder_input_ids=decoder).logits
    wanted = grpo_loss(logits, **tokens)
    out = hf.attach(model)(**given, decoder_input_ids=decoder, grpo=tokens)
    torch.testing.assert_close(out.loss, wanted.loss)
    torch.testing.assert_close(out.log_probs, wanted.log_probs, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="(?s)decoder_input_ids shifted by one.*align\\(decoder_input_ids"):
        model(**given, decoder_input_ids=decoder, grpo={**tokens, "token_ids": decoder[:, 1:].flip(1)})


def test_devices_without_autocast():
    form = Form.of_linear(torch.zeros(2, 4, device="meta"), torch.zeros(7, 4, device="meta"), None)
    with form.autocast.around("meta"):
        assert form.dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, 20.0])
def test_a_bias_in_full_precision_under_autocast(scale):
    """A buffer that autocast leaves as it is widens the logits: BART and its kin."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 99, "max_position_embeddings": 64}
    sizes |= {
        f"{part}_{what}": 2 * 32 ** (what != "attention_heads")
        for part in ("encoder", "decoder")
        for what in ("attention_heads", "ffn_dim")
    }
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes)).eval()
    model.final_logits_bias.copy_(torch.linspace(0, scale, 99)[None])
    given, decoder = inputs(), torch.randint(3, 99, (3, 6))
    tokens = {"token_ids": decoder[:, 1:], "advantages": torch.tensor([1.0, -0.5, 0.3])}
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**given, decoder_input_ids=decoder).logits
        out = hf.attach(model)(**given, decoder_input_ids=decoder, grpo=tokens)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(out.log_probs, grpo_loss(logits, **tokens).log_probs, rtol=0, atol=0.01)
    out.loss.backward()


def saves_its_output(module, args, output):
    return output.log_softmax(-1)


def test_in_place_where_it_can_be():
    """Logits that autograd needs in backward are left as they are."""
    model, given = tiny(), inputs()
    model.lm_head.register_forward_hook(saves_its_output)
    grads = []
    for inplace in (False, True):
        hf.attach(model, from_logits=True, inplace=inplace)(**given, grpo=tokens_of(given)).loss.backward()
        grads.append(model.lm_head.weight.grad.clone())
        model.zero_grad()
        hf.detach(model)
    assert torch.equal(*grads)


def test_rows_in_front_of_the_tokens():
    """Prompt tuning prepends rows that no id belongs to."""
    model, given = hf.attach(tiny()), inputs()
    tokens = tokens_of(given)
    front = torch.randn(3, 4, 32)
    embedded = torch.cat([front, model.get_input_embeddings()(given["input_ids"])], 1)
    attention = torch.cat([torch.ones(3, 4, dtype=torch.int64), given["attention_mask"]], 1)
    with pytest.raises(ValueError, match="(?s)8 or 9 rows.*got 13.*logits_to_keep=9"):
        model(inputs_embeds=embedded, attention_mask=attention, grpo=tokens)
    out = model(inputs_embeds=embedded, attention_mask=attention, logits_to_keep=9, grpo=tokens)
    wanted = grpo_loss(model(inputs_embeds=embedded, attention_mask=attention).logits[:, 4:], **tokens)
    torch.testing.assert_close(out.loss, wanted.loss)


def test_rows_that_the_model_does_not_cut(monkeypatch):
    """A forward without ``logits_to_keep``."""
    model, given = tiny(), inputs()
    plain = type(model).forward

    def forward(self, input_ids, attention_mask=None, use_cache=None, return_dict=None):
        return plain(self, input_ids, attention_mask, use_cache=use_cache)

    monkeypatch.setattr(type(model), "forward", forward)
    tokens = {"token_ids": given["input_ids"][:, -4:], "output": "log_probs"}
    wanted = own_log_probs(model, given, given["input_ids"][:, 1:])[:, -4:]
    for from_logits in (False, True):
        hf.attach(model, from_logits=from_logits)
        for keep in (5, torch.arange(4, 9)):
            got = model(**given, logits_to_keep=keep, grpo=tokens).log_probs
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)
        hf.detach(model)


def test_another_thread_sees_the_model_as_it_is():
    """While a call traces the head, generation beside it gets logits."""
    model, given = tiny(), inputs()
    wanted, results = model(**given).logits, []

    def beside(*_):
        thread = threading.Thread(target=lambda: results.append(model(**given).logits))
        thread.start()
        thread.join()

    hf.attach(model)
    hook = model.model.norm.register_forward_hook(lambda *_: beside() if threading.current_thread() is main else None)
    main = threading.current_thread()
    model(**given, grpo=tokens_of(given))
    hook.remove()
    assert len(results) == 1
    assert torch.equal(results[0], wanted)


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
    positions = {"position_ids": torch.arange(9).repeat(3)[None]}
    model(input_ids=packed, **positions, grpo={**grpo, "token_ids": ids, "mask": mask})
    constant = torch.full((2, 6), 7)  # shifted or not, they are the same
    ids, mask = align(constant.view(1, -1), torch.ones(1, 12), cu_seqlens=torch.tensor([0, 6, 12]))
    grpo = {"token_ids": ids, "mask": mask, "cu_seqlens": torch.tensor([0, 6, 12]), "advantages": torch.ones(2)}
    model(input_ids=constant.view(1, -1), position_ids=torch.arange(6).repeat(2)[None], grpo=grpo)


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
    with pytest.raises(ValueError, match="(?s)lm_head.*from_logits=True"):
        model(**given, grpo=asked(given))


ADAPTERS = {
    "LoRA": {"target_modules": ["lm_head", "q_proj"]},
    "LoRA with dropout": {"target_modules": ["lm_head"], "lora_dropout": 0.3},
    "LoRA with bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "rsLoRA": {"target_modules": ["lm_head"], "use_rslora": True},
    "DoRA": {"target_modules": ["lm_head"], "use_dora": True},
    "DoRA with dropout": {"target_modules": ["lm_head"], "use_dora": True, "lora_dropout": 0.3},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 4, 50]}},
    "trained tokens, tied": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 50]},
    "a copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.peers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_on_the_head(name, dtype):
    """From hidden states as from the model's own logits: log-probs, and the gradient of all that is trained."""
    peft = pytest.importorskip("peft")
    given, runs = inputs(), []
    tokens = tokens_of(given)
    for from_logits in (True, False):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, init_lora_weights="tokens" in name, **ADAPTERS[name])
        model = peft.get_peft_model(tiny(tie_word_embeddings="tied" in name).to(dtype), config).train()
        with torch.no_grad():
            for parameter in (each for path, each in model.named_parameters() if "token" in path):
                parameter.add_(0.3)
        torch.manual_seed(3)
        out = hf.attach(model, from_logits=from_logits)(**given, grpo=tokens)
        out.loss.backward()
        runs.append((out, {path: each.grad for path, each in model.named_parameters() if each.grad is not None}))
        with model.eval().disable_adapter():
            plain = model(**given, grpo=asked(given)).log_probs
            own = own_log_probs(model, given, asked(given)["token_ids"])
        torch.testing.assert_close(plain.double(), own, rtol=0, atol=0.03 if dtype == torch.bfloat16 else 1e-5)
    (own, wanted), (got, gradients) = runs
    bf16 = dtype == torch.bfloat16
    torch.testing.assert_close(got.log_probs, own.log_probs, rtol=0, atol=0.03 if bf16 else 1e-5)
    assert gradients.keys() == wanted.keys()
    assert any(wanted[path].abs().max() > 0 for path in gradients if "lm_head" in path or "token" in path)
    for path, gradient in gradients.items():
        assert (gradient - wanted[path]).norm() <= (0.03 if bf16 else 1e-5) * wanted[path].norm(), path


@pytest.mark.peers
def test_two_adapters_at_once():
    """Two products beside the head's: one, as wide as both."""
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["lm_head"], "init_lora_weights": False}
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, **options))
    model.add_adapter("other", peft.LoraConfig(r=3, **options))
    model.base_model.set_adapter(["default", "other"])
    given = inputs()
    wanted = own_log_probs(model, given, asked(given)["token_ids"])
    got = hf.attach(model)(**given, grpo=asked(given)).log_probs
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompt_tuning(kind):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4))
    given, tokens = inputs(), tokens_of(inputs())
    wanted = grpo_loss(model(**given).logits[:, -9:], **tokens)
    hf.attach(model)
    if kind == "PromptTuningConfig":
        with pytest.raises(ValueError, match="(?s)8 or 9 rows.*got 13.*logits_to_keep=9"):
            model(**given, grpo=tokens)
    out = model(**given, logits_to_keep=9, grpo=tokens)
    torch.testing.assert_close(out.loss, wanted.loss)
    out.loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.abs().max() > 0


def test_norms_in_another_dtype():
    """As preparing a quantised model for training leaves them: what to do is said, and does it."""
    model, given = tiny().bfloat16(), inputs()
    model.model.norm.float()
    tokens = tokens_of(given)
    with pytest.raises(ValueError, match="(?s)the head's dtype, torch.bfloat16; got torch.float32.*head_dtype"):
        hf.attach(model)(**given, grpo=tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**given, grpo=tokens)
    full = hf.attach(hf.detach(model), head_dtype=torch.float32)(**given, grpo=tokens)
    torch.testing.assert_close(full.log_probs, rounded.log_probs, rtol=0, atol=0.02)
    assert not torch.equal(full.log_probs, rounded.log_probs)


def test_what_a_proof_costs():
    """Three rows of the head, and nothing of the backbone; between proofs nothing."""
    given, tokens = inputs(), tokens_of(inputs())
    model, rows = hf.attach(tiny(), proof_every=3), int(tokens["mask"].sum())
    row = 2 * 32 * 99
    with torch.no_grad():
        backbone = flops(lambda: model.model(**given))
        counts = [flops(lambda: model(**given, grpo=tokens)) for _ in range(6)]
    assert counts == [backbone + (rows + count) * row for count in (2, 0, 2, 0, 0, 2)]


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_a_compiled_backbone():
    """The proof looks outside of compiled graphs."""
    model, given = tiny(), inputs()
    tokens = tokens_of(given)
    expected = grpo_loss(model(**given).logits, **tokens).loss
    model.model.compile(backend="eager")
    hf.attach(model)
    torch._dynamo.reset()
    torch.testing.assert_close(model(**given, grpo=tokens).loss, expected)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    whole = torch.compile(model, backend="eager")
    torch.testing.assert_close(whole(**given, grpo=tokens).loss, expected)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 50  # the backbone's
    torch.testing.assert_close(whole(**given).logits, model(**given).logits)
    model.lm_head.register_forward_hook(asks_the_type)
    with pytest.raises(ValueError, match="asks_the_type"):
        hf.attach(hf.detach(model))
        torch.compile(model, backend="eager")(**given, grpo=tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.1, 2.0, 20.0])
def test_the_proof_tells_rounding_from_a_change(dtype, spread):
    """A head's logits, capped in the dtype and in double precision, differ by rounding; by 2 % or one column do not."""
    from grpo_kernels.hf.proof import _alike, _other_shape, _words

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
        assert _alike(mine, theirs, False, 0.0, 3)
    other = exact.clone()
    other[..., 7] -= 1 if spread < 20 else 4
    for theirs in (logits * 1.02, exact / 1.02, other, other.masked_fill(other < -2 * spread, torch.finfo(dtype).min)):
        assert not _alike(logits, theirs, False, 0.0, 3)
        assert "differ by up to" in _words(logits, theirs)
    assert "(1, 1, 4999)" in _other_shape(logits, logits[..., 1:])
    assert _alike(logits, logits.float() * 1.005, True, 0.0, 3)  # accelerate's autocast
    assert not _alike(logits, logits.index_fill(-1, torch.tensor([3]), torch.nan), False, 0.0, 3)


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


def test_ids_of_rows_that_an_index_keeps():
    model, given = hf.attach(tiny()), inputs()
    keep = torch.tensor([4, 6, -2])
    ids = given["input_ids"][:, keep + 1]
    wanted = own_log_probs(model, given, given["input_ids"][:, 1:])[:, keep % 9]
    got = model(**given, logits_to_keep=keep, grpo={"token_ids": ids, "output": "log_probs"}).log_probs
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)
    for wrong in (given["input_ids"][:, keep], ids.flip(1), ids.flip(1)[:, 1:]):
        with pytest.raises(ValueError, match="shifted by one"):
            model(**given, logits_to_keep=keep, grpo={"token_ids": wrong, "output": "log_probs"})
    model(**given, logits_to_keep=keep, grpo={"token_ids": ids.flip(1), "mask": ids < 0, "output": "log_probs"})


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
    with pytest.raises(ValueError, match=r"(?s)position_ids= in the model's call.*got cu_seqlens alone"):
        model(input_ids=ids, grpo=grpo)
    apart = (torch.arange(10)[:, None] // 5 == torch.arange(10) // 5).tril()[None, None]
    model(input_ids=ids, attention_mask=apart, grpo=grpo)  # told by a mask of its own
    with pytest.raises(ValueError, match=r"position_ids that begin anew at the bounds of cu_seqlens, \[5\]; got ones"):
        model(input_ids=ids, position_ids=torch.tensor([list(positions)]), grpo=grpo)
    right = torch.arange(5).repeat(2)[None]
    model(input_ids=ids, position_ids=right, grpo=grpo).loss.backward()
    padded = {**grpo, "cu_seqlens": torch.tensor([0, 3, 8])}  # two rows of padding behind
    padded["token_ids"], padded["mask"] = align(ids, torch.ones_like(ids), padded["cu_seqlens"])
    model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 0]]), grpo=padded)


def test_a_batch_is_one_thing_to_wrappers():
    """FSDP and DDP look for tensors in what a forward is called with, and cast or move them."""
    from torch.distributed.utils import _apply_to_tensors, _recursive_to
    from torch.utils import _pytree

    model, given = hf.attach(tiny()), inputs()
    tokens = tokens_of(given)
    batch = hf.batch(**tokens, temperature=0.9)
    assert dict(batch) == {**tokens, "temperature": 0.9}
    assert _pytree.tree_map_only(torch.Tensor, torch.Tensor.bfloat16, {"grpo": batch})["grpo"] is batch
    assert _apply_to_tensors(lambda value: value.bfloat16(), {"grpo": batch})["grpo"] is batch
    assert _recursive_to({"grpo": batch}, torch.device("meta"), False) == [{"grpo": batch}]
    moved = batch.to("meta")
    assert {name: value.device.type for name, value in moved.items() if name != "temperature"} == dict.fromkeys(
        tokens, "meta"
    )
    assert moved["advantages"].dtype == torch.float32
    assert moved["temperature"] == 0.9
    with pytest.raises(TypeError, match="expected a device: ids, masks and log-probs keep their dtypes; got torch.bf"):
        batch.to(torch.bfloat16)
    assert "advantages=(3,)" in repr(batch)
    again = pickle.loads(pickle.dumps(batch))
    out = model(**given, grpo=again)
    assert torch.equal(out.loss, model(**given, grpo={**tokens, "temperature": 0.9}).loss)


def test_a_batch_knows_its_names():
    with pytest.raises(ValueError, match="Did you mean 'advantages'"):
        hf.batch(token_ids=torch.zeros(1, 2, dtype=torch.long), advantage=torch.ones(1))
    assert dict(hf.batch(output="log_probs", inplace=True, chunk_bytes=3, receive=print, aux_loss_coef=0.1))


def lines_of(caplog) -> list[tuple[str, str]]:
    """Level and text of what shadow= has said, and forget it."""
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    caplog.clear()
    return said


def trained(model, **grpo):
    """Loss and gradients of one call."""
    model.zero_grad()
    given = inputs()
    token_ids, mask = align(given["input_ids"], given["attention_mask"])
    known = {"token_ids": token_ids, "mask": mask, "advantages": torch.tensor([1.0, -1.0, 0.5])}
    out = model(**given, grpo=known | {"old_log_probs": torch.full(token_ids.shape, -4.6)} | grpo)
    loss = out.token_losses.sum() if grpo.get("token_losses") else out.loss
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "phi"])  # plain, capped, with a bias
def test_shadow_changes_nothing_and_says_what_it_saw(caplog, kind, from_logits):
    """Every second loss, the first among them; what trains has its bits."""
    caplog.set_level("INFO", "grpo_kernels.shadow")
    wanted = trained(hf.attach(tiny(kind), "gspo", from_logits=from_logits))
    model = hf.attach(tiny(kind), "gspo", from_logits=from_logits, shadow=2)
    with torch.no_grad():
        given = inputs()
        model(**given, grpo=dict(token_ids=align(given["input_ids"], given["attention_mask"])[0], output="log_probs"))
    found = [trained(model) for _ in range(3)]
    for loss, gradients in found:
        assert torch.equal(loss, wanted[0])
        assert all(map(torch.equal, gradients, wanted[1]))
    said = lines_of(caplog)
    assert [level for level, _ in said] == ["INFO", "INFO"], said
    assert said[0][1].startswith(f"shadow, call 0: loss {float(wanted[0]):.6g}"[:25])
    assert said[1][1].startswith("shadow, call 2: ")
    assert "(plain PyTorch)" in said[0][1]


@pytest.mark.parametrize("wrong", ["hidden", "weight"])
def test_shadow_warns_of_a_difference(caplog, monkeypatch, wrong):
    """Of either gradient by itself."""
    model = hf.attach(tiny(), shadow=1)
    honest = hf.linear_grpo_loss

    def dishonest(hidden, weight, *arguments, **options):
        given = {"hidden": hidden, "weight": weight}
        value = given[wrong]
        given[wrong] = value.detach() + 1.1 * (value - value.detach())  # the value, and another gradient
        return honest(given["hidden"], given["weight"], *arguments, **options)

    monkeypatch.setattr(hf, "linear_grpo_loss", dishonest)
    trained(model)
    ((level, text),) = lines_of(caplog)
    assert level == "WARNING"
    assert "more than rounding" in text


def test_shadow_never_stops_training(caplog):
    """What it cannot compare it says."""
    model = hf.attach(tiny(), shadow=1)
    trained(model, token_losses=True)
    trained(model, token_weights=lambda policy: (policy.entropy > 2).float())
    (level, text), *rest = lines_of(caplog)
    assert level == "WARNING"
    assert "not compared: ValueError: shadow: expected options of reference.grpo_loss; got token_losses=" in text
    assert rest == []
    for shadow in (-1, True, 2.0):
        with pytest.raises(ValueError, match="attach: expected shadow to be an int >= 0"):
            hf.attach(tiny(), shadow=shadow)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (lambda logits: logits / 0, "float division by zero"),
        (lambda logits: logits[torch.ones(4, 10, dtype=torch.bool), :10], None),
    ],
    ids=["divided by 0", "rows of a mask"],
)
def test_what_a_forward_makes_of_its_logits(changed, why):
    """A division by 0 is no traceback of ours, and a mask of rows uses up as many dimensions as it has."""
    from grpo_kernels.hf.form import Form
    from grpo_kernels.hf.traced import TracedLogits, Untraceable

    states, weight = torch.randn(4, 10, 8), torch.randn(13, 8)
    form = Form.of_linear(states, weight, None)
    if why is not None:
        with pytest.raises(Untraceable, match=why):
            changed(TracedLogits(form))
        return
    (product,) = changed(TracedLogits(form)).form.products
    torch.testing.assert_close(product.states @ product.weight.T, changed(states @ weight.T))
