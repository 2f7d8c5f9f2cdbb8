"""The package as a kernel of the Hugging Face Hub: what release/hub.py writes, and what it is when it is loaded from
there, beside an installed package of another version."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import oracle
import pytest
import torch
from test_docs import blocks, run_blocks
from test_oracle import problem_of, small
from test_release import published_text

import grpo_kernels
from grpo_kernels import KL, LossConfig
from grpo_kernels.backends import cpu

ROOT = Path(__file__).resolve().parent.parent
OTHER_VERSION = "7.8.9"
ANY_GLIBC = (99, 0)
"""Of whatever machine the tests run on: what the Hub asks for is a test of its own."""


def script(tree: Path) -> types.ModuleType:
    """Return release/hub.py of a tree."""
    spec = importlib.util.spec_from_file_location("hub", tree / "release" / "hub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copied(tree: Path, version: str) -> Path:
    """Return a copy of what a kernel is made of, as another version."""
    for name in ("grpo_kernels", "csrc", "release"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "LICENSE", "NOTICE", "PUBLISHING.md"):
        shutil.copy(ROOT / name, tree)
    for name in ("pyproject.toml", "grpo_kernels/__init__.py"):
        text = (tree / name).read_text()
        changed = text.replace(f'version__ = "{grpo_kernels.__version__}"', f'version__ = "{version}"')
        changed = changed.replace(f'\nversion = "{grpo_kernels.__version__}"', f'\nversion = "{version}"')
        assert changed != text
        (tree / name).write_text(changed)
    return tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return copied(tmp_path_factory.mktemp("tree"), OTHER_VERSION)


@pytest.fixture(scope="module")
def repository(tree, tmp_path_factory) -> Path:
    """The kernel's repository, of another version than the package's."""
    folder = tmp_path_factory.mktemp("hub")
    assert script(tree).write(folder, ANY_GLIBC).keys() <= {script(tree).native_variant()}
    return folder


@pytest.fixture
def universal(repository) -> Path:
    return repository / "build" / "torch-universal"


@pytest.fixture
def compiled(repository, tree) -> Path:
    """The variant with the CPU library."""
    if not cpu.LIBRARY.exists():
        pytest.skip("no CPU library was built here")
    return repository / "build" / script(tree).native_variant()


def test_a_kernel_holds_what_is_public_and_no_program(universal, compiled):
    held = {path.relative_to(universal).as_posix() for path in universal.rglob("*.py")}
    assert {"loss.py", "hf/proof.py", "matching/call.py", "verification/reference/terms.py"} <= held
    assert {"backends/triton/one_pass.py", "backends/cuda.py", "backends/eager.py"} <= held
    rooms = {name.split("/")[0] for name in held}
    assert rooms.isdisjoint({"__main__.py", "info.py", "bench", "training", "integrations"})
    assert rooms.isdisjoint({"verification/verify.py", "matching/command.py"})
    assert (universal / "backends" / "triton" / "blocks.json").exists()
    assert (universal / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert not list(universal.rglob("*.so"))
    assert [path.name for path in compiled.rglob("*.so")] == ["libgrpo_cpu.so"]
    assert held == {path.relative_to(compiled).as_posix() for path in compiled.rglob("*.py")}


def test_a_kernel_imports_itself_by_relative_names_and_little_else(universal):
    """The Hub's rule: its own modules, Python's, PyTorch's, and Triton, which comes with PyTorch."""
    absolute = set()
    for path in universal.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                absolute |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                absolute.add(node.module.split(".")[0])
    assert absolute - set(sys.stdlib_module_names) == {"torch", "triton"}


def test_the_id_is_the_files(universal, tmp_path):
    """Equal builds share it, one that differs by a byte does not; and every file has its digest."""
    hub = script(ROOT)
    given = json.loads((universal / "metadata.json").read_text())
    copy = shutil.copytree(universal, tmp_path / universal.name)
    (copy / "metadata.json").unlink()
    assert hub.metadata(copy)["id"] == given["id"]
    with (copy / "loss.py").open("a") as file:
        file.write("\n")
    assert hub.metadata(copy)["id"] != given["id"]
    assert re.fullmatch(r"_grpo_kernels_universal_[0-9a-f]{16}", given["id"])
    assert given["version"] == int(OTHER_VERSION.split(".")[0])
    hashed = given["digest"]["files"]
    assert hashed.keys() == {p.relative_to(universal).as_posix() for p in universal.rglob("*") if p.is_file()} - {
        "metadata.json"
    }


