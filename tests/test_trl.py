"""TRL's own trainer and ours on the same tiny model: losses, gradients, metrics, weights."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from torch.utils._pytree import tree_map

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

import trl_cases  # noqa: E402
from trl_cases import (  # noqa: E402
    BOUNDS,
    SIZES,
    assert_same,
    assert_same_runs,
    batch,
    compute,
    run_of,
    trainer,
    with_log_probs,
)

from grpo_kernels import Divergence  # noqa: E402
from grpo_kernels.integrations.objectives import AGGREGATIONS, OVER_ITEMS  # noqa: E402
from grpo_kernels.integrations.trl import FusedGRPOTrainer  # noqa: E402

pytestmark = pytest.mark.peers
folder = trl_cases.folder
LEVELS = ("token", "sequence")


@pytest.fixture
def make(folder, tmp_path):
    """Ours and TRL's own trainer, same model and options."""

    def pair(options=None, **keywords):
        ours = trainer(FusedGRPOTrainer, folder, tmp_path, options=options, **keywords)
        return ours, trainer(trl.GRPOTrainer, folder, tmp_path, options=options)

    return pair


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_one_batch(make, loss_type, level, beta, accumulation, from_logits):
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta, **BOUNDS.get(loss_type, {})}
    subject, plain = make(options | {"gradient_accumulation_steps": accumulation}, from_logits=from_logits)
    assert_same(subject, plain, batch(seed=accumulation))


OPTIONS = {
    "wide": {"epsilon": 0.1, "epsilon_high": 0.4},
    "delta": {"delta": 1.5},
    "delta below the bound": {"delta": 1.1, "epsilon_high": 0.3},
    "no bias correction": {"use_bias_correction_kl": False, "beta": 0.1},
    "high entropy": {"top_entropy_quantile": 0.4, "beta": 0.1},
    "off-policy mask": {"off_policy_mask_threshold": 0.05},
    "entropy bonus": {"entropy_coef": 0.05},
    "entropy bonus of a window": {"entropy_coef": 0.05, "gradient_accumulation_steps": 4, "loss_type": "dr_grpo"},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_target": 9.0},
    "temperature": {"temperature": 0.7},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1, "beta": 0.1, "delta": 1.5},
    "sapo": {"loss_type": "sapo", "entropy_coef": 0.05, "off_policy_mask_threshold": 0.05},
    "vespo": {"loss_type": "vespo", "top_entropy_quantile": 0.4, "beta": 0.1},
}


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(make, name, level, tools, on_policy):
    subject, plain = make({"importance_sampling_level": level} | OPTIONS[name])
    for one in (subject, plain):
        one._last_world_entropy = 1.0  # of the window before: the adaptive bonus is on
    assert_same(subject, plain, batch(tools=tools) | {"on_policy": on_policy})
    assert subject.entropy_coef == pytest.approx(plain.entropy_coef)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_rollout_weights(make, loss_type, level, per_token):
    """vLLM's correction, without vLLM: the weights are in the batch."""
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.04, **BOUNDS.get(loss_type, {})}
    subject, plain = make(options)
    inputs = batch(sampled=True)
    if not per_token:
        inputs["importance_sampling_ratio"] = inputs["importance_sampling_ratio"][:, :1]
    for one in (subject, plain):
        one.use_vllm = one.vllm_importance_sampling_correction = True
    assert_same(subject, plain, inputs)


@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("name", ["wide", "high entropy", "off-policy mask", "adaptive entropy", "cispo", "vespo"])
def test_shadow(make, caplog, name, from_logits):
    """Beside TRL's own loss, which leaves no trace: loss, gradients and metrics are those of a trainer without it."""
    options = OPTIONS[name] | {"beta": 0.04, "gradient_accumulation_steps": 4}
    subject, plain = make(options, from_logits=from_logits, shadow=1)
    for one in (subject, plain):
        one._last_world_entropy = 1.0
    with caplog.at_level("INFO", "grpo_kernels.shadow"):
        assert_same(subject, plain, batch())
    said = [(record.levelname, record.getMessage()) for record in caplog.records if record.name.endswith("shadow")]
    assert [level for level, _ in said] == ["INFO"], said
    assert "(TRL)" in said[0][1]
    assert subject.entropy_coef == pytest.approx(plain.entropy_coef)
    assert "_get_per_token_logps_and_entropies" not in vars(subject)


