"""pack, unpack and collate: the same numbers as padded tensors that are shifted by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from grpo_kernels import LossConfig, align, collate, grpo_loss, hf, pack, token_log_probs, unpack

LENGTHS = ((2, 3), (1, 5), (4, 1), (3, 0))
"""Tokens of the prompt and of the response of each sequence."""
VOCAB = 23


def draw(seed: int = 0) -> list[dict]:
    """One record a sequence, as a sampler gives them: log-probs of the response alone."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for number, (prompt, response) in enumerate(LENGTHS):
        records.append(
            {
                "input_ids": torch.randint(1, VOCAB, (prompt + response,), generator=generator).tolist(),
                "loss_mask": [0] * prompt + [1] * response,
                "advantages": 0.5 - number,
                "old_log_probs": (-3 - torch.rand(response, generator=generator)).tolist(),
            }
        )
    return records


def padded(records: list[dict], side: str) -> dict[str, torch.Tensor]:
    """As tensors, by loops: padding on the left, on the right, or, as generate has it, on both sides."""
    prompts = [len(r["input_ids"]) - sum(r["loss_mask"]) for r in records]
    left, lengths = max(prompts), [len(r["input_ids"]) for r in records]
    width = max(left + sum(r["loss_mask"]) for r in records) if side == "both" else max(lengths)
    found = {name: torch.zeros(len(records), width, dtype=torch.int64) for name in ("input_ids", "loss_mask")}
    found |= {"attention_mask": torch.zeros(len(records), width), "old": torch.zeros(len(records), width)}
    for i, record in enumerate(records):
        start = {"left": width - lengths[i], "right": 0, "both": left - prompts[i]}[side]
        for t in range(lengths[i]):
            found["input_ids"][i, start + t] = record["input_ids"][t]
            found["loss_mask"][i, start + t] = record["loss_mask"][t]
            found["attention_mask"][i, start + t] = 1
            if record["loss_mask"][t]:
                found["old"][i, start + t] = record["old_log_probs"][t - prompts[i]]
    return found


def expected(records: list[dict]) -> dict[str, list]:
    """What the packed batch must hold, token by token: ids, places, what is predicted, and where it counts."""
    found: dict[str, list] = {name: [] for name in ("ids", "places", "next", "live", "old")}
    for record in records:
        n = len(record["input_ids"])
        values = iter(record["old_log_probs"])
        old = [next(values) if live else 0.0 for live in record["loss_mask"]]
        for t in range(n):
            found["ids"].append(record["input_ids"][t])
            found["places"].append(t)
            found["next"].append(record["input_ids"][t + 1] if t + 1 < n else None)
            found["live"].append(bool(record["loss_mask"][t + 1]) if t + 1 < n else False)
            found["old"].append(old[t + 1] if t + 1 < n else 0.0)
    return found


def assert_packed(inputs: dict, tokens: dict, records: list[dict]) -> None:
    wanted = expected(records)
    assert inputs["input_ids"].tolist() == [wanted["ids"]]
    assert inputs["position_ids"].tolist() == [wanted["places"]]
    assert inputs["use_cache"] is False
    assert tokens["mask"].tolist() == [wanted["live"]]
    assert tokens["cu_seqlens"].tolist() == [0, *itertools.accumulate(len(r["input_ids"]) for r in records)]
    assert tokens["cu_seqlens"].dtype == torch.int32
    predicted = zip(tokens["token_ids"][0].tolist(), wanted["next"], strict=True)
    assert all(found == want for found, want in predicted if want is not None)
    torch.testing.assert_close(tokens["old_log_probs"], torch.tensor([wanted["old"]]), rtol=0, atol=1e-6)
    assert tokens["advantages"].tolist() == [r["advantages"] for r in records]


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_pack(side):
    records = draw()
    whole = padded(records, side)
    advantages = torch.tensor([r["advantages"] for r in records])
    masks = whole["loss_mask"], whole["attention_mask"]
    whole["old"][whole["attention_mask"].cumsum(-1) == 1] = 7.0  # of first tokens, which nothing predicts
    inputs, tokens = pack(whole["input_ids"], *masks, advantages=advantages, old_log_probs=whole["old"][:, 1:])
    assert_packed(inputs, tokens, records)


