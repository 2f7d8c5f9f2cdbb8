"""python -m grpo_kernels: what a stranger sees."""

from __future__ import annotations

import ctypes
import errno
import importlib.metadata
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import usable_backends

import grpo_kernels
from grpo_kernels import Clip, LossConfig, backends, info, interrupt
from grpo_kernels.__main__ import main
from grpo_kernels.backends import cpu, cuda
from grpo_kernels.verification import records, verify
from grpo_kernels.verification.progress import Lines

ROOT = Path(__file__).resolve().parent.parent


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name in usable_backends():
        assert re.search(f"backend +{name} +usable", text)
    assert f"in use: {cpu.instruction_set()}" in text
    assert torch.__version__ in text


def test_info_json(capsys):
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["backends"]) == set(backends.names())
    assert report["backends"]["cpu"] == report["backends"]["torch"] == "usable"
    assert report["packages"]["torch"] == torch.__version__
    assert report["cpu_library"]["in_use"] in report["cpu_library"]["instruction_sets"]


def test_info_names_the_build_of_torch(capsys, monkeypatch):
    """The metadata of PyPI's wheels leaves it out, and it is what a report of a fault needs most."""
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0")
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packages"]["torch"] == "2.11.0+cu130"


def test_info_of_gpus(capsys, monkeypatch):
    offered = cuda.Device(major=9, driver=13000, clusters=(ctypes.c_int32 * 5)(132, 66, 32, 16, 0))
    monkeypatch.setattr(cuda, "_loaded", lambda: object())
    monkeypatch.setattr(cuda, "device", lambda index: offered)
    for name, value in (("device_count", lambda: 1), ("get_device_name", lambda index: "NVIDIA H200")):
        monkeypatch.setattr(torch.cuda, name, value)
    assert main(["info"]) == 0
    line = "cuda:0: capability 9.0, clusters at once: 132 of 1, 66 of 2, 32 of 4, 16 of 8\n"
    assert line in capsys.readouterr().out


def test_info_says_why_not(capsys, monkeypatch):
    monkeypatch.setenv("GRPO_KERNELS_CPU_ISA", "sse9")
    assert main(["info"]) == 0
    assert "GRPO_KERNELS_CPU_ISA=sse9: this machine runs generic" in capsys.readouterr().out