def test_shadow_warns_where_an_option_is_misread(make, caplog, monkeypatch):
    """The kernels' loss is as it should be, and another than TRL's."""
    subject, _ = make({"epsilon": 0.1}, shadow=1)
    monkeypatch.setattr(subject._watch, "loss", lambda *given: 1.01 * subject._loss_of_trl(*given))
    compute(subject, with_log_probs(batch(), subject))
    assert [record.levelname for record in caplog.records if "more than rounding" in record.message] == ["WARNING"]
    with pytest.raises(ValueError, match="expected shadow= or teacher="):
        make(shadow=1, teacher=subject.model, divergence=Divergence())


TRAINED = [
    *itertools.product(AGGREGATIONS, LEVELS, (0.0, 0.04), (1, 4)),
]
SAMPLED = (("grpo", "token", 0.04, 1), ("dapo", "token", 0.0, 4), ("luspo", "sequence", 0.04, 4))
SAMPLED += (("cispo", "token", 0.0, 4), ("vespo", "token", 0.04, 1))


@pytest.mark.parametrize(
    ("loss_type", "level", "beta", "accumulation"),
    [pytest.param(*case, marks=[] if case in SAMPLED else pytest.mark.nightly) for case in TRAINED],
)
def test_ten_steps(make, loss_type, level, beta, accumulation):
    """Generation, rewards, optimizer and all: the logs and the weights of both runs."""
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta}
    subject, plain = make(options | {"gradient_accumulation_steps": accumulation})
    assert_same_runs(subject, plain)


@pytest.mark.parametrize(
    "loss_type",
    [pytest.param(name, marks=[] if name in ("dapo", "bnpo") else pytest.mark.nightly) for name in AGGREGATIONS],
)
def test_windows_that_are_cut_short(make, loss_type):
    """Eight micro-batches an epoch in windows of three, generated two at a time: the last window has two."""
    options = {"loss_type": loss_type, "gradient_accumulation_steps": 3, "steps_per_generation": 2, "num_iterations": 1}
    options |= {"beta": 0.04, **BOUNDS.get(loss_type, {})}
    seen = set()

    def looked(one, model, inputs):
        seen.add(one.current_gradient_accumulation_steps)
        return FusedGRPOTrainer._compute_loss(one, model, inputs)

    subject, plain = make(options)
    subject._compute_loss = looked.__get__(subject)
    assert_same_runs(subject, plain)
    assert seen == {2, 3}


@pytest.mark.parametrize("micro_batches", [4, 3])
@pytest.mark.parametrize("loss_type", OVER_ITEMS)
def test_normalizer_that_switching_names(make, loss_type, micro_batches):
    """Of a loop of one's own: the tokens of the generation batch, a process's, times the micro-batches of the window
    over those of the generation batch. The whole count would be TRL's gradient times that fraction."""
    options = {"loss_type": loss_type, "gradient_accumulation_steps": 4, "steps_per_generation": 8}
    subject, plain = make(options | BOUNDS.get(loss_type, {}))
    inputs = with_log_probs(batch(), plain)
    plain.args.gradient_accumulation_steps = micro_batches  # what ``compute`` takes for the window's
    wanted_loss, wanted, _ = compute(plain, inputs)
    processes, generated = 1, 8
    normalizer = inputs["num_items_in_batch"] / processes * micro_batches / generated
    grpo = {"token_ids": inputs["completion_ids"], "mask": inputs["completion_mask"], "normalizer": normalizer}
    grpo |= {"advantages": inputs["advantages"], "old_log_probs": inputs["old_per_token_logps"]}
    ids, mask = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    subject.model.zero_grad()
    out = subject.model(input_ids=ids, attention_mask=mask, logits_to_keep=grpo["token_ids"].shape[1] + 1, grpo=grpo)
    out.loss.backward()
    assert float(out.loss) == pytest.approx(float(wanted_loss), rel=1e-4)
    gradient = subject.model.lm_head.weight.grad
    torch.testing.assert_close(gradient, wanted["lm_head.weight"], rtol=1e-4, atol=1e-6)


