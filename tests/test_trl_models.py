"""TRL's own trainer and ours on other models than test_trl.py's: mixtures of experts, models that see, adapters, heads
in full precision, and every family that TRL trains in its tests."""

from __future__ import annotations

import pytest
import torch

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

import datasets  # noqa: E402
import trl_cases  # noqa: E402
from trl_cases import (  # noqa: E402
    BOUNDS,
    OF_IMAGES,
    PLAIN,
    assert_same,
    assert_same_runs,
    batch,
    compute,
    trainer,
    with_log_probs,
)
from trl_models import DENSE, MIXTURES, SEEING, UNNAMED, WITHOUT, make_model, make_seeing, with_images  # noqa: E402

from grpo_kernels.integrations.objectives import AGGREGATIONS  # noqa: E402
from grpo_kernels.integrations.trl import FusedGRPOTrainer  # noqa: E402

pytestmark = pytest.mark.peers
folder = trl_cases.folder
FIXED = {"use_cpu": True, "report_to": [], "save_strategy": "no", "bf16": False, "disable_tqdm": True}
FIXED |= {"dataloader_pin_memory": False, "num_generations": 4}


@pytest.fixture
def make(folder, tmp_path):
    """Ours and TRL's own trainer, copies of one model and the same options."""

    def pair(model, options=None, **keywords):
        model.save_pretrained(tmp_path / "model")  # the reference is loaded from there
        found = []
        for kind, more in ((FusedGRPOTrainer, keywords), (trl.GRPOTrainer, {})):
            one = type(model).from_pretrained(tmp_path / "model")
            found.append(trainer(kind, folder, tmp_path, options=options, model=one, **more))
        return found

    return pair


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts(make, family):
    """At TRL's defaults, but for a coefficient that shows: the model's own auxiliary loss is the one TRL computes."""
    options = {"router_aux_loss_coef": 0.7, "gradient_accumulation_steps": 4, "loss_type": "dapo", "beta": 0.04}
    subject, plain = make(make_model(family), options)
    inputs = batch(seed=4)
    assert subject.aux_loss_enabled
    assert_same(subject, plain, inputs)
    assert compute(subject, with_log_probs(batch(seed=4), plain))[2]["aux_loss"] > 0.5


