"""The documentation site that ``make docs`` builds: its pages, its navigation, and that no link leads nowhere."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_kernels

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("stage", ROOT / "docs" / "site" / "stage.py")
stage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stage)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    stage.stage(folder / "docs")
    return folder / "docs" / "pages"


def test_every_document_is_reached(pages):
    """From README.md by links, and by the navigation."""
    documents = {path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md")}
    assert len(documents) > 15
    assert documents <= {path.relative_to(pages) for path in pages.rglob("*.md")}
    listed = {page for _, section in stage.navigation() for page in section}
    assert {str(path) for path in documents} - {stage.INDEX} <= listed
    assert all((pages / page).is_file() for page in listed)


def test_no_link_leads_nowhere(pages):
    links = 0
    for page in pages.rglob("*.md"):
        for target in stage.LINK.findall(stage.BLOCK.sub("", page.read_text())):
            path, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            links += 1
            assert not path or (page.parent / path).is_file(), f"{page.relative_to(pages)}: {target}"
            assert not (path.endswith(".md") and anchor) or anchor in anchors(page.parent / path), target
    assert links > 150


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as hosts of repositories make them."""
    headings = re.findall(r"^#+ (.*)$", stage.BLOCK.sub("", document.read_text()), re.M)
    words = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in words}


def test_the_reference_has_all_that_is_public(pages):
    entries = [line for page in (pages / "reference").glob("*.md") for line in page.read_text().splitlines()]
    entries = [line.removeprefix("::: ") for line in entries if line.startswith("::: ")]
    assert len(entries) == len(set(entries)) == len(grpo_kernels.__all__)
    for name in grpo_kernels.__all__:
        value = getattr(grpo_kernels, name)
        place = value.__name__ if inspect.ismodule(value) else f"{value.__module__}.{value.__qualname__}"
        assert place in entries


def test_a_document_that_nothing_leads_to_is_not_on_the_site(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# a\n[b](docs/b.md) [c](docs)\n```\n[x](docs/x.md)\n```\n")
    (tmp_path / "docs" / "b.md").write_text("# b\n[a](../README.md) [far](https://example.com)\n")
    (tmp_path / "docs" / "x.md").write_text("# x\n")
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    assert [path.name for path in stage.reachable()] == ["README.md", "b.md"]
    assert "[c](docs)" not in stage.served(tmp_path / "README.md")


def test_the_built_site_fetches_nothing(tmp_path, pages):
    """Where mkdocs is installed, as after ``make docs``: no warning, and no page loads a file of another host."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("make docs installs mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "-f", str(pages.parent / "mkdocs.yml")]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr
    html = list((pages.parent.parent / "site").rglob("*.html"))
    assert len(html) > 30
    for page in html:
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(https?:[^\"> ]+)", page.read_text())
        assert loaded == [], page
