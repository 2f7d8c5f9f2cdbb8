"""README runs, and its tables are the registry's and the results'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import grpo_kernels
from grpo_kernels.info import presets_table, surrogates_table
from grpo_kernels.objectives.metrics import REPORTED

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def section(marker: str) -> str:
    match = re.search(rf"<!-- {re.escape(marker)}.*?-->\n(.*?)<!-- end -->", README, re.S)
    assert match, marker
    return match[1].strip()


def test_every_block_runs(capsys):
    """In order, in one namespace, as a reader would paste them."""
    torch.use_deterministic_algorithms(False)
    namespace: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 6
    eager = None
    for block in blocks:
        exec(compile(block, "README", "exec"), namespace)
        if block.startswith("# before"):
            eager = namespace["loss"].item(), namespace["logits"].grad.clone()
            namespace["logits"].grad = None
        if block.startswith("# after"):
            assert namespace["out"].loss.item() == pytest.approx(eager[0], rel=1e-5, abs=1e-7)
            torch.testing.assert_close(namespace["logits"].grad, eager[1], rtol=1e-4, atol=1e-8)
        if block.startswith("from grpo_kernels import match"):
            printed = str(grpo_kernels.match(namespace["my_loss"])).splitlines()
            shown = re.search(r"```text\n(your loss is.*?)```", README, re.S)[1].splitlines()
            assert printed.pop(1).startswith("  largest relative gradient difference")
            assert shown.pop(1).startswith("  largest relative gradient difference")
            assert shown == printed
        if block.startswith("from grpo_kernels import shadow"):
            assert namespace["loss_fn"].history[0].gradient_difference < 1e-5


def test_presets_table():
    assert section("presets") == presets_table()


def test_surrogates_table():
    assert section("surrogates") == surrogates_table()


FIGURES = (
    "training_step",
    "loss_headline",
    "loss_logits_summary",
    "loss_hidden_summary",
    "train_sort",
    "trl_step",
    "surrogates",
)


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_the_committed_results(name):
    """No figure by hand: the table is a results file, whole."""
    assert section(f"figures: {name}") in [p.read_text().strip() for p in ROOT.glob(f"benchmarks/results/*/{name}.md")]


def test_names_in_the_text_exist():
    """`metrics` and public names that the README mentions."""
    metrics = re.findall(r"metrics\.(\w+)", README)
    assert metrics
    for name in metrics:
        assert name in REPORTED or hasattr(grpo_kernels.Metrics, name), name
    for name in grpo_kernels.__all__:
        documented = getattr(grpo_kernels, name).__doc__
        assert documented, name
    imported = re.findall(r"from grpo_kernels import (.*)", README)
    assert imported
    for name in {name.strip() for line in imported for name in line.split(",")}:
        assert name in grpo_kernels.__all__, name


def test_links_lead_somewhere():
    targets: list[str] = []
    for text in (README, *((ROOT / name).read_text() for name in ("CONTRIBUTING.md", "SWITCHING.md"))):
        targets += re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_tree_of_the_architecture():
    """Every module of the package has its place in ARCHITECTURE.md."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    paths = list((ROOT / "grpo_kernels").glob("*.py"))
    assert paths
    for path in paths:
        assert path.name in text, path.name


@pytest.mark.peers
def test_switching_pays_no_price():
    """Every block of SWITCHING.md runs, and each "after" has the loss and the gradients of its "before"."""
    for package in ("trl", "peft", "accelerate"):
        pytest.importorskip(package)
    torch.use_deterministic_algorithms(False)
    namespace: dict = {}
    wanted, compared = None, 0
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "SWITCHING.md").read_text(), re.S):
        exec(compile(block, "SWITCHING", "exec"), namespace)
        if not block.startswith(("# before", "# after")):
            continue
        found = {name: p.grad for name, p in namespace["model"].named_parameters() if p.grad is not None}
        if block.startswith("# before"):
            wanted = float(namespace["loss"]), found
            continue
        assert float(namespace["loss"]) == pytest.approx(wanted[0], rel=1e-5, abs=1e-7)
        assert found.keys() == wanted[1].keys()
        largest = max(float(gradient.abs().max()) for gradient in found.values())
        assert largest > 1e-5
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[1][name], rtol=1e-3, atol=1e-5 * largest, msg=name)
        compared += 1
    assert compared == 5
