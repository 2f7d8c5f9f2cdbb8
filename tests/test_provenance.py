"""Old log-probs that know how they were made."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from cases import make

from grpo_kernels import TopK, grpo_loss, linear_grpo_loss, linear_token_log_probs, reference, token_log_probs
from grpo_kernels.calls import provenance


@pytest.fixture(autouse=True)
def nothing_said_yet():
    provenance._SAID.clear()


def loss(case, old, **options):
    given = {**case.options, "old_log_probs": old, **options}
    return grpo_loss(case.logits, *case.arguments, **given)


def test_made_alike_nothing_is_said_and_ratios_are_1():
    case = make()
    old = token_log_probs(case.logits, case.token_ids, case.mask, temperature=0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = loss(case, old, temperature=0.7)
    assert out.metrics.ratio_min == out.metrics.ratio_max == 1
    assert torch.equal(out.loss, loss(case, old.log_probs, temperature=0.7).loss)
    given = {**case.options, "old_log_probs": old, "temperature": 0.7}
    torch.testing.assert_close(reference.grpo_loss(case.logits, *case.arguments, **given).loss, out.loss)


@pytest.mark.parametrize(
    ("made", "used", "said"),
    [
        ({"temperature": 0.7}, {}, "temperature 0.7 there and 1.0 here"),
        ({"backend": "torch"}, {"backend": "cpu"}, "backend 'torch' there and 'cpu' here"),
        ({"support": TopK(5)}, {}, r"support 'TopK\(k=5\)' there and 'everything' here"),
        ({"logit_scale": 0.5}, {"logit_scale": 2.0}, "logit_scale 0.5 there and 2.0 here"),
        ({}, {"logit_softcap": 30.0}, "logit_softcap None there and 30.0 here"),
        ({"vocab_size": 96}, {}, "vocabulary 96 there and 97 here"),
        ("bfloat16", {}, "dtype 'bfloat16' there and 'float32' here"),
    ],
)
def test_made_otherwise_it_is_said_once(made, used, said):
    case = make()
    case.token_ids.clamp_(max=95)
    logits = case.logits.bfloat16() if made == "bfloat16" else case.logits
    old = token_log_probs(logits, case.token_ids, case.mask, **({} if made == "bfloat16" else made))
    with pytest.warns(UserWarning, match=said):
        loss(case, old, **used)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(case, old, **used)
        loss(case, old.log_probs, **used)


def test_from_hidden_states():
    case = make()
    hidden, weight = torch.randn(6, 10, 8), torch.randn(97, 8)
    old = linear_token_log_probs(hidden, weight, case.token_ids, case.mask, temperature=0.5)
    options = {"old_log_probs": old, "temperature": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_grpo_loss(hidden, weight, *case.arguments, **options)
    with pytest.warns(UserWarning, match="linear_grpo_loss: .* temperature 0.5 there and 1.0 here"):
        linear_grpo_loss(hidden, weight, *case.arguments, old_log_probs=old)


def test_it_is_two_tensors_to_everybody_else():
    case = make()
    old = token_log_probs(case.logits, case.token_ids, case.mask)
    log_probs, entropy = old
    assert log_probs is old.log_probs
    assert entropy is old.entropy
    assert len(old) == 2
    copied = pickle.loads(pickle.dumps(old))
    assert torch.equal(copied.log_probs, log_probs)
    assert copied.made == old.made
    assert old._replace(entropy=entropy + 1).made is None
    assert torch.utils._pytree.tree_map(lambda x: x + 1, old).log_probs.equal(log_probs + 1)
    loss(case, old._replace(entropy=entropy + 1), temperature=2.0)


def test_an_attached_model_knows_too():
    """In the call in which the model's own row is compared as well."""
    transformers = pytest.importorskip("transformers")
    from grpo_kernels import hf

    transformers.logging.set_verbosity_error()
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, pad_token_id=0)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    model = hf.attach(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads)))
    ids = torch.randint(3, 97, (2, 8))
    old = model(input_ids=ids, grpo=hf.batch(token_ids=ids[:, 1:], output="log_probs"))
    grpo = {"token_ids": ids[:, 1:], "advantages": torch.tensor([1.0, -1.0]), "old_log_probs": old}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(input_ids=ids, grpo=hf.batch(**grpo)).metrics.ratio_max == 1
    other = hf.attach(hf.detach(model), temperature=0.5)
    with pytest.warns(UserWarning, match="temperature 1.0 there and 0.5 here"):
        other(input_ids=ids, grpo=hf.batch(**grpo))


def test_an_annealed_temperature_is_said_once():
    case = make()
    old = token_log_probs(case.logits, case.token_ids, case.mask)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(5):
            loss(case, old, temperature=0.9 - 0.1 * step)
    assert ["temperature 1.0 there and 0.9 here" in str(each.message) for each in said] == [True]
    with warnings.catch_warnings():  # on a device nobody looks
        warnings.simplefilter("error")
        loss(case, old, logit_scale=torch.tensor(0.5))


def test_a_batch_moves_what_is_in_it():
    from grpo_kernels import hf, normalizer

    case = make()
    old = token_log_probs(case.logits, case.token_ids, case.mask)
    count = normalizer(case.mask, "dapo")
    moved = hf.batch(token_ids=case.token_ids, old_log_probs=old, normalizer=count).to("meta")
    assert {moved["token_ids"].device.type, moved["normalizer"].value.device.type} == {"meta"}
    assert {each.device.type for each in moved["old_log_probs"]} == {"meta"}
    assert moved["old_log_probs"].made == old.made
    assert moved["normalizer"].unit == count.unit