def test_lora(folder, tmp_path):
    """A frozen head: the same weights after ten steps, adapters included."""
    peft = pytest.importorskip("peft")
    runs = []
    for kind in (FusedGRPOTrainer, trl.GRPOTrainer):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        subject = trainer(kind, folder, tmp_path, options={"beta": 0.04}, peft_config=config)
        runs.append(run_of(subject))
    assert len(runs[0][0]) == 10
    for row, wanted in zip(runs[0][0], runs[1][0], strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-4, abs=1e-5)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    for name, value in runs[0][1].items():
        torch.testing.assert_close(value, runs[1][1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_evaluation(make):
    subject, plain = make({"loss_type": "dapo"})
    values = []
    for one in (subject, plain):
        inputs = with_log_probs(batch(), plain)
        one.model.eval()
        with torch.no_grad():
            values.append(float(one._compute_loss(one.model, inputs)))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_mixed_precision(make):
    """bf16 autocast, TRL's default: the logits are rounded, in TRL's head and in ours."""
    subject, plain = make({"bf16": True, "beta": 0.04})
    inputs = with_log_probs(batch(), plain)
    (loss, gradients, _), (wanted_loss, wanted, _) = (compute(one, inputs) for one in (subject, plain))
    assert float(loss) == pytest.approx(float(wanted_loss), rel=0.02)
    for name, gradient in gradients.items():
        assert float((gradient - wanted[name]).norm()) <= 0.03 * float(wanted[name].norm()), name


def test_wrappers_that_round(make):
    """FSDP's mixed precision casts inputs and outputs of forward: the loss and the old pass are those of fp32."""
    subject, plain = make({"beta": 0.04})
    inputs = with_log_probs(batch(), plain)
    tokens = (torch.cat([inputs[f"prompt_{n}"], inputs[f"completion_{n}"]], 1) for n in ("ids", "mask"))
    arguments = (subject.model, *tokens, 9)
    wanted_loss, wanted, wanted_metrics = compute(subject, inputs)
    old = subject._get_per_token_logps_and_entropies(*arguments)[0]

    def rounded(value):
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(torch.bfloat16) if is_float else value

    subject.model.register_forward_pre_hook(lambda _, args, kwargs: tree_map(rounded, (args, kwargs)), with_kwargs=True)
    subject.model.register_forward_hook(lambda _, args, output: tree_map(rounded, output))
    loss, gradients, metrics = compute(subject, inputs)
    assert metrics == wanted_metrics
    assert float(loss) == pytest.approx(float(wanted_loss), rel=0.01)
    assert torch.equal(subject._get_per_token_logps_and_entropies(*arguments)[0], old)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name])


def test_options_that_change_while_training(make):
    subject, plain = make({"beta": 0.04})
    inputs = batch()
    for one in (subject, plain):
        one.beta, one.epsilon_low, one.epsilon_high, one.loss_type = 0.5, 0.01, 0.02, "bnpo"
    assert_same(subject, plain, inputs)
    subject.args.delta = 0.9
    with pytest.raises(ValueError, match="delta=0.9"):
        compute(subject, inputs)
    subject.args.delta, subject.top_entropy_quantile, subject._entropy_bonus_enabled = None, 0.5, True
    with pytest.raises(ValueError, match="an entropy bonus with top_entropy_quantile"):
        compute(subject, inputs)


def test_a_second_trainer_on_the_same_model(folder, tmp_path):
    first = trainer(FusedGRPOTrainer, folder, tmp_path, options={"max_steps": 2, "bf16": True})
    first.train()
    model = first.accelerator.unwrap_model(first.model)
    second = trainer(FusedGRPOTrainer, folder, tmp_path, options={"max_steps": 2, "beta": 0.1}, model=model)
    second.train()
    # accelerate's bf16 autocast of the first run is still around the model's own forward, which ours runs
    options = {"beta": 0.1, "bf16": True}
    plain = trainer(trl.GRPOTrainer, folder, tmp_path, options=options, model=copy.deepcopy(model))
    inputs = with_log_probs(batch(), plain)
    loss, wanted = (float(compute(one, inputs)[0]) for one in (second, plain))
    assert loss == pytest.approx(wanted, rel=1e-3)


