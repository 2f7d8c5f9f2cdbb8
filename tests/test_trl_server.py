"""TRL's ``vllm_mode="server"`` without vLLM: a stand-in for its client answers as the server would, with log-probs that
are not the trainer's, and the fused trainer honours what TRL makes of them."""

from __future__ import annotations

import pytest
import torch

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

import trl_cases  # noqa: E402
from trl.generation import vllm_generation  # noqa: E402
from trl_cases import BOUNDS, SIZES, assert_same_runs, run_of, trainer  # noqa: E402

from grpo_kernels.integrations.trl import FusedGRPOTrainer, patch_trl  # noqa: E402

pytestmark = pytest.mark.peers
folder = trl_cases.folder
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


class Server:
    """TRL's client and the server behind it: a policy that takes the trainer's weights, and rounds its logits as an
    engine in another precision would."""

    def __init__(self, base_url=None, group_port=0, connection_timeout=0.0):
        self.drawn, self.taken = 0, 0
        self._weights, self._generator = {}, torch.Generator().manual_seed(11)
        self._model = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(pad_token_id=0, eos_token_id=1, bos_token_id=None, **SIZES)
        ).eval()

    def init_communicator(self, device): ...
    def reset_prefix_cache(self): ...

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, parameters):
        found = dict(parameters)
        assert [name for name, *_ in metadata] == list(found)
        self._model.load_state_dict({name: value.detach() for name, value in found.items()})
        self.taken += 1

    @torch.no_grad()
    def generate(self, prompts, features=None, *, n, temperature, max_tokens, logprobs, **sampling):
        assert features is None
        assert logprobs == 0
        completions, found = [], []
        for prompt in prompts:
            for _ in range(n):
                ids, log_probs = list(prompt), []
                while len(log_probs) < max_tokens and (not log_probs or ids[-1] != 1):
                    logits = self._model(input_ids=torch.tensor([ids])).logits[0, -1] / temperature
                    noise = 0.3 * torch.randn(logits.shape, generator=self._generator)
                    row = (logits + noise).log_softmax(-1)
                    ids.append(int(torch.multinomial(row.exp(), 1, generator=self._generator)))
                    log_probs.append([float(row[ids[-1]])])
                completions.append(ids[len(prompt) :])
                found.append(log_probs)
        self.drawn += len(completions)
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": found}


@pytest.fixture
def serve(folder, tmp_path, monkeypatch):
    """Trainers of both kinds, each with a server of its own."""
    monkeypatch.setattr(vllm_generation, "VLLMClient", Server)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)

    def made(kind, **options):
        options = {"use_vllm": True, "vllm_mode": "server", "beta": 0.04, "num_iterations": 2, **options}
        return trainer(kind, folder, tmp_path, options=options)

    return made


CAPS = {"token_truncate": (0.8, 1.25), "token_mask": (0.55, 1.8)}
CAPS |= dict.fromkeys(("sequence_truncate", "sequence_mask"), (0.6, 1.6))
"""Below which and above which some of the server's tokens are, or some of its sequences; masks leave most of VESPO's,
which one masked token silences."""


CASES = [*((mode, "dapo") for mode in MODES), *((mode, "vespo") for mode in MODES[:2])]
"""VESPO multiplies the weights into its ratio, and TRL has it with tokens' alone; test_trl.py has the other losses."""


ALWAYS = (("token_truncate", "dapo", "token"), ("sequence_mask", "dapo", "sequence"))
"""In every run; the others are nightly."""


@pytest.mark.parametrize(
    ("mode", "loss_type", "level"),
    [
        pytest.param(*case, marks=() if case in ALWAYS else pytest.mark.nightly)
        for case in ((*pair, level) for pair in CASES for level in ("token", "sequence"))
    ],
)
def test_ten_steps(serve, mode, loss_type, level):
    """Logs (TRL's sampling/ metrics among them) and weights of both trainers, with ratios cut on both sides."""
    low, high = CAPS[mode]
    options = {"loss_type": loss_type, "importance_sampling_level": level, **BOUNDS.get(loss_type, {})}
    options |= {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": high}
    options |= {"vllm_importance_sampling_clip_min": low}
    subject, plain = (serve(kind, **options) for kind in (FusedGRPOTrainer, trl.GRPOTrainer))
    assert_same_runs(subject, plain)
    client = subject.vllm_generation.vllm_client
    assert (client.drawn, client.taken) == (5 * 4, 5)  # a generation lasts for two steps
    logs = subject.state.log_history[:-1:2]
    least, most = (f"sampling/importance_sampling_ratio/{name}" for name in ("min", "max"))
    least, most = min(row[least] for row in logs), max(row[most] for row in logs)
    if mode.endswith("truncate"):
        assert (least, most) == (pytest.approx(low), pytest.approx(high))
    else:
        assert least == 0 < most <= high


@pytest.mark.nightly
def test_the_weights_matter(serve):
    """Runs that could not tell them would be no tests: without the correction the same batches train other weights."""
    runs = [run_of(serve(FusedGRPOTrainer, vllm_importance_sampling_correction=on))[1] for on in (True, False)]
    assert max(float((one - other).abs().max()) for one, other in zip(*map(dict.values, runs), strict=True)) > 1e-4


@pytest.mark.nightly
@pytest.mark.parametrize(
    "options", [{"off_policy_mask_threshold": 0.02}, {"vllm_importance_sampling_correction": False}]
)
def test_what_else_reads_the_samplers_log_probs(serve, options):
    """The off-policy mask takes the sampler's in the place of old log-probs; without the correction nothing does."""
    assert_same_runs(*(serve(kind, **options) for kind in (FusedGRPOTrainer, trl.GRPOTrainer)))


def test_the_patch(serve):
    """TRL's own trainer with its operators replaced, in front of the same server."""
    plain, subject = serve(trl.GRPOTrainer), serve(trl.GRPOTrainer)
    wanted = run_of(plain)
    with patch_trl():
        log, weights = run_of(subject)
    for row, other in zip(log, wanted[0], strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5, nan_ok=True)
    for name, value in weights.items():
        torch.testing.assert_close(value, wanted[1][name], rtol=1e-4, atol=1e-6, msg=name)
