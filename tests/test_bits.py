"""Bitwise promises: a row's log-prob does not depend on its company, the route, threads or the instruction set."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import INTERPRETED, make

from grpo_kernels import Clip, Divergence, LossConfig, Teacher, grpo_loss, token_log_probs
from grpo_kernels.backends import cpu
from grpo_kernels.objectives.divergence import KINDS
from grpo_kernels.verification.verify import complete

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CSRC = Path(__file__).resolve().parent.parent / "csrc" / "cpu"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [33, 5000, 32000])
@pytest.mark.sample(triton=1)
def test_log_probs_do_not_depend_on_the_route(backend, dtype, vocab):
    """No-grad, with grad, two passes and one pass; with unchanged weights the ratio is exactly 1."""
    case = make(batch=3, length=4, vocab=vocab, dtype=dtype, empty=False)
    with torch.no_grad():
        expected = token_log_probs(case.logits, case.token_ids, case.mask, backend=backend)
    leaf = case.logits.clone().requires_grad_()
    graded = token_log_probs(leaf, case.token_ids, case.mask, backend=backend)
    assert torch.equal(graded.log_probs, expected.log_probs)
    assert torch.equal(graded.entropy, expected.entropy)
    old = {"old_log_probs": expected.log_probs, "ref_log_probs": expected.log_probs}
    for config in ("grpo", "gspo", complete("grpo", entropy_coef=0.01)):
        for scale in (1.0, None):
            out, _ = case.run(backend, config=config, grad_scale=scale, **old)
            assert torch.equal(out.log_probs, expected.log_probs)
            assert torch.equal(out.entropy, expected.entropy)
            assert out.metrics.ratio_min == out.metrics.ratio_max == 1
            assert out.metrics.kl == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 1000])
@pytest.mark.parametrize("vocab", [3, 257])
@pytest.mark.sample(triton=1)
def test_a_row_does_not_depend_on_its_batch(backend, dtype, rows, vocab):
    logits = (3 * torch.randn(1, rows, vocab)).to(dtype)
    ids = torch.randint(vocab, (1, rows))
    together = token_log_probs(logits, ids, backend=backend)
    for r in range(0, rows, max(1, rows // 5)):
        alone = token_log_probs(logits[:, r : r + 1], ids[:, r : r + 1], backend=backend)
        assert torch.equal(alone.log_probs[0, 0], together.log_probs[0, r])
        assert torch.equal(alone.entropy[0, 0], together.entropy[0, r])


def test_long_rows_do_not_depend_on_their_batch(backend):
    logits = torch.randn(1, 5, 151_936)
    ids = torch.randint(151_936, (1, 5))
    together = token_log_probs(logits, ids, backend=backend)
    for r in range(5):
        alone = token_log_probs(logits[:, r : r + 1], ids[:, r : r + 1], backend=backend)
        assert torch.equal(alone.log_probs[0, 0], together.log_probs[0, r])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1000, 1001, 9000])
def test_alignment_changes_nothing(backend, dtype, vocab):
    """Rows that begin on 16 bytes, on 8, 4 and 2, and two that begin on different ones."""
    values = (3 * torch.randn(2, 3, vocab)).to(dtype)
    ids = torch.randint(vocab, (2, 3))
    expected = token_log_probs(values, ids, backend=backend)
    for stride, shift in ((vocab, 4), (vocab, 2), (vocab, 1), (vocab + 1, 0), (-(-vocab // 8) * 8, 0)):
        logits = torch.empty(6 * stride + shift, dtype=dtype)[shift:].as_strided(values.shape, (3 * stride, stride, 1))
        logits.copy_(values)
        out = token_log_probs(logits, ids, backend=backend)
        assert torch.equal(out.log_probs, expected.log_probs), (stride, shift)
        assert torch.equal(out.entropy, expected.entropy), (stride, shift)


@pytest.mark.parametrize("config", [complete("grpo"), complete("gspo"), LossConfig(Clip(), entropy_coef=0.1)], ids=str)
def test_repeats_and_threads(backend, config):
    interpreted = backend == "triton" and INTERPRETED  # one program after the other, however many there are
    case = make(batch=4, length=6 if interpreted else 80, vocab=3000)
    expected, expected_gradient = case.run(backend, config=config)
    for threads in (2, 1, 2, 1, 3):
        torch.set_num_threads(threads)
        out, gradient = case.run(backend, config=config)
        assert torch.equal(gradient, expected_gradient)
        assert torch.equal(out.log_probs, expected.log_probs)
        assert torch.equal(out.loss, expected.loss)


def test_calls_from_several_threads(backend):
    if backend == "triton" and INTERPRETED:
        pytest.skip("Triton's interpreter keeps the grid position in one global object")
    from concurrent.futures import ThreadPoolExecutor

    cases = [make(seed=seed, vocab=3000) for seed in range(6)]
    expected = [case.run(backend) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda case: case.run(backend), cases * 4))
    for (out, gradient), (expected_out, expected_gradient) in zip(results, itertools.cycle(expected), strict=False):
        assert torch.equal(gradient, expected_gradient)
        assert torch.equal(out.loss, expected_out.loss)


def outputs(instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Everything a set of calls returns, with that instruction set forced."""
    monkeypatch.setenv("GRPO_KERNELS_CPU_ISA", instruction_set)
    assert cpu.instruction_set() == instruction_set
    results = []
    for dtype, vocab in itertools.product(DTYPES, (1, 31, 97, 4097, 9001)):
        case = make(batch=3, length=4, vocab=vocab, dtype=dtype, empty=False)
        for options in (
            {"grad_scale": 1.0},
            {"config": "gspo"},
            {"grad_scale": 1.0, "entropy_coef": 0.1},
            {"grad_scale": 1.0, "logit_softcap": 4.0},
        ):
            out, gradient = case.run("cpu", **options)
            results += [out.loss, out.log_probs, out.entropy, gradient, out.metrics.vector]
        for kind, level in itertools.product(KINDS, ("token", "sequence")):
            config = LossConfig(Clip(), level=level, divergence=Divergence(kind, mix=0.3))
            teacher = Teacher(logits=case.logits.roll(1, -1))
            out, gradient = case.run("cpu", config=config, teacher=teacher, grad_scale=1.0)
            results += [out.loss, gradient, out.metrics.vector]
    return results


