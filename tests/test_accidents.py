"""The training loop when something happens to it: what is said, what is left, and that a run goes on as if unbroken."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import resource
import signal
import stat
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from grpo_kernels import backends, files
from grpo_kernels.__main__ import main
from grpo_kernels.training import checkpoint, command, loop, report, trackers
from grpo_kernels.training.loop import Trainer
from grpo_kernels.training.options import Options
from grpo_kernels.training.policy import ByteTokenizer
from grpo_kernels.training.ranks import Ranks, Several
from grpo_kernels.training.report import RunFolder

TINY = {"prompts": 2, "group": 2, "minibatch": 4, "hidden": 16, "layers": 1, "numbers": 2, "steps": 5}
DRAW = report.draw
FLAGS = [f"--{name}={value}" for name, value in TINY.items()]
OF_A_MODEL = [flag for flag in FLAGS if not flag.startswith(("--hidden", "--layers"))]


@pytest.fixture(autouse=True)
def _as_users_run_it(request, tmp_path, monkeypatch):
    torch.use_deterministic_algorithms(False)
    monkeypatch.chdir(tmp_path)
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(report, "draw", lambda records, names, title, file: file.write_text(title))


def train(*arguments: str) -> int:
    return main(["train", *arguments])


def message_of(*arguments: str) -> str:
    """What the command exits with: a message, no traceback."""
    with pytest.raises(SystemExit) as refused:
        train(*arguments)
    return str(refused.value)


def log(folder: str) -> list[dict]:
    records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{name: r[name] for name in r if name not in ("seconds", "tokens_per_second")} for r in records]


def names(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


WHOLE = ["checkpoint.safetensors", "curves.png", "log.jsonl", "options.json"]


@pytest.fixture
def whole() -> list[dict]:
    """The log of the unbroken run."""
    assert train(*FLAGS, "--out", "whole") == 0
    assert names("whole") == WHOLE
    return log("whole")


@contextlib.contextmanager
def before_step(number: int, action) -> Iterator[None]:
    """Do something before a step of every run."""
    step = Trainer.train_step

    def run(trainer):
        if trainer.step == number:
            action()
        return step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", run)
        yield


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that is full behind so many bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Killed(Exception):
    """Of the process, in the middle of a step."""


def fail() -> None:
    raise Killed


LINES = ['{"step": 1}', '{"step": 1, "reward": null, "seconds": 1}', '{"step": 1, "reward": "high", "seconds": 1.0}']


@pytest.mark.parametrize("line", LINES)
def test_a_line_without_its_numbers_is_left_out(line, capsys):
    """Where it was read as a record the run went on and ended in a KeyError; one of a step again counted twice."""
    assert train(*FLAGS, "--steps", "3", "--out", "run") == 0
    lines = Path("run/log.jsonl").read_text().splitlines()
    changed = [lines[0], line, lines[2], lines[0]]
    Path("run/log.jsonl").write_text("".join(each + "\n" for each in changed))
    options = json.loads(Path("run/options.json").read_text())
    Path("run/options.json").write_text(json.dumps(options | {"steps": 4}))
    capsys.readouterr()
    assert train("--resume", "run") == 0
    said = capsys.readouterr().out
    assert "note: 2 unreadable or repeated lines" in said
    assert "mean reward of the last 3 steps" in said
    assert [record["step"] for record in log("run")] == [0, 2, 3]


ENDS = {"cut": b'{"step": 4, "rew', "zeros": b"\0" * 300, "other": b"\xff\xfe{\n[1]\n", "deep": b"[" * 100_000}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_damaged_end_of_the_log_is_left_out(whole, end, capsys):
    with before_step(4, fail), contextlib.suppress(Killed):
        train(*FLAGS, "--checkpoint-every", "2", "--out", "cut")
    with Path("cut/log.jsonl").open("ab") as file:
        file.write(end)
    assert train("--resume", "cut") == 0
    assert "unreadable or repeated line" in capsys.readouterr().out
    assert log("cut") == whole


def test_a_log_that_cannot_be_read(capsys):
    """On the way, curves stay undrawn; a run that is resumed says what to do."""
    folder = RunFolder(Path("run"), Options(**TINY), resume=False)
    folder.save_checkpoint(Trainer(Options(**TINY)).state())
    Path("run/log.jsonl").mkdir()
    assert folder.plot() is None
    assert "note: run/curves.png cannot be drawn: " in capsys.readouterr().err
    folder.close()
    said = message_of("--resume", "run")
    assert said.startswith("the log run/log.jsonl cannot be read: ")
    Path("run/log.jsonl").rmdir()
    assert train("--resume", "run") == 0


def test_a_full_disk(whole):
    """At a checkpoint: the earlier one stays, nothing else does, and the run goes on from it to the same end."""
    with contextlib.ExitStack() as until, before_step(3, lambda: until.enter_context(largest_file(20_000))):
        said = message_of(*FLAGS, "--checkpoint-every", "2", "--out", "run")
    assert said.startswith("the run folder run cannot be written any more: ")
    assert "File too large" in said
    assert said.endswith("The checkpoint of step 2 is as it was; continue from it with --resume run.")
    assert names("run") == ["checkpoint.safetensors", "log.jsonl", "options.json"]
    assert train("--resume", "run") == 0
    assert log("run") == whole


def test_a_full_disk_at_a_line_of_the_log(whole):
    def fill() -> None:
        until.enter_context(largest_file(Path("run/log.jsonl").stat().st_size + 100))

    with contextlib.ExitStack() as until, before_step(3, fill):
        said = message_of(*FLAGS, "--checkpoint-every", "2", "--out", "run")
    assert "cannot be written any more" in said
    assert not Path("run/log.jsonl").read_text().endswith("\n")  # the last line is cut
    assert train("--resume", "run") == 0
    assert log("run") == whole


def test_a_full_disk_from_the_beginning():
    with largest_file(10):
        assert "the run folder a/run cannot be written: " in message_of(*FLAGS, "--out", "a/run")
        said = with_room_for_options()
    assert said.endswith("There was no checkpoint yet: start again, in another --out.")
    assert names(".") == []  # no step is done


def with_room_for_options() -> str:
    with contextlib.ExitStack() as until, before_step(0, lambda: until.enter_context(largest_file(10))):
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return message_of(*FLAGS, "--out", "run")


def test_curves_that_cannot_be_written_stop_nothing(whole, monkeypatch, capsys):
    monkeypatch.setattr(report, "draw", lambda *_: os.close(-1))
    assert train(*FLAGS, "--out", "run") == 0
    assert "note: run/curves.png cannot be drawn: " in capsys.readouterr().err
    assert log("run") == whole


@pytest.mark.parametrize("place", [0.02, *(i / 7 for i in range(1, 7)), 0.995])
def test_zeroed_bytes_of_a_checkpoint_are_noticed(place, tmp_path):
    """Anywhere in the file; nothing of the folder is changed."""
    options = Options(**TINY)
    folder = RunFolder(tmp_path / "run", options, resume=False)
    folder.save_checkpoint(Trainer(options).state())
    folder.close()
    content = bytearray((tmp_path / "run" / "checkpoint.safetensors").read_bytes())
    at = int(place * len(content))
    lost = content[at : at + 64]
    assert any(lost)
    content[at : at + 64] = bytes(len(lost))
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(content)
    before = {name: (tmp_path / "run" / name).read_bytes() for name in names("run")}
    said = message_of("--resume", "run")
    assert "run/checkpoint.safetensors is damaged" in said
    assert {name: (tmp_path / "run" / name).read_bytes() for name in names("run")} == before


@pytest.mark.parametrize(("told", "said"), [("", "AssertionError"), ("\na\nb", "a")])
def test_an_error_without_a_message(told, said, monkeypatch):
    """Of a library that reads a checkpoint."""
    assert train(*FLAGS, "--out", "run") == 0

    def fails(path: Path) -> None:
        raise AssertionError(told)

    monkeypatch.setattr(checkpoint, "read", fails)
    assert f"run/checkpoint.safetensors is damaged (AssertionError: {said})" in message_of("--resume", "run")


def test_the_checkpoint_of_another_run_is_refused():
    assert train(*FLAGS, "--out", "run") == 0
    assert train(*FLAGS, "--hidden", "32", "--out", "other") == 0
    kept = Path("run/log.jsonl").read_bytes()
    Path("other/checkpoint.safetensors").replace("run/checkpoint.safetensors")
    assert "is of a run of other options than run/options.json has (RuntimeError: " in message_of("--resume", "run")
    assert Path("run/log.jsonl").read_bytes() == kept


@pytest.mark.parametrize("kl", [0, 1])
def test_the_checkpoint_of_a_run_with_or_without_kl_is_refused(kl):
    for folder, value in (("run", kl), ("other", 1 - kl)):
        assert train(*FLAGS, "--kl", str(value), "--steps", "1", "--out", folder) == 0
    Path("other/checkpoint.safetensors").replace("run/checkpoint.safetensors")
    assert "(ValueError: one of the two has a reference policy" in message_of("--resume", "run")


def half_written(tensors, file, metadata) -> None:
    """As safetensors writes: under a name of its own first."""
    (file.parent / ".tmpA1b2C3").write_bytes(b"half")
    kill()


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


KILLS = {
    "before anything is written": ("grpo_kernels.training.checkpoint.replaced", kill),
    "when the file is half there": ("safetensors.torch.save_file", half_written),
    "before it is on the disk": ("grpo_kernels.files.sync", kill),
    "before it takes its place": ("pathlib.Path.replace", kill),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", KILLS)
def test_kill_9_at_a_checkpoint(moment, tmp_path):
    """The one before is whole, and what is left over goes with the next."""
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.write(path, {"weights": torch.zeros(1000)}, {"step": 1})
    if (child := os.fork()) == 0:  # no exception and no handler runs in it any more
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*KILLS[moment])
            checkpoint.write(path, {"weights": torch.ones(1000)}, {"step": 2})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert checkpoint.read(path)["step"] == 1
    checkpoint.write(path, {"weights": torch.ones(1000)}, {"step": 3})
    assert checkpoint.read(path)["step"] == 3
    assert names(tmp_path) == ["checkpoint.safetensors"]


def fails_to_sync(is_kind, number: int):
    """An fsync that fails for files or for folders."""
    fsync = os.fsync

    def run(descriptor: int) -> None:
        if is_kind(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    return run


def test_a_folder_that_cannot_be_synced_loses_nothing(tmp_path, monkeypatch):
    """Some network file systems refuse it; a file that is not on the disk is told."""
    path = tmp_path / "checkpoint.safetensors"
    monkeypatch.setattr(os, "fsync", fails_to_sync(stat.S_ISDIR, errno.EINVAL))
    files.sync(tmp_path)
    monkeypatch.setattr(os, "fsync", fails_to_sync(stat.S_ISDIR, errno.EIO))
    checkpoint.write(path, {"weights": torch.zeros(10)}, {"step": 1})
    with pytest.raises(OSError, match="Input/output error"):
        files.sync(tmp_path)
    monkeypatch.setattr(os, "fsync", fails_to_sync(stat.S_ISREG, errno.EINVAL))
    with pytest.raises(OSError, match="Invalid argument"):
        checkpoint.write(path, {"weights": torch.zeros(10)}, {"step": 2})
    assert checkpoint.read(path)["step"] == 1


def test_files_are_as_readable_as_any_other(tmp_path):
    """A colleague may resume a run, where the umask lets them read it."""
    assert train(*FLAGS, "--out", "run", "--save-model", "model") == 0
    modes = {path.stat().st_mode & 0o777 for folder in ("run", "model") for path in Path(folder).iterdir()}
    (tmp_path / "any").write_text("")
    assert modes == {(tmp_path / "any").stat().st_mode & 0o777}


def test_a_step_is_saved_once(monkeypatch):
    """At the last one too, and where an ended run is resumed."""
    saved: list[int] = []
    write = checkpoint.write

    def counted(path: Path, tensors: dict, state: dict) -> None:
        saved.append(state["step"])
        write(path, tensors, state)

    monkeypatch.setattr(checkpoint, "write", counted)
    for every in ("5", "3"):
        assert train(*FLAGS, "--checkpoint-every", every, "--out", f"run{every}") == 0
    assert train("--resume", "run5") == 0
    assert saved == [5, 3, 5]


def test_what_a_killed_writer_leaves_of_a_run_at_its_end():
    """No checkpoint follows the last, whose writer takes such a folder away."""
    assert train(*FLAGS, "--out", "run") == 0
    whole = names(Path("run"))
    left = Path("run", "checkpoint.safetensors.unfinished")
    left.mkdir()
    (left / ".tmpA1b2C3").write_bytes(b"half")
    assert train("--resume", "run") == 0
    assert names(Path("run")) == whole


def test_options_are_on_the_disk_before_a_step(monkeypatch):
    """A checkpoint without them cannot be resumed."""
    synced: list[str] = []
    monkeypatch.setattr(report, "sync", lambda path: synced.append(str(path)))
    RunFolder(Path("run"), Options(**TINY), resume=False).close()
    assert synced == ["run/options.json", "run"]


def test_resume_takes_no_other_folder():
    assert message_of("--resume", "run", "--out", "other") == (
        "--resume run continues a run in its own folder: leave --out out."
    )


def test_a_backend_that_cannot_serve_leaves_no_folder(monkeypatch, capsys):
    monkeypatch.setattr(backends.get("torch"), "unsupported", lambda request: "no such kernels")
    assert train(*FLAGS, "--device", "cpu", "--backend", "torch", "--out", "run") == 2
    assert "error: --backend torch cannot serve cpu: no such kernels" in capsys.readouterr().err
    assert names(".") == []


def test_a_run_that_never_began_leaves_no_folder(monkeypatch, capsys):
    """What stops it before its first step is done, in any way; one step later the folder stays."""
    handler = signal.getsignal(signal.SIGTERM)  # an earlier test may have called main
    with before_step(0, fail), pytest.raises(Killed):
        train(*FLAGS, "--out", "a/b/run")
    assert names(".") == []
    with before_step(1, fail), pytest.raises(Killed):
        train(*FLAGS, "--out", "began")
    assert names("began") == ["log.jsonl", "options.json"]
    start = loop.start_trackers
    monkeypatch.setattr(loop, "start_trackers", lambda *each: os.kill(os.getpid(), signal.SIGTERM) or start(*each))
    assert train(*FLAGS) == 130
    assert "interrupted before the end of its first step: nothing is left of the run" in capsys.readouterr().out
    Path("kept").mkdir()
    Path("kept/notes").write_text("of somebody else")
    assert train(*FLAGS, "--out", "kept") == 130
    assert names("kept") == ["notes"]
    announce = command._announce
    monkeypatch.setattr(command, "_announce", lambda *each: os.kill(os.getpid(), signal.SIGTERM) or announce(*each))
    assert train(*FLAGS) == 130  # before the loop's own handlers are there
    assert names(".") == ["began", "kept", "runs"] or names(".") == ["began", "kept"]
    assert not Path("runs").exists()
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.fixture
def _with_a_terminal() -> Iterator[None]:
    """Without nohup's SIGHUP, which is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("_with_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_saves(whole, number, capsys):
    """SIGTERM, and a terminal that is closed, as Ctrl-C."""
    with before_step(2, lambda: os.kill(os.getpid(), number)):
        assert train(*FLAGS, "--out", "run") == 130
    assert "continue with: python -m grpo_kernels train --resume run" in capsys.readouterr().out
    assert len(log("run")) == 3
    assert train("--resume", "run") == 0
    assert log("run") == whole


