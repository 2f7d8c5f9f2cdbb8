"""The parts: which nightly tests each has, and which files' changes make its last run worth nothing."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

KERNELS = (
    "grpo_kernels/**",
    *(f"!grpo_kernels/{folder}/**" for folder in ("bench", "integrations", "matching", "training")),
)
"""What any backend computes with."""
CUDA = (*KERNELS, "csrc/cuda/**", "csrc/common/**", "tests/cuda_emulator/**")
PTX = ("grpo_kernels/backends/**", "csrc/cuda/**", "csrc/common/**", "tests/ptx/**")
CPU = ("csrc/cpu/**", "csrc/common/**")
MUTATED = (*KERNELS, "tests/*.py", "tests/mutants/**", "tests/fuzz_abi/**")
ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = ("tests", "benchmarks", "examples", "release")
"""Where tests import from beside the package."""
EVERY = ("tests/conftest.py", "tests/cases.py", "constraints.txt")
ON_TRITON, ON_CUDA = r"[\[-]triton[\]-]", r"[\[-]cuda[\]-]"
"""Ids of a backend's cases."""
ON_NONE = r"^(?!.*[\[-](triton|cuda|cpu|torch)[\]-])(?!.*test_ops.*inductor)"
"""Those of no backend in particular, but for those of Inductor, which have a part."""


def reach(file: str, found: set[str]) -> None:
    """Add a file, and what it imports of FOLDERS, to what was found; of a package all files."""
    if file in found or not (ROOT / file).is_file():
        return
    found.add(file)
    if not file.endswith(".py"):
        return
    for module in _imports((ROOT / file).read_text()):
        for folder in FOLDERS:
            reach(f"{folder}/{module}.py", found)
            if (ROOT / folder / module / "__init__.py").exists():
                for path in sorted((ROOT / folder / module).rglob("*.py")):
                    reach(path.relative_to(ROOT).as_posix(), found)


@functools.cache
def _imports(text: str) -> frozenset[str]:
    """The first names of what a file imports; of ``tests`` the second."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(name.removeprefix("tests.").partition(".")[0] for name in names)


@dataclasses.dataclass(frozen=True)
class Part:
    minutes: int
    """An estimate for two cores, from the cases that run for every change; the table has what it took."""
    files: tuple[str, ...]
    guarded: tuple[str, ...]
    """Globs besides those of the part's own files; with a ! before it, what they leave out."""
    cases: str = ""
    """What the ids of its tests in these files match; of every one, if empty."""
    folder: str = ""
    """In the environment, of packages that its tests alone see: tests/nightly/FOLDER.txt has what is in it."""

    @property
    def guards(self) -> tuple[str, ...]:
        """What is named, and what its files import of the tests, benchmarks, examples and release scripts."""
        found: set[str] = set()
        for file in (*(f"tests/{file}.py" for file in self.files), *EVERY):
            reach(file, found)
        return (*self.guarded, *sorted(found))

    def takes(self, item: pytest.Item) -> bool:
        nightly = item.get_closest_marker("nightly") is not None
        return nightly and item.path.stem in self.files and re.search(self.cases, item.nodeid) is not None


ROWS = (
    "test_loss",
    "test_numerics",
    "test_row_stats",
    "test_bits",
    "test_autograd",
    "test_support",
    "test_recorded",
    "test_recorded_teacher",
    "test_ops",
    "test_registration",
)
CALLS = (
    "test_linear",
    "test_layout",
    "test_inputs",
    "test_aggregation",
    "test_metrics",
    "test_policy",
    "test_temperatures",
    "test_token_losses",
    "test_divergence",
    "test_vocabulary",
    "test_prefix_ratios",
    "test_rollout_kl",
)


def system(minutes: int, name: str, *files: str) -> Part:
    """The part of a package that is patched."""
    guarded = ("grpo_kernels/**", "csrc/cpu/**", "csrc/common/**", f"tests/nightly/{name}.txt", "tests/systems.py")
    return Part(minutes, files, guarded, folder=name)


VERSIONED = ("tests/test_ops.py", "tests/test_triton.py", "tests/test_hf.py", "tests/test_training.py")
"""Of what runs with other versions, the files that know of them."""