@pytest.fixture
def remembered(tmp_path, monkeypatch, capsys):
    """The lines of info about what was verified, in a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def lines() -> list[str]:
        assert main(["info"]) == 0
        return re.findall(r"^verified +(.*)$", capsys.readouterr().out, re.M)

    return lines


def test_what_was_verified_is_the_bytes_that_ran(tmp_path, monkeypatch, remembered):
    """A library of the same version with other bytes, other code or another instruction set has not been verified, and
    neither has a run of fewer checks to make way for a larger one of another library."""
    monkeypatch.setattr(cpu, "LIBRARY", Path(shutil.copy2(cpu.LIBRARY, tmp_path)))
    records.write("cpu", ["cpu", "torch"], 40, 0)
    (line,) = remembered()
    assert re.search(r": cpu, torch; 40 of 40 checks hold \([-\d]+, grpo_kernels [\d.]+, torch [^;]+\)$", line)
    records.write("cpu", ["cpu", "torch"], 20, 0)
    assert remembered() == [line]
    with monkeypatch.context() as patch:
        patch.setenv("GRPO_KERNELS_CPU_ISA", "generic")
        assert remembered() == [f"{line}; not what is here, which has another instruction set: verify it"]
    with cpu.LIBRARY.open("ab") as file:
        file.write(b"built again")
    assert remembered() == [f"{line}; not what is here, which has another code: verify it"]
    records.write("cpu", ["cpu", "torch"], 20, 0)
    assert remembered() == [line.replace("40 of 40", "20 of 20")]


@pytest.mark.parametrize(
    "content",
    ["", "5", "{}", '[{"kind"', "[" * 100_000, '[1, {"kind": 1, "backends": 2, "checks": "3", "broken": []}]', "é"],
    ids=lambda text: text[:20],
)
def test_a_record_that_is_none(tmp_path, remembered, content):
    """Half-written or edited: nothing is verified, and the next run is remembered."""
    (tmp_path / "grpo_kernels").mkdir()
    (tmp_path / "grpo_kernels" / "verified.json").write_text(content, encoding="latin-1")
    assert remembered() == ["nothing yet: python -m grpo_kernels verify"]
    records.write("cpu", ["torch"], 3, 1)
    assert "; 2 of 3 checks hold (" in remembered()[0]


def test_a_record_that_cannot_be_written_leaves_the_others(tmp_path, monkeypatch, remembered):
    records.write("cpu", ["torch"], 3, 0)
    before = remembered()

    def full(path: Path, text: str) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    records.write("cpu", ["cpu"], 3, 0)
    assert remembered() == before
    assert [path.name for path in (tmp_path / "grpo_kernels").iterdir()] == ["verified.json"]


@pytest.mark.parametrize(
    "some", [("grpo", "gspo"), pytest.param(("cispo", "vespo"), marks=pytest.mark.nightly)], ids=" ".join
)
def test_verify(capsys, some):
    """Interpreter and emulator are slow: they get one objective of one pass and one of two, each in a dtype."""
    sizes, others = ["--vocab", "501", "--tokens", "16"], len(verify.DIVERGED) + 1 + len(verify.LINEAR)
    chosen = [part for name in some for part in ("--preset", name)]
    for backend in backends.names():
        if backend in ("triton", "cuda") and backend in usable_backends():
            dtype = "fp32" if backend == "triton" else "bf16"
            assert main(["verify", *sizes, "--backend", backend, "--dtype", dtype, *chosen]) == 0
            count = len(some) + others
            assert capsys.readouterr().out.splitlines()[-1] == f"{count} of {count} hold"
    assert main(["verify", *sizes, "--backend", "cpu", "--backend", "torch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    count = 2 * (len(LossConfig.presets()) + others) * 4
    assert lines[-1] == f"{count} of {count} hold"
    assert sum(line.startswith("fp16") for line in lines) == count // 4
    assert sum("yes / yes" in line for line in lines) == count - 2 * len(verify.LINEAR) * 4
    assert main(["info"]) == 0
    assert f"{count} of {count} checks hold" in capsys.readouterr().out


def test_info_prints_every_table_that_is_asked_for(capsys):
    tables = {"--presets": info.presets_table, "--surrogates": info.surrogates_table, "--metrics": info.metrics_table}
    assert main(["info", *tables]) == 0
    assert capsys.readouterr().out == "\n\n".join(table() for table in tables.values()) + "\n"
    for option in tables:
        assert main(["info", "--json", option]) == 2
        assert f"--json has no effect with {option}: leave one of them out" in capsys.readouterr().err


def test_verify_of_a_single_column(capsys):
    """Its log-prob is 0 whatever the logits are, and so is every gradient: 0 of 0 is no error, anything else is."""
    assert main(["verify", "--vocab", "1", "--tokens", "8", "--preset", "grpo", "--backend", "cpu"]) == 0
    assert "BROKEN" not in capsys.readouterr().out
    zero = (torch.zeros(3),)
    assert verify._error(zero, zero) == 0
    for wrong in (1e-30, float("nan")):
        assert not verify.LinearResult("cpu", "grpo", "fp32", verify._error((zero[0] + wrong,), zero), 0.0).passed


def broken_kernel(fault, original):
    """The CPU's one-pass kernel with a fault."""

    def kernel(rows, *rest):
        out, log_prob = rest[-1], rest[2].log_prob
        if fault == "last block missing":
            rows = rows._replace(logits=rows.logits.clone())
            rows.logits[..., -64:] = float("-inf")
        if fault == "no temperature":
            numbers = rows.numbers.clone()
            numbers[0] = 1
            rows = rows._replace(numbers=numbers)
        original(rows, *rest)
        if fault == "gradient x 0.99":
            out.mul_(0.99)
        elif fault == "gradient x 1.001":
            out.mul_(1.001)
        elif fault == "log-prob":
            log_prob += 1e-3 * rows.live
        elif fault == "one NaN":
            out[(0,) * out.dim()] = float("nan")

    return kernel


