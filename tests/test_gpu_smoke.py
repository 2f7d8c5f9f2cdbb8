"""benchmarks/gpu_smoke.py over the emulator: each step sees its fault; hangs and faults stay where they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_calls
import gpu_process
import gpu_rows
import gpu_smoke
import gpu_steps
import pytest
import torch
from gpu_calls import Setting, Shape

from grpo_kernels.backends import cuda

ROOT = Path(__file__).resolve().parent.parent
CPU = Setting("cpu", small=True)
emulated = pytest.mark.skipif(not cuda.emulated(), reason="it needs the emulator")


@emulated
def test_every_step_holds(tmp_path, capsys):
    """In this process, as under compute-sanitizer."""
    rows = tmp_path / "rows"
    assert gpu_smoke.main(["--device", "cpu", "--no-fork", "--small", "--rows", str(rows)]) == 0
    names = [name for name, _ in gpu_smoke.steps(small=True)]
    assert [row["name"] for row in gpu_rows.read(rows) if "passed" in row] == names
    out = capsys.readouterr().out
    assert "every step held" in out
    assert out.index(f"{names[1]}\n") < out.index("1x512 bfloat16: log-prob error") < out.index(f"{names[2]}\n")


def onehot(rows, *_):
    """The third row of a gradient without its softmax: off by 1e-2 in L2, by 1e-3 at most in an element."""
    row = torch.zeros(rows.vocab)
    row[rows.token_ids[0, 2]] = -1.0 / rows.token_ids.numel()
    return row


def in_one_pass(setting, *shapes):
    return gpu_steps.pairs(setting, gpu_calls.Pair.one_pass, *shapes)


def in_two_passes(setting, *shapes):
    return gpu_steps.pairs(setting, gpu_calls.Pair.two_passes, *shapes)


FAULTS = {
    "log-probs": (gpu_steps.sums, "log_probs", lambda *given: given[1].log_prob.add_(1e-4)),
    "gradient": (gpu_steps.gradients, "log_probs_backward", lambda *given: given[-1].mul_(1.01)),
    "unwritten": (gpu_steps.gradients, "log_probs_backward", lambda *given: given[-1][0, 1, -1:].fill_(torch.nan)),
    "slope": (gpu_steps.one_pass, "fused_loss", lambda *given: given[-1].mul_(0.99)),
    "bits": (gpu_steps.one_pass, "fused_loss", lambda *given: given[3].log_prob.nextafter_(torch.zeros(()))),
    "slope of a row": (gpu_steps.one_pass, "fused_loss", lambda *given: given[-1][0, 1].mul_(2)),
    "a row of the gradient": (gpu_steps.gradients, "log_probs_backward", lambda *given: given[-1][0, 1].mul_(2)),
    "target alone": (gpu_steps.one_pass, "fused_loss", lambda *given: given[-1][0, 2].copy_(onehot(*given))),
    "policy": (gpu_steps.one_pass, "fused_loss", lambda *given: given[4].policy[0, 1].fill_(torch.nan)),
    "KL": (gpu_steps.one_pass, "fused_loss", lambda *given: given[4].kl[0, 1].add_(1e-3)),
    "flags": (gpu_steps.one_pass, "fused_loss", lambda *given: given[4].flags[0, 1].fill_(1)),
    "live row's slope": (gpu_steps.dead_rows, "fused_loss", lambda *given: given[-1][0, 3].mul_(2)),
    "dead row": (gpu_steps.dead_rows, "fused_loss", lambda *given: given[-1][0, 0, 5:6].fill_(1)),
    "live row": (gpu_steps.dead_rows, "fused_loss", lambda *given: given[-1][0, 3].zero_()),
    "divergence": (in_one_pass, "fused_divergence", lambda *given: given[8].divergence[0, 1].mul_(1.001)),
    "gradient of a pair": (in_two_passes, "divergence_backward", lambda *given: given[-1][0, 1].mul_(1.05)),
    "race": (gpu_steps.races, "fused_loss", lambda *given: given[-1][0, 2, 3].copy_(torch.rand(()))),
}
"""A step, the function that goes wrong under it, and what it does to its arguments after it has run."""


@emulated
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_sees_its_fault(monkeypatch, fault, capsys):
    step, name, spoil = FAULTS[fault]
    function = getattr(cuda, name)
    shape = Shape(4, 520)
    assert step(CPU, shape)
    assert "WRONG" not in capsys.readouterr().out

    def spoiled(*arguments):
        function(*arguments)
        spoil(*arguments)

    monkeypatch.setattr(cuda, name, spoiled)
    assert not step(CPU, shape)
    assert "<-- WRONG" in capsys.readouterr().out


def test_hangs_and_faults_are_named(tmp_path, monkeypatch, capfd):
    """Each within its deadline, and the steps after it run; what would only repeat or time it is left out."""
    monkeypatch.setattr(gpu_smoke, "START", 0.5)
    rows = tmp_path / "rows"
    planted = [
        ("fine", lambda setting: True),
        ("hangs", lambda setting: time.sleep(60)),
        ("faults", lambda setting: os.kill(os.getpid(), signal.SIGKILL)),
        ("wrong", lambda setting: False),
        ("fine again", lambda setting: True),
        ("races", lambda setting: True),
    ]
    start = time.monotonic()
    failed = gpu_smoke.run(planted, Setting("cpu", patience=0.5, rows=rows), seconds=60.0)
    assert failed == ["hangs", "faults", "wrong"]
    assert time.monotonic() - start < 10
    how = {row["name"]: row["how"] for row in gpu_rows.read(rows)}
    assert how["hangs"] == "stopped at its deadline, after 1 s"
    assert how["faults"] == "killed by SIGKILL"
    assert how["wrong"] == "a wrong result"
    assert how["fine again"] == ""
    out = capfd.readouterr().out
    assert "FAILED: faults: killed by SIGKILL" in out
    assert "races: left out after a failure" in out
    assert out.rstrip().endswith("FAILED: hangs; faults; wrong")


def test_all_steps_together_have_a_deadline(monkeypatch):
    """However many hang: those that have no time left fail at once."""
    monkeypatch.setattr(gpu_smoke, "MARGIN", 0.5)
    start = time.monotonic()
    planted = [(f"hangs {i}", lambda setting: time.sleep(60)) for i in range(4)]
    assert len(gpu_smoke.run(planted, CPU, seconds=2.0)) == 4
    assert time.monotonic() - start < 6


def test_a_step_that_cannot_be_killed_is_the_last(monkeypatch, capfd):
    kill, pids = os.kill, set()
    monkeypatch.setattr(gpu_smoke, "START", 0.1)
    monkeypatch.setattr(gpu_process, "GRACE", 0.3)
    monkeypatch.setattr(os, "kill", lambda pid, number: pids.add(pid))
    try:
        planted = [("stuck", lambda setting: time.sleep(60)), ("next", lambda setting: True)]
        assert gpu_smoke.run(planted, Setting("cpu", patience=0.1), 60.0) == ["stuck"]
    finally:
        for pid in pids:
            kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    out = capfd.readouterr().out
    assert "FAILED: stuck: held by the driver" in out
    assert "no further step" in out
    assert "  next" not in out


def test_a_launch_that_hangs(monkeypatch, capfd):
    """It is named by the process itself, without a call that waits for the device."""

    class Event:
        def record(self):
            pass

        def query(self):
            return False

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(gpu_smoke, "START", 5.0)
    step = ("launch", lambda setting: gpu_calls.wait(setting, "fused_loss 3x5"))
    assert gpu_smoke.run([step], Setting("cuda", patience=0.2), 60.0) == ["launch"]
    out = capfd.readouterr().out
    assert "HANG: fused_loss 3x5 has not finished after 0 s" in out
    assert "FAILED: launch: a launch that hangs" in out


@pytest.fixture
def device_calls(monkeypatch):
    """What is queued on a device, in order; a call takes 2 ms there, and sleeping keeps it busy meanwhile."""
    queue = []

    class Stopwatch:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self):
            queue.append("mark")

        def elapsed_time(self, other):
            return 2.0

    def queued(function, name):
        return lambda *arguments: (queue.append(name), function(*arguments))[1]

    monkeypatch.setattr(torch.cuda, "Event", Stopwatch)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append("busy"))
    monkeypatch.setattr(gpu_steps, "COPIED", 10**6)
    monkeypatch.setattr(gpu_calls.Batch, "per_row", queued(gpu_calls.Batch.per_row, "tensor"))
    for name in ("log_probs", "fused_loss"):
        monkeypatch.setattr(cuda, name, queued(getattr(cuda, name), name))
    return queue


@emulated
def test_times(tmp_path, device_calls):
    """A copy's bandwidth, and times beside it: bytes over seconds."""
    rows = tmp_path / "rows"
    assert gpu_steps.times(Setting("cpu", rows=rows), Shape(4, 520))
    copy, k3, plain = gpu_rows.read(rows)
    assert copy == {"name": "copy", "copy_gb_per_s": pytest.approx(1.0)}
    assert (k3["name"], plain["name"]) == ("4x520 bfloat16, k3 KL", "4x520 bfloat16, no KL")
    assert k3["logits_bytes"] == 4 * 520 * 2
    assert [k3[f"{name}_ms"] for name in ("one_pass", "in_place", "log_probs")] == [2.0, 2.0, 2.0]
    assert k3["of_copy"] == pytest.approx(2 * 4160 / 1e9 / 2e-3)
    clusters = cuda.plan(0, torch.bfloat16, 520).clusters
    assert k3["us_per_row_and_cluster"] == pytest.approx(2000 * clusters / 4)


