"""What a release is made of: the page that an index shows, the files, and a newcomer's first minutes with them."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES, FILES = "https://pages.test/v{version}/", "https://files.test/v{version}/"
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```.*?^```", re.M | re.S)


@pytest.fixture(scope="module")
def setup():
    pytest.importorskip("setuptools")
    from gpu_library import setup

    return setup()


def published_text(**values: str) -> str:
    """PUBLISHING.md as it is once a publisher has filled in these rows."""
    text = (ROOT / "PUBLISHING.md").read_text()
    for name, value in values.items():
        text, count = re.subn(rf"^(\| {name}\b[^|]*\|)[^|]*\|", rf"\1 `{value}` |", text, flags=re.M)
        assert count == 1, name
    return text


def test_addresses_are_read_where_a_publisher_writes_them(setup):
    filled = {"repository": "https://r.test/x", "pages": PAGES, "files": FILES, "issues": "https://i.test"}
    assert filled.items() <= setup.published(published_text(**filled)).items()
    rows = re.findall(r"^\| (\w+)", (ROOT / "PUBLISHING.md").read_text(), re.M)
    assert rows == ["address", "repository", "index", "issues", "pages", "files", "hub", "contact"]
    text = published_text(**filled).replace("`https://r.test/x`", "<https://r.test/x>")
    assert setup.published(text)["repository"] == "https://r.test/x"


@pytest.mark.parametrize("name", ["repository", "issues", "pages", "files"])
def test_what_is_no_address_is_refused(setup, name):
    with pytest.raises(
        SystemExit, match=rf"PUBLISHING.md: {name} must be an address that begins with its protocol; got 'none yet'"
    ):
        setup.published(published_text(**{name: "none yet"}))


def test_the_page_of_an_index_leads_into_the_repository(setup):
    """Every relative link is absolute there, of the release's own version, and to a file that is here; pictures lead to
    the file itself, code is as it was."""
    readme = (ROOT / "README.md").read_text()
    page = setup.index_page(readme, {"pages": PAGES, "files": FILES}, "1.2.3")
    before, after = (LINK.findall(BLOCK.sub("", text)) for text in (readme, page))
    assert len(before) == len(after) > 20
    for (picture, target), (_, shown) in zip(before, after, strict=True):
        place = (FILES if picture else PAGES).format(version="1.2.3")
        assert shown == f"{place}{target}"
        assert (ROOT / target.partition("#")[0]).exists()
    assert BLOCK.findall(page) == BLOCK.findall(readme)


@pytest.mark.parametrize("link", ["[x](#here)", "[x](https://arxiv.org/abs/1)", "```\n[x](y)\n```\n"])
def test_what_is_not_a_file_stays(setup, link):
    assert setup.index_page(link, {"pages": PAGES, "files": FILES}, "1.2.3") == link


def test_an_address_without_its_last_slash(setup):
    link = "[x](docs/x.md) ![y](y.png)"
    bare = {"pages": PAGES.rstrip("/"), "files": FILES.rstrip("/")}
    assert setup.index_page(link, bare, "1") == setup.index_page(link, {"pages": PAGES, "files": FILES}, "1")


def test_setup_reads_its_files_whatever_the_locale():
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "setup.py", "--quiet", "--description"]
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def test_without_addresses_the_page_is_the_readme(setup):
    readme = (ROOT / "README.md").read_text()
    assert setup.index_page(readme, {}, "1.2.3") == readme
    assert setup.index_page(readme, {"files": FILES}, "1.2.3") != readme


@pytest.mark.parametrize(("link", "told"), [("docs/x.md", ["README's links"]), ("https://pages.test/x", [])])
def test_a_publisher_is_warned_outside_of_a_checkout_too(tmp_path, monkeypatch, link, told):
    """Of links that lead nowhere; a source distribution that was unpacked has no git to ask."""
    wheels = importlib.import_module("wheels")
    monkeypatch.setattr(wheels, "ROOT", tmp_path)
    (tmp_path / "x-1").mkdir()
    (tmp_path / "x-1" / "PKG-INFO").write_text(f"Name: x\n\n[x]({link})\n```\n[y](z)\n```\n")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "x-1", "x-1")
    assert [warning[: len("README's links")] for warning in wheels.dead_links(tmp_path / "x.tar.gz")] == told
    assert wheels.of_no_commit() == []


@pytest.fixture
def wheels(monkeypatch):
    """release/wheels.py, whose builds are a line of text."""
    spec = importlib.util.spec_from_file_location("wheels", ROOT / "release" / "wheels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "check_tools", lambda architectures: None)

    def written(path: Path) -> Path:
        path.parent.mkdir(exist_ok=True)
        path.write_text("a build")
        return path

    monkeypatch.setattr(module, "source_distribution", lambda folder: written(folder / "sources.tar.gz"))
    monkeypatch.setattr(module, "wheel", lambda sources, folder, architectures: written(folder / "a.whl"))
    monkeypatch.setattr(module, "dead_links", lambda sources: [])
    monkeypatch.setattr(module, "python", lambda *command: "")
    return module


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_release_is_there_when_it_is_whole(wheels, tmp_path, monkeypatch):
    """Files of an earlier one are replaced together: an interrupted run changes none, and leaves none."""
    monkeypatch.setattr(sys, "argv", ["wheels.py", "--out", str(tmp_path), "--cuda", "90"])
    (tmp_path / "sources.tar.gz").write_text("an earlier build")

    def interrupted(*command: str) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wheels, "python", interrupted)
        with pytest.raises(KeyboardInterrupt):
            wheels.main()
    assert files(tmp_path) == {"sources.tar.gz"}
    assert (tmp_path / "sources.tar.gz").read_text() == "an earlier build"
    wheels.main()
    assert files(tmp_path) == {"sources.tar.gz", "a.whl", "cuda/a.whl"}
    assert (tmp_path / "sources.tar.gz").read_text() == "a build"


def test_what_a_publisher_is_told_of_the_folder_and_the_tree(wheels, tmp_path, monkeypatch, capsys):
    """Of files that an upload of all would take, and where git refuses to look, as in a tree of another user's."""
    monkeypatch.setattr(sys, "argv", ["wheels.py", "--out", str(tmp_path)])
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    (tmp_path / "older.whl").write_text("an earlier version")
    wheels.main()
    said = capsys.readouterr()
    assert f"warning: {tmp_path} also has older.whl, which this run has not made." in said.err
    if shutil.which("git") and (ROOT / ".git").exists():
        assert "warning: git does not say whether the tree is as committed: " in said.err
    assert said.out.splitlines()[-1].endswith("twine check passed")


