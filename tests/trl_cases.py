"""What the tests of TRL's trainer share: tiny trainers, batches, and the comparison of two trainers."""

from __future__ import annotations

import pytest
import torch
import transformers
import trl
import trl_step

VOCAB = 64
OF_IMAGES = ("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles")
OF_IMAGES += ("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids")
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2}
PLAIN = {"logging_steps": 1, "seed": 3, "per_device_train_batch_size": 4, "max_completion_length": 9, "max_steps": 10}
PLAIN |= {"lr_scheduler_type": "constant", "num_iterations": 2}
PLAIN |= {"optim": "sgd", "learning_rate": 0.03}  # Adam's first steps are signs: they would blow rounding up

BOUNDS = {"cispo": {"epsilon_high": 1.2}, "sapo": {"sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.3}}
BOUNDS["vespo"] = {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny policy that trainers are made of, on the disk: ``folder = trl_cases.folder`` in a file of tests."""
    path = tmp_path_factory.mktemp("policy")
    trl_step.save_policy(path, **SIZES)
    return path


def trainer(kind, folder, tmp_path, *, options=None, **keywords):
    return trl_step.make_trainer(kind, folder, PLAIN | {"output_dir": str(tmp_path)} | (options or {}), **keywords)


def batch(seed=0, sampled=False, tools=False):
    """What TRL hands to ``_compute_loss``: ragged, an empty sequence, ratios on both sides of every bound."""
    generator = torch.Generator().manual_seed(seed)
    B, P, L = 5, 4, 9
    ids = torch.randint(2, VOCAB, (B, P + L), generator=generator)
    prompt_mask = torch.ones(B, P, dtype=torch.int64)
    prompt_mask[1, :2] = 0
    mask = (torch.arange(L) < torch.tensor([9, 5, 7, 0, 3])[:, None]).long()
    inputs = {"prompt_ids": ids[:, :P], "prompt_mask": prompt_mask, "completion_ids": ids[:, P:]}
    inputs |= {"completion_mask": mask, "advantages": torch.tensor([1.2, -0.8, 0.0, 0.5, -1.5])}
    inputs["noise"] = torch.randn(3, B, L, generator=generator)
    if sampled:
        ratio = torch.rand(B, L, generator=generator) * 2
        inputs["importance_sampling_ratio"] = torch.where(mask != 0, ratio, 1.0)  # TRL's are 1 at padding
    if tools:
        inputs["tool_mask"] = (torch.rand(B, L, generator=generator) < 0.7).long()
    live = mask * inputs.get("tool_mask", 1)
    inputs["num_items_in_batch"] = live.sum().float() * 3
    return inputs


def compute(subject, inputs):
    """Loss, every parameter's gradient and the metrics of one call, which are those of the mode of the model."""
    subject.model.train()
    subject.model.zero_grad()
    subject._metrics["train"].clear()
    subject.current_gradient_accumulation_steps = subject.args.gradient_accumulation_steps
    loss = subject._compute_loss(subject.model, inputs)
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in subject.model.named_parameters()
        if parameter.grad is not None
    }
    metrics = {name: values[-1] for name, values in subject._metrics["train"].items()}
    assert {"entropy"} | ({"kl"} if subject.beta else set()) <= metrics.keys()
    return loss.detach(), gradients, metrics


def with_log_probs(inputs, subject, on_policy=False):
    """Old, reference and sampler's log-probs near the policy's."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    length = inputs["completion_ids"].shape[1]
    images = {name: inputs[name] for name in OF_IMAGES if name in inputs}
    with torch.no_grad():
        log_probs = trl.GRPOTrainer._get_per_token_logps_and_entropies(
            subject, subject.model, ids, attention, length, **images
        )[0]
    old, ref, sampled = (log_probs + 0.4 * noise for noise in inputs["noise"])
    found = {name: value for name, value in inputs.items() if name != "noise"}
    found |= {"ref_per_token_logps": ref, "sampling_per_token_logps": sampled}
    return found if on_policy else {**found, "old_per_token_logps": old}


def assert_same(subject, plain, inputs):
    plain_inputs = with_log_probs(inputs, plain, on_policy=inputs.pop("on_policy", False))
    wanted_loss, wanted, wanted_metrics = compute(plain, plain_inputs)
    loss, gradients, metrics = compute(subject, plain_inputs)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-6)
    scale = max(float(g.abs().max()) for g in wanted.values())
    assert scale > 0
    assert set(gradients) == set(wanted)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, wanted[name], rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert set(metrics) == set(wanted_metrics)
    for name, value in metrics.items():
        assert value == pytest.approx(wanted_metrics[name], rel=1e-5, abs=1e-6, nan_ok=True), name


def run_of(subject):
    transformers.set_seed(3)
    subject.train()
    log = [{name: value for name, value in row.items() if "time" not in name} for row in subject.state.log_history]
    return log[:-1], {name: value.detach().clone() for name, value in subject.model.named_parameters()}


def assert_same_runs(subject, plain, still=lambda name, weight: False):
    """Train both: the logs of every step, and the weights by how far they have moved; where ``still(name, weight)`` is
    true they may not have.

    Norms of gradients follow rounding: of Granite TRL's own move by 6e-6 where one matrix begins an ulp apart, and by
    1.3e-5 from ours, at the same step of the ten at Adam's 0.03."""
    start = {name: value.detach().clone() for name, value in subject.model.named_parameters()}
    (log, weights), (wanted_log, wanted) = run_of(subject), run_of(plain)
    assert len(log) == len(wanted_log) == 10
    for row, wanted_row in zip(log, wanted_log, strict=True):
        assert set(row) == set(wanted_row)
        for name, value in row.items():
            rel = 3e-5 if name == "grad_norm" else 1e-5
            assert value == pytest.approx(wanted_row[name], rel=rel, abs=1e-5, nan_ok=True), name
    moved = {name: float((value - start[name]).abs().max()) for name, value in wanted.items()}
    assert max(moved.values()) > 1e-4
    for name, value in weights.items():
        assert moved[name] > 1e-4 or still(name, value), name
        assert float((value - wanted[name]).abs().max()) <= 1e-3 * moved[name] + 1e-7, name