FAULTS = ["gradient x 0.99", "gradient x 1.001", "last block missing", "no temperature", "log-prob", "one NaN"]


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_finds_a_broken_backend(capsys, monkeypatch, fault):
    monkeypatch.setattr(cpu, "fused_loss", broken_kernel(fault, cpu.fused_loss))
    some = ["--preset", "grpo", "--dtype", "fp32", "--backend", "cpu", "--backend", "torch"]
    status = main(["verify", "--vocab", "301", "--tokens", "16", *some])
    text = capsys.readouterr().out
    assert status == 1
    broken = [line for line in text.splitlines() if re.match("fp32.* BROKEN$", line)]
    assert all(re.match(r"fp32 +(grpo|forward_kl|long rows)\S* +cpu ", line) for line in broken), text
    assert any(re.match(r"fp32 +grpo +cpu ", line) for line in broken), text
    total = (2 + len(verify.DIVERGED) + len(verify.LINEAR)) * 2
    assert text.splitlines()[-1] == f"{total - len(broken)} of {total} hold; {len(broken)} BROKEN"
    assert main(["info"]) == 0
    assert f"{total - len(broken)} of {total} checks hold" in capsys.readouterr().out


def test_verify_finds_swapped_bounds(capsys, monkeypatch):
    """Of an asymmetric clip; the reference forms its bounds itself."""
    monkeypatch.setattr(Clip, "parameters", lambda self: (1 - self.high, 1 + self.low, float("inf")))
    arguments = ["--vocab", "301", "--tokens", "64", "--preset", "dapo", "--dtype", "fp32", "--backend", "torch"]
    assert main(["verify", *arguments]) == 1
    assert re.search(r"fp32 +dapo +torch .* BROKEN", capsys.readouterr().out)


def test_verify_finds_what_depends_on_the_batch(capsys, monkeypatch):
    original = cpu.fused_loss

    def kernel(rows, *rest):
        original(rows, *rest)
        rest[2].log_prob.mul_(1 + 1e-7 * (len(rows.token_ids) - 1))

    monkeypatch.setattr(cpu, "fused_loss", kernel)
    arguments = ["--preset", "grpo", "--dtype", "fp32", "--backend", "cpu", "--vocab", "50", "--tokens", "8"]
    assert main(["verify", *arguments]) == 1
    assert "yes / NO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--vocab 0", "--vocab must be at least 1; got 0."),
        ("--tokens 3", "--tokens must be at least 4; got 3."),
        ("--seed 99999999999999999999", "--seed must be a number of 64 bits, from -2^63 to 2^63 - 1; got 99999999"),
        ("--device meta", "--device meta cannot be used here: "),
    ],
)
def test_verify_refuses_by_name(options, said, capsys):
    assert main(["verify", *options.split()]) == 2
    assert said in capsys.readouterr().err


def test_verify_is_interrupted(capsys, monkeypatch):
    """What was measured so far is printed."""
    seen = []

    def interrupted(*rest):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(1)
        return original(*rest)

    original = verify.batch_invariant
    monkeypatch.setattr(verify, "batch_invariant", interrupted)
    assert main(["verify", "--vocab", "50", "--tokens", "8", "--backend", "torch"]) == 130
    text = capsys.readouterr().out
    assert "interrupted after 2 of" in text
    assert text.count("torch") == 2


