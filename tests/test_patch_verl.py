"""What ``patch_verl`` does to verl, on a stand-in with verl's names and signatures; tests/test_verl_parity.py has verl
itself."""

from __future__ import annotations

import importlib
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from grpo_kernels import KL, Clip, LossConfig
from grpo_kernels.integrations import patching
from grpo_kernels.integrations.verl import loss_config, patch_verl
from grpo_kernels.integrations.verl_losses import LOSSES, MISSING

CORE = "verl.trainer.ppo.core_algos"
LOGITS = "verl.utils.torch_functional"
HEAD = "verl.utils.experimental.torch_functional"
KERNEL = "verl.utils.kernel.linear_cross_entropy"
ENGINE = "verl.workers.engine.fsdp.transformer_impl"
MODES = (*LOSSES, *MISSING)
LOSS = "(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode=0, config=None, rollout_is_weights=None)"
SOURCES = {
    "verl": "__version__ = '0.9.1'",
    CORE: f"""
POLICY_LOSS_REGISTRY = {{}}
def register_policy_loss(name):
    def decorator(function):
        POLICY_LOSS_REGISTRY[name] = function
        return function
    return decorator
for mode in {MODES!r}:
    @register_policy_loss(mode)
    def loss{LOSS}: return "verl's"
""",
    LOGITS: """
def logprobs_from_logits(logits, labels, inplace_backward=True): return "verl's"
def entropy_from_logits(logits): return "verl's"
def entropy_from_logits_with_chunking(logits, chunk_size=2048): return "verl's"
""",
    HEAD: """
class FusedLinearForPPO:
    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0): return "verl's"
""",
    KERNEL: """
class LinearCrossEntropy:
    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None): pass
    @classmethod
    def apply(cls, *args): return "verl's", args
linear_cross_entropy = LinearCrossEntropy.apply
""",
    ENGINE: f"from {LOGITS} import logprobs_from_logits",
}


@pytest.fixture
def verl(monkeypatch):
    """The stand-in's modules by name; whatever a test leaves patched is undone."""
    modules = {}
    for name, source in SOURCES.items():
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(source, vars(module))
        modules[name] = module
    yield modules
    if "verl" in patching._patches:
        patching._patches["verl"].undo()


def functions(verl) -> dict:
    """Everything of the stand-in that a patch may change."""
    found = {f"{name}.{key}": value for name, module in verl.items() for key, value in vars(module).items()}
    found |= {f"loss {mode}": loss for mode, loss in getattr(verl[CORE], "POLICY_LOSS_REGISTRY", {}).items()}
    found["forward"] = getattr(getattr(verl[HEAD], "FusedLinearForPPO", None), "forward", None)
    return {name: value for name, value in found.items() if callable(value)}


def changed(before: dict, after: dict) -> set[str]:
    return {name for name, value in after.items() if before[name] is not value}


OPERATORS = {
    *(f"{LOGITS}.{name}" for name in ("logprobs_from_logits", "entropy_from_logits")),
    *(f"{LOGITS}.entropy_from_logits_with_chunking", "forward", f"{KERNEL}.linear_cross_entropy"),
    f"{ENGINE}.logprobs_from_logits",
}
REGISTERED = {f"loss {mode}" for mode in MODES}


@pytest.mark.parametrize(("losses", "operators"), [(True, True), (True, False), (False, True)])
def test_patch_and_undo(verl, losses, operators):
    """Also of what a module has imported by name; and of a module that imported ours."""
    before = functions(verl)
    patch = patch_verl(losses=losses, operators=operators)
    assert changed(before, functions(verl)) == (REGISTERED if losses else set()) | (OPERATORS if operators else set())
    late = verl[ENGINE].late = types.ModuleType("verl.late")
    sys.modules["verl.late"] = late
    try:
        late.entropy_from_logits = verl[LOGITS].entropy_from_logits
        patch.undo()
        assert late.entropy_from_logits is before[f"{LOGITS}.entropy_from_logits"]
    finally:
        del sys.modules["verl.late"]
    assert changed(before, functions(verl)) == set()
    patch.undo()


def test_a_patch_of_a_block_ends_with_it(verl):
    before = functions(verl)
    with pytest.raises(ZeroDivisionError), patch_verl():
        1 / 0
    assert changed(before, functions(verl)) == set()


def test_two_patches_at_once_are_refused(verl):
    message = "expected verl as it was installed; got one that is patched"
    with patch_verl(operators=False), pytest.raises(RuntimeError, match=message):
        patch_verl()
    patch_verl().undo()


