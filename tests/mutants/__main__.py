"""The command: see the package."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import FrameType
from typing import TypeVar

from . import __doc__ as described
from .judge import Judge, Stopped, Verdict
from .table import ROOT, Mutant, mutants, read_survivors

Given = TypeVar("Given")
Result = TypeVar("Result")


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.mutants", description=str(described).splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="of the names of those that run; default: all")
    parser.add_argument("--list", action="store_true", help="show them, with verdicts that still hold")
    parser.add_argument("--seed", type=int, default=0, help="of the sample that rules make (default 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time (default: every core)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants", help="where verdicts are kept")
    given = parser.parse_args()
    chosen = [mutant for mutant in mutants(given.seed) if all(word in mutant.name for word in given.words)]
    judge = Judge(given.folder)
    if given.list:
        for mutant in chosen:
            show(mutant, judge.recall(mutant), lines=True)
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        run(judge, chosen, given.jobs)
        check(judge, chosen, given.jobs)
    except (KeyboardInterrupt, Stopped):
        print(f"{sum(judge.recall(m) is not None for m in chosen)} of {len(chosen)} judged; the same command goes on")
        return 130
    return int(not summarize(judge, chosen))


def interrupt(number: int, frame: FrameType | None) -> None:
    """Once: what is left to do then takes no time, and copies of the sources are not left half removed."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(judge: Judge, chosen: list[Mutant], jobs: int) -> None:
    """Judge those without a verdict, and show each as it comes."""
    left = [mutant for mutant in chosen if judge.recall(mutant) is None]
    if len(left) < len(chosen):
        print(f"{len(chosen) - len(left)} of {len(chosen)} have been judged before", flush=True)
    for mutant, verdict in done(judge, judge.verdict, left, jobs):
        show(mutant, verdict)


def check(judge: Judge, chosen: list[Mutant], jobs: int) -> None:
    """Run what killed without the faults."""
    for tests, _ in done(judge, judge.check, judge.unchecked(chosen), jobs):
        print(f"without a fault: {len(tests)} of what killed", flush=True)


def done(
    judge: Judge, call: Callable[[Given], Result], left: Sequence[Given], jobs: int
) -> Iterator[tuple[Given, Result]]:
    """Call of each, as they come to their ends, behind the count and the minutes."""
    began = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(call, each): each for each in left}
        try:
            for count, future in enumerate(as_completed(futures), start=1):
                result, minutes = future.result(), (time.monotonic() - began) / 60
                print(f"[{count}/{len(left)}, {minutes:.0f} of about {minutes * len(left) / count:.0f} min]", end=" ")
                yield futures[future], result
        except BaseException:
            judge.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def show(mutant: Mutant, verdict: Verdict | None, lines: bool = False) -> None:
    outcome, said, seconds = verdict or Verdict("not judged", "", 0.0)
    print(f"{outcome}: {mutant.name} ({mutant.place}; {seconds:.0f} s) {said[:150]}", flush=True)
    if lines or outcome != "killed":
        print(f"    - {mutant.before}\n    + {mutant.after}", flush=True)


def summarize(judge: Judge, chosen: list[Mutant]) -> bool:
    """Print the last line; whether every one was killed that compiles, and some of each language."""
    unsound = judge.unsound(chosen)
    verdicts = {mutant: judge.verdict(mutant) for mutant in chosen}
    outcomes = [verdict.outcome for verdict in verdicts.values()]
    killed, survive = outcomes.count("killed") - len(unsound), outcomes.count("survives")
    for mutant, verdict in verdicts.items():
        if verdict.outcome == "survives":
            show(mutant, verdict)
    for mutant in unsound:
        print(f"no kill, for the test fails without a fault: {mutant.name} {verdicts[mutant].said}")
    killers = {mutant.suite.language for mutant, verdict in verdicts.items() if verdict.outcome == "killed"}
    idle = {mutant.suite.language for mutant in chosen} - killers
    if idle:
        print(f"none is killed of {', '.join(sorted(idle))}: what judges them does not run")
    print(
        f"{len(chosen)} mutants: {killed} killed ({100 * killed / max(killed + survive, 1):.1f} % of those that run), "
        f"{survive} survive, {outcomes.count('broken')} do not compile, {len(unsound)} have no sound test; "
        f"{len(read_survivors())} others are listed as what no test can notice (tests/mutants/survivors.txt)"
    )
    return not survive and not unsound and not idle


if __name__ == "__main__":
    sys.exit(main())
