"""python -m grpo_kernels: what a stranger sees."""

from __future__ import annotations

import json
import re

import pytest
import torch
from cases import INTERPRETED

from grpo_kernels import LossConfig, backends
from grpo_kernels.__main__ import main
from grpo_kernels.backends import cpu


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name in backends.names():
        assert re.search(f"backend +{name} +usable", text)
    assert f"in use: {cpu.instruction_set()}" in text
    assert torch.__version__ in text


def test_info_json(capsys):
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["backends"]) == set(backends.names())
    assert report["backends"]["cpu"] == report["backends"]["torch"] == "usable"
    assert report["packages"]["torch"] == torch.__version__
    assert report["cpu_library"]["in_use"] in report["cpu_library"]["instruction_sets"]


def test_info_says_why_not(capsys, monkeypatch):
    monkeypatch.setenv("GRPO_KERNELS_CPU_ISA", "sse9")
    assert main(["info"]) == 0
    assert "GRPO_KERNELS_CPU_ISA=sse9: this machine runs generic" in capsys.readouterr().out


def test_verify(capsys):
    assert main(["verify", "--vocab", "501", "--tokens", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    count = len(backends.names()) * len(LossConfig.presets()) * 4
    assert lines[-1] == f"{count} of {count} hold"
    assert sum("fp16" in line for line in lines) == count // 4


@pytest.mark.parametrize("fault", ["gradient", "log_prob", "nan"])
def test_verify_finds_a_broken_backend(capsys, monkeypatch, fault):
    """A gradient off by one part in a thousand, a log-prob off by 1e-3, a lone NaN."""
    original = cpu.fused_loss

    def broken(rows, *rest):
        original(rows, *rest)
        out, log_prob = rest[-1], rest[7]
        if fault == "gradient":
            out.mul_(1.001)
        elif fault == "log_prob":
            log_prob += 1e-3 * rows.live
        else:
            out[0, 0, 0] = float("nan")

    monkeypatch.setattr(cpu, "fused_loss", broken)
    status = main(["verify", "--vocab", "301", "--tokens", "16", "--preset", "grpo", "--dtype", "fp32"])
    text = capsys.readouterr().out
    assert status == 1
    served = 2 + INTERPRETED
    assert f"{served - 1} of {served} hold; 1 BROKEN" in text
    assert next(line for line in text.splitlines() if line.startswith("cpu")).endswith("BROKEN")


def test_verify_finds_unrepeatable_results(capsys, monkeypatch):
    original = cpu.fused_loss
    calls = []

    def wavering(rows, *rest):
        original(rows, *rest)
        calls.append(1)
        rest[-1][0, 0, 0] *= 1 + 1e-7 * len(calls)

    monkeypatch.setattr(cpu, "fused_loss", wavering)
    arguments = ["--preset", "grpo", "--dtype", "fp64", "--backend", "cpu", "--vocab", "50", "--tokens", "8"]
    assert main(["verify", *arguments]) == 1
    assert "NO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "--preset", "grop"], "--preset must be one of .*Did you mean 'grpo'"),
        (["verify", "--dtype", "fp8"], "--dtype must be one of fp32, bf16, fp16, fp64; got 'fp8'"),
        (["verify", "--backend", "cuda"], "--backend must be one of cpu, triton, torch"),
        (["verify", "--tokens", "1"], "--tokens at least 4"),
        (["verify", "--vocab", "0"], "--vocab must be at least 1"),
        (["verify", "--device", "foo"], "--device foo cannot be used here: "),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    import re

    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("error: ")


def test_help(capsys):
    for command in ([], ["info"], ["verify"], ["train"]):
        with pytest.raises(SystemExit) as caught:
            main([*command, "--help"])
        assert caught.value.code == 0
    assert "--reference-loss" in capsys.readouterr().out