@pytest.mark.usefixtures("_with_a_terminal")
def test_nohup_stays(whole):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with before_step(2, lambda: os.kill(os.getpid(), signal.SIGHUP)):
        assert train(*FLAGS, "--out", "run") == 0
    assert log("run") == whole


def test_a_terminal_that_is_gone_stops_nothing(whole, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    gone = os.fdopen(write, "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", gone)
        with before_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            assert train(*FLAGS, "--out", "run") == 130
        assert train("--resume", "run") == 0
    with contextlib.suppress(BrokenPipeError):
        gone.close()
    assert log("run") == whole


def test_a_clock_that_jumps_changes_nothing(whole, monkeypatch):
    """Back by a year, forth by two, at every look."""
    jumps = [1e9 + (-1) ** i * i * 3e7 for i in range(1000)]
    monkeypatch.setattr(time, "time", lambda: jumps.pop())
    assert train(*FLAGS, "--out", "run") == 0
    assert log("run") == whole
    records = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert all(0 < record["seconds"] < 60 for record in records)


def test_one_process_writes_into_a_folder():
    """A scheduler may start a job again before the first has ended."""
    assert train(*FLAGS, "--out", "run") == 0
    held = RunFolder(Path("run"), Options(**TINY), resume=True)
    for arguments in (["--resume", "run"], [*FLAGS, "--out", "run"]):
        assert message_of(*arguments).startswith("another process writes into run: wait for its end")
    held.close()
    assert train("--resume", "run") == 0


def test_runs_that_begin_at_once_have_folders_of_their_own(monkeypatch):
    """Another takes the next free folder after this one has seen that it is free."""
    mkdir, others = Path.mkdir, []

    def beaten(path, *given, **named):
        monkeypatch.setattr(Path, "mkdir", mkdir)
        others.append(RunFolder.fresh(Options(**TINY)))
        return mkdir(path, *given, **named)

    monkeypatch.setattr(Path, "mkdir", beaten)
    own = RunFolder.fresh(Options(**TINY))
    assert [folder.path.name for folder in (*others, own)] == ["sort-grpo-0", "sort-grpo-1"]


@pytest.mark.slow
def test_curves_and_samples_appear_while_it_trains(monkeypatch, capsys):
    monkeypatch.setattr(report, "REDRAWN_AFTER", 0.0)
    seen: list[bool] = []

    def look() -> None:
        seen.append(Path("run/curves.png").exists())
        monkeypatch.setattr(report, "REDRAWN_AFTER", 30.0)

    with before_step(1, look):
        assert train(*FLAGS, "--out", "run") == 0
    assert seen == [True]
    records = log("run")
    assert all(record["sample"][2] == ">" and record["sample"][:2].isdigit() for record in records)
    assert len({record["sample"] for record in records}) > 1
    assert f"sample {records[-1]['sample']!r}" in capsys.readouterr().err


def test_a_sample_is_a_response_with_its_reward():
    trainer = Trainer(Options(**{**TINY, "numbers": 3, "largest": 3}))
    for _ in range(3):
        record = trainer.train_step()
        prompt, response = record["sample"].split(">", 1)
        problem = types.SimpleNamespace(prompt=prompt, answer=sorted(map(int, prompt)))
        assert trainer.task.score(problem, response) == pytest.approx(record["sample_reward"])


def test_the_result_is_a_model_that_transformers_loads(capsys):
    """With its tokenizer: at the end of a run, of an ended run, as the model of another one."""
    import transformers

    assert train(*FLAGS, "--out", "run", "--save-model", "a/model") == 0
    assert "policy and tokenizer, for from_pretrained: a/model" in capsys.readouterr().out
    assert train("--resume", "run", "--save-model", "again") == 0
    trained = Trainer(Options(**TINY))
    trained.load_state(checkpoint.read(Path("run/checkpoint.safetensors")))
    ids = torch.tensor([trained.tokenizer.encode("31>")])
    for folder in ("a/model", "again"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(model(ids).logits, trained.model(ids).logits)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer("31>").input_ids == ids[0].tolist()
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)
    assert train(*OF_A_MODEL, "--model", "a/model", "--teacher", "again", "--divergence", "jsd", "--out", "next") == 0
    assert "there is something already" in message_of(*FLAGS, "--save-model", "a/model", "--out", "more")
    assert not Path("more").exists()
    with largest_file(2000):
        said = message_of("--resume", "next", "--save-model", "full")
    assert "next" in said
    assert not Path("full").exists()


def test_an_interrupted_run_saves_no_model(capsys):
    """One that is half trained, or not at all, is not what the folder's reader waits for; the same command line, with
    --resume, comes to the end."""
    with before_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert train(*FLAGS, "--out", "run", "--save-model", "model") == 130
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == (
        "interrupted; continue with: python -m grpo_kernels train --resume run --save-model model"
    )
    assert "from_pretrained" not in said
    with before_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert train("--resume", "run", "--save-model", "model") == 130
    assert names(".") == ["run"]
    assert train("--resume", "run", "--save-model", "model") == 0
    assert "model.safetensors" in names("model")


def test_a_model_in_place_of_a_run_whose_folder_has_no_name_yet():
    for model in ("runs/sort-grpo-0", "runs"):
        assert "own folder" in message_of(*FLAGS, "--save-model", model)
        assert names(".") == []


def test_options_of_somebody_else_stay():
    """Of a file of another program; those of a run that never began are replaced."""
    for text in ('{"my": "settings"}', "no json", "[]", '{"lr": 0.001, "seed": 3}', "{}"):
        Path("mine").mkdir(exist_ok=True)
        Path("mine/options.json").write_text(text)
        assert message_of(*FLAGS, "--out", "mine") == (
            "mine/options.json is there already, and no run's: choose another --out."
        )
        assert Path("mine/options.json").read_text() == text
        assert names("mine") == ["options.json"]
    opened = Path.open

    def unwritable(path, *mode):
        if path.name == "options.json" and mode:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", unwritable)
        assert "cannot be written: " in message_of(*FLAGS, "--out", "mine")
    assert names("mine") == ["options.json"]
    Path("mine/options.json").write_text(json.dumps(dataclasses.asdict(Options(seed=7))))
    assert train(*FLAGS, "--out", "mine") == 0
    assert json.loads(Path("mine/options.json").read_text())["seed"] == 0


def test_memory_that_is_not_there(capsys):
    """PyTorch's words, in one line; numbers that would fill it bit by bit are refused."""
    assert train(*FLAGS, "--hidden", str(1 << 40)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is not enough memory for that. ")
    assert said.count("\n") == 1
    assert train(*FLAGS, "--numbers", str(1 << 62)) == 2
    assert capsys.readouterr().err == f"error: --numbers must be at most 10000; got {1 << 62}.\n"
    for name in ("prompts", "group", "layers"):
        assert train(*FLAGS, f"--{name}", str(1 << 62)) == 2
        assert f"--{name} must be at most " in capsys.readouterr().err
    assert names(".") == []


def test_a_model_is_saved_behind_a_link():
    """To an empty folder, and to none yet; the folder that the run is started in is not replaced."""
    Path("disk").mkdir()
    for name in ("empty", "none"):
        Path(name).symlink_to(Path("disk", name))
    Path("disk/empty").mkdir()
    assert train(*FLAGS, "--out", "run", "--save-model", "empty") == 0
    assert train("--resume", "run", "--save-model", "none") == 0
    for name in ("empty", "none"):
        assert Path(name).is_symlink()
        assert "model.safetensors" in names(Path("disk", name))
    Path("here").mkdir()
    with contextlib.chdir("here"):
        assert "there is something already" in message_of(*FLAGS, "--out", "../more", "--save-model", ".")
    assert names(".") == ["disk", "empty", "here", "none", "run"]


def test_a_file_behind_a_link_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    for text in ("first", "second"):
        files.write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "file").read_text() == text
    assert names(tmp_path / "disk") == ["file"]


def test_a_model_in_place_of_its_run_is_refused_before_the_run():
    for model, options in (("run", ("--out", "run")), ("a", ("--out", "a/run")), ("runs", ())):
        assert "own folder" in message_of(*FLAGS, *options, "--save-model", model)
    assert names(".") == []


def test_a_model_that_cannot_be_saved_is_not_trained(monkeypatch):
    Path("file").write_text("")
    assert message_of(*FLAGS, "--save-model", "file/a/model") == (
        "--save-model file/a/model cannot be written: Not a directory."
    )
    monkeypatch.setattr(os, "mkdir", lambda *_: os.close(-1))
    assert "--save-model a/model cannot be written: " in message_of(*FLAGS, "--save-model", "a/model")
    assert names(".") == ["file"]


def test_the_saved_tokenizer_is_the_same(tmp_path):
    """Of every byte, as text and as ids."""
    import transformers

    own = ByteTokenizer(bytes(range(256)))
    own.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(map(chr, range(0x20, 0x180))) + "\n\t€ 数 3120> <pa <end"
    assert loaded.encode(text) == own.encode(text)
    ids = list(range(2, 258))
    assert loaded.decode(ids, skip_special_tokens=True) == own.decode(ids)
    assert loaded.decode([*own.encode(text), 1, 0, 0], skip_special_tokens=True) == text


def test_a_model_without_a_tokenizer():
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=13, eos_token_id=0, bos_token_id=None, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained("model")
    said = message_of(*OF_A_MODEL, "--model", "model")
    assert "/model: the model is there, but no tokenizer could be loaded from this folder" in said
    assert "tokenizer.save_pretrained" in said
    ByteTokenizer(b"0123456789>").save_pretrained(Path("model"))
    settings = json.loads(Path("model/tokenizer_config.json").read_text())
    Path("model/tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    assert "it has no end-of-sequence token: set eos_token" in message_of(*OF_A_MODEL, "--model", "model")
    weights = Path("model/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "no causal language model could be loaded from this folder" in message_of(*OF_A_MODEL, "--model", "model")
    assert names(".") == ["model"]


def no_login(*_: object, **told) -> None:
    raise RuntimeError("no API key")


class Told:
    """Stands in for wandb, and for a SummaryWriter."""

    def __init__(self) -> None:
        self.begun: list[dict] = []
        self.logged: list[tuple] = []
        self.ended = 0

    def init(self, **told):
        self.begun.append(told)
        return types.SimpleNamespace(log=lambda record, step: self.logged.append((step, record)), finish=self.finish)

    def finish(self) -> None:
        self.ended += 1


def test_weights_and_biases(monkeypatch, capsys):
    """Missing: said before there is a folder. There: every record, and one run when it is resumed."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert message_of(*FLAGS, "--wandb", "sorting") == "--wandb needs the wandb package: pip install wandb"
    assert names(".") == []
    told = Told()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=no_login))
    with pytest.raises(SystemExit, match="--wandb: no API key"):
        train(*FLAGS, "--wandb", "sorting", "--out", "run")
    assert names(".") == []
    monkeypatch.setitem(sys.modules, "wandb", told)
    with before_step(2, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert train(*FLAGS, "--wandb", "sorting", "--out", "run") == 130
    assert train("--resume", "run") == 0
    first, second = told.begun
    assert (first["project"], first["resume"], first["config"]["steps"]) == ("sorting", "allow", 5)
    assert first["id"] == second["id"]
    assert [step for step, _ in told.logged] == [0, 1, 2, 3, 4]
    assert told.logged[3][1]["reward"] == log("run")[3]["reward"]
    assert told.ended == 2


def test_an_id_is_whole_or_not_there(monkeypatch):
    """Half of one would begin another run at the next resumption."""
    monkeypatch.setitem(sys.modules, "wandb", Told())
    folder = RunFolder(Path("run"), Options(**TINY, wandb="sorting"), resume=False)
    with largest_file(5), pytest.raises(OSError, match="File too large"):
        trackers.WandB(folder, Options(**TINY, wandb="sorting"), 0)
    assert names("run") == ["options.json"]
    folder.close()


def test_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert message_of(*FLAGS, "--tensorboard") == "--tensorboard needs the tensorboard package: pip install tensorboard"
    assert names(".") == []
    scalars: list[tuple] = []

    class Writer:
        def __init__(self, folder, purge_step):
            scalars.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            scalars.append((name, value, step))

        def add_text(self, name, text, step):
            scalars.append((name, text, step))

        def close(self):
            scalars.append(("closed",))

    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    assert train(*FLAGS, "--tensorboard", "--out", "run") == 0
    records = log("run")
    assert scalars[0] == ("run/tensorboard", 0)
    assert scalars[-1] == ("closed",)
    assert ("reward", records[2]["reward"], 2) in scalars
    assert ("sample", records[4]["sample"], 4) in scalars
    assert set(trackers.numbers(records[0])) == {each[0] for each in scalars[1:-1]} - {
        "sample", "seconds", "tokens_per_second",
    }  # fmt: skip


class Failing:
    """A tracker whose network is gone."""

    def __init__(self, *_: object) -> None:
        self.asked: list[str] = []

    def log(self, record: dict) -> None:
        self.asked.append("log")
        raise RuntimeError("no network")

    def close(self) -> None:
        self.asked.append("close")
        raise RuntimeError("no network either")


def test_a_tracker_that_fails_ends_no_run(whole, monkeypatch, capsys):
    """Its error is told once; a message of the run's own stays, and so do the handlers of signals."""
    failing, handler = Failing(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "check_trackers", lambda options: None)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda *_: failing)
    assert train(*FLAGS, "--wandb", "sorting", "--out", "run") == 0
    assert failing.asked == ["log"] * 5 + ["close"]
    said = capsys.readouterr().err
    assert said.count("note: ") == said.count("note: --wandb: no network; the run goes on, with its log\n") == 1
    assert log("run") == whole
    with contextlib.ExitStack() as until, before_step(1, lambda: until.enter_context(largest_file(100))):
        assert "cannot be written any more" in message_of(*FLAGS, "--wandb", "sorting", "--out", "full")
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_tracker_is_closed_when_the_next_cannot_start(monkeypatch):
    first = Failing()
    monkeypatch.setattr(loop, "check_trackers", lambda options: None)
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda *_: first)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", no_login)
    assert message_of(*FLAGS, "--tensorboard", "--wandb", "sorting") == "--wandb: no API key"
    assert first.asked == ["close"]


REFUSED = {
    "--temperature 1e-40": "--temperature must be between 1e-4 and 1e4; got 1e-40",
    "--lr 1e300": "--lr must be > 0 and at most 100; got 1e+300",
    "--seed 99999999999999999999999": "--seed must be a number of 64 bits, from -2^63 to 2^63 - 1; got 999999999",
    "--device meta": "--device meta cannot be used here: ",
    "--task reasoning_gym:": "--task must name a dataset, as reasoning_gym:basic_arithmetic does; got 'reasoning_gym:'",
    "--reference-loss --linear-loss": "--linear-loss has no effect with --reference-loss: leave one of them out",
    "--reference-loss --backend cpu": "--backend has no effect with --reference-loss: leave one of them out",
    "--ref-every 3": "--ref-every must be 0 without --kl; got 3",
    "--kl 1e308": "--kl must be 0, or of a size in [1.175e-38, 3.403e+38], as fp32 holds it; got 1e+308",
    "--entropy 1e300": "--entropy must be 0, or of a size in ",
    "--entropy nan": "--entropy must be 0, or of a size in ",
    "--weight-decay 1e300": "--weight-decay must be 0, or of a size in ",
    "--max-grad-norm 1e-50": "--max-grad-norm must be 0, or of a size in ",
    "--micro-batch 99999999999999999999999": "--micro-batch must be a number of 64 bits; got 99999999999999999999999",
    "--largest 9223372036854775808": "--largest must be a number of 64 bits; got 9223372036854775808",
    "--divergence-coef 3": "--divergence-coef must be 1 without --teacher; got 3.0",
}


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_cannot_be_are_refused_by_name(options, capsys):
    """And no folder is made."""
    flags = [flag for flag in FLAGS if not (flag.startswith("--numbers") and "reasoning_gym" in options)]
    assert train(*flags, *options.split()) == 2
    assert REFUSED[options] in capsys.readouterr().err
    assert names(".") == []


@pytest.mark.parametrize("options", ["--entropy 1e30", "--weight-decay 1e30 --warmup 0"])
def test_a_run_that_diverges_at_once_ends_with_a_sentence(options):
    said = message_of(*FLAGS, *options.split(), "--out", "run")
    assert re.match(r"step 0: (the policy's logits are not finite|loss is -?(inf|nan)|grad_norm is (inf|nan)): ", said)
    assert said.endswith("the run has diverged. There was no checkpoint yet. Start anew with a lower --lr.")
    assert names(".") == []


def test_weights_that_are_no_numbers_end_the_run(monkeypatch):
    """And take no checkpoint's place."""
    step = Trainer.train_step

    def run(trainer):
        if trainer.step == 3:
            next(trainer.model.parameters()).data.fill_(math.nan)
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", run)
    assert message_of(*FLAGS, "--checkpoint-every", "2", "--out", "run") == (
        "step 3: the policy's logits are not finite: the run has diverged. The last checkpoint is of step 2, in run. "
        "Start anew with a lower --lr."
    )
    assert len(log("run")) == 3
    assert checkpoint.read(Path("run", "checkpoint.safetensors"))["step"] == 2


@pytest.mark.parametrize("left", [None, "", "\0" * 300], ids=["missing", "empty", "zeros"])
def test_a_run_without_its_log_is_still_there(whole, left, capsys):
    Path("whole", "log.jsonl").unlink()
    if left is not None:
        Path("whole", "log.jsonl").write_text(left)
    capsys.readouterr()
    assert train("--resume", "whole", "--save-model", "model") == 0
    said = capsys.readouterr().out
    assert "note: whole/log.jsonl has 0 of the 5 steps before the checkpoint" in said
    assert "step 5; its log whole/log.jsonl is gone" in said
    assert "log, curves and checkpoint: whole" in said
    assert "policy and tokenizer, for from_pretrained: model" in said
    assert "model.safetensors" in names("model")


SPOILT = {
    '{"steps": 6.5}': "--steps must be of type int; got 6.5",
    '{"steps": true}': "--steps must be of type int; got True",
    '{"linear_loss": "no"}': "--linear-loss must be of type bool; got 'no'",
    '{"task": null}': "--task must be of type str; got None",
    "[1]": "expected an object of options; got [1]",
    "null": "expected an object of options; got null",
    "[" * 100_000: "maximum recursion depth exceeded",
}


@pytest.mark.parametrize("options", SPOILT, ids=lambda text: text[:20])
def test_options_that_were_edited_are_told_of(whole, options):
    Path("whole", "options.json").write_text(options)
    said = message_of("--resume", "whole")
    assert said.startswith("whole is not the folder of a run: its options.json cannot be read (")
    assert SPOILT[options] in said


def test_other_weights_than_the_options_say_are_named(whole):
    path = Path("whole", "options.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden": 24}))
    assert "size mismatch" in message_of("--resume", "whole")