def test_values_of_the_responses_alone():
    """(B, R), as trainers that keep the rows of the responses alone have them."""
    records = draw()
    whole = padded(records, "both")
    responses = max(response for _, response in LENGTHS)
    masks = whole["loss_mask"], whole["attention_mask"]
    _, tokens = pack(whole["input_ids"], *masks, old_log_probs=whole["old"][:, -responses:])
    wanted = pack(whole["input_ids"], *masks, old_log_probs=whole["old"][:, 1:])[1]
    assert torch.equal(tokens["old_log_probs"], wanted["old_log_probs"])


@pytest.mark.parametrize("convert", [list, torch.tensor, np.array], ids=["lists", "tensors", "arrays"])
def test_collate_packed(convert):
    records = draw()
    samples = [{n: convert(v) if isinstance(v, list) else v for n, v in record.items()} for record in records]
    if convert is np.array:
        samples[3]["old_log_probs"] = samples[3]["old_log_probs"].astype(np.float32)
    inputs, tokens = collate(samples, packed=True)
    assert_packed(inputs, {n: v.float() if n == "old_log_probs" else v for n, v in tokens.items()}, records)


def test_collate_padded():
    records = draw()
    whole = padded(records, "right")
    inputs, tokens = collate(records)
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(inputs["input_ids"], whole["input_ids"])
    assert torch.equal(inputs["attention_mask"], whole["attention_mask"].long())
    ids, mask = align(whole["input_ids"], whole["loss_mask"])
    assert torch.equal(tokens["token_ids"], ids)
    assert torch.equal(tokens["mask"], mask)
    torch.testing.assert_close(tokens["old_log_probs"], whole["old"][:, 1:], rtol=0, atol=1e-6)
    assert tokens["advantages"].tolist() == [r["advantages"] for r in records]


def test_collate_takes_a_value_for_every_token():
    """(L,) and one for each that counts are the same, with tool outputs in between too."""
    sample = {"input_ids": [3, 4, 5, 6, 7], "loss_mask": [False, True, False, True, True]}
    _, tokens = collate([sample | {"advantages": [0.0, 1.0, 0.0, 2.0, 3.0]}])
    _, short = collate([sample | {"advantages": [1.0, 2.0, 3.0]}])
    assert tokens["advantages"].tolist() == short["advantages"].tolist() == [[1.0, 0.0, 2.0, 3.0]]
    _, packed = collate([sample | {"advantages": [1.0, 2.0, 3.0]}] * 2, packed=True)
    assert packed["advantages"].tolist() == [[1.0, 0.0, 2.0, 3.0, 0.0] * 2]


def test_collate_in_a_loader():
    loader = DataLoader(draw(), batch_size=2, collate_fn=collate)
    assert [tokens["mask"].shape[0] for _, tokens in loader] == [2, 2]