def test_an_nvcc_that_knows_too_little_is_told_before_minutes_of_building(tmp_path, monkeypatch):
    """A wheel that lacks a GPU that was asked for looked like one that has it."""
    wheels = importlib.import_module("wheels")
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho sm_80 sm_90\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("NVCC", str(compiler))
    monkeypatch.setattr(wheels, "TOOLS", ())
    monkeypatch.setattr(wheels, "search_path", lambda: str(tmp_path))
    with pytest.raises(SystemExit, match="expected .* got none of patchelf: make release"):
        wheels.check_tools("")
    (tmp_path / "patchelf").write_text("")
    (tmp_path / "patchelf").chmod(0o755)
    wheels.check_tools("80,90")
    with pytest.raises(SystemExit, match=r"--cuda 90,100: nvcc does not know sm_100$"):
        wheels.check_tools("90,100")
    with pytest.raises(SystemExit, match=r"--cuda 9x: GRPO_KERNELS_CUDA_ARCHITECTURES must be numbers"):
        wheels.check_tools("9x")


def test_a_folder_that_cannot_be_made_is_told_first(wheels, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["wheels.py", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match=r"expected a folder that can be written; got .*file: File exists"):
        wheels.main()


def test_a_tool_that_is_not_there_is_told_before_minutes_of_building():
    """In an interpreter without any package."""
    release = [sys.executable, "-E", "-S", str(ROOT / "release" / "wheels.py")]
    told = subprocess.run(release, capture_output=True, text=True)
    assert told.returncode == 1
    assert "got none of pip, build, auditwheel, twine" in told.stderr


STEP = """
import sys

sys.path = [path for path in sys.path if path not in ("", "{tree}")]
{code}
assert out.route and logits.grad.abs().sum() > 0
print(grpo_kernels.__file__, out.route)
"""


def step_of_readme() -> str:
    """README's block "after", with the tensors of "before"."""
    code = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    before, after = code[0], code[1]
    assert after.startswith("# after")
    tensors = before.partition("log_probs = ")[0]
    return STEP.format(tree=ROOT, code=f"import grpo_kernels\n{tensors}\n{after}")


class Empty:
    """An environment of its own, without the sources: what is installed there is all there is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "empty", with_pip=True)
        shutil.copy2(ROOT / "tests" / "installed.py", folder)
        hidden = ("PYTHONPATH", "TRITON_INTERPRET", "GRPO_KERNELS_CUDA_LIBRARY", "GRPO_KERNELS_CUDA_ARCHITECTURES")
        self.environment = {key: value for key, value in os.environ.items() if key not in hidden}

    def run(self, *arguments: str, **environment: str) -> str:
        """What its Python printed."""
        command = [str(self.folder / "empty" / "bin" / "python"), *arguments]
        known = {**self.environment, **environment}
        done = subprocess.run(command, cwd=self.folder, env=known, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def install(self, *what: str, **environment: str) -> None:
        self.run("-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), *what, **environment)

    def check(self, backend: str) -> str:
        """Every public name, from this environment."""
        told = self.run("installed.py", backend)
        assert told.startswith(str(self.folder / "empty" / "lib")), told
        return told


def needs(wheel: Path) -> tuple[set[str], tuple[int, int], list[str]]:
    """Libraries that the wheel's own want, the newest C library by the functions they call, and search paths of theirs.
    `auditwheel show` counts what OpenMP's runtime wants as well, which the wheel leaves to PyTorch."""
    from elftools.elf.elffile import ELFFile

    libraries, versions, paths = set(), [(0, 0)], []
    with zipfile.ZipFile(wheel) as archive:
        for name in filter(lambda name: name.endswith(".so"), archive.namelist()):
            elf = ELFFile(io.BytesIO(archive.read(name)))
            tags = list(elf.get_section_by_name(".dynamic").iter_tags())
            libraries |= {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
            paths += [tag.entry.d_tag for tag in tags if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]
            for _, called in elf.get_section_by_name(".gnu.version_r").iter_versions():
                found = (re.fullmatch(r"GLIBC_(\d+)\.(\d+).*", version.name) for version in called)
                versions += [(int(one[1]), int(one[2])) for one in found if one]
    return libraries, max(versions), paths


@pytest.mark.nightly
def test_a_newcomer_in_an_empty_environment(tmp_path, setup):
    """`make release`'s wheel, then three commands: install it, verify, the first fused step; under two minutes of the
    processors' time, PyTorch's installation included. Then every public name, and a step of training."""
    pytest.importorskip("auditwheel", reason="make release installs it")
    release = [sys.executable, str(ROOT / "release" / "wheels.py"), "--out", str(tmp_path / "dist")]
    made = subprocess.run(release, capture_output=True, text=True, timeout=1500)
    assert made.returncode == 0, made.stderr
    absolute = {"pages", "files"} <= setup.published((ROOT / "PUBLISHING.md").read_text()).keys()
    assert ("README's links lead nowhere" in made.stderr) != absolute
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert re.fullmatch(r"grpo_kernels-[\d.]+-py3-none-manylinux[\w.]+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        held = archive.namelist()
    assert "grpo_kernels/native/libgrpo_cpu.so" in held
    assert not [name for name in held if "gomp" in name or name.startswith(("tests/", "release/"))]
    assert {name.rpartition("/")[2] for name in held} >= {"LICENSE", "NOTICE", "METADATA"}

    libraries, newest, paths = needs(wheel)
    assert libraries <= {"libc.so.6", "libm.so.6", "libgomp.so.1"}  # the last is PyTorch's
    assert newest <= tuple(map(int, re.search(r"manylinux_(\d+)_(\d+)", wheel.name).groups()))
    assert not paths

    empty = Empty(tmp_path)
    (tmp_path / "step.py").write_text(step_of_readme())
    began, spent = time.monotonic(), os.times()
    empty.install(str(wheel))
    empty.run("-m", "grpo_kernels", "verify", "--preset", "grpo")
    told = empty.run("step.py")
    now = os.times()
    seconds = now.children_user + now.children_system - spent.children_user - spent.children_system
    print(f"three commands: {seconds:.0f} s of the processors, {time.monotonic() - began:.0f} s by the clock")
    assert str(tmp_path / "empty") in told
    assert "cpu" in told
    assert seconds < 120
    empty.check("cpu")
    empty.install(f"{wheel}[train]")
    empty.check("cpu")
    empty.run("-m", "grpo_kernels", "train", "--steps", "2", "--out", "run")
    assert list((tmp_path / "run").iterdir())


@pytest.mark.nightly
@pytest.mark.parametrize("compiler", ["c++", "none"])
def test_the_source_distribution_in_an_empty_environment(tmp_path, compiler):
    """It builds itself, where there is a compiler, and works where there is none; nvcc is not started."""
    pytest.importorskip("build", reason="make release installs it")
    if compiler == "c++" and not shutil.which("c++"):
        pytest.skip("no C++ compiler here")
    sources = importlib.import_module("wheels").source_distribution(tmp_path)
    empty = Empty(tmp_path)
    empty.install(str(sources), CXX="c++" if compiler == "c++" else str(tmp_path / "no-compiler"))
    told = empty.check("cpu" if compiler == "c++" else "torch")
    assert ("(it was not compiled: no C++ compiler found (looked for" in told) == (compiler == "none")
    report = json.loads(empty.run("-m", "grpo_kernels", "info", "--json"))
    assert report["backends"]["cpu" if compiler == "c++" else "torch"] == "usable"
    assert report["cuda_library"]["unusable"].startswith("it was not compiled: not asked for")
    verified = empty.run("-m", "grpo_kernels", "verify", "--preset", "grpo")
    assert ("plain PyTorch alone" in verified) == (compiler == "none")


@pytest.mark.nightly
def test_the_page_of_an_index_renders(setup):
    """As the index itself renders Markdown; twine's check calls it a thing that cannot fail, and does not."""
    markdown = pytest.importorskip("readme_renderer.markdown", reason="make release installs it")
    pytest.importorskip("comrak", reason="make release installs it")
    readme = setup.index_page((ROOT / "README.md").read_text(), {"pages": PAGES, "files": FILES}, "1.2.3")
    page = markdown.render(readme)
    prose = BLOCK.sub("", readme)
    for tag, pattern in (("table", r"^\|(?: -+ \|)+$"), ("h2", "^## "), ("img", r"!\[")):
        assert page.count(f"<{tag}") == len(re.findall(pattern, prose, re.M)) > 0, tag
    assert page.count("<pre") == len(BLOCK.findall(readme))
    assert not [target for _, target in LINK.findall(prose) if f'"{target}"' not in page and target[0] != "#"]
