"""``python -m grpo_kernels train``: a minimal GRPO loop on a small task.

python -m grpo_kernels train                       # sort 4 digits, a tiny model, about 3 minutes on two cores
python -m grpo_kernels train --loss gspo --reference-loss --task reasoning_gym:basic_arithmetic
python -m grpo_kernels train --teacher runs/sort-grpo-0 --divergence reverse_kl   # with a trained one as a teacher
torchrun --nproc-per-node 2 -m grpo_kernels train  # the same run, shared by two processes or GPUs
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..objectives.settings import first_line, read_folder
from .loop import Trainer, train
from .options import Options, add_options, read_options
from .ranks import Ranks, start_ranks, started_by_torchrun
from .report import CURVES_FILE, RUNS, RunFolder, SilentFolder, read_saved_options
from .saved_model import check_free, save_policy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument(
        "--out", type=read_folder, help="the run's folder (default: the next free runs/<task>-<loss>-<n>)"
    )
    parser.add_argument(
        "--resume", type=read_folder, metavar="FOLDER", help="continue the run in this folder, bit for bit"
    )
    parser.add_argument(
        "--save-model",
        type=read_folder,
        metavar="DIR",
        help="at the end, write the policy and its tokenizer there, for from_pretrained; of an ended run with --resume",
    )


def main(arguments: argparse.Namespace) -> int:
    """Run ``train`` from the command line and return the exit status."""
    if arguments.resume is not None and arguments.out is not None:
        raise SystemExit(f"--resume {arguments.resume} continues a run in its own folder: leave --out out.")
    if arguments.save_model is not None:
        check_free(arguments.save_model, arguments.resume or arguments.out or RUNS)
    saved = None if arguments.resume is None else read_saved_options(arguments.resume)
    options = read_options(arguments, saved)
    if saved is not None and options != saved:
        raise SystemExit(
            f"--resume continues a run as it was started: give no other options with it; {_other(options, saved)}."
        )
    if saved is not None and (saved.fsdp or saved.tp > 1) and not started_by_torchrun():
        print("note: the run was shared by several ranks; it goes on in one process, whose weights are whole")
        options = dataclasses.replace(options, fsdp=False, tp=1)
    ranks = start_ranks(options.device, options.fsdp, options.tp)
    try:
        return _run(arguments, options, ranks)
    finally:
        ranks.finish()


def _other(options: Options, saved: Options) -> str:
    """Return in words how options differ from those that a run was started with."""
    names = [field.name for field in dataclasses.fields(Options)]
    given = [name for name in names if getattr(options, name) != getattr(saved, name)]
    return ", ".join(f"--{n.replace('_', '-')} was {getattr(saved, n)!r}, got {getattr(options, n)!r}" for n in given)


def _run(arguments: argparse.Namespace, options: Options, ranks: Ranks) -> int:
    resume = arguments.resume is not None
    trainer = None if resume else Trainer(options, ranks)  # what cannot be trained leaves no folder behind
    with contextlib.closing(_folder(arguments, options, ranks)) as folder:
        trainer = trainer or Trainer(options, ranks)
        if arguments.save_model is not None:
            check_free(arguments.save_model, folder.path)  # whose name is known now
        _announce(options, folder, ranks)
        with _told_of_a_lost_rank(trainer, folder, arguments.save_model):
            train(trainer, folder, resume)
            ended = trainer.step >= options.steps
            if arguments.save_model is not None and ended:
                save_policy(trainer.model, trainer.tokenizer, arguments.save_model, ranks.writes)
        if ranks.writes:
            _report(trainer, folder, arguments.save_model, ended)
    return 0 if ended else 130


@contextlib.contextmanager
def _told_of_a_lost_rank(trainer: Trainer, folder: RunFolder, model: Path | None) -> Iterator[None]:
    """Exit with what to do where another rank has ended: a ``model`` that was to be saved is asked for again."""
    try:
        yield
    except RuntimeError as error:
        if not trainer.ranks.has_lost_one(error):
            raise
        goes_on = "There was no checkpoint yet: start again"
        if folder.checkpoint_path.exists():
            goes_on = f"Go on from the last checkpoint with: {_resume(trainer, folder, model)}"
        raise SystemExit(f"step {trainer.step}: another rank is gone ({first_line(error)}). {goes_on}") from error


def _resume(trainer: Trainer, folder: RunFolder, model: Path | None) -> str:
    """Return the command that continues a run, and writes the ``model`` that was to be saved at its end."""
    saved = "" if model is None else f" --save-model {model}"
    return f"{trainer.ranks.command} train --resume {folder.path}{saved}"


def _announce(options: Options, folder: RunFolder, ranks: Ranks) -> None:
    if not ranks.writes:
        return
    config = options.loss_config()
    print(f"{config!r}\nrun folder: {folder.path}", flush=True)
    if config.surrogate is not None and not config.policy_term.uses_ratio and options.epochs > 1:
        print(f"note: --loss {options.loss} has no ratio to correct for a moved policy; --epochs 1 learns better")


def _folder(arguments: argparse.Namespace, options: Options, ranks: Ranks) -> RunFolder:
    """Return the run's folder: one for all ranks, which the first has opened and alone writes into."""
    held: list[RunFolder] = []

    def opened() -> Path:
        if arguments.resume is not None:
            held.append(RunFolder(arguments.resume, options, resume=True))
        elif arguments.out:
            held.append(RunFolder(arguments.out, options, resume=False))
        else:
            held.append(RunFolder.fresh(options))
        return held[0].path

    path = ranks.decide(opened)
    return held[0] if held else SilentFolder(path)


def _report(trainer: Trainer, folder: RunFolder, model: Path | None, ended: bool) -> None:
    records = folder.records()
    if not records and trainer.step:
        print(f"step {trainer.step}; its log {folder.log_path} is gone")
    elif not records:
        print("interrupted before the end of its first step: nothing is left of the run")
        return
    else:
        _report_rewards(trainer.step, records)
    curves = ", curves" * (folder.path / CURVES_FILE).exists()
    print(f"log{curves} and checkpoint: {folder.path}")
    if not ended:
        print(f"interrupted; continue with: {_resume(trainer, folder, model)}")
        return
    if model is not None:
        print(f"policy and tokenizer, for from_pretrained: {model}")
    if trainer.step > trainer.options.steps:
        print(f"note: its checkpoint is beyond the {trainer.options.steps} steps that options.json asks for")


def _report_rewards(step: int, records: list[dict[str, Any]]) -> None:
    rewards = [record["reward"] for record in records[-50:]]
    seconds = sum(record["seconds"] for record in records)
    mean = sum(rewards) / len(rewards)
    print(f"step {step}, {seconds:.0f} s: mean reward of the last {len(rewards)} steps {mean:.3f}")
