"""The plain PyTorch backend as what a CPU without compiled kernels gets: said once, and no worse than eager code."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from grpo_kernels import backends, grpo_loss
from grpo_kernels.backends import cpu


@pytest.fixture
def no_library(tmp_path, monkeypatch):
    """A CPU for which nothing was compiled."""
    caches = (cpu.library, cpu.available_instruction_sets, backends._warn_of_fallback)
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "libgrpo_cpu.so")
    (tmp_path / "libgrpo_cpu.json").write_text('{"error": "no C++ compiler found"}')
    for name in ("cuda", "triton"):  # emulated and interpreted here, they would serve CPU tensors
        monkeypatch.setattr(backends.get(name), "unsupported", lambda request: "it serves GPUs")
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def warned(function) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [warning for warning in caught if "grpo_kernels" in str(warning.message)]


def loss(logits: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    ids = torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)
    return grpo_loss(logits, ids, torch.ones(len(logits), device=logits.device), backend=backend).loss


def test_the_fallback_is_said_once(no_library):
    logits = torch.randn(2, 3, 11, requires_grad=True)
    found = warned(lambda: [loss(logits), loss(logits), loss(logits.bfloat16())])
    assert len(found) == 1
    assert found[0].category is UserWarning
    assert found[0].filename == __file__
    text = str(found[0].message)
    for part in ("no C++ compiler found", "install a C++ compiler", "python -m grpo_kernels info", "backend='torch'"):
        assert part in text


def test_nothing_is_said_where_plain_pytorch_was_asked_for_or_is_all_there_is(no_library):
    logits = torch.randn(2, 3, 11, requires_grad=True)
    assert not warned(lambda: loss(logits, "torch"))
    request = backends.Request(torch.device("meta"), torch.float32, 11)  # a device that no kernel is written for
    assert not warned(lambda: backends.choose("test", request, None))
    assert len(warned(lambda: loss(logits))) == 1


def test_nothing_is_said_with_kernels():
    backends._warn_of_fallback.cache_clear()
    assert backends.choose("test", backends.Request(torch.device("cpu")), None)[0] == "cpu"
    assert not warned(lambda: loss(torch.randn(2, 3, 11, requires_grad=True)))


def test_compiled_code_says_it_too(no_library):
    """And it stays one graph."""
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    logits = torch.randn(2, 3, 11)
    results = []
    assert len(warned(lambda: results.append(compiled(logits)))) == 1
    assert torch.equal(results[0], loss(logits, "torch"))


def test_a_fresh_process_says_it_on_stderr(tmp_path):
    code = f"""
from pathlib import Path
from grpo_kernels.backends import cpu
cpu.LIBRARY = Path({str(tmp_path / "libgrpo_cpu.so")!r})
import torch, grpo_kernels
for _ in range(3):
    grpo_kernels.token_log_probs(torch.randn(2, 3, 11), torch.zeros(2, 3, dtype=torch.int64))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "GRPO_KERNELS_CUDA_LIBRARY": ""}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("UserWarning: grpo_kernels: expected compiled kernels") == 1
    assert "no compiled library" in result.stderr