def test_a_library_for_newer_machines_is_left_out(tmp_path, compiled):
    """One that asks for a newer glibc than every machine of the Hub's has: told by its version, with the mend."""
    hub = script(ROOT)
    library = compiled / "native" / "libgrpo_cpu.so"
    needed = hub.newest_glibc(library)
    listed = subprocess.run(["objdump", "-T", library], capture_output=True, text=True, check=False).stdout
    versions = {tuple(map(int, found)) for found in re.findall(r"\(GLIBC_(\d+)\.(\d+)", listed)}
    assert not versions or needed == max(versions)
    assert needed > (2, 0)
    older = (needed[0], needed[1] - 1)
    (reason,) = hub.write(tmp_path, older).values()
    assert "needs glibc {}.{}, and may need {}.{} at most".format(*needed, *older) in reason
    assert [path.name for path in (tmp_path / "build").glob("torch*")] == ["torch-universal"]


def test_a_platform_without_a_compiler_gets_python(tmp_path, monkeypatch, tree):
    other = shutil.copytree(tree, tmp_path / "tree")
    shutil.rmtree(other / "grpo_kernels" / "native", ignore_errors=True)
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    (reason,) = script(other).write(tmp_path / "hub").values()
    assert "no C++ compiler found" in reason
    assert [path.name for path in (tmp_path / "hub" / "build").glob("torch*")] == ["torch-universal"]


def test_addresses_are_filled_in(tree, tmp_path):
    """Where a publisher has written them; until then the page has a word in the owner's place."""
    other = shutil.copytree(tree, tmp_path / "tree")
    filled = published_text(hub="someone/grpo-kernels", repository="https://r.test/x")
    (other / "PUBLISHING.md").write_text(filled)
    script(other).write(tmp_path / "hub", ANY_GLIBC)
    card = (tmp_path / "hub" / "build" / "CARD.md").read_text()
    assert 'get_kernel("someone/grpo-kernels", version=' in card
    assert "OWNER" not in card
    for path in (tmp_path / "hub").glob("build/*/metadata.json"):
        assert json.loads(path.read_text())["upstream"] == "https://r.test/x"


def test_a_build_that_is_there_is_refused(repository):
    with pytest.raises(SystemExit, match="expected a folder without build/"):
        script(ROOT).write(repository)