@pytest.mark.parametrize("family", UNNAMED)
def test_mixtures_that_trl_cannot_count(make, family):
    """TRL reads the number of experts by a name that the config does not have; the model's forward knows it."""
    subject, plain = make(make_model(family), {"router_aux_loss_coef": 0.7, "gradient_accumulation_steps": 4})
    inputs = {name: value for name, value in batch().items() if name != "noise"}
    with pytest.raises(AttributeError, match="num_experts"):
        compute(plain, inputs)
    torch.manual_seed(0)  # some experts are drawn
    loss, gradients, metrics = compute(subject, inputs)
    ids, mask = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    torch.manual_seed(0)
    aux = subject.model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    assert metrics["aux_loss"] == pytest.approx(float(aux), rel=1e-6)
    aux_gradient = torch.autograd.grad(0.7 * aux / 4, subject.model.get_input_embeddings().weight)[0]
    for one in (subject, plain):
        one.aux_loss_enabled = False
    torch.manual_seed(0)
    wanted_loss, wanted, _ = compute(plain, inputs)
    assert float(loss) == pytest.approx(float(wanted_loss + 0.7 * aux / 4), rel=1e-5)
    name = next(name for name, each in subject.model.named_parameters() if "embed_tokens" in name)
    assert float(aux_gradient.abs().max()) > 1e-4
    torch.testing.assert_close(gradients[name], wanted[name] + aux_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", WITHOUT)
def test_mixtures_without_an_auxiliary_loss(make, family):
    subject, plain = make(make_model(family))
    assert not subject.aux_loss_enabled
    assert_same(subject, plain, batch())


@pytest.mark.parametrize("family", WITHOUT)
def test_a_coefficient_for_no_auxiliary_loss(make, family):
    subject, _ = make(make_model(family), {"router_aux_loss_coef": 0.7})
    inputs = {name: value for name, value in batch().items() if name != "noise"}
    with pytest.raises(ValueError, match=f"a model whose forward returns aux_loss.*{family}ForCausalLM"):
        compute(subject, inputs)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_auxiliary_loss_of_every_loss_type(make, loss_type, accumulation, mode):
    """Divided by the window's micro-batches and by nothing else, and left out of the policy_loss metric."""
    options = {"router_aux_loss_coef": 0.7, "gradient_accumulation_steps": accumulation, "loss_type": loss_type}
    options |= {"steps_per_generation": 8, "entropy_coef": 0.05, **BOUNDS.get(loss_type, {})}
    subject, plain = make(make_model("Qwen3Moe"), options)
    if mode == "train":
        assert_same(subject, plain, batch(seed=1))
        return
    found = []
    for one in (subject, plain):
        inputs = with_log_probs(batch(), plain)
        one.model.eval()
        with torch.no_grad():
            loss = float(one._compute_loss(one.model, inputs))
        found.append({"loss": loss, **{name: values[-1] for name, values in one._metrics["eval"].items()}})
    assert {"aux_loss", "policy_loss"} <= found[0].keys()
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_head_in_full_precision(make, tied, bf16):
    """A bf16 backbone, under autocast or not: logs and weights differ by the rounding of fp32 alone."""
    model = make_model("Qwen3", tie_word_embeddings=tied).to(torch.bfloat16)
    options = {"cast_lm_head_to_fp32": True, "bf16": bf16, "beta": 0.04, "loss_type": "dapo"}
    subject, plain = make(model, options)
    assert subject.model.lm_head.weight.dtype == subject.ref_model.lm_head.weight.dtype == torch.float32
    assert subject.model.model.norm.weight.dtype == torch.bfloat16
    assert_same_runs(subject, plain, lambda _, weight: weight.dtype == torch.bfloat16)  # a step is below its resolution


@pytest.mark.parametrize("tied", [False, True])
def test_head_in_full_precision_under_autocast(make, tied):
    """Of an fp32 model: autocast rounds the backbone, and neither head."""
    options = {"cast_lm_head_to_fp32": True, "bf16": True, "beta": 0.04}
    subject, plain = make(make_model("Qwen3", tie_word_embeddings=tied), options)
    inputs = with_log_probs(batch(), plain)
    (loss, gradients, metrics), (wanted_loss, wanted, wanted_metrics) = (
        compute(one, inputs) for one in (subject, plain)
    )
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-5)
    assert metrics == pytest.approx(wanted_metrics, rel=1e-5, abs=1e-6, nan_ok=True)
    for name, gradient in gradients.items():  # one number may fall on the other side of a rounding of the backbone
        assert float((gradient - wanted[name]).norm()) <= 1e-3 * float(wanted[name].norm()), name


def test_head_in_full_precision_from_logits(make):
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32=True with from_logits=True"):
        make(make_model("Qwen3"), {"cast_lm_head_to_fp32": True}, from_logits=True)