def test_a_full_disk_at_the_first_line_leaves_the_files_that_were_there():
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")
    with largest_file(10):
        with_room_for_options()
    assert names("run") == ["notes.txt"]


def refuse(monkeypatch, method: str, refused: Path) -> None:
    """As the modes of a file, or of its folder, do to anybody but root."""
    plain = getattr(Path, method)

    def asked(self, *arguments, **options):
        if self.absolute() == refused.absolute():
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Path, method, asked)


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(monkeypatch):
    """The run would be thrown away, which is whole."""
    assert train(*FLAGS, "--out", "run") == 0
    refuse(monkeypatch, "open", Path("run/checkpoint.safetensors"))
    said = message_of("--resume", "run")
    assert said.startswith("run/checkpoint.safetensors cannot be read: [Errno 13] Permission denied")
    assert said.endswith("Nothing was changed.")
    said = message_of(*FLAGS, "--teacher", "run", "--divergence", "reverse_kl")
    assert "checkpoint.safetensors cannot be read: [Errno 13] Permission denied" in said


def test_a_folder_that_may_not_be_searched(monkeypatch):
    refuse(monkeypatch, "exists", Path("shut/run"))
    said = message_of(*FLAGS, "--out", "shut/run")
    assert said.startswith("the run folder shut/run cannot be written: [Errno 13] Permission denied")
    assert said.endswith("Choose another with --out.")


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("x" * 300, r"cannot be written: \[Errno 36\] File name too long"),
        ("\udcff", r"the run folder '\\udcff' has no name in UTF-8, as safetensors needs it"),
    ],
    ids=["long", "no UTF-8"],
)
def test_names_that_no_run_can_have(folder, message):
    assert re.search(message, message_of(*FLAGS, "--out", folder))
    assert names(".") == []