@emulated
def test_times_are_of_the_device_alone(device_calls):
    """Between the marks of a time is one call of the kernels, queued while the device is busy; what replaces the
    logits is timed last."""
    gpu_steps._time(Setting("cpu"), Shape(4, 520), 0.0, 1e9)
    calls = [name for name in device_calls if name != "tensor"]
    assert calls == [name for kernel in ("log_probs", "fused_loss", "fused_loss")
                     for name in (kernel, *9 * ("busy", "mark", kernel, "mark"))]  # fmt: skip
    assert "tensor" not in device_calls[device_calls.index("busy") :]


def test_cuda_is_not_touched_before_the_forks():
    """A forked process cannot use it after that."""
    code = f"""
import sys
sys.path[:0] = [{str(ROOT / "benchmarks")!r}]
import torch
def touched(*arguments):
    raise SystemExit("CUDA is touched")
for name in ("is_available", "device_count", "init", "current_device", "get_device_properties", "_lazy_init"):
    setattr(torch.cuda, name, touched)
import gpu_smoke
gpu_smoke.fork = lambda function, seconds: gpu_smoke.Ended(0, 0.0)
raise SystemExit(gpu_smoke.main([]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every step held" in result.stdout


def test_chosen_steps(capsys):
    everything = gpu_smoke.steps(small=True)

    def names(only, skip):
        return [name for name, _ in gpu_smoke.chosen_of(everything, only, skip)]

    assert names([], []) == [name for name, _ in everything]
    assert all("fused" in name for name in names(["fused"], []))
    assert len(names(["fused"], ["clusters of 4"])) == len(names(["fused"], [])) - 1
    assert not [name for name in names([], ["unaligned"]) if "unaligned" in name]
    with pytest.raises(SystemExit, match="2"):
        gpu_smoke.main(["--only", "fusd"])
    assert "no step is left; there are environment; log-probs, one block, one row" in capsys.readouterr().err


def test_rows_while_they_are_written(tmp_path):
    file = tmp_path / "rows"
    assert gpu_rows.read(file) == []
    gpu_rows.write(file, "first", ms=1.5, errors=[float("nan"), {"of": float("inf")}])
    with file.open("a") as more:
        more.write(json.dumps({"name": "half a row"}))
    assert gpu_rows.read(file) == [{"name": "first", "ms": 1.5, "errors": [None, {"of": None}]}]