def test_verify_finds_unrepeatable_results(capsys, monkeypatch):
    original = cpu.fused_loss
    calls = []

    def wavering(rows, *rest):
        original(rows, *rest)
        calls.append(1)
        rest[-1][(0,) * rest[-1].dim()] *= 1 + 1e-7 * len(calls)

    monkeypatch.setattr(cpu, "fused_loss", wavering)
    arguments = ["--preset", "grpo", "--dtype", "fp64", "--backend", "cpu", "--vocab", "50", "--tokens", "8"]
    assert main(["verify", *arguments]) == 1
    assert "NO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "--preset", "grop"], "--preset must be one of .*Did you mean 'grpo'"),
        (["verify", "--dtype", "fp8"], "--dtype must be one of fp32, bf16, fp16, fp64; got 'fp8'"),
        (["verify", "--backend", "gpu"], "--backend must be one of cpu, cuda, triton, torch"),
        (["verify", "--tokens", "1"], "--tokens must be at least 4"),
        (["verify", "--vocab", "0"], "--vocab must be at least 1"),
        (["verify", "--device", "foo"], "--device foo cannot be used here: "),
        (["verify", "--vocab", "300000", "--tokens", "100000"], r"would take about 33\d\d.\d GB .*--tokens \d+ fits"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("error: ")


def test_help(capsys):
    for command in ([], ["info"], ["verify"], ["bench"], ["match"], ["train"]):
        with pytest.raises(SystemExit) as caught:
            main([*command, "--help"])
        assert caught.value.code == 0
    assert "--reference-loss" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"grpo_kernels {grpo_kernels.__version__}\n"


def test_without_a_command(capsys):
    """The commands, and with which to begin."""
    assert main([]) == 2
    text = capsys.readouterr().err
    for name in ("info", "verify", "bench", "match", "train"):
        assert re.search(f"^    {name} +\\w", text, re.M)
    assert "Begin with info" in text


SLOW_TORCH = """
import sys, time
print("importing", flush=True)
time.sleep(60)
"""


def not_ignored():
    """A suite that runs in a shell's background passes an ignored SIGINT on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("script", [False, True])
def test_interrupted_while_it_is_imported(tmp_path, script):
    """Within the second that PyTorch takes: no traceback, and the shell's status of an interrupt."""
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    (tmp_path / "grpo-kernels").write_text("from grpo_kernels.__main__ import main\n")
    command = [sys.executable, *(["grpo-kernels"] if script else ["-m", "grpo_kernels"]), "info"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, preexec_fn=not_ignored, **pipes) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGINT


def test_interrupts_of_other_programs_raise():
    """Only ours changes what Ctrl-C does, and takes it back before a command runs."""
    code = "import signal, grpo_kernels; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=not_ignored)
    assert result.stdout == "True\n"


def test_an_ignored_interrupt_stays_ignored(monkeypatch):
    """As a shell starts what runs in its background."""
    taken = []
    monkeypatch.setattr(sys, "argv", ["grpo-kernels"])
    monkeypatch.setattr(signal, "signal", lambda *arguments: taken.append(arguments))
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    interrupt.leave_quietly()
    assert taken == []
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)
    interrupt.leave_quietly()
    assert taken == [(signal.SIGINT, interrupt._leave)]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, None])
def test_an_ignored_sigterm_stays_ignored(monkeypatch, handler):
    """As whoever started the command asked; None is a handler that Python cannot put back."""
    taken = []
    monkeypatch.setattr(signal, "getsignal", lambda number: handler)
    monkeypatch.setattr(signal, "signal", lambda *arguments: taken.append(arguments))
    with interrupt.sigterm_raises():
        assert taken == []