def test_an_interrupted_run_leaves_nothing_that_looks_finished(tmp_path, monkeypatch, compiled):
    """Of the variant that is being written, and of the one before it."""
    hub = script(ROOT)
    write_variant = hub._write_variant

    def interrupted(variant: Path, *given) -> None:
        write_variant(variant, *given)
        if variant.name != hub.UNIVERSAL:
            raise KeyboardInterrupt

    monkeypatch.setattr(hub, "_write_variant", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hub.write(tmp_path, ANY_GLIBC)
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(hub, "_write_variant", write_variant)
    assert hub.write(tmp_path, ANY_GLIBC) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["build"]


def test_a_folder_that_cannot_be_made_is_told_before_the_compiler_runs(tmp_path, monkeypatch):
    hub = script(ROOT)
    monkeypatch.setattr(hub, "_setup", lambda: pytest.fail("it was built"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"expected a folder that can be written; got .*file/hub: Not a directory"):
        hub.write(tmp_path / "file" / "hub")


@pytest.mark.parametrize("version", ["3", "2.x", "2.28.1"])
def test_a_glibc_is_two_numbers(version, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hub.py", "nowhere", "--glibc", version])
    with pytest.raises(SystemExit):
        script(ROOT).main()
    assert f"expected two numbers, as 2.28; got {version!r}" in capsys.readouterr().err


def test_as_a_command(tmp_path):
    """As it is documented; it imports nothing of PyTorch's."""
    path = ROOT / "release" / "hub.py"
    code = f"import runpy, sys; sys.argv = ['hub.py', {str(tmp_path)!r}, '--glibc', '99.0']; "
    code += f"runpy.run_path({str(path)!r}, run_name='__main__'); assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(path.parent)}  # the folder of a script is on its path
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert f"{tmp_path / 'build' / 'torch-universal'}: " in printed
    lines = printed.splitlines()
    assert len(lines) == 2
    assert all(re.search(r": \d+ files, \d+\.\d MB$", line) or ": left out: " in line for line in lines)


def by_name(name: str, folder: Path) -> types.ModuleType:
    """Import a variant by any name, as the Hub's loader does."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def namespace(package: types.ModuleType) -> str:
    return importlib.import_module(f"{package.__name__}.objectives.compiler").NAMESPACE


def operators(package: types.ModuleType) -> set:
    """Return the operators of a copy of the package, as PyTorch has them."""
    names = importlib.import_module(f"{package.__name__}.objectives.compiler").IMPLEMENTATIONS
    return {getattr(getattr(torch.ops, namespace(package)), name).default for name in names}


def forget(package: types.ModuleType) -> None:
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{package.__name__}.")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["grpo_kernels_of_7_8_9", "a vendor's grpo-kernels, é"])
def test_operators_are_a_copy_s_own(universal, name):
    """Under any name, one that is no identifier too."""
    copy = by_name(name, universal)
    assert re.fullmatch(r"[A-Za-z_]\w*", namespace(copy))
    assert namespace(grpo_kernels) == "grpo_kernels"
    assert len(operators(copy)) == len(operators(grpo_kernels)) > 10
    assert operators(copy).isdisjoint(operators(grpo_kernels))
    assert copy.__version__ == OTHER_VERSION
    assert all(getattr(copy, public).__name__.startswith(name) for public in ("reference", "hf", "advantages"))
    for public in copy.__all__:
        assert getattr(copy, public) is not None
    forget(copy)


def test_modules_that_are_links(compiled, tmp_path):
    """In a cache of the Hub every file is a link to one whose name is a hash; the library is found all the same."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    variant = tmp_path / "snapshots" / "0123abc" / "build" / compiled.name
    for path in filter(Path.is_file, compiled.rglob("*")):
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = variant / path.relative_to(compiled)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    copy = by_name("grpo_kernels_of_links", variant)
    case = small(old_log_probs=None)
    out = copy.grpo_loss(case.logits, *case.arguments)
    assert out.route.backend == "cpu"
    found = sys.modules["grpo_kernels_of_links.backends.cpu"].LIBRARY
    assert found == variant / "native" / "libgrpo_cpu.so"
    forget(copy)


def test_objects_of_another_copy_are_refused(universal):
    """By the module that they are of, since their names are the same."""
    copy = by_name("grpo_kernels_of_others", universal)
    case = small()
    with pytest.raises(TypeError, match=r"got LossConfig of grpo_kernels\.objectives\.config"):
        copy.grpo_loss(case.logits, *case.arguments, config=LossConfig())
    forget(copy)


def test_the_universal_variant_says_what_it_lacks(universal):
    """Plain PyTorch serves, and neither the warning nor an error sends a user of the Hub to reinstall what is not
    installed."""
    copy = by_name("grpo_kernels_of_python_alone", universal)
    case = small(old_log_probs=None)
    with pytest.raises(RuntimeError, match="it was not compiled: this variant of the kernel is Python alone"):
        copy.grpo_loss(case.logits, *case.arguments, backend="cpu")
    own = importlib.import_module("grpo_kernels_of_python_alone.backends.native")
    assert own.build_record(own.FOLDER / "libgrpo_cuda.so")["error"].startswith("a kernel of the Hub has none")
    forget(copy)


# Loaded by the Hub's own loader, where it is installed.


@pytest.fixture(scope="module")
def loader() -> types.ModuleType:
    return pytest.importorskip("kernels", reason="make test-peers installs the Hub's loader")


@pytest.fixture(scope="module")
def kernel(loader, repository) -> types.ModuleType:
    """The kernel of another version, loaded beside the package. By name for a CPU: PyTorch may be one for GPUs."""
    return loader.get_local_kernel(repository, backend="cpu")


def loss_and_gradient(package: types.ModuleType, case, config: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = case.logits.detach().clone().requires_grad_()
    config = package.LossConfig.from_dict(config)
    out = package.grpo_loss(leaf, *case.arguments, config=config, **case.options, **options)
    out.loss.backward()
    return out.loss.detach(), leaf.grad


def assert_is_the_oracle(found: tuple[torch.Tensor, torch.Tensor], problem: oracle.Problem) -> None:
    """In float64, where a step is 1.1e-16: the loss is a difference of terms of size 1, a tenth of them. The largest
    distances that were seen are 2.6e-15 of the loss and 2.7e-16 of a gradient's largest element."""
    loss, gradient = found
    assert loss.item() == pytest.approx(float(oracle.loss(problem)), rel=1e-14)
    expected = torch.tensor(oracle.gradient(problem), dtype=torch.float64)
    assert expected.abs().max() > 0.01
    length = expected.shape[1]
    torch.testing.assert_close(gradient[:, :length], expected, rtol=0, atol=2e-15 * expected.abs().max().item())
    assert (gradient[:, length:] == 0).all()


@pytest.mark.peers
@pytest.mark.sample(triton=4)
@pytest.mark.parametrize("preset", ["grpo", "dapo", "gspo", "cispo"])
def test_both_versions_are_the_oracle(kernel, backend, preset):
    config = LossConfig.preset(preset, kl=KL(0.1)).to_dict()
    case = small()
    problem = problem_of(case, LossConfig.from_dict(config))
    assert kernel.__version__ == OTHER_VERSION != grpo_kernels.__version__
    for package in (grpo_kernels, kernel):
        assert_is_the_oracle(loss_and_gradient(package, case, config, backend=backend), problem)


@pytest.mark.peers
def test_each_version_runs_its_own_operators(kernel):
    """In eager code and in a compiled graph."""
    case = small()
    for package in (grpo_kernels, kernel):
        graphs: list[set] = []

        def recorded(graph, inputs, graphs=graphs):
            graphs.append({node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)})
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        def loss(logits, package=package):
            return package.grpo_loss(logits, *case.arguments, old_log_probs=case.options["old_log_probs"]).loss

        leaf = case.logits.detach().clone().requires_grad_()
        eager = loss(leaf)
        eager.backward()
        wanted, leaf.grad = leaf.grad, None
        compiled = torch.compile(loss, fullgraph=True, backend=recorded)(leaf)
        compiled.backward()
        torch._dynamo.reset()
        assert (compiled, leaf.grad.tolist()) == (eager, wanted.tolist())
        (graph,) = graphs
        ours = {operator for operator in graph if operator.namespace not in ("aten", "prim")}
        assert ours
        assert ours <= operators(package)


@pytest.mark.peers
def test_a_model_belongs_to_no_version(kernel):
    """What attach leaves on a model is known to both; the losses are equal."""
    pytest.importorskip("transformers")
    from test_hf import inputs, tiny, tokens_of

    model, given = tiny(), inputs()
    losses = []
    for package, other in ((grpo_kernels, kernel), (kernel, grpo_kernels)):
        package.hf.attach(model)
        with pytest.raises(ValueError, match="a model that is not attached"):
            other.hf.attach(model)
        losses.append(model(**given, grpo=tokens_of(given)).loss.item())
        other.hf.detach(model)
    assert losses[0] == losses[1] != 0


@pytest.mark.peers
def test_twice_is_once_and_another_build_is_another(loader, kernel, repository, tmp_path):
    assert loader.get_local_kernel(repository, backend="cpu") is kernel
    moved = loader.get_local_kernel(shutil.copytree(repository, tmp_path / "moved"), backend="cpu")
    assert namespace(moved) == namespace(kernel)
    third = tmp_path / "third"
    script(copied(tmp_path / "tree", "8.0.0")).write(third, ANY_GLIBC)
    another = loader.get_local_kernel(third, backend="cpu")
    assert another.__version__ == "8.0.0"
    case, config = small(), LossConfig().to_dict()
    found = {loss_and_gradient(package, case, config)[0].item() for package in (kernel, moved, another, grpo_kernels)}
    assert len(found) == 1
    assert operators(another).isdisjoint(operators(kernel) | operators(grpo_kernels))


LOADING = """
import errno, json, os, sys
from pathlib import Path

import torch
from kernels import get_local_kernel

folder, readonly = sys.argv[1], sys.argv[2] == "read-only"
watching, written, started, opened = True, [], [], []
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(event, arguments):
    if not watching:
        return
    if event == "ctypes.dlopen" and arguments[0] is not None:
        opened.append(str(arguments[0]))
    elif event.startswith(("subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.system")):
        started.append(event)
    elif event in ("os.mkdir", "os.rename") or (event == "open" and arguments[2] & WRITES):
        if isinstance(arguments[0], int):
            return  # a file that is open already
        written.append(str(arguments[0]))
        if readonly and str(arguments[0]).startswith(folder):
            raise OSError(errno.EROFS, "a read-only file system")


sys.addaudithook(watch)
kernel = get_local_kernel(Path(folder), backend="cpu")
out = kernel.grpo_loss(torch.zeros(1, 3, 7), torch.zeros(1, 3, dtype=torch.int64), torch.ones(1))
watching = False
files = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == kernel.__name__]
print(json.dumps([kernel.__version__, out.route.backend, written, started, opened, files]))
"""


def load_alone(folder: Path, mode: str) -> tuple[str, str, list, list, list, list]:
    """Load a kernel and call its loss in a process of its own, which notes what is written, started and opened."""
    code = [sys.executable, "-c", LOADING, str(folder), mode]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    result = subprocess.run(code, capture_output=True, text=True, cwd="/", env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.peers
@pytest.mark.parametrize("name", ["with spaces, é and 'quotes'", "read-only"])
def test_nothing_is_built_at_load(loader, compiled, tmp_path, name):
    """From a folder with another name, and from one that cannot be written: Python's own bytecode is all that is tried
    to write, no process is started, and what is loaded lies in the folder."""
    folder = tmp_path / name
    shutil.copytree(compiled, folder / "build" / compiled.name, ignore=shutil.ignore_patterns("__pycache__"))
    readonly = name == "read-only"
    if readonly:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() or path.suffix == ".so" else 0o444)
    version, backend, written, started, opened, files = load_alone(folder, name)
    assert (version, backend) == (OTHER_VERSION, "cpu")
    assert started == []
    assert [path for path in written if "__pycache__" not in Path(path).parts] == []
    assert any(folder.rglob("*.pyc")) != readonly
    assert opened == [str(folder / "build" / compiled.name / "native" / "libgrpo_cpu.so")]
    assert len(files) > 50
    assert all(Path(file).is_relative_to(folder) for file in files)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)


@pytest.mark.peers
def test_the_metadata_are_what_the_loader_reads(loader, repository, universal, compiled, capsys):
    from kernels._rust import Digest, Metadata
    from kernels.cli.info import print_kernel_info
    from kernels.validate import default_metadata_validators

    ids = set()
    for variant in (universal, compiled):
        metadata = Metadata.read_from_file(variant / "metadata.json")
        for validator in default_metadata_validators():
            validator.validate_metadata(metadata=metadata, variant=variant.name)
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))
        assert (str(metadata.name), metadata.license, metadata.python_depends) == ("grpo-kernels", "MIT", [])
        assert metadata.version == int(OTHER_VERSION.split(".")[0])
        ids.add(metadata.id)
    assert len(ids) == 2
    print_kernel_info(str(repository), json_output=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["name"], told["backends"], told["kernels_minver"]) == ("grpo-kernels", ["cpu", "universal"], "0.17.0")


