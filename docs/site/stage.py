"""Make the site's pages in a folder: every document that README.md leads to, and the reference of what is public.

    python docs/site/stage.py build/docs    # then: mkdocs build -f build/docs/mkdocs.yml

Documents keep their places, so that links between them are as they are. What no link leads to is not on the site. The
navigation is that of docs/README.md.
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent.parent
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```.*?^```", re.M | re.S)
INDEX = "docs/README.md"
KINDS = (("functions", inspect.isfunction), ("classes", inspect.isclass), ("modules", inspect.ismodule))
"""The pages of the reference, in the order of the navigation."""


def targets(document: Path) -> Iterator[Path]:
    """Yield the files of the repository that a document links to."""
    for address in LINK.findall(BLOCK.sub("", document.read_text())):
        path = unquote(address.split("#")[0])
        if path and not re.match(r"[a-z]+:", path):
            yield (document.parent / path).resolve()


def reachable() -> list[Path]:
    """Return README.md and every file that documents lead to from there, of folders none of what they hold."""
    found: dict[Path, None] = {}
    waiting = [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found[path] = None
        if path.suffix == ".md":
            waiting += targets(path)
    return sorted(found)


def navigation() -> list[tuple[str, list[str]]]:
    """Return the sections of the index and the documents of each."""
    sections: list[tuple[str, list[str]]] = []
    for line in (ROOT / INDEX).read_text().splitlines():
        if line.startswith("## "):
            sections.append((line[3:], []))
        elif line.startswith("- ["):
            before = line.split(": ", 1)[0]
            pages = [target for target in LINK.findall(before) if target.endswith(".md")]
            sections[-1][1].extend((ROOT / "docs" / page).resolve().relative_to(ROOT).as_posix() for page in pages)
    return sections


def title(page: str) -> str:
    """Return a document's name: its first heading."""
    return next(line[2:] for line in (ROOT / page).read_text().splitlines() if line.startswith("# "))


def public() -> dict[str, list[tuple[str, str]]]:
    """Return what ``grpo_kernels`` has, by kind: (name, where it is defined)."""
    import grpo_kernels

    found: dict[str, list[tuple[str, str]]] = {name: [] for name, _ in KINDS}
    for name in grpo_kernels.__all__:
        value = getattr(grpo_kernels, name)
        kind = next(kind for kind, is_one in KINDS if is_one(value))
        place = value.__name__ if kind == "modules" else f"{value.__module__}.{value.__qualname__}"
        found[kind].append((name, place))
    return found


def reference(names: list[tuple[str, str]], kind: str) -> str:
    """Return a page of the reference."""
    entries = [f"# Reference: {kind}", f"Public {kind} of `grpo_kernels`, from their docstrings."]
    return "\n\n".join([*entries, *(f"::: {place}" for _, place in names)]) + "\n"


def stage(folder: Path) -> None:
    """Write the site's sources into ``folder``, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = folder / "pages"
    for path in reachable():
        place = pages / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(served(path)) if path.suffix == ".md" else shutil.copy(path, place)
    (pages / "reference").mkdir()
    for kind, names in public().items():
        (pages / "reference" / f"{kind}.md").write_text(reference(names, kind))
    shutil.copy(Path(__file__).with_name("site.css"), pages / "site.css")
    settings = Path(__file__).with_name("mkdocs.yml").read_text()
    (folder / "mkdocs.yml").write_text(settings + "docs_dir: pages\nsite_dir: ../site\n" + _written(navigation()))


def served(document: Path) -> str:
    """Return a document in which folders, of which a site has no page, are no links."""

    def without_folder(match: re.Match[str]) -> str:
        path = (document.parent / unquote(match[2].split("#")[0])).resolve()
        return match[1] if path.is_dir() else match[0]

    return re.sub(r"\[([^\]]+)\]\(([^)\s:]+)\)", without_folder, document.read_text())


def _written(sections: list[tuple[str, list[str]]]) -> str:
    lines = ["nav:", "  - Home: README.md", f"  - Documents: {INDEX}"]
    for section, pages in sections:
        lines += [f"  - {section}:", *(f"      - {_quoted(title(page))}: {page}" for page in pages)]
    lines += ["  - Reference:", *(f"      - {kind.capitalize()}: reference/{kind}.md" for kind, _ in KINDS)]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''").replace("`", "") + "'"


if __name__ == "__main__":
    stage(Path(sys.argv[1]).resolve())
