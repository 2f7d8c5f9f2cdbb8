"""Every test runs with deterministic algorithms on, which also fills each torch.empty with NaN: memory that is read
before it is written shows."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

from grpo_kernels import backends

os.environ.setdefault("HF_HUB_OFFLINE", "1")

hypothesis.settings.register_profile("ci", max_examples=80, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("nightly", max_examples=400, deadline=None, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def usable_backends() -> list[str]:
    request = backends.Request(torch.device("cpu"))
    return [name for name in backends.names() if backends.get(name).unsupported(request) is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``backend`` runs on every backend that is usable here: a new one needs no new test."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", usable_backends())


@pytest.fixture(autouse=True)
def _deterministic():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