@pytest.mark.peers
def test_which_variant_is_taken(loader, repository, compiled):
    """The library's on this platform, with every PyTorch that the package takes; Python's everywhere else."""
    from kernels.backends import CPU, CUDA, Metal
    from kernels.variants import _resolve_variant_for_system, get_variants_local
    from packaging.version import Version

    *_, machine, system = compiled.name.split("-")
    variants = get_variants_local(repository / "build")
    assert {variant.variant_str for variant in variants} == {"torch-universal", compiled.name}

    def taken(backend=None, torch_version="2.13", cpu=machine, os=system) -> str:
        backend, torch_version = backend or CPU(), Version(torch_version)
        found, _ = _resolve_variant_for_system(variants, backend, cpu, os, torch_version, True, None, Version("26.0"))
        return found[0].variant_str

    assert taken() == taken(torch_version="2.11") == taken(torch_version="3.0") == compiled.name
    elsewhere = [{"cpu": "riscv64"}, {"os": "windows"}, {"torch_version": "2.10"}]
    elsewhere += [{"backend": CUDA(Version("13.0"))}, {"backend": Metal()}]
    assert {taken(**where) for where in elsewhere} == {"torch-universal"}


@pytest.mark.peers
def test_what_is_told_runs(loader, tree, tmp_path, monkeypatch):
    """The blocks of docs/hub.md in a folder with build/hub, and that of the repository's page, which the environment
    sends to the same."""
    monkeypatch.chdir(tmp_path)
    script(tree).write(tmp_path / "build" / "hub", ANY_GLIBC)
    ran = [namespace for _, namespace in run_blocks(ROOT / "docs" / "hub.md")]
    assert ran[-1]["kernel"].__version__ == OTHER_VERSION
    page = tmp_path / "build" / "hub" / "build" / "CARD.md"
    assert f"`grpo_kernels` {OTHER_VERSION} as a kernel" in page.read_text()
    assert len(blocks(page, "python")) == 1
    name = script(tree).addresses().get("hub", "OWNER/grpo-kernels")
    monkeypatch.setenv("LOCAL_KERNELS", f"{name}=build/hub")
    given: dict = {}
    exec(blocks(page, "python")[0], given)
    assert given["kernel"] is ran[-1]["kernel"] or given["kernel"].__version__ == OTHER_VERSION
    assert given["logits"].grad.abs().sum() > 0
