"""Prove and time the GPU kernels on this machine in one command of eight minutes, without a network:

    python3 benchmarks/gpu_check.py --out benchmarks/results/h200

Or in two commands, of which the second goes on where the first stopped. Where a rented machine brings back one folder,
$OUT, and empties it before each command, copy its check-1 into the tree between them (HASH: the commit, where there is
no .git):

    timeout 490 python3 -u benchmarks/gpu_check.py --out $OUT/check-1 --minutes 7.8 --commit HASH --only smoke,verify,suite,sanitizer,limits,large,pairs
    timeout 310 python3 -u benchmarks/gpu_check.py --out $OUT/check-2 --minutes 4.8 --commit HASH --resume check-1

Parts, in order: smoke (every kernel, from least to most risk); verify (presets against float64); suite (the CUDA
kernels' tests on the GPU); sanitizer (memcheck, racecheck, synccheck of compute-sanitizer, which COMPUTE_SANITIZER may
name; racecheck is a gate from 2026.3 on); limits (bandwidths); large (vocabularies up to 262,144, more than 2^31
elements); triton (its presets against float64); timing, from logits; pairs (divergences from a teacher against float64,
and their times); traffic (bytes that kernels move, by ncu); linear, from hidden states. Where smoke fails, the CUDA
kernels' other parts are left out. Each part is a process with a deadline: one that hangs or faults takes no other with
it, and nothing that was started outlives the run. What is not expected to fit into --minutes is named before it begins,
and runs if the others leave time.

DIR gets gpu_check.json, written after every row, gpu_check.md, its table, and gpu_check.log. It holds one run: only
--resume of the same folder adds to it, with the same card, commit and library.

Exit status 0: all that ran passed, and of the proof (smoke, verify, suite, sanitizer, large) nothing that was asked for
was left out or skipped; 1: something failed or lacks, which the last lines name; 2: refused; 128 + N: signal N. The last
line says whether the CUDA kernels are proven here: --only verify can pass without.
--device cpu rehearses every line of smoke, and what else can run, over tests/cuda_emulator.
"""  # noqa: E501

from __future__ import annotations

import argparse
import fcntl
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import gpu_library
import gpu_process
import gpu_record
import gpu_rows
from gpu_commands import PARTS, ROWS, SECONDS, Command, Setting
from gpu_machine import CUDA_CAPABILITY, Refused, check_gpu, commit, driver, look, prepare_emulator, prepare_library
from gpu_process import say
from gpu_record import Record, Results, outcome

ROOT = Path(__file__).resolve().parent.parent
LOG = "gpu_check.log"
SAME = "card, commit or library"
LOOK = 20
"""Seconds, as expected, to find out what is here."""
LAST = 8.0
"""Seconds at the end in which what is left is killed and written."""
IMPORTS = 10.0
"""Seconds before a Python process of a part knows what time it is."""


class Held(Exception):
    """Raised where the driver does not let go of a process: whatever came next would measure that."""