def fast_sets() -> list[str]:
    return [name for name in cpu.available_instruction_sets() if name != "generic"]


def test_vector_instruction_sets_agree_bitwise(monkeypatch):
    """AVX2 and AVX-512 run the same operations in the same order."""
    sets = fast_sets()
    if len(sets) < 2:
        pytest.skip(f"this processor runs only {sets} (the emulation below covers the other)")
    a, b = (outputs(name, monkeypatch) for name in sets)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", cpu.INSTRUCTION_SETS)
def test_every_instruction_set_obeys_the_rule(name, monkeypatch):
    from test_loss import check

    if name not in cpu.available_instruction_sets():
        pytest.skip(f"this processor does not run {name} (test_emulated_avx512_agrees_bitwise covers its source)")
    monkeypatch.setenv("GRPO_KERNELS_CPU_ISA", name)
    for dtype, vocab in itertools.product(DTYPES, (31, 4097)):
        for options in ({}, {"logit_softcap": 5.0}, {"temperature": 0.7}):
            case = make(batch=3, length=4, vocab=vocab, dtype=dtype, **options)
            check(case, "cpu", config=complete("dapo"))
            check(case, "cpu", config=complete("grpo", entropy_coef=0.1))


def test_emulated_avx512_agrees_bitwise(monkeypatch, tmp_path):
    """avx512.h compiled over SIMDe's portable AVX-512: the same bits as AVX2, on a processor that has no AVX-512."""
    simde = pytest.importorskip("simde_py", reason="SIMDe's headers (simde-py) emulate AVX-512")
    if "avx2" not in cpu.available_instruction_sets():
        pytest.skip("the comparison needs AVX2")
    expected = outputs("avx2", monkeypatch)
    compiler = os.environ.get("CXX", "c++")
    flags = "-O1 -std=c++17 -fPIC -ffp-contract=off -fno-math-errno -fopenmp -w -mavx2 -mfma -mf16c"
    shim = Path(__file__).with_name("simde_avx512.h")
    include = Path(simde.__file__).parent / "simde"
    emulated, library = tmp_path / "emulated.o", tmp_path / "library.so"
    # It takes the generic set's place in the library, which has no other.
    avx512 = ["-DGRPO_ISA_NAME=generic", "-DGRPO_ISA_AVX512", f"-I{include}", "-include", str(shim)]
    kernels = [*avx512, "-c", str(CSRC / "kernels.cpp"), "-o", str(emulated)]
    for arguments in (kernels, ["-shared", str(CSRC / "library.cpp"), str(emulated), "-o", str(library)]):
        subprocess.run([compiler, *flags.split(), *arguments], check=True, timeout=500)
    loaded = cpu.declared(ctypes.CDLL(str(library)))
    calls = []
    original = loaded.grpo_cpu_fused_loss

    def counted(params):
        calls.append(1)
        return original(params)

    loaded.grpo_cpu_fused_loss = counted
    monkeypatch.setattr(cpu, "library", lambda: loaded)
    got = outputs("generic", monkeypatch)
    assert calls
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_forced_instruction_set_must_exist(monkeypatch):
    monkeypatch.setenv("GRPO_KERNELS_CPU_ISA", "avx1024")
    with pytest.raises(RuntimeError, match=r"GRPO_KERNELS_CPU_ISA=avx1024: this machine runs generic"):
        grpo_loss(torch.randn(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1), backend="cpu")


def test_import_order_of_openmp():
    """The library and torch share one OpenMP runtime, whichever is loaded first."""
    code = (
        f"import ctypes; from pathlib import Path; ctypes.CDLL({str(cpu.LIBRARY)!r}); import torch, grpo_kernels as g;"
        "x = torch.randn(1, 64, 5000, requires_grad=True); "
        "ids = torch.zeros(1, 64, dtype=torch.int64); g.grpo_loss(x, ids, torch.ones(1)).loss.backward(); "
        "print(x.grad.sum().item())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert abs(float(result.stdout)) < 1e-4