@pytest.mark.parametrize("family", SEEING)
def test_models_that_see(make, family):
    """The loss, its gradient also through the images' encoder, and the old pass in slices of two rows."""
    model = make_seeing(family)
    subject, plain = make(model, {"beta": 0.04, "loss_type": "dapo", "gradient_accumulation_steps": 2})
    inputs = with_images(family, batch())
    images = {name: inputs[name] for name in OF_IMAGES if name in inputs}
    tokens = (torch.cat([inputs[f"prompt_{n}"], inputs[f"completion_{n}"]], 1) for n in ("ids", "mask"))
    arguments, found = (*tokens, inputs["completion_ids"].shape[1]), []
    live = inputs["completion_mask"] != 0
    for one in (subject, plain):
        with torch.no_grad():
            passes = one._get_per_token_logps_and_entropies
            old = passes(one.model, *arguments, batch_size=2, compute_entropy=True, **images)
            without = passes(one.model, *arguments, **dict.fromkeys(images))[0]
            ref = passes(one.ref_model, *arguments, batch_size=2, **images)[0]
        assert float((old[0] - without)[live].abs().max()) > 0.01  # the images count
        found.append([values[live] for values in (old[0], old[1], ref)])
    for value, wanted in zip(*found, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    assert_same(subject, plain, inputs)


def save_processor(folder, path):
    """Save LLaVA's processor over the tokenizer of single characters."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.image_token, tokenizer.image_token_id = "<image>", tokenizer.convert_tokens_to_ids("<image>")
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    part = "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    content = "{% for part in message.content %}" + part + "{% endfor %}"
    text = "{% if message.content is string %}{{ message.content }}{% else %}" + content + "{% endif %}"
    transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for message in messages %}" + text + "{% endfor %}",
    ).save_pretrained(path)
    return tokenizer.image_token_id


def test_ten_steps_with_images(folder, tmp_path):
    """TRL's own processor, collation, shuffling and generation around an image in every prompt."""
    image = pytest.importorskip("PIL.Image")
    image_token = save_processor(folder, tmp_path / "processor")
    changes = {"image_token_index": image_token, "text_config": {"vocab_size": image_token + 1}}
    make_seeing("Llava", **changes).save_pretrained(tmp_path / "model")
    colours = [(40 * i % 255, 90, 255 - 30 * i) for i in range(8)]
    rows = {
        "prompt": [
            [{"role": "user", "content": text}] for text in ("ABC", "HELLO", "Q", "XYZW", "AB", "LM", "PQ", "T")
        ],
        "image": [image.new("RGB", (8, 8), colour) for colour in colours],
    }
    runs = []
    for kind in (FusedGRPOTrainer, trl.GRPOTrainer):
        options = {**FIXED, **PLAIN, "output_dir": str(tmp_path), "beta": 0.04}
        subject = kind(
            model=transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "model"),
            processing_class=transformers.LlavaProcessor.from_pretrained(tmp_path / "processor"),
            reward_funcs=lambda completions, **_: [float(len(set(one[0]["content"]))) for one in completions],
            args=trl.GRPOConfig(**options),
            train_dataset=datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()),
        )
        runs.append(subject)
    encoder = runs[0].model.model.vision_tower.embeddings.patch_embedding.weight
    before = encoder.detach().clone()
    assert_same_runs(*runs, lambda name, _: "vision_tower" in name)  # whose last layer LLaVA does not use
    assert float((encoder - before).abs().max()) > 1e-5


ADAPTERS = {
    "backbone": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "every linear layer but the head": {"target_modules": "all-linear"},
    "DoRA": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "a head of its own": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
    "embeddings of its own": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("beta", [pytest.param(0.0, marks=pytest.mark.nightly), 0.04])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(folder, tmp_path, name, beta):
    """With beta, the reference is the model without its adapter: under modules_to_save the head as it was."""
    peft = pytest.importorskip("peft")
    pair = []
    for kind in (FusedGRPOTrainer, trl.GRPOTrainer):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, init_lora_weights=False, **ADAPTERS[name])
        pair.append(trainer(kind, folder, tmp_path, options={"beta": beta}, peft_config=config))
    assert pair[0].ref_model is None
    trained = [name for name, each in pair[0].model.named_parameters() if each.requires_grad]
    assert any("lora" in each for each in trained)
    assert any("lm_head" in each for each in trained) == (name == "a head of its own")
    assert_same_runs(*pair, lambda name, _: name not in trained)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_an_adapter_on_the_head(folder, tmp_path, options):
    """TRL's constructor refuses it, since its own loss would not train it: the same as from the model's own logits,
    the reference being the head without it."""
    peft = pytest.importorskip("peft")
    pair = []
    for from_logits in (False, True):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "lm_head"], **options)
        keywords = {"peft_config": config, "from_logits": from_logits}
        pair.append(trainer(FusedGRPOTrainer, folder, tmp_path, options={"beta": 0.04}, **keywords))
    trained = [name for name, each in pair[0].model.named_parameters() if each.requires_grad]
    head = pair[0].model.get_parameter(next(name for name in trained if "lm_head.lora_B" in name))
    before = head.detach().clone()
    assert_same_runs(*pair, lambda name, _: name not in trained)
    assert (head - before).abs().max() > 1e-5
    assert pair[0].state.log_history[0]["kl"] > 1e-3