class Check:
    """One run: its record, its log and its end."""

    def __init__(self, record: Record, setting: Setting, end: float) -> None:
        self.record, self.setting, self.end = record, setting, end
        self.log = record.folder / LOG

    def left(self) -> float:
        return self.end - LAST - time.monotonic()

    def setting_of(self, name: str) -> Setting:
        """Return the setting, without the CUDA kernels once the smoke part has failed."""
        if name == "smoke" or not self.record.failed("smoke"):
            return self.setting
        return replace(self.setting, backends=tuple(b for b in self.setting.backends if b != "cuda"))

    def run(self, names: Sequence[str]) -> None:
        """Run every part, unless there is a reason to leave it out, which is said."""
        for name in names:
            part = PARTS[name]
            if part.cuda and "cuda" not in self.setting_of(name).backends:
                say(f"{name}: left out, the smoke part failed")
                continue
            if self.left() < part.expected:
                say(f"{name}: left out, it takes about {part.expected:.0f} s and {self.left():.0f} are left")
                continue
            self.part(name)

    def part(self, name: str) -> None:
        part, setting, start = PARTS[name], self.setting_of(name), time.monotonic()
        seconds = min(part.deadline, self.left())
        say(f"{name}: {part.what}; about {part.expected:.0f} s, at most {seconds:.0f}")
        entry = self.record.begin(name, setting.backends)
        commands = part.commands(setting)
        if isinstance(commands, str):
            entry |= {"skipped": commands, "passed": None}
            commands = []
        try:
            for command in commands:
                self.command(name, command, start + seconds - time.monotonic())
            if commands:
                entry |= gpu_record.verdict(entry["rows"])
            entry.pop("stopped")
        finally:
            entry["seconds"] = time.monotonic() - start
            self.record.save()
        say(f"   {outcome(entry)}, {entry['seconds']:.0f} s")

    def command(self, part: str, command: Command, seconds: float) -> None:
        """What it finds is in the record at once, whatever becomes of it; at its end whether it passed."""
        rows = self.record.results[part]["rows"]
        if any(row["name"] == command.name and row.get("passed") for row in rows):
            return
        try:
            ended, text = self.process(part, command, min(command.seconds, seconds))
        except OSError as error:  # no space is left for the log
            self.record.add(part, {"name": command.name, "passed": False, "how": f"not run: {error}"})
            return
        figures = command.read(text)
        passed = not str(ended) and figures.get("passed", True)
        row = {"name": command.name, "seconds": ended.seconds, "how": str(ended), **figures, "passed": passed}
        self.record.add(part, row if command.gates else {**row, "gates": False})
        say(f"   {_line(row)}")
        if not passed:
            say("\n".join(f"   | {line}" for line in gpu_process.last_lines(text, 15)))
        if ended.held or any("held by the driver" in row.get("how", "") for row in rows):
            raise Held(f"{part}, {command.name}: {ended or 'a step is held by the driver'}")

    def process(self, part: str, command: Command, seconds: float) -> tuple[gpu_process.Ended, str]:
        """Its end and its output; the rows that it measures are in the record at once."""
        rows = self.record.results[part]["rows"]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "rows")
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            known = len(rows)

            def tick() -> None:
                nonlocal known
                for row in gpu_rows.read(file)[known:]:
                    known += 1
                    self.record.add(part, row)
                    say(f"   {_line(row)}")

            given = {ROWS: str(file), SECONDS: f"{max(1.0, seconds - IMPORTS):.0f}"}
            argv = [given.get(argument, argument) for argument in command.argv]
            with self.log.open("a") as log:
                log.write(f"\n{part}, {command.name}: {shlex.join(argv)}\n")
            environment = {**self.environment(part), **command.environment}
            return gpu_process.logged(argv, seconds, self.log, environment, tick)

    def environment(self, part: str) -> dict[str, str]:
        """Leave out the CUDA library where the smoke part failed: automatic choice might take it."""
        missing = {gpu_library.NAMED: str(ROOT / "no library after a failed smoke part")}
        return {} if "cuda" in self.setting_of(part).backends else missing


def _line(row: gpu_rows.Row) -> str:
    verdict = "" if row.get("passed", True) else f"  FAILED {row.get('how', '')}"
    seconds = f" ({row['seconds']:.1f} s)" if "seconds" in row else ""
    return f"{row['name']}{seconds}{verdict}"


# The command


def earlier_of(folder: Path | None) -> Results:
    if folder is None:
        return {}
    try:
        return gpu_record.read(folder)
    except (OSError, ValueError) as error:
        raise Refused(
            f"--resume {folder} is no folder with the record of a run ({gpu_record.FILE}): {error}"
        ) from error