def test_a_run_where_the_folder_around_it_has_no_utf8(monkeypatch):
    """What is read and written is named from here."""
    Path("\udcff").mkdir()
    monkeypatch.chdir("\udcff")
    assert train(*FLAGS, "--out", "run") == 0
    assert train("--resume", "run") == 0


def test_runs_is_no_folder(monkeypatch):
    """As a link to a disk that is not there: no number is free."""
    Path("runs").symlink_to("nowhere/else")
    assert "runs is no folder: [Errno 17] File exists: 'runs'. Choose another with --out." in message_of(*FLAGS)


@pytest.mark.parametrize("option", ["--model", "--teacher"])
def test_an_empty_variable_names_no_model(option, capsys):
    assert train(*FLAGS, option, "") == 2
    assert f"{option} must name a folder, or a model of the hub; got ''" in capsys.readouterr().err


def test_a_model_that_could_not_be_saved_is_refused_first():
    assert message_of(*FLAGS, "--save-model", "\udcff") == (
        "--save-model '\\udcff' is no name in UTF-8, as safetensors needs it."
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        link = Path(elsewhere, "link")
        link.symlink_to(link)
        said = message_of(*FLAGS, "--save-model", str(link / "model"))
        assert said == f"--save-model {link}/model cannot be written: Too many levels of symbolic links."
    assert names(".") == []


@pytest.mark.parametrize("option", ["--out", "--resume", "--save-model"])
def test_an_empty_variable_names_no_folder(option, capsys):
    with pytest.raises(SystemExit):
        train(*FLAGS, option, "")
    assert f"argument {option}: expected the name of a folder; got ''" in capsys.readouterr().err
    assert names(".") == []


def test_a_run_without_a_checkpoint_is_told_what_it_is():
    """The advice of one command is not refused by the other."""
    Path("run").mkdir()
    Path("run/log.jsonl").write_text('{"step": 0}\n')
    said = message_of(*FLAGS, "--out", "run")
    assert (
        said
        == "run already holds a run. It has no checkpoint to go on from: remove its log.jsonl, or choose another --out."
    )


@pytest.mark.parametrize("title", [r"m$\foo$", "a_$_$", "$^$", "\udcff"])
def test_a_folder_is_no_formula(title, tmp_path):
    pytest.importorskip("matplotlib")
    DRAW([{"step": 0, "reward": 0.5}], ["reward"], title, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_no_picture_ends_a_run(whole, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr(report, "draw", fails)
    assert train(*FLAGS, "--out", "run") == 0
    told = capsys.readouterr()
    assert told.err.count("note: run/curves.png cannot be drawn: no fonts\n") == 1
    assert "log and checkpoint: run\n" in told.out
    assert log("run") == whole


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3"


@pytest.mark.parametrize("steps", [0, 2])
def test_a_lost_rank_is_said_to_be_lost(monkeypatch, steps):
    """With what to do, which can be done."""

    def fails() -> None:
        raise RuntimeError(GLOO)

    monkeypatch.setattr(Ranks, "has_lost_one", Several.has_lost_one)
    with before_step(steps, fails):
        said = message_of(*FLAGS, "--checkpoint-every", "2", "--out", "run", "--save-model", "model")
    assert said.startswith(f"step {steps}: another rank is gone ({GLOO}). ")
    if steps:
        assert said.endswith("with: python -m grpo_kernels train --resume run --save-model model")
        assert train("--resume", "run") == 0
    else:
        assert said.endswith("There was no checkpoint yet: start again")
        assert names(".") == []


@pytest.mark.parametrize(
    "error", ["op.preamble.length <= op.nbytes. 8 vs 4 (gloo/transport/tcp/pair.cc)", "mat1 and mat2 shapes"]
)
def test_other_errors_of_ranks_are_not_hidden(error):
    assert not Several.has_lost_one(None, RuntimeError(error))
    assert not Ranks().has_lost_one(RuntimeError(GLOO))  # of one process no other is lost
