"""What SECURITY.md promises: files are read as data, libraries come from the package, code runs where it is named."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_kernels import LossConfig
from grpo_kernels.backends import native
from grpo_kernels.matching import command
from grpo_kernels.training import checkpoint, policy
from grpo_kernels.training.tasks import Sort

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("grpo_kernels", "examples", "benchmarks", "release", "docs/site", "setup.py")
UNPICKLERS = ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
CALLS = (
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load", "runpy.run_path"),
    *("importlib.import_module", "importlib.util.spec_from_file_location", "spec.loader.exec_module"),
    *("ctypes.CDLL", "torch.ops.load_library", "torch.classes.load_library"),
    *("torch.distributed.all_gather_object", "torch.distributed.broadcast_object_list"),
)
"""What runs code, loads a library or unpickles."""
ALLOWED = {
    ("grpo_kernels/__init__.py", "importlib.import_module"): "its own lazy modules, from a table",
    ("grpo_kernels/backends/__init__.py", "importlib.import_module"): "its own backends, from a table",
    ("grpo_kernels/backends/native.py", "ctypes.CDLL"): "the package's libraries, or GRPO_KERNELS_CUDA_LIBRARY",
    ("grpo_kernels/integrations/patching.py", "importlib.import_module"): "the patched package's, from tables",
    ("grpo_kernels/integrations/skyrl.py", "importlib.import_module"): "SkyRL's, by constants",
    ("grpo_kernels/integrations/verl.py", "importlib.import_module"): "verl's, by constants",
    ("grpo_kernels/integrations/verl_operators.py", "importlib.import_module"): "Megatron's, by a constant",
    ("grpo_kernels/matching/command.py", "importlib.import_module"): "match runs what it is given, and says so first",
    ("grpo_kernels/matching/command.py", "importlib.util.spec_from_file_location"): "likewise",
    ("grpo_kernels/matching/command.py", "spec.loader.exec_module"): "likewise",
    ("grpo_kernels/objectives/groups.py", "torch.distributed.all_gather_object"): "between the ranks of one run",
    ("grpo_kernels/training/ranks.py", "torch.distributed.broadcast_object_list"): "between the ranks of one run",
    ("grpo_kernels/training/trackers.py", "importlib.import_module"): "wandb's or tensorboard's, by name",
    ("benchmarks/gpu_library.py", "importlib.util.spec_from_file_location"): "setup.py of this tree",
    ("benchmarks/gpu_library.py", "spec.loader.exec_module"): "setup.py of this tree",
    ("benchmarks/gpu_process.py", "ctypes.CDLL"): "the process itself, for prctl",
    ("benchmarks/redraw.py", "importlib.import_module"): "the benchmark that wrote a committed file, from a table",
    ("benchmarks/system_steps.py", "importlib.import_module"): "its own integrations, from a table",
    (
        "benchmarks/trl_step.py",
        "transformers.AutoModelForCausalLM.from_pretrained",
    ): "a folder that it has just written",
    ("benchmarks/trl_step.py", "transformers.AutoTokenizer.from_pretrained"): "likewise",
    ("release/hub.py", "runpy.run_path"): "setup.py of this tree",
    ("release/wheels.py", "runpy.run_path"): "the same",
}
"""The exceptions, each with the reason."""


def unsafe(source: str) -> list[str]:
    """What in a module's source runs code, loads a library or unpickles, by name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.partition(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").partition(".")[0] in UNPICKLERS else []
        elif isinstance(node, ast.Call):
            found += [ast.unparse(node.func)] if ast.unparse(node.func) in CALLS else []
            found += unsafe_options(node)
    return found


def unsafe_options(call: ast.Call) -> list[str]:
    """Calls that are safe with one option, or without one."""
    options = {option.arg: ast.unparse(option.value) for option in call.keywords}
    name = ast.unparse(call.func)
    found = [
        f"{name}({option}=True)" for option in ("shell", "allow_pickle") if options.get(option, "False") != "False"
    ]
    if name == "torch.load" and options.get("weights_only") != "True":
        found.append("torch.load")
    if re.search(r"\byaml\.(unsafe_|full_)?load(_all)?$", name):
        found.append(name)
    if name.endswith(".from_pretrained") and "Config" not in name:
        found += [name] if options.get("trust_remote_code") != "False" else []
    return found


def modules() -> list[Path]:
    return [
        path for place in PLACES for path in ([ROOT / place] if place[-3:] == ".py" else (ROOT / place).rglob("*.py"))
    ]


def test_nothing_runs_what_a_file_says():
    """No pickle, eval or shell in the package and its scripts; what loads by name is listed with its reason."""
    found = {(path.relative_to(ROOT).as_posix(), what) for path in modules() for what in unsafe(path.read_text())}
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "import dill as d", "eval('1')", "exec(text)"),
        *("torch.load(path)", "torch.load(path, weights_only=False)", "numpy.load(path, allow_pickle=True)"),
        *("yaml.load(text, Loader=Loader)", "subprocess.run(text, shell=True)", "os.system(text)"),
        *("AutoModel.from_pretrained(name)", "AutoModel.from_pretrained(name, trust_remote_code=asked)"),
    ],
)
def test_the_search_finds(source):
    assert unsafe(source)


def test_the_search_passes_what_is_safe():
    safe = (
        "torch.load(path, weights_only=True)",
        "model.eval()",
        "re.compile(text)",
        "subprocess.run([a], shell=False)",
    )
    assert not [source for source in safe if unsafe(source)]


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