@pytest.mark.parametrize("config", ["grpo", "dapo", "gspo"])
def test_a_model_and_the_loss_say_the_same(config):
    """In double precision, through a model of transformers: padded and packed, value, gradients and log-probs; and as
    they are inside of the model's forward."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=2, head_dim=16, initializer_range=0.3)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes)).double()
    found = []
    for packed in (False, True):
        inputs, tokens = collate(draw(), packed=packed)
        out = grpo_loss(model(**inputs).logits, **tokens, config=config)
        out.loss.backward()
        values = out.log_probs if not packed else unpack(out.log_probs, tokens["cu_seqlens"])[:, :-1]
        found.append((out.loss.detach(), values, [p.grad.clone() for p in model.parameters()]))
        model.zero_grad()
    assert found[0][0].abs() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    hf.attach(model, config)
    out = model(**inputs, grpo=hf.batch(**tokens))
    torch.testing.assert_close(out.loss.detach(), found[0][0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trailing", [(), (5,)])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_unpack_is_the_inverse(side, trailing):
    whole = padded(draw(), side)
    present = whole["attention_mask"] != 0
    bounds = pack(whole["input_ids"], whole["loss_mask"], present)[1]["cu_seqlens"]
    rows = torch.randn(*present.shape, *trailing, dtype=torch.float64)
    rows[~present] = 0
    values = rows[present].unsqueeze(0).requires_grad_()
    back = unpack(values, bounds, present)
    assert torch.equal(back, rows)
    back.square().sum().backward()
    assert torch.equal(values.grad, 2 * values.detach())
    if side == "right":
        assert torch.equal(unpack(values, bounds), rows)
    outside = torch.cat(
        [torch.full_like(values[:, :2], torch.nan), values, torch.full_like(values[:, :1], torch.nan)], 1
    )
    assert torch.equal(unpack(outside, bounds + 2, present), rows)
    if not trailing:
        assert torch.equal(unpack(values[0], bounds, present), rows)


def test_a_sequence_without_tokens():
    """It keeps its place in the bounds, so that advantages still belong to their sequences."""
    ids, mask = torch.tensor([[1, 2, 3], [0, 0, 0], [4, 5, 0]]), torch.tensor([[0, 1, 1], [0, 0, 0], [0, 1, 0]])
    advantages = torch.tensor([1.0, 5.0, -2.0])
    _, tokens = pack(ids, mask, ids != 0, advantages=advantages)
    assert tokens["cu_seqlens"].tolist() == [0, 3, 3, 5]
    logits = torch.randn(1, 5, 9)
    rows = unpack(token_log_probs(logits, tokens["token_ids"], tokens["mask"]).log_probs, tokens["cu_seqlens"])
    assert rows.shape == (3, 3)
    assert (rows[1] == 0).all()
    one = grpo_loss(logits[:, :3], tokens["token_ids"][:, :3], advantages[:1], tokens["mask"][:, :3], config="dapo")
    other = grpo_loss(logits[:, 3:], tokens["token_ids"][:, 3:], advantages[2:], tokens["mask"][:, 3:], config="dapo")
    out = grpo_loss(logits, **tokens, config=LossConfig.preset("dapo"))
    torch.testing.assert_close(out.loss, (2 * one.loss + other.loss) / 3)


def test_pack_refuses():
    whole = padded(draw(), "both")
    given = [whole[name] for name in ("input_ids", "loss_mask", "attention_mask")]
    with pytest.raises(ValueError, match=r"input_ids, loss_mask and attention_mask \(B, L\)(.|\n)*align\("):
        pack(given[0].view(1, -1), *given[1:])
    with pytest.raises(ValueError, match="tokens that count to be attended to; got some with attention_mask 0"):
        pack(given[0], given[2], given[1])
    with pytest.raises(ValueError, match="attention_mask to be finite and >= 0"):
        pack(*given[:2], given[2] - 1)
    with pytest.raises(TypeError, match="attention_mask to be a tensor"):
        pack(*given[:2], [1])
    with pytest.raises(ValueError, match=r"beside its tokens; got mask="):
        pack(*given, mask=given[1])
    with pytest.raises(ValueError, match=r"the last R <= 8 tokens; got \(4, 9\)(.|\n)*hint: old_log_probs\[:, 1:\]"):
        pack(*given, old_log_probs=whole["old"])
    with pytest.raises(ValueError, match=r"of all tokens that count, in the last 1 (.|\n)*hint: .* is \(4,\)"):
        pack(*given, advantages=torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"advantages \(4,\) of sequences, .*; got \(3,\)"):
        pack(*given, advantages=torch.ones(3))


def test_unpack_refuses():
    bounds = torch.tensor([0, 2, 5])
    with pytest.raises(ValueError, match=r"packed values \(N,\) or \(1, N, ...\); got shape \(5, 4\)"):
        unpack(torch.ones(5, 4), bounds)
    with pytest.raises(ValueError, match=r"within \[0, 4\]"):
        unpack(torch.ones(4), bounds)
    with pytest.raises(ValueError, match="as many tokens in each row as cu_seqlens has"):
        unpack(torch.ones(5), bounds, torch.ones(2, 3))
    with pytest.raises(ValueError, match="as many tokens in each row as cu_seqlens has"):
        unpack(torch.ones(5), bounds, torch.ones(3, 2))


def test_collate_refuses():
    sample = {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1], "advantages": 1.0}
    for samples, error, match in (
        ([], ValueError, "at least one sample"),
        ([{"input_ids": [1]}], ValueError, "all have input_ids, loss_mask; got sample 0 with input_ids"),
        ([sample, {"input_ids": [1], "loss_mask": [1]}], ValueError, "sample 1 with input_ids, loss_mask"),
        ([sample, sample | {"loss_mask": [1]}], ValueError, r"one length >= 1; got \(3,\) and \(1,\) in sample 1"),
        ([sample | {"input_ids": [], "loss_mask": []}], ValueError, "one length >= 1"),
        (
            [sample | {"input_ids": [1.0, 2.0, 3.0]}],
            TypeError,
            "sample 0: expected input_ids of integers; got torch.float32",
        ),
        ([sample | {"old_log_probs": [0.0]}], ValueError, r"\(3,\) of every token or \(2,\) .* \(1,\) in sample 0"),
        (
            [sample, sample | {"advantages": [1.0, 2.0]}],
            ValueError,
            "of tokens in every sample, or a number",
        ),
        ([sample | {"prompt": "1+1="}], TypeError, "prompt of numbers; got str in sample 0(.|\n)*hint: leave out"),
        ([sample | {"loss_mask": [-1, 0, 0]}], ValueError, "loss_mask to be finite and >= 0"),
        ([sample | {"cu_seqlens": 3}], ValueError, "beside its tokens; got cu_seqlens="),
        ([sample | {"attention_mask": [1, 1, 1]}], ValueError, "samples without padding; got attention_mask"),
        (sample, TypeError, "a list of mappings, one of each sample; got dict"),
        (iter([sample]), TypeError, r"got list_iterator(.|\n)*hint: collate\(list\(samples\)\)"),
        ([[1, 2], [3]], TypeError, "a list of mappings"),
        (None, TypeError, "a list of mappings, one of each sample; got NoneType"),
    ):
        for packed in (False, True):
            with pytest.raises(error, match=match):
                collate(samples, packed=packed)


def test_what_is_no_tensor_or_no_ids():
    ids, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3)
    with pytest.raises(TypeError, match="pack: expected attention_mask to be a tensor; got None"):
        pack(ids, mask, None)
    for values, bounds, name in ((None, torch.tensor([0, 3]), "values"), (torch.ones(3), None, "cu_seqlens")):
        with pytest.raises(TypeError, match=f"unpack: expected {name} to be a tensor; got None"):
            unpack(values, bounds)
    with pytest.raises(TypeError, match="pack: expected ref_log_probs to be a tensor; got None"):
        pack(ids, mask, mask, ref_log_probs=None)
    for call in (lambda x: pack(x, mask, mask), lambda x: align(x, mask)):
        with pytest.raises(TypeError, match="input_ids of integers; got torch.float32"):
            call(ids.float())


@pytest.mark.parametrize("packed", [False, True])
def test_collate_keeps_the_numbers_of_every_sample(packed):
    """Whatever the first one's are: integers took the fractions of those behind them."""
    narrow = {"input_ids": torch.tensor([5, 6, 7], dtype=torch.uint8), "advantages": [0, 0], "token_weights": [1, 1]}
    wide = {"input_ids": [5, 300, 7], "advantages": [-0.5, 0.75], "token_weights": [0.25, 0.5]}
    samples = [{"loss_mask": [0, 1, 1], **sample} for sample in (narrow, wide)]
    inputs, tokens = collate(samples, packed=packed)
    turned_inputs, turned = collate(samples[::-1], packed=packed)
    assert sorted(inputs["input_ids"].flatten().tolist()) == [5, 5, 6, 7, 7, 300]
    assert sorted(turned_inputs["input_ids"].flatten().tolist()) == [5, 5, 6, 7, 7, 300]
    for name, counted in (("advantages", [-0.5, 0.75]), ("token_weights", [0.25, 0.5])):
        for each in (tokens, turned):
            assert {*counted} <= {*each[name].flatten().tolist()}
            assert each[name].dtype == torch.float32


def test_collate_keeps_the_digits_of_numbers():
    """Python's floats are no bf16, though a model is made under that default."""
    log_probs, default = [-6.83, -0.001], torch.get_default_dtype()
    sample = {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1], "advantages": 0.1, "old_log_probs": log_probs}
    try:
        torch.set_default_dtype(torch.bfloat16)
        _, tokens = collate([sample])
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(tokens["old_log_probs"], torch.tensor([log_probs]))
    assert torch.equal(tokens["advantages"], torch.tensor([0.1]))