def lock(folder: Path, resume: Path | None) -> BinaryIO:
    """Hold the log of a run in a folder of its own or in that of the run that it resumes, as long as it is open."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / LOG).open("ab")
    except OSError as error:
        raise Refused(f"--out {folder} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Refused(f"--out {folder} is another run's, which goes on; take another folder") from error
    except OSError:
        pass  # a file system without locks
    if (folder / gpu_record.FILE).exists() and not (resume and resume.resolve() == folder.resolve()):
        raise Refused(f"--out {folder} holds an earlier run: --resume {folder} goes on with it, or take another folder")
    return log


def names_of(only: str | None) -> list[str]:
    asked = list(PARTS) if only is None else [name.strip() for name in only.split(",")]
    if unknown := sorted(set(asked) - set(PARTS)):
        raise Refused(f"--only: there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return [name for name in PARTS if name in asked]


def fitting(names: Sequence[str], seconds: float) -> list[str]:
    """Those that fit, as expected, in order; a shorter one may fit where a longer one does not. What runs is decided
    when its turn comes, by the time that is left then."""
    chosen = []
    for name in names:
        if PARTS[name].expected <= seconds:
            chosen.append(name)
            seconds -= PARTS[name].expected
    return chosen


def check_minutes(names: Sequence[str], minutes: float) -> None:
    needed = LOOK + LAST + PARTS[names[0]].expected
    if not 60 * minutes >= needed:  # nan is not
        raise Refused(f"--minutes {minutes:g} is less than {names[0]} needs: at least {needed / 60:.1f}")


def check(arguments: argparse.Namespace) -> int:
    start, names = time.monotonic(), names_of(arguments.only)
    check_minutes(names, arguments.minutes)
    earlier = earlier_of(arguments.resume)
    with lock(arguments.out, arguments.resume):
        return finish(prepared(arguments, names, earlier, start + 60 * arguments.minutes), names)


def prepared(arguments: argparse.Namespace, names: Sequence[str], earlier: Results, end: float) -> Check:
    """Find out what is here, what of an earlier run is of the same, and until when."""
    log = arguments.out / LOG
    say(f"looking at {arguments.device}, about {LOOK} s")
    found = look(arguments.device, log)
    backends: tuple[str, ...] = ("cuda", "triton")
    if arguments.device == "cpu":
        prepare_emulator(log)
        backends = backends if found["triton_refused"] is None else ("cuda",)
    else:
        check_gpu(found, names)
        if tuple(found["capability"]) >= CUDA_CAPABILITY:
            prepare_library(found["capability"], log)
        else:
            backends = ("triton",)
    made = {"commit": arguments.commit or commit(), "library": gpu_library.sources(), "driver": driver()}
    record = Record(arguments.out, {**found, **made})
    if not gpu_record.names_the_code(made["commit"]):
        why = (
            "there is no .git and no --commit" if made["commit"] is None else f"{made['commit']}: the tree was changed"
        )
        say(f"{why}: this proves nothing, and a run that resumes this one will repeat all of it")
    if other := record.resume(earlier):
        if arguments.resume.resolve() == arguments.out.resolve():
            raise Refused(f"--out {arguments.out} holds {', '.join(other)} of another {SAME}: take another folder")
        say(f"made with another {SAME}, not taken over: {', '.join(other)}")
    return Check(record, Setting(arguments.device, backends), end)


def finish(run: Check, names: list[str]) -> int:
    """Run what is still to do, and return the exit status."""
    done = [name for name in names if run.record.passed(name, run.setting.backends)]
    todo = [name for name in names if name not in done]
    chosen = fitting(todo, run.left())
    late = [name for name in todo if name not in chosen]
    for words, some in (
        ("passed before", done),
        ("to run", chosen),
        ("to run if others take less than expected", late),
    ):
        say(f"{words}: {', '.join(some) or 'none'}")
    status = 0
    try:
        run.record.save()
        run.run(todo)
    except Held as held:
        say(f"stopped, the driver does not answer: {held}")
        status = 1
    except gpu_process.Interrupted as interrupted:
        say(f"interrupted by {interrupted}; what was measured is kept")
        status = interrupted.status
    run.record.save()
    say(f"\n{gpu_record.markdown(run.record.results)}")
    if run.record.unsaved is not None:
        say(f"the record could not be written: {run.record.unsaved}")
        status = status or 1
    unproven = [] if run.setting.rehearsal else run.record.unproven(names)
    if unproven:
        say(f"of the proof that was asked for there lacks: {', '.join(unproven)}")
    say(gpu_record.proven(run.record.results))
    return status or int(bool(unproven) or any(run.record.failed(name) for name in names))


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("a folder is needed, '.' for this one")
    return Path(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=_folder, required=True, help="folder for gpu_check.json, .log and .md")
    parser.add_argument("--minutes", type=float, default=8.0, help="for the whole run (default: 8)")
    parser.add_argument("--only", metavar="PARTS", help=f"separated by commas, of {', '.join(PARTS)}")
    parser.add_argument(
        "--resume", type=_folder, metavar="DIR", help="the folder of an earlier run: passed parts are kept"
    )
    parser.add_argument("--commit", metavar="HASH", help="what is measured (default: as git says)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a rehearsal on tiny shapes")
    gpu_process.end_on_signals()
    try:
        return check(parser.parse_args(argv))
    except Refused as refused:
        print(f"gpu_check: {refused}", file=sys.stderr)
        return 2
    except gpu_process.Interrupted as interrupted:
        print(f"interrupted by {interrupted}", file=sys.stderr)
        return interrupted.status


if __name__ == "__main__":
    raise SystemExit(main())