def test_a_version_that_is_not_known_is_refused(verl):
    verl["verl"].__version__ = "0.10.0"
    with pytest.raises(RuntimeError, match=r"patch_verl: written for verl 0\.9\.1 and its internals; got 0\.10\.0"):
        patch_verl()


def test_without_verl(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ImportError, match=r"pip install verl==0\.9\.1"):
        patch_verl()


def moved_arguments(verl):
    exec("def entropy_from_logits(logits, temperature): pass", vars(verl[LOGITS]))
    return r"entropy_from_logits to be verl's \(logits\); got .*\(logits, temperature\)"


def moved_away(verl):
    del verl[HEAD].FusedLinearForPPO.forward
    return r"FusedLinearForPPO\.forward; got nothing"


def moved_class(verl):
    del verl[HEAD].FusedLinearForPPO
    return r"FusedLinearForPPO\.forward; got nothing"


def somebody_elses(verl):
    def logprobs_from_logits(logits, labels, inplace_backward=True):
        pass

    verl[LOGITS].logprobs_from_logits = logprobs_from_logits
    return "logprobs_from_logits to be verl's"


def somebody_elses_loss(verl):
    exec(f"def loss{LOSS}: pass", scope := {"__name__": "recipe"})
    verl[CORE].POLICY_LOSS_REGISTRY["gspo"] = scope["loss"]
    return r'the policy loss "gspo" to be verl\'s'


def unregistered(verl):
    del verl[CORE].POLICY_LOSS_REGISTRY["cispo"]
    return 'the policy loss "cispo"; got nothing'


def without_registry(verl):
    del verl[CORE].POLICY_LOSS_REGISTRY
    return "POLICY_LOSS_REGISTRY; got nothing"


def another_kernel(verl):
    verl[KERNEL].linear_cross_entropy = lambda *args: None
    return r"linear_cross_entropy to be LinearCrossEntropy\.apply"


MOVES = (
    *(moved_arguments, moved_away, moved_class, somebody_elses, somebody_elses_loss, unregistered, without_registry),
    another_kernel,
)


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_a_hook_that_moved_is_refused_before_anything_is_changed(verl, move):
    message = move(verl)
    before = functions(verl)
    with pytest.raises(RuntimeError, match=message):
        patch_verl()
    assert not patching._patches
    assert changed(before, functions(verl)) == set()


def test_what_was_replaced_since_stays(verl):
    before = functions(verl)
    patch = patch_verl()
    own = verl[CORE].POLICY_LOSS_REGISTRY["gspo"] = lambda: None
    with pytest.warns(UserWarning, match='patch_verl: the policy loss "gspo" had been replaced since'):
        patch.undo()
    assert changed(before, functions(verl)) == {"loss gspo"}
    assert verl[CORE].POLICY_LOSS_REGISTRY["gspo"] is own


def test_the_plugin_patches_where_it_is_imported(verl, monkeypatch):
    name = "grpo_kernels.integrations.verl_plugin"
    monkeypatch.delitem(sys.modules, name, raising=False)
    before = functions(verl)
    plugin = importlib.import_module(name)
    assert changed(before, functions(verl)) == OPERATORS | REGISTERED
    plugin.patch.undo()
    assert changed(before, functions(verl)) == set()
    del sys.modules[name]


def actor(loss_mode="vanilla", **options):
    """verl's ActorConfig, its defaults, as far as a loss reads it."""
    return SimpleNamespace(
        **{
            **dict(
                clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_c=3.0, tau_pos=1.0, tau_neg=1.05
            ),
            **dict(loss_agg_mode="token-mean", loss_scale_factor=None, entropy_coeff=0.0, use_kl_loss=False),
            **dict(kl_loss_coef=0.001, kl_loss_type="low_var_kl", global_batch_info={}),
            **options,
        },
        policy_loss=SimpleNamespace(loss_mode=loss_mode, dro_beta=options.get("dro_beta")),
    )


def test_options_make_a_config():
    options = actor(
        clip_ratio_high=0.28, loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=512, use_kl_loss=True,
        entropy_coeff=0.01,
    )  # fmt: skip
    assert loss_config(options) == LossConfig(
        Clip(0.2, 0.28, dual=3.0),
        aggregation="constant",
        constant_length=512,
        kl=KL(0.001, limit=(20.0, 10.0)),
        entropy_coef=0.01,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *((dict(loss_mode=mode), f'do not have loss_mode="{mode}"; supported: vanilla') for mode in MISSING),
        (dict(loss_mode="gsp"), "Did you mean 'gspo'"),
        (dict(loss_agg_mode="token_mean"), "verl: loss_agg_mode must be one of .* got 'token_mean'"),
        (dict(clip_ratio_c=1.1), r"do not have clip_ratio_c=1\.1 with an upper bound of 1 \+ 0\.2"),
        (dict(loss_mode="dro"), r"dro with policy_loss\.dro_beta=None"),
        (dict(use_kl_loss=True, kl_loss_type="full"), 'do not have kl_loss_type="full"'),
        (dict(loss_mode="sapo", use_kl_loss=True), 'loss_mode="sapo" beside a KL or entropy in loss_agg_mode'),
    ],
)
def test_what_has_no_counterpart_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        loss_config(actor(**options))