def test_an_adapter_on_the_head_that_trl_refuses(folder, tmp_path):
    """Its fp32 head goes around the adapter; and TRL's own trainer refuses as before."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"])

    class Own(trl.GRPOTrainer):
        """Whose log-probs are TRL's, in which the adapter has no part."""

        def _compute_loss(self, model, inputs):
            return trl.GRPOTrainer._compute_loss(self, model, inputs)

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            return trl.GRPOTrainer._get_per_token_logps_and_entropies(self, *args, **kwargs)

    mixed = type("Mixed", (Own, FusedGRPOTrainer), {})
    layer = trl.trainer.grpo_trainer.BaseTunerLayer
    with pytest.raises(TypeError, match="concatenate list"):  # while the check is passed over
        trainer(FusedGRPOTrainer, folder, tmp_path, peft_config=config, options={}, callbacks=5)
    assert trl.trainer.grpo_trainer.BaseTunerLayer is layer
    for kind, options in ((FusedGRPOTrainer, {"cast_lm_head_to_fp32": True}), (trl.GRPOTrainer, {}), (mixed, {})):
        with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
            trainer(kind, folder, tmp_path, options=options, peft_config=config)


def test_an_adapter_that_was_trained_before(folder, tmp_path):
    """TRL keeps a copy of it under the name of "ref": the reference pass is that copy's."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=["lm_head"])
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    pair = []
    for kind in (FusedGRPOTrainer, trl.GRPOTrainer):
        base = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
        pair.append(trainer(kind, folder, tmp_path, options={"beta": 0.1}, model=model))
    assert "ref" in pair[0].model.peft_config
    trained = [name for name, each in pair[0].model.named_parameters() if each.requires_grad]
    assert_same_runs(*pair, lambda name, _: name not in trained or ".ref." in name)


def test_an_adapter_on_a_mixture(folder, tmp_path):
    peft = pytest.importorskip("peft")
    pair = []
    for kind in (FusedGRPOTrainer, trl.GRPOTrainer):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
        options = {"beta": 0.04, "router_aux_loss_coef": 0.1}
        pair.append(trainer(kind, folder, tmp_path, options=options, model=make_model("Qwen3Moe"), peft_config=config))
    assert pair[0].aux_loss_enabled
    trained = [name for name, each in pair[0].model.named_parameters() if each.requires_grad]
    assert_same_runs(*pair, lambda name, _: name not in trained)


SAMPLED = ("Qwen3Moe", "Gemma2", "Cohere2", "NemotronH")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in SAMPLED else pytest.mark.nightly)
        for name in (*DENSE, *MIXTURES, *WITHOUT)
    ],
)
def test_ten_steps_of_every_family(make, family):
    """Generation, rewards, reference, optimizer and all, at TRL's coefficient of the family's auxiliary loss."""
    start = make_model(family)
    subject, plain = make(start, {"beta": 0.04, "gradient_accumulation_steps": 2, "loss_type": "dapo"})
    assert subject.aux_loss_enabled == (family in MIXTURES)
    assert_same_runs(subject, plain, lambda name, _: True)