def test_saves_resumes_and_evaluates(folder, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "eval_strategy": "no"}
    whole = trainer(FusedGRPOTrainer, folder, tmp_path / "a", options=options)
    transformers.set_seed(3)
    whole.train()
    again = trainer(FusedGRPOTrainer, folder, tmp_path / "b", options=options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert again.state.global_step == 4
    assert "eval_loss" in again.evaluate(again.train_dataset)
    again.save_model(tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.lm_head.weight, again.model.lm_head.weight)


def test_log_probs_of_a_subclass_are_not_ignored(folder, tmp_path):
    class Mine(FusedGRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    with pytest.raises(TypeError, match="Mine overrides"):
        trainer(Mine, folder, tmp_path)


def seven(self, model, inputs):
    return 0 * sum(parameter.sum() for parameter in model.parameters()) + 7


OWN_LOG_PROBS = trl.GRPOTrainer._get_per_token_logps_and_entropies
CHANGES = {
    "_compute_loss": seven,
    "_get_per_token_logps_and_entropies": lambda *args, **kwargs: OWN_LOG_PROBS(*args, **kwargs),
    "get_gamma_weights": staticmethod(lambda *args, **kwargs: 1.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_no_class_is_passed_over(folder, tmp_path, name, monkeypatch):
    """Behind FusedGRPOTrainer, in front of it, or patched into TRL's own: refused by class and method."""
    other = type("Other", (trl.GRPOTrainer,), {name: CHANGES[name]})
    behind = type("Behind", (FusedGRPOTrainer, type("Deeper", (other,), {})), {})
    with pytest.raises(TypeError, match=f"Other overrides {name}, .* of Behind .*(FusedGRPOTrainer).*patch_trl"):
        trainer(behind, folder, tmp_path)
    if name != "_compute_loss":
        front = type("Front", (FusedGRPOTrainer,), {name: CHANGES[name]})
        with pytest.raises(TypeError, match=f"Front overrides {name}"):
            trainer(front, folder, tmp_path)

        class Around(front):
            def _compute_loss(self, model, inputs):
                return super()._compute_loss(model, inputs)

        with pytest.raises(TypeError, match=f"Front overrides {name}"):
            trainer(Around, folder, tmp_path, options={"max_steps": 1}).train()
    plain = trl.GRPOTrainer.__dict__[name]
    wrapped = functools.wraps(getattr(trl.GRPOTrainer, name))(lambda *args, **kwargs: None)  # named as TRL's own
    for patch in (CHANGES[name], staticmethod(wrapped) if isinstance(plain, staticmethod) else wrapped):
        monkeypatch.setattr(trl.GRPOTrainer, name, patch)
        with pytest.raises(TypeError, match=f"GRPOTrainer overrides {name}"):
            trainer(FusedGRPOTrainer, folder, tmp_path)


def test_what_is_put_on_a_trainer(make, folder):
    """A patch of a method that the loss does not call is refused; so is a model that knows nothing of the loss."""
    subject, _ = make({"beta": 0.04})
    inputs = with_log_probs(batch(), subject)
    for name in ("_get_per_token_logps_and_entropies", "get_gamma_weights"):
        setattr(subject, name, getattr(subject, name))
        with pytest.raises(TypeError, match=f"trainer.{name} is patched.*patch_trl"):
            compute(subject, inputs)
        delattr(subject, name)
    compute(subject, inputs)
    other = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = (torch.cat([inputs[f"prompt_{n}"], inputs[f"completion_{n}"]], 1) for n in ("ids", "mask"))
    arguments = (*tokens, inputs["completion_ids"].shape[1])
    with pytest.raises(RuntimeError, match=r"got another .*trainer.attach_loss\(model\)"):
        subject._get_per_token_logps_and_entropies(other, *arguments)
    subject.attach_loss(other)
    assert subject._get_per_token_logps_and_entropies(other, *arguments)[0].shape == inputs["completion_ids"].shape


def test_classes_that_are_honoured(folder, tmp_path):
    """A loss of one's own in front, and the masks that the fused loss asks for."""
    mine = type("Mine", (FusedGRPOTrainer,), {"_compute_loss": seven})
    subject = trainer(mine, folder, tmp_path, options={"max_steps": 1})
    subject.train()
    assert subject.state.log_history[0]["loss"] == 7
    inputs, gradients = with_log_probs(batch(), subject), []
    for kind in (FusedGRPOTrainer, trl.GRPOTrainer):

        class Dropping(kind):
            def get_off_policy_mask(self, advantages, mask, **_):
                return (advantages > 1).to(mask)

        dropping = trainer(Dropping, folder, tmp_path, options={"off_policy_mask_threshold": 0.05})
        gradients.append(compute(dropping, inputs)[1]["lm_head.weight"])
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


class Adding(trl.GRPOTrainer):
    """A loss that adds to TRL's, and a buffer of what was generated."""

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs) + 0.1 * model.lm_head.weight.square().mean()

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        kept = self.__dict__.setdefault("kept", [])
        kept.append(output["advantages"])
        output["advantages"] = (0.5 * output["advantages"] + 0.5 * kept[0])[:, None].expand(
            output["completion_ids"].shape
        )
        return output


@pytest.mark.parametrize("other", ["Adding", "GMPOTrainer"])
def test_trainers_in_front(folder, tmp_path, other):
    """Their losses run, around the fused one or on its log-probs: the logs and weights are those without us."""
    options = {"beta": 0.04, "epsilon": 0.1, "max_completion_length": 9}
    if other == "GMPOTrainer":
        from trl.experimental.gmpo import GMPOTrainer as Other
    else:
        Other = Adding
    fused = type("Mine", (Other, FusedGRPOTrainer), {})
    assert_same_runs(*(trainer(kind, folder, tmp_path, options=options) for kind in (fused, Other)))
    with pytest.raises(
        TypeError, match=rf"{other} overrides _compute_loss, .*class Wrong\({other}, FusedGRPOTrainer\)"
    ):
        trainer(type("Wrong", (FusedGRPOTrainer, Other), {}), folder, tmp_path)


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_metrics_do_not_see_masked_tokens(make, loss_type, level):
    """A tool's token may have any log-probs: under the old policy, the reference, the sampler."""
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.04, **BOUNDS.get(loss_type, {})}
    options |= {"off_policy_mask_threshold": 0.05}
    if loss_type != "vespo":
        options |= {"entropy_coef": 0.05}
    subject, plain = make(options)
    inputs = with_log_probs(batch(tools=True), plain)
    masked = (inputs["completion_mask"] * inputs["tool_mask"]) == 0
    assert (masked & (inputs["completion_mask"] != 0)).any()
    wanted = compute(plain, inputs)
    for value in (-95.0, -torch.inf, torch.nan):
        spoilt = dict(inputs)
        for name in ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"):
            spoilt[name] = inputs[name].masked_fill(masked, value)
        loss, gradients, metrics = compute(subject, spoilt)
        torch.testing.assert_close(loss, wanted[0], rtol=1e-5, atol=1e-6)
        assert set(metrics) == set(wanted[2])
        for name, number in metrics.items():
            assert number == pytest.approx(wanted[2][name], rel=1e-5, abs=1e-6, nan_ok=True), (value, name)
        assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance_sampling_level": "sequence_token"}, "sequence_token"),
        ({"loss_type": "rpo"}, "rpo"),
        ({"delta": 0.9}, "delta"),
        ({"entropy_coef": 0.1, "top_entropy_quantile": 0.5}, "top_entropy_quantile"),
    ],
)
def test_refused_by_name(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(FusedGRPOTrainer, folder, tmp_path, options=options)


# A teacher


def teacher_of(**sizes):
    torch.manual_seed(7)
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(pad_token_id=0, eos_token_id=1, **{**SIZES, **sizes}))