def call(verl, mode, **options):
    torch.manual_seed(0)
    log_prob = -torch.rand(3, 4)
    given = actor(mode, **options)
    mask = torch.ones(3, 4, dtype=torch.bool)
    arguments = {"old_log_prob": log_prob - 0.1, "log_prob": log_prob, "advantages": torch.randn(3, 4)}
    return verl[CORE].POLICY_LOSS_REGISTRY[mode](
        **arguments, response_mask=mask, loss_agg_mode="token-mean", config=given
    )


@pytest.mark.parametrize("mode", MISSING)
def test_a_mode_without_a_counterpart_raises_where_it_is_called(verl, mode):
    with patch_verl(), pytest.raises(ValueError, match=rf'"{mode}".*patch_verl\(losses=False\) keeps verl\'s own'):
        call(verl, mode)
    assert call(verl, mode) == "verl's"


def test_several_ranks_need_the_global_batch(verl):
    with patch_verl(), pytest.raises(ValueError, match="batch_num_tokens of the global batch with dp_size=2"):
        call(verl, "vanilla", global_batch_info={"dp_size": 2})


def test_advantages_of_a_geometric_mean_are_one_for_each_sequence(verl):
    with patch_verl(), pytest.raises(ValueError, match="advantages that differ within a sequence"):
        call(verl, "geo_mean")


def test_a_head_over_ranks_stays_verls(verl):
    hidden, weight, labels = torch.randn(1, 5, 8), torch.randn(16, 8), torch.randint(16, (1, 5))
    group = object()
    with patch_verl():
        kernel = verl[KERNEL].linear_cross_entropy
        assert kernel(hidden, weight, labels, 1.0, "none", group) == (
            "verl's",
            (hidden, weight, labels, 1.0, "none", group),
        )
        assert kernel(hidden, weight, labels, 1.0, "sum")[0] == "verl's"
        log_probs, entropy = kernel(hidden, weight, labels, 1.0)
        assert log_probs.shape == entropy.shape == (5,)
        wanted = (hidden @ weight.T).log_softmax(-1).gather(-1, labels[..., None]).flatten()
        torch.testing.assert_close(log_probs, wanted)


GPG = f"""
def gpg{LOSS}:
    return -factor * (log_prob * advantages * response_mask).sum() / response_mask.sum(), {{}}
POLICY_LOSS_REGISTRY["gpg"] = gpg
"""


@pytest.mark.parametrize(("factor", "level"), [(1.0, "INFO"), (1.01, "WARNING")])
def test_shadow_compares_with_verls_own(verl, caplog, factor, level):
    """Every third call, of whatever mode; what trains is ours, once, and what verl's changes is seen."""
    verl[CORE].factor = factor
    exec(GPG, vars(verl[CORE]))
    caplog.set_level("INFO", "grpo_kernels.shadow")
    with patch_verl(shadow=3):
        losses = [call(verl, "gpg")[0] for _ in range(6)]
    lines = [record for record in caplog.records if record.name == "grpo_kernels.shadow"]
    assert [record.levelname for record in lines] == [level] * 2
    assert [record.message.split(":")[0] for record in lines] == ["shadow, call 0", "shadow, call 3"]
    assert f"{factor * losses[0].item():.5g}"[:6] in lines[0].message.split("(verl)")[0]
    with patch_verl():
        assert all(torch.equal(loss, call(verl, "gpg")[0]) for loss in losses)
    assert len(caplog.records) == 2


def test_a_shadow_that_fails_does_not_stop_training(verl, caplog):
    """The stand-in's own loss is a text."""
    with patch_verl(shadow=1):
        call(verl, "vanilla")
    assert "shadow, call 0: not compared: " in caplog.text


@pytest.mark.parametrize("shadow", [-1, True, 0.5, "50"])
def test_shadow_is_a_number_of_calls(verl, shadow):
    before = functions(verl)
    with pytest.raises(ValueError, match="patch_verl: expected shadow to be an int >= 0"):
        patch_verl(shadow=shadow)
    assert changed(before, functions(verl)) == set()
