"""The package with other versions of what it stands on, each set in an environment of its own: tests/nightly/versions/.

An environment is made in .venv/versions/ on its first run, which downloads gigabytes, and kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETS = sorted((ROOT / "tests" / "nightly" / "versions").glob("*.txt"))
FILES = (
    *("test_loss", "test_autograd", "test_linear", "test_ops", "test_metrics"),
    *("test_triton", "test_hf", "test_training", "test_config"),
)
"""Of the suite, what meets PyTorch, Triton, transformers and numpy."""
CASES = "not (triton and (test_loss or test_linear or test_autograd))"
"""Of these: what Triton's interpreter takes minutes for is not about versions; test_triton and test_ops have it too."""
LEAST = next(path for path in SETS if path.stem == "lowest")
BESIDE = ROOT / ".venv" / "lowest"
"""The packages of that set but for its PyTorch, which is gigabytes; `make test` installs them."""
QUICK = ("test_hf", "test_triton", "test_training")
QUICK_CASES = "(test_hf and not compiled) or (test_triton and row) or test_a_model_from_disk"
"""What runs with them for every change."""


def pins(path: Path) -> dict[str, str]:
    """The versions of a set by name, Python's among them."""
    return dict(re.findall(r"^(\w+)==(\S+)$", path.read_text(), re.M))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def interpreter_of(version: str) -> str:
    """A Python of this version: the first of that name on the search path that answers."""
    for folder in os.environ["PATH"].split(os.pathsep):
        name = shutil.which(f"python{version}", path=folder)
        if name and subprocess.run([name, "--version"], capture_output=True).returncode == 0:
            return name
    return pytest.skip(f"no python{version} here")


def check_versions(python: str, path: Path, environment: dict[str, str], *left_out: str) -> None:
    """Raise unless these packages are what that Python imports."""
    wanted = {name: pin for name, pin in pins(path).items() if name not in ("python", *left_out)}
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {list(wanted)}}}))"
    told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert {name: pin.partition("+")[0] for name, pin in json.loads(told.stdout).items()} == wanted


def clean() -> dict[str, str]:
    """The variables without those of this run: pip would take for installed what PYTHONPATH leads to."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "PYTHON", "TRITON"))}


def environment(path: Path) -> str:
    """The interpreter of a set's environment, made where it is not there as the set now stands."""
    found = pins(path)
    interpreter = interpreter_of(found.pop("python"))
    folder = ROOT / ".venv" / "versions" / path.stem
    made = folder / "made_of"
    python = str(folder / "bin" / "python")
    extras = project()["optional-dependencies"]
    needed = [need for need in (*extras["train"], *extras["test"]) if not need.startswith("grpo-kernels")]
    wanted = "\n".join([path.read_text(), *needed])
    if not made.exists() or made.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([interpreter, "-m", "venv", str(folder)], check=True)
        exact = [f"{name}=={pin}" for name, pin in found.items()]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *exact, *needed], check=True, env=clean())
        made.write_text(wanted)
    return python


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_with_other_versions(path):
    """What every change runs of these files."""
    python = environment(path)
    check_versions(python, path, clean())
    workers = ("-n", "2", "--dist", "worksteal")
    assert passed(python, {**clean(), "PYTHONPATH": str(ROOT)}, FILES, CASES, *workers) > 1000


def passed(python: str, environment: dict[str, str], files: tuple[str, ...], cases: str, *workers: str) -> int:
    """How many tests of these files passed, all of them."""
    every_change = ("-m", "not nightly and not peers and not ranks")
    command = [python, "-m", "pytest", *workers, "-p", "no:cacheprovider", *every_change]
    result = subprocess.run(
        [*command, "-k", cases, *(str(ROOT / "tests" / f"{name}.py") for name in files)],
        cwd=ROOT,
        env={**environment, "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
    )
    sys.stdout.write(result.stdout[-4000:])
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    found = re.search(r"(\d+) passed", result.stdout)
    assert found, result.stdout[-1000:]
    return int(found[1])


@pytest.mark.skipif(not BESIDE.exists(), reason="make test installs it")
def test_the_lowest_beside_this_pytorch():
    """The pinned PyTorch with the lowest Triton, transformers and numpy that are allowed."""
    environment = {**clean(), "PYTHONPATH": os.pathsep.join(map(str, (BESIDE, ROOT)))}
    check_versions(sys.executable, LEAST, environment, "torch")
    assert passed(sys.executable, environment, QUICK, QUICK_CASES) > 200


def test_the_table_is_of_these_sets():
    """docs/versions.md, "also run", and the least that pyproject.toml allows."""
    table = (ROOT / "docs" / "versions.md").read_text()
    sets = [pins(path) for path in SETS]
    pinned = dict(re.findall(r"^(\w+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    pinned["python"] = project()["requires-python"].removeprefix(">=")
    assert len(sets) >= 4
    for name, label in (
        *(("python", "Python"), ("torch", "PyTorch (`torch`)"), ("triton", "Triton (`triton`), for its kernels")),
        *(("transformers", "`transformers`, for `hf.attach` and `train`"), ("numpy", "`numpy`, for `train` and tests")),
    ):
        row = next(line for line in table.splitlines() if line.startswith(f"| {label} |"))
        told = re.findall(r"\d+\.\d+(?:\.\d+)?", row.split("|")[4].partition(";")[0])
        run = {found[name] for found in sets if name in found} - {pinned[name]}
        assert told == sorted(run, key=lambda version: [int(part) for part in version.split(".")]), name


def test_the_least_is_what_is_allowed():
    least = pins(LEAST)
    extras = project()["optional-dependencies"]
    allowed = " ".join([*project()["dependencies"], *extras["train"]])
    for name in ("torch", "transformers"):
        bound = re.search(rf"{name}>=([\d.]+)", allowed)[1]
        assert least[name].startswith(f"{bound}."), name
    assert f">={least['python']}" == project()["requires-python"]