def rows_of(model, inputs, temperature):
    """The model's log-probs of the whole vocabulary at every token of the completions."""
    ids, attention = (torch.cat([inputs[f"prompt_{n}"], inputs[f"completion_{n}"]], 1) for n in ("ids", "mask"))
    length = inputs["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1]
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize(("loss_type", "accumulation"), [("grpo", 1), ("dapo", 4), ("dr_grpo", 4), ("vespo", 1)])
def test_a_teacher_beside_the_rewards(make, loss_type, accumulation):
    """TRL's own loss and gradient, and a divergence of the whole rows of both models, weighed as its tokens are."""
    options = {"loss_type": loss_type, "gradient_accumulation_steps": accumulation, "beta": 0.04, "temperature": 0.8}
    teacher = teacher_of(hidden_size=48, num_hidden_layers=1)
    ours, plain = make(options, teacher=teacher, divergence=Divergence("jsd", coef=0.3, mix=0.4))
    inputs = with_log_probs(batch(tools=True), plain)
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    wanted_loss, wanted, wanted_metrics = compute(plain, inputs)

    policy, other = rows_of(plain.model, inputs, 0.8), rows_of(teacher.eval(), inputs, 0.8).detach()
    mixture = (0.6 * policy.exp() + 0.4 * other.exp()).log()
    of_other, of_policy = ((p.exp() * (p - mixture)).sum(-1) for p in (other, policy))
    each = torch.where(mask != 0, 0.4 * of_other + 0.6 * of_policy, 0.0)
    if loss_type == "grpo":
        term = (each.sum(-1) / mask.sum(-1).clamp(min=1)).mean() / accumulation
    elif loss_type == "dr_grpo":
        term = each.sum() / each.shape[0] / plain.max_completion_length / accumulation
    else:
        term = each.sum() / inputs["num_items_in_batch"] * plain.args.steps_per_generation / accumulation
    names, weights = zip(*plain.model.named_parameters(), strict=True)
    of_term = dict(zip(names, torch.autograd.grad(0.3 * term, weights), strict=True))

    loss, gradients, metrics = compute(ours, inputs)
    torch.testing.assert_close(loss, wanted_loss + 0.3 * term.detach(), rtol=1e-5, atol=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in of_term.values())
    assert scale > 1e-4
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name] + of_term[name], rtol=1e-4, atol=1e-4 * scale)
    assert set(metrics) == {*wanted_metrics, "divergence", "teacher_entropy"}
    assert metrics["divergence"] == pytest.approx(float(each.sum() / mask.sum()), rel=1e-4)
    entropy = torch.where(mask != 0, -(other.exp() * other).sum(-1), 0.0).sum() / mask.sum()
    assert metrics["teacher_entropy"] == pytest.approx(float(entropy), rel=1e-4)
    assert all(weight.grad is None for weight in teacher.parameters())

    ours.divergence = None  # as a callback may
    loss, _, metrics = compute(ours, inputs)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-6)
    assert set(metrics) == set(wanted_metrics)


