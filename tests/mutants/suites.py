"""Which sources have faults made of them, how many, and which tests must notice those."""

from __future__ import annotations

import fnmatch
from typing import NamedTuple


class Suite(NamedTuple):
    """The tests of some files, those first that are likeliest to notice: the first failure ends a run."""

    files: tuple[str, ...]
    """Globs, of paths in the repository."""
    tests: tuple[str, ...]
    cases: str = ""
    """pytest -k."""
    build: str = ""
    """What is compiled: "cpu SET" (csrc/cpu for one instruction set) or "cuda" (csrc/cuda over the emulator)."""
    every: int = 75
    """A fault for as many lines that have any, and at least one of a file."""

    @property
    def language(self) -> str:
        if self.files[0].startswith("csrc"):
            return "cuda" if self.build == "cuda" else "cpp"
        return "triton" if "/triton/" in self.files[0] else "python"


def python(files: str, tests: str) -> Suite:
    """Of files of the package, on every backend but the interpreted and the emulated ones."""
    names = tuple(f"grpo_kernels/{file}" for file in files.split())
    return Suite(names, tuple(tests.split()), "not triton and not cuda")


def triton(files: str, tests: str) -> Suite:
    names = tuple(f"grpo_kernels/backends/triton/{file}.py" for file in files.split())
    return Suite(names, tuple(tests.split()), "triton", every=24)


def cpp(files: str, tests: str, cases: str = "cpu", instruction_set: str = "avx2") -> Suite:
    names = tuple(f"csrc/{file}" for file in files.split())
    return Suite(names, tuple(tests.split()), cases, f"cpu {instruction_set}", every=24)


def cuda(files: str, tests: str) -> Suite:
    names = tuple(f"csrc/{file}" for file in files.split())
    return Suite(names, tuple(tests.split()), "cuda", "cuda", every=20)