HOSTILE_CONFIG = {
    "model_type": "mine",
    "architectures": ["Mine"],
    "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.Mine", "AutoTokenizer": ["mine.T", None]},
}


@pytest.mark.parametrize("kind", ["own class", "pickled weights", "own generate"])
def test_a_model_that_brings_code_does_not_run_it(tmp_path, monkeypatch, kind):
    """train --model of a folder by somebody else, who is at the keyboard too and says yes to everything."""
    pytest.importorskip("transformers")
    monkeypatch.setattr("builtins.input", lambda *prompt: "yes")
    folder, fired = tmp_path / "model", tmp_path / "fired"
    code = f"import os\nos.mkdir({str(fired)!r})\n"
    task = Sort()
    tiny, _ = policy.load_policy(None, task, 16, 1, torch.device("cpu"))
    tiny.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    if kind == "own class":
        (folder / "config.json").write_text(json.dumps(HOSTILE_CONFIG))
        (folder / "mine.py").write_text(code)
    elif kind == "pickled weights":
        (folder / "model.safetensors").unlink()
        torch.save({"lm_head.weight": Bomb(fired)}, folder / "pytorch_model.bin")
    else:
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code)
    with pytest.raises(SystemExit, match="no (causal language model|tokenizer) could be loaded from this folder"):
        policy.load_policy(str(folder), task, 16, 1, torch.device("cpu"))
    assert not fired.exists()


def test_a_checkpoint_that_is_a_pickle_is_not_read(tmp_path):
    torch.save({"step": Bomb(tmp_path / "fired")}, tmp_path / "checkpoint.safetensors")
    with pytest.raises(Exception, match="(?i)header"):
        checkpoint.read(tmp_path / "checkpoint.safetensors")
    assert not (tmp_path / "fired").exists()


def test_a_library_that_is_named_is_the_file_that_is_there(tmp_path, monkeypatch):
    """A name without a slash is a file of this folder, as the check that it exists takes it, and not what the
    loader's search path has under this name."""
    monkeypatch.chdir(tmp_path)
    Path("libc.so.6").write_text("no library")
    with pytest.raises(native.Unavailable, match="libc.so.6 does not load: "):
        native.load(Path("libc.so.6"), "grpo_cpu_abi", 0)


@pytest.mark.parametrize("record", ["[]", "5", '"text"', "{", "[" * 100_000], ids=lambda text: text[:5])
def test_a_damaged_record_of_a_build(tmp_path, record):
    (tmp_path / "libgrpo_cpu.json").write_text(record)
    assert native.build_record(tmp_path / "libgrpo_cpu.so") == {}


READ = r"""environ(?:\.get\(|\[)["'](\w+)|"(\w+)" in os\.environ|^_?SWITCH = "(\w+)\""""
"""How the package reads the environment."""
OTHERS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "XDG_CACHE_HOME"}
"""Variables of torchrun and of the system."""


def test_what_is_loaded_can_be_changed_by_what_is_told_alone():
    """Whatever of the environment the package reads is in docs/devices.md, but for others' variables; what makes it
    load or run something is in SECURITY.md."""
    sources = [path.read_text() for path in (ROOT / "grpo_kernels").rglob("*.py")]
    read = {name for source in sources for found in re.findall(READ, source, re.M) for name in found if name}
    assert read >= {*OTHERS, "GRPO_KERNELS_BACKEND", "GRPO_KERNELS_CUDA_LIBRARY", "GRPO_KERNELS_KEEP_MEMORY"}
    devices, security = ((ROOT / name).read_text() for name in ("docs/devices.md", "SECURITY.md"))
    assert not [name for name in read - OTHERS if f"| `{name}` |" not in devices]
    for name in ("GRPO_KERNELS_CUDA_LIBRARY", "XDG_CACHE_HOME", "CXX", "NVCC", "PYTHONPATH", "TRITON_CACHE_DIR"):
        assert f"`{name}`" in security, name


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
WORDS = ("name", "coefficient", "low", "high", "__class__", "__init__", "__dict__", "self", "__reduce__")
KEYS = st.sampled_from([*LossConfig().to_dict(), *WORDS])
NAMES = st.sampled_from(["clip", "Clip", "cispo", "TruncatedIS", "token_mean", "os.system", "__import__('os')", "k3"])
DATA = st.recursive(
    PLAIN | NAMES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@pytest.mark.filterwarnings("ignore:.*")
@given(st.dictionaries(KEYS, DATA, max_size=6))
def test_a_stored_config_is_data(stored):
    """Whatever stands in one, it is a config or it is refused in words; and what became a config is stored again."""
    try:
        config = LossConfig.from_dict(stored)
    except (ValueError, TypeError):
        return
    assert LossConfig.from_dict(config.to_dict()) == config
    assert repr(config).startswith("LossConfig(")


@pytest.mark.parametrize("text", ["__import__('os').mkdir('x')", "{[]: 1}", "-" * 100_000 + "1", "[" * 300, "clip"])
def test_an_option_of_match_is_a_literal_or_text(text):
    """Nothing of it is evaluated."""
    assert command._value(text) == text
    assert command._value("(0.2, 'a', None)") == (0.2, "a", None)


@pytest.mark.parametrize("depth", [100, 100_000])
def test_a_stored_config_that_is_nested_without_end(depth):
    stored: object = 1.0
    for _ in range(depth):
        stored = [stored]
    for field in ("rollout", "log_ratio_limit", "kl"):
        with pytest.raises((TypeError, ValueError)):
            LossConfig.from_dict({field: stored})