def test_a_policy_nears_its_teacher(folder, tmp_path):
    """In a run: the divergence is logged at every step, falls, and leaves the teacher as it is."""
    teacher = teacher_of()
    before = copy.deepcopy(teacher.state_dict())
    given = {"teacher": teacher, "divergence": Divergence("forward_kl", coef=5.0)}
    log, _ = run_of(trainer(FusedGRPOTrainer, folder, tmp_path, options={"learning_rate": 0.5}, **given))
    fallen = [row["divergence"] for row in log]
    assert len(fallen) == 10
    assert sum(fallen[-3:]) < 0.9 * sum(fallen[:3]), fallen
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": True}, r'expected divergence=Divergence\("reverse_kl", coef=0.05\) beside teacher=; got None'),
        ({"divergence": Divergence()}, "expected teacher= a model of transformers beside divergence=; got None"),
        ({"teacher": "big", "divergence": Divergence()}, r"got 'big'\.\s+hint: AutoModelForCausalLM.from_pretrained"),
        ({"teacher": True, "divergence": "reverse_kl"}, "beside teacher=; got 'reverse_kl'"),
        ({"teacher": True, "divergence": Divergence(), "from_logits": True}, "got from_logits=True"),
    ],
)
def test_what_is_no_teacher_is_refused(folder, tmp_path, given, message):
    given = {**given, **({"teacher": teacher_of()} if given.get("teacher") is True else {})}
    with pytest.raises((TypeError, ValueError), match=message):
        trainer(FusedGRPOTrainer, folder, tmp_path, **given)


@pytest.mark.parametrize("from_logits", [False, True])
def test_a_mixture_of_experts_without_its_loss(folder, tmp_path, from_logits):
    """Its config asks for router logits, the trainer has no coefficient for them: TRL's loss is without."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = transformers.Qwen3MoeConfig(pad_token_id=0, eos_token_id=1, output_router_logits=True, **sizes)
    model = transformers.Qwen3MoeForCausalLM(config)
    options, found = {"router_aux_loss_coef": 0.0}, []
    for kind, more in ((FusedGRPOTrainer, {"from_logits": from_logits}), (trl.GRPOTrainer, {})):
        subject = trainer(kind, folder, tmp_path, options=options, model=copy.deepcopy(model), **more)
        found.append(compute(subject, with_log_probs(batch(), subject)))
    (loss, gradients, _), (wanted_loss, wanted, _) = found
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients["lm_head.weight"], wanted["lm_head.weight"], rtol=1e-4, atol=1e-6)