PARTS = {
    "cuda": Part(5, (*ROWS, *CALLS, "test_zero_weights"), CUDA, ON_CUDA),
    "cuda-kernels": Part(
        2, ("test_cuda", "test_divergence_cuda"), (*CUDA, "tests/test_loss.py", "tests/test_numerics.py")
    ),
    "triton-rows": Part(12, ROWS, KERNELS, ON_TRITON),
    "triton-calls": Part(12, CALLS, KERNELS, ON_TRITON),
    "triton-zero-weights": Part(12, ("test_zero_weights",), KERNELS, ON_TRITON),
    "cpu": Part(4, ("test_numerics", "test_ops", "test_zero_weights"), (*KERNELS, "csrc/**"), r"[\[-](cpu|torch)[\]-]"),
    "compiled": Part(
        12,
        ("test_build", "test_triton", "test_divergence_triton", "test_gpu_parts", "test_surrogates", "test_ops"),
        (*KERNELS, "csrc/**", "tests/triton_offline.py", "setup.py", "pyproject.toml"),
        r"inductor|tests/test_(?!ops)",
    ),
    "long": Part(
        2,
        (
            "test_bench",
            "test_blocks",
            "test_divergence",
            "test_nightly",
            "test_ops",
            "test_oracle",
            "test_policy",
            "test_recorded_teacher",
            "test_registration",
            "test_rollout_kl",
            "test_sequence_group",
            "test_token_losses",
        ),
        ("grpo_kernels/**", "csrc/**", "tests/nightly/*.py"),
        ON_NONE,
    ),
    "fuzz": Part(
        25,
        ("test_raw_bits", "test_fuzz_abi"),
        (*KERNELS, "csrc/**", "tests/cuda_emulator/**", "tests/raw_bits.py", "tests/fuzz_abi/**", "tests/corpus/**"),
    ),
    "compositions": Part(2, ("test_compositions",), (*KERNELS, "csrc/**", "tests/compositions/**")),
    "architectures": Part(2, ("test_architectures",), (*KERNELS, "csrc/cpu/**", "tests/architectures/**")),
    "ptx": Part(20, ("test_ptx",), PTX, "test_all_cases|test_settlers|test_counts"),
    "ptx-faults": Part(20, ("test_ptx",), PTX, "test_planted_fault"),
    "mutants-python": Part(15, ("test_mutants",), MUTATED, r"\[python|interrupted"),
    "mutants-written": Part(20, ("test_mutants",), MUTATED, r"\[written python"),
    "mutants-triton": Part(20, ("test_mutants",), MUTATED, r"\[(written )?triton"),
    "mutants-cpp": Part(12, ("test_mutants",), (*MUTATED, *CPU), r"\[cpp"),
    "mutants-cuda": Part(20, ("test_mutants",), (*MUTATED, *CUDA), r"\[(written )?cuda"),
    "repeats": Part(15, ("test_repeats",), (*KERNELS, "csrc/**")),
    "match": Part(17, ("test_match", "test_match_others", "test_match_peers"), ("grpo_kernels/**",)),
    "commands": Part(
        6, ("test_training", "test_training_ranks", "test_memory", "test_cli"), ("grpo_kernels/**", "csrc/**")
    ),
    "soak": Part(13, ("test_soak",), ("grpo_kernels/**", *CPU, "tests/soak/**")),
    "trl": Part(
        12,
        ("test_trl", "test_trl_models", "test_trl_server", "test_patch_trl"),
        ("grpo_kernels/**", *CPU, "tests/trl_*.py"),
    ),
    "verl": system(3, "verl", "test_verl", "test_verl_parity", "test_verl_ranks"),
    "openrlhf": system(4, "openrlhf", "test_openrlhf"),
    "skyrl": system(4, "skyrl", "test_skyrl"),
    **{
        f"versions-{name}": Part(
            12,
            ("test_versions",),
            ("grpo_kernels/**", *CPU, *VERSIONED, f"tests/nightly/versions/{name}.txt"),
            rf"\[{name}\]",
        )
        for name in ("lowest", "middle", "newest", "triton")
    },
    "release": Part(
        12,
        ("test_release",),
        (
            "grpo_kernels/**",
            *CPU,
            "tests/installed.py",
            "release/*.py",
            "setup.py",
            "pyproject.toml",
            "MANIFEST.in",
            "PUBLISHING.md",
            "README.md",
        ),
    ),
    "gpu-check": Part(20, ("test_gpu_rehearsal",), (*CUDA, "benchmarks/gpu_*.py", "tests/test_gpu_check.py")),
}
