"""Every example runs on a tiny model, without a network, and does what it says."""

from __future__ import annotations

import ast
import importlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "common")


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """generate() has no deterministic cumsum; on a CPU its results are deterministic all the same."""
    torch.use_deterministic_algorithms(False)


def run(name: str, *options: str) -> Any:
    return importlib.import_module(name).main([*options, "--device", "cpu"])


def assert_rises(curve: list[float], by: float) -> None:
    """From its first steps to its last."""
    assert sum(curve[-3:]) / 3 >= sum(curve[:3]) / 3 + by, curve


def test_plain_loop():
    assert_rises(run("plain_loop", "--steps", "20"), by=0.3)


def test_a_pretrained_model(tmp_path):
    """From a folder, with its own tokenizer, whose padding is its end token."""
    common = importlib.import_module("common")
    common.tiny_model().save_pretrained(tmp_path)
    tokenizer = common.tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.eos_token = "<eos>"
    tokenizer.save_pretrained(tmp_path)
    assert len(run("plain_loop", "--model", str(tmp_path), "--steps", "1")) == 1
    model, tokenizer = common.load(str(tmp_path), "cpu")
    assert tokenizer.pad_token == "<eos>"

    def drawn(model):
        torch.manual_seed(0)
        random.seed(0)
        return [record["input_ids"].tolist() for record in common.sample(model, tokenizer)[0]]

    wanted = drawn(model)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 2.0, "eos_token_id": [1, 50]}  # a second end, and another distribution
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert drawn(common.load(str(tmp_path), "cpu")[0]) == wanted


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--lr", "nan"], ["--lr", "-1"]], ids=" ".join)
def test_options_that_cannot_be(arguments, capsys):
    with pytest.raises(SystemExit):
        run("plain_loop", *arguments)
    assert "--steps must be at least 1 and --lr > 0; got" in capsys.readouterr().err


def test_the_last_step_is_shown(capsys):
    run("plain_loop", "--steps", "2")
    assert capsys.readouterr().out.startswith("step 2: reward ")


def test_ranks_that_are_missing(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="torchrun --nproc-per-node 2 examples/fsdp2.py"):
        run("fsdp2")


def test_packed_sequences():
    found = run("packed_sequences", "--steps", "15")
    for step in found:
        assert step["loss"] == pytest.approx(step["padded loss"], rel=1e-3, abs=1e-7)
        assert abs(step["loss"]) > 1e-5
        assert step["rows"] < step["padded rows"]
    assert found[-1]["reward"] > found[0]["reward"] + 0.2


def test_own_objective():
    from grpo_kernels import LossConfig, grpo_loss

    assert_rises(run("own_objective", "--steps", "20"), by=0.3)
    soft = importlib.import_module("own_objective").SoftClip(0.4)
    logits = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    ids, A, old = torch.randint(11, (2, 3)), torch.tensor([[1.0], [-2.0]], dtype=torch.float64), -2.5
    ratio = (logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1) - old).exp()
    wanted = -(A * (1 + 0.4 * torch.tanh((ratio - 1) / 0.4))).mean()
    (gradient,) = torch.autograd.grad(wanted, logits)
    config = LossConfig(soft, aggregation="token_mean")
    out = grpo_loss(logits, ids, A, old_log_probs=torch.full((2, 3), old).double(), config=config)
    out.loss.backward()
    torch.testing.assert_close(out.loss, wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-9, atol=1e-12)


def test_distillation():
    curve = run("distillation", "--steps", "25")
    assert sum(curve[-3:]) / 3 < 0.6 * curve[0], curve


@pytest.mark.peers
def test_lora():
    pytest.importorskip("peft")
    assert_rises(run("lora", "--steps", "15"), by=0.3)


@pytest.mark.peers
def test_trl_trainer():
    for package in ("trl", "reasoning_gym"):
        pytest.importorskip(package)
    assert_rises(run("trl_trainer", "--steps", "10"), by=0.05)


@pytest.mark.ranks
@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_fsdp2():
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*start, str(FOLDER / "fsdp2.py"), "--steps=10", "--device=cpu"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, env=variables, text=True, capture_output=True, timeout=300)
    assert found.returncode == 0, found.stderr
    rewards = [float(reward) for reward in re.findall(r"reward (\S+),", found.stdout)]
    assert len(rewards) == 2  # of the first rank alone
    assert rewards[-1] > rewards[0] + 0.1


def test_every_example_is_short_and_says_how_it_runs():
    """What it shows in its first line, and the commands for a tiny and a real model."""
    assert len(EXAMPLES) == 7
    for path in EXAMPLES:
        source = path.read_text()
        documented = ast.get_docstring(ast.parse(source))
        assert documented is not None
        assert documented.splitlines()[0].endswith("."), path.name
        assert len(re.findall(rf"(?:python|torchrun .*) examples/{path.name}", documented)) >= 2, path.name
        assert "--model " in documented, path.name
        assert len(source.splitlines()) <= 90, path.name


def test_every_example_is_in_the_table_and_tested():
    page = (ROOT / "docs" / "examples.md").read_text()
    tests = Path(__file__).read_text()
    for path in EXAMPLES:
        assert f"(../examples/{path.name})" in page, path.name
        assert f"def test_{path.stem}()" in tests, path.name