DIVERGENCES = "test_divergence_kernels test_divergence"
SUITES = (
    cpp("common/surrogates.h common/terms.h", "test_surrogates test_rollout_kl test_loss"),
    cpp("common/divergences.h cpu/pair_tiles.h cpu/row_pair.h cpu/reverse_kl.h", DIVERGENCES),
    cpp("cpu/simd/generic.h", "test_loss test_numerics test_row_stats", instruction_set="generic"),
    cpp("cpu/simd/avx512.h", "test_loss test_numerics test_row_stats", instruction_set="avx512"),
    cpp("cpu/blocks.h", "test_blocks", ""),
    cpp("cpu/checks.h", "test_fuzz_abi", ""),
    cpp("cpu/token_sums.h", "test_metrics test_loss"),
    cpp(
        "common/stats.h cpu/row.h cpu/math.h cpu/types.h cpu/*.cpp cpu/simd/*.h",
        f"test_loss test_numerics test_row_stats test_bits {DIVERGENCES}",
    ),
    cuda("common/checks.h cuda/checks.h", "test_fuzz_abi"),
    cuda("cuda/divergence.h", "test_divergence_cuda " + DIVERGENCES),
    # cuda/port.h is what only a GPU has: tests/ptx plants faults in it. The CPU takes half of common/logit_map.h.
    cuda(
        "common/logit_map.h cuda/consumer.h cuda/gradient.h cuda/job.h cuda/layout.h cuda/library.cu cuda/loading.h "
        "cuda/messages.h cuda/row_kernel.h cuda/settler.h cuda/sums.h cuda/token_kernels.h cuda/vectors.h",
        "test_loss test_numerics test_row_stats test_fuzz_abi test_cuda " + DIVERGENCES,
    ),
    triton("pairs divergences", f"test_divergence_triton {DIVERGENCES}"),
    triton("surrogates", "test_surrogates test_rollout_kl test_loss"),
    triton("sums", "test_metrics test_loss"),
    triton(
        "rows maths forward gradient one_pass launch blocks __init__",
        f"test_loss test_numerics test_row_stats test_triton {DIVERGENCES} test_divergence_triton",
    ),
    python("objectives/surrogates/registration.py", "test_registration test_config"),
    python("objectives/surrogates/*.py objectives/kl.py objectives/maths.py", "test_surrogates test_loss test_config"),
    python("objectives/aggregation.py objectives/normalizer.py", "test_aggregation test_loss test_token_losses"),
    python("objectives/metrics.py", "test_metrics test_token_losses"),
    python("objectives/advantages.py", "test_advantages"),
    python("objectives/running.py objectives/levels.py", "test_prefix_ratios test_loss test_sequence_group"),
    python("objectives/sequences.py calls/packing.py", "test_packing test_layout test_aggregation test_sequence_group"),
    python("objectives/rollout.py", "test_loss test_rollout_kl test_config"),
    python("objectives/divergence.py", f"{DIVERGENCES} test_recorded_teacher"),
    python("objectives/groups.py calls/over_ranks.py", "test_sequence_group test_vocabulary test_groups"),
    python("calls/context.py", "test_packing test_sequence_group"),
    python("objectives/stored.py", "test_stored"),
    python("objectives/config.py objectives/presets.py objectives/names.py", "test_config test_stored test_inputs"),
    python("objectives/checks.py objectives/settings.py calls/contents.py", "test_inputs test_policy test_config"),
    python("calls/arguments.py", "test_linear test_inputs"),
    python("calls/teacher.py", "test_divergence test_recorded_teacher test_sequence_group"),
    python("calls/divergence.py calls/teacher_rows.py", f"test_divergence {DIVERGENCES}"),
    python("calls/recorded_teacher.py", "test_recorded_teacher"),
    python("calls/recorded.py calls/recorded_head.py backends/sets.py", "test_recorded test_recorded_teacher"),
    python("calls/support.py calls/support_sweep.py", "test_support test_temperatures"),
    python("calls/vocabulary.py calls/sharding.py", "test_vocabulary test_vocabulary_ranks test_tp"),
    python("calls/temperature.py", "test_temperatures"),
    python("calls/token_losses.py", "test_token_losses"),
    python(
        "calls/head.py calls/chunks.py calls/sweep.py linear.py", "test_linear test_head test_calls test_divergence"
    ),
    python("calls/autograd.py", "test_autograd test_linear test_layout"),
    Suite(("grpo_kernels/calls/sighting.py",), ("test_match",), "shadow"),
    python("calls/routes.py", "test_routes test_loss test_linear"),
    python("calls/provenance.py", "test_provenance"),
    python("backends/blocks.py backends/memory.py", "test_blocks test_layout"),
    python("backends/eager_divergence.py", DIVERGENCES),
    python("backends/contract.py backends/spec.py backends/ops.py", "test_contract test_ops test_autograd test_loss"),
    Suite(("grpo_kernels/backends/cuda.py",), ("test_cuda", "test_loss"), "cuda", "cuda"),
    python(
        "backends/__init__.py backends/native.py backends/c*.py",
        "test_fallback test_contract test_routes test_bits",
    ),
    python("backends/eager*.py", "test_loss test_metrics test_numerics test_row_stats test_surrogates"),
    python("verification/reference/*.py", "test_oracle test_loss test_metrics test_layout test_divergence"),
    python(
        "calls/terms.py calls/reduction.py calls/token_batch.py calls/batch.py calls/tokens.py calls/outputs.py",
        "test_loss test_surrogates test_layout test_inputs",
    ),
    python(
        "loss.py log_probs.py policy.py divergences.py calls/modules.py",
        "test_policy test_inputs test_divergence test_layout test_vocabulary test_sequence_group",
    ),
)


def suite_of(file: str) -> Suite | None:
    """The first that names it; None for a file of which no faults are made."""
    return next((suite for suite in SUITES if any(fnmatch.fnmatch(file, glob) for glob in suite.files)), None)