def test_an_interrupted_command(capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "main", interrupted)
    monkeypatch.setattr(signal, "getsignal", lambda number: interrupt._leave)
    restored = []
    monkeypatch.setattr(signal, "signal", lambda *arguments: restored.append(arguments))
    assert main(["info"]) == 128 + signal.SIGINT
    ended = [(signal.SIGTERM, signal.default_int_handler), (signal.SIGTERM, None)]  # as Ctrl-C, and as it was
    assert restored == [(signal.SIGINT, signal.default_int_handler), *ended]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(capsys, monkeypatch, terminal):
    """A bar overwrites itself on a terminal; a file keeps a few lines."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    some = ["--preset", "grpo", "--preset", "dapo", "--backend", "torch", "--vocab", "50", "--tokens", "8"]
    assert main(["verify", *some]) == 0
    text = capsys.readouterr().err
    assert ("\r" in text) == terminal
    if not terminal:
        lines = text.splitlines()
        assert 5 <= len(lines) <= 10
        assert lines[-1] == "verify: 28 of 28 checks"


def test_lines_of_progress(capsys):
    bar = Lines(400, "run", "step", done=390)
    bar.set_postfix({"reward": "0.5"})
    for _ in range(10):
        bar.update()
    bar.close()
    assert capsys.readouterr().err == "run: 400 of 400 steps, reward 0.5\n"


GONE = [["info"], ["info", "--presets"], ["--help"], ["train", "--help"], ["--version"]]


@pytest.mark.parametrize(
    "arguments", [*GONE[:2], *(pytest.param(each, marks=pytest.mark.nightly) for each in GONE[2:])], ids=" ".join
)
def test_a_reader_that_is_gone_ends_a_command_quietly(arguments):
    """As of ``| head -1``: its end of the pipe is closed before anything is printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as users have it
    command = [sys.executable, "-m", "grpo_kernels", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE


SMALL = ["verify", "--preset=grpo", "--dtype=fp32", "--backend=cpu", "--vocab=50", "--tokens=8"]


def as_a_process(monkeypatch, *arguments: str) -> int:
    """The status of a command line's process, with the streams that it has."""
    monkeypatch.setattr(sys, "argv", ["grpo_kernels", *arguments])
    return main()


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("arguments", [["info"], SMALL, ["match", "{folder}/mine.py:loss"]], ids=" ".join)
def test_a_stream_that_is_closed(monkeypatch, tmp_path, name, arguments):
    """As by ``>&-``: nothing is said there, and the status is what it would have been."""
    (tmp_path / "mine.py").write_text(
        "def loss(log_probs, old_log_probs, advantages, mask):\n"
        "    return (-advantages[:, None] * (log_probs - old_log_probs).exp() * mask).sum() / mask.sum()\n"
    )
    monkeypatch.setattr(sys, name, None)
    assert as_a_process(monkeypatch, *(each.format(folder=tmp_path) for each in arguments)) == 0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_streams_closed_before_python_starts(tmp_path):
    """No file of ours gets their numbers, nor one of a process that we start."""
    code = (
        "import os, subprocess, sys\nfrom grpo_kernels import streams\nstreams.mend()\n"
        "print('\\u03a3')\n"
        "sys.exit(subprocess.run(['sh', '-c', 'readlink /proc/$$/fd/0 /proc/$$/fd/2 > ' + sys.argv[1]]).returncode)"
    )
    command = f'exec {sys.executable} -c "$0" "$1" <&- >&- 2>&-'
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run(["sh", "-c", command, code, str(tmp_path / "open")], cwd=ROOT, env=environment)
    assert run.returncode == 0
    assert (tmp_path / "open").read_text() == "/dev/null\n" * 2


@pytest.mark.parametrize("option", ["--surrogates", "--metrics"])
def test_letters_that_a_stream_cannot_encode(monkeypatch, option):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert as_a_process(monkeypatch, "info", option) == 0
    assert rb"\u" in written.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_standard_output_that_is_full(monkeypatch, capsys):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert as_a_process(monkeypatch, "info") == 2
    assert capsys.readouterr().err == "error: standard output cannot be written: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (SMALL, 0),
        # It says which ones are left out.
        pytest.param([each for each in SMALL if "backend" not in each], 0, marks=pytest.mark.nightly),
        (["match", "{folder}/mine.py:loss"], 0),
        (["verify", "--tokens=0"], 2),
    ],
    ids=["progress", "left out", "said by a module", "an error"],
)
def test_a_standard_error_that_is_full(monkeypatch, tmp_path, arguments, status):
    """The status is what it would have been."""
    (tmp_path / "mine.py").write_text(
        "import sys\nprint('imported', file=sys.stderr)\n"
        "def loss(log_probs, old_log_probs, advantages, mask):\n"
        "    return (-advantages[:, None] * (log_probs - old_log_probs).exp() * mask).sum() / mask.sum()\n"
    )
    arguments = [each.format(folder=tmp_path) for each in arguments]
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert as_a_process(monkeypatch, *arguments) == status
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # for what is left in it


def test_a_disk_that_is_full_elsewhere_is_not_standard_output(monkeypatch, capsys):
    """The errors of writes have no name."""

    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("grpo_kernels.info.main", fails)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == f"error: [Errno {errno.ENOSPC}] No space left on device\n"


def test_an_error_of_the_system_is_a_message(monkeypatch, capsys):
    def refused(*_):
        raise PermissionError(13, "Permission denied", "/shut/run")

    monkeypatch.setattr("grpo_kernels.info.main", refused)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: '/shut/run'\n"
